"""FLOPs and parameters from the structure of a model.

A multiply-add counts as two. Counted are matrix multiplications: kernels, attention scores
and weighted values, or what another mixer of tokens has in their place, router and logits. Free are embedding lookups, norms, softmaxes, biases
and activations, as in Kaplan et al. 2020 (arXiv:2001.08361, table 1) and in PaLM's appendix B
(arXiv:2204.02311). XLA's own cost_analysis() cannot replace this: it counts a scanned
layer once.

Causal attention is counted in full by default, as PaLM's MFU does (12 L H Q T a token, with
6 N for the kernels): comparable with what others report. causal_half=True counts only the
pairs that causality and windows let through, which is what a good kernel computes.

Backward costs twice forward: a gradient of the inputs and one of the weights. Where only some
parameters train (step_flops), frozen weights have no gradient, and inputs only above the lowest
layer that trains; LoRA's and (IA)^3's own small products are free. What rematerialisation
computes again is not the model's work: recompute_flops states it.

Shape letters: B rows, L query length, S key length, D model, N query heads, H head dim.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from t5x_lite.layers.attention import ATTENTIONS
from t5x_lite.layers.routing import ROUTERS
from t5x_lite.models.blocks import MIXERS

if TYPE_CHECKING:
    from t5x_lite.layers.config import AttentionConfig, MLPConfig, MoEConfig
    from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig
    from t5x_lite.models.params import ParamInfo


_LAYER = re.compile(r"(encoder|decoder)/segment_(\d+)/block_(\d+)/")
_KERNEL = re.compile(_LAYER.pattern + r"(?:(self|cross)_attention/((?:query_)?latent|query|key|value|out)"
                     r"|(?:mlp|mixer)/.+)/kernel")
# What acts before a stack's layers, in the paths of parameters.
_INPUTS = r"token_embedding/.*|token_types/.*|{side}/(learned_positions|embedding_norm)/.*"


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs by component."""

    projections: float = 0.0  # query, key, value and output kernels of all attention, and of mixers
    attention: float = 0.0    # q k^T and probabilities times v; other mixers' products of activations
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


def visible_keys(q_length: int, k_length: float, *, causal: bool, window: int = 0,
                 causal_half: bool = False) -> float:
    """Keys that one query sees, averaged over the queries.

    Args:
        window: keys at distance >= window are hidden; 0: none are.
        causal_half: False counts a causal row of keys in full (or its whole window).
    """
    if causal_half and (causal or window):
        reach = window or k_length
        seen = (min(q + (1 if causal else reach), k_length) - max(q + 1 - reach, 0)
                for q in range(q_length))
        return sum(seen) / max(q_length, 1)
    reach = window if causal else 2 * window - 1
    return min(k_length, reach) if window else k_length


def attention_flops(rows: int, q_length: int, k_length: float, num_heads: int, head_dim: int, *,
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


def further_flops(config: "ModelConfig", rows: int, length: int, *, least: bool = False,
                  causal_half: bool = False) -> Flops:
    """Forward FLOPs of the modules that predict further tokens, their logits included."""
    if not config.further_tokens:
        return Flops()
    *_, last = _layer_flops(config, config.decoder, rows, 0, length, least, causal_half)
    tokens = rows * length
    merge = Flops(projections=matmul_flops(tokens, 2 * config.embed_dim, config.embed_dim))
    logits = Flops(logits=matmul_flops(tokens, config.embed_dim, config.vocab_size))
    return (last + merge + logits) * config.further_tokens


def train_flops(config: "ModelConfig", rows: int, encoder_length: int, decoder_length: int, *,
                causal_half: bool = False) -> float:
    """Forward, and backward at twice its cost, where everything trains: the FLOPs of model FLOPs
    utilisation (MFU)."""
    forward = forward_flops(config, rows, encoder_length, decoder_length, causal_half=causal_half)
    further = further_flops(config, rows, decoder_length, causal_half=causal_half)
    return 3.0 * (forward + further).total


def step_flops(config: "ModelConfig", table: Mapping[str, "ParamInfo"], trained: Collection[str],
               rows: int, encoder_length: int, decoder_length: int, *,
               least: bool = False, causal_half: bool = False) -> dict[str, float]:
    """FLOPs of a training step: {"encoder", "decoder", "further", "logits"}, train_flops in sum where
    everything trains.

    Args:
        table: the parameter table (Model(config).table).
        trained: paths of what trains, of the table or beside one of its paths (lora_a, ia3).
        least: only what no implementation can leave out: the pairs that causality and windows
            let through, and of a mixture's choices those that surely find room. Rows are taken
            to be full. False: as MFU counts.
        causal_half: as MFU counts, but for the pairs that causality and windows hide.
    """
    products = {}
    for side in ("encoder", "decoder"):
        stack = getattr(config, side)
        if stack is None:
            continue
        layers = list(_layer_flops(config, stack, rows, encoder_length, decoder_length, least,
                                   causal_half=causal_half))
        above = layers[_lowest_trained(config, side, trained) + 1:]
        products[side] = sum(layer.total for layer in layers) \
            + sum(layer.total + layer.attention for layer in above)
    for path in table.keys() & trained:
        kernel = _KERNEL.fullmatch(path)
        if kernel:
            side, *_, attention, name = kernel.groups()
            reads_encoder = attention == "cross" and name in ("key", "value")
            length = encoder_length if side == "encoder" or reads_encoder else decoder_length
            used = table[path].size * _active_share(config, table[path], length, least)
            products[side] += 2.0 * rows * length * used
    logits = matmul_flops(rows * (encoder_length if config.decoder is None else decoder_length),
                          config.embed_dim, config.vocab_size)
    weights = "token_embedding/embedding" if config.tie_logits else "logits/kernel"
    below = any(not path.startswith("logits/") for path in trained)
    further = further_flops(config, rows, decoder_length, least=least, causal_half=causal_half)
    if further.total:
        products["further"] = (1 + below + _trains_further(trained)) * further.total
    return {**products, "logits": logits * (1 + below + (weights in trained))}


def _trains_further(trained: Collection[str]) -> bool:
    """Whether anything of the modules that predict further tokens trains, which counts as all."""
    return any(path.startswith("further_token_") for path in trained)


def _lowest_trained(config: "ModelConfig", side: str, trained: Collection[str]) -> int:
    """The layer of a stack above which inputs need gradients: -1 for all its layers, as many as
    there are for none."""
    stack, prompted = getattr(config, side), "decoder" if config.encoder is None else "encoder"
    inputs = re.compile(_INPUTS.format(side=side) + (r"|prompt/.*" if side == prompted else ""))
    first, numbers = 0, {}
    for i, segment in enumerate(stack.segments):
        numbers |= {(i, j): first + j for j in range(len(segment.blocks))}
        first += segment.repeats * len(segment.blocks)
    lowest = first
    for path in trained:
        layer = _LAYER.match(path)
        if inputs.fullmatch(path):
            return -1
        if layer and layer[1] == side:
            lowest = min(lowest, numbers[int(layer[2]), int(layer[3])])
        elif path.startswith(f"{side}/relative_position/") or (
                side == "decoder" and path.startswith(("encoder/", "prompt/"))):
            lowest = 0
    return lowest


def recompute_flops(config: "ModelConfig", rows: int, encoder_length: int, decoder_length: int,
                    stages: int = 1) -> float:
    """What rematerialisation and pipelining compute again in a training step, at most.

    "full" repeats the stack's forward pass, "dots" only products of two activations (scores and
    weighted values), "none" nothing. "save:…" counts as full, since what the names spare depends
    on the layer. Of `stages` stages under 1f1b the forward pass is run twice more, see
    pipeline_schedules.one_f_one_b. Hardware FLOPs are train_flops + recompute_flops; the compiler
    drops what turns out to be unneeded, such as the last product of a layer.
    """
    total = 0.0
    for stack in (config.encoder, config.decoder):
        if stack is None:
            continue
        again = stack_flops(config, stack, rows, encoder_length, decoder_length)
        total += {"none": 0.0, "dots": again.attention}.get(stack.remat, again.total)
        if stages > 1 and stack.pipeline.schedule == "1f1b":
            total += 2 * again.total
    return total


def stack_flops(config: "ModelConfig", stack: "StackConfig", rows: int, encoder_length: int,
                decoder_length: int, *, causal_half: bool = False) -> Flops:
    """Forward FLOPs of the blocks of one stack of the model."""
    return sum(_layer_flops(config, stack, rows, encoder_length, decoder_length, False,
                            causal_half=causal_half), Flops())


def _layer_flops(config: "ModelConfig", stack: "StackConfig", rows: int, encoder_length: int,
                 decoder_length: int, least: bool, causal_half: bool = False) -> Iterator[Flops]:
    """Forward FLOPs of each layer, in order. least: see step_flops."""
    length = decoder_length if stack is config.decoder else encoder_length
    for segment in stack.segments:
        layers = []
        for block in segment.blocks:
            flops = _mixer_layer(config.embed_dim, block, rows, length, causal=stack.causal,
                                 causal_half=causal_half or least)
            if block.cross_attention is not None:
                flops += _attention_layer(config.embed_dim, block.cross_attention, rows, length,
                                          encoder_length)
            layers.append(flops + mlp_flops(block.moe or block.mlp, rows, length,
                                            config.embed_dim, least))
        yield from layers * segment.repeats


def mlp_flops(mlp: "MLPConfig | MoEConfig", rows: int, length: int, embed_dim: int,
              least: bool = False) -> Flops:
    """Forward FLOPs of a dense or a mixture-of-experts MLP.

    A mixture costs what its tokens ask for. Padding of expert buffers (a capacity factor above
    what tokens need) is not the model's work, and dropped tokens are subtracted by `least` only.
    """
    tokens = rows * length
    if not hasattr(mlp, "num_experts"):
        kernels = 3 if mlp.gated else 2
        return Flops(mlp=kernels * matmul_flops(tokens, embed_dim, mlp.mlp_dim))
    expert = mlp_flops(mlp.mlp, rows, length, embed_dim)
    learned = ROUTERS[mlp.router].learned
    router = matmul_flops(tokens, embed_dim, mlp.num_experts) if learned else 0.0
    visits = experts_per_token(mlp, length, least) + mlp.shared_experts
    return expert * visits + Flops(router=router)


def experts_per_token(moe: "MoEConfig", length: int, least: bool = False) -> float:
    """Routed experts that a token visits, on average where experts choose their tokens.

    Args:
        length: tokens of a sequence; matters only to capacities in tokens.
        least: without second choices that a policy may decline, and no more than all experts
            have room for.
    """
    group = moe.group_size or length
    room = moe.num_experts * min(moe.expert_capacity, group) / group if moe.expert_capacity \
        else min(moe.capacity_factor, moe.num_experts)
    router = ROUTERS[moe.router]
    choices = router.choices(moe)
    if not choices:   # experts choose, and fill their room
        return room
    if not least:
        return choices
    sure = router.certain(moe) if router.certain else choices
    if moe.dropless:
        return sure
    # A factor's room is rounded to whole tokens of a group, by less than one an expert.
    rounding = 0.0 if moe.expert_capacity else moe.num_experts / group
    return min(sure, max(room - rounding, 0.0))


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, by the definitions in use."""

    total: int
    embedding: int     # token and position embeddings
    logits: int        # the projection to the vocabulary, where it is not the embedding
    active: float      # total, with only the experts that one token visits
    head: int          # the kernel that makes logits, also where it is the token embedding

    @property
    def non_embedding(self) -> int:
        """Kaplan et al. 2020's N: without embeddings, positions and the projection to logits."""
        return self.total - self.embedding - self.logits

    @property
    def non_embedding_active(self) -> float:
        """Parameters beside embeddings and head that one token meets (of a mixture, its experts' alone)."""
        return self.active - self.embedding - self.logits


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
    own = table.get("logits/kernel")
    head = config.embed_dim * config.vocab_size if own is None else own.size
    return ParameterCounts(total, embedding, logits, active, head)


def six_nd(non_embedding: float, tokens: int) -> float:
    """6 N D, the rule of thumb for decoder-only models: no attention scores, no logits."""
    return 6.0 * non_embedding * tokens


# --- Components -------------------------------------------------------------------------------

def _active_share(config: "ModelConfig", info: "ParamInfo", length: int,
                  least: bool = False) -> float:
    """The fraction of a parameter that one token uses: below 1 for the weights of experts."""
    if "expert" not in info.logical_axes:
        return 1.0
    where = _LAYER.match(info.path)
    side, segment, block = where.groups() if where else ("decoder", -1, -1)   # a further token's
    moe = getattr(config, side).segments[int(segment)].blocks[int(block)].moe
    return experts_per_token(moe, length, least) / moe.num_experts


def _mixer_layer(embed_dim: int, block: "BlockConfig", rows: int, length: int, *, causal: bool,
                 causal_half: bool) -> Flops:
    """What mixes the tokens of a block's rows."""
    row = MIXERS[block.mixer.kind]
    if row.flops is not None:
        return Flops(*row.flops(block.mixer, embed_dim, rows, length))
    return _attention_layer(embed_dim, block.self_attention, rows, length, length, causal=causal,
                            window=block.self_attention.window, causal_half=causal_half)


def _attention_layer(embed_dim: int, attention: "AttentionConfig", rows: int, q_length: int,
                     k_length: int, *, causal: bool = False, window: int = 0,
                     causal_half: bool = False) -> Flops:
    """Queries and outputs of q_length tokens; keys and values of k_length, in a cross-attention
    those of the encoder."""
    if attention.kind == "latent":
        return _latent_layer(embed_dim, attention, rows, q_length, causal=causal, window=window,
                             causal_half=causal_half)
    query_width = attention.num_heads * attention.head_dim
    kv_width = attention.kv_heads * attention.head_dim
    heads, head_dim = attention.num_heads, attention.head_dim
    visible = ATTENTIONS[attention.kind].visible
    if visible is None:
        pairs = attention_flops(rows, q_length, k_length, heads, head_dim, causal=causal, window=window,
                                causal_half=causal_half)
    else:
        pairs = attention_flops(rows, q_length, visible(attention, k_length), heads, head_dim)
    return Flops(
        projections=2 * matmul_flops(rows * q_length, embed_dim, query_width)
        + 2 * matmul_flops(rows * k_length, embed_dim, kv_width), attention=pairs)


def _latent_layer(embed_dim: int, attention: "AttentionConfig", rows: int, length: int, *,
                  causal: bool, window: int, causal_half: bool) -> Flops:
    """Self-attention over latents, keys and values made anew for every head as in training."""
    latent, heads, tokens = attention.latent, attention.num_heads, rows * length
    query_width, value_width = heads * attention.head_dim, heads * latent.value_dim
    key_width = query_width - heads * latent.rotary_dim
    queries = matmul_flops(tokens, latent.query_rank or embed_dim, query_width) + matmul_flops(
        tokens, embed_dim, latent.query_rank)
    keys = matmul_flops(tokens, embed_dim, latent.rank + latent.rotary_dim) + matmul_flops(
        tokens, latent.rank, key_width + value_width)
    scores, mixing = (attention_flops(rows, length, length, heads, features, causal=causal,
                                      window=window, causal_half=causal_half) / 2
                      for features in (attention.head_dim, latent.value_dim))
    return Flops(projections=queries + keys + matmul_flops(tokens, value_width, embed_dim),
                 attention=scores + mixing)


# --- drawing ----------------------------------------------------------------------------------
#
# What drawing the answers takes that ppo and grpo learn from, beside the updates (training/rollouts.py):
# forward passes over the answers' rows, one to draw them (a token read with a cache costs the same), one for
# their log-probabilities, and one for the reference's, where there is one. What judges them is not counted: a
# Python function has no FLOPs, and a reward model is of a run of its own.

def drawing_flops(config: Any, lengths: tuple[int, int], prompts: int, causal_half: bool = False) -> Flops:
    """FLOPs of drawing and measuring the answers to so many prompts; none of an objective that draws none.

    Args:
        config: RunConfig.
        lengths: positions of a row on the encoder's and the decoder's side.
    """
    objective = config.objective
    passes = (2 + objective.compares_with_base) if objective.draws else 0
    return forward_flops(config.model, prompts * objective.per_row, *lengths,
                               causal_half=causal_half) * passes


def drawing_flops_a_row(config: Any, lengths: tuple[int, int], causal_half: bool = False) -> Flops:
    """The share of it that each row has, as often as it is learned from."""
    return drawing_flops(config, lengths, 1, causal_half) * (1 / config.objective.learned_per_row)


def rows_line(config: Any, lengths: tuple[int, int], rows: int) -> str:
    """What a step learns from, given so many rows of data, as screens say it."""
    objective = config.objective
    if not objective.draws:
        return f"{rows:,} sequences x {lengths}"
    passes, updates = objective.passes
    again = f", {passes} x {updates} updates" if objective.passes != (1, 1) else ""
    return f"{rows:,} prompts x {objective.per_row} answers x {lengths}{again}"
