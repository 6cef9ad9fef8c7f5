"""`python -m t5x_lite.scaling coordinate_check`: does a model's change follow its width?

A few steps on one batch of random tokens at several widths (embedding, MLPs and number of heads grow
alike), and after them the root mean square of how much each activation has changed. Under
maximal-update parametrisation these changes have no slope over the width; under the standard one some
grow, which is why its best learning rate falls (Yang et al. 2022, appendix D.1).

Activations are those that rematerialisation knows by name (parallel/remat.py), averaged over layers,
and "hidden" and "logits". This module needs JAX; no data is read.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from t5x_lite import config as configs
from t5x_lite.build import Program, build
from t5x_lite.config import RunConfig
from t5x_lite.data import rows as data_rows
from t5x_lite.errors import UserError, at_least
from t5x_lite.models import parametrization
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.language_model import Model
from t5x_lite.parallel.sharding import MeshConfig

ROWS, LENGTH = 8, 32
# Slopes of log change over log width beyond which a change counts as growing or shrinking. The
# random part of a narrow model's logits, which mup lets die out as width^-1/2, is no fault.
GROWING, SHRINKING = 0.25, -0.5


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of coordinate_check."""
    parser.add_argument("--config", default="", help="FILE.py:ARGUMENT, as of train")
    parser.add_argument("--override", action="append", default=[], help="FIELD=VALUE of the config")
    parser.add_argument("--parametrization", default="", help="instead of the config's own: "
                        + ", ".join(parametrization.PARAMETRIZATIONS))
    parser.add_argument("--widths", default="64,128,256,512", help="embed_dim of each model")
    parser.add_argument("--steps", type=int, default=4, help="of training, on one batch")
    parser.add_argument("--seeds", type=int, default=2, help="of parameters, averaged")


def command(options: argparse.Namespace) -> dict[str, Any]:
    """The object that coordinate_check prints."""
    if not options.config:
        raise UserError("--config is missing; try --config=configs/quickstart.py.")
    run = configs.override(load(options.config), options.override)
    try:
        widths = [int(width) for width in options.widths.split(",")]
    except ValueError as error:
        raise UserError(f"--widths={options.widths}: must be widths, such as 64,128,256.") \
            from error
    return check(run, widths, steps=options.steps, seeds=options.seeds,
                 kind=options.parametrization)


def load(path: str) -> RunConfig:
    """The run of a config file and its argument. Raises UserError where there is none."""
    module, argument = configs.module_of(path, "get_config", "name the config of one run")
    given = module.get_config(argument) if argument else module.get_config()
    return configs.from_mapping(RunConfig, given)


def check(run: RunConfig, widths: Sequence[int], *, steps: int = 4, seeds: int = 2,
          kind: str = "") -> dict[str, Any]:
    """Changes of activations by width, their slopes, and whether they are flat.

    Args:
        kind: a parametrization instead of the config's; mup's base is then the least width.

    Raises:
        UserError: fewer than two widths, or one that the model cannot have.
    """
    at_least("--steps", steps, 1)
    at_least("--seeds", seeds, 1)
    widths = sorted(set(widths))
    if len(widths) < 2:
        raise UserError("--widths: a slope needs two or more, such as 64,128,256.")
    if kind:
        run = dataclasses.replace(run, model=_parametrized(run.model, kind, widths[0]))
    found: dict[str, dict[int, float]] = {}
    runs = {width: at_width(run, width) for width in widths}    # what cannot be is named first
    for width, wide in runs.items():
        changes = [change(wide, steps, seed) for seed in range(seeds)]
        for name in changes[0]:
            found.setdefault(name, {})[width] = float(np.mean([c[name] for c in changes]))
    slopes = {name: float(np.polyfit(np.log(widths), np.log(list(by.values())), 1)[0])
              for name, by in found.items()}
    return {"parametrization": run.model.parametrization, "optimizer": run.optimizer.name,
            "widths": widths, "steps": steps, "seeds": seeds, "changes": found, "slopes": slopes,
            **_judged(slopes)}


def _parametrized(model: ModelConfig, kind: str, least: int) -> ModelConfig:
    """The model under a parametrization; its base, where it needs one and has none, is `least`."""
    if kind == "standard":
        return dataclasses.replace(model, parametrization=kind, base_width=0, base_head_dim=0)
    return dataclasses.replace(model, parametrization=kind, base_width=model.base_width or least)


def _judged(slopes: Mapping[str, float]) -> dict[str, Any]:
    steep = {"grow": [name for name, slope in slopes.items() if slope > GROWING],
             "shrink": [name for name, slope in slopes.items() if slope < SHRINKING]}
    said = [f"{', '.join(names)} {verb} with the width" for verb, names in steep.items() if names]
    return {"flat": not said, "verdict": f"changes of {' and '.join(said)}" if said else
            f"every change is flat over the width (slopes from {SHRINKING} to {GROWING})"}


def at_width(run: RunConfig, width: int) -> RunConfig:
    """The run with a model of another width, short, in float32 and without dropout."""
    model = parametrization.grown(run.model, width)
    plain = {side: dataclasses.replace(stack, scan=False, remat="none", dropout_rate=0.0)
             for side in ("encoder", "decoder") if (stack := getattr(model, side)) is not None}
    schedule = dataclasses.replace(run.optimizer.schedule, factors="constant")
    return dataclasses.replace(
        run, model=dataclasses.replace(model, **plain), precision="float32", mesh=MeshConfig(),
        data=dataclasses.replace(run.data, packing=False,
                                 inputs_length=min(run.data.inputs_length, LENGTH),
                                 targets_length=min(run.data.targets_length, LENGTH)),
        optimizer=dataclasses.replace(run.optimizer, schedule=schedule),
        train=dataclasses.replace(run.train, global_batch_size=ROWS, accumulation=1,
                                  noise_scale=False, batch_ramp=type(run.train.batch_ramp)()))


def change(run: RunConfig, steps: int, seed: int) -> dict[str, float]:
    """{activation: root mean square of its change}, averaged over layers, after the steps."""
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=seed))
    program = build(run, jax.devices()[:1])
    batch = random_batch(program, seed)
    model = Model(run.model)
    record = jax.jit(lambda params: named(lambda p: _forward(model, p, batch), params))
    state = program.init_state()
    before = jax.tree.map(np.asarray, record(jax.tree.map(np.asarray, state["params"])))
    with program.activate():
        step = program.jit_train_step()
        for _ in range(steps):
            state, _ = step(state, batch)
    after = record(jax.tree.map(np.asarray, state["params"]))
    changes = {name: [float(jnp.sqrt(jnp.mean(jnp.square(b - a)))) for a, b in
                      zip(before[name], after[name], strict=True)] for name in before}
    bad = [name for name, values in changes.items() if not np.isfinite(values).all()]
    if bad:
        raise UserError(f"{', '.join(bad)} stopped being finite at width {run.model.embed_dim}: "
                        f"take a lower --override=optimizer.schedule.base_learning_rate.")
    return {name: float(np.mean(values)) for name, values in changes.items()}


def random_batch(program: Program, seed: int) -> dict[str, np.ndarray]:
    """A batch of whole rows of random tokens, in the arrays that the run's objective reads."""
    rng = np.random.default_rng(seed)
    data = program.config.data
    made = {}
    for name, (length, dtype) in data_rows.of(program.config.objective.rows).arrays(data).items():
        shape = (program.config.train.global_batch_size, length)
        made[name] = np.ones(shape, dtype)
        if name.endswith("_tokens"):
            made[name] = rng.integers(2, program.config.model.vocab_size, shape).astype(dtype)
    for name in [n for n in made if n.endswith("_input_tokens")]:
        targets = made.get(name.replace("input", "target"))
        if targets is not None:
            made[name] = np.concatenate([np.zeros_like(targets[:, :1]), targets[:, :-1]], axis=1)
    return made


def _forward(model: Model, params: Mapping, batch: Mapping) -> dict[str, jax.Array]:
    module = model.bind(params)
    hidden, _ = module(batch)
    return {"hidden": hidden, "logits": module.head(module.head_params(), hidden)}


def named(function, *args) -> dict[str, list[jax.Array]]:
    """What a function returns by name, and what it tags on the way, [one a layer]."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    tagged = [e for e in closed.jaxpr.eqns if e.primitive.name == "name"]
    names = [*jax.tree.leaves(jax.tree.map_with_path(lambda path, _: path[0].key, out)),
             *(e.params["name"] for e in tagged)]
    wanted = [*closed.jaxpr.outvars, *(e.outvars[0] for e in tagged)]
    debug_info = closed.jaxpr.debug_info._replace(result_paths=None)   # there are more results
    whole = core.ClosedJaxpr(closed.jaxpr.replace(outvars=wanted, debug_info=debug_info), closed.consts)
    found: dict[str, list[jax.Array]] = {}
    for name, value in zip(names, core.jaxpr_as_fun(whole)(*jax.tree.leaves(args)), strict=True):
        found.setdefault(name, []).append(value)
    return found


def show(result: Mapping[str, Any]) -> str:
    """The screen."""
    widths = result["widths"]
    lines = [result["verdict"], "",
             f"root mean square of the change after {result['steps']} steps of "
             f"{result['optimizer']} ({result['parametrization']}, {result['seeds']} seeds)",
             f"  {'width':<18}" + "".join(f"{width:>10}" for width in widths) + "     slope"]
    for name, by_width in result["changes"].items():
        lines.append(f"  {name:<18}" + "".join(f"{by_width[w]:>10.4g}" for w in widths)
                     + f"{result['slopes'][name]:>10.2f}")
    return "\n".join(lines)
