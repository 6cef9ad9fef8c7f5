"""The table of docs/performance.md: every measure beside its peer and its limit, from one run.

    python scripts/bench_peers.py --folder=/tmp/peers
    python scripts/bench_peers.py --folder=/tmp/peers --only=decode

Runs the other benchmarks one after the other and prints a row for each of their measures: ours, the
peer's, the ratio, the limit measured in the same process, and the goal of issue 13. Peers are transformers
in PyTorch and T5X; an environment with both and t5x_lite is made in --folder at the first run (4.4 GB;
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has it do without CUDA's). --t5x names a clone of
T5X or where to clone it from; airio and jestimator, which T5X imports and a train step does not call, are
stood in for by empty classes. A row that cannot be had says why; so does one whose benchmark takes longer than
--seconds. A quarter of an hour on two quiet cores; on busy ones root may say --under="chrt -f 10".
"""

import dataclasses
import io
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
import tarfile

from absl import app, flags

_FOLDER = flags.DEFINE_string("folder", None, "Where the environment is made.", required=True)
_ONLY = flags.DEFINE_string("only", "", "A part of the measures' names: only those.")
_T5X = flags.DEFINE_string("t5x", "https://github.com/google-research/t5x",
                           "A clone of T5X, or where to clone it from.")
_SECONDS = flags.DEFINE_float("seconds", 300, "What one benchmark may take; then its rows say that it did not end.")
_UNDER = flags.DEFINE_string("under", "", 'A command that each benchmark is run by, as "chrt -f 10".')

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMIT = "cc342d4"   # of T5X
_STEP = "bench_step.py --config=configs/t5_1_1.py:small --batch=8 --lengths=512,114 --steps=2 --peer"
_STEP_32 = f"{_STEP} --dtype=float32 T5X"   # the word stands for the flag that adds it
_DECODE = "bench_decode.py --config=configs/t5_1_1.py:small --rounds=2"
_START = "bench_start.py --rounds=1"
_START_T5X = f"{_START} --before= T5X"
_SAVE = "bench_checkpoint.py --config=configs/t5_1_1.py:small"


@dataclasses.dataclass(frozen=True)
class Measure:
    """One row. The patterns find the numbers in what the command prints; "" finds none."""

    name: str
    command: str        # a script of this folder and its flags; "" for a row that cannot be had
    ours: str = ""
    peer: str = ""
    ratio: str = ""
    limit: str = ""
    goal: str = ""
    why: str = ""       # what a row that cannot be had lacks


_STEP_FOUND = dict(ours=r"seconds a step +(\S+)", peer=r"transformers +(\S+) s",
                   ratio=r"(\S+) times ours", limit=r"FLOP/s .*?, (\S+%) of")
_DECODE_FOUND = dict(ours=r"t5x_lite +(\d+ tokens/s)", peer=r"transformers +(\d+ tokens/s)",
                     ratio=r"ratio +(\S+)", limit=r"would be (\S+)")
_T5X_START = r"T5X, to the end of step one (\S+) s"


def _text(size: int, goal: str) -> Measure:
    return Measure(f"data, documents of {size} bytes, M tokens a CPU second (peer: a document at a time; limit: "
                   "seqio's SentencePiece, 64 in a call)", f"bench_data.py --bytes={size}",
                   r"packed rows of span corruption +(\S+)", r"a document at a time +(\S+)",
                   limit=r"64 documents at once +(\S+)", goal=goal)


MEASURES = (
    Measure("step, float32, s, against transformers (limit: share of the product's rate)", _STEP_32,
            **_STEP_FOUND, goal=">= 2.4"),
    Measure("step, float32, s, against T5X", _STEP_32, r"seconds a step +(\S+)", r"T5X +(\S+) s a step",
            r"T5X.*, (\S+) of ours", r"FLOP/s .*?, (\S+%) of", ">= 2"),
    Measure("step, bf16, s, against transformers", f"{_STEP} --dtype=bf16", **_STEP_FOUND, goal="faster"),
    Measure("decode, 32 rows, float32", _DECODE, **_DECODE_FOUND, goal=">= 1.6"),
    Measure("decode, 32 rows, bf16", f"{_DECODE} --dtype=bfloat16", **_DECODE_FOUND, goal=">= 2"),
    Measure("decode, 1 row, float32", f"{_DECODE} --batch=1", **_DECODE_FOUND, goal=">= 2.5"),
    Measure("decode, 4 beams of 8 rows", f"{_DECODE} --batch=8 --beams=4", **_DECODE_FOUND,
            goal=">= 2"),
    Measure("start, cold, to the end of step one, s, against T5X", _START_T5X, r"cold.*now +(\S+) s",
            _T5X_START, r"ours cold (\S+),", r"seqio (\S+ s)", "<= 0.25"),
    Measure("start, warm, to the end of step one, s, against T5X", _START_T5X,
            r"warm, to the end of step one.*now +(\S+) s", _T5X_START, r"warm (\S+) of it",
            r"seqio (\S+ s)", "<= 0.1"),
    Measure("start, warm, two steps of the quickstart, s, against c3babf6", f"{_START} --before=c3babf6",
            r"warm, to the end of the run.*now +(\S+) s",
            r"warm, to the end of the run.*?c3babf6 +(\S+) s", r"the run.*ratio (\S+)",
            r"seqio (\S+ s)", "<= 0.35"),
    _text(2400, ">= 1"), _text(100, ">= 0.5"),
    Measure("data, tokenised records of 2400 bytes, M tokens a CPU second", "bench_data.py --bytes=2400",
            r"from tokenised records +(\S+)", goal=">= 3"),
    Measure("step blocked by an asynchronous save (limit: copying the state)", _SAVE, r"blocked for (\S+%)",
            limit=r"alone it would be (\S+%)", goal="<= 0.3 %"),
    Measure("restore, of a plain read (page cache; limit: Orbax alone)", _SAVE,
            r"restore +(\S+) of a plain", limit=r"Orbax alone (\S+) of", goal=">= 0.5"),
    Measure("restore of the parameters alone, of that of the whole", _SAVE, r"alone (\S+) of its time",
            goal="<= 1"),
    Measure("plans of LLaMA-2-7B and T5.1.1-XXL", "", why="minutes of libtpu: docs/rehearsals.md has "
            "the commands and the bytes"),
)


def interpreter(folder: pathlib.Path) -> pathlib.Path:
    """A Python with transformers, PyTorch, t5x_lite and what T5X imports."""
    python = folder / "environment" / "bin" / "python"
    done = folder / "environment" / "complete"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "environment"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt",
                        "-e", f"{ROOT}[cpu]", "torch", "transformers", "safetensors", "gin-config",
                        "fiddle", "cached_property", "jaxtyping", "clu", "tensorboard"], check=True)
        done.touch()
    return python


_STUBS = {
    "airio/__init__.py": "", "jestimator/__init__.py": "",
    "airio/core.py": "class DatasetProviderBase: pass\nclass Task(DatasetProviderBase): pass\n"
                     "class Mixture(DatasetProviderBase): pass\nclass AirIODatasetIterator: pass\n",
    "jestimator/amos.py": "class ScaleByAmosState: pass\ndef amos(): raise NotImplementedError\n",
    "jestimator/amos_helper.py": "def state_partition_rule(*_): raise NotImplementedError\n"}


def install_t5x(folder: pathlib.Path, python: pathlib.Path) -> str:
    """Puts T5X on the environment's path; why it cannot be had, "" where it can."""
    place = folder / "t5x"
    if not (place / "t5x").exists():
        clone = pathlib.Path(_T5X.value)
        if not clone.exists():
            clone = folder / "t5x.git"
            fetched = subprocess.run(["git", "clone", "-q", "--bare", _T5X.value, clone],
                                     capture_output=True, text=True)
            if fetched.returncode:
                return f"T5X is not to be had from {_T5X.value}: {fetched.stderr.strip().splitlines()[-1]}"
        git = ["git", "-C", str(clone)]
        listed = subprocess.run([*git, "ls-tree", "-r", "--name-only", COMMIT, "t5x"],
                                capture_output=True, text=True)
        if listed.returncode:
            return f"{clone} has no commit {COMMIT}: {listed.stderr.strip().splitlines()[-1]}"
        # Its tests' data are 400 MB.
        files = [name for name in listed.stdout.split() if name.endswith(".py")
                 and not name.endswith("_test.py") and not name.startswith("t5x/contrib/")]
        archive = subprocess.run([*git, "archive", COMMIT, *files], capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(place, filter="data")
    for name, text in _STUBS.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    next((python.parents[1] / "lib").glob("python*")).joinpath("site-packages/t5x.pth").write_text(
        f"{place.resolve()}\n")
    return ""


def machine() -> str:
    """The CPU's name, how many of it, and what it has for short types."""
    path = pathlib.Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    has = [f for f in ("amx_bf16", "avx512_bf16", "avx512_vnni") if f" {f}" in text]
    return f"{text.count('processor	')} x {name[1] if name else platform.processor()}, " \
           f"{', '.join(has) or 'no short products'}"


ENDED = -signal.SIGKILL


def run(command: list) -> subprocess.CompletedProcess:
    """The command in a process group of its own, which is ended after --seconds with all that it started."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        try:
            out, said = process.communicate(timeout=_SECONDS.value)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, said = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, said)


def first(pattern: str, text: str) -> str:
    found = pattern and re.search(pattern, text)
    return found[1] if found else ""


def cells(measure: Measure, done: subprocess.CompletedProcess, no_t5x: str) -> str:
    """What stands behind a measure's name."""
    if no_t5x and "T5X" in measure.name:
        return f"not measured: {no_t5x} | | | | "
    if done.returncode == ENDED:
        return f"not measured: no end after {_SECONDS.value:g} s | | | | {measure.goal}"
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1]} | | | | "
    found = [first(p, done.stdout) for p in (measure.ours, measure.peer, measure.ratio, measure.limit)]
    return f"{' | '.join(found)} | {measure.goal}"


def main(argv) -> None:
    del argv
    folder = pathlib.Path(_FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    python = interpreter(folder)
    no_t5x = install_t5x(folder, python)
    print(f"on {machine()}\n\n| measure | ours | peer | ratio | limit | goal |\n|---|---|---|---|---|---|")
    runs: dict[str, subprocess.CompletedProcess] = {}   # one run for the measures of one command
    for measure in MEASURES:
        if _ONLY.value not in measure.name:
            continue
        if not measure.command:
            print(f"| {measure.name} | not measured: {measure.why} | | | | |", flush=True)
            continue
        if measure.command not in runs:
            script, *arguments = measure.command.replace(
                "T5X", "" if no_t5x else f"--t5x={python}").split()
            runs[measure.command] = run(
                [*shlex.split(_UNDER.value), python, ROOT / "scripts" / script, *arguments])
        print(f"| {measure.name} | {cells(measure, runs[measure.command], no_t5x)} |", flush=True)


if __name__ == "__main__":
    app.run(main)
