"""GPUs that are only described, for which XLA:GPU compiles on a machine that has none.

JAX's CUDA plugin (the extra plan_gpu, 573 MB) takes a description of a GPU in the place of a
driver. A description says what the compiler asks: how many cores there are, what a block of
threads may hold, how fast memory is. It also says which instructions exist (the compute
capability). What such a compilation does not know, and a plan says so:

* No autotuning: it takes time on the GPU itself. Matrix products that Triton and cuBLAS could both
  make all go to Triton, with the tiles that XLA guesses.
* No memory of the host: offloaded values stay on the device. rehearse.py counts what the
  optimizer keeps there and takes it off.
* cuDNN's own workspace: its attention is a call whose kernel is chosen on the GPU.
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from t5x_lite import quiet
from t5x_lite.cost import hardware
from t5x_lite.errors import UserError, refuse
from t5x_lite.layers import attention_implementations

PLUGIN = "jax_plugins.xla_cuda12"
MEMORY_FRACTION = 0.75   # of a GPU's memory, that JAX takes unless it is told otherwise
CUDNN = (9, 10)          # the version whose attention is compiled
CUDNN_FROM = (8, 0)      # compute capability that its attention needs
# Whose kernels matrix products become, by what the text of a program shows of each.
_MAKERS = {"Triton's": r'"kind":"__triton', "cuBLAS's": r'custom_call_target="__cublas'}
_FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True)
class Target:
    """What XLA:GPU asks of a GPU beside the figures of cost/hardware.py.

    Limits that all of NVIDIA's GPUs since Volta share are in _COMMON.
    """

    capability: tuple[int, int]
    cores: int                  # streaming multiprocessors that are enabled
    fp32_units: int             # of a core
    shared_bytes_per_core: int
    l2_bytes: int
    clock_ghz: float            # boost
    nvlinks: int

    @property
    def accelerated(self) -> bool:
        """Whether instructions of this one architecture may be used (sm_90a, sm_100a)."""
        return self.capability >= (9, 0)


# NVIDIA, CUDA C++ Programming Guide 12.9, "Technical specifications per compute capability".
_COMMON = """\
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64
  driver_version: "12.8.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
"""
# Since Ampere a core keeps 1 KiB of each block's shared memory (the same table).
_RESERVED_SHARED_BYTES = 1024
_KIB, _MIB = 2**10, 2**20

# By name in cost/hardware.py. Shared memory of a core: the table above (96, 164, 228 KiB).
_A100 = Target(   # NVIDIA A100 Tensor Core GPU Architecture (2020), table 4
    (8, 0), cores=108, fp32_units=64, shared_bytes_per_core=164 * _KIB, l2_bytes=40 * _MIB,
    clock_ghz=1.41, nvlinks=12)
_HOPPER = Target(   # NVIDIA H100 Tensor Core GPU Architecture (2022), table 3: SXM5
    (9, 0), cores=132, fp32_units=128, shared_bytes_per_core=228 * _KIB, l2_bytes=50 * _MIB,
    clock_ghz=1.98, nvlinks=18)
TARGETS: dict[str, Target] = {
    "v100": Target(   # NVIDIA Tesla V100 GPU Architecture (2017), table 1
        (7, 0), cores=80, fp32_units=64, shared_bytes_per_core=96 * _KIB, l2_bytes=6 * _MIB,
        clock_ghz=1.53, nvlinks=6),
    "a100-40g": _A100,
    "a100-80g": _A100,
    "h100": _HOPPER,
    "h200": _HOPPER,   # NVIDIA H200 data sheet (2024): the chip of H100 with other memory
    # NVIDIA Blackwell Tuning Guide 12.9 (228 KiB a core, L2 of 126 MB); the count of cores and
    # the clock as XLA's maintainers read them from one (openxla, target_config/specs, 2026).
    "b200": Target(
        (10, 0), cores=148, fp32_units=128, shared_bytes_per_core=228 * _KIB,
        l2_bytes=126 * _MIB, clock_ghz=1.965, nvlinks=18),
}


def lacks() -> str:
    """Why this process cannot compile for GPUs that are described, "" where it can."""
    if _spec(PLUGIN) is None:
        return "JAX's CUDA plugin is not installed"
    if not (shutil.which("ptxas") or _wheels_ptxas() or pathlib.Path(
            "/usr/local/cuda/bin/ptxas").exists()):
        return "there is no ptxas"
    return ""


def _spec(module: str):
    parent = module.partition(".")[0]
    return importlib.util.find_spec(parent) and importlib.util.find_spec(module)


def _wheels_ptxas() -> bool:
    """Whether NVIDIA's wheel of compilers (nvidia-cuda-nvcc-cu12) is here."""
    spec = _spec("nvidia.cuda_nvcc")
    folders = (spec and spec.submodule_search_locations) or ()
    return any((pathlib.Path(folder) / "bin" / "ptxas").exists() for folder in folders)


def memory_fraction() -> float:
    """The share of a GPU's memory that JAX's allocator takes at most, as the environment says.

    Raises:
        UserError: the variable is no number above 0.
    """
    for name in _FRACTION_VARIABLES:
        value = os.environ.get(name)
        if not value:
            continue
        try:
            fraction = float(value)
        except ValueError:
            fraction = 0.0
        if fraction <= 0:
            raise refuse(name, value, "a number above 0, such as 0.9")
        return fraction
    return MEMORY_FRACTION


def description(name: str) -> str:
    """The GPU of this name as XLA reads it: a GpuTargetConfigProto as text."""
    chip, target = hardware.lookup(name), TARGETS[name]
    major, minor = target.capability
    per_block = target.shared_bytes_per_core
    if target.capability >= (8, 0):
        per_block -= _RESERVED_SHARED_BYTES
    kind, cudnn = chip.device_kinds[0], ".".join(map(str, (*CUDNN, 0)))
    extension = "ACCELERATED_FEATURES" if target.accelerated else "NONE"
    return (
        f"gpu_device_info {{\n{_COMMON}"
        f"  cuda_compute_capability {{ major: {major} minor: {minor} "
        f"feature_extension: {extension} }}\n"
        f"  core_count: {target.cores} fpus_per_core: {target.fp32_units}\n"
        f"  shared_memory_per_core: {target.shared_bytes_per_core}\n"
        f"  shared_memory_per_block_optin: {per_block}\n"
        f"  l2_cache_size: {target.l2_bytes} clock_rate_ghz: {target.clock_ghz}\n"
        f"  memory_bandwidth: {round(chip.hbm_bytes_per_second)}\n"
        f"  device_memory_size: {chip.usable_hbm_bytes[1]}\n"
        f"  device_interconnect_info {{ active_links: {target.nvlinks} }}\n"
        f'  dnn_version: "{cudnn}" name: "{kind}"\n'
        f'}}\nplatform_name: "CUDA"\n'
        f"dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}\n"
        f"runtime_version {{ major: 12 minor: 8 }}\n"
        f'device_description_str: "{kind}"\n')


def described_devices(name: str, count: int) -> tuple:
    """`count` devices that can be compiled for, on machines of as many as the table says."""
    per_host = min(count, hardware.lookup(name).chips_per_host)
    hosts = -(-count // per_host)
    quiet.expect_no_cuda()
    with quiet.stderr():
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=name, target_config=description(name),
            topology=f"1x{hosts}x{per_host}")
    return tuple(topology.devices[:count])


def capability(device_kind: str) -> tuple[int, int] | None:
    """The compute capability of a GPU of cost/hardware.py, None for another."""
    try:
        return TARGETS[hardware.lookup(device_kind).name].capability
    except (UserError, KeyError):
        return None


def remarks(text: str) -> str:
    """What a compiled program's text says of choices that are made without the GPU, a line."""
    counts = {maker: len(re.findall(pattern, text)) for maker, pattern in _MAKERS.items()}
    made = " and ".join(f"{count} of {maker}" for maker, count in counts.items() if count)
    lines = [f"not autotuned, which takes the GPU: matrix products are {made}"] if made else []
    if calls := len(re.findall(r'custom_call_target="__cudnn\$fmha', text)):
        lines.append(f"the workspace of cuDNN's attention ({calls} calls) is not counted: the GPU "
                     f"chooses the kernel")
    return "; ".join(lines)


@contextlib.contextmanager
def compiling_for(device: jax.Device) -> Iterator[None]:
    """The context in which a step is traced and compiled for GPUs that are described.

    JAX asks the GPU of this process which attention cuDNN has; here the described one answers.
    The plugin's lines on standard error, which say that there is no GPU, are dropped.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    has = capability(device.device_kind)
    assert has is not None, device.device_kind

    def parsed(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("."))

    # JAX remembers traces, so that its own answer to "may I?" would be that for an earlier GPU.
    lacks_kernel = "" if has >= CUDNN_FROM else f"it needs compute capability {CUDNN_FROM[0]}.0"
    answers = {
        (cudnn, "check_cudnn_version"): lambda: CUDNN[0] * 10_000 + CUDNN[1] * 100,
        (cudnn, "check_compute_capability"): lambda least: has >= parsed(least),
        (cudnn, "is_cuda_compute_capability_equal"): lambda other: has == parsed(other),
        (attention_implementations, "cudnn_lacks"): lambda: lacks_kernel}
    with contextlib.ExitStack() as stack:
        for (module, name), answer in answers.items():
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, answer)
        stack.enter_context(quiet.stderr())
        yield
