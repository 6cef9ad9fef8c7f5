"""Parameters from elsewhere: `--config.init_from=SOURCE` in train, eval and infer.

    hf:DIR    a folder of Hugging Face transformers (config.json and safetensors), or ORG/NAME
              of the hub, downloaded into its cache (formats/hub.py)
    t5x:DIR   a native T5X checkpoint
    WORKDIR   a workdir of t5x_lite, its checkpoints folder or the folder of one step; WORKDIR/checkpoints/best
              the best one (checkpoint.best). Of a run with train.ema_decay: the moving average

Each a local folder or gs://BUCKET/PATH.

Without a map the source must hold the model's parameters, all of them and no others.
`init_map` makes a partial load of it: (regex, replacement) pairs over the model's paths, as
in parameters.txt. The first regex that matches a whole path says where that parameter comes
from, with \\1 for what a group matched; "" leaves it fresh; a path that none matches comes from
the same path. What the source holds beyond that is skipped.

    (("decoder/.*", ""),)                                      the encoder only
    (("decoder/(.*self_attention.*)", r"encoder/\\1"),)        also start a decoder from an encoder
    ((r"(.*)/mlp/experts/(.*)", r"\\1/mlp/\\2"), (".*/router/.*", ""))   sparse upcycling

A workdir of parameter-efficient tuning (models/peft.py) counts as the whole model, merged. Prompts,
adapters and a scalar head that the source does not hold are left fresh without a rule; a fresh prompt
starts as the embeddings of common tokens, a fresh head at 0.

Two shapes may differ: a vocabulary may be padded (the new rows are the mean of the others,
so that by Jensen's inequality they take no more of the softmax than their share of the
rows), and a dense MLP is copied to every expert (Komatsuzaki et al. 2022, arXiv:2212.05055).
Equal experts compute the dense model's function where every token is served and the gates it is
mixed by sum to 1: router "top_k" or "top_2" with renormalize, dropless or with room enough.

Token ids must mean the same on both sides. The run's vocabulary is compared with that of the
source (a workdir's, or the SentencePiece model in a Hugging Face folder) and refused where it
differs or has more ids than the source has rows, unless a rule of init_map names
token_embedding/embedding.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import files, log, same_vocabulary, tree
from t5x_lite.build import Program, build
from t5x_lite.checkpoints import format as checkpoint_format, manager
from t5x_lite.config import EvalConfig, RunConfig, ShardingConfig, TrainConfig, from_mapping, saved
from t5x_lite.errors import UserError, nearest
from t5x_lite.formats import assignment, hf, t5x, workdir as workdirs
from t5x_lite.formats.mapping import ForeignModel
from t5x_lite.models import peft
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.params import ParamInfo
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training.state import REFERENCE

# What a run is measured by is no part of its model.
_COPY = f"{checkpoint_format.FROZEN}/{REFERENCE}/"

# --- sources --------------------------------------------------------------------------------------

def open_source(source: str, like: ModelConfig | None = None, *, partial: bool = False,
                sharding: Any = None) -> ForeignModel:
    """What init_from names, read through our paths; reads no array yet.

    Args:
        like: a config whose grouping of layers into segments to follow where that is possible.
        partial: the source need not hold a whole model.
        sharding: where a workdir's arrays are placed on the way; None: the first device.

    Raises:
        UserError: no such source, or it does not hold the model that it says it does.
    """
    kind, _, rest = source.partition(":")
    if kind == "hf":
        return hf.read_model(rest, like, partial)
    if kind == "t5x":
        return t5x.read_model(rest, like, partial=partial)
    check_workdir(source)
    return read_workdir(source, like, sharding=sharding)


def check_workdir(source: str) -> None:
    """Raises UserError where a source that is to be a workdir names something else, or is in a bucket
    that cannot be reached."""
    files.path(source)
    if not files.is_url(source) and (match := re.match(r"(\w+):", source)):
        raise UserError(f"{source}: a source is hf:DIR, t5x:DIR or the folder of a workdir; "
                        f"{match.group()} is none.{nearest(match.group(1), ('hf', 't5x'))}")


def read_workdir(workdir: str, like: ModelConfig | None = None, step: int | str = "last", *,
                 sharding: Any = None, averaged: bool = True) -> ForeignModel:
    """The model in a checkpoint of ours, its layers regrouped as those of `like`.

    averaged: the moving average of its parameters, where the run kept one.
    """
    record = manager.read_record(workdir, step)
    stored = from_mapping(ModelConfig, record.config["model"], "model")
    as_ours = functools.partial(workdirs.model_of, workdir, stored, like=like, step=record.step)
    frozen = {path for path in record.arrays if path.startswith(f"{checkpoint_format.FROZEN}/")}
    if any(not path.startswith(_COPY) for path in frozen):
        merged = _merged(workdir, record, averaged)
        return as_ours(merged, merged.__getitem__, collective=False)
    arrays = {path.removeprefix("params/"): info for path, info in record.arrays.items()
              if path.startswith("params/")}

    @functools.lru_cache(maxsize=1)   # layers of one stack are read one after another
    def read(path: str) -> np.ndarray:
        info = arrays[path]
        wanted = jax.ShapeDtypeStruct(info.shape, jnp.dtype(info.dtype), sharding=sharding)
        params, _ = manager.restore_params(workdir, tree.unflatten({path: wanted}), record.step,
                                           partial=True, averaged=averaged)
        return np.asarray(tree.flatten(params)[path].addressable_data(0))
    return as_ours(arrays, read, collective=True)


def _merged(workdir: os.PathLike | str, record: checkpoint_format.Record, averaged: bool
            ) -> dict[str, np.ndarray]:
    """The whole model of a checkpoint that refers to its frozen parameters."""
    program = alone(saved(record.config), averaged)
    params, _ = restore(program, workdir, record.step)
    return {path: np.asarray(x.addressable_data(0)) for path, x in tree.flatten(params).items()}


def alone(run: RunConfig, averaged: bool = True) -> Program:
    """The run's model on one device, or whole on each device of several processes.

    averaged: its eval.ema.
    """
    devices = jax.devices() if jax.process_count() > 1 else jax.devices()[:1]
    return build(dataclasses.replace(
        run, mesh=MeshConfig(data=len(devices)), sharding=ShardingConfig(), eval=EvalConfig(ema=averaged),
        train=TrainConfig(global_batch_size=len(devices), seed=run.train.seed)), devices)


# --- loading --------------------------------------------------------------------------------------

def start(program: Program) -> dict:
    """The state of step 0: parameters of init_from, or fresh ones where it names nothing."""
    return program.start(_base(program))


def frozen(program: Program) -> dict:
    """state["frozen"], which checkpoints do not hold, as the run's start made it."""
    return start(program)["frozen"]


def parameters(program: Program, fresh: Callable[[], Mapping] | None = None) -> dict:
    """The parameters that config.init_from names, placed by the program's shardings.

    Args:
        fresh: gives initialised parameters, for those that the map leaves fresh.

    Raises:
        UserError: see open_source and assign; or the map leaves parameters fresh and `fresh` is
            None, as in evaluation, where they would be random.
    """
    config, table = program.config, program.table
    abstract = tree.flatten(program.abstract_params)
    everywhere = jax.sharding.NamedSharding(program.mesh, jax.sharding.PartitionSpec())
    source = open_source(config.init_from, config.model, partial=bool(config.init_map),
                         sharding=everywhere)
    plan = assignment.assign(table, source.shapes, config.init_map, source.where, peft.added(table))
    if plan.fresh and fresh is None:
        raise UserError(f"init_map leaves {_some(plan.fresh)} fresh, that is random, which is "
                        "for training only.")
    for line in assignment.describe(plan, source, table, config.model):
        log.say(line)
    same_vocabulary.check(config, plan.loaded, source)
    if source.tensors.collective and plan.loaded == {p: p for p in table} and all(
            source.tensors.shapes.get(path) == info.shape for path, info in table.items()):
        # A workdir's own layout: every process reads its shards, all parameters at once.
        return manager.restore_params(config.init_from, program.abstract_params)[0]
    left = tree.flatten(fresh()) if plan.fresh else {}
    params = {path: _load(source, plan.loaded[path], info, abstract[path])
              if path in plan.loaded else left[path] for path, info in table.items()}
    if peft.PROMPT in plan.fresh:
        params[peft.PROMPT] = _common_tokens(params[peft.EMBEDDING], abstract[peft.PROMPT],
                                             config.train.seed)
    return tree.unflatten(params)


def _common_tokens(embedding_VD: jax.Array, prompt: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    draw = jax.jit(lambda e: peft.vocabulary_prompt(e, prompt.shape[0], jax.random.key(seed)),
                   out_shardings=prompt.sharding)
    return draw(jax.device_put(embedding_VD, jax.sharding.NamedSharding(
        prompt.sharding.mesh, jax.sharding.PartitionSpec())))


def restore(program: Program, workdir: os.PathLike | str | None, step: int | str = "last"
            ) -> tuple[dict, int]:
    """(parameters, step) of a workdir's checkpoint; without a workdir of config.init_from.

    They are those of the whole model: what a checkpoint trained of it, merged with the rest.
    """
    if workdir is None:
        return parameters(program), 0
    trained, record = _restore_trained(program, workdir, step)
    state = {"params": trained}
    if program.tuning.freezes:
        state = _over_frozen(program, workdir, trained, record)
    return program.whole_params(state), record.step


def restore_state(program: Program, workdir: os.PathLike | str, step: int | str = "last"
                  ) -> tuple[dict, int]:
    """(a state with a checkpoint's parameters and a fresh optimizer, the checkpoint's step)."""
    trained, record = _restore_trained(program, workdir, step)
    if "frozen" in program.abstract_state:
        return _over_frozen(program, workdir, trained, record), record.step
    return program.start(trained), record.step


def _restore_trained(program, workdir, step) -> tuple[dict, checkpoint_format.Record]:
    averaged = program.config.eval.ema
    params, record = manager.restore_params(workdir, program.abstract_state["params"], step,
                                            averaged=averaged)
    _say_average(record, averaged)
    ours, saved = program.config.data, record.config["data"]
    if (ours.vocabulary, ours.train) != (saved["vocabulary"], saved["train"]) and same_vocabulary.names_one(ours):
        same_vocabulary.compare(ours, str(workdir))
    return params, record


def _say_average(record: checkpoint_format.Record, averaged: bool) -> None:
    if any(path.startswith(f"{checkpoint_format.AVERAGE}/") for path in record.arrays):
        log.say(f"parameters of step {record.step}: " + (
            "their moving average (eval.ema=False takes those of the step itself)" if averaged else
            "those of the step itself (eval.ema=True takes their moving average)"))


def _over_frozen(program, workdir, trained, record) -> dict:
    """A state with these trained parameters over the frozen ones that the checkpoint refers to."""
    state = program.start(_base(program), trained)
    checkpoint_format.check_frozen(workdir, record, state["frozen"])
    return state


def _base(program: Program) -> dict:
    if not program.config.init_from:
        return program.init_params()
    return parameters(program, program.init_params)


def _load(source: ForeignModel, path: str, info: ParamInfo, abstract: jax.ShapeDtypeStruct
          ) -> jax.Array:
    """One parameter; each process reads the parts that its devices hold."""
    fits = assignment.fit(info, source.shapes[path]) == "as is"
    whole = None
    if not fits or source.tensors.collective:
        whole = source.read(path, abstract.dtype)
        whole = whole if fits else assignment.fitted(whole, info)

    def read(index):
        return source.read(path, abstract.dtype, index) if whole is None else whole[index]

    parts: dict[str, np.ndarray] = {}   # devices that hold the same part read it once

    def part(index):
        if str(index) not in parts:
            parts[str(index)] = np.ascontiguousarray(read(index))
        return parts[str(index)]
    return jax.make_array_from_callback(abstract.shape, abstract.sharding, part)


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more
