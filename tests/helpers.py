"""Where the tests find reference outputs and real data that are not part of the repository."""

import os
import pathlib

import pytest

_SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


# What conftest.py's last line counts: comparisons with a reference's own output that did not run.
PARITY = "a reference's output"


def _find(variable: str, default: pathlib.Path, name: str, what: str) -> pathlib.Path:
    path = pathlib.Path(os.environ.get(variable, default)) / name
    if not path.exists():
        pytest.skip(f"{what}, {path}, is absent (set {variable} to the folder that holds it)")
    return path


def golden(name: str) -> pathlib.Path:
    """A reference output of T5, T5X, Flaxformer or seqio; skips where it is absent."""
    return _find("T5X_LITE_GOLDEN", _SHARED / "golden", name, PARITY)


def shared_data(name: str) -> pathlib.Path:
    """An openly licensed real-data file; skips where it is absent."""
    return _find("T5X_LITE_TEST_DATA", _SHARED / "data", name, "real data")


def shared_tool(name: str) -> pathlib.Path:
    """A helper script that stands beside the data; skips where it is absent."""
    return _find("T5X_LITE_TOOLS", _SHARED / "tools", name, "a tool")
