"""Learning-rate schedules and batch ramps: what changes with the step, as pure functions of it.

A schedule is a product of named factors, as in T5X: "constant * linear_warmup * rsqrt_decay".
The factors of T5X are kept to the digit (tests hold them against its output), its
"linear_decay" included, which is really a trapezoid and counts the base rate twice. Warm-up
and cosine to a floor (GPT-3, Gopher, Chinchilla, LLaMA), a linear decay to a floor and
warmup-stable-decay are further factors: cosine_to_floor, linear_to_floor, stable_then_decay.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from t5x_lite.errors import Share, UserError, at_least, known


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A product of factors; each reads the fields that its line below names."""

    factors: str = "constant * linear_warmup * rsqrt_decay"
    base_learning_rate: float = 0.5   # constant, linear_decay
    warmup_steps: int = 1000          # all but constant and decay_every
    warmup_init_fraction: Share = 0.0  # linear_warmup: share of the base rate at step 0
    decay_factor: float = 0.5         # decay_every: multiplier; linear_decay: slope a step
    steps_per_decay: int = 20_000     # decay_every
    steps_per_cycle: int = 100_000    # cosine_decay: starts again after each cycle
    total_steps: int = 0              # *_to_floor, stable_then_decay: where the floor is reached;
                                      # 0: at train.num_steps
    decay_steps: int = 0              # stable_then_decay: length of the final linear decay
    floor_fraction: Share = 0.1       # *_to_floor, stable_then_decay: share of the base rate kept
    step_offset: int = 0              # steps before the schedule starts (fine-tuning)
    min_learning_rate: float = 1e-8   # of the whole product


def _progress(c: ScheduleConfig, step, start: int) -> jax.Array:
    """0 until `start`, rising to 1 at total_steps and staying there."""
    return jnp.clip((step - start) / (c.total_steps - start), 0.0, 1.0)


def _to_floor(c: ScheduleConfig, share) -> jax.Array:
    return c.floor_fraction + (1.0 - c.floor_fraction) * share


# name -> fn(config, float32 step) -> multiplier. The first seven are T5X's.
FACTORS: dict[str, Callable[[ScheduleConfig, jax.Array], jax.Array]] = {
    "constant": lambda c, step: c.base_learning_rate,
    "linear_warmup": lambda c, step: c.warmup_init_fraction + (
        1.0 - c.warmup_init_fraction) * jnp.minimum(1.0, step / c.warmup_steps),
    "linear_decay": lambda c, step: c.base_learning_rate * jnp.minimum(
        step / c.warmup_steps, 1.0 + c.decay_factor * (c.warmup_steps - step)),
    "rsqrt_decay": lambda c, step: 1.0 / jnp.sqrt(jnp.maximum(step, c.warmup_steps)),
    "rsqrt_normalized_decay": lambda c, step: math.sqrt(c.warmup_steps) / jnp.sqrt(
        jnp.maximum(step, c.warmup_steps)),
    "decay_every": lambda c, step: c.decay_factor ** jnp.floor(step / c.steps_per_decay),
    "cosine_decay": lambda c, step: jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * (
        jnp.maximum(0.0, (step - c.warmup_steps) / c.steps_per_cycle) % 1.0)))),
    "cosine_to_floor": lambda c, step: _to_floor(
        c, 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(c, step, c.warmup_steps)))),
    "linear_to_floor": lambda c, step: _to_floor(c, 1.0 - _progress(c, step, c.warmup_steps)),
    "stable_then_decay": lambda c, step: _to_floor(
        c, 1.0 - _progress(c, step, c.total_steps - c.decay_steps)),
}
# Factors that divide by a field, which must not be 0 then.
_NEEDED = {("linear_warmup", "linear_decay", "rsqrt_decay", "rsqrt_normalized_decay"):
           "warmup_steps", ("decay_every",): "steps_per_decay", ("cosine_decay",): "steps_per_cycle"}
_NEED_TOTAL = ("cosine_to_floor", "linear_to_floor", "stable_then_decay")


def schedule(config: ScheduleConfig) -> Callable[[jax.Array], jax.Array]:
    """step (int, before the update) -> learning rate, float32 scalar.

    Raises:
        UserError: an unknown factor, or a field that a factor cannot work with.
    """
    names = [name.strip() for name in config.factors.split("*")]
    for name in names:
        _check_factor(config, name)

    def learning_rate(step):
        step = jnp.maximum(0, step - config.step_offset).astype(jnp.float32)
        rate = math.prod((FACTORS[name](config, step) for name in names), start=1.0)
        return jnp.asarray(jnp.maximum(rate, config.min_learning_rate), jnp.float32)

    return learning_rate


# factor -> the step from which it falls; "constant" never does, and what is not here rises no more
# after the warm-up.
_FALLS_FROM: dict[str, Callable[[ScheduleConfig], int]] = {
    **dict.fromkeys(("linear_decay", "rsqrt_decay", "rsqrt_normalized_decay", "cosine_decay",
                     "cosine_to_floor", "linear_to_floor"), lambda c: c.warmup_steps),
    "decay_every": lambda c: c.steps_per_decay,
    "stable_then_decay": lambda c: c.total_steps - c.decay_steps}
_WARM_UP = ("linear_warmup", "linear_decay")


def phase(config: ScheduleConfig, step: int) -> str:
    """"warmup", "stable" or "decay": what the learning rate does at a step (before the update).

    config: with its total_steps, as `until` gives it.
    """
    step = max(0, step - config.step_offset)
    names = [name.strip() for name in config.factors.split("*")]
    if step < config.warmup_steps and any(name in _WARM_UP for name in names):
        return "warmup"
    falls = [_FALLS_FROM[name](config) for name in names if name in _FALLS_FROM]
    return "decay" if falls and step >= min(falls) else "stable"


def until(config: ScheduleConfig, num_steps: int) -> ScheduleConfig:
    """The schedule, which ends with the run's last step where it does not say when.

    A run that ends within its warm-up never gets to what comes after it.
    """
    if config.total_steps:
        return config
    earliest = config.warmup_steps + max(1, config.decay_steps)
    return dataclasses.replace(config, total_steps=max(num_steps, earliest))


def _check_factor(config: ScheduleConfig, name: str) -> None:
    where = f"optimizer.schedule.factors={config.factors!r}"
    known(where, "factor", name, FACTORS)
    for factors, field in _NEEDED.items():
        if name in factors:
            at_least(f"optimizer.schedule.{field}", getattr(config, field), 1,
                     f"{name} needs it; leave that factor out for a schedule without it.")
    start = config.warmup_steps
    if name == "stable_then_decay":
        if not 0 < config.decay_steps <= config.total_steps - config.warmup_steps:
            raise UserError(
                f"{where}: decay_steps={config.decay_steps} must be at least 1 and fit between "
                f"warmup_steps={config.warmup_steps} and total_steps={config.total_steps}.")
    elif name in _NEED_TOTAL and config.total_steps <= start:
        raise UserError(f"{where}: {name} needs total_steps (now {config.total_steps}) above "
                        f"warmup_steps={start}.")
