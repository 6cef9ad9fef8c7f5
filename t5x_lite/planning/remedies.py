"""What could make a step fit, and other meshes for the same devices, as configs to plan.

Nothing is built here: a config may still be refused by build.
"""

import itertools
import math
from collections.abc import Iterator

from t5x_lite.config import RunConfig, replace
from t5x_lite.parallel import sharding
from t5x_lite.parallel.sharding import MeshConfig

Change = tuple[str, RunConfig]   # the flags that make it, the config

MOST_ACCUMULATIONS = 3   # of a search, whose compilations are few
SPLIT = ("data", "fsdp", "tensor", "expert", "stage")   # the axes that a search may change


def remedies(config: RunConfig, num_devices: int) -> Iterator[Change]:
    """(what changes, config) in the order to try, each on top of those before it.

    Rematerialisation, accumulation, sharding (ZeRO's stage, then one mesh or another), and
    offloading, which costs the most time.
    """
    sides = _sides(config)
    if any(getattr(config.model, side).remat != "full" for side in sides):
        changes, config = _remat(config, "full")
        yield changes, config
    ways = _batch_ways(sharding.resolve_mesh(config.mesh, num_devices))
    parts = [2 * 4**i * config.train.accumulation for i in range(MOST_ACCUMULATIONS)]
    for count in parts:
        if config.train.global_batch_size % (count * ways) == 0:
            config = replace(config, "train.accumulation", count)
            yield f"--config.train.accumulation={count}", config
    if config.sharding.zero < 3:
        config = replace(config, "sharding.zero", 3)
        yield "--config.sharding.zero=3", config
    candidates = list(meshes(config, num_devices))
    yield from candidates
    # Offloading on top of the first mesh that leaves no state whole.
    finest, config = next(((f"{changes} ", c) for changes, c in candidates if c.mesh.data == 1),
                          ("", config))
    if config.sharding.places.opt_state == "device":
        config = replace(config, "sharding.offload_optimizer", True)
        yield f"{finest}--config.sharding.offload_optimizer=True", config
    if not any(getattr(config.model, side).remat.startswith("offload") for side in sides):
        yield _remat(config, "offload:layer_input")


def meshes(config: RunConfig, num_devices: int) -> Iterator[Change]:
    """(flags, config) of other divisions of the devices; slices and sequence stay as they are.

    In turn one that changes data, fsdp and tensor, one with another number of stages (with
    micro-batches to keep the bubble small), and one with the experts of mixtures split
    otherwise: a search has few compilations. What splits the state more finely comes later, as it
    costs more communication.
    """
    sizes = sharding.resolve_mesh(config.mesh, num_devices)
    families = (_plain(sizes), _staged(config, sizes), _experts(config, sizes))
    for new in itertools.chain.from_iterable(itertools.zip_longest(*families)):
        if new is None or new == sizes:
            continue
        flags = [f"--config.mesh.{axis}={new[axis]}" for axis in SPLIT
                 if axis in SPLIT[:3] or new[axis] != sizes[axis]]
        changed = replace(config, "mesh", MeshConfig(**new))
        if new["stage"] > 1 and new["stage"] != sizes["stage"]:
            number = _microbatches(config, new)
            for side in _sides(config):
                field = f"model.{side}.pipeline.num_microbatches"
                changed = replace(changed, field, number)
                flags.append(f"--config.{field}={number}")
        yield " ".join(flags), changed


def _plain(sizes: dict[str, int]) -> list[dict[str, int]]:
    left = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    shapes = {(left // fsdp // tensor, fsdp, tensor)
              for tensor in (1, 2, 4, 8) for fsdp in _powers(left) if left % (fsdp * tensor) == 0}
    best = {s for s in shapes if s[0] == 1 or s[1] in (1, 8)}   # the ends, and one in between
    return [{**sizes, "data": data, "fsdp": fsdp, "tensor": tensor}
            for data, fsdp, tensor in sorted(best, key=lambda s: (s[1] * s[2], s[2]))]


def _staged(config: RunConfig, sizes: dict[str, int]) -> list[dict[str, int]]:
    """The devices of data, fsdp and stage as stages, which must divide the layers, and fsdp."""
    left = sizes["data"] * sizes["fsdp"] * sizes["stage"]
    stacks = [getattr(config.model, side) for side in _sides(config)]
    layers = math.gcd(*(segment.repeats // stack.pipeline.plan(1).rounds
                        for stack in stacks for segment in stack.segments))
    return [{**sizes, "data": 1, "fsdp": left // stages, "stage": stages}
            for stages in _powers(left) if layers % stages == 0 and stages != sizes["stage"]]


def _experts(config: RunConfig, sizes: dict[str, int]) -> list[dict[str, int]]:
    """The devices of data, fsdp and expert as many, which must divide the experts, and fsdp."""
    counts = [block.moe.num_experts for side in _sides(config)
              for segment in getattr(config.model, side).segments
              for block in segment.blocks if block.moe is not None]
    left = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    return [{**sizes, "data": 1, "fsdp": left // ways, "expert": ways}
            for ways in reversed(_powers(left))
            if counts and math.gcd(*counts) % ways == 0 and ways != sizes["expert"]]


def _microbatches(config: RunConfig, sizes: dict[str, int]) -> int:
    """Four a stage, or two or one where the rows do not divide: a bubble of a fifth at most."""
    train = config.train
    rows = [size // train.accumulation
            for size in (train.global_batch_size, *(n for n, _ in train.batch_ramp.stages))]
    ways = _batch_ways(sizes)
    groups = next((n for n in (4, 2) if all(r % (ways * n) == 0 for r in rows)), 1)
    return groups * sizes["stage"]


def _batch_ways(sizes: dict[str, int]) -> int:
    return math.prod(sizes[axis] for axis in sharding.DEFAULT_RULES["act_batch"])


def _sides(config: RunConfig) -> list[str]:
    return [side for side in ("encoder", "decoder") if getattr(config.model, side) is not None]


def _remat(config: RunConfig, policy: str) -> Change:
    flags = []
    for side in _sides(config):
        config = replace(config, f"model.{side}.remat", policy)
        flags.append(f"--config.model.{side}.remat={policy}")
    return " ".join(flags), config


def _powers(most: int) -> list[int]:
    return sorted({most, *(2**i for i in range(most.bit_length()) if most % 2**i == 0)})
