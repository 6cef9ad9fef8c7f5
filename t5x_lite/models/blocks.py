"""Blocks, and stacks of them: what every architecture is made of.

A stack is a list of segments, each a few blocks repeated with stacked parameters; a block is
self-attention or another of the MIXERS, perhaps cross-attention, and an MLP, wired by one of the
RESIDUALS.

Modules are plain functions of their parameters: dropout keys, caches and auxiliary values
are arguments and results.

Shape letters: B batch, L length, S key length, D model, N heads, H head dim.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.errors import UserError
from t5x_lite.layers import attention_implementations, mixers
from t5x_lite.layers.attention import ATTENTIONS
from t5x_lite.layers.config import AttentionConfig, InitConfig, PositionConfig
from t5x_lite.layers.convolution import Convolution
from t5x_lite.layers.linear import RowKey, dropout
from t5x_lite.layers.linear_attention import GatedLinearAttention, LinearAttention, constant_decays
from t5x_lite.layers.lstm import LSTM
from t5x_lite.layers.masks import Masking
from t5x_lite.layers.mixers import Kept, Mixer
from t5x_lite.layers.mlp import MLP, Adapter
from t5x_lite.layers.moe import MoE
from t5x_lite.layers.norm import Norm
from t5x_lite.layers.position import POSITIONS, PositionBias, make_bias
from t5x_lite.layers.rg_lru import RGLRU
from t5x_lite.layers.routing import EXPERT_LOAD, load_metrics
from t5x_lite.layers.spatial_gating import SpatialGating
from t5x_lite.layers.state_space import StateSpace
from t5x_lite.models.config import BlockConfig, SegmentConfig, StackConfig
from t5x_lite.parallel import products, sharding
from t5x_lite.parallel.pipeline import run_layers
from t5x_lite.parallel.remat import tag

LOAD_ENTROPY = "moe/load_entropy"   # of a mixture's load, see routing.load_metrics
_AUX_LOSS = "aux_loss"
_LAYERS = " by layer"   # ends the names of metrics that are kept apart while layers are added up
RESIDUAL_AXES = ("act_batch", "act_norm_length", "act_embed")   # of x_BLD between sub-layers


@dataclasses.dataclass(frozen=True)
class BlockInputs:
    """What all blocks of a stack share."""

    masking: Masking
    bias: PositionBias | jax.Array | None   # [1|B, N, L, S], or where that is never made whole
    cross_masking: Masking | None = None
    encoded: jax.Array | None = None        # [B, S, D]; None where the cache holds its keys
    key: RowKey | None = None               # dropout keys, None outside training
    tokens: jax.Array | None = None         # int32 [B, L]: what hash routing goes by
    real: jax.Array | None = None           # bool [B, L], False where padding; None: all real


jax.tree_util.register_dataclass(
    BlockInputs, data_fields=["masking", "bias", "cross_masking", "encoded", "key", "tokens",
                              "real"],
    meta_fields=[])


# --- residual wiring: (x, [(run, pre_norm, post_norm)], alpha) -> x, [what each run returned] ---

def _pre(x, sublayers, alpha):
    """x + f(norm(x)): T5, GPT-2 and most since (Xiong et al. 2020)."""
    outs = []
    for run, pre_norm, _ in sublayers:
        y, out = run(pre_norm(x))
        x = x + y
        outs.append(out)
    return x, outs


def _post(x, sublayers, alpha):
    """norm(alpha x + f(x)): Vaswani et al. 2017 and BERT at alpha 1, DeepNorm (Wang et al. 2022,
    which also scales the initialisation) above."""
    outs = []
    for run, _, post_norm in sublayers:
        y, out = run(x)
        x = post_norm((alpha * x if alpha != 1.0 else x) + y)
        outs.append(out)
    return x, outs


def _sandwich(x, sublayers, alpha):
    """x + norm'(f(norm(x))): Ding et al. 2021."""
    outs = []
    for run, pre_norm, post_norm in sublayers:
        y, out = run(pre_norm(x))
        x = x + post_norm(y)
        outs.append(out)
    return x, outs


def _post_inside(x, sublayers, alpha):
    """x + norm(f(x)): Swin V2 (Liu et al. 2021), OLMo 2 (Walsh et al. 2025, section 3.2)."""
    outs = []
    for run, _, post_norm in sublayers:
        y, out = run(x)
        x = x + post_norm(y)
        outs.append(out)
    return x, outs


def _parallel(x, sublayers, alpha):
    """x + f(norm(x)) + g(norm(x)) with one norm (GPT-J, PaLM section 2)."""
    h = sublayers[0][1](x)
    ys, outs = zip(*(run(h) for run, _, _ in sublayers), strict=True)
    return x + sum(ys), list(outs)


def _parallel_two_norms(x, sublayers, alpha):
    """x + f(norm_1(x)) + g(norm_2(x)) (GPT-NeoX-20B)."""
    ys, outs = zip(*(run(pre_norm(x)) for run, pre_norm, _ in sublayers), strict=True)
    return x + sum(ys), list(outs)


@dataclasses.dataclass(frozen=True)
class Residual:
    """A wiring, and which norms it needs."""

    wire: Callable
    pre: str    # norms before sub-layers: none | each | first
    post: str   # norms after: none | each


RESIDUALS = {
    "pre": Residual(_pre, "each", "none"),
    "post": Residual(_post, "none", "each"),
    "deepnorm": Residual(_post, "none", "each"),
    "post_inside": Residual(_post_inside, "none", "each"),
    "sandwich": Residual(_sandwich, "each", "each"),
    "parallel": Residual(_parallel, "first", "none"),
    "parallel_two_norms": Residual(_parallel_two_norms, "each", "none"),
}


def validate_branches(where: str, stack: StackConfig, base_depth: int) -> None:
    """Raises UserError where a norm behind the branches would undo their scale."""
    if RESIDUALS[stack.residual].post == "none" or (stack.branch_scale == 1.0 and not base_depth):
        return
    field = f"model.base_depth={base_depth}" if base_depth else f"{where}.branch_scale={stack.branch_scale:g}"
    fitting = [name for name, row in RESIDUALS.items() if row.post == "none"]
    raise UserError(f"{field} scales what sub-layers add; {where}.residual={stack.residual!r} has norms "
                    f"behind them. Use one of {', '.join(fitting)}, or leave it out.")


def deepnorm_constants(encoder_layers: int, decoder_layers: int
                       ) -> tuple[tuple[float, float], tuple[float, float]]:
    """((alpha, beta) of the encoder, (alpha, beta) of the decoder) (Wang et al. 2022, figure 2).

    alpha is StackConfig.residual_alpha. beta is InitConfig.value_factor: kernels of values,
    attention outputs and MLPs are drawn from Xavier's normal times beta. A depth of 0 is a
    stack that is not there.
    """
    n, m = encoder_layers, decoder_layers
    if not m:
        return ((2 * n) ** 0.25, (8 * n) ** -0.25), (1.0, 1.0)
    if not n:
        return (1.0, 1.0), ((2 * m) ** 0.25, (8 * m) ** -0.25)
    depth = (n ** 4 * m) ** (1 / 16)
    return (0.81 * depth, 0.87 / depth), ((3 * m) ** 0.25, (12 * m) ** -0.25)


def _attention(key, embed_dim, block, stack, init, dtype):
    return ATTENTIONS[block.self_attention.kind].module(
        key, embed_dim, block.self_attention, block.position or stack.position, init, dtype)


def _attention_cache(block: BlockConfig, embed_dim: int, length: int) -> dict[str, Kept]:
    entries = ATTENTIONS[block.self_attention.kind].cache(block.self_attention)
    return {name: Kept((heads, length, features), (axis, "act_keys", None))
            for name, (heads, features, axis) in entries.items()}


def _own(module: Callable) -> Callable:
    """A row's constructor of a module that MixerConfig describes."""
    return lambda key, embed_dim, block, stack, init, dtype: module(
        key, embed_dim, block.mixer, stack.causal, init, dtype)


_HEADS = ("expand", "head_dim", "state_dim", "use_bias")
_with = functools.partial
MIXERS = {
    "attention": Mixer(_attention, _attention_cache, None, name="self_attention", causal=False, attends=True),
    "lstm": Mixer(_own(LSTM), mixers.kept(mixers.lstm_cache), mixers.lstm_flops,
                  settings=("expand", "use_bias")),
    "rg_lru": Mixer(_own(RGLRU), mixers.kept(mixers.rg_lru_cache), mixers.rg_lru_flops,
                    settings=("expand", "head_dim", "taps", "use_bias"), heads=True),
    "ssd": Mixer(_own(StateSpace), mixers.kept(mixers.ssd_cache), mixers.ssd_flops,
                 settings=(*_HEADS, "taps"), heads=True),
    "conv": Mixer(_own(Convolution), mixers.kept(mixers.conv_cache), mixers.conv_flops,
                  settings=("expand", "taps", "use_bias"), causal=False),
    "gmlp": Mixer(_own(SpatialGating), mixers.gmlp_cache, mixers.gmlp_flops,
                  settings=("expand", "max_length", "use_bias"), causal=False),
    "linear": Mixer(_own(LinearAttention), mixers.kept(_with(mixers.linear_cache, more=1)),
                    _with(mixers.linear_flops, more=1), settings=_HEADS, causal=False, heads=True),
    "gated_linear": Mixer(_own(GatedLinearAttention), mixers.kept(mixers.linear_cache),
                          _with(mixers.linear_flops, gate=True, decay=True), settings=_HEADS, heads=True),
    "retention": Mixer(_own(_with(GatedLinearAttention, decays=constant_decays)),
                       mixers.kept(mixers.linear_cache), _with(mixers.linear_flops, gate=True),
                       settings=_HEADS, heads=True),
}


class Block(nnx.Module):
    """What mixes tokens (a row of MIXERS), cross-attention where configured, and an MLP."""

    def __init__(self, key: jax.Array, embed_dim: int, config: BlockConfig, stack: StackConfig,
                 init: InitConfig, dtype: jnp.dtype):
        keys = jax.random.split(key, 10)
        mixer = MIXERS[config.mixer.kind]
        setattr(self, mixer.name, mixer.module(keys[0], embed_dim, config, stack, init, dtype))
        self.names = (mixer.name, "mlp")
        if config.cross_attention is not None:
            self.cross_attention = ATTENTIONS[config.cross_attention.kind].module(
                keys[1], embed_dim, config.cross_attention, PositionConfig(kind="none"), init,
                dtype)
            self.names = (mixer.name, "cross_attention", "mlp")
        if config.moe is None:
            self.mlp = MLP(keys[2], embed_dim, config.mlp, init, dtype)
        else:
            self.mlp = MoE(keys[2], embed_dim, config.moe, init, dtype, causal=stack.causal)
        wiring = RESIDUALS[stack.residual]
        for i, name in enumerate(self.names):
            if wiring.pre == "each" or (wiring.pre == "first" and i == 0):
                setattr(self, f"pre_{name}_norm", Norm(keys[3 + i], embed_dim, stack.norm, dtype))
            if wiring.post == "each":
                setattr(self, f"post_{name}_norm", Norm(keys[6 + i], embed_dim, stack.norm, dtype))
            if stack.adapter_dim:
                setattr(self, f"{name}_adapter", Adapter(
                    jax.random.fold_in(key, i), embed_dim, stack.adapter_dim, init, dtype))
        self.own_bias = mixer.attends and stack.position.per_layer
        if self.own_bias:
            self.relative_position = make_bias(keys[9], config.self_attention.num_heads,
                                               stack.position, not stack.causal, dtype)
        self.stack = stack

    def __call__(self, x: jax.Array, inputs: BlockInputs, key: RowKey | None = None,
                 cache: dict | None = None) -> tuple[jax.Array, tuple[dict | None, dict]]:
        """x_BLD -> (x_BLD, (cache, aux)).

        Args:
            key: this layer's dropout key, None outside training.
            cache: {"self_attention" or "mixer": …, "cross_attention": …}, see MIXERS and Attention.
        """
        mixer = self.names[0]
        keys = dict.fromkeys(("attention", "cross", "mlp", *self.names))
        if key is not None:
            keys = {name: key.fold_in(i) for i, name in enumerate(keys)}
        bias = inputs.bias
        if self.own_bias:
            bias = self.relative_position()

        def mix(h):
            return getattr(self, mixer)(
                h, None, inputs.masking, bias, key=keys["attention"],
                cache=None if cache is None else cache[mixer])

        def cross_attention(h):
            kv = (cache["cross_attention"]["key"], cache["cross_attention"]["value"]) \
                if cache is not None else self.cross_attention.project_kv(inputs.encoded, None)
            y, _ = self.cross_attention(h, kv, inputs.cross_masking, None, key=keys["cross"])
            return y, None

        def mlp(h):
            return self.mlp(h, keys["mlp"], mask=inputs.real, tokens=inputs.tokens,
                            decoding=cache is not None)

        runs = {mixer: mix, "cross_attention": cross_attention, "mlp": mlp}

        def with_dropout(name):
            def run(h):
                y, out = runs[name](h)
                y = tag(y, "mlp_output" if name == "mlp" else "attention_output")
                y = dropout(y, self.stack.dropout_rate, keys[name], *RESIDUAL_AXES,
                            broadcast_dims=(1,))
                y = getattr(self, f"{name}_adapter")(y) if self.stack.adapter_dim else y
                scale = self.stack.branch_scale
                return (y if scale == 1.0 else scale * y), out
            return run

        sublayers = [(with_dropout(n), getattr(self, f"pre_{n}_norm", None),
                      getattr(self, f"post_{n}_norm", None)) for n in self.names]
        x, outs = RESIDUALS[self.stack.residual].wire(x, sublayers, self.stack.residual_alpha)
        if cache is not None:
            cache = {**cache, mixer: outs[0]}
        return x, (cache, outs[-1])


class Segment(nnx.Module):
    """The blocks that one repeat of a segment applies."""

    def __init__(self, key: jax.Array, embed_dim: int, config: SegmentConfig, stack: StackConfig,
                 init: InitConfig, dtype: jnp.dtype):
        self.names = tuple(f"block_{i}" for i in range(len(config.blocks)))
        self.num_layers = stack.num_layers
        keys = jax.random.split(key, len(config.blocks))
        for name, block, k in zip(self.names, config.blocks, keys, strict=True):
            setattr(self, name, Block(k, embed_dim, block, stack, init, dtype))

    def __call__(self, x, inputs, layer, cache):
        """Applies the blocks; `layer` is the index in the stack of the first one."""
        caches, total = {}, {}
        for i, name in enumerate(self.names):
            layer_key = None if inputs.key is None else inputs.key.fold_in(layer + i)
            x, (block_cache, aux) = getattr(self, name)(
                x, inputs, layer_key, None if cache is None else cache[name])
            caches[name] = block_cache
            total = add_aux(total, _at_layer(aux, layer + i, self.num_layers))
        return x, (None if cache is None else caches, total)


def add_aux(a: Mapping, b: Mapping) -> dict:
    """Adds two dicts of (sum, count) by name."""
    return {name: jax.tree.map(jnp.add, a[name], b[name]) if name in a and name in b
            else a.get(name, b.get(name)) for name in {**a, **b}}


def _at_layer(aux: Mapping, layer: jax.Array, num_layers: int) -> dict:
    """aux and what is wanted of each layer, as arrays [num_layers, …] that are 0 elsewhere:
    however layers are run (scanned, in a pipeline), their auxiliary values are added.

    In training that is the load's entropy; in evaluation the loads themselves and the losses,
    which are divided only once they are whole.
    """
    aux = dict(aux)
    apart = {LOAD_ENTROPY: aux[LOAD_ENTROPY]} if LOAD_ENTROPY in aux else {}
    if EXPERT_LOAD in aux:
        load = aux.pop(EXPERT_LOAD)   # layers may differ in their number of experts
        apart = {f"{EXPERT_LOAD} of {load[0].size}": load, _AUX_LOSS: aux.pop(_AUX_LOSS)}

    def spread(a):
        here = jnp.arange(num_layers).reshape(-1, *[1] * a.ndim) == layer
        return jnp.where(here, a, 0.0)
    return {**aux, **{name + _LAYERS: jax.tree.map(spread, pair) for name, pair in apart.items()}}


def _by_layer(aux: Mapping, config: StackConfig, side: str) -> dict:
    """aux with those arrays as a metric for each mixture, "moe/load_entropy/encoder_3"."""
    blocks = [b for s in config.segments for _ in range(s.repeats) for b in s.blocks]
    found = {}
    for name, pair in aux.items():
        if not name.endswith(_LAYERS):
            found[name] = pair
            continue
        sums, counts = pair
        name, _, experts = name.removesuffix(_LAYERS).partition(" of ")
        found |= {f"{name}/{side}_{i}": (sums[i], counts[i]) for i, block in enumerate(blocks)
                  if block.moe is not None and experts in ("", str(block.moe.num_experts))}
    return found


def mixture_metrics(sums: Mapping) -> dict:
    """What evaluation's batches have added up to, with the metrics of mixtures as training has
    them: the load's of every layer and their mean, and the auxiliary loss of all layers.

    sums: {metric: (sum, count)} of numbers and numpy arrays; others pass through.
    """
    split = {name: name.rpartition("/") for name in sums}
    found = {name: pair for name, pair in sums.items()
             if split[name][0] not in (EXPERT_LOAD, _AUX_LOSS)}
    losses = [sums[name] for name, (what, *_) in split.items() if what == _AUX_LOSS]
    if losses:
        found[_AUX_LOSS] = (sum(s / max(count, 1.0) for s, count in losses), 1.0)
    for name, (what, _, layer) in split.items():
        if what == EXPERT_LOAD:
            load = {f"moe/{n}": pair for n, pair in load_metrics(sums[name][0]).items()}
            found = {**add_aux(found, load), f"{LOAD_ENTROPY}/{layer}": load[LOAD_ENTROPY]}
    return found


class Stack(nnx.Module):
    """Segments one after another, between the embeddings and the final norm."""

    def __init__(self, key: jax.Array, embed_dim: int, config: StackConfig, init: InitConfig,
                 dtype: jnp.dtype, side: str):
        """side: "encoder" or "decoder", for the names of metrics."""
        keys = jax.random.split(key, len(config.segments) + 4)
        self.names = tuple(f"segment_{i}" for i in range(len(config.segments)))
        for name, segment, k in zip(self.names, config.segments, keys[4:], strict=True):
            setattr(self, name, jax.vmap(
                lambda k, s=segment: Segment(k, embed_dim, s, config, init, dtype))(
                    jax.random.split(k, segment.repeats)))
        first = next(iter(self._attentions(config)), None)
        if first is not None and not config.position.per_layer:
            self.relative_position = make_bias(keys[0], first.num_heads, config.position,
                                               not config.causal, dtype)
        self.adds_positions = POSITIONS[config.position.kind].vectors is not None
        if self.adds_positions:
            # Checkpoints know vectors of every kind by this name.
            self.learned_positions = POSITIONS[config.position.kind].vectors(
                keys[1], embed_dim, config.position, init)
        if config.embedding_norm:
            self.embedding_norm = Norm(keys[2], embed_dim, config.norm, dtype)
        if config.final_norm:
            self.final_norm = Norm(keys[3], embed_dim, config.norm, dtype)
        self.config, self.embed_dim = config, embed_dim
        self.dtype = dtype
        self.side = side

    def __call__(self, x: jax.Array, masking: Masking, positions: jax.Array, *,
                 encoded: jax.Array | None = None, cross_masking: Masking | None = None,
                 tokens: jax.Array | None = None, real: jax.Array | None = None,
                 key: RowKey | None = None, cache: dict | None = None):
        """x_BLD (embedded tokens) -> (x_BLD, cache, aux).

        Args:
            positions: int32 [1|B, L], restarted by packing: what absolute positions count.
            encoded, cross_masking: the encoder's output and who sees it.
            tokens, real: see BlockInputs.
            key: dropout keys; layer n uses key.fold_in(n), however the layers are run.
            cache: {segment: {block: …}} with leaves stacked over repeats.
        """
        config = self.config
        if self.adds_positions:
            x = x + self.learned_positions(positions).astype(self.dtype)
        x = sharding.shard(x, *RESIDUAL_AXES)
        if config.embedding_norm:
            x = self.embedding_norm(x)
        x = self._dropout(x, key, config.num_layers)
        if not config.has_mixtures:
            tokens = real = None
        inputs = BlockInputs(masking, self._bias(masking), cross_masking, encoded, key, tokens,
                             real)
        layer, caches, total = 0, {}, {}
        for name, segment in zip(self.names, config.segments, strict=True):
            blocks = len(segment.blocks)
            indices = layer + blocks * jnp.arange(segment.repeats)
            x, (caches[name], aux), counts = run_layers(
                lambda x, module, xs, inputs: module(x, inputs, *xs), getattr(self, name), x,
                (indices, None if cache is None else cache[name]), inputs,
                repeats=segment.repeats, scan=config.scan, remat_policy=config.remat,
                pipeline=config.pipeline if cache is None else None)
            total = add_aux(total, jax.tree.map(lambda a: jnp.sum(a, axis=0), aux))
            total = add_aux(total, counts)
            layer += blocks * segment.repeats
        if config.final_norm:
            x = self.final_norm(x)
        x = self._dropout(x, key, config.num_layers + 1)
        x = sharding.shard(x, "act_batch", "act_length", "act_embed")
        return x, None if cache is None else caches, _by_layer(total, config, self.side)

    def _bias(self, masking: Masking) -> PositionBias | jax.Array | None:
        """The bias that the layers share: made once, or where some layer goes by chunks, a
        function that each calls."""
        if getattr(self, "relative_position", None) is None:
            return None
        bias = self.relative_position()
        if any(attention_implementations.by_chunks(a.implementation, masking)
               for a in self._attentions(self.config)):
            return bias
        return bias.whole(masking.q_positions, masking.k_positions)

    @staticmethod
    def _attentions(config: StackConfig) -> list[AttentionConfig]:
        """Of the blocks that attend."""
        return [b.self_attention for s in config.segments for b in s.blocks
                if MIXERS[b.mixer.kind].attends]

    def _dropout(self, x, key, site):
        key = None if key is None else key.fold_in(site)
        return dropout(x, self.config.dropout_rate, key, *RESIDUAL_AXES, broadcast_dims=(1,))

    def init_cache(self, batch: int, length: int, encoded: jax.Array | None = None) -> dict:
        """Empty caches of the mixers, `length` slots where they keep tokens, and the encoder's keys
        and values."""
        caches = {}
        for name, segment in zip(self.names, self.config.segments, strict=True):
            caches[name] = {}
            for i, block in enumerate(segment.blocks):
                kept, mixer = products.read_as(self.dtype), MIXERS[block.mixer.kind]
                cache = {mixer.name: {
                    name: sharding.shard(
                        jnp.zeros((segment.repeats, batch, *entry.shape), entry.dtype or kept),
                        None, "act_batch", *entry.axes)
                    for name, entry in mixer.cache(block, self.embed_dim, length).items()}}
                if encoded is not None:
                    module = getattr(getattr(self, name), f"block_{i}").cross_attention
                    _, kv, _ = run_layers(
                        lambda x, module, xs, inputs: (x, module.project_kv(x, None)), module,
                        encoded, (), (), repeats=segment.repeats, scan=True, remat_policy="none")
                    cache["cross_attention"] = {
                        "key": kv[0].astype(kept), "value": kv[1].astype(kept)}
                caches[name][f"block_{i}"] = cache
        return caches
