"""What one checkpoint is on disk, and how it is written, read and verified.

    1200/                           a committed step: orbax renames the whole folder into place
        state/                      the arrays, in a layout that any mesh can read
        record/record.json          format version, step, config, progress, {path: shape, dtype, digest}
        record/iterators-0-of-2.npz {virtual shard: iterator state}, one file a process

The iterator states stand inside the commit, never beside it: a crash between two writes
would otherwise pair the parameters of one step with the data position of another. Each file of
them carries the stamp of its record (step, config and digests of the arrays), so that one copied
from another step is refused.

Every array carries a digest of its bits, computed on the devices at save and again at
restore. It does not depend on the mesh. This catches what orbax itself lets pass: missing
chunks read back as zeros, arrays of another shape cut or padded to fit, bits that rotted,
and buffers overwritten while a background write still read them.

Parameters that a run never changes (state["frozen"], see models/peft.py) are not written: the record
holds their digests, by which what init_from gives at a restore is seen to be the same.

manager.py says when to write one, which to keep and which to read. In a job of several
processes, every process calls the functions here together.
"""

import copy
import dataclasses
import io
import json
import logging
import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from t5x_lite import files, tree
from t5x_lite.checkpoints.digests import digests_of
from t5x_lite.errors import UserError
from t5x_lite.parallel import disk

FORMAT_VERSION = 1
_STAMP = "stamp"     # beside the iterator states in their file
FROZEN = "frozen"   # the part of the state that is recorded and not written
AVERAGE = "opt_state/ema"   # where the moving average of params stands, if the run keeps one


class _Beside(NamedTuple):
    """What a run may keep beside its moments."""

    what: str
    field: str      # that asks for it
    without: Any    # its value in runs without


BESIDE = {AVERAGE: _Beside("moving average of the parameters", "train.ema_decay", 0.0),
          "opt_state/pending": _Beside("gradient that waits for its update",
                                       "optimizer.delay_after", None)}

def _from_orbax(text: str) -> bool:
    return f"{os.sep}orbax{os.sep}" in text


def quiet_orbax():
    """Keeps orbax from burying our messages; what it raises still reaches us. The mains call it.

    A save logs dozens of lines through absl. Where a file is damaged or the disk is full,
    the reads and writes begun beside the one that failed each complain for a page.
    """
    def errors_in_a_line(record: logging.LogRecord) -> bool:
        if _from_orbax(record.pathname):
            record.exc_info = None
        return record.levelno >= logging.ERROR or not _from_orbax(record.pathname)

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        abandoned = code is not None and _from_orbax(code.co_filename)
        if not abandoned and str(unraisable.exc_value) != "Event loop is closed":
            previous_hook(unraisable)

    previous_hook, sys.unraisablehook = sys.unraisablehook, hook
    logging.getLogger("absl").addFilter(errors_in_a_line)
    logging.getLogger("asyncio").addFilter(lambda record: not _from_orbax(record.getMessage()))


class Unreadable(Exception):
    """A committed step whose files are missing, cut or not what was saved."""


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """What a checkpoint says of one array."""

    shape: tuple[int, ...]
    dtype: str
    digest: int = 0  # see digests.py

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Record:
    """What record.json holds."""

    step: int
    config: dict[str, Any]  # the resolved config of the run
    arrays: dict[str, ArrayInfo]  # by slash path: "params/…", "opt_state/…", "step"
    format_version: int = FORMAT_VERSION
    # What a run has counted up to here, as JSON values (see train.py); {} in older checkpoints.
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)


class Restored(NamedTuple):
    """One checkpoint, read whole."""

    state: Any  # the structure and shardings of the abstract state
    iterator_states: dict[int, bytes]  # every virtual shard, on every process
    record: Record


# --- arrays --------------------------------------------------------------------------------


def named_leaves(pytree: Any) -> dict[str, Any]:
    """{slash path: leaf} of any pytree (optax's named tuples too), OnDisk among them, in flattening order.

    The checkpoint stores plain nested dicts by these paths, so that it outlives the classes
    of the optimizer's state.
    """
    pairs, _ = jax.tree_util.tree_flatten_with_path(pytree, is_leaf=disk.is_on_disk)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in pairs}
    assert len(named) == len(pairs), "two leaves share a path: a key holds a slash"
    return named


# --- writing -------------------------------------------------------------------------------


class RecordHandler(ocp.AsyncCheckpointHandler):
    """Writes record.json and each process's iterator states inside orbax's commit."""

    async def async_save(self, directory: epath.Path, args: "RecordSave"):
        return [ocp.future.CommitFutureAwaitingContractedSignals(
            self._write(directory, args), name="t5x_lite_record")]

    def save(self, directory: epath.Path, args: "RecordSave"):
        raise NotImplementedError("orbax calls async_save, for synchronous saves too")

    async def _write(self, directory: epath.Path, args: "RecordSave"):
        process, count = jax.process_index(), jax.process_count()
        digests = jax.device_get(args.digests)  # waits for the devices here, not in save()
        arrays = {path: dataclasses.replace(info, digest=int(digests[path]))
                  for path, info in args.record.arrays.items()}
        record = dataclasses.replace(args.record, arrays=arrays)
        buffer = io.BytesIO()  # npz, because a zip file carries a checksum of each member
        states: dict[str, Any] = {str(shard): np.frombuffer(state, np.uint8)
                                  for shard, state in args.iterator_states.items()}
        np.savez(buffer, **{_STAMP: np.uint32(_stamp(record)), **states})
        (directory / f"iterators-{process}-of-{count}.npz").write_bytes(buffer.getvalue())
        if process == 0:
            fields = dataclasses.asdict(record)
            (directory / "record.json").write_text(
                json.dumps({"crc32": _crc32(fields), **fields}, indent=1))

    def restore(self, directory: epath.Path, args: Any = None) -> dict[int, bytes]:
        raise NotImplementedError("read_step reads what async_save wrote")


def _read_iterators(directory: epath.Path, record: Record) -> dict[int, bytes]:
    """The iterator states of every virtual shard, whichever process saved it.

    Raises ValueError or OSError where files are missing, or are another checkpoint's.
    """
    found = sorted(directory.glob("iterators-*.npz"))
    count = int(found[0].stem.split("-")[-1]) if found else 1
    if len(found) != count:
        raise FileNotFoundError(f"{len(found)} of {count} iterator files in {directory}")
    states = {}
    for file in found:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as archive:
            # Checkpoints of before the stamp have none.
            if _STAMP in archive and int(archive[_STAMP]) != _stamp(record):
                raise ValueError(f"{file.name} belongs to another checkpoint")
            states.update({int(shard): archive[shard].tobytes() for shard in archive
                           if shard != _STAMP})
    return dict(sorted(states.items()))


def _stamp(record: Record) -> int:
    """What ties the files of one checkpoint together; every process computes the same."""
    digests = {path: info.digest for path, info in record.arrays.items()}
    return zlib.crc32(json.dumps([record.step, record.config, digests], sort_keys=True).encode())


@ocp.args.register_with_handler(RecordHandler, for_save=True)
@dataclasses.dataclass
class RecordSave(ocp.args.CheckpointArgs):
    """What RecordHandler writes; `digests` are arrays that may still be being computed."""

    record: Record
    digests: dict[str, jax.Array]   # by path
    iterator_states: Mapping[int, bytes]


@ocp.args.register_with_handler(RecordHandler, for_restore=True)
@dataclasses.dataclass
class RecordRestore(ocp.args.CheckpointArgs):
    """Nothing to say: orbax wants a pair of argument classes for each handler."""


def save_args(step: int, state: Any, iterator_states: Mapping[int, bytes], config_json: str,
              progress: Mapping[str, Any] | None = None) -> ocp.args.Composite:
    """One checkpoint as orbax's CheckpointManager.save takes it.

    Args:
      state: pytree of jax.Arrays on the mesh.
      iterator_states: {virtual shard: state} of the shards that this process reads.
      config_json: the resolved config.
      progress: JSON values, see Record; as they are now, whatever the run counts on while a thread
        writes them (a bucket is slow enough for the next step to come first).
    """
    arrays = {p: disk.as_array(x) for p, x in named_leaves(state).items()}
    written = {p: x for p, x in arrays.items() if not p.startswith(f"{FROZEN}/")}
    infos = {p: ArrayInfo(tuple(x.shape), str(x.dtype)) for p, x in arrays.items()}
    return ocp.args.Composite(
        state=ocp.args.PyTreeSave(tree.unflatten(written)),
        record=RecordSave(
            Record(step, json.loads(config_json), infos,
                   progress=copy.deepcopy(dict(progress or {}))),
            digests_of(arrays).bits, dict(iterator_states)))


# --- reading -------------------------------------------------------------------------------


def read_record(folder: epath.Path) -> Record:
    """The record of the checkpoint in `folder`.

    Raises Unreadable, or UserError where its format is from the future.
    """
    def read():
        found = _parse_record((folder / "record/record.json").read_text())
        if isinstance(found, Record) and folder.name.isdigit() and int(folder.name) != found.step:
            raise ValueError(f"it is a copy of the checkpoint of step {found.step}")
        return found

    fields, problem = _attempt(folder, read)
    _agree(problem)
    if isinstance(fields, int):
        raise UserError(
            f"{folder} has checkpoint format {fields}; this t5x_lite reads "
            f"formats up to {FORMAT_VERSION}. Use the t5x_lite that wrote it, or a newer one.")
    return fields


def _parse_record(text: str) -> Record | int:
    """The record, or the number of a format from the future. Raises ValueError and the like."""
    fields = json.loads(text)
    if fields["format_version"] > FORMAT_VERSION:
        return fields["format_version"]
    if fields.pop("crc32") != _crc32(fields):
        raise ValueError("record.json is not what was saved")
    arrays = {path: ArrayInfo(tuple(info["shape"]), info["dtype"], info["digest"])
              for path, info in fields["arrays"].items()}
    return Record(fields["step"], fields["config"], arrays, fields["format_version"],
                  fields.get("progress", {}))


def _crc32(fields: Mapping) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def read_step(folder: epath.Path, abstract_state: Any,
              frozen_fn: Callable[[], Mapping] | None = None) -> Restored:
    """Everything in one checkpoint. Raises Unreadable, or UserError for another model's.

    frozen_fn: gives state["frozen"], where the abstract state has it.
    """
    expected = named_leaves(abstract_state)
    record = read_record(folder)
    _check_beside(folder, expected, record)
    _check_same(folder, expected, record.arrays)
    iterator_states, problem = _attempt(folder, lambda: _read_iterators(folder / "record", record))
    _agree(problem)
    on_disk = {p: x for p, x in expected.items() if disk.is_on_disk(x)}
    arrays, finite = _read_arrays(folder, record, {
        p: x for p, x in expected.items() if p not in on_disk and not p.startswith(f"{FROZEN}/")})
    for path, place in on_disk.items():   # one after another: memory may have no room for all
        found, whether = _read_arrays(folder, record, {path: disk.on_cpu(place)})
        place.fill(found[path])
        arrays[path], finite = place, finite | whether
    # A scalar of an optimizer may be infinite by design.
    wrong = [p for p, good in finite.items() if not good and arrays[p].shape]
    if wrong:
        raise Unreadable(f"{_some(wrong)} hold numbers that are not finite, and nothing can go on "
                         "from them")
    if len(arrays) < len(expected):
        assert frozen_fn is not None, "the state has frozen parameters, which a checkpoint has not"
        frozen = {FROZEN: frozen_fn()}
        check_frozen(folder, record, frozen[FROZEN])
        arrays |= named_leaves(frozen)
    structure = jax.tree.structure(abstract_state, is_leaf=disk.is_on_disk)
    state = jax.tree.unflatten(structure, [arrays[p] for p in expected])
    return Restored(state, iterator_states, record)


def check_frozen(where: os.PathLike | str, record: Record, frozen: Mapping) -> None:
    """Raises UserError unless the frozen parameters are those that the checkpoint was made with.

    Where the config asks for another dtype than the run had, only their shapes can be compared.
    """
    arrays = named_leaves({FROZEN: frozen})
    recorded = {p: i for p, i in record.arrays.items() if p.startswith(f"{FROZEN}/")}
    _check_same(where, arrays, recorded, with_dtype=False)
    same_type = {p: x for p, x in arrays.items() if str(x.dtype) == recorded[p].dtype}
    wrong = [p.removeprefix(f"{FROZEN}/") for p, digest in jax.device_get(
        digests_of(same_type).bits).items() if int(digest) != recorded[p].digest]
    if wrong:
        raise UserError(
            f"{where} was trained over frozen parameters that init_from no longer gives: "
            f"{_some(wrong)} differ. Set init_from to what the run started from (of "
            "a workdir that trained on since then, the folder of the step: DIR/checkpoints/N), or "
            "start a new workdir.")


def _check_beside(folder: epath.Path, expected: Mapping[str, Any], record: Record) -> None:
    """Raises UserError where the state has what a run may keep beside its moments, and the
    checkpoint has none of it, or the other way round."""
    for where, kept in BESIDE.items():
        wanted, held = (any(p.startswith(f"{where}/") for p in paths)
                        for paths in (expected, record.arrays))
        if wanted == held:
            continue
        section, name = kept.field.split(".")
        before = record.config.get(section, {}).get(name, kept.without)
        before = f"{before:g}" if isinstance(before, float) else before
        raise UserError(
            f"{folder} holds {'a' if held else 'no'} {kept.what}, and {kept.field} asks for "
            f"{'one' if wanted else 'none'}: set {kept.field}={before} as the run had it, or "
            "start a new --workdir with init_from set to this one.")


def read_params(folder: epath.Path, abstract_params: Any, partial: bool, averaged: bool
                ) -> tuple[Any, Record]:
    """Only the parameters, cast to the dtypes asked for; see checkpoint.restore_params."""
    expected = named_leaves({"params": abstract_params})
    record = read_record(folder)
    stored = {p: info for p, info in record.arrays.items() if p.startswith("params/")}
    _check_same(folder, expected, stored, with_dtype=False, with_extra=not partial)
    place = {p: p.replace("params", AVERAGE, 1) for p in expected} if averaged else {}
    place = {p: place[p] if place.get(p) in record.arrays else p for p in expected}
    found, _ = _read_arrays(folder, record, {place[p]: x for p, x in expected.items()})
    arrays = {p: found[place[p]] for p in expected}
    cast = jax.jit(lambda x, dtype: x.astype(dtype), static_argnums=1)
    leaves = [arrays[p] if arrays[p].dtype == x.dtype else cast(arrays[p], x.dtype)
              for p, x in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_params), leaves), record


def _check_same(folder: epath.Path, expected: Mapping[str, Any], stored: Mapping[str, ArrayInfo],
                *, with_dtype: bool = True, with_extra: bool = True):
    """Raises UserError unless the checkpoint holds the arrays that the model wants.

    Orbax would cut or zero-pad an array of another shape to fit, without a word.
    """
    wanted = {p: ArrayInfo(tuple(x.shape), str(x.dtype)) for p, x in expected.items()}

    def compare(prefix):
        return tree.diff(*({p: x for p, x in arrays.items() if p.startswith(prefix)}
                           for arrays in (wanted, stored)),
                         same=lambda a, b: a.shape == b.shape and (
                             a.dtype == b.dtype or not with_dtype))

    # Moments differ wherever their parameters do: show those alone.
    difference = compare("params/") or compare("")
    if difference.missing or difference.mismatched or (difference.extra and with_extra):
        raise UserError(
            f"{folder} holds another model than this config describes "
            f"(expected: the config's; found: the checkpoint's):\n{difference}\n"
            "Use a new --workdir, or the config that the checkpoint was made with (it is in "
            "record/record.json). To start from these parameters, set init_from.")


def _read_arrays(folder: epath.Path, record: Record, expected: Mapping[str, Any]
                 ) -> tuple[dict[str, jax.Array], dict[str, np.ndarray]]:
    """The arrays at the paths of `expected`, placed by its shardings, in their stored dtype, and
    {path: whether it holds finite numbers only}.

    They are verified bit for bit. Raises Unreadable.
    """
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    item = tree.unflatten({
        p: jax.ShapeDtypeStruct(x.shape, record.arrays[p].dtype,
                                sharding=getattr(x, "sharding", None) or single)
        for p, x in expected.items()})
    args = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True)
    # The handler itself, not a Checkpointer around it: that one ends in a barrier, where the
    # others would wait for a process that failed to read.
    restored, problem = _attempt(
        folder, lambda: ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args))
    _agree(problem)
    arrays = named_leaves(restored)
    found = jax.device_get(digests_of(arrays, finite=True))
    wrong = [p for p, digest in found.bits.items() if int(digest) != record.arrays[p].digest]
    if wrong:
        raise Unreadable(f"the bits of {_some(wrong)} are not those saved")
    return arrays, found.finite


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{', '.join(paths[:3])}{more}"


def _attempt(folder: epath.Path, read: Callable[[], Any]) -> tuple[Any, str | None]:
    """(read(), None), or (None, what is wrong) where the files in `folder` are damaged.

    Scrambled metadata raises what the code behind it happens to trip over (AttributeError and
    TypeError from orbax's JSON, among others), so every error of reading counts as damage, but for
    memory that does not suffice. A mistake of ours in `read` is not hidden by that: no checkpoint
    is then readable, and the run stops with its text.

    Raises:
        UserError: a bucket that is out of reach now, which says nothing of what is in it.
    """
    try:
        return read(), None
    except MemoryError:
        raise
    except Exception as error:  # orbax wraps whatever it met while reading in a bare Exception
        cause = error.__cause__ if type(error) is Exception and error.__cause__ else error
        if "RESOURCE_EXHAUSTED" in str(cause) and isinstance(cause, jax.errors.JaxRuntimeError):
            raise
        if files.is_out_of_reach(cause, folder):
            raise files.refusal(cause, folder, (
                f"{folder} cannot be read now: {files.explain(cause, folder)} Nothing was changed; "
                "the same command may work later.")) from error
        return None, brief(cause)


def _agree(problem: str | None):
    """Raises Unreadable on every process where any of them met a problem."""
    bad = problem is not None
    if jax.process_count() > 1:
        bad = bool(np.any(multihost_utils.process_allgather(np.array(bad))))
    if bad:
        raise Unreadable(problem or "another process could not read it")


def brief(error: BaseException) -> str:
    """One line of an error: tensorstore's carry a page of specification."""
    text = str(error).split("[tensorstore_spec")[0].split("[source locations")[0]
    return f"{type(error).__name__}: {' '.join(text.split())[:400]}"
