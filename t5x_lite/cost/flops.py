"""FLOPs and parameters from the structure of a model.

A multiply-add counts as two. Counted are matrix multiplications: kernels, attention scores
and weighted values, router and logits. Free are embedding lookups, norms, softmaxes, biases
and activations, as in Kaplan et al. 2020 (arXiv:2001.08361, table 1) and in PaLM's appendix B
(arXiv:2204.02311). XLA's own cost_analysis() cannot replace this: it counts a scanned
layer once.

Causal attention is counted in full by default, as PaLM's MFU does (12 L H Q T a token, with
6 N for the kernels): comparable with what others report. causal_half=True counts only the
pairs that a mask lets through, which is what a good kernel computes.

Backward costs twice forward. What rematerialisation computes again is not the model's work,
so train_flops leaves it out and recompute_flops states it.

Shape letters: B rows, L query length, S key length, D model, N query heads, H head dim.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t5x_lite.blocks import BlockConfig, StackConfig
    from t5x_lite.layers.attention import AttentionConfig
    from t5x_lite.layers.mlp import MLPConfig
    from t5x_lite.layers.moe import MoEConfig
    from t5x_lite.models import ModelConfig, ParamInfo


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs by component."""

    projections: float = 0.0  # query, key, value and output kernels of all attention
    attention: float = 0.0    # q k^T and probabilities times v
    mlp: float = 0.0          # of an MoE: the experts a token visits, and shared ones
    router: float = 0.0
    logits: float = 0.0

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other),
                                             strict=True)))

    def __mul__(self, factor: float) -> "Flops":
        return Flops(*(factor * a for a in dataclasses.astuple(self)))


def matmul_flops(rows: int, d_in: int, d_out: int) -> float:
    """x_[rows, d_in] @ w_[d_in, d_out]."""
    return 2.0 * rows * d_in * d_out


def visible_keys(q_length: int, k_length: int, *, causal: bool, window: int = 0,
                 causal_half: bool = False) -> float:
    """Keys that one query sees, averaged over the queries.

    Args:
        window: keys at distance >= window are hidden; 0: none are.
        causal_half: False counts a causal row of keys in full (or its whole window).
    """
    if causal and causal_half:
        seen = (min(q + 1, window or k_length, k_length) for q in range(q_length))
        return sum(seen) / max(q_length, 1)
    reach = window if causal else 2 * window - 1
    return min(k_length, reach) if window else k_length


def attention_flops(rows: int, q_length: int, k_length: int, num_heads: int, head_dim: int, *,
                    causal: bool = False, window: int = 0, causal_half: bool = False) -> float:
    """Scores and weighted values: 2 x (2 B N L S H)."""
    keys = visible_keys(q_length, k_length, causal=causal, window=window, causal_half=causal_half)
    return 4.0 * rows * num_heads * q_length * keys * head_dim


def forward_flops(config: "ModelConfig", rows: int, encoder_length: int, decoder_length: int, *,
                  causal_half: bool = False) -> Flops:
    """One forward pass over `rows` sequences, logits included.

    Args:
        encoder_length, decoder_length: positions of a row, padding included; 0 for a stack that
            the model does not have.
    """
    total = Flops(logits=matmul_flops(
        rows * (encoder_length if config.decoder is None else decoder_length),
        config.embed_dim, config.vocab_size))
    for stack in (config.encoder, config.decoder):
        if stack is not None:
            total += stack_flops(config, stack, rows, encoder_length, decoder_length,
                                 causal_half=causal_half)
    return total


def train_flops(config: "ModelConfig", rows: int, encoder_length: int, decoder_length: int, *,
                causal_half: bool = False) -> float:
    """Forward, and backward at twice its cost: the FLOPs of model FLOPs utilisation (MFU)."""
    return 3.0 * forward_flops(config, rows, encoder_length, decoder_length,
                               causal_half=causal_half).total


def recompute_flops(config: "ModelConfig", rows: int, encoder_length: int,
                    decoder_length: int) -> float:
    """What rematerialisation computes again in a training step, at most.

    "full" repeats the stack's forward pass, "dots" only products of two activations (scores and
    weighted values), "none" nothing. "save:…" counts as full, since what the names spare depends
    on the layer. Hardware FLOPs are train_flops + recompute_flops; the compiler drops what turns
    out to be unneeded, such as the last product of a layer.
    """
    total = 0.0
    for stack in (config.encoder, config.decoder):
        if stack is None or stack.remat == "none":
            continue
        again = stack_flops(config, stack, rows, encoder_length, decoder_length)
        total += again.attention if stack.remat == "dots" else again.total
    return total


def stack_flops(config: "ModelConfig", stack: "StackConfig", rows: int, encoder_length: int,
                decoder_length: int, *, causal_half: bool = False) -> Flops:
    """Forward FLOPs of the blocks of one stack of the model."""
    length = decoder_length if stack is config.decoder else encoder_length
    total = Flops()
    for block, repeats in _blocks(stack):
        flops = _attention_layer(config.embed_dim, block.self_attention, rows, length, length,
                                 causal=stack.causal, window=block.self_attention.window,
                                 causal_half=causal_half)
        if block.cross_attention is not None:
            flops += _attention_layer(config.embed_dim, block.cross_attention, rows, length,
                                      encoder_length)
        flops += mlp_flops(block.moe or block.mlp, rows, length, config.embed_dim)
        total += flops * repeats
    return total


def mlp_flops(mlp: "MLPConfig | MoEConfig", rows: int, length: int, embed_dim: int) -> Flops:
    """Forward FLOPs of a dense or a mixture-of-experts MLP.

    A mixture costs what its tokens ask for. Padding of expert buffers (a capacity factor above
    what tokens need) is not the model's work, and dropped tokens are not subtracted.
    """
    tokens = rows * length
    if not hasattr(mlp, "num_experts"):
        kernels = 3 if mlp.gated else 2
        return Flops(mlp=kernels * matmul_flops(tokens, embed_dim, mlp.mlp_dim))
    expert = mlp_flops(mlp.mlp, rows, length, embed_dim)
    router = 0.0 if mlp.router == "hash" else matmul_flops(tokens, embed_dim, mlp.num_experts)
    return expert * (experts_per_token(mlp, length) + mlp.shared_experts) + Flops(router=router)


def experts_per_token(moe: "MoEConfig", length: int) -> float:
    """Routed experts that a token visits, on average where experts choose their tokens.

    Args:
        length: tokens of a sequence; matters only to expert choice with a capacity in tokens.
    """
    if moe.router != "expert_choice":
        return moe.choices
    if moe.expert_capacity:
        group = moe.group_size or length
        return moe.num_experts * min(moe.expert_capacity, group) / group
    return min(moe.capacity_factor, moe.num_experts)


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, by the definitions in use."""

    total: int
    embedding: int     # token and position embeddings
    logits: int        # the projection to the vocabulary, where it is not the embedding
    active: float      # total, with only the experts that one token visits

    @property
    def non_embedding(self) -> int:
        """Kaplan et al. 2020's N: without embeddings, positions and the projection to logits."""
        return self.total - self.embedding - self.logits


def parameter_counts(config: "ModelConfig", table: Mapping[str, "ParamInfo"], *,
                     length: int = 1) -> ParameterCounts:
    """Counts over the parameter table (Model(config).table); length as in experts_per_token."""
    total = embedding = logits = 0
    active = 0.0
    for path, info in table.items():
        total += info.size
        if path.startswith("logits/"):
            logits += info.size
        elif {"vocab", "position"} & set(info.logical_axes):
            embedding += info.size
        active += info.size * _active_share(config, info, length)
    return ParameterCounts(total, embedding, logits, active)


def six_nd(non_embedding: float, tokens: int) -> float:
    """6 N D, the rule of thumb for decoder-only models: no attention scores, no logits."""
    return 6.0 * non_embedding * tokens


# --- Components -------------------------------------------------------------------------------

def _blocks(stack: "StackConfig") -> Iterator[tuple["BlockConfig", int]]:
    for segment in stack.segments:
        for block in segment.blocks:
            yield block, segment.repeats


def _active_share(config: "ModelConfig", info: "ParamInfo", length: int) -> float:
    """The fraction of a parameter that one token uses: below 1 for the weights of experts."""
    if "expert" not in info.logical_axes:
        return 1.0
    where = re.match(r"(encoder|decoder)/segment_(\d+)/block_(\d+)/mlp/", info.path)
    stack = getattr(config, where.group(1))
    moe = stack.segments[int(where.group(2))].blocks[int(where.group(3))].moe
    return experts_per_token(moe, length) / moe.num_experts


def _attention_layer(embed_dim: int, attention: "AttentionConfig", rows: int, q_length: int,
                     k_length: int, *, causal: bool = False, window: int = 0,
                     causal_half: bool = False) -> Flops:
    """Queries and outputs of q_length tokens; keys and values of k_length, in a cross-attention
    those of the encoder."""
    query_width = attention.num_heads * attention.head_dim
    kv_width = attention.kv_heads * attention.head_dim
    return Flops(
        projections=2 * matmul_flops(rows * q_length, embed_dim, query_width)
        + 2 * matmul_flops(rows * k_length, embed_dim, kv_width),
        attention=attention_flops(rows, q_length, k_length, attention.num_heads,
                                  attention.head_dim, causal=causal, window=window,
                                  causal_half=causal_half))
