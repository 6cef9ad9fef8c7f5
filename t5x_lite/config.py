"""A run as frozen dataclasses, and the ConfigDict that a command line edits.

The dataclasses are the source of truth: fields, types, defaults and their comments stand
there. A config file returns `to_config_dict(RunConfig(...))`, locked, so that
`--config.model.embed_dim=256` is checked for name and type by ml_collections;
`from_mapping` turns the edited ConfigDict (or the JSON that a checkpoint holds) back and
names the dotted field of anything that does not fit.
"""

import ast
import dataclasses
import importlib.util
import json
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import ml_collections

from t5x_lite import errors, files
from t5x_lite.checkpoints.config import CheckpointConfig
from t5x_lite.data.config import DataConfig
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.errors import Bounds, Count, Rate, Seed, UserError, at_least, nearest, one_of, refuse
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.peft import PeftConfig
from t5x_lite.parallel.offload import OFFLOADS, Places
from t5x_lite.parallel.sharding import DEFAULT_RULES, MeshConfig
from t5x_lite.running import profile
from t5x_lite.running.clock import WatchdogConfig
from t5x_lite.training.batch_ramp import BatchRampConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.precision import LossScaleConfig
from t5x_lite.training.trackers import TrackConfig

BAD_STEPS = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    num_steps: Count = 1000
    global_batch_size: Count = 128    # sequences an optimizer step, over all devices
    batch_ramp: BatchRampConfig = BatchRampConfig()   # smaller batches before that one
    accumulation: Count = 1           # micro-batches an optimizer step is split into
    seed: Seed = 0                   # of parameters, dropout and, unless data.seed is given, data
    log_every: Count = 10             # steps between lines of metrics.jsonl
    # A step whose loss or update is not finite, or whose loss is above spike_bound: stop before
    # anything of it is saved, or skip it (parameters and optimizer stay as they were).
    bad_steps: str = "stop"         # one of BAD_STEPS
    max_bad_steps: Count = 10         # bad steps in a row after which skipping ends the run
    # Robust standard deviations above the median of the last losses from which a loss is bad
    # (running/health.py); 0: none is. OLMo's skip-step has 6.
    spike_bound: float = 0.0
    # The gradient noise scale, about the largest useful batch in rows, from the micro-batches of each
    # step: train/noise_scale (steps.noise_scale). Needs accumulation of 2 or more.
    noise_scale: bool = False
    # Decay a step of an exponential moving average of the parameters that train, float32, beside the
    # optimizer's moments; 0: none. Evaluation and samples then use it (eval.ema).
    ema_decay: Rate = 0.0
    # Steps, FIRST:LAST, of which a trace goes to WORKDIR/profile, for xprof or TensorBoard; "": none.
    profile_steps: str = ""
    watchdog: WatchdogConfig = WatchdogConfig()   # seconds after which a run counts as stuck

    def __post_init__(self):
        profile.parse(self.profile_steps)
        one_of("train.bad_steps", self.bad_steps, BAD_STEPS)
        at_least("train.max_bad_steps", self.max_bad_steps, 1)
        if self.noise_scale and self.accumulation < 2:
            raise UserError("train.noise_scale=True compares micro-batches with their sum: set "
                            "train.accumulation to 2 or more.")
        at_least("train.spike_bound", self.spike_bound, 0, "0 means that no loss is a spike.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation in the loop and by t5x_lite.eval."""

    every: Count = 1000               # steps between evaluations; the last step always evaluates
    at_start: bool = False          # before the first step as well: curves then begin at step 0
    batch_size: int = 0             # sequences; 0: train.global_batch_size
    # At most so many rows of each task, whatever the batch size, so that the held-out text is the
    # same in all runs; 0: the whole split.
    num_examples: int = 0
    num_batches: int = 0            # at most so many batches, if that is less; 0: no such limit
    # Use the moving average of the parameters, where the run keeps one (train.ema_decay): here, and in
    # eval, infer and interactive; False: the parameters of the step itself.
    ema: bool = True
    # End the run after so many evaluations in a row without a better checkpoint.best, or loss where
    # that is empty; 0: never.
    stop_after: int = 0
    samples: int = 0                # inputs completed on the screen after training
    metrics: bool = True            # decode and score for the metric functions of the tasks
    # Predictions read inputs at so many widths, data.inputs_length, its half, its quarter …, each row
    # at the least that holds it; a width compiles once. 1: all at data.inputs_length.
    length_buckets: Count = 3
    # infer: gather the parameters over mesh.fsdp once and not at every token; False where a
    # device cannot hold them.
    gather_params: bool = True
    decode: DecodeConfig = DecodeConfig()   # how, for metrics and by default in infer


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """What is split over which mesh axes."""

    # What mesh.fsdp splits besides the batch (ZeRO, Rajbhandari et al. 2020): 1 the optimizer
    # state; 2 the gradients too; 3 the parameters too, gathered layer by layer for use.
    zero: Annotated[int, Bounds(1, 3)] = 3
    # Split norms, dropout and residuals over mesh.tensor too, by length (Megatron's sequence
    # parallelism, Korthikanti et al. 2022): their activations then cost 1/tensor of the memory.
    sequence_parallel: bool = False
    # Where parameters and optimizer state are between their visits to the device, a layer at a time;
    # one of offload.OFFLOADS: none, optimizer_host, params_host (both in the host's memory; needs
    # remat) or optimizer_disk (the optimizer's in files in offload_folder).
    offload: str = "none"
    offload_folder: str = ""        # on a local disk; its files are scratch, and gone with the process
    offload_optimizer: bool = False   # offload=optimizer_host, as it was called before
    # Logical axis -> mesh axes; see sharding.DEFAULT_RULES.
    rules: dict[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: dict(DEFAULT_RULES))

    def __post_init__(self):
        one_of("sharding.offload", self.offload, OFFLOADS)
        if self.offload_optimizer and self.offload not in ("none", "optimizer_host"):
            raise UserError(f"sharding.offload_optimizer=True is sharding.offload=optimizer_host, and "
                            f"sharding.offload={self.offload}: set offload_optimizer=False.")

    @property
    def places(self) -> Places:
        """Where a state's arrays are."""
        return OFFLOADS["optimizer_host" if self.offload_optimizer else self.offload]


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
    track: TrackConfig = TrackConfig()   # W&B, trackio
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingConfig = dataclasses.field(default_factory=ShardingConfig)
    precision: str = "float32"      # a name of precision.POLICIES
    loss_scale: LossScaleConfig = LossScaleConfig()   # of precision=fp16; others have none
    # hf:DIR, t5x:DIR or a workdir whose parameters to start from, "": fresh ones; and which of
    # them come from where, see init_from.py.
    init_from: str = ""
    init_map: tuple[tuple[str, str], ...] = ()
    # Another run's workdir, or WORKDIR/checkpoints/STEP of it, to go on from with its parameters,
    # optimizer, place in the data and counts, as if it were this run's own: another schedule from
    # there on, say. "": none.
    branch_from: str = ""


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
        UserError: an unknown field, a value of another type, or a number out of the bounds that
            stand beside its field (errors.py), by its dotted name.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return from_mapping(args[0], value, where)
    if origin in (types.UnionType, typing.Union):
        return _one_of_types(args, value, where)
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, where)
    if origin is tuple:
        return _tuple(args, value, where)
    if origin is dict:
        if not isinstance(value, (Mapping, ml_collections.ConfigDict)):
            raise refuse(where, value, "a section of names and their values")
        return {k: from_mapping(args[1], v, f"{where}.{k}") for k, v in value.items()}
    return _scalar(kind, value, where)


def _one_of_types(kinds: tuple, value: Any, where: str) -> Any:
    """The value as the type among `kinds` that it is an instance of, else as the first."""
    if value is None and type(None) in kinds:
        return None
    options = [kind for kind in kinds if kind is not type(None)]
    matching = [kind for kind in options if isinstance(kind, type) and isinstance(value, kind)]
    return from_mapping((matching or options)[0], value, where)


def _section(kind: Any, value: Any, where: str) -> Any:
    hints = errors.hints_of(kind)
    if not isinstance(value, (Mapping, ml_collections.ConfigDict)):
        raise refuse(where, value, f"a section with the fields {', '.join(hints)}")
    for name in value:
        errors.known(where, "field", name, hints)
    fields = {}
    for name in value:
        field = f"{where}.{name}"
        fields[name] = from_mapping(hints[name], value[name], field)
        errors.check(fields[name], field, hints[name])
    lacking = [f.name for f in dataclasses.fields(kind) if f.name not in fields
               and f.default is f.default_factory is dataclasses.MISSING]
    if lacking:
        raise refuse(where, dict(value), f"a section with {' and '.join(lacking)}, which it lacks")
    return kind(**fields)


def _tuple(kinds: tuple, value: Any, where: str) -> tuple:
    """A tuple of these kinds; (kind, ...) is any number of one."""
    if isinstance(value, str) and kinds[0] is str:
        value = tuple(part for part in value.split(",") if part)
    if not isinstance(value, (tuple, list)):
        raise refuse(where, value, "a tuple")
    each = [kinds[0]] * len(value) if kinds[-1] is Ellipsis else kinds
    if len(each) != len(value):
        raise UserError(f"{where}={value!r}: must have {len(each)} items.")
    return tuple(from_mapping(a, v, f"{where}[{i}]")
                 for i, (a, v) in enumerate(zip(each, value, strict=True)))


def _scalar(kind: Any, value: Any, where: str) -> Any:
    is_bool = isinstance(value, bool)
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not is_bool:
        try:
            return float(value)
        except OverflowError:
            raise refuse(where, value, "a number that a float can hold") from None
    if not isinstance(value, kind) or (is_bool and kind is not bool):
        whole = kind is int and isinstance(value, float) and value.is_integer()
        raise refuse(where, value, f"{kind.__name__}, not {type(value).__name__}"
                     + (f": write {int(value)}" if whole else ""))
    return value


# Dotted names of fields that configs written by earlier versions hold and that do nothing now.
RETIRED = frozenset({"sharding.rules.act_head_dim", "sharding.rules.act_expert"})


def saved(mapping: Mapping) -> RunConfig:
    """The run of a config.json, or of a checkpoint's record, which an earlier version may have
    written: what it holds of RETIRED is left out."""
    return from_mapping(RunConfig, _without_retired(mapping, ""))


def _without_retired(section: Mapping, where: str) -> dict:
    kept = {}
    for name, value in section.items():
        if f"{where}{name}" in RETIRED:
            continue
        kept[name] = _without_retired(value, f"{where}{name}.") \
            if isinstance(value, Mapping) else value
    return kept


def replace(config: Any, path: str, value: Any) -> Any:
    """The dataclass with the field at a dotted path replaced: replace(run, "train.seed", 3)."""
    head, _, rest = path.partition(".")
    return dataclasses.replace(
        config, **{head: replace(getattr(config, head), rest, value) if rest else value})


def field_names(run: RunConfig) -> list[str]:
    """The dotted names of all that a config holds, sections and items of lists left out."""
    def visit(value: Any, where: str):
        parts = ((f".{name}", part) for name, part in value.items()) if isinstance(value, dict) \
            else ((f"[{i}]", part) for i, part in enumerate(value)) if isinstance(value, list) else ()
        inner = [name for suffix, part in parts for name in visit(part, where + suffix)]
        return inner or [where.removeprefix(".")]
    return visit(json.loads(to_json(run)), "")


def module_of(path: str, function: str, instead: str) -> tuple[types.ModuleType, str | None]:
    """The module of a config file "FILE.py:ARGUMENT", and its argument.

    Args:
        function: what the module must have.
        instead: what to do about a file that has it not.
    Raises:
        UserError: no such file, or one without the function.
    """
    name, _, argument = path.partition(":")
    if not pathlib.Path(name).is_file():
        raise UserError(f"--config={name} does not exist: {instead}.")
    spec = importlib.util.spec_from_file_location(pathlib.Path(name).stem, name)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={name} is no file of Python: {instead}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise UserError(f"--config={name} has no {function}(): {instead}.")
    return module, argument or None


def load(path: files.Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that a run wrote, with overrides as `override` takes them.

    Raises:
        UserError: no such file, a damaged one, or an override that does not fit.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: is that the workdir of a run?")
    try:
        mapping = read(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). The checkpoints of the run hold its config, "
                        "too: checkpoints/STEP/record/record.json.") from error
    try:
        run = saved(mapping)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return override(run, overrides)


def read(path: files.Path) -> dict[str, Any]:
    """What a config.json holds. Raises ValueError where that is no object of JSON."""
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"no object but a {type(mapping).__name__}")
    return mapping


def override(run: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run with "dotted.field=value" overrides, an item of a list by its number in brackets:

        train.num_steps=10    model.decoder.segments[0].repeats=4    checkpoint.keep_every=None

    A value is JSON, a constant or tuple of Python (as --config.field=value takes them), or else a
    string.

    Raises:
        UserError: an override that names no field or does not fit its type.
    """
    config = json.loads(to_json(run))
    for text in overrides:
        field, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"override {text!r} names no field of the config. Write "
                            "section.field=value.")
        section, last = _holder(config, field, text)
        parsed = parse_value(value)
        plain = isinstance(section[last], str) and not isinstance(parsed, (str, type(None)))
        section[last] = value if plain else parsed   # a name may look like a number
    return from_mapping(RunConfig, config)


def _holder(config: dict, field: str, text: str) -> tuple[Any, str | int]:
    """(the section or list, the name or number in it) of a dotted field in a config of JSON."""
    steps: list[str | int] = [int(part) if part.isdigit() else part
                              for part in field.replace("[", ".").replace("]", "").split(".")]
    section: Any = config
    for i, step in enumerate(steps):
        if i:
            section = section[steps[i - 1]]
        problem = _problem(section, step, _dotted(steps[:i]), config)
        if problem:
            raise UserError(f"override {text!r}{problem}")
    return section, steps[-1]


def _dotted(steps: Sequence[str | int]) -> str:
    """"model.decoder.segments[0]" of its parts."""
    return "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps).removeprefix(".")


def _problem(section: Any, step: str | int, where: str, config: dict) -> str | None:
    """Why a section of a config has no such field or item, None where it has."""
    if section is None:
        return f": {where} is None here; give the whole section, {where}={{…}} in JSON."
    if isinstance(section, list) and isinstance(step, int):
        short = f": {where} has {len(section)} items, counted from 0."
        return short if step >= len(section) else None
    if isinstance(section, list):
        return f": {where} is a list: take an item, {where}[0]."
    if isinstance(step, int):
        return f": {where} is no list."
    if isinstance(section, dict) and step in section:
        return None
    names = section if isinstance(section, dict) else config
    return f" names no field of the config.{nearest(step, names)} Write section.field=value."


def parse_value(text: str) -> Any:
    """The value of an override: JSON, True, False, None, a tuple in parentheses, or the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass   # not JSON: "False" and "(1, 2)" are Python's, and most else is a string
    if text not in ("True", "False", "None") and not text.startswith("("):
        return text
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
