"""How a step's time grows with tokens, depth, experts and width: slopes, measured.

    python scripts/bench_growth.py

Times a step of variations of configs/quickstart.py, and prints for each series the seconds and the slope
of log(seconds) over log(size): 1 is in proportion, 0 is free. Beside it stands the slope of the model's
FLOPs, which a step that only multiplied would have. Layers are unrolled, as the quickstart has them.
"""

import dataclasses
import time

import cpu_environment  # noqa: F401  first of all: it may start the script again
from absl import flags

from t5x_lite import cli

_STEPS = flags.DEFINE_integer("steps", 3, "Steps timed, after one that is not; the least counts.")


def deeper(run, factor: int):
    """The run with so many times the layers."""
    model = run.model
    for side in ("encoder", "decoder"):
        stack = getattr(model, side)
        segments = tuple(dataclasses.replace(s, repeats=s.repeats * factor) for s in stack.segments)
        model = dataclasses.replace(model, **{side: dataclasses.replace(stack, segments=segments)})
    return dataclasses.replace(run, model=model)


def with_blocks(run, change):
    """The run with every block changed."""
    model = run.model
    for side in ("encoder", "decoder"):
        stack = getattr(model, side)
        segments = tuple(dataclasses.replace(s, blocks=tuple(map(change, s.blocks)))
                         for s in stack.segments)
        model = dataclasses.replace(model, **{side: dataclasses.replace(stack, segments=segments)})
    return dataclasses.replace(run, model=model)


def wider(run, factor: int):
    """The run with so many times the width, the heads and the hidden width of MLPs."""
    def change(block):
        attention = {n: dataclasses.replace(a, num_heads=a.num_heads * factor)
                     for n in ("self_attention", "cross_attention")
                     if (a := getattr(block, n)) is not None}
        return dataclasses.replace(block, **attention, mlp=dataclasses.replace(
            block.mlp, mlp_dim=block.mlp.mlp_dim * factor))
    run = with_blocks(run, change)
    return dataclasses.replace(run, model=dataclasses.replace(
        run.model, embed_dim=run.model.embed_dim * factor))


def main() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from configs import quickstart
    from t5x_lite import config as configs
    from t5x_lite.build import build

    def seconds(run) -> tuple[float, float]:
        """(of a step, its model FLOPs)."""
        program = build(run)
        state = program.init_state()
        batch = {name: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)
                 for name, x in program.abstract_batch().items()}
        step = program.compile_train_step(run.train.global_batch_size)
        taken = []
        with program.activate():
            for _ in range(_STEPS.value + 1):
                begin = time.perf_counter()
                state, _ = jax.block_until_ready(step(state, batch))
                taken.append(time.perf_counter() - begin)
        return min(taken[1:]), program.flops_per_sequence * run.train.global_batch_size

    dense, moe = quickstart.run(), quickstart.run("moe")

    def rows(run, count: int):
        return configs.replace(run, "train.global_batch_size", count)

    def experts(count: int):
        return with_blocks(rows(moe, 16), lambda block: block if block.moe is None else
                           dataclasses.replace(block, moe=dataclasses.replace(
                               block.moe, num_experts=count)))

    series = {
        "rows": {n: rows(dense, n) for n in (8, 16, 32)},
        "length (8 rows)": {n: configs.replace(configs.replace(
            rows(dense, 8), "data.inputs_length", n), "data.targets_length", n // 4)
            for n in (128, 256, 512)},
        "layers": {4 * n: deeper(rows(dense, 8), n) for n in (1, 2, 4)},
        "width": {dense.model.embed_dim * n: wider(rows(dense, 8), n) for n in (1, 2, 4)},
        "experts (16 rows)": {n: experts(n) for n in (4, 8, 16)}}
    for name, runs in series.items():
        found = {size: seconds(run) for size, run in runs.items()}
        sizes = np.log(list(found))
        slopes = [np.polyfit(sizes, np.log([f[i] for f in found.values()]), 1)[0] for i in (0, 1)]
        shown = ", ".join(f"{size}: {taken:.3f} s" for size, (taken, _) in found.items())
        print(f"{name:<22} slope {slopes[0]:.2f} (FLOPs {slopes[1]:.2f})   {shown}", flush=True)


if __name__ == "__main__":
    cli.run(main)
