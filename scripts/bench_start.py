"""How long a run takes to begin, beside another commit's.

    python scripts/bench_start.py --before=HEAD~1 --rounds=3

Starts `configs/quickstart.py` with two steps, its evaluation and its samples in processes of their
own, the two commits in turns, and prints for each the median seconds to the end of step one with an
empty cache of compiled programs (cold) and with a filled one (warm), and to the end of the run, warm.
Then the limit: what an interpreter takes to import jax and seqio, and what the run's own clock counts as
steps and evaluation. The text cache is filled before, and so is Python's bytecode. Root may prefix
`chrt -f 50`, which every process inherits, on a machine that does other work.
`--t5x=PYTHON` also times T5X to the end of step one of the same model on the same task, in that
interpreter (bench_t5x.py, whose environment bench_peers.py makes).
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import cpu_environment
from absl import app, flags

_BEFORE = flags.DEFINE_string("before", "HEAD~1", "The commit to compare with; '' for none.")
_T5X = flags.DEFINE_string("t5x", "", "The Python of an environment with T5X: time its start too.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Runs of each kind.")

ROOT = pathlib.Path(__file__).resolve().parents[1]
# This commit's for both: a change of the quickstart is no gain of the start.
_CONFIG = flags.DEFINE_string("config", str(ROOT / "configs/quickstart.py"), "What is trained.")


def environment(tree: pathlib.Path, caches: pathlib.Path) -> dict[str, str]:
    """What a user's shell would hold, and caches that are the benchmark's own."""
    variables = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    return {**variables, **cpu_environment.VARIABLES, "PYTHONPATH": str(tree),
            "T5X_LITE_CACHE": str(caches), "TF_CPP_MIN_LOG_LEVEL": "3"}


def run(tree: pathlib.Path, caches: pathlib.Path, workdir: pathlib.Path) -> tuple[float, float]:
    """(seconds to the end of step one, seconds to the end) of two steps in a fresh workdir."""
    shutil.rmtree(workdir, ignore_errors=True)
    began, first = time.perf_counter(), float("nan")
    with subprocess.Popen(
            [sys.executable, "-m", "t5x_lite.train", f"--config={_CONFIG.value}",
             f"--workdir={workdir}", "--config.train.num_steps=2", "--config.train.log_every=1"],
            cwd=tree, env=environment(tree, caches), stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1/2"):
                first = time.perf_counter() - began
    assert process.returncode == 0, f"the run in {tree} ended with {process.returncode}"
    return first, time.perf_counter() - began


def t5x_start(folder: pathlib.Path) -> float:
    """Seconds from nothing to the end of step one of T5X; it keeps no compiled programs."""
    began = time.perf_counter()
    with subprocess.Popen(
            [_T5X.value, ROOT / "scripts" / "bench_t5x.py", "start", folder / "t5x"], cwd=ROOT,
            env=environment(ROOT, folder / "t5x_text"), stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1"):
                return time.perf_counter() - began
    raise AssertionError(f"T5X's first step did not end in {_T5X.value}")


def main(argv) -> None:
    del argv
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        trees = {"now": ROOT}
        if _BEFORE.value:
            trees = {_BEFORE.value: folder / "before", **trees}
            subprocess.run(["git", "worktree", "add", "-q", "--detach", folder / "before",
                            _BEFORE.value], cwd=ROOT, check=True)
        try:
            measure(trees, folder)
        finally:
            if _BEFORE.value:
                subprocess.run(["git", "worktree", "remove", "--force", folder / "before"],
                               cwd=ROOT, check=True)


def measure(trees: dict[str, pathlib.Path], folder: pathlib.Path) -> None:
    """Runs all trees in turns and prints."""
    kinds = ("cold, to the end of step one", "warm, to the end of step one",
             "warm, to the end of the run")
    seconds = {kind: {tree: [] for tree in trees} for kind in kinds}
    losses: dict[str, str] = {}     # of the last run
    caches = {tree: folder / f"cache{i}" for i, tree in enumerate(trees)}
    for tree, path in trees.items():   # text and bytecode
        run(path, caches[tree], folder / "run")
    for _ in range(_ROUNDS.value):
        for tree, path in trees.items():
            shutil.rmtree(caches[tree] / "programs", ignore_errors=True)
            seconds[kinds[0]][tree].append(run(path, caches[tree], folder / "run")[0])
        for tree, path in trees.items():
            first, whole = run(path, caches[tree], folder / "run")
            seconds[kinds[1]][tree].append(first)
            seconds[kinds[2]][tree].append(whole)
            losses[tree] = _losses(folder / "run")
    if _T5X.value:
        theirs = [t5x_start(folder) for _ in range(_ROUNDS.value + 1)][1:]   # text and bytecode
        cold, warm = (statistics.median(seconds[kind]["now"]) for kind in kinds[:2])
        peer = statistics.median(theirs)
        print(f"T5X, to the end of step one {peer:.1f} s: ours cold {cold / peer:.2f}, warm "
              f"{warm / peer:.2f} of it")
    for kind, found in seconds.items():
        medians = {tree: statistics.median(values) for tree, values in found.items()}
        ratio = f"   ratio {medians['now'] / medians[_BEFORE.value]:.2f}" if _BEFORE.value else ""
        print(f"{kind:<30}" + "".join(f"   {tree} {median:5.1f} s"
                                      for tree, median in medians.items()) + ratio)
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import jax, seqio"], check=True,
                   env=environment(ROOT, caches["now"]), stderr=subprocess.DEVNULL)
    imports = time.perf_counter() - begin
    line = (folder / "run" / "metrics.jsonl").read_text().splitlines()[1]
    clock = {n: v for n, v in json.loads(line).items() if n == "seconds/step"}
    print(f"limit: import jax, seqio {imports:.1f} s; two steps {clock['seconds/step']:.1f} s")
    if _BEFORE.value:
        print(f"losses equal to the bit: {len(set(losses.values())) == 1}")


def _losses(workdir: pathlib.Path) -> str:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return json.dumps([{n: v for n, v in line.items() if n.endswith(("loss", "accuracy"))}
                       for line in lines])


if __name__ == "__main__":
    app.run(main)
