"""Commands of t5x_lite in forked children of one process that has imported what they need.

A command takes ten seconds of a CPU to import TensorFlow, JAX and the rest; so it takes a moment.
`Forks` starts the process; each command gets arguments as a shell would give them, and its exit
status and lines of output come back.
"""

import importlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 600   # of a command, before it counts as one that hangs


class Forks:
    """The process, until it is closed. Its folder holds caches and what commands say."""

    def __init__(self, folder: pathlib.Path):
        self._said = folder / "said.txt"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                       "T5X_LITE_CACHE": str(folder / "cache")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks"], env=environment, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, module: str, *arguments: str) -> tuple[int, list[str]]:
        """(exit status, lines of standard output and error) of python -m t5x_lite.MODULE …"""
        job = {"module": f"t5x_lite.{module}", "arguments": arguments, "said": str(self._said)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        status = json.loads(self._process.stdout.readline())
        return status, self._said.read_text(errors="replace").splitlines()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait(30)


IMPORTED = ("cli", "build", "init_from", "evaluation.evaluator", "checkpoints.manager", "formats.t5x",
            "formats.hf_lora", "data.pipeline", "data.example_files")


def _serve() -> None:
    for name in IMPORTED:   # cli is the first: it sets what the others read on import
        importlib.import_module(f"t5x_lite.{name}")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _be(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _be(job: dict) -> None:
    """Becomes the command; does not return."""
    signal.alarm(SECONDS)
    said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [job["module"], *job["arguments"]]
    status = 0
    try:
        runpy.run_module(job["module"], run_name="__main__")
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
