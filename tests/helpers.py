"""Where the tests find reference outputs and real data that are not part of the repository."""

import os
import pathlib

import pytest

_SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process with this many simulated CPU devices.

    Tests compile much and run little: without LLVM's optimisations they take 0.6 of the time, and
    with XLA's older, quicker way of writing fused loops 0.6 of that.
    """
    return (f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
            " --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
            " --xla_cpu_parallel_codegen_split_count=1")


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
