"""A real Slurm of two nodes: scripts/launch/slurm.sbatch is requeued in the middle, and finishes; an
experiment gives every run a job.

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


EXPERIMENT = '''
from t5x_lite import config as configs
from t5x_lite.experiment import Run
from tests import tiny_config

SHOWN = ("validation_files/loss",)
SLURM = {"timeout_min": 30, "mem_gb": 1, "cpus_per_task": 1}

def get_runs(text):
    run = tiny_config.run(text)
    for field, value in {"train.num_steps": 3000, "train.log_every": 10, "checkpoint.every": 3000,
                         "eval.every": 3000}.items():
        run = configs.replace(run, field, value)
    yield Run("long", 0, run)
    yield Run("bad", 0, configs.replace(run, "data.train_files", text + "x"))
'''


def test_an_experiment_through_submitit(slurm, tmp_path):
    """A job a run; SIGUSR2, which Slurm sends ahead of the limit, saves and requeues one."""
    text = tiny_config.write_text(tmp_path / "words.txt")
    (tmp_path / "compare.py").write_text(EXPERIMENT)
    command = [sys.executable, "-u", "-m", "t5x_lite.experiment", "--launcher=slurm",
               f"--config={tmp_path / 'compare.py'}:{text}", f"--workdir={tmp_path / 'out'}",
               "--only=long|bad/seed_0$", "--slurm=timeout_min=20"]
    out = tmp_path / "said.txt"
    with open(out, "w") as file:
        launching = subprocess.Popen(command, env=slurm, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(r"long/seed_0: started", out, 300)
        said = re.search(r"long/seed_0: started; see (\S+/(\d+)_0_log.out)", out.read_text())
        log, job = pathlib.Path(said[1]), said[2]
        wait_for(r"step \d+/3000", log, 600)
        subprocess.run(["scancel", "--signal=USR2", job], env=slurm, check=True)
        wait_for(rf"back into the queue as job {job}", log, 300)
        wait_for(r"resumed from .*step \d+", log, 600)
        assert launching.wait(timeout=900) == 1, out.read_text()
    finally:
        launching.kill()
    content = out.read_text()
    assert "long/seed_0: finished" in content and "1 of 2 runs failed" in content
    assert re.search(r"bad/seed_0: job \d+: error: .*words.txtx", content)
    assert "| long | 1 |" in (tmp_path / "out" / "results.md").read_text()
