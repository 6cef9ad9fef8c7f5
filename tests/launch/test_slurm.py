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

PATIENCE = 900   # seconds, for a busy machine


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
         f"--workdir={workdir}", "--config.train.num_steps=1000", "--config.checkpoint.every=1000",
         "--config.eval.every=1000", "--config.train.log_every=10"],
        env=slurm, cwd=ROOT, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    wait_for(r"step \d+0/1000", out, PATIENCE)
    subprocess.run(["scontrol", "requeue", job], env=slurm, check=True)
    content = wait_for(r"=== .* exit status 0", out, PATIENCE)
    assert "2 processes" in content and "which is saved" in content
    assert "life 1 of job" in content and re.search(r"resumed from .*step \d+", content)
    steps = [line["step"] for line in metrics.read_metrics(workdir / "metrics.jsonl")
             if "train/loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 1000


UNKNOWN = """
import runpy, sys
from t5x_lite.parallel import processes
processes.SECONDS_TO_JOIN = 10
runpy.run_module("t5x_lite.train", run_name="__main__", alter_sys=True)
"""


def test_a_coordinators_name_that_no_host_knows(slurm, tmp_path):
    """Both tasks wait for a bounded time, and say what is the matter, without a dump of JAX's."""
    (tmp_path / "train.py").write_text(UNKNOWN)
    text = tiny_config.write_text(tmp_path / "words.txt")
    # In a namespace of its own a task sees the machine's own /etc/hosts, which has no node1.
    done = subprocess.run(
        ["srun", "-N2", "-n2", "-l", "--mem=1000", "--kill-on-bad-exit=0", "unshare", "-m", "bash",
         "-c", 'umount /etc/hosts && exec "$@"', "-", sys.executable, str(tmp_path / "train.py"),
         f"--config={ROOT}/tests/tiny_config.py:{text}", f"--workdir={tmp_path / 'run'}"],
        env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    for task, says in (("0", "does not know the coordinator's name node1"),
                       ("1", r"process 0 of this run does not answer at node1:\d+")):
        lines = [line[3:] for line in done.stderr.splitlines() if line.startswith(f"{task}: ")]
        assert re.match(f"waiting up to 10 s: .*{says}", lines[0]), done.stderr
        assert re.match(rf"error: .*{says} within 10 s \(.*not known\)", lines[-1]), done.stderr
        assert len(lines) == 2, done.stderr
    assert done.returncode == 76 and not (tmp_path / "run" / "checkpoints").exists()


EXPERIMENT = '''
from t5x_lite import config as configs
from t5x_lite.experiment import Run
from tests import tiny_config

SHOWN = ("validation_files/loss",)
SLURM = {"timeout_min": 30, "mem_gb": 1, "cpus_per_task": 1}

def get_runs(text):
    run = tiny_config.run(text)
    for field, value in {"train.num_steps": 1000, "train.log_every": 10, "checkpoint.every": 1000,
                         "eval.every": 1000}.items():
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
        wait_for(r"long/seed_0: started", out, PATIENCE)
        said = re.search(r"long/seed_0: started; see (\S+/(\d+)_0_log.out)", out.read_text())
        log, job = pathlib.Path(said[1]), said[2]
        wait_for(r"step \d+/1000", log, PATIENCE)
        subprocess.run(["scancel", "--signal=USR2", job], env=slurm, check=True)
        wait_for(rf"back into the queue as job {job}", log, PATIENCE)
        wait_for(r"resumed from .*step \d+", log, PATIENCE)
        assert launching.wait(timeout=PATIENCE) == 1, out.read_text()
    finally:
        launching.kill()
    content = out.read_text()
    assert "long/seed_0: finished" in content and "1 of 2 runs failed" in content
    assert re.search(r"bad/seed_0: job \d+: error: .*words.txtx", content)
    assert "| long | 1 |" in (tmp_path / "out" / "results.md").read_text()
