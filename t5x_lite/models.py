"""Encoder-decoders, decoder-only and encoder-only models from one Block and one Stack.

A model is a token embedding, one or two stacks, and a projection to logits. A stack is a
list of segments, each a few blocks repeated with stacked parameters; a block is
self-attention, perhaps cross-attention, and an MLP, wired by one of the RESIDUALS.

Modules are plain functions of their parameters: dropout keys, caches and auxiliary values
are arguments and results. Outside this module parameters are nested dicts (`Model`).

Shape letters: B batch, L length, S key length, D model, V vocabulary, N heads, H head dim.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite import pipeline, sharding, tree
from t5x_lite.errors import UserError
from t5x_lite.layers.attention import Attention, AttentionConfig
from t5x_lite.layers.embed import TokenEmbedding
from t5x_lite.layers.linear import Dense, InitConfig, dropout, kernel_std
from t5x_lite.layers.masks import Masking
from t5x_lite.layers.mlp import MLP, MLPConfig
from t5x_lite.layers.norm import Norm, NormConfig
from t5x_lite.layers.position import LearnedPositions, PositionConfig, make_bias, sinusoids

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One block; what is None is absent."""

    self_attention: AttentionConfig = AttentionConfig()
    cross_attention: AttentionConfig | None = None
    mlp: MLPConfig = MLPConfig()


@dataclasses.dataclass(frozen=True)
class SegmentConfig:
    """`blocks` in a row, `repeats` times, with stacked parameters."""

    blocks: tuple[BlockConfig, ...] = (BlockConfig(),)
    repeats: int = 1


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """An encoder or a decoder."""

    segments: tuple[SegmentConfig, ...] = (SegmentConfig(),)
    causal: bool = False
    position: PositionConfig = PositionConfig()
    norm: NormConfig = NormConfig()
    residual: str = "pre"           # a key of RESIDUALS
    residual_alpha: float = 1.0     # deepnorm: weight of the skip path (Wang et al. 2022)
    embedding_norm: bool = False    # a norm right after the embedding (BERT)
    final_norm: bool = True
    dropout_rate: float = 0.0       # on embeddings, sub-layer outputs and the final norm
    scan: bool = True               # see pipeline.run_layers
    remat: str = "none"             # see pipeline.remat

    @property
    def num_layers(self) -> int:
        """Blocks in all."""
        return sum(len(s.blocks) * s.repeats for s in self.segments)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model."""

    architecture: str = "encoder_decoder"   # encoder_decoder | decoder_only | encoder_only
    vocab_size: int = 32128                 # rows of the embedding, padding included
    embed_dim: int = 512
    encoder: StackConfig | None = StackConfig()
    decoder: StackConfig | None = StackConfig(causal=True)
    tie_logits: bool = False                # logits through the embedding table
    logits_scale: float = 1.0               # on the hidden state (T5 1.0, tied: embed_dim**-0.5)
    logits_softcap: float = 0.0             # c * tanh(logits / c); 0: none
    embedding_scale: float = 1.0            # on the embedded tokens
    init: InitConfig = InitConfig()


@dataclasses.dataclass(frozen=True)
class BlockInputs:
    """What all blocks of a stack share."""

    masking: Masking
    bias: jax.Array | None                  # [1|B, N, L, S]
    cross_masking: Masking | None = None
    encoded: jax.Array | None = None        # [B, S, D]; None where the cache holds its keys


jax.tree_util.register_dataclass(
    BlockInputs, data_fields=["masking", "bias", "cross_masking", "encoded"], meta_fields=[])


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
    """norm(alpha x + f(x)): Vaswani et al. 2017 and BERT at alpha 1, DeepNorm above."""
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
    "sandwich": Residual(_sandwich, "each", "each"),
    "parallel": Residual(_parallel, "first", "none"),
    "parallel_two_norms": Residual(_parallel_two_norms, "each", "none"),
}


class Block(nnx.Module):
    """Self-attention, cross-attention where configured, and an MLP."""

    def __init__(self, key: jax.Array, embed_dim: int, config: BlockConfig, stack: StackConfig,
                 init: InitConfig, dtype: jnp.dtype):
        keys = jax.random.split(key, 10)
        self.self_attention = Attention(keys[0], embed_dim, config.self_attention, stack.position,
                                        init, dtype)
        self.names = ("self_attention", "mlp")
        if config.cross_attention is not None:
            self.cross_attention = Attention(keys[1], embed_dim, config.cross_attention,
                                             PositionConfig(kind="none"), init, dtype)
            self.names = ("self_attention", "cross_attention", "mlp")
        self.mlp = MLP(keys[2], embed_dim, config.mlp, init, dtype)
        wiring = RESIDUALS[stack.residual]
        for i, name in enumerate(self.names):
            if wiring.pre == "each" or (wiring.pre == "first" and i == 0):
                setattr(self, f"pre_{name}_norm", Norm(keys[3 + i], embed_dim, stack.norm, dtype))
            if wiring.post == "each":
                setattr(self, f"post_{name}_norm", Norm(keys[6 + i], embed_dim, stack.norm, dtype))
        if stack.position.per_layer:
            self.relative_position = make_bias(keys[9], config.self_attention.num_heads,
                                               stack.position, not stack.causal, dtype)
        self.stack = stack

    def __call__(self, x: jax.Array, inputs: BlockInputs, key: jax.Array | None = None,
                 cache: dict | None = None) -> tuple[jax.Array, tuple[dict | None, dict]]:
        """x_BLD -> (x_BLD, (cache, aux)).

        Args:
            key: this layer's dropout key, None outside training.
            cache: {"self_attention": …, "cross_attention": …}, see Attention.
        """
        keys = dict.fromkeys(("attention", "cross", "mlp", *self.names))
        if key is not None:
            keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(keys)}
        bias = inputs.bias
        if self.stack.position.per_layer:
            bias = self.relative_position(inputs.masking.q_positions, inputs.masking.k_positions)

        def self_attention(h):
            return self.self_attention(
                h, None, inputs.masking, bias, key=keys["attention"],
                cache=None if cache is None else cache["self_attention"])

        def cross_attention(h):
            kv = (cache["cross_attention"]["key"], cache["cross_attention"]["value"]) \
                if cache is not None else self.cross_attention.project_kv(inputs.encoded, None)
            y, _ = self.cross_attention(h, kv, inputs.cross_masking, None, key=keys["cross"])
            return y, None

        def mlp(h):
            return self.mlp(h, keys["mlp"])

        runs = {"self_attention": self_attention, "cross_attention": cross_attention, "mlp": mlp}

        def with_dropout(name):
            def run(h):
                y, out = runs[name](h)
                return dropout(y, self.stack.dropout_rate, keys[name], "act_batch", "act_length",
                               "act_embed", broadcast_dims=(1,)), out
            return run

        sublayers = [(with_dropout(n), getattr(self, f"pre_{n}_norm", None),
                      getattr(self, f"post_{n}_norm", None)) for n in self.names]
        x, outs = RESIDUALS[self.stack.residual].wire(x, sublayers, self.stack.residual_alpha)
        if cache is not None:
            cache = {**cache, "self_attention": outs[0]}
        return x, (cache, outs[-1])


class Segment(nnx.Module):
    """The blocks that one repeat of a segment applies."""

    def __init__(self, key: jax.Array, embed_dim: int, config: SegmentConfig, stack: StackConfig,
                 init: InitConfig, dtype: jnp.dtype):
        self.names = tuple(f"block_{i}" for i in range(len(config.blocks)))
        keys = jax.random.split(key, len(config.blocks))
        for name, block, k in zip(self.names, config.blocks, keys, strict=True):
            setattr(self, name, Block(k, embed_dim, block, stack, init, dtype))

    def __call__(self, x, inputs, key, layer, cache):
        """Applies the blocks; `layer` is the index in the stack of the first one."""
        caches, total = {}, {}
        for i, name in enumerate(self.names):
            layer_key = None if key is None else jax.random.fold_in(key, layer + i)
            x, (block_cache, aux) = getattr(self, name)(
                x, inputs, layer_key, None if cache is None else cache[name])
            caches[name] = block_cache
            total = add_aux(total, aux)
        return x, (None if cache is None else caches, total)


def add_aux(a: Mapping, b: Mapping) -> dict:
    """Adds two dicts of (sum, count) by name."""
    return {name: jax.tree.map(jnp.add, a[name], b[name]) if name in a and name in b
            else a.get(name, b.get(name)) for name in {**a, **b}}


class Stack(nnx.Module):
    """Segments one after another, between the embeddings and the final norm."""

    def __init__(self, key: jax.Array, embed_dim: int, config: StackConfig, init: InitConfig,
                 dtype: jnp.dtype):
        keys = jax.random.split(key, len(config.segments) + 4)
        self.names = tuple(f"segment_{i}" for i in range(len(config.segments)))
        for name, segment, k in zip(self.names, config.segments, keys[4:], strict=True):
            setattr(self, name, jax.vmap(
                lambda k, s=segment: Segment(k, embed_dim, s, config, init, dtype))(
                    jax.random.split(k, segment.repeats)))
        first = config.segments[0].blocks[0].self_attention
        if not config.position.per_layer:
            self.relative_position = make_bias(keys[0], first.num_heads, config.position,
                                               not config.causal, dtype)
        if config.position.kind == "learned":
            self.learned_positions = LearnedPositions(keys[1], embed_dim, config.position, init)
        if config.embedding_norm:
            self.embedding_norm = Norm(keys[2], embed_dim, config.norm, dtype)
        if config.final_norm:
            self.final_norm = Norm(keys[3], embed_dim, config.norm, dtype)
        self.config = config
        self.dtype = dtype

    def __call__(self, x: jax.Array, masking: Masking, positions: jax.Array, *,
                 encoded: jax.Array | None = None, cross_masking: Masking | None = None,
                 key: jax.Array | None = None, cache: dict | None = None):
        """x_BLD (embedded tokens) -> (x_BLD, cache, aux).

        Args:
            positions: int32 [1|B, L], restarted by packing: what absolute positions count.
            encoded, cross_masking: the encoder's output and who sees it.
            key: dropout key; layer n uses fold_in(key, n), however the layers are run.
            cache: {segment: {block: …}} with leaves stacked over repeats.
        """
        config = self.config
        if config.position.kind == "learned":
            x = x + self.learned_positions(positions).astype(self.dtype)
        elif config.position.kind == "sinusoidal":
            x = x + sinusoids(positions, x.shape[-1]).astype(self.dtype)
        if config.embedding_norm:
            x = self.embedding_norm(x)
        x = self._dropout(x, key, config.num_layers)
        bias = None
        if getattr(self, "relative_position", None) is not None:
            bias = self.relative_position(masking.q_positions, masking.k_positions)
        inputs = BlockInputs(masking, bias, cross_masking, encoded)
        layer, caches, total = 0, {}, {}
        for name, segment in zip(self.names, config.segments, strict=True):
            blocks = len(segment.blocks)
            indices = layer + blocks * jnp.arange(segment.repeats)

            def apply(x, module, xs):
                index, block_cache = xs
                return module(x, inputs, key, index, block_cache)

            x, (caches[name], aux) = pipeline.run_layers(
                apply, getattr(self, name), x,
                (indices, None if cache is None else cache[name]),
                repeats=segment.repeats, scan=config.scan, remat_policy=config.remat)
            total = add_aux(total, jax.tree.map(lambda a: jnp.sum(a, axis=0), aux))
            layer += blocks * segment.repeats
        if config.final_norm:
            x = self.final_norm(x)
        x = self._dropout(x, key, config.num_layers + 1)
        return x, None if cache is None else caches, total

    def _dropout(self, x, key, site):
        key = None if key is None else jax.random.fold_in(key, site)
        return dropout(x, self.config.dropout_rate, key, "act_batch", "act_length", "act_embed",
                       broadcast_dims=(1,))

    def init_cache(self, batch: int, length: int, encoded: jax.Array | None = None) -> dict:
        """Empty self-attention caches of `length` slots, and the encoder's keys and values."""
        caches = {}
        for name, segment in zip(self.names, self.config.segments, strict=True):
            caches[name] = {}
            for i, block in enumerate(segment.blocks):
                attention = block.self_attention
                shape = (segment.repeats, batch, attention.kv_heads, length, attention.head_dim)
                empty = sharding.shard(jnp.zeros(shape, self.dtype), None, "act_batch",
                                       "act_kv_heads", "act_keys", None)
                cache = {"self_attention": {"key": empty, "value": empty}}
                if encoded is not None:
                    module = getattr(getattr(self, name), f"block_{i}").cross_attention
                    _, kv = jax.lax.scan(lambda _, m: (None, m.project_kv(encoded, None)),
                                         None, module)
                    cache["cross_attention"] = {"key": kv[0], "value": kv[1]}
                caches[name][f"block_{i}"] = cache
        return caches


class LanguageModel(nnx.Module):
    """What the three architectures share: embedding, logits, decoding."""

    def __init__(self, key: jax.Array, config: ModelConfig, dtype: jnp.dtype = jnp.float32):
        keys = jax.random.split(key, 4)
        self.token_embedding = TokenEmbedding(keys[0], config.vocab_size, config.embed_dim,
                                              config.init.embedding_std, dtype)
        for name, k in zip(("encoder", "decoder"), keys[1:], strict=False):
            stack = getattr(config, name)
            if stack is not None:
                setattr(self, name, Stack(k, config.embed_dim, stack, config.init, dtype))
        if not config.tie_logits:
            std = config.init.logits_std or kernel_std(config.init, config.embed_dim)
            self.logits = Dense(keys[3], config.embed_dim, config.vocab_size, ("embed", "vocab"),
                                std=std, dtype=dtype)
        self.config = config
        self.dtype = dtype

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, L] -> x_BLD."""
        x = self.token_embedding(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, self.dtype)
        return x

    def head_params(self) -> jax.Array:
        """The logits kernel_DV, gathered and cast once for all chunks of `head`."""
        if self.config.tie_logits:
            return self.token_embedding.as_kernel()
        return sharding.weight(self.logits.kernel[...], ("embed", "vocab"), self.dtype)

    def head(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> float32 logits [..., V]."""
        scale, softcap = self.config.logits_scale, self.config.logits_softcap
        if scale != 1.0:
            x = x * jnp.asarray(scale, x.dtype)
        middle = ("act_length",) if x.ndim == 3 else ()
        logits = sharding.dense(x, kernel, ("act_batch", *middle, "act_vocab"))
        logits = logits.astype(jnp.float32)
        return softcap * jnp.tanh(logits / softcap) if softcap else logits

    def decode(self, tokens: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
        """The next tokens_BL of each row -> (float32 logits_BLV, cache).

        Each row continues at cache["position"]; see decoding.py for the protocol.
        """
        stack = self.decoder
        positions = cache["position"][:, None] + jnp.arange(tokens.shape[1])[None]
        slots = jax.tree.leaves(cache["layers"])[0].shape[3]
        masking = Masking(positions, jnp.arange(slots)[None], causal=True,
                          k_prefix=cache.get("prefix"))
        cross = None
        if "segments" in cache:
            cross = Masking(positions, jnp.arange(cache["segments"].shape[1])[None],
                            jnp.ones_like(positions), cache["segments"])
        x, layers, _ = stack(self.embed(tokens), masking, positions, cross_masking=cross,
                             cache=cache["layers"])
        cache = {**cache, "layers": layers, "position": cache["position"] + tokens.shape[1]}
        return self.head(self.head_params(), x), cache


def take_rows(cache: dict, rows: jax.Array) -> dict:
    """The cache with its batch rows reordered or repeated: int32 [B'] indices into B."""
    def take(path, leaf):
        axis = 1 if path.startswith("layers/") else 0
        names = (None, "act_batch", "act_kv_heads") if axis else ("act_batch",)
        names = names + (None,) * (leaf.ndim - len(names))
        return leaf.at[(slice(None),) * axis + (rows,)].get(out_sharding=sharding.spec(*names))
    return tree.map_with_path(take, cache)


def _row_masking(batch: Batch, side: str, causal: bool) -> tuple[Masking, jax.Array]:
    """The self-attention masking of one side of a batch, and its absolute positions."""
    tokens = batch[f"{side}_input_tokens"]
    index = jnp.arange(tokens.shape[1])[None]
    segments = batch.get(f"{side}_segment_ids")
    if segments is None and not causal:
        segments = (tokens != 0).astype(jnp.int32)   # padding is id 0
    masking = Masking(index, index, segments, segments, batch.get(f"{side}_prefix"), causal)
    return masking, batch.get(f"{side}_positions", index)


def _keys(key: jax.Array | None) -> tuple:
    return (None, None) if key is None else tuple(jax.random.split(key))


class EncoderDecoder(LanguageModel):
    """T5, BART: an encoder reads, a decoder writes."""

    def encode(self, batch: Batch, key: jax.Array | None = None):
        """-> (encoded_BSD, aux)."""
        masking, positions = _row_masking(batch, "encoder", self.config.encoder.causal)
        x = self.embed(batch["encoder_input_tokens"])
        encoded, _, aux = self.encoder(x, masking, positions, key=key)
        return encoded, aux

    def __call__(self, batch: Batch, key: jax.Array | None = None):
        """A training batch -> (hidden_BLD before the logits, aux)."""
        encoder_key, decoder_key = _keys(key)
        encoded, encoder_aux = self.encode(batch, encoder_key)
        source, _ = _row_masking(batch, "encoder", False)
        masking, positions = _row_masking(batch, "decoder", self.config.decoder.causal)
        queries = masking.q_segments
        if queries is None:
            queries = jnp.ones_like(batch["decoder_input_tokens"])
        cross = Masking(masking.q_positions, source.k_positions, queries, source.k_segments)
        x, _, aux = self.decoder(self.embed(batch["decoder_input_tokens"]), masking, positions,
                                 encoded=encoded, cross_masking=cross, key=decoder_key)
        return x, add_aux(encoder_aux, aux)

    def init_cache(self, batch: Batch, length: int) -> dict:
        """Encodes the batch; the cache of `length` decoder slots that `decode` continues."""
        encoded, _ = self.encode(batch)
        tokens = batch["encoder_input_tokens"]
        return {"position": jnp.zeros_like(tokens[:, 0]),
                "segments": (tokens != 0).astype(jnp.int32),
                "layers": self.decoder.init_cache(tokens.shape[0], length, encoded)}


class DecoderOnly(LanguageModel):
    """GPT, LLaMA: one causal stack (a prefix may be bidirectional)."""

    def __call__(self, batch: Batch, key: jax.Array | None = None):
        """A training batch -> (hidden_BLD before the logits, aux)."""
        masking, positions = _row_masking(batch, "decoder", True)
        x, _, aux = self.decoder(self.embed(batch["decoder_input_tokens"]), masking, positions,
                                 key=key)
        return x, aux

    def init_cache(self, batch: Batch, length: int) -> dict:
        """An empty cache of `length` slots for as many rows as the batch has."""
        tokens = batch["decoder_input_tokens"]
        return {"position": jnp.zeros_like(tokens[:, 0]),
                "layers": self.decoder.init_cache(tokens.shape[0], length)}


class EncoderOnly(LanguageModel):
    """BERT: one bidirectional stack, logits at every position."""

    def __call__(self, batch: Batch, key: jax.Array | None = None):
        """A training batch -> (hidden_BLD before the logits, aux)."""
        masking, positions = _row_masking(batch, "encoder", False)
        x, _, aux = self.encoder(self.embed(batch["encoder_input_tokens"]), masking, positions,
                                 key=key)
        return x, aux


ARCHITECTURES = {"encoder_decoder": (EncoderDecoder, ("encoder", "decoder")),
                 "decoder_only": (DecoderOnly, ("decoder",)),
                 "encoder_only": (EncoderOnly, ("encoder",))}


# --- the boundary: modules inside, nested dicts of arrays outside ---------------------------------

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
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Model:
    """A model definition: builds parameters and binds them to the module."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype = jnp.float32,
                 param_dtype: jnp.dtype = jnp.float32):
        validate(config)
        self.config = config
        self._cls = ARCHITECTURES[config.architecture][0]
        self._param_dtype = param_dtype
        self._dtype = dtype
        abstract = jax.eval_shape(lambda: self._cls(jax.random.key(0), config, dtype))
        self._graphdef, state = nnx.split(abstract)
        self._variables = {"/".join(map(str, path)): var for path, var in nnx.to_flat_state(state)}
        self._paths = {"/".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}

    @property
    def table(self) -> dict[str, ParamInfo]:
        """{path: ParamInfo} of every parameter, without allocating any."""
        rows = {}
        for path, variable in self._variables.items():
            meta = variable.get_metadata()
            stacked = len(variable.shape) - len(meta["logical_axes"])
            rows[path] = ParamInfo(
                path, tuple(variable.shape), self._param_dtype,
                ("layers",) * stacked + meta["logical_axes"],
                tuple(variable.shape[:stacked]) + tuple(meta["units"]), meta["fan_in"], meta["init"])
        return dict(sorted(rows.items()))

    def init(self, key: jax.Array) -> dict:
        """Fresh parameters as a nested dict. Call it under jit with out_shardings."""
        state = nnx.to_flat_state(nnx.state(self._cls(key, self.config, self._dtype)))
        return tree.unflatten({"/".join(map(str, p)): v[...].astype(self._param_dtype)
                               for p, v in state})

    def bind(self, params: Mapping) -> LanguageModel:
        """The module with these parameters; call inside the traced function."""
        flat = tree.flatten(params)
        problems = tree.diff(self._variables, flat)
        assert not problems, f"parameters do not fit the model:\n{problems}"
        state = nnx.from_flat_state(
            [(self._paths[p], v.replace(flat[p])) for p, v in self._variables.items()])
        return nnx.merge(self._graphdef, state)


def validate(config: ModelConfig) -> None:
    """Raises UserError for a model that cannot be built, naming the field."""
    if config.architecture not in ARCHITECTURES:
        raise UserError(f"model.architecture={config.architecture!r}: must be one of "
                        f"{', '.join(ARCHITECTURES)}.")
    needed = ARCHITECTURES[config.architecture][1]
    for name in ("encoder", "decoder"):
        stack = getattr(config, name)
        if (stack is not None) != (name in needed):
            raise UserError(f"model.{name} must be {'given' if name in needed else 'None'} for "
                            f"model.architecture={config.architecture!r}.")
        if stack is None:
            continue
        if stack.residual not in RESIDUALS:
            raise UserError(f"model.{name}.residual={stack.residual!r}: must be one of "
                            f"{', '.join(RESIDUALS)}.")
        for i, segment in enumerate(stack.segments):
            for j, block in enumerate(segment.blocks):
                where = f"model.{name}.segments[{i}].blocks[{j}]"
                attention = block.self_attention
                if attention.num_heads % attention.kv_heads:
                    raise UserError(f"{where}.self_attention: num_heads={attention.num_heads} must "
                                    f"be a multiple of num_kv_heads={attention.kv_heads}.")
                crossed = block.cross_attention is not None
                if crossed != (name == "decoder" and config.encoder is not None):
                    raise UserError(f"{where}.cross_attention must be "
                                    f"{'None' if crossed else 'given'} here.")
