"""Files of safetensors, and the folders of them that Hugging Face writes.

A file is an 8-byte length, a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes (https://github.com/huggingface/safetensors#format). Tensors are views of a
memory map: reading or writing one touches its pages only, so that a model of any size passes
through little memory.
"""

import json
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from t5x_lite import log
from t5x_lite.errors import UserError
from t5x_lite.formats import torch_files
from t5x_lite.formats.mapping import Shape, Tensors

INDEX = "model.safetensors.index.json"

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
           "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
           "BOOL": np.bool_}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000   # bytes: the limit of the safetensors library
_MAX_DIM = 2**40            # more than any tensor has; products of a few stay exact


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises UserError where it is damaged or none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({_brief(error)}).{torch_files.lfs_hint(file)} "
                        "Download it again.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object but {str(value)[:40]!r}. Download it again.")
    return value


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


# --- reading a folder -----------------------------------------------------------------------------

# In the order in which transformers looks for them.
_CANDIDATES = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_folder(folder: pathlib.Path) -> Tensors:
    """The tensors of a folder that transformers wrote, safetensors or pytorch_model.bin.

    The first of these that is whole is read: model.safetensors, the files that its index names,
    pytorch_model.bin, the files of that index. An index whose files are not all there may be
    what is left of another format, and is passed over where a whole one follows.

    Raises:
        UserError: there are none, a file that the index names is missing or stands outside of
            the folder, or one is damaged.
    """
    files, weight_map = _choose(folder)
    opened = {file: torch_files.read_file(file) if file.suffix == ".bin" else read_file(file)
              for file in files}
    holders: dict[str, Tensors] = {}
    for tensors in opened.values():
        holders |= dict.fromkeys(tensors.shapes, tensors)
    for name, file in weight_map.items():
        if name not in opened[folder / file].shapes:
            raise UserError(f"{folder / file} holds no {name}, which the index says it does: the "
                            "index and the file are of different models. Download both again.")
        holders[name] = opened[folder / file]
    return Tensors({n: t.shapes[n] for n, t in holders.items()},
                   {n: t.dtypes[n] for n, t in holders.items()},
                   lambda name: holders[name].read(name))


def _choose(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """(the files to read, {tensor: file} where an index says it)."""
    incomplete: list[str] = []
    for candidate in _CANDIDATES:
        if not (folder / candidate).is_file():
            continue
        weight_map = _weight_map(folder / candidate) if candidate.endswith(".index.json") else {}
        names = sorted(set(weight_map.values())) or [candidate]
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            for problem in incomplete:
                log.say(f"  {problem} Reading {candidate} instead.")
            return [folder / name for name in names], weight_map
        incomplete.append(f"{folder / candidate} names files that are not there: "
                          f"{', '.join(missing)}.")
    if incomplete:
        raise UserError(f"{incomplete[0]} Download them too.")
    return [_only_file(folder)], {}


def _only_file(folder: pathlib.Path) -> pathlib.Path:
    """The one safetensors file of a folder, whatever its name."""
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{folder} holds {', '.join(f.name for f in files[:3])}, …, but no {INDEX} "
                        "to say how they belong together. Download it too.")
    raise UserError(f"{folder} holds no model.safetensors or {INDEX} (nor pytorch_model.bin). "
                    f"`hf download NAME --local-dir {folder}` fetches a published model.")


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """{tensor: file} of an index, whose files all lie in its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map, which says what file holds which tensor. "
                        "Download it again.")
    for tensor, file in weight_map.items():
        if not is_inside(file):
            raise UserError(f"{index} says that {tensor[:80]} is in {str(file)[:200]!r}, which is "
                            "no name of a file in that folder. Nothing was opened.")
    return weight_map


def is_inside(name: Any) -> bool:
    """Whether a name that a file gives stays within the folder that it is joined to."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        return False
    path = pathlib.PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and len(name) < 256


# --- reading a file -------------------------------------------------------------------------------

class _Damage(ValueError):
    """What is wrong with a file."""


def read_file(file: pathlib.Path) -> Tensors:
    """The tensors of one file. Raises UserError where it is damaged."""
    try:
        data = np.memmap(file, np.uint8, "r")   # a ValueError where the file is empty
        spans = _spans(data)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file} is cut off or no safetensors file of numbers that this reads "
                        f"({', '.join(_DTYPES)}): {_brief(error)}.{torch_files.lfs_hint(file)} "
                        "Download it again.") from error

    def read(name):
        start, end, dtype, shape = spans[name]
        return data[start:end].view(dtype).reshape(shape)
    return Tensors({n: s[3] for n, s in spans.items()}, {n: s[2] for n, s in spans.items()}, read)


_Span = tuple[int, int, np.dtype, Shape]   # first and last byte in the file


def _spans(data: np.ndarray) -> dict[str, _Span]:
    """{tensor: where it stands}, checked: the tensors fill the file without gap or overlap."""
    if data.size < 8:
        raise _Damage(f"{data.size} bytes are no header")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    start = 8 + length
    if length > _MAX_HEADER or start > data.size:
        raise _Damage(f"a header of {length} bytes in a file of {data.size}")
    header = json.loads(data[8:start].tobytes(), object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise _Damage("the header is no JSON object")
    header.pop("__metadata__", None)
    spans = {name: _span(name, info, start) for name, info in header.items()}
    at = start
    for name, (first, last, _, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if first != at:
            raise _Damage(f"{name} begins at byte {first - start}, not at {at - start} where the "
                          "tensor before it ends")
        at = last
    if at != data.size:
        raise _Damage(f"the tensors end at byte {at}, the file at {data.size}")
    return spans


def _span(name: str, info: Any, start: int) -> _Span:
    """Where a tensor stands, checked against its shape and dtype."""
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        raise _Damage(f"{name} has no dtype, shape and data_offsets")
    if not isinstance(info["dtype"], str) or info["dtype"] not in _DTYPES:
        raise _Damage(f"{name} is of dtype {str(info['dtype'])[:40]!r}")
    shape, offsets = info["shape"], info["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 32:
        raise _Damage(f"{name} has the shape {str(shape)[:80]} at {str(offsets)[:80]}")
    dtype = np.dtype(_DTYPES[info["dtype"]])
    first, last = offsets
    if last - first != math.prod(shape) * dtype.itemsize:
        raise _Damage(f"{name} has {last - first} bytes, which is not {shape} of {info['dtype']}")
    if first % dtype.itemsize:
        raise _Damage(f"{name} begins at byte {first}, which is no multiple of its "
                      f"{dtype.itemsize} bytes a number")
    return start + first, start + last, dtype, tuple(shape)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < _MAX_DIM for n in values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A name that stands twice would hide a tensor."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Damage("a name stands twice in the header")
    return value


# --- writing --------------------------------------------------------------------------------------

class Writer:
    """Writes a folder of safetensors files whose names, shapes and dtypes are known beforehand.

    `tensor(name)` is a writable view of the file; tensors may be filled in any order.
    """

    def __init__(self, folder: pathlib.Path, shapes: Mapping[str, Shape],
                 dtypes: Mapping[str, Any], max_bytes: int):
        """Lays out the files: several, and an index, where max_bytes do not hold all tensors.

        Raises:
            UserError: a dtype that safetensors cannot hold.
        """
        sizes = {n: math.prod(s) * np.dtype(dtypes[n]).itemsize for n, s in shapes.items()}
        groups: list[list[str]] = [[]]
        used = 0
        for name in shapes:
            if groups[-1] and used + sizes[name] > max_bytes:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += sizes[name]
        self._maps: dict[pathlib.Path, np.memmap] = {}
        self._files: dict[str, pathlib.Path] = {}
        self._spans: dict[str, tuple[int, int, np.dtype, Shape]] = {}
        for i, names in enumerate(groups):
            file = folder / ("model.safetensors" if len(groups) == 1 else
                             f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors")
            self._lay_out(file, names, shapes, dtypes, sizes)
        if len(groups) > 1:
            (folder / INDEX).write_text(json.dumps(
                {"metadata": {"total_size": sum(sizes.values())},
                 "weight_map": {n: f.name for n, f in self._files.items()}}, indent=1))

    def _lay_out(self, file, names, shapes, dtypes, sizes) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # The widest numbers first, so that each tensor begins at a multiple of its own.
        for name in sorted(names, key=lambda n: -np.dtype(dtypes[n]).itemsize):
            dtype = np.dtype(dtypes[name])
            if dtype not in _NAMES:
                raise UserError(f"{name}: safetensors cannot hold {dtype}.")
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]),
                            "data_offsets": [offset, offset + sizes[name]]}
            offset += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)   # tensors start at a multiple of 8 bytes
        start = 8 + len(text)
        with open(file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(start + offset)
        self._maps[file] = np.memmap(file, np.uint8, "r+")
        for name in names:
            first, last = header[name]["data_offsets"]
            self._files[name] = file
            self._spans[name] = (start + first, start + last, np.dtype(dtypes[name]),
                                 tuple(shapes[name]))

    def tensor(self, name: str) -> np.ndarray:
        """A writable view of a tensor's bytes in the file."""
        start, end, dtype, shape = self._spans[name]
        return self._maps[self._files[name]][start:end].view(dtype).reshape(shape)

    def close(self) -> None:
        """Writes what is still in memory."""
        for data in self._maps.values():
            data.flush()
        self._maps.clear()
