"""What each scheduler tells a process, and what is made of it."""

import socket
import subprocess
import sys

import pytest

from t5x_lite.errors import UserError
from t5x_lite.parallel import processes
from t5x_lite.parallel.processes import Processes

SLURM = {"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "4",
         "SLURM_STEP_NODELIST": "gpu[007-009,020]", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
JOB = {**POD, "JOB_COMPLETION_INDEX": "3"}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "8"}


@pytest.mark.parametrize("environ, tpu, expected", [
    ({}, False, None),
    # Slurm: one task a node takes all its GPUs; several share them out or were given one each.
    (SLURM, False, Processes("Slurm", "gpu007:61441", 4, 2)),
    ({**SLURM, "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1"},
     False, Processes("Slurm", "gpu007:61441", 4, 2, (1,))),
    ({**SLURM, "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "1"}, False,
     Processes("Slurm", "gpu007:61441", 4, 2)),
    # An allocation's shell, and srun of one task, are single processes.
    ({"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "4"}, False, None),
    ({**SLURM, "SLURM_NTASKS": "1"}, False, None),
    # Kubernetes: an indexed Job is several processes, a notebook's pod is one.
    ({**JOB, **VARIABLES}, False, Processes("Kubernetes", "a:1", 8, 3)),
    (JOB, False, Processes("Kubernetes")),
    (POD, False, None),
    # TPUs: the worker list decides; without one JAX asks the metadata server.
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True, Processes("TPU")),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, Processes("TPU")),
    ({}, True, Processes("TPU")),
    ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
    # By hand.
    ({**VARIABLES, "JAX_PROCESS_ID": "7"}, False, Processes("the environment", "a:1", 8, 7)),
    ({**VARIABLES, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, False, None),
])
def test_processes_are_found(environ, tpu, expected):
    assert processes.find(environ, tpu) == expected


@pytest.mark.parametrize("nodes, host", [
    ("node001", "node001"), ("node001,host2", "node001"), ("node[001-015],host2", "node001"),
    ("node[7,9-15]", "node7"), ("a,b[1-2]", "a"), ("rack[1-2]-gpu,x", "rack1-gpu"),
])
def test_the_first_host_of_a_slurm_list(nodes, host):
    assert processes.first_host(nodes) == host


@pytest.mark.parametrize("environ, message", [
    (VARIABLES, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES without JAX_PROCESS_ID"),
    ({**VARIABLES, "JAX_PROCESS_ID": "8"}, "JAX_PROCESS_ID=8: must be numbers"),
    ({**VARIABLES, "JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID=one: must be numbers"),
])
def test_half_a_description_is_an_error(environ, message):
    with pytest.raises(UserError, match=message):
        processes.find(environ, False)


@pytest.mark.parametrize("vendor, kind, platforms, expected", [
    ("0x1ae0", "0x120000", "", True), ("0x1ae0", "0x120000", "tpu,cpu", True),
    ("0x1ae0", "0x120000", "cpu", False), ("0x1ae0", "0x020000", "", False),
    ("0x10de", "0x120000", "", False),
])
def test_a_tpu_is_googles_and_neither_network_card_nor_disk(tmp_path, vendor, kind, platforms,
                                                            expected):
    (tmp_path / "0000:00:05.0").mkdir()
    (tmp_path / "0000:00:05.0" / "vendor").write_text(vendor + "\n")
    (tmp_path / "0000:00:05.0" / "class").write_text(kind + "\n")
    assert processes.has_tpu({"JAX_PLATFORMS": platforms}, str(tmp_path)) == expected


@pytest.mark.parametrize(("found", "message"), [
    (Processes("flags", "localhost", 2, 1), "coordinator address 'localhost' .flags.: must be host"),
    (Processes("flags", "a:99999", 2, 1), "coordinator address 'a:99999'"),
    (Processes("flags", ":1", 2, 1), "coordinator address ':1'"),
    (Processes("flags", "a:1", 2, 2), "process id 2 of 2 processes"),
    (Processes("flags", "a:1", 2, -1), "process id -1 of 2"),
    (Processes("flags", "a:1", 0, 0), "process id 0 of 0"),
])
def test_addresses_and_numbers_that_cannot_be(found, message):
    with pytest.raises(UserError, match=message):
        found.initialize()


def test_nobody_at_the_coordinators_address(monkeypatch, capsys):
    """The wait is bounded, and the message says what the matter was."""
    monkeypatch.setattr(processes, "SECONDS_TO_JOIN", 0.3)
    with socket.socket() as taken:   # bound and not listening: refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "no-such-host.invalid"):
            with pytest.raises(processes.Unreachable, match=f"does not answer at {host}:{port} "
                                                            "within 0.3 s"):
                processes._wait_for(host, port, here=False)
            assert capsys.readouterr().err.count("waiting up to 0.3 s: process 0 of") == 1
        with pytest.raises(processes.Unreachable, match="does not know the coordinator's name "
                                                        "no-such-host.invalid within 0.3 s"):
            processes._wait_for("no-such-host.invalid", port, here=True)
        assert capsys.readouterr().err.count("waiting up to 0.3 s: this is process 0") == 1
        processes._wait_for("127.0.0.1", port, here=True)   # it will listen there itself
        taken.listen()
        processes._wait_for("127.0.0.1", port, here=False)
        assert capsys.readouterr().err == ""


def test_last_words_are_said_unless_taken_back():
    code = ("import os, sys; from t5x_lite.parallel import processes as p\n"
            "with p.last_words():\n  {}\n  os._exit(3)")
    for change, said in (("pass", "error: this process was ended without a word"),
                         ("p.change_last_words('error: one\\n')", "error: one\n"),
                         ("p.said_last_words()", "")):
        done = subprocess.run([sys.executable, "-c", code.format(change)], text=True,
                              capture_output=True, check=False)
        assert done.returncode == 3
        assert done.stderr.startswith(said) and bool(done.stderr) == bool(said)
