"""The table of docs/performance.md: every measure beside its peer and its limit, from one run.

    python scripts/bench_peers.py --folder=/tmp/peers
    python scripts/bench_peers.py --folder=/tmp/peers --only=decode

Runs the other benchmarks one after the other and prints a row for each of their measures: ours, the
peer's, the ratio, the limit measured in the same process, and the goal of issue 13. The peer is
transformers in PyTorch; where this interpreter lacks them, an environment with both and t5x_lite is made in
--folder (700 MB). A row that cannot be had says why. Half an hour on two quiet cores; root may prefix
`chrt -f 50` on busy ones.
"""

import dataclasses
import importlib.util
import pathlib
import platform
import re
import subprocess
import sys

from absl import app, flags

_FOLDER = flags.DEFINE_string("folder", None, "Where environments are made.", required=True)
_ONLY = flags.DEFINE_string("only", "", "A part of the measures' names: only those.")

ROOT = pathlib.Path(__file__).resolve().parents[1]
_STEP = "bench_step.py --config=configs/t5_1_1.py:small --batch=8 --lengths=512,114 --steps=3 --peer"
_DECODE = "bench_decode.py --config=configs/t5_1_1.py:small"


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
MEASURES = (
    Measure("step, float32 (limit: share of the product's rate)", f"{_STEP} --dtype=float32",
            **_STEP_FOUND, goal=">= 2.4"),
    Measure("step, bf16", f"{_STEP} --dtype=bf16", **_STEP_FOUND, goal="faster"),
    Measure("step against T5X", "", why="T5X is not on PyPI, and its commit cc342d4 needs airio and "
            "jestimator in place of what no longer installs: this script does not make it"),
    Measure("decode, 32 rows, float32", _DECODE, **_DECODE_FOUND, goal=">= 1.6"),
    Measure("decode, 32 rows, bf16", f"{_DECODE} --dtype=bfloat16", **_DECODE_FOUND, goal=">= 2"),
    Measure("decode, 1 row, float32", f"{_DECODE} --batch=1", **_DECODE_FOUND, goal=">= 2.5"),
    Measure("decode, 4 beams of 8 rows", f"{_DECODE} --batch=8 --beams=4", **_DECODE_FOUND,
            goal=">= 2"),
    Measure("start, cold, to the end of step one, s (peer: c3babf6)",
            "bench_start.py --before=c3babf6 --rounds=1", r"cold.*now +(\S+) s",
            r"cold.*?c3babf6 +(\S+) s", r"cold.*ratio (\S+)", r"seqio (\S+ s)"),
    Measure("start, warm, two steps of the quickstart, s (peer: c3babf6)",
            "bench_start.py --before=c3babf6 --rounds=1", r"warm, to the end of the run.*now +(\S+) s",
            r"warm, to the end of the run.*?c3babf6 +(\S+) s", r"the run.*ratio (\S+)",
            r"seqio (\S+ s)", "<= 0.35"),
    Measure("data, 2.4 kB documents, M tokens a CPU second", "bench_data.py --bytes=2400",
            r"packed rows of span corruption +(\S+)", limit=r"plain sentencepiece.*? +(\S+) M",
            goal=">= 1"),
    Measure("data, documents of 100 bytes, M tokens a CPU second", "bench_data.py --bytes=100",
            r"packed rows of span corruption +(\S+)", limit=r"plain sentencepiece.*? +(\S+) M",
            goal=">= 0.5"),
    Measure("step blocked by an asynchronous save",
            "bench_checkpoint.py --config=configs/t5_1_1.py:small", r"blocked for (\S+%)",
            goal="<= 0.3 %"),
    Measure("restore, of a plain read (page cache)",
            "bench_checkpoint.py --config=configs/t5_1_1.py:small", r"restore +(\S+) of a plain",
            goal=">= 0.5"),
    Measure("plans of LLaMA-2-7B and T5.1.1-XXL", "", why="minutes of libtpu: docs/rehearsals.md has "
            "the commands and the bytes"),
)


def interpreter(folder: pathlib.Path) -> str:
    """A Python with transformers, PyTorch and t5x_lite."""
    if all(importlib.util.find_spec(n) for n in ("transformers", "torch", "jax", "tensorflow")):
        return sys.executable
    python = folder / "transformers" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "transformers"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt",
                        "--extra-index-url", "https://download.pytorch.org/whl/cpu",
                        "-e", f"{ROOT}[cpu]", "torch", "transformers", "safetensors"], check=True)
    return str(python)


def machine() -> str:
    """The CPU's name, how many of it, and what it has for short types."""
    path = pathlib.Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    has = [f for f in ("amx_bf16", "avx512_bf16", "avx512_vnni") if f" {f}" in text]
    return f"{text.count('processor	')} x {name[1] if name else platform.processor()}, " \
           f"{', '.join(has) or 'no short products'}"


def first(pattern: str, text: str) -> str:
    found = pattern and re.search(pattern, text)
    return found[1] if found else ""


def main(argv) -> None:
    del argv
    python = interpreter(pathlib.Path(_FOLDER.value))
    print(f"on {machine()}\n\n| measure | ours | peer | ratio | limit | goal |\n|---|---|---|---|---|---|")
    printed: dict[str, tuple[str, str]] = {}   # one run for the measures of one command
    for measure in MEASURES:
        if _ONLY.value not in measure.name:
            continue
        if not measure.command:
            print(f"| {measure.name} | not measured: {measure.why} | | | | |", flush=True)
            continue
        if measure.command not in printed:
            script, *arguments = measure.command.split()
            done = subprocess.run([python, ROOT / "scripts" / script, *arguments],
                                  cwd=ROOT, capture_output=True, text=True)
            failed = (done.stderr.strip().splitlines() or ["?"])[-1] if done.returncode else ""
            printed[measure.command] = done.stdout, failed
        text, failed = printed[measure.command]
        if failed:
            print(f"| {measure.name} | failed: {failed} | | | | |", flush=True)
            continue
        cells = [first(p, text) for p in (measure.ours, measure.peer, measure.ratio, measure.limit)]
        print(f"| {measure.name} | {' | '.join(cells)} | {measure.goal} |", flush=True)


if __name__ == "__main__":
    app.run(main)
