"""Measured power: RAPL counters from a made-up sysfs, GPUs from a made-up nvidia-smi."""

import os

import pytest

from t5x_lite.cost import power


@pytest.fixture(autouse=True)
def no_real_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _domain(root, folder, name, microjoules, wrap=10_000_000):
    path = root / folder
    path.mkdir(exist_ok=True)
    (path / "name").write_text(name + "\n")
    (path / "max_energy_range_uj").write_text(f"{wrap}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")


def test_rapl_adds_packages_and_dram_and_survives_a_wrap(tmp_path):
    """2 s: package 0 uses 3 J, package 1 wraps at 10 J from 9 to 1 (2 J), DRAM 1 J: 3 W."""
    domains = {"intel-rapl:0": ("package-0", 5, 8), "intel-rapl:0:0": ("core", 5, 7),
               "intel-rapl:0:1": ("dram", 1, 2), "intel-rapl:1": ("package-1", 9, 1),
               "intel-rapl:2": ("psys", 0, 9)}
    for folder, (name, before, _) in domains.items():
        _domain(tmp_path, folder, name, before * 1_000_000)
    now = iter([100.0, 102.0])
    meter = power.PowerMeter(tmp_path, clock=lambda: next(now))
    for folder, (name, _, after) in domains.items():
        _domain(tmp_path, folder, name, after * 1_000_000)
    assert meter.read() == power.PowerReading(3.0, "rapl")


def test_a_machine_without_sensors_reports_nothing(tmp_path):
    assert power.PowerMeter(tmp_path).read() is None


def test_nvidia_smi_adds_the_visible_gpus(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\necho "$@" > ' + str(tmp_path / "asked")
                       + "\necho 300.5\necho 199.5\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    monkeypatch.setattr(power.importlib.util, "find_spec", lambda name: None)
    assert power.PowerMeter(tmp_path / "none").read() == power.PowerReading(500.0, "nvidia-smi")
    assert "--id=0,2" in (tmp_path / "asked").read_text()


def test_a_gpu_that_does_not_report_power_is_not_zero_watts(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho '[N/A]'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(power.importlib.util, "find_spec", lambda name: None)
    assert power.PowerMeter(tmp_path / "none").read() is None
