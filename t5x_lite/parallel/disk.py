"""Arrays kept on disk, of which one layer at a time is in memory: read ahead, written behind.

After ZeRO-Infinity (Rajbhandari et al. 2021, arXiv:2104.07857, section 5). A file is a scratch copy for
the life of a process: it has no name, so that nothing is left of it however the process ends, and a run
resumes from its checkpoints. All of its bytes are claimed when it is made: a disk that is too small
is refused then, and not in the middle of a step.
"""

import concurrent.futures
import dataclasses
import errno
import functools
import math
import os
import shutil
import tempfile
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from t5x_lite.errors import UserError

FOLDER = "sharding.offload_folder"
AHEAD, BEHIND = 2, 2   # pieces read before their turn, and written after it: each is in memory


@jax.tree_util.register_static
@dataclasses.dataclass(eq=False)
class OnDisk:
    """An array [layers, …] or […] in a file: what stands in a state where the array would.

    To JAX it is no array, but a part of the state's structure; there is one of it, which every step
    writes over, as it would over an array that is donated.
    """

    path: str                   # in the state, for messages
    shape: tuple[int, ...]
    dtype: Any
    sharding: NamedSharding     # of the array, when it visits the devices
    folder: str
    fills: int = 0              # how often it was filled as a whole
    writes: list[concurrent.futures.Future] = dataclasses.field(default_factory=list)   # under way

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def whole(self) -> np.ndarray:
        """The file as an array, in memory only where it is read; waits for what is being written."""
        while self.writes:
            self.writes.pop().result()
        return self._mapped(None)

    def fill(self, values: Any) -> None:
        """Writes all of it from an array on this host's devices."""
        self.whole()[...] = np.asarray(values)
        self.fills += 1

    def read_part(self, layer: int | None) -> np.ndarray:
        """A copy in memory of the layer [1, …], or of all where None."""
        return np.array(self._mapped(layer))

    def write_part(self, layer: int | None, values: jax.Array) -> None:
        """Writes a layer [1, …], or all of it; returns once the device has made it and it is written."""
        part = self._mapped(layer)
        for shard in values.addressable_shards:
            part[shard.index] = np.asarray(shard.data)

    def _mapped(self, layer: int | None) -> np.memmap:
        """A mapping of a layer alone: what was read or written of the others is not counted as this
        process's memory."""
        if layer is None:
            return np.memmap(self._file, self.dtype, "r+", 0, self.shape)
        size = self.nbytes // self.shape[0]
        return np.memmap(self._file, self.dtype, "r+", layer * size, (1, *self.shape[1:]))

    @functools.cached_property
    def _file(self):
        if not self.folder:
            raise UserError(f"{FOLDER} is empty: sharding.offload=optimizer_disk needs a folder on a local "
                            f"disk, the faster the better: set --config.{FOLDER}=/some/folder.")
        try:
            file = tempfile.TemporaryFile(dir=self.folder, prefix="t5x_lite-")
            os.posix_fallocate(file.fileno(), 0, max(self.nbytes, 1))
        except OSError as error:
            raise _refused(self, error) from error
        return file


def _refused(array: OnDisk, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(array.folder).free
        return UserError(f"{FOLDER}={array.folder!r} has {free / 2**30:.2f} GiB left, and {array.path} needs "
                         f"{array.nbytes / 2**30:.2f} more: free some space, or name a folder on another disk.")
    return UserError(f"{FOLDER}={array.folder!r} cannot hold the optimizer state: {error.strerror}. Name a folder "
                     "that exists and can be written to, on a local disk.")


def is_on_disk(x: Any) -> bool:
    """Whether a leaf of a state is on disk."""
    return isinstance(x, OnDisk)


def kept(tree: Any) -> list[OnDisk]:
    """What of a state is on disk."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_on_disk) if is_on_disk(x)]


def _cpu() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def on_cpu(array: OnDisk) -> jax.ShapeDtypeStruct:
    """The array in this process's memory, for what reads it from a checkpoint."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=_cpu())


def as_array(x: Any) -> Any:
    """A leaf of a state as an array: of what is on disk one over the file's own pages, which is right
    until the next step writes."""
    return jax.device_put(x.whole(), _cpu()) if is_on_disk(x) else x


def read(tree: Any) -> Any:
    """The tree with the arrays in the place of what is on disk, on the devices."""
    return jax.tree.map(lambda x: jax.device_put(np.array(x.whole()), x.sharding) if is_on_disk(x) else x,
                        tree, is_leaf=is_on_disk)


def instead(tree: Any, abstract: Any) -> Any:
    """The tree with what `abstract`, a tree like it, has on disk in the place of arrays."""
    return jax.tree.map(lambda a, x: a if is_on_disk(a) else x, abstract, tree, is_leaf=is_on_disk)


Piece = tuple[Hashable, Sequence[OnDisk], int | None]   # a name, arrays, and the layer of them


@dataclasses.dataclass(frozen=True)
class _Read:
    """A piece that is read ahead."""

    values: concurrent.futures.Future
    fills: tuple[int, ...]   # of its arrays, when it was begun


class Visits:
    """The pieces of arrays on disk in the order in which they visit the devices, step after step."""

    def __init__(self, pieces: Sequence[Piece]):
        self._pieces = {name: (arrays, layer) for name, arrays, layer in pieces}
        self._order = list(self._pieces)
        self._reading: dict[Hashable, _Read] = {}
        self._writing: dict[Hashable, concurrent.futures.Future] = {}
        self._readers = concurrent.futures.ThreadPoolExecutor(AHEAD, "disk-read")
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "disk-write")

    def take(self, name: Hashable) -> list[jax.Array]:
        """The arrays of a piece on the devices; those of the next are being read meanwhile, after the
        last piece those of the first, while the next step's gradients are made."""
        at = self._order.index(name)
        for i in range(at, at + 1 + AHEAD):
            self._begin(self._order[i % len(self._order)])
        arrays, _ = self._pieces[name]
        return [jax.device_put(value, array.sharding) for value, array in
                zip(self._reading.pop(name).values.result(), arrays, strict=True)]

    def put(self, name: Hashable, values: Sequence[jax.Array]) -> None:
        """Has a piece written, and waits for earlier ones where more than BEHIND are in memory.

        Raises:
            OSError: of this write, or at a later call of one before it.
        """
        arrays, layer = self._pieces[name]
        future = self._writer.submit(_write, arrays, layer, values)
        self._writing[name] = future
        for array in arrays:
            array.writes[:] = [*(f for f in array.writes if not f.done() or f.exception()), future]
        for other in list(self._writing)[:-BEHIND]:
            self._writing.pop(other).result()

    def _begin(self, name: Hashable) -> None:
        arrays, layer = self._pieces[name]
        fills = tuple(array.fills for array in arrays)
        if name in self._reading and self._reading[name].fills == fills:
            return
        before = self._writing.get(name)
        self._reading[name] = _Read(self._readers.submit(_read, arrays, layer, before), fills)


def _read(arrays: Sequence[OnDisk], layer: int | None,
          before: concurrent.futures.Future | None) -> list[np.ndarray]:
    if before is not None:
        before.result()
    return [array.read_part(layer) for array in arrays]


def _write(arrays: Sequence[OnDisk], layer: int | None, values: Sequence[jax.Array]) -> None:
    for array, value in zip(arrays, values, strict=True):
        array.write_part(layer, value)
