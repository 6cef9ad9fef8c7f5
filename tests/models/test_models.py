"""Models against T5X's numbers, and the equalities that must hold between ways to run one."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import tree
from t5x_lite.errors import UserError
from t5x_lite.layers.config import (
    AttentionConfig,
    InitConfig,
    LatentConfig,
    MLPConfig,
    MoEConfig,
    NormConfig,
    PositionConfig,
)
from t5x_lite.layers.position import relative_position_bucket
from t5x_lite.models import language_model
from t5x_lite.models.cache import take_rows
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model
from t5x_lite.parallel import sharding
from tests.helpers import golden


def stack(depth=2, *, cross=False, dropout=0.0, heads=4, kv_heads=0, head_dim=8, mlp_dim=32,
          attention=None, **kwargs) -> StackConfig:
    """A small stack."""
    attention = attention or AttentionConfig(num_heads=heads, head_dim=head_dim, scale=1.0,
                                             num_kv_heads=kv_heads, dropout_rate=dropout)
    block = BlockConfig(self_attention=attention, cross_attention=attention if cross else None,
                        mlp=MLPConfig(mlp_dim=mlp_dim, dropout_rate=dropout))
    kwargs.setdefault("segments", (SegmentConfig((block,), depth),))
    return StackConfig(dropout_rate=dropout, causal=cross, **kwargs)


def encoder_decoder(dropout=0.0, **kwargs) -> ModelConfig:
    """T5.1.1 in miniature."""
    return ModelConfig(vocab_size=64, embed_dim=16, encoder=stack(dropout=dropout, **kwargs),
                       decoder=stack(cross=True, dropout=dropout, **kwargs))


def decoder_only(**kwargs) -> ModelConfig:
    """LLaMA in miniature."""
    decoder = dataclasses.replace(stack(**{"position": PositionConfig("rotary"), **kwargs}),
                                  causal=True)
    return ModelConfig("decoder_only", vocab_size=64, embed_dim=16, encoder=None, decoder=decoder,
                       tie_logits=True, init=InitConfig(embedding_std=0.5))


def mixtures(config: ModelConfig, room: float, every=2) -> ModelConfig:
    """A dense first layer, then every so many-th one a mixture: one that gives 4 experts `room`
    times their share of the tokens, then one that drops none."""
    def sparse(stack):
        dense = stack.segments[0].blocks[0]
        bounded = MoEConfig(num_experts=4, router="top_2", mlp=dense.mlp, shared_experts=1,
                            capacity_factor=room, eval_capacity_factor=room)
        period = []
        for moe in (bounded, dataclasses.replace(bounded, dropless=True)):
            period += [dense] * (every - 1) + [dataclasses.replace(dense, moe=moe)]
        return dataclasses.replace(stack, segments=(SegmentConfig((dense,), 1),
                                                    SegmentConfig(tuple(period), 2)))
    return dataclasses.replace(config, **{
        side: sparse(getattr(config, side)) for side in ("encoder", "decoder")
        if getattr(config, side) is not None})


def with_stacks(config: ModelConfig, **changes) -> ModelConfig:
    """The config with fields of both stacks replaced."""
    return dataclasses.replace(config, **{
        side: dataclasses.replace(getattr(config, side), **changes)
        for side in ("encoder", "decoder") if getattr(config, side) is not None})


def make_batch(config: ModelConfig, rows=8, source=12, target=8, seed=0, packed=False) -> dict:
    """Random tokens; sources end in padding, or rows hold two examples."""
    rng = np.random.default_rng(seed)
    batch = {"decoder_input_tokens": rng.integers(1, config.vocab_size, (rows, target)),
             "decoder_target_tokens": rng.integers(1, config.vocab_size, (rows, target))}
    if config.encoder is not None:
        tokens = rng.integers(1, config.vocab_size, (rows, source))
        if not packed:
            lengths = rng.integers(source // 2, source + 1, (rows, 1))
            tokens = np.where(np.arange(source) < lengths, tokens, 0)
        batch["encoder_input_tokens"] = tokens
    if packed:
        for side, length in (("encoder", source), ("decoder", target)):
            if f"{side}_input_tokens" in batch:
                index, half = np.arange(length), length // 2
                batch[f"{side}_segment_ids"] = np.tile(1 + (index >= half), (rows, 1))
                batch[f"{side}_positions"] = np.tile(index % half, (rows, 1))
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


def logits_of(model, params, batch, key=None):
    """Logits of every decoder position."""
    module = model.bind(params)
    hidden, _ = module(batch, key)
    return module.head(module.head_params(), hidden)


def loss_of(model, params, batch, key=None):
    """Mean cross-entropy over all positions, by one-hot targets."""
    logits = logits_of(model, params, batch, key)
    targets = sharding.shard(jax.nn.one_hot(batch["decoder_target_tokens"], logits.shape[-1]),
                             "act_batch", "act_length", "act_vocab")
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, axis=-1))


def close(found, expected, tolerance=1e-5):
    """max|a-b| / max|b| of every leaf."""
    found, expected = (tree.flatten(x) if isinstance(x, dict) else {"": x}
                       for x in (found, expected))
    for path in expected:
        a, b = np.asarray(found[path], np.float64), np.asarray(expected[path], np.float64)
        worst = np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)
        assert worst <= tolerance, f"{path or 'value'}: {worst:.2e}"


# --- T5X's T5.1.1 ---------------------------------------------------------------------------------

@functools.cache
def t5x_case():
    """(config, params in our layout, {"plain" | "packed": (batch, logits)})."""
    path = golden("encdec_t5_1_1.npz")
    data = np.load(path)
    spec = json.loads(path.with_suffix(".json").read_text())["config"]
    config = encoder_decoder(heads=spec["num_heads"], head_dim=spec["head_dim"],
                             mlp_dim=spec["mlp_dim"])
    config = dataclasses.replace(
        config, vocab_size=spec["vocab_size"], embed_dim=spec["emb_dim"],
        encoder=stack(spec["num_encoder_layers"], heads=3, mlp_dim=40),
        decoder=stack(spec["num_decoder_layers"], cross=True, heads=3, mlp_dim=40))

    def layers(side, theirs, ours):
        depth = getattr(config, side).num_layers
        return {f"{side}/segment_0/block_0/{ours}": np.stack(
            [data[f"params/{side}/layers_{i}/{theirs}"] for i in range(depth)])}

    flat = {"token_embedding/embedding": data["params/token_embedder/embedding"],
            "logits/kernel": data["params/decoder/logits_dense/kernel"]}
    for side, own, norm in (("encoder", "attention", "pre_attention_layer_norm"),
                            ("decoder", "self_attention", "pre_self_attention_layer_norm")):
        flat[f"{side}/final_norm/scale"] = data[f"params/{side}/{side}_norm/scale"]
        flat[f"{side}/relative_position/embedding"] = data[
            f"params/{side}/relpos_bias/rel_embedding"].T
        flat |= layers(side, f"{norm}/scale", "pre_self_attention_norm/scale")
        flat |= layers(side, "pre_mlp_layer_norm/scale", "pre_mlp_norm/scale")
        for name in ("query", "key", "value", "out"):
            flat |= layers(side, f"{own}/{name}/kernel", f"self_attention/{name}/kernel")
        for name in ("wi_0", "wi_1", "wo"):
            flat |= layers(side, f"mlp/{name}/kernel", f"mlp/{name}/kernel")
    flat |= layers("decoder", "pre_cross_attention_layer_norm/scale",
                   "pre_cross_attention_norm/scale")
    for name in ("query", "key", "value", "out"):
        flat |= layers("decoder", f"encoder_decoder_attention/{name}/kernel",
                       f"cross_attention/{name}/kernel")
    cases = {}
    for case in ("plain", "packed"):
        names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
        batch = {n: data[f"{case}/arg{i}"] for i, n in enumerate(names)}
        batch |= {k.split("/")[1]: data[k] for k in data if k.startswith(f"{case}/")
                  and k.endswith(("ids", "positions"))}
        cases[case] = ({k: jnp.asarray(v, jnp.int32) for k, v in batch.items()},
                       data[f"{case}/logits"])
    return config, tree.unflatten(flat), cases


@pytest.mark.parametrize("case,scan", [("plain", True), ("packed", True), ("packed", False)])
def test_t5x_logits(case, scan):
    config, params, cases = t5x_case()
    batch, expected = cases[case]
    found = jax.jit(functools.partial(logits_of, Model(with_stacks(config, scan=scan))))(
        params, batch)
    # T5X gives padded targets other logits (it lets them see the whole row); nobody reads them.
    real = np.asarray(batch["decoder_target_tokens"]) != 0
    close(found[real], expected[real])


def test_t5x_logits_bfloat16():
    config, params, cases = t5x_case()
    batch, expected = cases["plain"]
    found = jax.jit(functools.partial(logits_of, Model(config, jnp.bfloat16)))(params, batch)
    real = np.asarray(batch["decoder_target_tokens"]) != 0
    assert found.dtype == jnp.float32
    # These weights amplify: rounding them alone to bfloat16 moves the logits by 0.045.
    assert np.sqrt(np.mean(np.square(found[real] - expected[real]))) < 0.1 * np.std(expected[real])


def test_relative_position_buckets():
    spec = json.loads(golden("relative_position_buckets.json").read_text())
    low, high = spec["relative_position"]
    for name, expected in spec["buckets"].items():
        settings = dict(item.split("=") for item in name.split(","))
        found = relative_position_bucket(
            jnp.arange(low, high + 1), bidirectional=settings["bidirectional"] == "True",
            num_buckets=int(settings["num_buckets"]), max_distance=int(settings["max_distance"]))
        np.testing.assert_array_equal(found, expected)


# --- one model, many ways to run it ---------------------------------------------------------------

def value_and_grad(config, params, batch, key=None, dtype=jnp.float32):
    """Loss and gradients, compiled."""
    model = Model(config, dtype)
    return jax.jit(lambda p, b: jax.value_and_grad(
        lambda p: loss_of(model, p, b, key))(p))(params, batch)


@functools.cache
def reference(name):
    """(config, params, batch, loss, gradients) of a small model on one device."""
    config = {"encoder_decoder": encoder_decoder(), "decoder_only": decoder_only(kv_heads=2),
              "mixtures": mixtures(decoder_only(), 1.5), "latent": CACHED["latent"]}[name]
    params = jax.jit(Model(config).init)(jax.random.key(0))
    batch = make_batch(config, packed=name == "encoder_decoder")
    return config, params, batch, *value_and_grad(config, params, batch)


@pytest.mark.parametrize("name,changes", [
    ("encoder_decoder", {"remat": "dots"}),
    ("encoder_decoder", {"scan": False, "remat": "save:mlp_hidden"}),
    pytest.param("mixtures", {"scan": False, "remat": "full"}, marks=pytest.mark.slow)], ids=str)
def test_scan_and_remat_change_nothing(name, changes):
    config, params, batch, loss, grads = reference(name)
    found = value_and_grad(with_stacks(config, **changes), params, batch)
    close(found[0], loss)
    close(found[1], grads)


MESHES = [
    ("encoder_decoder", {"data": 8}), ("encoder_decoder", {"fsdp": 8}),
    ("encoder_decoder", {"tensor": 4, "fsdp": 2}),
    ("encoder_decoder", {"data": 2, "expert": 2, "tensor": 2}),
    ("encoder_decoder", {"sequence": 2, "fsdp": 2, "tensor": 2}),
    ("decoder_only", {"slice": 2, "fsdp": 2, "tensor": 2}),
    ("decoder_only", {"data": 2, "tensor": 4}),   # more ways than key/value heads
    ("latent", {"sequence": 2, "fsdp": 2, "tensor": 2}),
]


@pytest.mark.parametrize("name,sizes", MESHES, ids=str)
def test_mesh_of_eight_equals_one_device(name, sizes):
    config, params, batch, loss, grads = reference(name)
    mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, **sizes}))
    table = dict(sharding.DEFAULT_RULES)
    if name == "decoder_only" and sizes["tensor"] == 4:
        table |= {"kv_heads": (), "act_kv_heads": ()}
    rules = sharding.Rules(table)
    model = Model(config)
    for info in model.table.values():
        rules.check(info.path, info.logical_axes, info.units, dict(mesh.shape))
    shardings = {p: sharding.named_sharding(mesh, rules, i.logical_axes)
                 for p, i in model.table.items()}
    params = tree.map_with_path(lambda p, x: jax.device_put(x, shardings[p]), params)
    batch = {k: jax.device_put(x, sharding.named_sharding(
        mesh, rules, ("act_batch", "act_length"))) for k, x in batch.items()}
    with sharding.activate(mesh, rules):
        found = value_and_grad(config, params, batch)
    close(found[0], loss)
    close(found[1], grads)
    for path, grad in tree.flatten(found[1]).items():
        assert grad.sharding.is_equivalent_to(shardings[path], grad.ndim), path


@pytest.mark.parametrize("name,kind,sizes", [
    ("encoder_decoder", "t5_bias", {"sequence": 2, "fsdp": 2, "tensor": 2}),
    ("decoder_only", "transformer_xl", {"stage": 2, "sequence": 2, "data": 2}),
    ("decoder_only", "transformer_xl", {"data": 4, "tensor": 2})], ids=str)
def test_attention_by_chunks_over_a_mesh_equals_plain(name, kind, sizes):
    """Chunks of 3 of 8 and 12 tokens, their biases made where they are needed."""
    make = {"encoder_decoder": encoder_decoder, "decoder_only": decoder_only}[name]
    plain, chunked = (make(position=PositionConfig(kind), attention=AttentionConfig(
        4, 8, implementation=implementation, chunk=3)) for implementation in ("plain", "chunked"))
    params = jax.jit(Model(plain).init)(jax.random.key(0))
    batch = make_batch(plain)
    loss, grads = value_and_grad(plain, params, batch)
    rules, model = sharding.Rules(), Model(plain)
    mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, **sizes}))
    params = tree.map_with_path(lambda p, x: jax.device_put(x, sharding.named_sharding(
        mesh, rules, model.table[p].logical_axes)), params)
    batch = {k: jax.device_put(x, sharding.named_sharding(
        mesh, rules, ("act_batch", "act_length"))) for k, x in batch.items()}
    with sharding.activate(mesh, rules):
        found = value_and_grad(chunked, params, batch)
    close(found[0], loss)
    close(found[1], grads)


def test_kv_heads_that_do_not_split_are_refused():
    info = Model(decoder_only(kv_heads=2)).table["decoder/segment_0/block_0/self_attention/key/kernel"]
    with pytest.raises(UserError, match=r"2 kv_heads cannot be split 4 ways.*act_kv_heads"):
        sharding.Rules().check(info.path, info.logical_axes, info.units, {"tensor": 4})


def test_dropout_is_the_same_scanned_and_unrolled():
    config = decoder_only(dropout=0.3)
    params = jax.jit(Model(config).init)(jax.random.key(0))
    batch = make_batch(config)

    def loss(key, **changes):
        model = Model(with_stacks(config, **changes))
        return jax.jit(functools.partial(loss_of, model))(params, batch, key)

    keys = [jax.random.key(7), jax.random.key(8), None]
    scanned = [loss(key) for key in keys]
    close(loss(keys[0], scan=False), scanned[0])
    assert len({round(float(x), 4) for x in scanned}) == 3
    close(loss(None, dropout_rate=0.0), scanned[2])


# --- the cache ------------------------------------------------------------------------------------

def decoded_logits(model, params, batch, prompts):
    """Logits of all positions: prompts_B tokens of each row at once, then one at a time.

    A row at its end repeats its last token; rows keep their own positions, as in decoding/decode.py.
    """
    module = model.bind(params)
    tokens = batch["decoder_input_tokens"]
    length, widest = tokens.shape[1], max(prompts)
    out, cache = module.decode(tokens[:, :widest], module.init_cache(batch, length))
    logits = jnp.pad(out, ((0, 0), (0, length - widest), (0, 0)))
    prompts = sharding.shard(jnp.asarray(prompts, jnp.int32), "act_batch")

    def step(carry, _):
        logits, cache = carry
        position = jnp.minimum(cache["position"], length - 1)
        current = jnp.arange(length) == position[:, None]
        token = jnp.sum(tokens * current, axis=1, keepdims=True)
        out, cache = module.decode(token, {**cache, "position": position})
        return (jnp.where(current[..., None], out, logits), cache), None

    (logits, _), _ = jax.lax.scan(step, (logits, {**cache, "position": prompts}), None,
                                  length - 1)
    return logits


WINDOWED, FANCY = AttentionConfig(4, 8, window=3, use_bias=True), AttentionConfig(
    4, 8, num_kv_heads=1, qk_norm=True, logit_softcap=3.0)
LATENT = AttentionConfig(4, 8, kind="latent", latent=LatentConfig(6, 10, 2, 5))
LOCAL = BlockConfig(WINDOWED, position=PositionConfig("rotary", rotary_base=20.0))
CACHED = {
    # Two kinds of latent attention, a window in the second.
    "latent": decoder_only(segments=(SegmentConfig((BlockConfig(LATENT), BlockConfig(
        dataclasses.replace(LATENT, window=3, latent=LatentConfig(12, 0, 4, 9)))), 1),)),
    "local_and_global": decoder_only(
        norm=NormConfig(scale_offset=1.0), residual="sandwich",
        segments=(SegmentConfig((LOCAL, BlockConfig(FANCY)), 1),)),
    "norms_over_all_heads": decoder_only(residual="post_inside", attention=AttentionConfig(
        4, 8, num_kv_heads=2, qk_norm=True, qk_norm_over="all")),
    "encoder_decoder": encoder_decoder(),
    "grouped_rotary_parallel": decoder_only(kv_heads=2, residual="parallel"),
    "learned_with_alternating_window": decoder_only(
        position=PositionConfig("learned", max_length=16, offset=2), residual="post",
        segments=(SegmentConfig((BlockConfig(WINDOWED), BlockConfig(FANCY)), 1),)),
    "alibi_multi_query": decoder_only(position=PositionConfig("alibi"), attention=FANCY,
                                      residual="sandwich"),
    "transformer_xl": decoder_only(position=PositionConfig("transformer_xl")),
    # With room for all: a cached step drops nothing, teacher forcing may.
    "mixtures": mixtures(decoder_only(), 4.0),
    "mixtures_encoder_decoder": mixtures(encoder_decoder(), 4.0, every=1),
    "per_layer_bias": with_stacks(encoder_decoder(), position=PositionConfig(per_layer=True)),
}


@pytest.mark.parametrize("name", CACHED)
def test_cached_decoding_equals_teacher_forcing(name):
    config = CACHED[name]
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(1))
    batch = make_batch(config, rows=3, target=7)
    expected = jax.jit(functools.partial(logits_of, model))(params, batch)
    found = jax.jit(lambda p, b: decoded_logits(model, p, b, (3, 1, 5)))(params, batch)
    close(found, expected)


@pytest.mark.parametrize("name", ["per_layer_bias", "grouped_rotary_parallel"])
def test_cached_decoding_in_bfloat16_keeps_what_a_cpu_reads(name):
    """The cache is float32 there, its numbers are bfloat16's, and the logits of teacher forcing are
    met as closely as that type can."""
    config = CACHED[name]
    model = Model(config, jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(1))
    batch = make_batch(config, rows=3, target=7)
    expected = jax.jit(functools.partial(logits_of, model))(params, batch)
    found = jax.jit(lambda p, b: decoded_logits(model, p, b, (3, 1, 5)))(params, batch)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.03 * float(np.abs(expected).max()))
    cache = jax.jit(lambda p, b: model.bind(p).init_cache(b, 4))(params, batch)
    kept = [x for x in jax.tree.leaves(cache["layers"])]
    assert {x.dtype for x in kept} == {jnp.dtype("float32")}
    for x in kept:
        np.testing.assert_array_equal(x, x.astype(jnp.bfloat16).astype(jnp.float32))


def test_the_cache_of_latent_attention_holds_the_latents_alone():
    config = CACHED["latent"]
    cache = jax.eval_shape(lambda p, b: Model(config).bind(p).init_cache(b, 7),
                           *jax.eval_shape(lambda: (Model(config).init(jax.random.key(0)),
                                                    make_batch(config, rows=3))))
    bytes_ = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache["layers"]))
    assert bytes_ == 3 * 7 * ((6 + 2) + (12 + 4)) * 4   # rows, slots, latents and shared keys


@pytest.mark.parametrize("name,axis", [("encoder_decoder", "data"), ("encoder_decoder", "stage"),
                                       pytest.param("latent", "data", marks=pytest.mark.slow)])
def test_cached_decoding_over_a_mesh(name, axis):
    config, params, batch, _, _ = reference(name)
    model = Model(config)
    batch = {k: v for k, v in batch.items() if not k.endswith(("ids", "positions"))}
    expected = jax.jit(functools.partial(logits_of, model))(params, batch)
    mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, axis: 2, "fsdp": 2, "tensor": 2}))
    rules = sharding.Rules()
    params = tree.map_with_path(lambda p, x: jax.device_put(x, sharding.named_sharding(
        mesh, rules, model.table[p].logical_axes)), params)
    batch = {k: jax.device_put(x, sharding.named_sharding(mesh, rules, ("act_batch", None)))
             for k, x in batch.items()}

    with sharding.activate(mesh, rules):
        found = jax.jit(lambda p, b: decoded_logits(model, p, b, (3, 1, 5, 2) * 2))(params, batch)
    close(found, expected)


def test_cached_decoding_of_one_row_goes_by_chunks_too():
    """One row agrees with itself on positions; a mesh is there, as in every run."""
    config = decoder_only(attention=AttentionConfig(4, 8, implementation="chunked", chunk=3))
    model, mesh, rules = Model(config), sharding.make_mesh(
        sharding.MeshConfig(), jax.devices()[:1]), sharding.Rules()
    params = jax.jit(model.init)(jax.random.key(1))
    batch = make_batch(config, rows=1, target=7)
    with sharding.activate(mesh, rules):
        expected = jax.jit(functools.partial(logits_of, model))(params, batch)
        found = jax.jit(lambda p, b: decoded_logits(model, p, b, (2,)))(params, batch)
    close(found, expected)


def test_take_rows_moves_whole_rows():
    """Four inputs, each repeated to two rows that then move within it."""
    config, params, batch, _, _ = reference("encoder_decoder")
    model = Model(config)
    batch = {k: v for k, v in batch.items() if not k.endswith(("ids", "positions"))}
    tokens, inputs = batch["decoder_input_tokens"], jnp.arange(4)
    rows = jnp.array([1, 0, 2, 2, 5, 5, 6, 7])

    def third_step(params, before, after):
        """Logits of the third token when rows move `before` the first or `after` the second."""
        module = model.bind(params)
        cache = module.init_cache({k: v[inputs] for k, v in batch.items()}, 4)
        cache = take_rows(cache, jnp.repeat(inputs, 2))
        _, cache = module.decode(tokens[before, :2], cache)
        return module.decode(tokens[before][after, 2:3], take_rows(cache, after))[0]

    step, same = jax.jit(third_step), jnp.arange(8)
    close(step(params, same, rows), step(params, rows, same))


# --- what cannot be built -------------------------------------------------------------------------

@pytest.mark.parametrize("config,message", [
    (dataclasses.replace(encoder_decoder(), architecture="decoder"), "architecture='decoder'"),
    (dataclasses.replace(encoder_decoder(), decoder=None), "model.decoder must be given"),
    (with_stacks(encoder_decoder(), residual="pree"), "model.encoder.residual='pree'"),
    (decoder_only(kv_heads=3), "num_heads=4 must be a multiple of num_kv_heads=3"),
    (dataclasses.replace(decoder_only(), decoder=stack(cross=True)), "cross_attention must be None"),
])
def test_impossible_models_are_refused(config, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        Model(config)


def test_the_norm_config_of_a_stack_reaches_its_norms():
    config = with_stacks(decoder_only(), norm=NormConfig("layer", use_bias=True))
    paths = Model(config).table
    assert "decoder/final_norm/bias" in paths
    assert "decoder/segment_0/block_0/pre_mlp_norm/bias" in paths


def test_a_token_of_id_0_before_the_last_target_is_no_padding():
    """Vocabularies such as GPT-2's have a word at id 0; T5's start a decoder with it."""
    batch = {"decoder_input_tokens": jnp.array([[0, 5, 0, 7, 0, 0], [0, 0, 0, 0, 0, 0]]),
             "decoder_loss_weights": jnp.array([[0., 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])}
    real = language_model._real(batch, "decoder")
    assert real.tolist() == [[True] * 4 + [False] * 2, [True] + [False] * 5]
    held_out = language_model._real(batch, "decoder", training=False)   # a row that fills a batch
    assert held_out.tolist() == [[True] * 4 + [False] * 2, [False] * 6]
