"""A plan: what the step of a config needs and costs on a topology, compiled where it can be.

Three kinds of figures stand apart: the compiler's (memory, collectives), the bound (roofline:
no step is faster), and an assumption (Assumptions.mfu), from which time, energy and price follow.
"""

import dataclasses
from collections.abc import Sequence

from t5x_lite import files
from t5x_lite.build import Program, build
from t5x_lite.config import RunConfig, replace
from t5x_lite.cost import energy, hlo, roofline as roofline_lib
from t5x_lite.cost.flops import drawing_flops, forward_flops
from t5x_lite.cost.roofline import Roofline
from t5x_lite.cost.tables import quantity
from t5x_lite.errors import UserError, at_least, between, positive
from t5x_lite.layers import attention_implementations
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.planning import gpus, rehearse, traffic
from t5x_lite.planning.rehearse import Compiled, Topology
from t5x_lite.planning.traffic import Kept, Traffic
from t5x_lite.rollouts import judges
from t5x_lite.training import batch_ramp, state

DEFAULT_MFU = 0.4       # of a tuned run on TPUs; --mfu


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What no compiler knows. None: the hardware table's figure, where it has one."""

    mfu: float = DEFAULT_MFU
    watts: float | None = None
    pue: float = energy.PUE_GOOGLE_2020
    kg_per_kwh: float = energy.KG_PER_KWH_US_2020
    kg_per_kwh_net: float | None = None
    dollars_per_chip_hour: float | None = None
    host_bandwidth: float | None = None   # GB/s between the host's memory and one chip, each way
    disk_bandwidth: float | None = None   # GB/s of the disk in sharding.offload_folder

    def __post_init__(self):
        for name in ("host_bandwidth", "disk_bandwidth"):
            if getattr(self, name) is not None:
                positive(f"--{name}", getattr(self, name))
        between("--mfu", self.mfu, 0, 1, open_below=True)
        for name in ("watts", "kg_per_kwh", "kg_per_kwh_net", "dollars_per_chip_hour"):
            if getattr(self, name) is not None:
                at_least(f"--{name}", getattr(self, name), 0)
        at_least("--pue", self.pue, 1, "A data centre draws at least what its machines draw.")


@dataclasses.dataclass(frozen=True)
class Judge:
    """A reward model beside the run that asks it.

    Attributes:
        params_bytes: of one device, there while the run lasts.
        flops: of a forward pass over the answers of a step.
        note: why it is not counted, or empty.
    """

    params_bytes: int = 0
    flops: float = 0.0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A rehearsal. Bytes are one device's; None is unknown."""

    config: RunConfig
    topology: Topology
    program: Program
    compiled: Compiled | None        # None: there is no compiler, or the state alone is too large
    arguments: dict[str, int]        # params, opt_state, batch
    kept: Kept                       # of parameters and optimizer state beyond the device
    judge: Judge                     # the reward model of ppo and grpo
    activation_bytes: int
    model_flops: float               # a step's
    roofline: Roofline
    cost: energy.RunCost | None
    assumptions: Assumptions
    notes: tuple[str, ...]

    @property
    def drawing_flops(self) -> float:
        """FLOPs of drawing, measuring and judging a step's answers, beside model_flops; 0 for other objectives."""
        rows = self.config.train.global_batch_size
        return drawing_flops(self.config, self.program.lengths, rows).total + self.judge.flops

    @property
    def host_bytes(self) -> int:
        """Parameters and optimizer state in the host's memory."""
        return self.kept.host

    @property
    def argument_bytes(self) -> int:
        """The compiler's figure, which pads to tiles, else the sum of the shapes."""
        known = self.compiled and self.compiled.argument_bytes
        return known or sum(self.arguments.values())

    @property
    def temp_bytes(self) -> int | None:
        """Temporaries at the peak, activations among them."""
        return self.compiled and self.compiled.temp_bytes

    @property
    def peak_bytes(self) -> int | None:
        """Arguments, results that do not replace them, and temporaries, beside a reward model's parameters."""
        if self.compiled is None or self.temp_bytes is None and self.compiled.peak_bytes is None:
            return None
        if self.compiled.peak_bytes is None:
            return self.argument_bytes + self.temp_bytes + self.judge.params_bytes
        return self.compiled.peak_bytes + self.judge.params_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the step runs in the device's memory; None where only a compiler could tell."""
        hbm = self.topology.hbm_bytes
        if hbm is not None and sum(self.arguments.values()) + self.judge.params_bytes > hbm:
            return False
        if self.compiled is None:
            return None
        peak = self.peak_bytes
        return self.compiled.fits and (hbm is None or peak is None or peak <= hbm)

    @property
    def collectives(self) -> list[hlo.CollectiveTotal] | None:
        """The communication of a step by kind and axes, the most expensive first."""
        known = self.compiled and self.compiled.collectives
        return None if known is None else hlo.totals(known)


def on_slices(config: RunConfig, topology: Topology) -> RunConfig:
    """The config with mesh.slice as the topology has it, where it was left at 1."""
    if config.mesh.slice in (1, topology.num_slices):
        return replace(config, "mesh.slice", topology.num_slices)
    if topology.chip.name == "cpu" or config.mesh.slice == -1:
        return config
    raise UserError(f"mesh.slice={config.mesh.slice} but --num_slices={topology.num_slices}; give "
                    f"both the same number.")


def with_mesh(config: RunConfig, topology: Topology) -> tuple[RunConfig, str]:
    """The config with all devices on mesh.fsdp where it states no mesh, and a note that says so.

    A run without a mesh has every device on mesh.data, each with a whole model: right for one
    device, and seldom for the machines that a plan is made for. Where the devices do not divide
    the model, mesh.fsdp takes as many as do and mesh.data the rest.
    """
    stated = dataclasses.replace(config.mesh, slice=1) != MeshConfig()
    per_slice = len(topology.devices) // topology.num_slices
    if stated or per_slice == 1 or topology.compiler == "cpu":
        return config, ""
    for data in (n for n in range(1, per_slice) if per_slice % n == 0):
        fsdp = per_slice // data
        mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp)
        chosen = replace(config, "mesh", mesh)
        try:
            build(chosen, topology.devices)
        except UserError:
            continue
        flags = f"--config.mesh.data={data} --config.mesh.fsdp={fsdp}"
        return chosen, f"the config states no mesh, for which train takes data={per_slice}: " \
                       f"planned with {flags}"
    return config, ""


def make_plan(config: RunConfig, topology: Topology,
              assumptions: Assumptions = Assumptions()) -> Plan:
    """Builds and compiles the run's step on the topology.

    Raises:
        UserError: whatever build refuses, before anything is compiled.
    """
    with topology.compiling():
        config, mesh_note = with_mesh(on_slices(config, topology), topology)
        program = build(config, topology.devices)
        arguments = rehearse.argument_bytes(program)
        activations = rehearse.activation_bytes(program)
        judging = _judge(program)
        compiled, memory_note = _compile(program, topology, arguments)
    notes = [note for note in (mesh_note, memory_note, compiled and compiled.note, judging.note) if note]
    model_flops = config.train.global_batch_size * config.objective.learned_per_row * program.flops_per_sequence
    bound = _bound(program, topology, compiled, arguments, model_flops, assumptions)
    cost = _run_cost(program, judging, topology, assumptions)
    plan = Plan(config, topology, program, compiled, arguments,
                traffic.kept(program), judging, activations, model_flops, bound, cost,
                assumptions, ())
    return dataclasses.replace(plan, notes=(*notes, *_remarks(plan)))


def _judge(program: Program) -> Judge:
    """The run's reward model; nothing where a Python function judges, or the objective draws no answers.

    Raises:
        UserError: objective.rollout.reward is a folder without a reward model that fits the run.
    """
    objective = program.config.objective
    if not objective.draws or objective.rollout.judged_by_function:
        return Judge()
    workdir = objective.rollout.reward
    if not files.path(workdir).is_dir():
        return Judge(note=f"objective.rollout.reward={workdir!r} is not here: the reward model's parameters and its "
                          "pass over the answers are not counted")
    model = judges.judge(program, workdir)
    rows = program.config.train.global_batch_size * objective.per_row
    return Judge(state.num_bytes_per_device(model.abstract_state["params"]),
                 forward_flops(model.config.model, rows, *program.lengths).total)


def _compile(program: Program, topology: Topology, arguments: dict[str, int]
             ) -> tuple[Compiled | None, str]:
    """The compiled step, or None and why there is none."""
    if not topology.compiler:
        lacks = gpus.lacks()
        advice = f" ({lacks}: pip install -c constraints.txt \".[cpu,plan_gpu]\")" if lacks else ""
        return None, f"not compiled{advice}: temporaries and communication are unknown, and the " \
                     "bound leaves them out"
    if topology.hbm_bytes is not None and sum(arguments.values()) > topology.hbm_bytes:
        return None, "not compiled: parameters, optimizer state and batch alone are too large"
    return rehearse.compile_step(program), ""


def _bound(program: Program, topology: Topology, compiled: Compiled | None,
           arguments: dict[str, int], model_flops: float, given: Assumptions) -> Roofline:
    mesh = program.mesh
    known = compiled is not None and compiled.argument_bytes is not None
    written = (compiled.output_bytes if known else arguments["params"] + arguments["opt_state"]) \
        - rehearse.frozen_bytes(program)   # passed through, not written
    rows = program.config.train.global_batch_size * program.config.objective.learned_per_row
    least = sum(part / (1 - program.bubbles.get(name, 0.0))
                for name, part in program.step_flops(rows, least=True).items())
    return roofline_lib.roofline(
        topology.chip, num_chips=topology.num_chips, model_flops=model_flops,
        dtype=program.policy.matmul_dtype, least_flops=least,
        argument_bytes=compiled.argument_bytes if known else sum(arguments.values()),
        output_bytes=written,
        temp_bytes=compiled.temp_bytes if known else 0,
        collectives=(compiled and compiled.collectives) or (),
        placement=roofline_lib.place(mesh.devices, mesh.axis_names, topology.chip),
        beyond=_beyond(traffic.traffic(program), topology, given))


def _beyond(moved: Traffic, topology: Topology, given: Assumptions) -> roofline_lib.Beyond:
    """Seconds that the host's link and the disk take."""
    link = topology.chip.host_bytes_per_second if given.host_bandwidth is None \
        else given.host_bandwidth * 1e9
    per_chip = len(topology.devices) // topology.num_chips
    return roofline_lib.Beyond(
        max(moved.to_device, moved.to_host) * per_chip, link,   # at once, in both directions
        moved.disk_read + moved.disk_written,
        None if given.disk_bandwidth is None else given.disk_bandwidth * 1e9)


def _run_cost(program: Program, judging: Judge, topology: Topology, given: Assumptions
              ) -> energy.RunCost | None:
    chip = topology.chip
    peak = chip.matmul_flops_per_second(program.policy.matmul_dtype)
    if peak is None:
        return None
    train = program.config.train
    rows = batch_ramp.sequences_before(train.batch_ramp, train.global_batch_size, train.num_steps)
    price = given.dollars_per_chip_hour
    return energy.estimate(
        total_flops=rows * program.config.objective.learned_per_row * program.flops_per_sequence
        + drawing_flops(program.config, program.lengths, rows).total
        + judging.flops * rows / train.global_batch_size, chips=topology.num_chips,
        flops_per_second=given.mfu * peak,
        watts=chip.watts if given.watts is None else given.watts,
        power_source=chip.power_source if given.watts is None else "given", pue=given.pue,
        kg_per_kwh=given.kg_per_kwh, kg_per_kwh_net=given.kg_per_kwh_net,
        dollars_per_chip_hour=chip.dollars_per_hour if price is None else price)


def _remarks(plan: Plan) -> list[str]:
    """What a reader of the plan must know and the tables do not say."""
    remarks, chip = [], plan.topology.chip
    if drawing := plan.drawing_flops:
        judged = " (the reward model's pass over them included)" if plan.judge.flops else ""
        remarks.append(f"drawing the answers and measuring them{judged} takes {quantity(drawing, 'FLOP')} a step beside the "
                       "updates, of which alone memory, communication and the bound are: its decoding, a token at a "
                       "time, is not compiled here, and bound by reading parameters")
    dtype = plan.program.policy.matmul_dtype
    if chip.peak_flops and chip.matmul_flops_per_second(dtype) is None:
        remarks.append(f"a {chip.name} has no {dtype} units: use --config.precision=fp16")
    if plan.kept.disk and plan.compiled is not None:
        remarks.append("compiled: the gradients' program; the update reads and writes files between programs, "
                       "a layer at a time, beside it")
    if plan.topology.is_gpu:
        remarks += _gpu_remarks(plan)
    bound_mfu, mfu = plan.roofline.bound_mfu, plan.assumptions.mfu
    if bound_mfu is not None and mfu > bound_mfu:
        remarks.append(f"--mfu={mfu:g} is above the bound of {bound_mfu:.1%}: the run takes longer "
                       f"than stated")
    collectives = (plan.compiled and plan.compiled.collectives) or ()
    if any(one.replaces_gather for one in collectives):
        remarks.append("parameter gathers became all-reduces, at twice the bytes (seen on 3-D "
                       "tori): split the model over mesh.tensor too")
    if not all(one.exact_count for one in collectives):
        remarks.append("a loop's length depends on data: its collectives are counted once")
    return remarks


def _gpu_remarks(plan: Plan) -> list[str]:
    """What XLA:GPU cannot see without a GPU, or what JAX makes of a GPU's memory."""
    remarks, topology = [], plan.topology
    if not topology.compiler and (lacks := attention_implementations.cudnn_lacks()):
        remarks.append(f"activations are counted without cuDNN's attention ({lacks})")
    if plan.compiled is not None and plan.host_bytes:
        remarks.append("the compiler does not see the host's memory of described GPUs: the "
                       "state there was taken off arguments and peak, and what of it "
                       "visits the device at a time is not counted")
    stacks = [plan.config.model.encoder, plan.config.model.decoder]
    if any(stack is not None and stack.remat.startswith("offload") for stack in stacks):
        remarks.append("the compiler does not see the host's memory of described GPUs: "
                       "activations that remat=offload:… would keep there count as the device's")
    fraction, whole = gpus.memory_fraction(), topology.chip.usable_hbm_bytes[1]
    if plan.fits is False and plan.peak_bytes is not None and plan.peak_bytes < 0.95 * whole:
        remarks.append(f"JAX takes {fraction:.0%} of a GPU's memory: with XLA_CLIENT_MEM_FRACTION="
                       f"{plan.peak_bytes / whole + 0.01:.2f} in train's environment it would fit")
    return remarks


# --- what a search tries --------------------------------------------------------------------------

ROOM = "leaves"         # in the outcome of a trial without a compiler


@dataclasses.dataclass(frozen=True)
class Trial:
    """One config of a search. plan: None where build refused it, or nothing could compile it."""

    changes: str
    plan: Plan | None
    outcome: str


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial that fits with the lowest bound; the smallest peak where there is no bound."""
    fitting = [t for t in trials if t.plan is not None and t.plan.fits]
    return min(fitting, default=None, key=lambda t: (
        t.plan.roofline.bound_seconds or 0.0, sum(t.plan.roofline.parts.values()),
        t.plan.peak_bytes or 0))
