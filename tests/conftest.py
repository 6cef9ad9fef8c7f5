"""Eight simulated CPU devices for every test, a cache of compiled programs, what was skipped.

T5X_LITE_TEST_TIMES=FILE appends a line per test: its file, its CPU seconds (fixtures and the processes
that it started included) and its name. Unlike pytest's durations these hold on a busy machine. The files
that `make test` spends its time on:

    awk '{s[$1] += $2} END {for (f in s) print s[f], f}' FILE | sort -rn | head
"""

import gc
import hashlib
import os
import pathlib
import platform

import pytest

from tests.helpers import PARITY, xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
# JAX's tracing makes and drops many objects, over a heap of TensorFlow's and torch's: collect less often.
gc.set_threshold(50_000, 20, 100)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("EPATH_USE_TF", "0")   # which etils reads once in a process; see t5x_lite/buckets.py

MAX_CACHE_BYTES = 512 << 20


def _cpu() -> str:
    """A name of this machine's instructions: a program compiled for others must not be loaded."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def _bound(folder: pathlib.Path, max_bytes: int) -> None:
    """Removes the programs that were read longest ago until the rest is at most `max_bytes`."""
    files = [(file.stat(), file) for file in folder.glob("*") if file.is_file()]
    total = sum(stat.st_size for stat, _ in files)
    for stat, file in sorted(files, key=lambda pair: pair[0].st_atime):
        if total <= max_bytes:
            return
        file.unlink(missing_ok=True)   # another pytest may have been here first
        total -= stat.st_size


def _cache_programs(root: pathlib.Path) -> None:
    """Compiled programs are shared by tests, workers, subprocesses and the runs of a clone.

    JAX's keys hold the program, the devices, XLA's flags and jaxlib's version.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = root / ".pytest_cache" / "jax" / _cpu()
    folder.mkdir(parents=True, exist_ok=True)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _bound(folder, MAX_CACHE_BYTES)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


_cache_programs(pathlib.Path(__file__).resolve().parents[1])


@pytest.fixture(scope="session", autouse=True)
def text_cache(tmp_path_factory):
    """Gathered text goes to a folder of the session (subprocesses included), not to ~/.cache."""
    os.environ.setdefault("T5X_LITE_CACHE", str(tmp_path_factory.mktemp("text_cache")))


pytest_plugins = ["tests.fixtures_tfds"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    before = sum(os.times()[:4])   # user and system, of this process and of finished children
    result = yield
    if name := os.environ.get("T5X_LITE_TEST_TIMES"):
        with open(name, "a") as out:
            out.write(f"{item.location[0]} {sum(os.times()[:4]) - before:.2f} {item.location[2]}\n")
    return result


def pytest_terminal_summary(terminalreporter):
    """How many comparisons with the references' own outputs did not run, and what runs instead."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple)]
    if count := sum(PARITY in reason for reason in reasons):
        terminalreporter.write_line(
            f"{count} parity tests were skipped: they need reference outputs that are not part of "
            "the repository. tests/vectors/ holds small ones of the same formulas, which ran.")
