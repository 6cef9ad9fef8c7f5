"""What a family of Hugging Face transformers is, and what the families share."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from t5x_lite.errors import UserError, nearest
from t5x_lite.formats.mapping import Rule
from t5x_lite.layers.linear import InitConfig
from t5x_lite.layers.position import PositionConfig, RotaryScalingConfig
from t5x_lite.models.blocks import BlockConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type: its config in both directions, and its tensors."""

    model_type: str
    model_class: str                                  # "architectures" of config.json
    architecture: str                                 # ours
    defaults: Mapping[str, Any]                       # of the config class: files leave them out
    from_hf: Callable[[Mapping, bool], ModelConfig]   # (config with defaults, are logits tied)
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], Iterable[Rule]]
    embedding: str                                    # the tensor of token embeddings
    head: str                                         # that of logits; may be a copy if tied
    specials: Mapping[str, Any]                       # token ids of our vocabularies
    # (regex, replacement) for names that published files spell differently.
    renames: tuple[tuple[str, str], ...] = ()
    # Regexes of tensors that a model of ours has no use for: buffers and other heads.
    unused: tuple[str, ...] = ()


# transformers' ACT2FN -> ours; the first name of each is written.
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "gelu_fast": "gelu_tanh", "gelu": "gelu", "silu": "silu", "swish": "silu",
               "relu2": "squared_relu", "linear": "linear"}


def activation(name: str) -> str:
    """Our name of their activation. Raises UserError for one that we have not."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name!r} of config.json is none of "
                        f"{', '.join(ACTIVATIONS)}.{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def their_activation(name: str) -> str:
    """Their name of our activation."""
    return next((theirs for theirs, ours in ACTIVATIONS.items() if ours == name), name)


def equal_layers(block: BlockConfig, repeats: int) -> tuple[SegmentConfig, ...]:
    """The segments of a stack whose layers are all alike."""
    return (SegmentConfig((block,), repeats),)


def first_block(stack: StackConfig) -> BlockConfig:
    """The block that stands for all of a stack of equal layers."""
    return stack.segments[0].blocks[0]


def normal_init(std: float) -> InitConfig:
    """GPT's and BERT's initialisation: every kernel and table with one deviation."""
    return InitConfig(kernel="fixed", kernel_std=std, embedding_std=std, position_std=std,
                      scale_query=False)


# --- rotary positions -----------------------------------------------------------------------------

_SCALING_FIELDS = {   # transformers -> RotaryScalingConfig, by rope_type
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_frequency",
               "high_freq_factor": "high_frequency",
               "original_max_position_embeddings": "original_length"},
    "yarn": {"factor": "factor", "beta_slow": "beta_slow", "beta_fast": "beta_fast",
             "original_max_position_embeddings": "original_length"},
}


def rotary(hf: Mapping, base: float, fraction: float = 1.0) -> PositionConfig:
    """Positions from rope_parameters (transformers 5) or rope_theta and rope_scaling (4).

    Args:
        base, fraction: what the older fields say.
    Raises:
        UserError: a kind of scaling that we have not, such as dynamic.
    """
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    given = {name: value for name, value in given.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    base = float(given.pop("rope_theta", base))
    fraction = float(given.pop("partial_rotary_factor", fraction))
    scaling = RotaryScalingConfig()
    if kind != "default":
        fields = _SCALING_FIELDS.get(kind)
        unknown = [] if fields is None else sorted(given.keys() - fields.keys())
        if fields is None or unknown:
            raise UserError(
                f"rope scaling {kind!r} of config.json" + (f" with {', '.join(unknown)}" if unknown
                                                           else "")
                + f" is not known here; known are default, {', '.join(_SCALING_FIELDS)}.")
        if kind != "linear":
            given.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
        types = {f.name: type(f.default) for f in dataclasses.fields(RotaryScalingConfig)}
        scaling = RotaryScalingConfig(kind, **{
            fields[name]: types[fields[name]](value) for name, value in given.items()})
    return PositionConfig("rotary", rotary_base=base, rotary_fraction=fraction,
                          rotary_scaling=scaling)


def rope_scaling(position: PositionConfig) -> dict[str, Any] | None:
    """The rope_scaling of config.json; None for plain rotary positions."""
    scaling = position.rotary_scaling
    if scaling.kind not in _SCALING_FIELDS:
        return None
    return {"rope_type": scaling.kind, **{
        theirs: getattr(scaling, ours)
        for theirs, ours in _SCALING_FIELDS[scaling.kind].items()}}


def max_positions(position: PositionConfig) -> int:
    """max_position_embeddings, which nothing but caches depends on under rotary positions."""
    scaling = position.rotary_scaling
    known = scaling.kind in ("llama3", "yarn")
    return int(scaling.original_length * scaling.factor) if known else 2048
