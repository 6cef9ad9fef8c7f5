"""A run as frozen dataclasses, and the ConfigDict that a command line edits.

The dataclasses are the source of truth: fields, types, defaults and their comments stand
there. A config file returns `to_config_dict(RunConfig(...))`, locked, so that
`--config.model.embed_dim=256` is checked for name and type by ml_collections;
`from_mapping` turns the edited ConfigDict (or the JSON that a checkpoint holds) back and
names the dotted field of anything that does not fit.
"""

import dataclasses
import json
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.data.config import DataConfig
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.errors import UserError, nearest
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.peft import PeftConfig
from t5x_lite.parallel.sharding import DEFAULT_RULES, MeshConfig
from t5x_lite.training.batch_ramp import BatchRampConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.precision import LossScaleConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    num_steps: int = 1000
    global_batch_size: int = 128    # sequences an optimizer step, over all devices
    batch_ramp: BatchRampConfig = BatchRampConfig()   # smaller batches before that one
    accumulation: int = 1           # micro-batches an optimizer step is split into
    seed: int = 0                   # of parameters, dropout and, unless data.seed is given, data
    log_every: int = 10             # steps between lines of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation in the loop and by t5x_lite.eval."""

    every: int = 1000               # steps between evaluations; the last step always evaluates
    batch_size: int = 0             # sequences; 0: train.global_batch_size
    num_batches: int = 0            # at most so many; 0: the whole split
    samples: int = 0                # inputs completed on the screen after training
    metrics: bool = True            # decode and score for the metric functions of the tasks
    # infer: gather the parameters over mesh.fsdp once and not at every token; False where a
    # device cannot hold them.
    gather_params: bool = True
    decode: DecodeConfig = DecodeConfig()   # how, for metrics and by default in infer


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """What is split over which mesh axes."""

    # What mesh.fsdp splits besides the batch (ZeRO, Rajbhandari et al. 2020): 1 the optimizer
    # state; 2 the gradients too; 3 the parameters too, gathered layer by layer for use.
    zero: int = 3
    # Split norms, dropout and residuals over mesh.tensor too, by length (Megatron's sequence
    # parallelism, Korthikanti et al. 2022): their activations then cost 1/tensor of the memory.
    sequence_parallel: bool = False
    # Keep the optimizer state in the host's memory; it visits the device layer by layer.
    offload_optimizer: bool = False
    # Logical axis -> mesh axes; see sharding.DEFAULT_RULES.
    rules: dict[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: dict(DEFAULT_RULES))


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    name: str = "run"
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    peft: PeftConfig = PeftConfig()   # which parameters train; the rest comes from init_from
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingConfig = dataclasses.field(default_factory=ShardingConfig)
    precision: str = "float32"      # a name of precision.POLICIES
    loss_scale: LossScaleConfig = LossScaleConfig()   # of precision=fp16; others have none
    # hf:DIR, t5x:DIR or a workdir whose parameters to start from, "": fresh ones; and which of
    # them come from where, see init_from.py.
    init_from: str = ""
    init_map: tuple[tuple[str, str], ...] = ()


def to_config_dict(value: Any) -> ml_collections.ConfigDict:
    """The locked ConfigDict of a dataclass, nested dataclasses and tuples of them included."""
    config = ml_collections.ConfigDict(_plain(value), convert_dict=True)
    return config.lock()


def to_json(value: Any) -> str:
    """The dataclass as JSON, which `from_mapping` reads back."""
    return json.dumps(_plain(value), indent=1, default=lambda x: x.to_dict())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return tuple(ml_collections.ConfigDict(_plain(v)) if dataclasses.is_dataclass(v)
                     else _plain(v) for v in value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def from_mapping(kind: Any, value: Any, where: str = "config") -> Any:
    """`value` (a ConfigDict, dict, list or scalar) as an instance of the annotated type `kind`.

    Raises:
        UserError: an unknown field, or a value of another type, by its dotted name.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) > 1:
            matching = [a for a in options if isinstance(a, type) and isinstance(value, a)]
            options = matching or options
        return from_mapping(options[0], value, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, (Mapping, ml_collections.ConfigDict)):
            raise UserError(f"{where}={value!r}: must be a section with the fields "
                            f"{', '.join(f.name for f in dataclasses.fields(kind))}.")
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                raise UserError(f"{where}.{name}: no such field.{nearest(name, hints)} "
                                f"Known: {', '.join(hints)}.")
        make: Any = kind
        return make(**{name: from_mapping(hints[name], value[name], f"{where}.{name}")
                       for name in value})
    if origin is tuple:
        if isinstance(value, str) and args[0] is str:
            value = tuple(part for part in value.split(",") if part)
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{where}={value!r}: must be a tuple.")
        each = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(each) != len(value):
            raise UserError(f"{where}={value!r}: must have {len(each)} items.")
        return tuple(from_mapping(a, v, f"{where}[{i}]")
                     for i, (a, v) in enumerate(zip(each, value, strict=True)))
    if origin is dict:
        return {k: from_mapping(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}={value!r}: must be {kind.__name__}, "
                        f"not {type(value).__name__}.")
    return value


def replace(config: Any, path: str, value: Any) -> Any:
    """The dataclass with the field at a dotted path replaced: replace(run, "train.seed", 3)."""
    head, _, rest = path.partition(".")
    return dataclasses.replace(
        config, **{head: replace(getattr(config, head), rest, value) if rest else value})


def load(path: pathlib.Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that a run wrote, with overrides as `override` takes them.

    Raises:
        UserError: no such file, or an override that does not fit.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: is that the workdir of a run?")
    return override(from_mapping(RunConfig, json.loads(path.read_text())), overrides)


def override(run: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run with "dotted.field=value" overrides; a value is JSON, or else a string.

    Raises:
        UserError: an override that names no field or does not fit its type.
    """
    config = json.loads(to_json(run))
    for text in overrides:
        field, equals, value = text.partition("=")
        *parents, last = field.split(".")
        section = config
        for name in parents:
            section = section.get(name) if isinstance(section, dict) else None
        if not equals or not isinstance(section, dict) or last not in section:
            known = section if isinstance(section, dict) else config
            raise UserError(f"override {text!r} names no field of the config."
                            f"{nearest(last, known)} Write section.field=value.")
        try:
            section[last] = json.loads(value)
        except json.JSONDecodeError:
            section[last] = value
    return from_mapping(RunConfig, config)
