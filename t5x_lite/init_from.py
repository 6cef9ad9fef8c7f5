"""Parameters from elsewhere: `--config.init_from=SOURCE` in train, eval and infer.

    hf:DIR    a folder of Hugging Face transformers (config.json and safetensors)
    t5x:DIR   a native T5X checkpoint, a local folder or gs://BUCKET/PATH
    WORKDIR   a workdir of t5x_lite, its checkpoints folder or the folder of one step

Without a map the source must hold the model's parameters, all of them and no others.
`init_map` makes a partial load of it: (regex, replacement) pairs over the model's paths, as
in parameters.txt. The first regex that matches a whole path says where that parameter comes
from, with \\1 for what a group matched; "" leaves it fresh; a path that none matches comes from
the same path. What the source holds beyond that is skipped.

    (("decoder/.*", ""),)                                      the encoder only
    (("decoder/(.*self_attention.*)", r"encoder/\\1"),)        also start a decoder from an encoder
    ((r"(.*)/mlp/experts/(.*)", r"\\1/mlp/\\2"), (".*/router/.*", ""))   sparse upcycling

A workdir of parameter-efficient tuning (models/peft.py) counts as the whole model, merged. Prompts and
adapters that the source does not hold are left fresh without a rule; a fresh prompt starts as
the embeddings of common tokens.

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
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import log, tree
from t5x_lite.build import Program, build
from t5x_lite.checkpoints import format as checkpoint_format, manager
from t5x_lite.config import EvalConfig, RunConfig, ShardingConfig, TrainConfig, from_mapping, saved
from t5x_lite.data import tasks as data_tasks, vocabulary as data_vocabulary
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError, nearest
from t5x_lite.formats import hf, t5x
from t5x_lite.formats.functions import differences
from t5x_lite.formats.mapping import (
    ForeignModel,
    Layout,
    Placed,
    Shape,
    Slot,
    Tensors,
    like_segments,
    parse,
)
from t5x_lite.models import peft
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.language_model import Model
from t5x_lite.models.params import ParamInfo
from t5x_lite.parallel.sharding import MeshConfig

InitMap = Sequence[tuple[str, str]]

_SHOWN = 40   # lines of each kind that `describe` gives


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
    """Raises UserError where a source that is to be a workdir names something else."""
    if match := re.match(r"(\w+):(//)?", source):
        fix = (f" A T5X checkpoint in a bucket is t5x:{source}." if match.group(2) else
               nearest(match.group(1), ("hf", "t5x")))
        raise UserError(f"{source}: a source is hf:DIR, t5x:DIR or the local folder of a workdir; "
                        f"{match.group()} is none.{fix}")


def read_workdir(workdir: str, like: ModelConfig | None = None, step: int | str = "last", *,
                 sharding: Any = None) -> ForeignModel:
    """The model in a checkpoint of ours, its layers regrouped as those of `like`."""
    record = manager.read_record(workdir, step)
    stored = from_mapping(ModelConfig, record.config["model"], "model")
    config = like_segments(stored, like)
    arrays = {path.removeprefix("params/"): info for path, info in record.arrays.items()
              if path.startswith("params/")}
    merged = None
    if any(path.startswith("frozen/") for path in record.arrays):
        merged = arrays = _merged(workdir, record)
    held = {}   # (path with "*", layer) -> (stored path, index in its stack)
    for path in arrays:
        generic, layers = parse(stored, path)
        for i, layer in enumerate(layers or [None]):
            held[generic, layer] = (path, i)

    def slot(generic, layer):
        path, i = held[generic, layer]
        view = Layout(lambda s: s, (lambda t: t) if layer is None else (lambda t: t[i]))
        return Slot(path, arrays[path].shape, view)

    table = Model(config).table
    placed = {}
    for path, info in table.items():
        generic, layers = parse(config, path)
        if all((generic, n) in held for n in layers or [None]):
            stacked = int(layers is not None)
            placed[path] = Placed(info.shape[:stacked], info.shape[stacked:],
                                  tuple(slot(generic, n) for n in layers or [None]))
    last: tuple[str, np.ndarray | None] = ("", None)   # layers of one stack are read together

    def read(path):
        nonlocal last
        if merged is not None:
            return merged[path]
        if last[0] != path:
            info = arrays[path]
            wanted = jax.ShapeDtypeStruct(info.shape, jnp.dtype(info.dtype), sharding=sharding)
            params, _ = manager.restore_params(workdir, tree.unflatten({path: wanted}),
                                                  record.step, partial=True)
            last = (path, np.asarray(tree.flatten(params)[path].addressable_data(0)))
        return last[1]

    tensors = Tensors({p: tuple(i.shape) for p, i in arrays.items()},
                      {p: jnp.dtype(i.dtype) for p, i in arrays.items()}, read,
                      collective=merged is None)
    return ForeignModel(workdir, config, True, {p: table[p] for p in placed}, placed, tensors,
                        step=record.step)


def _merged(workdir: os.PathLike | str, record: checkpoint_format.Record) -> dict[str, np.ndarray]:
    """The whole model of a checkpoint that refers to its frozen parameters."""
    params, _ = restore(alone(saved(record.config)), workdir, record.step)
    return {path: np.asarray(x.addressable_data(0)) for path, x in tree.flatten(params).items()}


def alone(run: RunConfig) -> Program:
    """The run's model on one device, or whole on each device of several processes."""
    devices = jax.devices() if jax.process_count() > 1 else jax.devices()[:1]
    return build(dataclasses.replace(
        run, mesh=MeshConfig(data=len(devices)), sharding=ShardingConfig(), eval=EvalConfig(),
        train=TrainConfig(global_batch_size=len(devices), seed=run.train.seed)), devices)


# --- which parameter from where -------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Assignment:
    """Where every parameter of a model comes from."""

    loaded: dict[str, str]         # our path -> the source's
    fresh: tuple[str, ...]         # left as they were initialised
    skipped: tuple[str, ...]       # held by the source and not asked for


def assign(table: Mapping[str, ParamInfo], found: Mapping[str, Shape], init_map: InitMap,
           where: str, added: frozenset[str] = frozenset()) -> Assignment:
    """Applies the map, or without one demands that both sides are the same.

    Args:
        found: {path: shape} of the source.
        added: paths that no source need hold.

    Raises:
        UserError: a rule that is no regex or matches nothing; parameters that are missing,
            extra or misshapen, all of them.
    """
    loaded, fresh, used = {}, [], set()
    for path in table:
        source = "" if path in added and path not in found else path
        for i, (pattern, replacement) in enumerate(init_map):
            try:
                match = re.fullmatch(pattern, path)
                if match:
                    used.add(i)
                    source = match.expand(replacement)
                    break
            except (re.error, IndexError) as error:
                raise UserError(f"init_map[{i}]=({pattern!r}, {replacement!r}): {error}.") \
                    from error
        if source:
            loaded[path] = source
        else:
            fresh.append(path)
    for i, (pattern, _) in enumerate(init_map):
        if i not in used:
            raise UserError(f"init_map[{i}]: {pattern!r} matches no parameter of the model that "
                            f"an earlier rule left over.{nearest(pattern, table)} "
                            "They are listed in a workdir's parameters.txt.")
    expected = {source: table[path] for path, source in loaded.items()}
    difference = tree.diff({p: _Wanted(info) for p, info in expected.items()}, found,
                           same=lambda wanted, shape: _how(wanted.info, shape) is not None)
    skipped = difference.extra
    if init_map:
        difference = dataclasses.replace(difference, extra=())
    if difference:
        raise UserError(
            f"{where} does not hold the parameters that the model needs (expected: the model's; "
            f"found: the source's):\n{difference}\nLoad a part of them with "
            "--config.init_map=\"((regex, source path or ''), …)\", where '' leaves fresh.")
    return Assignment(loaded, tuple(fresh), skipped)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A parameter that prints as its shape."""

    info: ParamInfo

    def __str__(self) -> str:
        return str(self.info.shape)


def _how(info: ParamInfo, shape: Shape) -> str | None:
    """How an array of this shape becomes the parameter: as is | padded | copied; None: not."""
    if info.shape == tuple(shape):
        return "as is"
    if len(info.shape) == len(shape):
        grown = [axis for axis, ours, theirs in zip(info.logical_axes, info.shape, shape,
                                                    strict=True) if ours != theirs]
        if grown == ["vocab"] and all(a >= b for a, b in zip(info.shape, shape, strict=True)):
            return "padded"
    if "expert" in info.logical_axes:
        at = info.logical_axes.index("expert")
        if info.shape[:at] + info.shape[at + 1:] == tuple(shape):
            return "copied"
    return None


# --- vocabularies ---------------------------------------------------------------------------------

_TABLE = peft.EMBEDDING


def _check_vocabulary(config: RunConfig, plan: Assignment, source: ForeignModel) -> None:
    """Raises UserError where the run's token ids mean something else in the source."""
    if _TABLE not in plan.loaded or any(re.fullmatch(p, _TABLE) for p, _ in config.init_map):
        return
    if not _names_one(config.data):
        return
    vocabulary = data_tasks.vocabulary_of(config.data)
    rows = source.shapes[plan.loaded[_TABLE]][0]
    # Sentinels that were added here to a tokenizer.json's own ids are new to any checkpoint.
    size = getattr(vocabulary, "required_size", vocabulary.vocab_size)
    if size > rows:
        raise UserError(f"{_named(config.data)} has {size} ids and "
                        f"{source.where} {rows} rows: it was trained with another. {_FIX}")
    _compare_pieces(config.data, source.where)


_FIX = ("Set data.vocabulary to that of the checkpoint, or leave the embeddings fresh with a rule "
        f"of init_map for {_TABLE} (and logits/.* where they are not tied).")


def _compare_pieces(config: DataConfig, source: str) -> None:
    ours, theirs = data_vocabulary.pieces_of(data_tasks.vocabulary_of(config)), _pieces_of_source(source)
    if not ours or not theirs:
        log.say(f"  {source} names no vocabulary that {_named(config)} could be compared with")
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b and "<extra_id_" not in a + b:
            raise UserError(f"{_named(config)} is not the vocabulary that {source} was trained "
                            f"with: id {i} is {a!r}, there {b!r}. {_FIX}")


def _pieces_of_source(source: str) -> Sequence[str]:
    kind, _, rest = source.partition(":")
    if kind == "t5x":
        return []
    if kind == "hf":
        return data_vocabulary.pieces_of_folder(pathlib.Path(rest).expanduser())
    saved = from_mapping(DataConfig, manager.read_record(source).config["data"], "data")
    if not _names_one(saved):
        return data_vocabulary.pieces_of_folder(pathlib.Path(source) / "hf")
    try:
        return data_vocabulary.pieces_of(data_tasks.vocabulary_of(saved))
    except UserError as error:   # its file has gone since
        log.say(f"  vocabulary of {source}: {error}")
        return []


def _names_one(config: DataConfig) -> bool:
    return bool(config.vocabulary or config.train)


def _named(config: DataConfig) -> str:
    if config.vocabulary:
        return f"data.vocabulary={config.vocabulary}"
    return f"the vocabulary of data.train={config.train}"


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
    plan = assign(table, source.shapes, config.init_map, source.where, peft.added(table))
    if plan.fresh and fresh is None:
        raise UserError(f"init_map leaves {_some(plan.fresh)} fresh, that is random, which is "
                        "for training only.")
    for line in describe(plan, source, table, config.model):
        log.say(line)
    _check_vocabulary(config, plan, source)
    if source.tensors.collective and plan.loaded == {p: p for p in table} and all(
            source.tensors.shapes.get(path) == info.shape for path, info in table.items()):
        # A workdir's own layout: every process reads its shards, all parameters at once.
        return manager.restore_params(config.init_from, program.abstract_params)[0]
    left = tree.flatten(fresh()) if plan.fresh else {}
    found = {path: _load(source, plan.loaded[path], info, abstract[path])
             if path in plan.loaded else left[path] for path, info in table.items()}
    if peft.PROMPT in plan.fresh:
        found[peft.PROMPT] = _common_tokens(found[peft.EMBEDDING], abstract[peft.PROMPT],
                                            config.train.seed)
    return tree.unflatten(found)


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
    if "frozen" in program.abstract_state:
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
    params, record = manager.restore_params(workdir, program.abstract_state["params"], step)
    ours, saved = program.config.data, record.config["data"]
    if (ours.vocabulary, ours.train) != (saved["vocabulary"], saved["train"]) and _names_one(ours):
        _compare_pieces(ours, str(workdir))
    return params, record


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
    fits = _how(info, source.shapes[path]) == "as is"
    whole = None
    if not fits or source.tensors.collective:
        whole = source.read(path, abstract.dtype)
        whole = whole if fits else _fitted(whole, info)

    def read(index):
        return source.read(path, abstract.dtype, index) if whole is None else whole[index]

    parts: dict[str, np.ndarray] = {}   # devices that hold the same part read it once

    def part(index):
        if str(index) not in parts:
            parts[str(index)] = np.ascontiguousarray(read(index))
        return parts[str(index)]
    return jax.make_array_from_callback(abstract.shape, abstract.sharding, part)


def _fitted(value: np.ndarray, info: ParamInfo) -> np.ndarray:
    """A whole array made to have the parameter's shape; see `_how`."""
    if _how(info, value.shape) == "copied":
        at = info.logical_axes.index("expert")
        return np.broadcast_to(np.expand_dims(value, at), info.shape)
    at = info.logical_axes.index("vocab")
    mean = value.mean(axis=at, keepdims=True, dtype=np.float32).astype(value.dtype)
    rows = info.shape[at] - value.shape[at]
    return np.concatenate([value, np.repeat(mean, rows, axis=at)], axis=at)


def describe(plan: Assignment, source: ForeignModel, table: Mapping[str, ParamInfo],
             config: ModelConfig) -> list[str]:
    """What was loaded, skipped and left fresh, in lines."""
    numbers = sum(table[path].size for path in plan.loaded)
    lines = [f"init_from {source.where}: {len(plan.loaded)} parameters loaded "
             f"({numbers:,} numbers), {len(plan.fresh)} left fresh, "
             f"{len(plan.skipped) + len(source.unused)} of the source skipped"]
    moved = [f"{path} from {other}" for path, other in plan.loaded.items() if path != other]
    fitted = [f"{path}: {how}, {source.shapes[other]} to {table[path].shape}"
              for path, other in plan.loaded.items()
              if (how := _how(table[path], source.shapes[other])) != "as is"]
    differing = [d for d in (differences(config, source.config) if source.knows_function else [])
                 if not (fitted and d.startswith("vocab_size:"))]
    for name, items in (("loaded", moved), ("fitted", fitted), ("fresh", plan.fresh),
                        ("skipped", (*plan.skipped, *source.unused)),
                        ("differs", [f"model.{d}" for d in differing])):
        lines += [f"  {name:<8} {item}" for item in items[:_SHOWN]]
        if len(items) > _SHOWN:
            lines.append(f"  {name:<8} … {len(items) - _SHOWN} more")
    return lines


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more
