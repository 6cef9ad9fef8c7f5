"""What a checkpoint costs: the step that an asynchronous save blocks, and restoring.

    python scripts/bench_checkpoint.py --config=configs/t5_1_1.py:small --folder=/tmp

Prints, for a state with fresh numbers of the config, the median over the rounds of: a step (8 x 512/114,
as bench_step.py's); the time that the loop stands still for an asynchronous save, and its share of the
step; the whole save until it is committed; restoring the state, and the parameters alone, each beside
what reading the same files takes (the limit) in the same round. Then what bounds them: copying the state
once in memory, which the next step must wait for, its digests, and Orbax's own restore of the arrays,
which nothing verifies. The files stay in the page cache, so
that the disk is not what is measured.
"""

import pathlib
import statistics
import tempfile
import time

import cpu_environment  # noqa: F401  first of all: it may start the script again
from absl import flags

from t5x_lite import cli

_CONFIG = cli.define_config()
_FOLDER = flags.DEFINE_string("folder", None, "Where the checkpoints are written; default: the temporary one.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds, after one that is not timed.")
_STEP = flags.DEFINE_bool("step", True, "Also time a step.")


def timed(fn):
    begin = time.perf_counter()
    result = fn()
    return result, time.perf_counter() - begin


def read_files(folder: pathlib.Path, part: str = "") -> int:
    """Bytes of all files under the folder, of those whose path has `part` in it."""
    return sum(len(file.read_bytes()) for file in sorted(folder.rglob("*"))
               if file.is_file() and part in str(file.relative_to(folder)))


def main() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import orbax.checkpoint as ocp

    from t5x_lite import config as configs
    from t5x_lite.build import build
    from t5x_lite.checkpoints.digests import digests_of
    from t5x_lite.checkpoints.format import named_leaves
    from t5x_lite.checkpoints.manager import CheckpointConfig, Checkpointer, restore_params

    run = cli.run_config(_CONFIG)
    for name, value in (("train.global_batch_size", 8), ("data.inputs_length", 512),
                        ("data.targets_length", 114), ("data.packing", False)):
        run = configs.replace(run, name, value)
    program = build(run)
    state = jax.block_until_ready(program.init_state())
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    parameters = sum(x.nbytes for x in jax.tree.leaves(state["params"]))
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float, i: int) -> None:
        if i:
            seconds.setdefault(name, []).append(value)

    def by_orbax(files: pathlib.Path):
        return jax.block_until_ready(ocp.PyTreeCheckpointHandler().restore(
            files / "state", args=ocp.args.PyTreeRestore()))

    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder, \
            Checkpointer(folder, CheckpointConfig(keep_last=1)) as checkpointer:
        for i in range(_ROUNDS.value + 1):
            _, blocked = timed(lambda i=i: checkpointer.save(i + 1, state, {0: b""}, "{}"))
            note("blocked", blocked, i)
            _, rest = timed(checkpointer.wait)
            note("committed", blocked + rest, i)
            files = pathlib.Path(folder) / "checkpoints" / str(i + 1)
            note("reading its files", timed(lambda f=files: read_files(f))[1], i)
            note("restore", timed(lambda i=i: jax.block_until_ready(
                checkpointer.restore(i + 1, program.abstract_state).state))[1], i)
            note("restore parameters", timed(lambda f=files: jax.block_until_ready(
                restore_params(f, program.abstract_params)[0]))[1], i)
            note("restore by Orbax alone", timed(lambda f=files: by_orbax(f))[1], i)
            note("digests", timed(lambda: jax.block_until_ready(
                digests_of(named_leaves(state), finite=True)))[1], i)
            note("copying", timed(lambda: [np.array(x) for x in jax.tree.leaves(state)])[1], i)
        if _STEP.value:
            batch = {name: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)
                     for name, x in program.abstract_batch().items()}
            step = program.compile_train_step(8)
            with program.activate():
                for i in range(3):
                    (state, _), taken = timed(
                        lambda state=state: jax.block_until_ready(step(state, batch)))
                    note("step", taken, i)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{run.name}: a state of {size / 1e6:,.0f} MB, parameters {parameters / 1e6:,.0f} MB")
    for name, value in medians.items():
        print(f"{name:<22} {value * 1e3:9.1f} ms")
    read = medians["reading its files"]
    print(f"restore            {read / medians['restore']:.2f} of a plain read of its files; "
          f"parameters alone {medians['restore parameters'] / medians['restore']:.2f} of its time; "
          f"Orbax alone {read / medians['restore by Orbax alone']:.2f} of a plain read")
    if _STEP.value:
        print(f"a step is blocked for {medians['blocked'] / medians['step']:.2%} of its time; for copying "
              f"alone it would be {medians['copying'] / medians['step']:.2%}")


if __name__ == "__main__":
    cli.run(main)
