"""What a family of Hugging Face transformers is, and what the families share."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from t5x_lite.errors import UserError, known
from t5x_lite.formats.mapping import Rule
from t5x_lite.layers.config import InitConfig, PositionConfig, RotaryScalingConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig


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
    # The other fields that from_hf reads, with their types; `defaults` are honoured too.
    optional: Mapping[str, type] = dataclasses.field(default_factory=dict)
    # Fields that change the function -> the values that are what a model of ours computes.
    fixed: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    harmless: tuple[str, ...] = ()        # fields that change nothing, besides hf_fields' own
    layer_counts: tuple[str, ...] = ("num_hidden_layers",)
    sizes: tuple[str, ...] = ()           # fields that are dims of tensors
    may_be_zero: tuple[str, ...] = ()
    # Fields that are null where there is none, and have the default only where they are left out.
    nullable: tuple[str, ...] = ()
    # Defaults that are not those of the config class of today: older files rely on them.
    own_defaults: tuple[str, ...] = ()
    # A field whose presence says that a missing head is the embedding table; see hf_t5.
    tied_by: str = ""

    @property
    def honoured(self) -> dict[str, type]:
        """{field: its type} of all that from_hf reads."""
        types = {name: type(value) for name, value in self.defaults.items()
                 if name != "model_type"}
        return {"tie_word_embeddings": bool, **types, **self.optional}


# transformers' ACT2FN -> ours; the first name of each is written.
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "gelu_fast": "gelu_tanh", "gelu": "gelu", "silu": "silu", "swish": "silu",
               "relu2": "squared_relu", "linear": "linear"}


def activation(name: str) -> str:
    """Our name of their activation. Raises UserError for one that we have not."""
    return ACTIVATIONS[known("config.json", "activation", name, ACTIVATIONS)]


def their_activation(name: str) -> str:
    """Their name of our activation."""
    return next((theirs for theirs, ours in ACTIVATIONS.items() if ours == name), name)


def equal_layers(block: BlockConfig, repeats: int) -> tuple[SegmentConfig, ...]:
    """The segments of a stack whose layers are all alike."""
    return (SegmentConfig((block,), repeats),)


def given(stack: StackConfig | None) -> StackConfig:
    """A stack that the model's architecture has, as validation has seen."""
    assert stack is not None
    return stack


LAYER_TYPES = ("full_attention", "sliding_attention")


def windows(hf: Mapping, is_sliding: Callable[[int], bool]) -> list[int]:
    """The attention window of each layer, 0 for none: what layer_types and sliding_window say.

    Args:
        is_sliding: of a layer's number, where layer_types is left out.
    Raises:
        UserError: layer_types of another length or with other names, or no window for them.
    """
    depth = hf["num_hidden_layers"]
    types = hf.get("layer_types") or [LAYER_TYPES[is_sliding(i)] for i in range(depth)]
    strange = [t for t in types if t not in LAYER_TYPES]
    if strange:
        raise UserError(f"layer_types of config.json holds {strange[0]!r}; known are "
                        f"{', '.join(LAYER_TYPES)}.")
    if len(types) != depth:
        raise UserError(f"layer_types of config.json has {len(types)} entries for "
                        f"num_hidden_layers={depth}.")
    window = hf.get("sliding_window") or 0
    if LAYER_TYPES[1] in types and not window:
        raise UserError("layer_types of config.json holds 'sliding_attention', but there is no "
                        "sliding_window. Set it, or make those layers 'full_attention'.")
    return [window if t == LAYER_TYPES[1] else 0 for t in types]


def written_windows(stack: StackConfig) -> dict[str, Any]:
    """layer_types and sliding_window of a stack; where windows differ, the first one is written."""
    found = [block.self_attention.window for s in stack.segments for block in s.blocks * s.repeats]
    return {"layer_types": [LAYER_TYPES[bool(w)] for w in found],
            "sliding_window": next(filter(None, found), None)}


def first_block(stack: StackConfig | None) -> BlockConfig:
    """The block that stands for all of a stack of equal layers."""
    return given(stack).segments[0].blocks[0]


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
             "attention_factor": "feature_factor",
             "original_max_position_embeddings": "original_length"},
}


# The fields of config.json that `rotary` reads, for Family.optional.
ROTARY_FIELDS = {"rope_theta": float, "rope_scaling": dict, "rope_parameters": dict}


def rotary(hf: Mapping, base: float, fraction: float = 1.0) -> PositionConfig:
    """Positions from rope_parameters (transformers 5) or rope_theta and rope_scaling (4).

    Args:
        base, fraction: what the older fields say.
    Raises:
        UserError: a kind of scaling that we have not, such as dynamic, or numbers that no
            rotation has.
    """
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    given = {name: value for name, value in given.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    base = _number("rope_theta", given.pop("rope_theta", base), least=1e-6)
    fraction = _number("partial_rotary_factor", given.pop("partial_rotary_factor", fraction))
    if fraction > 1:
        raise UserError(f"partial_rotary_factor={fraction} of config.json: must be at most 1.")
    scaling = RotaryScalingConfig()
    if kind != "default":
        scaling = _scaling(kind, given, hf.get("max_position_embeddings", 2048))
    return PositionConfig("rotary", rotary_base=base, rotary_fraction=fraction,
                          rotary_scaling=scaling)


def _scaling(kind: Any, given: Mapping[str, Any], length: int) -> RotaryScalingConfig:
    """Scaled frequencies; `length` is what the original length is where nothing says it."""
    if kind == "yarn":
        given = _with_attention_factor(given)
    fields = _SCALING_FIELDS.get(kind) if isinstance(kind, str) else None
    unknown = [] if fields is None else sorted(given.keys() - fields.keys())
    if fields is None or unknown:
        raise UserError(
            f"rope scaling {kind!r} of config.json" + (f" with {', '.join(unknown)}" if unknown
                                                       else "")
            + f" is not known here; known are default, {', '.join(_SCALING_FIELDS)}.")
    if kind != "linear":
        given = {"original_max_position_embeddings": length, **given}
    if "factor" not in given:
        raise UserError(f"rope scaling {kind!r} of config.json has no factor.")
    values: dict[str, Any] = {fields[name]: _number(name, value) for name, value in given.items()}
    if "original_length" in values:
        values["original_length"] = int(values["original_length"])
    scaling = RotaryScalingConfig(kind, **values)
    for low, high in (("low_frequency", "high_frequency"), ("beta_slow", "beta_fast")):
        if not getattr(scaling, low) < getattr(scaling, high):
            raise UserError(f"rope scaling {kind!r} of config.json: {low}={getattr(scaling, low)} "
                            f"must be below {high}={getattr(scaling, high)}.")
    if scaling.factor < 1 or scaling.original_length < 1:
        raise UserError(f"rope scaling {kind!r} of config.json: factor={scaling.factor} and the "
                        f"original length {scaling.original_length} must be at least 1.")
    return scaling


def yarn_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN makes of features, or by DeepSeek-V2 of attention's scale, at a factor above 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _with_attention_factor(given: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN's section with attention_factor for mscale and mscale_all_dim, which give it as a ratio
    where both are there; what the latter does to DeepSeek-V2's scale, hf_deepseek.py reads."""
    rest = {name: value for name, value in given.items() if name not in ("mscale", "mscale_all_dim")}
    both = [_number(name, given[name]) for name in ("mscale", "mscale_all_dim") if given.get(name)]
    if len(both) == 2 and "attention_factor" not in rest and "factor" in rest:
        above, below = (yarn_factor(_number("factor", rest["factor"]), m) for m in both)
        rest["attention_factor"] = above / below
    return rest


def _number(name: str, value: Any, least: float = 0.0) -> float:
    """A finite float above `least`. Raises UserError for anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (
            least < value < 1e30):
        raise UserError(f"{name}={value!r} of config.json: must be a number above {least:g}.")
    return float(value)


def rope_scaling(position: PositionConfig) -> dict[str, Any] | None:
    """The rope_scaling of config.json; None for plain rotary positions."""
    scaling = position.rotary_scaling
    if scaling.kind not in _SCALING_FIELDS:
        return None
    return {"rope_type": scaling.kind, **{
        theirs: getattr(scaling, ours)
        for theirs, ours in _SCALING_FIELDS[scaling.kind].items()
        if ours != "feature_factor" or scaling.feature_factor}}


def max_positions(position: PositionConfig) -> int:
    """max_position_embeddings, which nothing but caches depends on under rotary positions."""
    scaling = position.rotary_scaling
    known = scaling.kind in ("llama3", "yarn")
    return int(scaling.original_length * scaling.factor) if known else 2048
