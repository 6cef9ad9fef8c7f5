"""Time and resident memory of a train step by where its state is kept, each in a process of its own.

    python scripts/bench_offload.py --folder=/tmp
    python scripts/bench_offload.py --folder=/mnt/nvme --layers=48 --width=1024
    python scripts/bench_offload.py --topology=v5e:2x2 --layers=4

A decoder-only model with AdamW. Resident memory is what the process has of its own (RssAnon of
/proc/self/status: files' pages, which the kernel takes back when it likes, are not in it), the highest of
samples a few milliseconds apart during steps after the first, less what was there before the state was
made. "Computed" is parameters, gradients and what of the optimizer state is in memory at once:
activations and buffers come on top in every row alike. On a CPU device and host are the same memory:
what the host keeps leaves no device there, and its rows show what the visits cost in time.

With --topology nothing runs: libtpu compiles the step for one chip of the two memories, with --layers layers and
with twice as many. What a layer adds to the device is computed from what stays there: 4 bytes a parameter, 4 of
its gradient, 8 of its moments.
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

from absl import flags

from t5x_lite import cli

_FOLDER = flags.DEFINE_string("folder", "/tmp", "For optimizer state on disk.")
_LAYERS = flags.DEFINE_integer("layers", 12, "Layers.")
_WIDTH = flags.DEFINE_integer("width", 512, "embed_dim; MLPs are four times as wide.")
_STEPS = flags.DEFINE_integer("steps", 5, "Steps timed, after one that compiles.")
_ROW = flags.DEFINE_string("row", "", "One value of sharding.offload, in this process.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "TPUs to compile for instead, such as v5e:2x2.")
OFFLOADS = ("none", "optimizer_host", "params_host", "optimizer_disk")
# Bytes a parameter of a stack that stay on the device through a step: parameters, gradients, moments.
STAY = {"none": 16, "optimizer_host": 8, "params_host": 0, "optimizer_disk": 8}
MIB = 2**20
# glibc else keeps for itself what is freed, up to 32 MiB an array, and counts as in use.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}


def resident() -> int:
    """Bytes of this process that are in memory and in no file."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


class Highest(threading.Thread):
    """The highest `resident` while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.found, self._stop_now = 0, threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.003):
            self.found = max(self.found, resident())

    def end(self) -> int:
        self._stop_now.set()
        self.join()
        return self.found


def run_config(offload: str, layers: int = 0):
    """The run of one row; layers: 0 for --layers."""
    from t5x_lite.config import RunConfig, ShardingConfig, TrainConfig
    from t5x_lite.data.config import DataConfig
    from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
    from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
    from t5x_lite.parallel.sharding import MeshConfig
    from t5x_lite.training.methods import OptimizerConfig
    from t5x_lite.training.objectives import ObjectiveConfig
    width = _WIDTH.value
    block = BlockConfig(AttentionConfig(num_heads=8, head_dim=width // 8), None, MLPConfig(mlp_dim=4 * width))
    stack = StackConfig((SegmentConfig((block,), layers or _LAYERS.value),), causal=True, remat="full",
                        position=PositionConfig("rotary"))
    return RunConfig(
        model=ModelConfig("decoder_only", vocab_size=512, embed_dim=width, encoder=None, decoder=stack),
        objective=ObjectiveConfig("lm"), data=DataConfig(targets_length=64),
        optimizer=OptimizerConfig(name="adamw"), train=TrainConfig(global_batch_size=2),
        mesh=MeshConfig(data=1), sharding=ShardingConfig(offload=offload, offload_folder=_FOLDER.value))


def measure(offload: str) -> dict:
    """Seconds a step, and MiB of memory computed and measured."""
    import jax
    import numpy as np

    from t5x_lite.build import build
    from t5x_lite.parallel import disk
    program = build(run_config(offload), jax.devices()[:1])
    batch = {name: jax.device_put(np.ones(x.shape, x.dtype), x.sharding)
             for name, x in program.abstract_batch().items()}
    step = program.compile_train_step(2)
    before = resident()
    state = program.init_state()
    with program.activate():
        state, sums = step(state, batch)
        jax.block_until_ready((state, sums))
        watch = Highest()
        watch.start()
        began = time.perf_counter()
        for _ in range(_STEPS.value):
            state, sums = step(state, batch)
            jax.block_until_ready((state, sums))
        seconds = (time.perf_counter() - began) / _STEPS.value
        highest = watch.end()
    def nbytes(part: str) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state[part]))
    params = nbytes("params")
    on_disk = disk.kept(program.abstract_state)
    moments = sum(x.nbytes for x in on_disk if x.path.count("segment_")) // _LAYERS.value
    held = (disk.AHEAD + disk.BEHIND + 1) * moments if on_disk else nbytes("opt_state")
    return {"offload": offload, "seconds": seconds, "loss": float(sums["loss"][0]),
            "computed": (2 * params + held) / MIB, "measured": (highest - before) / MIB,
            "on_disk": sum(x.nbytes for x in on_disk) / MIB}


def compiled(offload: str) -> dict:
    """MiB on one chip as libtpu allocates them: at the peak, and what a layer adds to it."""
    from t5x_lite.build import build
    from t5x_lite.planning import rehearse
    chips = rehearse.topology(_TOPOLOGY.value).devices
    few, many = (_LAYERS.value, 2 * _LAYERS.value)
    programs = [build(run_config(offload, layers), chips[:1]) for layers in (few, many)]
    found = [rehearse.compile_step(program) for program in programs]
    each = (programs[1].num_params - programs[0].num_params) / (many - few)
    grown = (found[1].peak_bytes - found[0].peak_bytes) / (many - few)
    host = found[1].host_argument_bytes
    return {"offload": offload, "few": found[0].peak_bytes / MIB, "many": found[1].peak_bytes / MIB,
            "host": host / MIB, "computed": STAY[offload] * each / MIB, "grown": grown / MIB,
            "seconds": sum(x.seconds for x in found)}


def show_compiled() -> None:
    """A row a value of sharding.offload."""
    few, many = _LAYERS.value, 2 * _LAYERS.value
    print(f"{'sharding.offload':<16} {f'{few} layers, MiB':>15} {f'{many} layers, MiB':>15} "
          f"{f'host at {many}, MiB':>17} {'a layer: computed':>18} {'compiled':>9}  s to compile")
    for offload in OFFLOADS:
        row = compiled(offload)
        print(f"{offload:<16} {row['few']:15.1f} {row['many']:15.1f} {row['host']:17.1f} {row['computed']:18.1f} "
              f"{row['grown']:9.1f}  {row['seconds']:.0f}", flush=True)


def main() -> None:
    if _TOPOLOGY.value:
        show_compiled()
        return
    if _ROW.value:
        print(json.dumps(measure(_ROW.value)))
        return
    rows = []
    for offload in OFFLOADS:
        done = subprocess.run([sys.executable, *sys.argv, f"--row={offload}"], capture_output=True,
                              text=True, env={**os.environ, **GIVES_BACK})
        if done.returncode:
            sys.exit(f"{offload}: {done.stderr[-2000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    first = rows[0]
    print(f"{'sharding.offload':<16} {'s a step':>9} {'times':>6} {'computed MiB':>13} {'measured MiB':>13} "
          f"{'ratio':>6} {'on disk MiB':>12}  loss after {_STEPS.value + 1} steps")
    for row in rows:
        print(f"{row['offload']:<16} {row['seconds']:9.3f} {row['seconds'] / first['seconds']:6.2f} "
              f"{row['computed']:13.0f} {row['measured']:13.0f} {row['measured'] / first['measured']:6.2f} "
              f"{row['on_disk']:12.0f}  {row['loss']:.6g}")


if __name__ == "__main__":
    cli.run(main, alone=True)
