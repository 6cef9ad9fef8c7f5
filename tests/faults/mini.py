"""One layer, decoder only, with dropout: seconds to trace. Runs of it that are hurt on purpose.

    --config=tests/faults/mini.py:TEXT_FILE
"""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

from t5x_lite import files
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import AttentionConfig, MLPConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.training.objectives import ObjectiveConfig
from tests import tiny_config
from tests.helpers import xla_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]

# What differs between two runs that do the same: seconds, and what is made of them.
TIMINGS = ("chip_hours", "mfu", "watts", "power_source", "energy_kwh", "co2e_kg", "dollars",
           "goodput", "seconds", "tokens_per_second")


def run(text: str) -> RunConfig:
    """8 rows a step over data=-1."""
    base = tiny_config.run(text)
    block = BlockConfig(AttentionConfig(2, 4, dropout_rate=0.1), None,
                        MLPConfig(16, gated=False, dropout_rate=0.1))
    decoder = StackConfig((SegmentConfig((block,), 1),), causal=True, dropout_rate=0.1, scan=False)
    return dataclasses.replace(
        base, model=ModelConfig("decoder_only", vocab_size=384, embed_dim=8, encoder=None,
                                decoder=decoder, tie_logits=True),
        objective=ObjectiveConfig(name="lm"),
        data=dataclasses.replace(base.data, targets_length=24, num_shards=2),
        eval=dataclasses.replace(base.eval, metrics=False))


def get_config(text: str):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(text))


def command(text, workdir, *flags: str) -> list[str]:
    """A training of it as a command."""
    return [sys.executable, "-m", "t5x_lite.train", f"--config={ROOT}/tests/faults/mini.py:{text}",
            f"--workdir={workdir}", *(f"--config.{f}" if not f.startswith("-") else f
                                      for f in flags)]


def begin(text, workdir, *flags: str, devices: int = 1, environ=None, **options
          ) -> subprocess.Popen:
    """Starts one in a process of its own; its output is one stream of text."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                   "PYTHONUNBUFFERED": "1",
                   "XLA_FLAGS": xla_flags(devices), **(environ or {})}
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)   # under nohup a child would ignore it, too
    try:
        return subprocess.Popen(command(text, workdir, *flags), env=environment, cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    finally:
        signal.signal(signal.SIGHUP, before)


def end(process: subprocess.Popen, seconds: float = 900) -> tuple[int, list[str]]:
    """(exit status, lines of output) of a process; it is killed where it does not end."""
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        raise AssertionError(f"still there after {seconds} s:\n{out}") from None
    return process.returncode, out.splitlines()


def wait_for(process: subprocess.Popen, start: str) -> list[str]:
    """The lines of output up to the first whose begin this regex matches."""
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if re.match(start, line):
            return lines
    raise AssertionError(f"no line {start!r} in:\n" + "\n".join(lines))


def two(text, workdir, *flags: str, each=((), ()), seconds: float = 900):
    """[(exit status, lines)] of two processes that train together."""
    processes = begin_two(text, workdir, *flags, each=each)
    return [end(process, seconds) for process in processes]


def begin_two(text, workdir, *flags: str, each=((), ()), environments=({}, {})
              ) -> list[subprocess.Popen]:
    """Starts them; `each` are further flags of each, `environments` further variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [begin(text, workdir, "mesh.data=-1", f"--coordinator_address=127.0.0.1:{port}",
                  "--num_processes=2", f"--process_id={i}", *flags, *each[i],
                  environ=environments[i]) for i in range(2)]


def without_timings(workdir) -> list[str]:
    """The lines of metrics.jsonl, less what a clock measured."""
    lines = []
    for line in (files.path(workdir) / "metrics.jsonl").read_text().splitlines():
        fields = json.loads(line)
        lines.append(json.dumps({name: value for name, value in fields.items()
                                 if name not in TIMINGS and not name.startswith("seconds/")}))
    return lines
