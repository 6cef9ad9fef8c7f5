"""What a step moves between the device and the memories beyond it: the host's, and the disk's.

Counted from where the state's arrays are (sharding.offload), a micro-batch at a time: each byte of a
stack's parameters goes to the device in the forward pass, again in the backward pass, and for the update;
gradients arise on the host, are read and written again by every further micro-batch, and read for their
norm and for the update. The optimizer state goes there and back once. Activations that remat=offload:…
moves are not counted.
"""

import dataclasses
from typing import Any

import jax

from t5x_lite import tree
from t5x_lite.parallel import disk, sharding
from t5x_lite.training import state


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that are kept outside of the devices: the host's for one device, the disk's for all."""

    host_params: int
    host_optimizer: int
    disk: int

    @property
    def host(self) -> int:
        return self.host_params + self.host_optimizer


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes a step: over the link of host and device, of one device; of the disk, for all."""

    to_device: int = 0
    to_host: int = 0
    disk_read: int = 0
    disk_written: int = 0


def kept(program: Any) -> Kept:
    """What of the state of a build.Program is not on the devices."""
    places, flat = program.config.sharding.places, tree.flatten(program.abstract_state)
    axes = tree.flatten(state.logical_axes(program.model, program.optimizer))
    totals = {"params": 0, "opt_state": 0}
    for path, x in flat.items():
        part = path.partition("/")[0]
        # A described GPU's sharding does not know of the host's memory: by the rule, not the array.
        if part in totals and state.place_of(part, axes[path], places) == "host":
            totals[part] += sharding.local_bytes(x)
    return Kept(totals["params"], totals["opt_state"],
                sum(array.nbytes for array in disk.kept(program.abstract_state)))


def traffic(program: Any) -> Traffic:
    """What a step of a build.Program moves."""
    found, parts = kept(program), program.config.train.accumulation
    widths = {x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state["params"])}
    width = max(widths)
    gradients = found.host_params * (4 if parts > 1 else width) // width
    visits = sum(sharding.local_bytes(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding))
                 for x in disk.kept(program.abstract_state))
    norm_and_update = 2
    return Traffic(
        to_device=found.host_params * (2 * parts + 1) + gradients * (parts - 1 + norm_and_update)
        + found.host_optimizer + visits,
        to_host=found.host_params + gradients * parts + found.host_optimizer + visits,
        disk_read=found.disk, disk_written=found.disk)
