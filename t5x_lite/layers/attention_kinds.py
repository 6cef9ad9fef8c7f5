"""The kinds of attention layers: a row of ATTENTIONS is all that a new kind needs."""

import dataclasses
from collections.abc import Callable

from t5x_lite.errors import UserError, one_of
from t5x_lite.layers import attention, latent_attention
from t5x_lite.layers.config import AttentionConfig


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """A row of the table."""

    # (key, embed_dim, config, position, init, dtype) -> module with attention.Attention's __call__.
    module: type
    # What the cache keeps of a token: {entry: (heads, features of each, logical axis of heads)}.
    cache: Callable[[AttentionConfig], dict[str, tuple[int, int, str | None]]]
    validate: Callable[[AttentionConfig, str], None]   # what is checked beside attention.validate
    crosses: bool = True      # it can read another sequence (`project_kv`)
    turns_only: bool = False  # positions may only turn queries and keys


ATTENTIONS = {
    "heads": AttentionKind(attention.Attention, attention.cache_dims, lambda config, where: None),
    "latent": AttentionKind(latent_attention.LatentAttention, latent_attention.cache_dims,
                            latent_attention.validate, crosses=False, turns_only=True),
}


def validate(config: AttentionConfig, where: str, *, crosses: bool = False) -> None:
    """Raises UserError for what cannot be, naming the field."""
    kind = ATTENTIONS[one_of(f"{where}.kind", config.kind, ATTENTIONS)]
    attention.validate(config, where)
    kind.validate(config, where)
    if crosses and not kind.crosses:
        fit = [name for name, row in ATTENTIONS.items() if row.crosses]
        raise UserError(f"{where}.kind={config.kind!r} cannot read an encoder; use "
                        f"{' or '.join(fit)} there.")
