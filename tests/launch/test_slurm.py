"""A real Slurm of two nodes: scripts/launch/slurm.sbatch is requeued in the middle, and finishes.

Needs root and Debian's packages: apt-get install --no-install-recommends slurmd slurmctld
slurm-client munge
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

from t5x_lite.training import metrics
from tests import tiny_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).parent / "slurm"

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def slurm():
    """The environment in which sbatch and scontrol reach the test's own cluster."""
    missing = [c for c in ("slurmd", "slurmctld", "munged", "sbatch") if not shutil.which(c)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing) or 'no more'}: apt-get install "
                    "--no-install-recommends slurmd slurmctld slurm-client munge")
    # munged wants every folder above its socket to be open to all; pytest's are closed.
    folder = pathlib.Path(tempfile.mkdtemp(prefix="t5x_lite_slurm_"))
    folder.chmod(0o755)
    started = subprocess.run(["bash", str(HERE / "start.sh"), str(folder)], capture_output=True,
                             text=True, timeout=120)
    try:
        assert started.returncode == 0, started.stderr
        yield {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "JAX_PLATFORMS": "cpu",
               "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "T5X_LITE_PYTHON": sys.executable,
               "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    finally:
        subprocess.run(["bash", str(HERE / "stop.sh"), str(folder)], timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(text, file: pathlib.Path, seconds: float, times: int = 1) -> str:
    """The file's content once it matches so often."""
    end = time.monotonic() + seconds
    content = ""
    while time.monotonic() < end:
        content = file.read_text() if file.exists() else ""
        if len(re.findall(text, content)) >= times:
            return content
        time.sleep(0.5)
    raise AssertionError(f"{text!r} not {times} times within {seconds} s in:\n{content}")


def test_a_job_of_two_tasks_is_requeued_and_goes_on(slurm, tmp_path):
    text = tiny_config.write_text(tmp_path / "words.txt")
    workdir, out = tmp_path / "run", tmp_path / "job.out"
    submitted = subprocess.run(
        ["sbatch", "--parsable", "--nodes=2", "--ntasks=2", "--mem=2000", f"--output={out}",
         str(ROOT / "scripts/launch/slurm.sbatch"), f"--config={ROOT}/tests/tiny_config.py:{text}",
         f"--workdir={workdir}", "--config.train.num_steps=3000", "--config.checkpoint.every=1000",
         "--config.eval.every=3000", "--config.train.log_every=10"],
        env=slurm, cwd=ROOT, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    wait_for(r"step \d+0/3000", out, 240)
    subprocess.run(["scontrol", "requeue", job], env=slurm, check=True)
    content = wait_for(r"=== .* exit status 0", out, 420)
    assert "2 processes" in content and "which is saved" in content
    assert "life 1 of job" in content and re.search(r"resumed from .*step \d+", content)
    steps = [line["step"] for line in metrics.read_metrics(workdir / "metrics.jsonl")
             if "train/loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 3000
