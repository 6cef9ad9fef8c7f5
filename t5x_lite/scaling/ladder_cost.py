"""What a ladder costs on this machine: hours from steps that are measured, energy, money."""

import concurrent.futures
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite import cli
from t5x_lite.build import build
from t5x_lite.config import RunConfig
from t5x_lite.cost import energy, hardware, usage
from t5x_lite.errors import UserError
from t5x_lite.log import si
from t5x_lite.scaling.ladders import Rung

_LEAST_SECONDS = 1.0    # of steps that are measured


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast this machine is: a step takes `step` seconds and `flop` for each FLOP of it."""

    step: float
    flop: float
    start: float                  # seconds until a run's first step has been compiled
    watts: float | None = None    # of the whole machine, where it or the table says
    power_source: str = ""
    chips: int = 1
    dollars_per_hour: float | None = None   # of a chip

    def seconds(self, rung: Rung) -> float:
        """Of one run: its start, its own steps and its evaluations."""
        train, evaluation = rung.config.train, rung.config.eval
        share = rung.own_flops / rung.flops
        a_row = rung.flops / train.num_steps / train.global_batch_size
        rows = (evaluation.num_examples or train.global_batch_size) * train.num_steps / \
            evaluation.every
        return self.start + share * (train.num_steps * self.step + rung.flops * self.flop
                                     + rows * a_row / 3 * self.flop)


def apart(task: Callable, *arguments: Any) -> Any:
    """task(*arguments) by a process of its own, which then leaves the devices to the runs."""
    with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_on_devices, task, *arguments).result()


def _on_devices(task: Callable, *arguments: Any) -> Any:
    cli.find_devices()
    return task(*arguments)


def device_count() -> int:
    """Devices that a run here has."""
    return jax.device_count()


def parameter_counts(config: RunConfig) -> dict[str, int | float]:
    """The parameters of a run, as running/counts.py names them."""
    return build(config).parameter_counts


def measure(rungs: Sequence[Rung]) -> Pace:
    """Times steps of the cheapest and of the dearest step of a ladder."""
    by_step = sorted(rungs, key=_step_flops)
    ends = [by_step[0], by_step[-1]] if len(by_step) > 1 else [by_step[0]]
    meter = _meter()
    found = [_steps(rung.config) for rung in ends]
    power = meter.read(0.0)
    start = sum(compiled for compiled, _ in found) / len(found)
    (low, fast), (high, slow) = ((_step_flops(rung), seconds) for rung, (_, seconds) in
                                 zip((ends[0], ends[-1]), (found[0], found[-1]), strict=True))
    flop = max(0.0, (slow - fast) / (high - low)) if high > low else slow / high
    step = max(0.0, fast - flop * low)
    devices = jax.devices()
    return Pace(step, flop, 2 * start, power.get("watts"), str(power.get("power_source", "")),
                hardware.count_chips(devices), _price(devices[0].device_kind))


def priced(pace: Pace, watts: float, dollars_per_hour: float) -> Pace:
    """The pace with the power and the price that a user gives, 0 for none."""
    if watts:
        pace = dataclasses.replace(pace, watts=watts, power_source="--watts")
    return dataclasses.replace(pace, dollars_per_hour=dollars_per_hour) if dollars_per_hour else pace


def _step_flops(rung: Rung) -> float:
    return rung.flops / rung.config.train.num_steps


def _steps(config: RunConfig) -> tuple[float, float]:
    """(seconds to build and compile, seconds a step) of a run, on rows without text."""
    began = time.perf_counter()
    program = build(config)
    with program.activate():
        state, step = program.init_state(), program.jit_train_step()
        batch = {name: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)
                 for name, x in program.abstract_batch().items()}
        state, sums = step(state, batch)
        jax.block_until_ready(sums)
        compiled, steps = time.perf_counter() - began, 0
        began = time.perf_counter()
        while time.perf_counter() - began < _LEAST_SECONDS or steps < 3:
            state, sums = step(state, batch)
            jax.block_until_ready(sums)
            steps += 1
    return compiled, (time.perf_counter() - began) / steps


def _meter() -> usage.UsageMeter:
    devices = jax.devices()
    return usage.UsageMeter(devices[0].device_kind, num_chips=hardware.count_chips(devices),
                            dtype="float32")


def _price(device_kind: str) -> float | None:
    try:
        return hardware.lookup(device_kind).dollars_per_hour
    except UserError:   # a device that the table has not
        return None


def total(rungs: Sequence[Rung], pace: Pace) -> dict[str, float | None]:
    """FLOPs, hours, kWh (with PUE) and dollars of all runs; None where a price or power is unknown."""
    hours = sum(pace.seconds(rung) for rung in rungs) / energy.SECONDS_PER_HOUR
    chip_hours = hours * pace.chips
    return {"runs": len(rungs), "flops": sum(rung.own_flops for rung in rungs), "hours": hours,
            "kwh": None if pace.watts is None else hours * pace.watts * energy.PUE_GOOGLE_2020 / 1e3,
            "dollars": None if pace.dollars_per_hour is None else
            chip_hours * pace.dollars_per_hour}


def describe(rungs: Sequence[Rung], pace: Pace) -> str:
    """A line a run and the sums."""
    heads = ("run", "N", "tokens", "tokens/N", "FLOPs", "steps", "rows", "rate", "minutes")
    rows = [heads]
    for rung in rungs:
        train = rung.config.train
        rows.append((
            "/".join(filter(None, (rung.arm, f"seed_{rung.seed}", rung.stage))),
            f"{rung.params:.3g}", f"{rung.tokens:.3g}", f"{rung.tokens / rung.params:.3g}",
            f"{rung.flops:.3g}", f"{train.num_steps}", f"{train.global_batch_size}",
            f"{rung.config.optimizer.schedule.base_learning_rate:.3g}",
            f"{pace.seconds(rung) / 60:.2g}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in
                       enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join([*lines, _sums(rungs, pace)])


def _sums(rungs: Sequence[Rung], pace: Pace) -> str:
    found = total(rungs, pace)
    kwh = "energy unknown (neither this machine nor the table says its power; --watts=W)" \
        if found["kwh"] is None else f"{found['kwh']:.3g} kWh with PUE ({pace.power_source})"
    money = "price unknown (--dollars_per_hour=X)" if found["dollars"] is None else \
        f"${found['dollars']:,.2f}"
    rate = f" and {si(1 / pace.flop, 'FLOP/s')}" if pace.flop else ""
    return (f"{found['runs']} runs, {si(found['flops'], 'FLOP')}, {found['hours']:.3g} hours here (a "
            f"step: {pace.step * 1e3:.3g} ms{rate}; a start: {pace.start:.3g} s), {kwh}, {money}")


def refuse_above(rungs: Sequence[Rung], pace: Pace, max_hours: float) -> None:
    """Raises UserError where the ladder takes longer than it may."""
    hours = total(rungs, pace)["hours"]
    if hours > max_hours:
        raise UserError(f"the ladder takes {hours:.3g} hours on this machine, more than "
                        f"--max_hours={max_hours:g}: lower --budgets, --sizes or --seeds, or raise "
                        f"--max_hours. Nothing was started.")
