"""Every preset on 16 described H100, its state split over them, as a Markdown table.

    python scripts/preset_table.py

A row has the parameters, the bytes of a device's parameters, optimizer state and batch
(mesh.fsdp=16, or as many as divide the width, and the rest mesh.data; as `t5x_lite.plan` counts
them before any temporaries), the recipe's rows a step
(once a ramp is over) and the FLOPs of such a step as MFU counts them. Two CPU minutes, no compiler.
"""

import importlib
import math
import pathlib
from collections.abc import Iterator

import jax

from t5x_lite import cli
from t5x_lite.build import build
from t5x_lite.config import RunConfig, replace
from t5x_lite.cost import tables
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.planning import rehearse
from t5x_lite.training.batch_ramp import BatchRampConfig

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
DEVICES = 16


def presets() -> dict[str, list[str | None]]:
    """{family: its sizes}, the small ones of one size and their sparse twins among them."""
    found = {}
    for file in sorted(CONFIGS.glob("[!_]*.py")):
        module = importlib.import_module(f"configs.{file.stem}")
        found[file.stem] = {"quickstart": [None, "moe"], "python_text": [None, "moe"], "mixtral": ["8x7b"]}.get(
            file.stem) or list(getattr(module, "SIZES", ()))   # configs/hf.py has those of a folder
    return found


def split(family: str, size: str | None) -> RunConfig:
    """The preset on 16 devices, without its ramp, rows rounded up to a multiple of 16."""
    run = importlib.import_module(f"configs.{family}").run(size)
    rows = -(-run.train.global_batch_size // DEVICES) * DEVICES
    run = replace(replace(run, "train.global_batch_size", rows), "train.batch_ramp",
                  BatchRampConfig())
    fsdp = math.gcd(DEVICES, run.model.embed_dim)
    return replace(replace(run, "mesh", MeshConfig(data=DEVICES // fsdp, fsdp=fsdp)),
                   "eval.batch_size", 0)


def table() -> Iterator[str]:
    """The lines."""
    yield "| preset | parameters | fsdp | state a device | rows a step | FLOPs a step |"
    yield "|---|---:|---:|---:|---:|---:|"
    machine = rehearse.topology(f"h100:{DEVICES}", count_only=True)
    for family, sizes in presets().items():
        for size in sizes:
            config = split(family, size)
            program = build(config, machine.devices)
            rows = importlib.import_module(f"configs.{family}").run(size).train.global_batch_size
            state = sum(rehearse.argument_bytes(program).values())
            yield (f"| {family}{f':{size}' if size else ''} | {program.num_params:,} "
                   f"| {config.mesh.fsdp} | {tables.binary_bytes(state)} | {rows:,} "
                   f"| {tables.quantity(rows * program.flops_per_sequence, 'FLOP')} |")


if __name__ == "__main__":
    def main() -> None:
        jax.config.update("jax_platforms", "cpu")
        for line in table():
            print(line, flush=True)

    cli.run(main, alone=True)
