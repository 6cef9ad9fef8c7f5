"""What training asks of a model: the parameter table, and the calls that objectives and steps make.

The table says what is known of each parameter of a model before it holds a number.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

# Logical axes whose dims grow with a model's width, and those that count layers or experts.
WIDE_AXES = frozenset({"embed", "mlp", "heads", "kv_heads"})
_COUNTING = ("layers", "expert", "stage")


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """One row of the parameter table: all that sharding, optimizers and conversion need."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    logical_axes: tuple[str | None, ...]   # leading "layers" for stacked parameters
    units: tuple[int, ...]                 # what each dim counts (heads, not heads * head_dim)
    fan_in: int
    init: str

    @property
    def role(self) -> str:
        """What it is as the width grows (Yang et al. 2022, table 3): "vector" (inputs of a fixed
        number: tables, biases, scales), "hidden" (wide to wide), "head" (wide to the vocabulary) or
        "narrow" (wide to a few, as a router)."""
        dims = [axis for axis in self.logical_axes if axis not in _COUNTING]
        if len(dims) < 2 or dims[-2] not in WIDE_AXES:
            return "vector"
        if dims[-1] in WIDE_AXES:
            return "hidden"
        return "head" if dims[-1] == "vocab" else "narrow"

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class BoundModel(Protocol):
    """A model with its parameters, inside a traced function: what objectives call.

    models/language_model.py's LanguageModel is one.
    """

    config: Any
    # Hidden states x_BLD -> float32 [B, L], a number a position; there where config.scalar_head is set.
    scalar_head: Callable[[jax.Array], jax.Array]

    def __call__(self, batch: Mapping[str, jax.Array], key: Any = None) -> tuple[jax.Array, dict]:
        """A training batch and dropout keys (None: no dropout) -> (hidden states before the
        logits, auxiliary values {name: (sum, count)})."""

    def further(self, batch: Mapping[str, jax.Array], hidden: jax.Array, aux: Mapping,
                key: Any = None) -> tuple[list[jax.Array], dict]:
        """Of what the call above gave: hidden states that predict further tokens, and aux with
        theirs; asked where config.further_tokens is not 0."""

    def head_params(self) -> dict[str, jax.Array]:
        """What `head` needs, gathered once for all its calls."""

    def stored_head(self) -> dict[str, jax.Array]:
        """What `gather_head` takes, as it is stored."""

    def gather_head(self, stored: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The stored head gathered and cast: what `head` needs."""

    def head(self, params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> float32 logits [..., V]."""

    def init_cache(self, batch: Mapping[str, jax.Array], length: int) -> dict:
        """The cache of `length` slots a row that `decode` continues; see models/cache.py."""

    def decode(self, tokens: jax.Array, cache: dict, head: Mapping[str, jax.Array] | None = None,
               counts: jax.Array | None = None) -> tuple[jax.Array, dict]:
        """The next tokens_BL of each row, of which the cache counts so many (None: all) -> (float32
        logits_BLV, cache)."""


class ModelDefinition(Protocol):
    """A model before it has parameters: what state, steps and build call.

    models/language_model.py's Model is one.
    """

    config: Any

    @property
    def table(self) -> dict[str, ParamInfo]:
        """{path: row} of every parameter, without allocating any."""

    def init(self, key: jax.Array) -> dict:
        """Fresh parameters as a nested dict."""

    def bind(self, params: Mapping) -> BoundModel:
        """The model with these parameters, inside a traced function."""

    def with_layers_apart(self, params: Mapping) -> tuple["ModelDefinition", dict]:
        """An equal model whose decoder's layers are not stacked, and its parameters."""
