"""Power measured on this machine: NVIDIA GPUs by NVML or nvidia-smi, processors by RAPL.

A TPU VM reports no power; a container often hides RAPL. Then there is no reading, and the
caller falls back to the hardware table and says so ("table: …" instead of "measured: …").
"""

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable

_RAPL = pathlib.Path("/sys/class/powercap")


@dataclasses.dataclass(frozen=True)
class PowerReading:
    """Watts of all the devices of this machine that report their power, and which those are."""

    watts: float
    source: str  # such as "nvml", "nvidia-smi", "rapl", "nvml + rapl"


class PowerMeter:
    """Mean watts between two reads; keep one for the length of a run.

    GPUs report their power now (drivers average it over up to a second); RAPL counts energy,
    so that its share is exact between reads and the first read, with nothing before it, has
    none.
    """

    def __init__(self, rapl_root: pathlib.Path = _RAPL,
                 clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._domains = _rapl_domains(rapl_root)
        self._gpu = _gpu_reader()
        self._last = self._rapl_joules()

    def read(self) -> PowerReading | None:
        """Watts since the previous read, or None where the machine reports none."""
        watts, sources = 0.0, []
        if self._gpu is not None:
            name, reader = self._gpu
            gpu_watts = reader()
            if gpu_watts is not None:
                watts, sources = watts + gpu_watts, [*sources, name]
        if self._last is not None:
            then, joules_then = self._last
            self._last = self._rapl_joules()
            if self._last is not None and self._last[0] > then:
                now, joules_now = self._last
                used = sum(
                    # the counters wrap around at their range
                    (after - before) % wrap
                    for before, after, (_, wrap) in zip(
                        joules_then, joules_now, self._domains, strict=True))
                watts, sources = watts + used / (now - then), [*sources, "rapl"]
        return PowerReading(watts, " + ".join(sources)) if sources else None

    def _rapl_joules(self) -> tuple[float, list[float]] | None:
        if not self._domains:
            return None
        now = self._clock()
        return now, [int(path.read_text()) / 1e6 for path, _ in self._domains]


def _rapl_domains(root: pathlib.Path) -> list[tuple[pathlib.Path, float]]:
    """(energy counter, joules at which it wraps) of every package and its DRAM that is readable.

    Other subdomains (core, uncore) are part of their package; psys repeats all of them.
    """
    domains = []
    for folder in sorted(root.glob("intel-rapl:*")):
        counter = folder / "energy_uj"
        try:
            name = (folder / "name").read_text().strip()
            wrap = int((folder / "max_energy_range_uj").read_text()) / 1e6
            counter.read_text()
        except OSError:  # since 2020 kernels let only root read the counters
            continue
        if name.startswith("package") or name == "dram":
            domains.append((counter, wrap))
    return domains


def _visible_gpus() -> list[str] | None:
    """The GPUs this process may use by index or UUID; None: all of the machine's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    return [gpu for gpu in visible.split(",") if gpu.strip() and gpu.strip() != "-1"]


def _gpu_reader() -> tuple[str, Callable[[], float | None]] | None:
    if _visible_gpus() == []:
        return None
    if importlib.util.find_spec("pynvml") is not None:
        reader = _nvml_reader()
        if reader is not None:
            return "nvml", reader
    command = shutil.which("nvidia-smi")
    return None if command is None else ("nvidia-smi", lambda: _smi_watts(command))


def _nvml_reader() -> Callable[[], float | None] | None:
    import pynvml
    try:
        pynvml.nvmlInit()
        names = _visible_gpus()
        if names is None:
            names = [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
    except pynvml.NVMLError:  # no driver, or no such GPU: nothing to read
        return None

    def watts() -> float | None:
        try:
            return sum(pynvml.nvmlDeviceGetPowerUsage(handle) for handle in handles) / 1e3
        except pynvml.NVMLError:  # boards without a power sensor say "not supported"
            return None
    return watts


def _smi_watts(command: str) -> float | None:
    gpus = _visible_gpus()
    query = [command, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    if gpus is not None:
        query.append("--id=" + ",".join(gpus))
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return sum(float(line) for line in lines.split())
    except (OSError, subprocess.SubprocessError, ValueError):  # no driver, or "[N/A]"
        return None
