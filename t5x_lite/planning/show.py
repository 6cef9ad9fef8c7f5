"""A plan and its search as a screen of text, or as one JSON object."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Column, Table

from t5x_lite.build import Program
from t5x_lite.cost import energy, flops, tables
from t5x_lite.cost.flops import rows_line
from t5x_lite.planning import remedies
from t5x_lite.planning.make import ROOM, Plan, Trial, best

SHOWN_COLLECTIVES = 8   # lines of the communication table; --json has all


def to_json(plan: Plan, trials: Sequence[Trial] = ()) -> dict[str, Any]:
    """The plan as one JSON object; docs/rehearsals.md says what its fields mean."""
    bound, compiled, cost = plan.roofline, plan.compiled, plan.cost
    collectives, chosen = plan.collectives, best(trials)
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
        "reward_model_bytes": plan.judge.params_bytes,
        "host_bytes": plan.host_bytes, "host_params_bytes": plan.kept.host_params,
        "disk_bytes": plan.kept.disk,
        "activation_bytes": plan.activation_bytes,
        "argument_bytes": plan.argument_bytes, "temp_bytes": plan.temp_bytes,
        "temp_size_bytes": compiled and compiled.temp_size_bytes,
        "peak_bytes": plan.peak_bytes,
        "model_flops": plan.model_flops, "drawing_flops": plan.drawing_flops,
        "recomputed_flops": _recomputed(plan), "pipeline": _pipelines(plan.program),
        "collectives": None if collectives is None
        else [dataclasses.asdict(line) for line in collectives],
        "gathers_became_all_reduces":
            None if collectives is None else any(line.replaces_gather for line in collectives),
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
    collectives = plan.collectives
    parts = [_headline(plan), tables.to_text(_memory_table(plan)).rstrip()]
    if collectives is not None:
        text = tables.to_text(tables.communication_table(collectives[:SHOWN_COLLECTIVES])).rstrip()
        more = len(collectives) - SHOWN_COLLECTIVES
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
    """Patterson et al. 2021 as one JSON object: each run's inputs and published figures, and what
    `estimate` derives from them."""
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
            f"{rows_line(plan.config, program.lengths, plan.config.train.global_batch_size)} a step, "
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
    if plan.kept.host_params:
        table.add_row("  and, not counted here, in the host's", shown(plan.kept.host_params))
    table.add_row("optimizer state", shown(plan.arguments["opt_state"]))
    if plan.kept.host_optimizer:
        table.add_row("  and, not counted here, in the host's", shown(plan.kept.host_optimizer))
    if plan.kept.disk:
        table.add_row("  and, of all devices, on disk", shown(plan.kept.disk))
    table.add_row("batch", shown(plan.arguments["batch"]))
    table.add_row("arguments (the above, as laid out)", shown(plan.argument_bytes))
    table.add_row("temporaries at the peak", shown(plan.temp_bytes))
    table.add_row("  kept for the backward pass, before fusion", shown(plan.activation_bytes))
    if plan.judge.params_bytes:
        table.add_row("the reward model's parameters", shown(plan.judge.params_bytes))
    table.add_row("peak", shown(plan.peak_bytes))
    table.add_row("available", shown(plan.topology.hbm_bytes))
    return table
