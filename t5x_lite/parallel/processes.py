"""Which processes make up a run: found from what the scheduler tells each of them.

    TPU pod, GKE or Cloud TPU VM    one process a host; JAX asks the TPU runtime or the metadata
    Slurm (srun)                    SLURM_NTASKS, SLURM_PROCID and the step's first host
    Kubernetes (indexed Job)        JOB_COMPLETION_INDEX, with JAX_COORDINATOR_ADDRESS and
                                    JAX_NUM_PROCESSES from the manifest, or read from the cluster
                                    by the `kubernetes` package
    anything else                   JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID, or
                                    the flags of the same names

A single process, be it on a machine of its own, in a Slurm allocation without srun or in a
notebook's pod, needs none of this and starts none.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5x_lite.errors import UserError
from t5x_lite.tree import differences

_AGAIN = ("Start all processes again with the same command: the run goes on from its last "
          "checkpoint.")
PEER_GONE = ("another process of this run has ended or cannot be reached; its own last lines say why "
             f"(process 0 must run at the coordinator's address). {_AGAIN}")
_KILLED = ("error: this process was ended without a word of its own: JAX ends a process when another "
           "of the run has ended or cannot be reached, and a system one that takes too much memory. "
           f"{_AGAIN}\n")

SECONDS_TO_JOIN = 300   # that a process waits for the others of its run to start

_GENERIC = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Processes:
    """What jax.distributed.initialize needs to be told; None is left to JAX to find."""

    source: str                                    # where it was found
    coordinator_address: str | None = None         # host:port of process 0
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None   # None: all devices of the host

    def initialize(self) -> None:
        """Joins the other processes; must come before anything that uses a device.

        Waits SECONDS_TO_JOIN for process 0, and as long for all others.

        Raises:
            UserError: an address or a number that cannot be, or where JAX was to find the
                coordinator and could not.
            Unreachable: nobody answers at the coordinator's address, or nobody knows its name.
        """
        known = None not in (self.coordinator_address, self.num_processes, self.process_id)
        if self.coordinator_address is not None:
            host, port = _host_and_port(self.coordinator_address, self.source)
        if known:
            _check_number(self.num_processes or 0, self.process_id or 0, self.source)
            _wait_for(host, port, here=self.process_id == 0)
            change_last_words(
                f"error: not all of the {self.num_processes} processes of this run met at "
                f"{self.coordinator_address} within {SECONDS_TO_JOIN} s. Look whether all of them "
                "were started, with that address and number of processes and each with a process "
                f"id of its own, and whether their hosts reach that port. {_AGAIN}\n")
        # JAX gives each Slurm task one GPU unless it is kept from looking.
        detection = "deactivate" if known else None
        try:
            jax.distributed.initialize(
                self.coordinator_address, self.num_processes, self.process_id,
                self.local_device_ids, cluster_detection_method=detection,
                initialization_timeout=SECONDS_TO_JOIN)
        except ValueError as error:   # JAX found no coordinator
            raise UserError(f"{self.source}: this is one of several processes, but {error} Set "
                            f"{', '.join(_GENERIC)}.") from error
        change_last_words(_KILLED)


class Unreachable(Exception):
    """Process 0 of the run does not answer."""


def _host_and_port(address: str, source: str) -> tuple[str, int]:
    """Of "host:port". Raises UserError for what is none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"coordinator address {address!r} ({source}): must be host:port of process "
                        "0, with a port from 1 to 65,535.")
    return host.strip("[]"), int(port)


def _check_number(count: int, index: int, source: str) -> None:
    if not 0 <= index < count:
        raise UserError(f"process id {index} of {count} processes ({source}): ids go from 0 to one "
                        "less than the number of processes.")


def _wait_for(host: str, port: int, here: bool) -> None:
    """Returns once somebody listens there, or `here`, in process 0 itself, once the name is known: JAX
    would give up with a dump of its own.

    Raises Unreachable after SECONDS_TO_JOIN, with what was the matter.
    """
    what = f"process 0 of this run does not answer at {host}:{port}"
    if here:
        what = f"this is process 0 of the run, and its host does not know the coordinator's name {host}"
    deadline, said = time.monotonic() + SECONDS_TO_JOIN, False
    while (reason := _not_there(host, port, here)) and time.monotonic() <= deadline:
        if not said:
            print(f"waiting up to {SECONDS_TO_JOIN} s: {what} ({reason})", file=sys.stderr, flush=True)
            said = True
        time.sleep(min(1.0, SECONDS_TO_JOIN / 10))
    if reason:
        raise Unreachable(
            f"{what} within {SECONDS_TO_JOIN} s ({reason}). Look whether it runs there and whether "
            f"this host reaches it, correct the coordinator's address (JAX_COORDINATOR_ADDRESS="
            f"host:port), and start all processes again.")


def _not_there(host: str, port: int, here: bool) -> str:
    """Why nobody answers, or the name is not known; "" where all is well."""
    try:
        if here:
            socket.getaddrinfo(host, port)
        else:
            socket.create_connection((host, port), timeout=5).close()
    except OSError as error:   # gaierror: the name does not resolve
        return f"{getattr(error, 'strerror', None) or error}"
    return ""


def find(environ: Mapping[str, str], has_tpu: bool) -> Processes | None:
    """The processes that the environment describes; None for a single one.

    Args:
        environ: os.environ.
        has_tpu: whether this host has TPU chips that JAX is to use.
    Raises:
        UserError: an environment that describes only half of it.
    """
    finders = (_from_slurm, _from_kubernetes, _from_variables)
    if has_tpu and not environ.get("JAX_COORDINATOR_ADDRESS"):
        return _from_tpu(environ)
    return next((p for find in finders if (p := find(environ)) is not None), None)


def _from_tpu(environ: Mapping[str, str]) -> Processes | None:
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    if workers is None and environ.get("TPU_SKIP_MDS_QUERY"):
        return None   # no worker list and no metadata to ask (Colab)
    if workers is not None and "," not in workers and slices == 1:
        return None
    return Processes("TPU")


def _from_slurm(environ: Mapping[str, str]) -> Processes | None:
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    # The step's variables exist under srun only: salloc and sbatch run one process.
    if tasks == 1 or not {"SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environ.keys():
        return None
    nodes = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = None
    if tasks > nodes and len(visible) > 1:   # several tasks see the same GPUs: one each
        devices = (int(environ["SLURM_LOCALID"]),)
    # A port that follows from the job, so that two jobs on one host do not meet.
    port = 61440 + int(environ.get("SLURM_JOB_ID", "0")) % 4096
    host = environ.get("JAX_COORDINATOR_ADDRESS") or \
        f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}"
    return Processes("Slurm", host, tasks, int(environ["SLURM_PROCID"]), devices)


def first_host(nodes: str) -> str:
    """The first of Slurm's node list: "gpu[007-015,020],cpu1" -> "gpu007"."""
    name, bracket, rest = nodes.partition("[")
    if "," in name or not bracket:
        return name.split(",")[0]
    number = rest.split("]")[0].split(",")[0].split("-")[0]
    return name + number + rest.partition("]")[2].split(",")[0]


def _from_kubernetes(environ: Mapping[str, str]) -> Processes | None:
    index = environ.get("JOB_COMPLETION_INDEX")
    if index is None or "KUBERNETES_SERVICE_HOST" not in environ:
        return None
    if "JAX_NUM_PROCESSES" not in environ and "JAX_COORDINATOR_ADDRESS" not in environ:
        return Processes("Kubernetes")   # JAX reads the Job through the cluster's API
    return _from_variables({**environ, "JAX_PROCESS_ID": environ.get("JAX_PROCESS_ID", index)},
                           "Kubernetes")


def _from_variables(environ: Mapping[str, str], source: str = "the environment"
                    ) -> Processes | None:
    given = [name for name in _GENERIC if environ.get(name)]
    if not given:
        return None
    if len(given) < len(_GENERIC):
        missing = ", ".join(name for name in _GENERIC if name not in given)
        raise UserError(f"{' and '.join(given)} without {missing}: several processes need all of "
                        f"{', '.join(_GENERIC)}; unset them for one process.")
    address, number, index = (environ[name] for name in _GENERIC)
    if not (number.isdigit() and index.isdigit() and int(index) < int(number)):
        raise UserError(f"JAX_NUM_PROCESSES={number} and JAX_PROCESS_ID={index}: must be numbers, "
                        f"the second from 0 to one less than the first.")
    return Processes(source, address, int(number), int(index)) if int(number) > 1 else None


def has_tpu(environ: Mapping[str, str], devices: str = "/sys/bus/pci/devices") -> bool:
    """Whether the host has TPU chips and JAX_PLATFORMS does not rule them out."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    for vendor in pathlib.Path(devices).glob("*/vendor"):
        kind = (vendor.parent / "class").read_text().strip()
        # Google's network cards (class 02) and disks (class 01) are no TPUs.
        if vendor.read_text().strip() == "0x1ae0" and not kind.startswith(("0x01", "0x02")):
            return True
    return False


def has_tpu_library() -> bool:
    """Whether libtpu is installed, which `plan` needs on machines without a TPU."""
    return importlib.util.find_spec("libtpu") is not None


# --- processes that disagree ----------------------------------------------------------------

def check_agree(facts: Mapping[str, Any]) -> None:
    """Raises UserError, in every process, where processes were started with other facts.

    Two learning rates would train two models whose gradients are averaged, two intervals of saving
    would wait for each other for ever.

    Args:
        facts: {name: JSON value, or what gives one and is asked only of several processes};
            added are the versions of this program and of JAX, and the settings of JAX and XLA
            that decide what is computed.
    """
    if jax.process_count() == 1:
        return
    facts = {name: fact() if callable(fact) else fact for name, fact in facts.items()}
    facts = {**facts, "version of t5x_lite": _code_digest(), "version of jax": jax.__version__,
             **_settings()}
    text = json.dumps(facts, sort_keys=True).encode()
    digests = multihost_utils.process_allgather(np.uint32(zlib.crc32(text))).ravel()
    if len(set(digests.tolist())) == 1:
        return
    lines = disagreements([json.loads(other) for other in _gather_texts(text)])
    raise UserError("the processes of this run were started differently:\n  "
                    + "\n  ".join(lines) + "\nStart all of them with the same command.")


# Settings of JAX that change numbers, or what is compiled.
_DECIDING = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl",
             "jax_threefry_partitionable", "jax_random_seed_offset", "jax_numpy_dtype_promotion",
             "jax_disable_jit", "jax_debug_nans", "jax_debug_infs", "jax_softmax_custom_jvp",
             "jax_allow_f16_reductions", "jax_use_shardy_partitioner", "jax_optimization_level",
             "jax_cpu_collectives_implementation", "jax_disable_most_optimizations")
# Flags of XLA that a process may have for itself.
_OWN = ("--xla_dump", "--xla_force_host_platform_device_count")


def _settings() -> dict[str, Any]:
    """{name: value} of JAX's settings and XLA's flags that must be equal in all processes."""
    settings = {name: str(jax.config.values.get(name)) for name in _DECIDING}
    flags = sorted(f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(_OWN))
    return {**settings, "XLA_FLAGS": " ".join(flags)}


def disagreements(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each field in which a process differs from process 0, a dozen at most."""
    lines = []
    for process, other in enumerate(facts[1:], 1):
        for field, ours, theirs in differences(facts[0], other):
            name = field.removeprefix("config.")
            lines.append(f"{name}: {ours!r} in process 0, {theirs!r} in process {process}")
    more = [f"… and {len(lines) - 12} more"] if len(lines) > 12 else []
    return lines[:12] + more


def _gather_texts(text: bytes) -> list[bytes]:
    """The texts of all processes, by process."""
    lengths = multihost_utils.process_allgather(np.int32(len(text))).ravel()
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[:len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def _code_digest() -> str:
    """A checksum of this program's source files."""
    digest = 0
    root = pathlib.Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest = zlib.crc32(file.read_bytes(), zlib.crc32(str(file.relative_to(root)).encode(),
                                                          digest))
    return f"{digest:08x}"


# --- a peer that dies -----------------------------------------------------------------------

# JAX's coordination service ends a process from C++ (abort) when another one is gone. The watcher is
# a process of its own, which outlives that and has the last word.
# It is told what that is, a line for each change; an empty line is silence.
_WATCHER = """
import os
told = b""
while block := os.read(0, 65536):
    told += block
words = told.split(b"\\n")[-2]
if words:
    os.write(2, words + b"\\n")
"""
_pipe: int | None = None   # to the watcher, while there is one


@contextlib.contextmanager
def last_words() -> Iterator[None]:
    """Prints a line on standard error that says what to do if this process is killed, from C++ or
    from outside, within the block."""
    global _pipe
    reading, _pipe = os.pipe()
    # A session of its own: the terminal's Ctrl-C is not meant for it.
    watcher = subprocess.Popen([sys.executable, "-S", "-c", _WATCHER], stdin=reading,
                               stdout=subprocess.DEVNULL, start_new_session=True)
    os.close(reading)
    change_last_words(_KILLED)
    try:
        yield
    finally:
        said_last_words()
        watcher.wait()


def change_last_words(line: str) -> None:
    """What is to be said from here on, with its line end, where `last_words` is at work."""
    if _pipe is not None:
        os.write(_pipe, line.encode())


def said_last_words() -> None:
    """Keeps the watcher of `last_words` silent: this process says itself why it ends."""
    global _pipe
    change_last_words("\n")
    if _pipe is not None:
        os.close(_pipe)
        _pipe = None


def is_peers_fault(error: BaseException) -> bool:
    """Whether an error of JAX says that another process is gone or cannot be reached."""
    text = str(error).lower()
    signs = ("gloo", "connection closed by peer", "connection reset", "coordination service",
             "deadline_exceeded", "unavailable", "heartbeat", "barrier timed out", "nccl")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in text for sign in signs)
