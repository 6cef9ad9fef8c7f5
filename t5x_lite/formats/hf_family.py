"""What a family of Hugging Face transformers is, and what the families share."""

import dataclasses
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
        for theirs, ours in _SCALING_FIELDS[scaling.kind].items()}}


def max_positions(position: PositionConfig) -> int:
    """max_position_embeddings, which nothing but caches depends on under rotary positions."""
    scaling = position.rotary_scaling
    known = scaling.kind in ("llama3", "yarn")
    return int(scaling.original_length * scaling.factor) if known else 2048
