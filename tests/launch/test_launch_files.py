"""The files to launch with: their checkers pass, restart.sh obeys exit statuses, flags exist."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from t5x_lite.errors import UserError
from t5x_lite.running import signals

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def tool(name: str) -> str:
    """A checker of the extra [test], beside this Python."""
    found = shutil.which(name, path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}"
                                    f"{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed (extra [test])")
    return found


def check(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_shell_scripts(file):
    check(tool("shellcheck"), str(file))


def test_the_image():
    check(tool("hadolint"), str(LAUNCH / "Dockerfile"))


def validate(path) -> None:
    result = subprocess.run([tool("kubernetes-validate"), "--strict", str(path)],
                            capture_output=True, text=True)
    said = result.stdout + result.stderr
    # It only warns of kinds that it does not know, and passes them.
    assert result.returncode == 0 and "WARN" not in said, said


def test_the_job_of_kubernetes():
    validate(LAUNCH / "kubernetes_job.yaml")


def test_the_job_inside_the_jobset(tmp_path):
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert set(jobset["spec"]) == {"failurePolicy", "replicatedJobs"}
    policy = jobset["spec"]["failurePolicy"]
    assert policy["rules"][0]["action"] in ("FailJobSet", "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts")
    for job in jobset["spec"]["replicatedJobs"]:
        assert set(job) == {"name", "replicas", "template"}
        inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]},
                 **job["template"]}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(inner))
        validate(tmp_path / "job.yaml")


def test_sky_has_what_a_task_needs():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert {"resources", "num_nodes", "setup", "run", "envs"} <= task.keys()
    # SkyPilot starts again what leaves with one of these, and whatever fails max_restarts_on_errors times.
    assert task["resources"]["job_recovery"] == {"strategy": "FAILOVER", "recover_on_exit_codes": [77]}


@pytest.mark.parametrize(("statuses", "status", "lives"), [
    ([2, 0], 2, 1), ([0], 0, 1), ([1, 76, 0], 0, 3), ([77, 0], 0, 2)])
def test_sky_runs_a_command_that_a_mistake_ends(tmp_path, statuses, status, lives):
    """A node's own command, with a Python that leaves with these statuses one after another."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    (tmp_path / "scripts").symlink_to(LAUNCH.parent)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    command_of(tmp_path, tmp_path / ".venv/bin/python", statuses)
    result = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, **task["envs"], "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
             "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
             "SKYPILOT_NODE_RANK": "1"})
    assert result.returncode == status, result.stderr
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["10.0.0.1:8476 2 1 77 -u -m t5x_lite.train --workdir=gs://BUCKET/RUN "
                    "--config=configs/t5_1_1.py:base"] * lives


@pytest.mark.parametrize("file", sorted(LAUNCH.iterdir()), ids=lambda file: file.name)
def test_each_says_how_it_is_used_and_trains_with_flags_that_there_are(file):
    text = file.read_text()
    assert len(text.split("\n\n", 1)[0].splitlines()) >= 2 and text.count("# ") > 3
    known = {"config", "workdir"}
    assert {f for f in re.findall(r"t5x_lite\.train.*?--(\w+)=", text)} <= known


# --- restart.sh ---------------------------------------------------------------------------------

def command_of(tmp_path, command, statuses):
    """Writes a command that leaves with these statuses, and says by what it was called."""
    count = tmp_path / "count"
    command.write_text(f"""#!/bin/bash
n=$(cat {count} 2>/dev/null || echo 0); echo $((n + 1)) > {count}
echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID $T5X_LITE_STOPPED_STATUS $*" >> {tmp_path}/said
statuses=({' '.join(map(str, statuses))}); exit ${{statuses[$n]}}
""")
    command.chmod(0o755)
    sleep = tmp_path / "sleep"   # pauses are said, not waited for
    sleep.write_text("#!/bin/bash\nexit 0\n")
    sleep.chmod(0o755)


def restarting(tmp_path, statuses, retries=2):
    """(exit status, how often the command ran, what was said) of a command that leaves with these
    statuses one after another."""
    command, count = tmp_path / "command.sh", tmp_path / "count"
    command_of(tmp_path, command, statuses)
    result = subprocess.run(
        [str(LAUNCH / "restart.sh"), str(command)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
             "T5X_LITE_RETRIES": str(retries)})
    return result.returncode, int(count.read_text()), result.stderr


@pytest.mark.parametrize("statuses, status, lives", [
    ([0], 0, 1),
    ([2, 0], 2, 1),                        # a user's mistake is not tried again
    ([77, 77, 77, 77, 0], 0, 5),           # saved and asked to stop: as often as it takes
    ([1, 137, 0], 0, 3),
    ([1, 1, 77, 1, 0], 0, 5),              # what was saved is progress
    ([1, 1, 1, 0], 1, 3),
])
def test_restarts_obey_the_exit_status(tmp_path, statuses, status, lives):
    found, number, _ = restarting(tmp_path, statuses)
    assert (found, number) == (status, lives)


def test_pauses_double(tmp_path):
    _, _, said = restarting(tmp_path, [1, 1, 1, 0], retries=5)
    assert re.findall(r"again in (\d+) s", said) == ["5", "10", "20"]


def test_sigterm_is_handed_on_and_its_save_awaited(tmp_path):
    mark = tmp_path / "saved"
    script = tmp_path / "run.sh"
    script.write_text(f"#!/bin/bash\ntrap 'sleep 1; touch {mark}; exit 77' TERM\n"
                      f"touch {tmp_path}/started\nwhile :; do sleep 0.1; done\n")
    script.chmod(0o755)
    process = subprocess.Popen([str(LAUNCH / "restart.sh"), str(script)])
    for _ in range(100):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 77 and mark.exists()


@pytest.mark.parametrize("environ, status", [({}, 0), ({"T5X_LITE_STOPPED_STATUS": "77"}, 77)])
def test_the_status_of_a_stopped_run_is_the_launchers(environ, status):
    assert signals.stopped_status(environ) == status


@pytest.mark.parametrize("value", ["-1", "126", "x", ""])
def test_another_status_is_refused(value):
    with pytest.raises(UserError, match="T5X_LITE_STOPPED_STATUS=.*0 to 125"):
        signals.stopped_status({"T5X_LITE_STOPPED_STATUS": value})
