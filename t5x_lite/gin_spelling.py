"""T5X's gin bindings as another spelling of our fields: --gin.TRAIN_STEPS=1000 on any door.

    --gin.TRAIN_STEPS=1000                        --config.train.num_steps=1000
    --gin.train.num_steps=1000                    the same: any field of ours
    --gin.utils.SaveCheckpointConfig.period=500   --config.checkpoint.every=500

BINDINGS has a row for each name of theirs; docs/from_t5x.md shows them, and a test reads that page.
A class's module is left out, and its scope where it is training's (train/utils.…); within a scope of
evaluation (train_eval/, infer_eval/) a name sets what evaluation reads: OF_EVALUATION. Values are literals; what refers to another
binding (%NAME, @function) and whole gin files are refused: a config here is a Python file.
"""

import ast
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5x_lite.config import RunConfig, field_names, override
from t5x_lite.errors import UserError, nearest

PAGE = "docs/from_t5x.md"
Changes = dict[str, Any]   # {dotted field: value}


@dataclasses.dataclass(frozen=True)
class Binding:
    """A name of T5X and what it sets here."""

    changes: Callable[[Any, RunConfig], Changes]


def _field(*paths: str) -> Binding:
    return Binding(lambda value, run: dict.fromkeys(paths, value))


def _lengths(value: Any, run: RunConfig) -> Changes:
    names = {"inputs": "data.inputs_length", "targets": "data.targets_length"}
    if not isinstance(value, Mapping) or not value.keys() <= names.keys():
        raise UserError(f"--gin.TASK_FEATURE_LENGTHS={value!r}: must be {{'inputs': NUMBER, "
                        "'targets': NUMBER}.")
    return {names[name]: length for name, length in value.items()}


def _everywhere(field: str) -> Binding:
    """Every field of the model of this name: of the stacks, their attention and their MLPs."""
    return Binding(lambda value, run: {
        name: value for name in field_names(run)
        if name.startswith("model.") and name.endswith(f".{field}")})


def _layers(stack: str) -> Binding:
    def change(value: Any, run: RunConfig) -> Changes:
        config = getattr(run.model, stack)
        if config is None or len(config.segments) != 1 or len(config.segments[0].blocks) != 1:
            raise UserError(f"--gin binding with the value {value!r}: model.{stack} is not one block "
                            f"repeated; set model.{stack}.segments[0].repeats and so on.")
        return {f"model.{stack}.segments[0].repeats": value}
    return Binding(change)


def _microbatches(value: Any, run: RunConfig) -> Changes:
    return {"train.accumulation": 1 if value is None else value}


def _initial(value: Any, run: RunConfig) -> Changes:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value in (None, "", [], ()):
        return {"init_from": ""}
    if not isinstance(value, str):
        raise UserError(f"--gin binding of a checkpoint with the value {value!r}: must be one folder.")
    known = re.match(r"(hf|t5x|mtf):", value)
    return {"init_from": value if known else f"t5x:{value}"}


def _dtype(value: Any, run: RunConfig) -> Changes:
    names = {"bfloat16": "bf16", "float32": "float32", "float16": "fp16"}
    if value not in names:
        raise UserError(f"--gin binding of a dtype with the value {value!r}: must be one of {', '.join(names)}.")
    return {"precision": names[value]}


def _same_lengths(value: Any, run: RunConfig) -> Changes:
    asked = _lengths(value, run)
    here = {"data.inputs_length": run.data.inputs_length, "data.targets_length": run.data.targets_length}
    if any(here[name] != length for name, length in asked.items()):
        raise UserError(f"--gin binding of an evaluation's task_feature_lengths with the value {value!r}: rows of "
                        f"evaluation are as long as training's, {here['data.inputs_length']} and "
                        f"{here['data.targets_length']}; bind TASK_FEATURE_LENGTHS before it, or leave it out.")
    return {}


def _refused(why: str, *but: Any) -> Binding:
    """A binding that has no field here, whatever its value; one of `but` is what is done here anyhow."""
    def refuse(value: Any, run: RunConfig) -> Changes:
        if value in but:
            return {}
        raise UserError(f"--gin binding with the value {value!r}: {why}")
    return Binding(refuse)


BINDINGS: Mapping[str, Binding] = {
    "MIXTURE_OR_TASK_NAME": _field("data.train", "data.validation"),
    "MIXTURE_OR_TASK_MODULE": _field("data.task_modules"),
    "TASK_FEATURE_LENGTHS": Binding(_lengths),
    "TRAIN_STEPS": _field("train.num_steps"),
    "BATCH_SIZE": _field("train.global_batch_size"),
    "DROPOUT_RATE": _everywhere("dropout_rate"),
    "NUM_HEADS": _everywhere("num_heads"),
    "HEAD_DIM": _everywhere("head_dim"),
    "MLP_DIM": _everywhere("mlp_dim"),
    "EMBED_DIM": _field("model.embed_dim"),
    "NUM_ENCODER_LAYERS": _layers("encoder"),
    "NUM_DECODER_LAYERS": _layers("decoder"),
    "ACTIVATION_DTYPE": Binding(_dtype),
    "LEARNING_RATE": _field("optimizer.schedule.base_learning_rate"),
    "WARMUP_STEPS": _field("optimizer.schedule.warmup_steps"),
    "EVAL_STEPS": _field("eval.num_batches"),
    "CHECKPOINT_PERIOD": _field("checkpoint.every"),
    "INITIAL_CHECKPOINT_PATH": Binding(_initial),
    "CHECKPOINT_PATH": Binding(_initial),
    "EVAL_PERIOD": _field("eval.every"),
    "EVALUATOR_NUM_EXAMPLES": _field("eval.num_examples"),
    "RANDOM_SEED": _field("train.seed"),
    "LABEL_SMOOTHING": _field("objective.label_smoothing"),
    "Z_LOSS": _field("objective.z_loss"),
    "LOSS_NORMALIZING_FACTOR": _refused(
        "losses here are means over the tokens of the global batch; leave it out, and divide the "
        "learning rate of an optimizer that is not Adafactor instead.", None),
    "USE_CACHED_TASKS": _refused(
        "name the folders of cached tasks by --config.data.cached_tasks=DIR.", False),
    "train.total_steps": _field("train.num_steps"),
    "train.eval_period": _field("eval.every"),
    "train.eval_steps": _field("eval.num_batches"),
    "train.random_seed": _field("train.seed"),
    "train.stats_period": _field("train.log_every"),
    "DatasetConfig.mixture_or_task_name": _field("data.train", "data.validation"),
    "DatasetConfig.task_feature_lengths": Binding(_lengths),
    "DatasetConfig.batch_size": _field("train.global_batch_size"),
    "DatasetConfig.pack": _field("data.packing"),
    "DatasetConfig.seed": _field("data.seed"),
    "DatasetConfig.module": _field("data.task_modules"),
    "DatasetConfig.use_cached": _refused(
        "name the folders of cached tasks by --config.data.cached_tasks=DIR.", False),
    "Trainer.num_microbatches": Binding(_microbatches),
    "create_learning_rate_scheduler.factors": _field("optimizer.schedule.factors"),
    "create_learning_rate_scheduler.base_learning_rate": _field(
        "optimizer.schedule.base_learning_rate"),
    "create_learning_rate_scheduler.warmup_steps": _field("optimizer.schedule.warmup_steps"),
    "Adafactor.decay_rate": _field("optimizer.adafactor.decay_rate"),
    "Adafactor.step_offset": _field("optimizer.adafactor.step_offset"),
    "SaveCheckpointConfig.period": _field("checkpoint.every"),
    "SaveCheckpointConfig.keep": _field("checkpoint.keep_last"),
    "RestoreCheckpointConfig.path": Binding(_initial),
    "PjitPartitioner.num_partitions": _field("mesh.tensor"),
    "T5Config.dtype": Binding(_dtype),
    "T5Config.dropout_rate": _everywhere("dropout_rate"),
    "T5Config.num_heads": _everywhere("num_heads"),
    "T5Config.head_dim": _everywhere("head_dim"),
    "T5Config.mlp_dim": _everywhere("mlp_dim"),
    "T5Config.emb_dim": _field("model.embed_dim"),
    "T5Config.vocab_size": _field("model.vocab_size"),
    "T5Config.num_encoder_layers": _layers("encoder"),
    "T5Config.num_decoder_layers": _layers("decoder"),
}
# What the same names set within a scope of evaluation, such as train_eval/utils.DatasetConfig.batch_size.
OF_EVALUATION: Mapping[str, Binding] = {
    "DatasetConfig.mixture_or_task_name": _field("data.validation"),
    "DatasetConfig.task_feature_lengths": Binding(_same_lengths),
    "DatasetConfig.batch_size": _field("eval.batch_size"),
    "DatasetConfig.module": BINDINGS["DatasetConfig.module"],
    "DatasetConfig.use_cached": BINDINGS["USE_CACHED_TASKS"],
}
# {a scope before a class: what a name sets there}
SCOPES: Mapping[str, Mapping[str, Binding]] = {
    "": BINDINGS, "train": BINDINGS,
    **dict.fromkeys(("train_eval", "infer_eval", "infer", "eval"), OF_EVALUATION)}
# Bindings that are a flag of the doors and no field.
FLAGS = {"MODEL_DIR": "workdir", "EVAL_OUTPUT_DIR": "workdir"}
_GIN_FLAGS = ("gin_file", "gin_search_paths", "gin_bindings")


def rewritten(argument: str) -> str:
    """A command line's --gin.NAME=VALUE as a flag that doors know; other arguments as they are.

    Raises:
        UserError: a gin file, or a list of bindings.
    """
    dashes, name, value = re.fullmatch(r"(-{0,2})([^=]*)(=.*)?", argument, re.DOTALL).groups()
    if not dashes:
        return argument
    if name in _GIN_FLAGS:
        raise UserError(
            f"{argument}: gin files are not read. Begin with a config that is here, such as "
            "--config=configs/t5_1_1.py:base, and give what your files bind as --gin.NAME=VALUE; or "
            f"write a Python file with get_config(argument). {PAGE} has a table of names.")
    if not name.startswith("gin."):
        return argument
    if not value:
        raise UserError(f"{argument}: write --gin.NAME=VALUE.")
    name = name.removeprefix("gin.")
    if name in FLAGS:
        return f"--{FLAGS[name]}={_value(value[1:])}"
    return f"--gin={name}{value}"


def apply(run: RunConfig, bindings: Sequence[str]) -> RunConfig:
    """The run with "NAME=VALUE" bindings, in order.

    Raises:
        UserError: a name that is neither T5X's nor a field; a value that does not fit.
    """
    for text in bindings:
        name, _, value = text.partition("=")
        run = override(run, [f"{path}={new!r}" if not isinstance(new, str) else f"{path}={new}"
                             for path, new in _changes(run, name, _value(value)).items()])
    return run


def _changes(run: RunConfig, name: str, value: Any) -> Changes:
    scope, _, bare = name.rpartition("/")
    if scope not in SCOPES:
        raise UserError(f"--gin.{name}: the scope {scope}/ means nothing here; there are "
                        f"{', '.join(f'{known}/' for known in SCOPES if known)}.")
    short = ".".join(bare.split(".")[-2:])
    binding = SCOPES[scope].get(bare) or SCOPES[scope].get(short)
    if SCOPES[scope] is OF_EVALUATION and not binding:
        raise UserError(f"--gin.{name}: of {scope}/ there are {', '.join(OF_EVALUATION)} alone; without the scope "
                        "it would change training.")
    if binding:
        return binding.changes(value, run)
    if name in field_names(run):
        return {name: value}
    hint = nearest(short, [*BINDINGS, *FLAGS, *field_names(run)])
    raise UserError(f"--gin.{name}: neither one of T5X's names that have a field here, nor a field."
                    f"{hint} {PAGE} has a table of names.")


def _value(text: str) -> Any:
    """The literal of a binding; a text without quotes is a text. Refuses references."""
    if text.startswith(("%", "@")):
        raise UserError(f"--gin value {text}: references of gin (%NAME, @function) are not followed; "
                        "write the value.")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
