"""Encoder-decoders, decoder-only and encoder-only models from one Stack.

A model is a token embedding, one or two stacks (blocks.py), and a projection to logits.
Outside this module parameters are nested dicts (`Model`).

Shape letters: B batch, L length, S key length, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite import tree
from t5x_lite.errors import UserError, at_least, one_of
from t5x_lite.layers import attention, masks, mixers, mlp, moe, norm, position
from t5x_lite.layers.embed import (
    HeadTransform,
    LogitsBias,
    Prompt,
    ScalarHead,
    TokenEmbedding,
    TokenTypes,
)
from t5x_lite.layers.linear import INIT_KERNELS, Dense, RowKey, kernel_std
from t5x_lite.layers.masks import Masking
from t5x_lite.layers.routing import EXPERT_LOAD
from t5x_lite.models import cache as cache_lib, further_tokens, parametrization
from t5x_lite.models.ahead import ahead
from t5x_lite.models.blocks import (
    MIXERS,
    RESIDUALS,
    Block,
    BlockInputs,
    Stack,
    add_aux,
    validate_branches,
)
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig
from t5x_lite.models.further_tokens import FurtherToken
from t5x_lite.models.params import ParamInfo
from t5x_lite.parallel import products, remat, sharding

Batch = Mapping[str, jax.Array]


class LanguageModel(nnx.Module):
    """What the three architectures share: embedding, logits, decoding."""

    def __init__(self, key: jax.Array, config: ModelConfig, dtype: jnp.dtype = jnp.float32):
        keys = jax.random.split(key, 6)
        self.token_embedding = TokenEmbedding(keys[0], config.vocab_size, config.embed_dim,
                                              config.init.embedding_std, dtype)
        for name, k in zip(("encoder", "decoder"), keys[1:], strict=False):
            stack = getattr(config, name)
            if stack is not None:
                setattr(self, name, Stack(k, config.embed_dim, stack, stack.init or config.init,
                                          dtype, name))
        if not config.tie_logits:
            std = config.init.logits_std or kernel_std(config.init, config.embed_dim,
                                                       config.vocab_size)
            self.logits = Dense(keys[3], config.embed_dim, config.vocab_size, ("embed", "vocab"),
                                std=std, use_bias=config.logits_bias, dtype=dtype)
        elif config.logits_bias:
            self.logits = LogitsBias(keys[3], config.vocab_size)
        if config.token_types:
            self.token_types = TokenTypes(keys[4], config.token_types, config.embed_dim,
                                          config.init.position_std, dtype)
        if config.head_transform:
            stack = config.decoder or config.encoder
            self.head_transform = HeadTransform(keys[5], config.embed_dim, config.head_transform,
                                                stack.norm, config.init, dtype)
        for step in range(1, config.further_tokens + 1):
            own, stack = jax.random.split(jax.random.fold_in(key, 6 + step)), config.decoder
            rest = (stack, stack.init or config.init, dtype)
            block = Block(own[0], config.embed_dim, stack.segments[-1].blocks[-1], *rest)
            setattr(self, f"further_token_{step}",
                    FurtherToken(own[1], config.embed_dim, block, *rest))
        if config.scalar_head:
            self.scalar_head = ScalarHead(jax.random.fold_in(key, 5), config.embed_dim)
        if config.prompt_length:
            self.prompt = Prompt(jax.random.fold_in(key, 6), config.prompt_length,
                                 config.embed_dim, config.init.embedding_std, dtype)
        self.config = config
        self.dtype = dtype

    @property
    def prompted_side(self) -> str:
        """The side of a batch before whose rows a prompt stands."""
        return "decoder" if self.config.encoder is None else "encoder"

    def with_prompt(self, batch: Batch) -> Batch:
        """The batch with room for the prompt: tokens of id 1 that `embed_row` does not look up."""
        length = self.config.prompt_length
        names = [f"{self.prompted_side}_{n}" for n in ("input_tokens", "segment_ids", "mask")]
        longer = {}
        for name in (n for n in names if length and n in batch):
            x = sharding.shard(batch[name], "act_batch", None)
            x = jnp.pad(x, ((0, 0), (length, 0)), constant_values=1)
            longer[name] = sharding.shard(x, "act_batch", "act_length")
        return {**batch, **longer}

    def embed_row(self, batch: Batch, side: str) -> jax.Array:
        """x_BLD of a side of a batch that went through `with_prompt`."""
        tokens = batch[f"{side}_input_tokens"]
        types = batch.get(f"{side}_token_types")
        if side != self.prompted_side or not self.config.prompt_length:
            return self.embed(tokens, types)
        return self.prompt.before(self.embed(self.without_prompt(tokens), types))

    def without_prompt(self, x: jax.Array) -> jax.Array:
        """[B, P + L, …] -> [B, L, …]."""
        length, axes = self.config.prompt_length, (None, None, "act_embed")
        if not length:
            return x
        x = sharding.shard(x, "act_batch", *axes[1:x.ndim])[:, length:]
        return sharding.shard(x, "act_batch", "act_length", *axes[2:x.ndim])

    def embed(self, tokens: jax.Array, types: jax.Array | None = None) -> jax.Array:
        """int32 [B, L] tokens, and their types (None: all 0) -> x_BLD."""
        x = self.token_embedding(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, self.dtype)
        if self.config.token_types:
            x = x + self.token_types(jnp.zeros_like(tokens) if types is None else types)
        return x

    def stored_head(self) -> dict[str, jax.Array]:
        """What `gather_head` takes, as it is stored: "kernel" [D, V] or, tied, [V, D], and "bias"
        [V] where there is one."""
        kernel = self.token_embedding.embedding if self.config.tie_logits else self.logits.kernel
        bias = {"bias": self.logits.bias[...]} if self.config.logits_bias else {}
        return {"kernel": kernel[...], **bias}

    def gather_head(self, stored: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What `head` needs, gathered and cast once for all its chunks: {"kernel": [D, V]}, and
        {"bias": [V]} where there is one."""
        axes = ("vocab", "embed") if self.config.tie_logits else ("embed", "vocab")
        kernel = sharding.weight(stored["kernel"], axes, self.dtype)
        params = {"kernel": kernel.T if self.config.tie_logits else kernel}
        if "bias" in stored:
            params["bias"] = stored["bias"].astype(jnp.float32)
        return params

    def head_params(self) -> dict[str, jax.Array]:
        """What `head` needs."""
        return self.gather_head(self.stored_head())

    def head(self, params: Mapping[str, jax.Array], x: jax.Array,
             product: Callable = sharding.product) -> jax.Array:
        """Hidden states [..., D] -> float32 logits [..., V].

        product: see sharding.dense; the default rounds the logits to the compute dtype.
        """
        scale, softcap = self.config.logits_scale, self.config.logits_softcap
        if scale != 1.0:
            x = x * jnp.asarray(scale, x.dtype)
        middle = ("act_length",) if x.ndim == 3 else ()
        logits = sharding.dense(x, params["kernel"], ("act_batch", *middle, "act_vocab"), product)
        logits = logits.astype(jnp.float32)
        if "bias" in params:
            logits = logits + params["bias"]
        return softcap * jnp.tanh(logits / softcap) if softcap else logits

    def decode(self, tokens: jax.Array, cache: dict, head: Mapping[str, jax.Array] | None = None,
               counts: jax.Array | None = None) -> tuple[jax.Array, dict]:
        """The next tokens_BL of each row -> (float32 logits_BLV, cache).

        Each row continues at cache["position"]; see decoding/decode.py for the protocol.

        Args:
            head: `head_params`, made outside of a loop over tokens.
            counts: int32 [B], how many of the tokens each row then has; None: all L.
        """
        x, cache = self._decode(self.embed(tokens), tokens, cache, counts)
        head = self.head_params() if head is None else head
        return self.head(head, x, products.wide), cache

    def _decode(self, x: jax.Array, tokens: jax.Array, cache: dict, counts: jax.Array | None = None
                ) -> tuple[jax.Array, dict]:
        """Runs the decoder: embedded tokens x_BLD -> hidden states x_BLD before the logits, and the
        cache, which then stands L tokens further, or counts_B."""
        stack = self.decoder
        positions = cache["position"][:, None] + jnp.arange(tokens.shape[1])[None]
        kept = None if counts is None else jnp.arange(tokens.shape[1])[None] < counts[:, None]
        masking = Masking(positions, jnp.arange(cache_lib.slots(cache))[None], causal=True,
                          k_prefix=cache.get("prefix"), kept=kept)
        cross = None
        if "segments" in cache:
            cross = Masking(positions, jnp.arange(cache["segments"].shape[1])[None],
                            jnp.ones_like(positions), cache["segments"])
        x, layers, _ = stack(x, masking, positions, cross_masking=cross,
                             tokens=tokens, cache=cache["layers"])
        read = tokens.shape[1] if counts is None else counts
        return x, {**cache, "layers": layers, "position": cache["position"] + read}


def _row_masking(batch: Batch, side: str, causal: bool) -> tuple[Masking, jax.Array]:
    """The self-attention masking of one side of a batch, and its absolute positions."""
    tokens = batch[f"{side}_input_tokens"]
    index = jnp.arange(tokens.shape[1])[None]
    segments = batch.get(f"{side}_segment_ids")
    if segments is None and not causal:
        segments = masks.read_segments(batch, side)
    prefix = batch.get(f"{side}_prefix")
    masking = Masking(index, index, segments, masks.as_keys(segments),
                      None if prefix is None else masks.as_keys(prefix.astype(bool)), causal)
    return masking, batch.get(f"{side}_positions", index)


def _real(batch: Batch, side: str, start: int = 0, *, training: bool = True) -> jax.Array:
    """bool [B, L], False where padding. A decoder's first input, at `start`, is a real token of
    id 0, but in the rows without targets that fill evaluation's last batch."""
    if f"{side}_segment_ids" in batch or side != "decoder":
        return masks.read_segments(batch, side) != 0
    tokens = batch[f"{side}_input_tokens"]
    first = jnp.arange(tokens.shape[1]) == start
    weights = batch.get("decoder_loss_weights")
    if weights is None:
        return (tokens != 0) | first
    ends_BL = masks.up_to_the_last(weights)   # of vocabularies whose id 0 is a token
    if not training:
        first = first & ends_BL[:, :1]
    before = tokens.shape[1] - ends_BL.shape[1]   # a trained prompt's places
    read_BL = jnp.pad(ends_BL, ((0, 0), (before, 0)), constant_values=True) | first
    return (tokens != 0) | sharding.shard(read_BL, "act_batch", "act_length")


def _row_key(key: RowKey | jax.Array | None, batch: Batch) -> RowKey | None:
    """One key stands for a whole global batch; a micro-batch brings the keys of its rows."""
    if key is None or isinstance(key, RowKey):
        return key
    return RowKey.of(key, next(iter(batch.values())).shape[0])


def _with_start(batch: Batch, start_id: int) -> jax.Array:
    """The decoder's input tokens, which rows hold with 0 at the start of each target, with the
    model's own start token there."""
    tokens = batch["decoder_input_tokens"]
    if not start_id:
        return tokens
    positions = batch.get("decoder_positions", jnp.arange(tokens.shape[1])[None])
    return jnp.where(positions == 0, start_id, tokens)


class EncoderDecoder(LanguageModel):
    """T5, BART: an encoder reads, a decoder writes."""

    def encode(self, batch: Batch, key: RowKey | None = None):
        """A batch that went through with_prompt -> (encoded_BSD, aux)."""
        masking, positions = _row_masking(batch, "encoder", self.config.encoder.causal)
        encoded, _, aux = self.encoder(
            self.embed_row(batch, "encoder"), masking, positions,
            tokens=batch["encoder_input_tokens"], real=_real(batch, "encoder"), key=key)
        return encoded, aux

    def __call__(self, batch: Batch, key: RowKey | jax.Array | None = None):
        """A training batch -> (hidden_BLD before the logits, aux)."""
        key = _row_key(key, batch)
        batch = self.with_prompt(batch)
        encoded, encoder_aux = self.encode(batch, None if key is None else key.fold_in(0))
        source, _ = _row_masking(batch, "encoder", False)
        masking, positions = _row_masking(batch, "decoder", self.config.decoder.causal)
        queries = masking.q_segments
        if queries is None:
            queries = jnp.ones_like(batch["decoder_input_tokens"])
        elif "encoder_segment_ids" not in batch:   # several targets of the same inputs
            queries = jnp.minimum(queries, 1)
        cross = Masking(masking.q_positions, source.k_positions, queries, source.k_segments)
        tokens = _with_start(batch, self.config.decoder_start_id)
        x, _, aux = self.decoder(self.embed(tokens), masking, positions, tokens=tokens,
                                 real=_real(batch, "decoder", training=key is not None),
                                 encoded=encoded, cross_masking=cross,
                                 key=None if key is None else key.fold_in(1))
        return x, add_aux(encoder_aux, aux)

    def init_cache(self, batch: Batch, length: int) -> dict:
        """Encodes the batch; the cache of `length` decoder slots that `decode` continues."""
        batch = self.with_prompt(batch)
        encoded, _ = self.encode(batch)
        tokens = batch["encoder_input_tokens"]
        return {"position": jnp.zeros_like(tokens[:, 0]),
                "segments": masks.read_segments(batch, "encoder"),
                "layers": self.decoder.init_cache(tokens.shape[0], length, encoded)}


class DecoderOnly(LanguageModel):
    """GPT, LLaMA: one causal stack (a prefix may be bidirectional)."""

    def __call__(self, batch: Batch, key: RowKey | jax.Array | None = None):
        """A training batch -> (hidden_BLD before the logits, aux)."""
        key, batch = _row_key(key, batch), self.with_prompt(batch)
        masking, positions = _row_masking(batch, "decoder", True)
        x, _, aux = self.decoder(self.embed_row(batch, "decoder"), masking, positions,
                                 tokens=batch["decoder_input_tokens"], key=key,
                                 real=_real(batch, "decoder", self.config.prompt_length,
                                            training=key is not None))
        return self.without_prompt(x), aux

    def further(self, batch: Batch, hidden: jax.Array, aux: Mapping,
                key: RowKey | jax.Array | None = None) -> tuple[list[jax.Array], dict]:
        """Of each module that predicts a further token hidden_BLD before the logits, and aux with
        theirs.

        Args:
            hidden, aux: what `__call__` gives of this batch.
        """
        key, found, total = _row_key(key, batch), [], dict(aux)
        masking, _ = _row_masking(batch, "decoder", True)
        # A prefix whose tokens saw one another would tell what stands behind it.
        masking = dataclasses.replace(masking, k_prefix=None)
        real = _real(batch, "decoder", training=key is not None)
        for step in range(1, self.config.further_tokens + 1):
            tokens = ahead(batch["decoder_input_tokens"], step)
            site = self.config.decoder.num_layers + 1 + step
            inputs = BlockInputs(masking, None, key=None if key is None else key.fold_in(site),
                                 tokens=tokens, real=real)
            hidden, own = getattr(self, f"further_token_{step}")(hidden, self.embed(tokens), inputs)
            found.append(hidden)
            # Loads are shown by layer, and this is none of the decoder's.
            total = add_aux(total, {name: x for name, x in own.items() if name != EXPERT_LOAD})
        return found, total

    def init_cache(self, batch: Batch, length: int) -> dict:
        """A cache of `length` slots for as many rows as the batch has, empty but for a prompt,
        which has slots of its own.

        With decoder_prefix (bool [B, P]), the tokens of a prefix see one another: `decode` must
        be given them in one call.
        """
        tokens, prompt = batch["decoder_input_tokens"], self.config.prompt_length
        cache = {"position": jnp.zeros_like(tokens[:, 0]),
                 "layers": self.decoder.init_cache(tokens.shape[0], prompt + length)}
        if prompt:
            nothing = self.with_prompt({"decoder_input_tokens": tokens[:, :0]})
            _, cache = self._decode(self.embed_row(nothing, "decoder"),
                                    nothing["decoder_input_tokens"], cache)
        if "decoder_prefix" in batch:
            prefix = batch["decoder_prefix"].astype(bool)[:, :length]
            cache["prefix"] = jnp.pad(prefix, ((0, 0), (0, length - prefix.shape[1])))
        return cache


class EncoderOnly(LanguageModel):
    """BERT: one bidirectional stack, logits at every position."""

    def __call__(self, batch: Batch, key: RowKey | jax.Array | None = None):
        """A training batch -> (hidden_BLD before the logits, aux)."""
        key, batch = _row_key(key, batch), self.with_prompt(batch)
        masking, positions = _row_masking(batch, "encoder", False)
        x, _, aux = self.encoder(
            self.embed_row(batch, "encoder"), masking, positions,
            tokens=batch["encoder_input_tokens"], real=_real(batch, "encoder"), key=key)
        x = self.without_prompt(x)
        return self.head_transform(x) if self.config.head_transform else x, aux


ARCHITECTURES = {"encoder_decoder": (EncoderDecoder, ("encoder", "decoder")),
                 "decoder_only": (DecoderOnly, ("decoder",)),
                 "encoder_only": (EncoderOnly, ("encoder",))}


# --- the boundary: modules inside, nested dicts of arrays outside ---------------------------------

class Model:
    """A model definition: builds parameters and binds them to the module."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype = jnp.float32,
                 param_dtype: jnp.dtype = jnp.float32):
        validate(config)
        config = parametrization.resolved(config)
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

    def with_layers_apart(self, params: Mapping) -> tuple["Model", dict]:
        """A model of the same function whose decoder has a segment for each repeat, so that no
        parameter is stacked, and `params` cut accordingly.

        A loop over tokens cuts a stack at every turn, which copies all weights and caches: half
        of the time of a small model on CPU. Outside of it this costs memory for one more copy
        of the decoder.
        """
        decoder, renamed, number = self.config.decoder, {}, 0
        for i, segment in enumerate(decoder.segments):
            for repeat in range(segment.repeats):
                renamed[f"decoder/segment_{number}"] = (f"decoder/segment_{i}", repeat)
                number += 1
        segments = tuple(dataclasses.replace(s, repeats=1)
                         for s in decoder.segments for _ in range(s.repeats))
        apart = Model(dataclasses.replace(self.config, decoder=dataclasses.replace(
            decoder, segments=segments)), self._dtype, self._param_dtype)
        flat, cut = tree.flatten(params), {}
        for path in apart._variables:
            head, _, rest = path.partition("/block_")
            source, repeat = renamed.get(head, (head, None))
            value = flat[f"{source}/block_{rest}" if rest else path]
            cut[path] = value if repeat is None else value[repeat:repeat + 1]
        return apart, tree.unflatten(cut)


def validate(config: ModelConfig) -> None:
    """Raises UserError for a model that cannot be built, naming the field."""
    one_of("model.architecture", config.architecture, ARCHITECTURES)
    one_of("model.init.kernel", config.init.kernel, INIT_KERNELS)
    if config.head_transform:
        one_of("model.head_transform", config.head_transform, mlp.ACTIVATIONS)
    at_least("model.prompt_length", config.prompt_length, 0)
    parametrization.validate(config)
    further_tokens.validate(config)
    _validate_start(config)
    needed = ARCHITECTURES[config.architecture][1]
    for name in ("encoder", "decoder"):
        stack = getattr(config, name)
        if (stack is not None) != (name in needed):
            raise UserError(f"model.{name} must be {'given' if name in needed else 'None'} for "
                            f"model.architecture={config.architecture!r}.")
        if stack is not None:
            crosses = name == "decoder" and config.encoder is not None
            _validate_stack(f"model.{name}", stack, crosses)
            mixers.validate(f"model.{name}", stack, config, MIXERS)
            validate_branches(f"model.{name}", stack, config.base_depth)


def _validate_start(config: ModelConfig) -> None:
    start, fits = config.decoder_start_id, config.architecture == "encoder_decoder"
    if start and not fits:
        raise UserError(f"model.decoder_start_id={start}: of an encoder_decoder alone; a "
                        f"{config.architecture} model begins as data.vocabulary says. Use 0.")
    if not 0 <= start < config.vocab_size:
        raise UserError(f"model.decoder_start_id={start}: must be a token id, from 0 to "
                        f"{config.vocab_size - 1} (model.vocab_size - 1).")


def _validate_stack(where: str, stack: StackConfig, crosses: bool) -> None:
    """crosses: whether its blocks attend to an encoder."""
    one_of(f"{where}.residual", stack.residual, RESIDUALS)
    at_least(f"{where}.adapter_dim", stack.adapter_dim, 0)
    norm.validate(stack.norm, f"{where}.norm")
    remat.parse(stack.remat, f"{where}.remat")
    position.validate(stack.position, f"{where}.position")
    for i, segment in enumerate(stack.segments):
        for j, block in enumerate(segment.blocks):
            here = f"{where}.segments[{i}].blocks[{j}]"
            _validate_block(here, block, stack)
            if (block.cross_attention is not None) != crosses:
                raise UserError(f"{here}.cross_attention must be "
                                f"{'given' if crosses else 'None'} here.")


def _validate_block(where: str, block: BlockConfig, stack: StackConfig) -> None:
    if block.position is not None:
        position.validate(block.position, f"{where}.position")
        position.validate_own(block.position, stack.position, f"{where}.position")
    attention.validate(block.self_attention, f"{where}.self_attention")
    attention.validate_pattern(block.self_attention, stack.position, f"{where}.self_attention",
                               causal=stack.causal)
    if attention.ATTENTIONS[block.self_attention.kind].turns_only:
        position.validate_own(block.position or stack.position, stack.position, f"{where}.position")
    if block.cross_attention is not None:
        attention.validate(block.cross_attention, f"{where}.cross_attention", crosses=True)
    if block.moe is not None:
        moe.validate(block.moe, f"{where}.moe", causal=stack.causal)
    dense = block.mlp if block.moe is None else block.moe.mlp
    one_of(f"{where}.mlp.activation", dense.activation, mlp.ACTIVATIONS)
