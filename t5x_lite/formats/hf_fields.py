"""Which fields of a config.json decide what its model computes, and what may stand in them.

Every field of a file is one of four kinds, and a family's table (hf_family.Family) says which:

    honoured   from_hf reads it; its type and range are checked here
    fixed      it changes the function, and only the values listed are what a model of ours computes
    harmless   it changes nothing that a model computes: token ids, generation, bookkeeping
    unknown    none of these. Refused by name unless its value is empty (None, False, 0, "", []),
               because a model read without it might be another one

tests/formats/test_hf_fields.py holds the tables against the config classes of transformers.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.formats.hf_family import Family
from t5x_lite.formats.mapping import Tensors

MAX_LAYERS = 10_000        # more than any published model has; a list that long costs nothing
_MAX_INT = 2**31 - 1

# Fields that may stand in any family's file without changing what the model computes.
_HARMLESS = re.compile("|".join((
    r"_.*", "architectures", "auto_map", "model_type", "transformers(js)?_.*", ".*_version",
    # numbers and graphs as they are run, not what is computed
    "(torch_)?dtype", "torchscript", "use_bfloat16", "use_cache", "return_dict.*", "output_.*",
    "gradient_checkpointing", "attn_implementation", "use_flash_attn.*", "chunk_size_feed_forward",
    "pretraining_tp", "cache_implementation", "tf_legacy_loss",
    # classifiers, which are no language models
    "id2label", "label2id", "num_labels", "problem_type", "classifier_.*", "summary_.*",
    "finetuning_task", "task_specific_params", "pooler_.*", "directionality", "gpt2_style",
    # token ids, tokenizers and generation
    ".*token_ids?", ".*_tokens?", "tokenizer.*", "prefix", "max_length", "min_length", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "exponential_decay_length_penalty", "remove_invalid_values", "max_sequence_length",
    "model_max_length", "n_ctx", "seq_length",
    # how the model was, or is to be, trained
    "initializer_factor", "embd_pdrop", "neftune_.*", "unsloth_.*",
    "license", "language", "name", "tags", "description")))

# What no family reads: the tensors of a quantised model are not the numbers of its weights.
_FIXED = {"is_encoder_decoder": (), "tie_encoder_decoder": (False,), "pruned_heads": ({},),
          "add_cross_attention": (False,), "cross_attention_hidden_size": (),
          "is_decoder": (False,)}


def checked(kind: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json with the family's defaults where it says nothing.

    Raises:
        UserError: a field of another type or out of range, one whose value no model of ours
            computes, or one that is not known; names all of them with their values.
    """
    if given.get("quantization_config") or given.get("compression_config"):
        raise UserError(_quantised(kind, given))
    problems = [problem for name, value in given.items()
                if value is not None and (problem := _problem(kind, name, value))]
    if problems:
        shown = problems[:12] + ([f"… {len(problems) - 12} more"] if len(problems) > 12 else [])
        raise UserError(f"config.json of this {kind.model_type} model says what cannot be honoured "
                        "here:\n" + "\n".join(f"  {line}" for line in shown))
    return {**kind.defaults, **{name: value for name, value in given.items()
                                if value is not None or name in kind.nullable}}


def _quantised(kind: Family, given: Mapping[str, Any]) -> str:
    how = given.get("quantization_config") or given.get("compression_config")
    method = how.get("quant_method", how) if isinstance(how, Mapping) else how
    return (f"config.json of this {kind.model_type} model has a quantization_config ({method}): its "
            "tensors are packed integers, which are not read here. Take the unquantised model, or "
            "dequantise it with transformers (model.dequantize()) and save it again.")


def _problem(kind: Family, name: str, value: Any) -> str | None:
    """What is wrong with a field; None where nothing is."""
    if name in kind.honoured:
        return _of_type(name, value, kind.honoured[name], kind)
    if name in kind.fixed or name in _FIXED:
        allowed = kind.fixed.get(name, _FIXED.get(name, ()))
        if name == "is_encoder_decoder":
            allowed = (kind.architecture == "encoder_decoder",)
        return _one_of(name, value, allowed)
    if _HARMLESS.fullmatch(name) or name in kind.harmless or not value:
        return None
    return (f"{name}={_short(value)}: not known for {kind.model_type}, and it may change what the "
            "model computes. If it does not, take it out of config.json.")


def _one_of(name: str, value: Any, allowed: tuple) -> str | None:
    """A list must hold allowed values alone, as layer_types does."""
    items = value if isinstance(value, list) else [value]
    if all(any(item == a and isinstance(item, bool) == isinstance(a, bool) for a in allowed)
           for item in items):
        return None
    return (f"{name}={_short(value)}: must be {' or '.join(map(repr, allowed)) or 'left out'}; "
            "models of ours compute nothing else.")


def _of_type(name: str, value: Any, wanted: type, kind: Family) -> str | None:
    """What is wrong with the value of an honoured field."""
    is_bool = isinstance(value, bool)
    if wanted is float:
        if is_bool or not isinstance(value, (int, float)) or not _finite(value) or value < 0:
            return f"{name}={_short(value)}: must be a finite number, 0 or more."
        return None
    if not isinstance(value, wanted) or is_bool != (wanted is bool):
        names = {bool: "true or false", int: "a whole number", str: "a name",
                 dict: "a section", list: "a list"}
        return f"{name}={_short(value)}: must be {names[wanted]}."
    if not isinstance(value, int) or is_bool:
        return None
    least = 0 if name in kind.may_be_zero else 1
    most = MAX_LAYERS if name in kind.layer_counts else _MAX_INT
    return None if least <= value <= most else (
        f"{name}={_short(value)}: must be between {least} and {most:,}.")


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:   # an int beyond all floats
        return False


def _short(value: Any) -> str:
    """A value's beginning: integers of thousands of digits cannot even be printed."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def check_against_files(kind: Family, config: Mapping[str, Any], tensors: Tensors, where: str
                        ) -> None:
    """Holds a config's sizes against the tensors before anything is built from them.

    Raises:
        UserError: more layers than there are tensors, or a size that no tensor can have.
    """
    elements = max((math.prod(shape) for shape in tensors.shapes.values()), default=0)
    for name, wanted in kind.honoured.items():
        value = config.get(name)
        if wanted is not int or value is None:
            continue
        if name in kind.layer_counts and value > len(tensors.shapes):
            raise UserError(f"{where}: config.json says {name}={value:,}, but the files hold "
                            f"{len(tensors.shapes):,} tensors, fewer than one a layer. Download "
                            "config.json and the weights of the same model again.")
        if name in kind.sizes and value > elements:
            raise UserError(f"{where}: config.json says {name}={value:,}, but the largest tensor of "
                            f"the files has {elements:,} elements. Download config.json and the "
                            "weights of the same model again.")
