"""One process of a small job that saves and resumes; test_checkpoint.py starts and kills it.

    python -m tests.checkpoints.checkpoint_worker '{"workdir": …, "process": 0, "processes": 2, …}'

The state is a function of the step alone, so that the parent can tell which pairs of state
and iterator state belong together. Prints one JSON line.
"""

import json
import os
import sys

_ARGS = json.loads(sys.argv[1]) if __name__ == "__main__" else {}
if _ARGS:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={_ARGS['devices']}"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from t5x_lite.checkpoints import format as checkpoint_format, manager

NUM_SHARDS = 4


def expected_state(step: int) -> dict[str, np.ndarray]:
    """By path, on the host."""
    kernel = np.arange(64 * 512, dtype=np.float32).reshape(64, 512) + step
    return {"params/mlp/wi/kernel": kernel, "params/norm/scale": np.arange(8.0) * 2.0**step,
            "step": np.int32(step)}


def abstract_state(mesh: jax.sharding.Mesh) -> dict:
    def leaf(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype,
                                    sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    return {"params": {"mlp": {"wi": {"kernel": leaf((64, 512), jnp.float32, "fsdp")}},
                       "norm": {"scale": leaf((8,), jnp.bfloat16)}},
            "step": leaf((), jnp.int32)}


def make_state(mesh: jax.sharding.Mesh, step: int) -> dict:
    values = expected_state(step)

    def put(path, x):
        value = np.asarray(values[jax.tree_util.keystr(path, simple=True, separator="/")], x.dtype)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: value[index])
    return jax.tree_util.tree_map_with_path(put, abstract_state(mesh))


def make_mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((len(jax.devices()),), ("fsdp",), axis_types=(AxisType.Explicit,))


def iterator_states(step: int, shards) -> dict[int, bytes]:
    return {shard: b"shard %d at step %d" % (shard, step) for shard in shards}


def check(restored: checkpoint_format.Restored, step: int):
    """Asserts that the state and the iterator states are those of `step`, bit for bit."""
    values = expected_state(step)
    for path, leaf in jax.tree_util.tree_flatten_with_path(restored.state)[0]:
        value = np.asarray(values[jax.tree_util.keystr(path, simple=True, separator="/")],
                           leaf.dtype)
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index])
    assert restored.iterator_states == iterator_states(step, range(NUM_SHARDS))


def main(workdir: str, process: int, processes: int, port: int, steps: int, devices: int):
    """Resumes, checks what it resumed from, and saves `steps` more steps, one checkpoint each."""
    del devices
    checkpoint_format.quiet_orbax()
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    mesh = make_mesh()
    own_shards = range(process, NUM_SHARDS, processes)
    with manager.Checkpointer(workdir, manager.CheckpointConfig(keep_last=2)) as ckpt:
        restored = ckpt.restore_latest(abstract_state(mesh))
        start = 0
        if restored is not None:
            start = restored.record.step
            check(restored, start)
        overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
        for step in range(start + 1, start + 1 + steps):
            state = make_state(mesh, step)
            ckpt.save(step, state, iterator_states(step, own_shards), '{"seed": 0}')
            overwrite(state)
        ckpt.wait()
        print(json.dumps({"start": start, "steps": ckpt.all_steps()}), flush=True)


if __name__ == "__main__":
    main(**_ARGS)
