"""PyTorch's pickled files, pytorch_model.bin, read as tensors and nothing else.

torch is imported where such a file is read, not before.
"""

import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.formats.mapping import Tensors

_LFS = b"version https://git-lfs"


def lfs_hint(file: pathlib.Path) -> str:
    """What to do where a file is a pointer of Git LFS and not what it points to, else ''."""
    if not file.is_file():
        return ""
    with open(file, "rb") as opened:
        is_pointer = opened.read(len(_LFS)) == _LFS
    return (" It is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder."
            if is_pointer else "")


def read_file(file: pathlib.Path) -> Tensors:
    """The tensors of a file that torch.save wrote of a state dict; read as they are asked for.

    Raises:
        UserError: torch is not installed; the file is damaged, or holds anything but tensors of
            numbers that we have, by name.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{file} is in PyTorch's format: `pip install torch` to read it, or "
                        "download the model.safetensors of the same model.") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True,
                           mmap=zipfile.is_zipfile(file))
    except Exception as error:   # its unpickler fails in as many ways as there are bytes
        fix = lfs_hint(file) or (" Download it again, or the model.safetensors of the same model.")
        raise UserError(f"{file} is cut off or no file of PyTorch's that holds tensors alone "
                        f"({_first_line(error)}).{fix}") from error
    if not isinstance(state, Mapping):
        raise UserError(f"{file} holds a {type(state).__name__}, not a dict of tensors.")
    problems = [problem for name, value in state.items()
                if (problem := _problem(torch, name, value))]
    if problems:
        raise UserError(f"{file} holds more or other than the tensors of a model: "
                        f"{'; '.join(problems[:4])}{', …' if len(problems) > 4 else ''}. Save the "
                        "dict of tensors alone: torch.save(model.state_dict(), …).")

    def read(name):
        tensor = state[name].detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    return Tensors({n: tuple(t.shape) for n, t in state.items()},
                   {n: _dtypes(torch)[t.dtype] for n, t in state.items()}, read)


def _dtypes(torch: Any) -> dict[Any, np.dtype]:
    pairs = ((torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16),
             (torch.float32, np.float32), (torch.float64, np.float64), (torch.int64, np.int64),
             (torch.int32, np.int32), (torch.int16, np.int16), (torch.int8, np.int8),
             (torch.uint8, np.uint8), (torch.bool, np.bool_))
    return {theirs: np.dtype(ours) for theirs, ours in pairs}


def _problem(torch: Any, name: Any, value: Any) -> str | None:
    """What is wrong with an entry of a state dict; None where nothing is."""
    if not isinstance(name, str):
        return f"an entry named {str(name)[:40]!r}"
    if isinstance(value, Mapping):
        return f"{name[:80]!r} is a dict of {len(value)} entries"
    if not isinstance(value, torch.Tensor):
        return f"{name[:80]!r} is a {type(value).__name__}"
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return f"{name[:80]} is a {value.layout} tensor on {value.device}"
    if value.dtype not in _dtypes(torch):
        return f"{name[:80]} is of dtype {value.dtype}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"{name[:80]} has {value.numel():,} elements, of which few are stored"
    return None


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    # torch advises to read the file with its code, which could be anybody's.
    return type(error).__name__ + (f": {line[:200]}" if line and "weights_only" not in line else "")
