"""Rehearse a run: `python -m t5x_lite.plan --config=configs/t5_1_1.py:base --topology=v5e:2x4`.

Compiles the very step that train would run, for machines that need not be there, and says
whether it fits, what it sends over which network, how fast it can be at best, and what the
whole run takes in time, energy, carbon and money. --json prints one object instead.
--published derives time, energy and carbon of six known runs, beside what was published.

Three kinds of figures stand apart: the compiler's (memory, collectives), the bound (roofline:
no step is faster), and an assumption (--mfu), from which time, energy and price follow.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags
from rich.table import Column, Table

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import
from t5x_lite.build import Program, build
from t5x_lite.config import RunConfig, replace
from t5x_lite.cost import energy, flops, hlo, roofline as roofline_lib, tables
from t5x_lite.cost.roofline import Roofline
from t5x_lite.errors import UserError
from t5x_lite.layers import attention_implementations
from t5x_lite.planning import rehearse, remedies
from t5x_lite.planning.rehearse import Compiled, Topology
from t5x_lite.training import batch_ramp

_log = logging.getLogger("t5x_lite.plan")   # also where this module is __main__

DEFAULT_MFU = 0.4       # of a tuned run on TPUs; --mfu
ROOM = "leaves"         # in the outcome of a trial without a compiler
SHOWN_COLLECTIVES = 8   # lines of the communication table; --json has all


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What no compiler knows. None: the hardware table's figure, where it has one."""

    mfu: float = DEFAULT_MFU
    watts: float | None = None
    pue: float = energy.PUE_GOOGLE_2020
    kg_per_kwh: float = energy.KG_PER_KWH_US_2020
    kg_per_kwh_net: float | None = None
    dollars_per_chip_hour: float | None = None

    def __post_init__(self):
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu={self.mfu}: must be above 0 and at most 1.")
        for name in ("watts", "kg_per_kwh", "kg_per_kwh_net", "dollars_per_chip_hour"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"--{name}={value}: must not be negative.")
        if self.pue < 1:
            raise UserError(f"--pue={self.pue}: a data centre draws at least what its machines "
                            f"draw, so at least 1.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A rehearsal. Bytes are one device's; None is unknown."""

    config: RunConfig
    topology: Topology
    program: Program
    compiled: Compiled | None        # None: there is no compiler, or the state alone is too large
    arguments: dict[str, int]        # params, opt_state, batch
    host_bytes: int                  # of offloaded optimizer state
    activation_bytes: int
    model_flops: float               # a step's
    roofline: Roofline
    cost: energy.RunCost | None
    assumptions: Assumptions
    notes: tuple[str, ...]

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
        """Arguments, results that do not replace them, and temporaries."""
        if self.compiled is None or self.compiled.peak_bytes is not None:
            return self.compiled and self.compiled.peak_bytes
        return self.temp_bytes and self.argument_bytes + self.temp_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the step runs in the device's memory; None where only a compiler could tell."""
        hbm = self.topology.hbm_bytes
        if hbm is not None and sum(self.arguments.values()) > hbm:
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


# --- Making it --------------------------------------------------------------------------------

def on_slices(config: RunConfig, topology: Topology) -> RunConfig:
    """The config with mesh.slice as the topology has it, where it was left at 1."""
    if config.mesh.slice in (1, topology.num_slices):
        return replace(config, "mesh.slice", topology.num_slices)
    if topology.chip.name == "cpu" or config.mesh.slice == -1:
        return config
    raise UserError(f"mesh.slice={config.mesh.slice} but --num_slices={topology.num_slices}; give "
                    f"both the same number.")


def make_plan(config: RunConfig, topology: Topology,
              assumptions: Assumptions = Assumptions()) -> Plan:
    """Builds and compiles the run's step on the topology.

    Raises:
        UserError: whatever build refuses, before anything is compiled.
    """
    config = on_slices(config, topology)
    program = build(config, topology.devices)
    arguments = rehearse.argument_bytes(program)
    activations = rehearse.activation_bytes(program)
    hbm, notes, compiled = topology.hbm_bytes, [], None
    if not topology.compiler:
        notes.append("GPUs have no compiler that works without one: temporaries and communication "
                     "are unknown, and the bound leaves them out")
        if lacks := attention_implementations.cudnn_lacks():
            notes.append(f"activations are counted without cuDNN's attention ({lacks})")
    elif hbm is not None and sum(arguments.values()) > hbm:
        notes.append("not compiled: parameters, optimizer state and batch alone are too large")
    else:
        compiled = rehearse.compile_step(program)
        notes += [compiled.note] if compiled.note else []
    model_flops = config.train.global_batch_size * program.flops_per_sequence
    bound = _bound(program, topology, compiled, arguments, model_flops)
    cost = _run_cost(program, topology, assumptions)
    dtype, chip = program.policy.matmul_dtype, topology.chip
    if chip.peak_flops and chip.matmul_flops_per_second(dtype) is None:
        notes.append(f"a {chip.name} has no {dtype} units: use --config.precision=fp16")
    notes += _remarks(bound, compiled, assumptions)
    return Plan(config, topology, program, compiled, arguments,
                rehearse.host_bytes(program), activations, model_flops, bound, cost,
                assumptions, tuple(notes))


def _bound(program: Program, topology: Topology, compiled: Compiled | None,
           arguments: dict[str, int], model_flops: float) -> Roofline:
    mesh = program.mesh
    known = compiled is not None and compiled.argument_bytes is not None
    written = (compiled.output_bytes if known else arguments["params"] + arguments["opt_state"]) \
        - rehearse.frozen_bytes(program)   # passed through, not written
    rows = program.config.train.global_batch_size
    least = sum(part / (1 - program.bubbles.get(name, 0.0))
                for name, part in program.step_flops(rows, least=True).items())
    return roofline_lib.roofline(
        topology.chip, num_chips=topology.num_chips, model_flops=model_flops,
        dtype=program.policy.matmul_dtype, least_flops=least,
        argument_bytes=compiled.argument_bytes if known else sum(arguments.values()),
        output_bytes=written,
        temp_bytes=compiled.temp_bytes if known else 0,
        collectives=(compiled and compiled.collectives) or (),
        placement=roofline_lib.place(mesh.devices, mesh.axis_names, topology.chip))


def _run_cost(program: Program, topology: Topology, given: Assumptions
              ) -> energy.RunCost | None:
    chip = topology.chip
    peak = chip.matmul_flops_per_second(program.policy.matmul_dtype)
    if peak is None:
        return None
    train = program.config.train
    rows = batch_ramp.sequences_before(train.batch_ramp, train.global_batch_size, train.num_steps)
    price = given.dollars_per_chip_hour
    return energy.estimate(
        total_flops=rows * program.flops_per_sequence, chips=topology.num_chips,
        flops_per_second=given.mfu * peak,
        watts=chip.watts if given.watts is None else given.watts,
        power_source=chip.power_source if given.watts is None else "given", pue=given.pue,
        kg_per_kwh=given.kg_per_kwh, kg_per_kwh_net=given.kg_per_kwh_net,
        dollars_per_chip_hour=chip.dollars_per_hour if price is None else price)


def _remarks(bound: Roofline, compiled: Compiled | None, given: Assumptions) -> list[str]:
    remarks = []
    if bound.bound_mfu is not None and given.mfu > bound.bound_mfu:
        remarks.append(f"--mfu={given.mfu:g} is above the bound of {bound.bound_mfu:.1%}: the run "
                       f"takes longer than stated")
    found = (compiled and compiled.collectives) or ()
    if any(one.replaces_gather for one in found):
        remarks.append("parameter gathers became all-reduces, at twice the bytes (seen on 3-D "
                       "tori): split the model over mesh.tensor too")
    if not all(one.exact_count for one in found):
        remarks.append("a loop's length depends on data: its collectives are counted once")
    return remarks


# --- What would make it fit, and the best mesh ------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Trial:
    """One config of a search. plan: None where build refused it, or nothing could compile it."""

    changes: str
    plan: Plan | None
    outcome: str


def search(first: Plan, most_compilations: int = 8) -> list[Trial]:
    """Plans until one fits, then meshes for the best bound; the first trial is the plan given.

    What does not build, or whose state alone is too large, costs no compilation. Without a
    compiler (GPUs) the state alone is counted, until it fits in a few ways.
    """
    if not first.topology.compiler:
        return [Trial("as given", first, _state_outcome(first.topology, first.arguments)),
                *_by_state(first)]
    trials, devices = [], len(first.topology.devices)
    left = most_compilations

    def tried(changes: str, plan: Plan | None, outcome: str) -> None:
        trials.append(Trial(changes, plan, outcome))
        _log.info("tried %s: %s", changes, outcome)

    def attempt(candidates, until_it_fits: bool) -> None:
        nonlocal left
        for changes, config in candidates:
            if left == 0 or (until_it_fits and best(trials) is not None):
                return
            try:
                plan = make_plan(config, first.topology, first.assumptions)
            except UserError as error:
                tried(changes, None, f"refused: {error}")
            except jax.errors.JaxRuntimeError as error:
                left -= 1
                tried(changes, None, f"the compiler failed: {str(error).partition(chr(10))[0]}")
            else:
                left -= plan.compiled is not None
                tried(changes, plan, _outcome(plan))

    tried("as given", first, _outcome(first))
    attempt(remedies.remedies(first.config, devices), True)
    found = best(trials)
    if found is not None and "mesh" not in found.changes:
        attempt(remedies.meshes(found.plan.config, devices), False)
    return trials


def _by_state(first: Plan, enough: int = 6) -> Iterator[Trial]:
    """What makes the state smaller, until it leaves room `enough` times."""
    whole = sum(first.arguments.values())
    for changes, config in remedies.remedies(first.config, len(first.topology.devices)):
        if enough == 0:
            return
        if "mesh" not in changes and "sharding" not in changes:
            continue
        try:
            arguments = rehearse.argument_bytes(build(config, first.topology.devices))
        except UserError as error:
            yield Trial(changes, None, f"refused: {error}")
            continue
        if sum(arguments.values()) >= whole:
            continue
        enough -= sum(arguments.values()) <= first.topology.hbm_bytes
        yield Trial(changes, None, _state_outcome(first.topology, arguments))


def _state_outcome(topology: Topology, arguments: dict[str, int]) -> str:
    used, shown = sum(arguments.values()), tables.binary_bytes
    room = topology.hbm_bytes - used
    return f"parameters, optimizer state and batch {shown(used)}: " \
        + (f"{ROOM} {shown(room)} for temporaries" if room >= 0 else "too large")


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial that fits with the lowest bound; the smallest peak where there is no bound."""
    fitting = [t for t in trials if t.plan is not None and t.plan.fits]
    return min(fitting, default=None, key=lambda t: (
        t.plan.roofline.bound_seconds or 0.0, sum(t.plan.roofline.parts.values()),
        t.plan.peak_bytes or 0))


def _outcome(plan: Plan) -> str:
    verdict = {True: "fits", False: "too large", None: "unknown"}[plan.fits]
    return f"{verdict}, peak {tables.binary_bytes(plan.peak_bytes)}, a step takes at least " \
           f"{tables.duration(plan.roofline.bound_seconds)}"


# --- Showing it -------------------------------------------------------------------------------

def to_json(plan: Plan, trials: Sequence[Trial] = ()) -> dict[str, Any]:
    """The plan as one JSON object; docs/rehearsals.md says what its fields mean."""
    bound, compiled, cost = plan.roofline, plan.compiled, plan.cost
    found, chosen = plan.collectives, best(trials)
    return {
        "config": plan.config.name, "topology": plan.topology.name,
        "num_slices": plan.topology.num_slices, "num_chips": plan.topology.num_chips,
        "num_devices": plan.program.mesh.size,
        "mesh": {a: n for a, n in plan.program.mesh.shape.items() if n > 1},
        "compiler": plan.topology.compiler or None,
        "compile_seconds": compiled and round(compiled.seconds, 2),
        "fits": plan.fits, "hbm_bytes": plan.topology.hbm_bytes,
        "num_params": plan.program.num_params,
        "params_bytes": plan.arguments["params"],
        "optimizer_bytes": plan.arguments["opt_state"],
        "batch_bytes": plan.arguments["batch"],
        "host_bytes": plan.host_bytes,
        "activation_bytes": plan.activation_bytes,
        "argument_bytes": plan.argument_bytes, "temp_bytes": plan.temp_bytes,
        "temp_size_bytes": compiled and compiled.temp_size_bytes,
        "peak_bytes": plan.peak_bytes,
        "model_flops": plan.model_flops,
        "recomputed_flops": _recomputed(plan), "pipeline": _pipelines(plan.program),
        "collectives": None if found is None else [dataclasses.asdict(line) for line in found],
        "gathers_became_all_reduces":
            None if found is None else any(line.replaces_gather for line in found),
        "seconds": bound.parts, "bound_seconds": bound.bound_seconds,
        "bound_mfu": bound.bound_mfu, "bound_by": bound.limited_by,
        "bound_leaves_out": list(bound.unknown),
        "assumptions": dataclasses.asdict(plan.assumptions),
        "run": cost and dataclasses.asdict(cost),
        "notes": list(plan.notes),
        "search": [{"changes": t.changes, "outcome": t.outcome} for t in trials],
        "best": chosen and chosen.changes,
    }


def screen(plan: Plan, trials: Sequence[Trial] = ()) -> str:
    """The plan as text."""
    found = plan.collectives
    parts = [_headline(plan), tables.to_text(_memory_table(plan)).rstrip()]
    if found is not None:
        text = tables.to_text(tables.communication_table(found[:SHOWN_COLLECTIVES])).rstrip()
        more = len(found) - SHOWN_COLLECTIVES
        parts.append(text + (f"\n{more} smaller ones: --json has them" if more > 0 else ""))
    parts.append(tables.to_text(tables.roofline_table(plan.roofline)).rstrip())
    if plan.cost is not None:
        parts.append(tables.to_text(tables.run_cost_table(
            plan.cost, assumed=f"if it had {plan.assumptions.mfu:.0%} MFU")).rstrip())
    parts += [f"note: {note}" for note in plan.notes]
    if trials:
        table = Table(Column("tried, each on top of those above until one fits", overflow="fold"),
                      Column("outcome", overflow="fold"), title="Search", title_justify="left")
        for trial in trials:
            table.add_row(trial.changes, trial.outcome)
        parts += [tables.to_text(table).rstrip(), _conclusion(plan, trials)]
    if plan.fits is False and not trials or trials and not plan.topology.compiler:
        lines = [changes for changes, _ in remedies.remedies(plan.config,
                                                             len(plan.topology.devices))]
        parts.append("To make it fit, in this order (--search tries them):\n"
                     + "\n".join(f"  {line}" for line in lines))
    return "\n".join(parts)


def _conclusion(plan: Plan, trials: Sequence[Trial]) -> str:
    if plan.topology.compiler:
        chosen = best(trials)
        return f"best: {chosen.changes}" if chosen else "nothing that was tried fits"
    roomy = next((trial for trial in trials if ROOM in trial.outcome), None)
    if roomy is None:
        return "too large however it was split: take more devices"
    return f"the state leaves room {roomy.changes if roomy.plan is None else 'as it is'}; " \
           "whether temporaries fit too only a compiler could tell, on the machine itself"


def published() -> str:
    """The runs of Patterson et al. 2021 derived from their FLOPs, and GPT-3's GPU-years."""
    years = published_json()["gpt3_gpu_years"]
    return (tables.to_text(tables.published_table(energy.PATTERSON_2021), width=130)
            + f"GPT-3 on one V100 at 28 TFLOP/s: {years:,.0f} GPU-years (355)")


def published_json() -> dict[str, Any]:
    """The same as one JSON object: each run's inputs and published figures, and the derived."""
    return {"runs": [{**dataclasses.asdict(run), "derived": dataclasses.asdict(run.estimate())}
                     for run in energy.PATTERSON_2021],
            "gpt3_gpu_years": energy.chip_years(energy.PATTERSON_2021[-1].total_flops, 28e12)}


def _headline(plan: Plan) -> str:
    topology, program = plan.topology, plan.program
    mesh = ", ".join(f"{a}={n}" for a, n in program.mesh.shape.items() if n > 1) or "1 device"
    slices = f" x {topology.num_slices} slices" if topology.num_slices > 1 else ""
    verdict = {True: "FITS", False: "DOES NOT FIT", None: "FITS OR NOT: unknown"}[plan.fits]
    compiled = f", compiled in {plan.compiled.seconds:.1f} s by {topology.compiler}" \
        if plan.compiled is not None else ""
    steps = plan.config.train.num_steps
    again = _recomputed(plan)
    pipelines = [f"\npipeline of the {side}: {line['schedule']}, {line['microbatches']} "
                 f"micro-batches, {line['bubble']:.1%} of the stages' time idle (the bubble)"
                 for side, line in _pipelines(program).items()]
    return (f"{plan.config.name} on {topology.name}{slices}: {verdict}{compiled}\n"
            f"{program.num_params:,} parameters; {topology.num_chips} chips, mesh {mesh}; "
            f"{plan.config.precision}\n"
            f"{plan.config.train.global_batch_size:,} sequences x {program.lengths} a step, "
            f"{tables.quantity(plan.model_flops, 'FLOP')}"
            + (f" (+ {tables.quantity(again, 'FLOP')} recomputed)" if again else "")
            + f"; {steps:,} steps" + "".join(pipelines))


def _recomputed(plan: Plan) -> float:
    """FLOPs a step that rematerialisation and pipelining compute again, at most."""
    return flops.recompute_flops(plan.config.model, plan.config.train.global_batch_size,
                                 *plan.program.lengths, plan.program.mesh.shape["stage"])


def _pipelines(program: Program) -> dict[str, dict[str, Any]]:
    """{stack: its schedule, micro-batches (of a part, under accumulation) and bubble}."""
    stages = program.mesh.shape["stage"]
    configs = {side: getattr(program.config.model, side).pipeline
               for side in program.bubbles}
    return {side: {"schedule": config.schedule, "microbatches": config.plan(stages).microbatches,
                   "bubble": program.bubbles[side]} for side, config in configs.items()}


def _memory_table(plan: Plan) -> Table:
    table = Table("memory of one device", "", title="Memory", title_justify="left",
                  show_header=False)
    shown = tables.binary_bytes
    table.add_row("parameters", shown(plan.arguments["params"]))
    table.add_row("optimizer state", shown(plan.arguments["opt_state"]))
    if plan.host_bytes:
        table.add_row("  and, not counted here, in the host's", shown(plan.host_bytes))
    table.add_row("batch", shown(plan.arguments["batch"]))
    table.add_row("arguments (the above, as laid out)", shown(plan.argument_bytes))
    table.add_row("temporaries at the peak", shown(plan.temp_bytes))
    table.add_row("  kept for the backward pass, before fusion", shown(plan.activation_bytes))
    table.add_row("peak", shown(plan.peak_bytes))
    table.add_row("available", shown(plan.topology.hbm_bytes))
    return table


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    _TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:2x4, v5p:4x4x4, cpu:8, h100:8.")
    _SLICES = flags.DEFINE_integer("num_slices", 1, "TPU slices of that shape.")
    _JSON = flags.DEFINE_bool("json", False, "One JSON object instead of a screen.")
    _PUBLISHED = flags.DEFINE_bool("published", False, "Six known runs instead of a config's.")
    _SEARCH = flags.DEFINE_bool("search", False, "Try what would make it fit, and other meshes.")
    _MFU = flags.DEFINE_float("mfu", DEFAULT_MFU, "Assumed for the whole run's time.")
    _WATTS = flags.DEFINE_float("watts", None, "Mean power of a chip; default: the table's.")
    _PUE = flags.DEFINE_float("pue", energy.PUE_GOOGLE_2020, "Of the data centre.")
    _KG = flags.DEFINE_float("kg_per_kwh", energy.KG_PER_KWH_US_2020, "CO2e, gross.")
    _KG_NET = flags.DEFINE_float("kg_per_kwh_net", None, "CO2e after matched clean energy.")
    _DOLLARS = flags.DEFINE_float("dollars_per_chip_hour", None, "Default: the list price.")

    def main() -> None:
        # Devices are described; those that this machine has are left alone.
        jax.config.update("jax_platforms", "cpu")
        logging.getLogger("t5x_lite").setLevel(logging.WARNING)
        _log.setLevel(logging.INFO)   # a search's trials, each of which may take minutes
        given = Assumptions(_MFU.value, _WATTS.value, _PUE.value, _KG.value, _KG_NET.value,
                            _DOLLARS.value)
        if _PUBLISHED.value:
            print(json.dumps(published_json()) if _JSON.value else published())
            return
        config = cli.run_config(_CONFIG)
        if not _TOPOLOGY.value:
            raise UserError("--topology is missing. Known:\n" + rehearse.known_topologies())
        plan = make_plan(config, rehearse.topology(_TOPOLOGY.value, _SLICES.value), given)
        trials = search(plan) if _SEARCH.value else []
        print(json.dumps(to_json(plan, trials)) if _JSON.value else screen(plan, trials))

    cli.run(main, alone=True)
