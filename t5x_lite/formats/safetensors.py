"""Folders of safetensors files, one or many with an index: the tensors of Hugging Face.

A file is an 8-byte length, a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes (https://github.com/huggingface/safetensors#format). Tensors are views of a
memory map: reading or writing one touches its pages only, so that a model of any size passes
through little memory.
"""

import json
import math
import pathlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.formats.mapping import Shape, Tensors

INDEX = "model.safetensors.index.json"

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
           "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
           "BOOL": np.bool_}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def read_json(file: pathlib.Path) -> Any:
    """A JSON file. Raises UserError where it is damaged."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}). Download it again.") from error


# --- reading --------------------------------------------------------------------------------------

def read_folder(folder: pathlib.Path) -> Tensors:
    """The tensors of a folder that transformers wrote, safetensors or pytorch_model.bin.

    Raises:
        UserError: there are none, a file that the index names is missing, or one is damaged.
    """
    files = _files(folder)
    opened = {file: _open_torch(file) if file.suffix == ".bin" else read_file(file)
              for file in sorted(files)}
    where: dict[str, Tensors] = {}
    for tensors in opened.values():
        where |= dict.fromkeys(tensors.shapes, tensors)
    return Tensors({n: t.shapes[n] for n, t in where.items()},
                   {n: t.dtypes[n] for n, t in where.items()},
                   lambda name: where[name].read(name))


def _files(folder: pathlib.Path) -> set[pathlib.Path]:
    for index in (INDEX, "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            names = set(read_json(folder / index)["weight_map"].values())
            missing = sorted(n for n in names if not (folder / n).is_file())
            if missing:
                raise UserError(f"{folder / index} names files that are not there: "
                                f"{', '.join(missing)}. Download them too.")
            return {folder / n for n in names}
    found = [folder / "model.safetensors", *folder.glob("*.safetensors"),
             folder / "pytorch_model.bin"]
    for file in found:
        if file.is_file():
            return {file}
    raise UserError(f"{folder} holds no model.safetensors or {INDEX} (nor pytorch_model.bin). "
                    f"`hf download NAME --local-dir {folder}` fetches a published model.")


def read_file(file: pathlib.Path) -> Tensors:
    """The tensors of one file. Raises UserError where it is damaged."""
    try:
        data = np.memmap(file, np.uint8, "r")   # a ValueError where the file is empty
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        header = json.loads(data[8:8 + length].tobytes())
        header.pop("__metadata__", None)
        spans = {}
        for name, info in header.items():
            dtype, shape = np.dtype(_DTYPES[info["dtype"]]), tuple(info["shape"])
            start, end = (8 + length + offset for offset in info["data_offsets"])
            if end > data.size or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} ends beyond the file")
            spans[name] = (start, end, dtype, shape)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is cut off or no safetensors file of numbers that this reads "
                        f"({', '.join(_DTYPES)}): {type(error).__name__}: {error}. Download it "
                        "again.") from error

    def read(name):
        start, end, dtype, shape = spans[name]
        return data[start:end].view(dtype).reshape(shape)
    return Tensors({n: s[3] for n, s in spans.items()}, {n: s[2] for n, s in spans.items()}, read)


def _open_torch(file: pathlib.Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{file} is in PyTorch's format: `pip install torch` to read it, or "
                        "download the model.safetensors of the same model.") from error
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))

    def read(name):
        tensor = state[name]
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    return Tensors({n: tuple(t.shape) for n, t in state.items()},
                   {n: read(n).dtype for n in state}, read)


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
        for name in names:
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
