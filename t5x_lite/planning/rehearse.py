"""Machines that are only described, and the compilation of a run's own step for them.

A topology is written NAME:SHAPE: "v5e:2x4" and the other TPUs are compiled for by libtpu on
any machine, "cpu:8" by this one's own compiler with 8 simulated devices, and GPUs ("h100:8") by
XLA:GPU where JAX's CUDA plugin is installed (gpus.py). Without it, what needs no compiler is all
that a plan for GPUs says.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from t5x_lite.build import Program
from t5x_lite.cost import hardware, hlo, roofline
from t5x_lite.cost.hardware import Chip
from t5x_lite.errors import UserError, nearest
from t5x_lite.layers.linear import RowKey
from t5x_lite.parallel import sharding
from t5x_lite.planning import gpus, traffic
from t5x_lite.training import objectives, state

# What libtpu reads when it is loaded: no questions to a metadata server, no lock against a
# second process, no complaints that this machine is not a TPU's host.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
               "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}

_FLAT = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


def _cubes(most_chips: int) -> tuple[str, ...]:
    """Slices of whole 4x4x4 cubes."""
    sides = range(4, 25, 4)
    shapes = [(a, b, c) for a in sides for b in sides for c in sides
              if a <= b <= c and b <= 16 and a * b * c <= most_chips]
    return tuple("x".join(map(str, s)) for s in sorted(shapes, key=lambda s: (math.prod(s), s)))


# The shapes in which slices are offered (docs.cloud.google.com/tpu/docs, one page a version).
TPU_SHAPES: dict[str, tuple[str, ...]] = {
    "v2": _FLAT,
    "v3": (*_FLAT, "16x32", "32x32"),
    "v4": (*_SMALL, *_cubes(4096)),
    "v5e": ("1x1", "2x2", "2x4", *_FLAT[1:]),
    "v5p": (*_SMALL, *_cubes(6144)),
    "v6e": ("1x1", "2x2", "2x4", *_FLAT[1:]),
    "tpu7x": (*_SMALL, *_cubes(9216)),
}
_CHIP_NAMES = {"tpu7x": "v7x"}   # where cost.hardware has another name
GPUS = tuple(chip.name for chip in hardware.CHIPS.values()
             if chip.interconnect is not None and chip.interconnect.kind == "nvlink")

GPU_COMPILER = "XLA:GPU"


@dataclasses.dataclass(frozen=True)
class _Elsewhere:
    """What JAX asks of a described device's client: whether this process has the device."""

    def process_index(self) -> int:
        return -1


@dataclasses.dataclass(frozen=True)
class DescribedDevice:
    """What a mesh asks of a device that nobody here has."""

    id: int
    device_kind: str
    process_index: int
    platform: str = "gpu"
    client: _Elsewhere = _Elsewhere()   # asked for memories other than the default, too


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str
    chip: Chip
    devices: tuple
    num_slices: int
    compiler: str             # "libtpu", "cpu", "XLA:GPU", or "" where there is none

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return hardware.count_chips(self.devices)

    @property
    def hbm_bytes(self) -> int | None:
        """What a program may use of one device's memory: of a GPU the share that JAX's allocator
        takes (gpus.memory_fraction), of a CPU its share of this machine's."""
        if self.chip.name == "cpu":
            ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return ram // len(self.devices)
        per_chip = len(self.devices) // self.num_chips
        usable = self.chip.usable_hbm_bytes.get(per_chip, self.chip.hbm_bytes)
        return int(usable * gpus.memory_fraction()) if self.is_gpu else usable

    @property
    def is_gpu(self) -> bool:
        """Whether the devices are GPUs."""
        return self.chip.name in GPUS

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """The context in which steps for these devices are traced and compiled."""
        if self.compiler != GPU_COMPILER:
            yield
            return
        with gpus.compiling_for(self.devices[0]):
            yield


def known_shapes(kind: str) -> str:
    """The shapes of a TPU, in a line."""
    shapes = TPU_SHAPES[kind]
    shown = [s for s in shapes if s in _SMALL + _FLAT or s.count("x") == 1]
    cubes = [s for s in shapes if s not in shown]
    rest = f", and AxBxC of multiples of 4 from {cubes[0]} to {cubes[-1]}" if cubes else ""
    return f"  {kind}: {' '.join(shown)}{rest}"


def known_topologies() -> str:
    """Every name, in a few lines."""
    return "\n".join([*map(known_shapes, TPU_SHAPES),
                      f"  {' '.join(GPUS)}: any number of GPUs, such as h100:8",
                      "  cpu: any number of simulated devices, such as cpu:8"])


def topology(name: str, num_slices: int = 1, *, count_only: bool = False) -> Topology:
    """The machine of this name, in capitals or not.

    Args:
        count_only: of GPUs, take devices that nothing compiles for even where XLA:GPU is here.
    Raises:
        UserError: no such name, or libtpu is not installed.
    """
    name = name.strip().lower()
    kind, _, shape = name.partition(":")
    kind = {"v7x": "tpu7x"}.get(kind, kind)
    if kind not in (*TPU_SHAPES, *GPUS, "cpu"):
        hint = nearest(kind, (*TPU_SHAPES, *GPUS, "cpu"))
        raise UserError(f"--topology={name}: no such topology.{hint} Known:\n{known_topologies()}")
    if num_slices < 1 or (num_slices > 1 and kind not in TPU_SHAPES):
        raise UserError(f"--num_slices={num_slices} with --topology={name}: at least 1, and more "
                        f"than 1 for TPUs only.")
    if kind in TPU_SHAPES:
        return _tpu(kind, shape, num_slices)
    if not shape.isdecimal() or int(shape) < 1:
        raise UserError(f"--topology={name}: write {kind}:N with the number of devices, such as "
                        f"{kind}:8.")
    if kind == "cpu":
        return Topology(name, hardware.lookup("cpu"), _cpu_devices(int(shape)), 1, "cpu")
    return _gpus(name, hardware.lookup(kind), int(shape), count_only or bool(gpus.lacks()))


def _gpus(name: str, chip: Chip, count: int, count_only: bool) -> Topology:
    if not count_only:
        return Topology(name, chip, gpus.described_devices(chip.name, count), 1, GPU_COMPILER)
    devices = tuple(DescribedDevice(i, chip.device_kinds[0], i // chip.chips_per_host)
                    for i in range(count))
    return Topology(name, chip, devices, 1, "")


def _tpu(kind: str, shape: str, num_slices: int) -> Topology:
    shapes = TPU_SHAPES[kind]
    if not shape:
        raise UserError(f"--topology={kind}: the shape of the slice is missing, such as "
                        f"{kind}:{shapes[2]}. Known:\n{known_shapes(kind)}")
    if shape not in shapes:
        raise UserError(f"--topology={kind}:{shape}: {kind} has no slice of that shape."
                        f"{nearest(shape, shapes)} Known:\n{known_shapes(kind)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('TPU topologies need libtpu, which runs on any Linux machine: '
                        'pip install -c constraints.txt ".[cpu,plan]". --topology=cpu:8 works '
                        'without it.')
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    options: dict = {"num_slices": num_slices} if num_slices > 1 else {}
    if kind == "v4":     # the two cores of a chip as one device, as JAX has it on TPU VMs
        options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    elif shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind}:{shape}", **options)
    return Topology(f"{kind}:{shape}", hardware.lookup(_CHIP_NAMES.get(kind, kind)),
                    tuple(described.devices), num_slices, "libtpu")


def _cpu_devices(number: int) -> tuple:
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):   # JAX is in use: its devices are what they are
            jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise UserError(f"--topology=cpu:{number}: JAX already runs here with {len(devices)} CPU "
                        f"devices; start a process of its own for more.")
    return tuple(devices[:number])


# --- The step on it ---------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step. Bytes are one device's; None where it does not say."""

    seconds: float                        # to lower and compile
    fits: bool                            # False: the compiler ran out of device memory
    temp_bytes: int | None                # at the peak, beside arguments and results
    argument_bytes: int | None = None
    output_bytes: int | None = None
    peak_bytes: int | None = None
    collectives: tuple[hlo.Collective, ...] | None = None
    host_argument_bytes: int | None = None   # in the host's memory: offloaded optimizer state
    host_temp_bytes: int | None = None       # ... and activations
    temp_size_bytes: int | None = None       # memory_analysis().temp_size_in_bytes
    note: str = ""                        # why something is None


def compile_step(program: Program) -> Compiled:
    """Compiles the step that train runs, for the devices of the program's mesh."""
    began, platform = time.perf_counter(), program.mesh.devices.flat[0].platform
    with program.activate():
        # Of a step of several programs the one that needs the most: what the others hold, it holds.
        lowered = program.largest_program().lower(
            program.abstract_state, program.abstract_batch())
        try:
            compiled, peak, temp = compile_lowered(lowered, platform)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            message = str(error).partition("\n")[0]
            return Compiled(time.perf_counter() - began, False, needed_bytes(message),
                            note=f"the compiler: {message}")
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    collectives, note = _collectives(compiled, program)
    # A CPU has one memory, a described GPU knows of one only: their compilers count what is
    # offloaded with the rest.
    offloaded = 0 if platform == "tpu" else traffic.kept(program).host
    return Compiled(seconds, True, temp, memory.argument_size_in_bytes - offloaded,
                    memory.output_size_in_bytes - offloaded, peak - offloaded, collectives,
                    memory.host_argument_size_in_bytes + offloaded,
                    memory.host_temp_size_in_bytes, memory.temp_size_in_bytes, note)


def compile_lowered(lowered: jax.stages.Lowered, platform: str
                    ) -> tuple[jax.stages.Compiled, int, int]:
    """The program, the bytes of device memory that it is given, and those of its temporaries:
    beside arguments and results.

    libtpu's report of memory usage says what it is given. Its temp_size_in_bytes is no measure:
    of a program with donated arguments it may count more than is allocated (896 MiB in a scan
    that has 640) or less. Where there is no report (the CPU backend) it adds up.
    """
    with tempfile.TemporaryDirectory() as folder, _no_cache():
        options = ({"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if platform == "tpu"
                   else None)
        compiled = lowered.compile(compiler_options=options)
        memory = compiled.memory_analysis()
        # Donated arguments are written over, so that results in their place need no room.
        lasting = (memory.argument_size_in_bytes + memory.output_size_in_bytes
                   - memory.alias_size_in_bytes)
        for path in pathlib.Path(folder).glob("*memory-usage-report.txt"):
            reported = re.search(r"Memory Space: default.*\nTotal bytes: (\d+)", path.read_text())
            if reported:
                return compiled, int(reported.group(1)), int(reported.group(1)) - lasting
    return compiled, lasting + memory.temp_size_in_bytes, memory.temp_size_in_bytes


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """JAX's compile cache cannot give back programs for devices that are not there, and would
    hide how long compiling takes."""
    before = jax.config.jax_enable_compilation_cache
    compilation_cache.reset_cache()   # it asks whether it is enabled only once
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def needed_bytes(message: str) -> int | None:
    """The bytes that libtpu says a program would have needed, None where it does not say."""
    match = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT]?)", message)
    return match and round(float(match.group(1)) * 2**(10 * " KMGT".index(match.group(2) or " ")))


def _collectives(compiled, program: Program
                 ) -> tuple[tuple[hlo.Collective, ...] | None, str]:
    mesh = program.mesh
    layout = hlo.MeshLayout(mesh.devices.shape, mesh.axis_names, tuple(
        getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat))
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    try:
        text = compiled.as_text()
        collectives = hlo.find_collectives(text, layout)
        if not is_gpu:
            return tuple(collectives), ""
        return tuple(roofline.by_machine(collectives, _placement(mesh))), gpus.remarks(text)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # libtpu compiles some programs for v5p that it cannot print.
        reason = str(error).partition("\n")[0][:200]
        return None, f"compiled, but its text could not be read, so communication is unknown: " \
                     f"{reason}"


def _placement(mesh: jax.sharding.Mesh) -> roofline.Placement:
    chip = hardware.lookup(mesh.devices.flat[0].device_kind)
    return roofline.place(mesh.devices, mesh.axis_names, chip)


def argument_bytes(program: Program) -> dict[str, int]:
    """One device's bytes of params, opt_state and batch, before the compiler's padding, without
    what is offloaded."""
    abstract, away = program.abstract_state, traffic.kept(program)
    params = [abstract["params"], abstract.get("frozen", {})]
    return {"params": state.num_bytes_per_device(params) - away.host_params,
            "opt_state": state.num_bytes_per_device(abstract["opt_state"]) - away.host_optimizer,
            "batch": state.num_bytes_per_device(program.abstract_batch())}


def frozen_bytes(program: Program) -> int:
    """One device's bytes of parameters that do not train (config.peft), counted in "params"."""
    return state.num_bytes_per_device(program.abstract_state.get("frozen", {}))


def activation_bytes(program: Program) -> int:
    """One device's bytes of what the forward pass of a micro-batch keeps for the backward pass.

    Counted from the traced step, before the compiler drops or recomputes some of it: what
    rematerialisation acts on. Of a pipeline, all micro-batches of the schedule.
    """
    config, sizes = program.config, []

    def forward(params, batch):
        rows = sharding.shard(jnp.arange(batch["decoder_loss_weights"].shape[0]), "act_batch")
        key = RowKey(jax.random.key(0), rows)

        def loss(params):
            module = program.model.bind(params)
            return objectives.loss(
                module, objectives.with_base(lambda: module, batch, config.objective), key,
                config.objective, objectives.totals(config.objective, batch))[0]
        _, pull_back = jax.vjp(loss, params)
        held = {id(x) for x in jax.tree.leaves((params, batch))}
        sizes.extend(sharding.local_bytes(x) for x in _arrays(pull_back)
                     if id(x) not in held)
        return 0.0

    def micro(x):
        rows = x.shape[0] // (config.train.accumulation * config.objective.passes[1])
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding)

    with program.activate():
        jax.eval_shape(forward, program.abstract_params,
                       jax.tree.map(micro, program.abstract_batch()))
    return sum(sizes)


def _arrays(tree) -> Iterator[jax.Array]:
    """Each array of a tree once; keys, which are a few bytes, left out."""
    unique = {id(x): x for x in jax.tree.leaves(tree)
              if isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)}
    yield from unique.values()
