"""Wirings, BERT's and BART's parts, prefixes: what the models of the field are made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import tree
from t5x_lite.errors import UserError
from t5x_lite.layers.config import (
    AttentionConfig,
    InitConfig,
    MLPConfig,
    MoEConfig,
    NormConfig,
    PositionConfig,
)
from t5x_lite.models.blocks import RESIDUALS
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model

ATTENTION = AttentionConfig(num_heads=2, head_dim=4)
BLOCK = BlockConfig(ATTENTION, mlp=MLPConfig(mlp_dim=16))


def stack(*blocks, **kwargs) -> StackConfig:
    return StackConfig(segments=(SegmentConfig(blocks or (BLOCK,), 1),),
                       **{"position": PositionConfig("none"), **kwargs})


def language_model(*blocks, vocab_size=20, **kwargs) -> ModelConfig:
    return ModelConfig("decoder_only", vocab_size=vocab_size, embed_dim=8, encoder=None,
                       decoder=stack(*blocks, causal=True, **kwargs))


def encoder(**kwargs) -> ModelConfig:
    return ModelConfig("encoder_only", vocab_size=20, embed_dim=8, encoder=stack(), decoder=None,
                       **kwargs)


def random_params(config, seed=0):
    """Every leaf drawn, biases and scales too."""
    rng = np.random.default_rng(seed)
    return tree.unflatten({path: jnp.asarray(rng.normal(size=info.shape) * 0.5, jnp.float32)
                           for path, info in Model(config).table.items()})


# --- residual wiring ------------------------------------------------------------------------------

def parts(calls):
    """Two sub-layers over numbers: x + 1 and 10 x; norms that add letters to a log."""
    def sub(name, f):
        def run(x):
            calls.append(name)
            return f(x), f"out of {name}"
        return run, lambda x: x * 2, lambda x: x + 0.5
    return [sub("attention", lambda x: x + 1), sub("mlp", lambda x: 10 * x)]


@pytest.mark.parametrize("name,expected", [
    # x = 1; the pre-norm doubles, the post-norm adds a half.
    ("pre", 1 + (2 + 1) + 10 * 2 * 4),
    ("post", (1 + 2 + 0.5) + 10 * 3.5 + 0.5),
    ("deepnorm", 3 * (3 * 1 + 2 + 0.5) + 10 * 5.5 + 0.5),
    ("sandwich", 1 + (3 + 0.5) + (10 * 2 * 4.5 + 0.5)),
    ("post_inside", 1 + (2 + 0.5) + (10 * 3.5 + 0.5)),
    ("parallel", 1 + (2 + 1) + 10 * 2),
    ("parallel_two_norms", 1 + (2 + 1) + 10 * 2)])
def test_wirings_by_hand(name, expected):
    calls = []
    x, outs = RESIDUALS[name].wire(1.0, parts(calls), 3.0 if name == "deepnorm" else 1.0)
    assert x == expected
    assert calls == ["attention", "mlp"] and outs == ["out of attention", "out of mlp"]


@pytest.mark.parametrize("name,norms", [
    ("pre", ["pre_mlp_norm", "pre_self_attention_norm"]),
    ("post", ["post_mlp_norm", "post_self_attention_norm"]),
    ("deepnorm", ["post_mlp_norm", "post_self_attention_norm"]),
    ("sandwich", ["post_mlp_norm", "post_self_attention_norm", "pre_mlp_norm",
                  "pre_self_attention_norm"]),
    ("post_inside", ["post_mlp_norm", "post_self_attention_norm"]),
    ("parallel", ["pre_self_attention_norm"]),
    ("parallel_two_norms", ["pre_mlp_norm", "pre_self_attention_norm"])])
def test_wirings_own_the_norms_they_use(name, norms):
    table = Model(language_model(residual=name)).table
    assert sorted({p.split("/")[3] for p in table if "_norm/" in p and "block_0" in p}) == norms


# --- BERT and BART --------------------------------------------------------------------------------

def bert(**kwargs) -> ModelConfig:
    return encoder(tie_logits=True, logits_bias=True, head_transform="gelu", token_types=2,
                   **kwargs)


def test_berts_head_is_transform_table_and_bias():
    config = bert()
    params = random_params(config)
    module = Model(config).bind(params)
    tokens = jnp.array([[3, 4, 5]])
    hidden, _ = module({"encoder_input_tokens": tokens})
    logits = module.head(module.head_params(), hidden)
    table = np.asarray(params["token_embedding"]["embedding"])
    np.testing.assert_allclose(
        logits[0], np.asarray(hidden[0]) @ table.T + np.asarray(params["logits"]["bias"]),
        rtol=1e-5, atol=1e-5)
    # Without the transform the same layers give its input.
    plain = dataclasses.replace(config, head_transform="")
    flat = {p: x for p, x in tree.flatten(params).items() if not p.startswith("head_transform")}
    before, _ = Model(plain).bind(tree.unflatten(flat))({"encoder_input_tokens": tokens})
    np.testing.assert_allclose(module.head_transform(before), hidden, rtol=1e-5, atol=1e-5)


def test_token_types_are_added_to_the_embeddings():
    config = bert()
    params = random_params(config)
    module = Model(config).bind(params)
    tokens, types = jnp.array([[3, 4, 5]]), jnp.array([[0, 0, 1]])
    vectors = np.asarray(params["token_types"]["embedding"])
    difference = module.embed(tokens, types) - module.embed(tokens)
    np.testing.assert_allclose(difference[0], [0 * vectors[0], 0 * vectors[0],
                                               vectors[1] - vectors[0]], atol=1e-6)
    outputs = [module({"encoder_input_tokens": tokens, **extra})[0]
               for extra in ({}, {"encoder_token_types": types})]
    assert not np.allclose(*outputs)


def test_biases_stand_where_they_are_asked_for():
    attention = dataclasses.replace(ATTENTION, use_bias=True, use_out_bias=True)
    block = BlockConfig(attention, mlp=MLPConfig(16, gated=False, use_bias=True))
    norm = NormConfig("layer", use_bias=True)
    config = dataclasses.replace(language_model(block, norm=norm), logits_bias=True)
    kernels = {p.rsplit("/", 1)[0] for p in Model(config).table if p.endswith(("kernel", "scale"))}
    biases = {p.rsplit("/", 1)[0] for p in Model(config).table if p.endswith("bias")}
    assert biases == kernels
    assert not any(p.endswith("bias") for p in Model(language_model()).table)


def test_a_stack_may_draw_its_kernels_otherwise():
    config = language_model(init=InitConfig(kernel="fixed", kernel_std=0.125))
    table = Model(config).table
    assert table["decoder/segment_0/block_0/mlp/wo/kernel"].init == "truncated_normal(0.125)"
    assert table["logits/kernel"].init == f"truncated_normal({8 ** -0.5:.4g})"


def test_embedding_norm_and_scale():
    config = dataclasses.replace(
        language_model(embedding_norm=True, position=PositionConfig("sinusoidal", offset=2)),
        embedding_scale=3.0)
    assert "decoder/embedding_norm/scale" in Model(config).table
    params = random_params(config)
    module = Model(config).bind(params)
    table = np.asarray(params["token_embedding"]["embedding"])
    np.testing.assert_allclose(module.embed(jnp.array([[7]]))[0, 0], 3 * table[7], rtol=1e-6)


# --- prefixes and mixtures ------------------------------------------------------------------------

def test_a_prefix_is_read_both_ways_and_decoded_alike():
    config = language_model(position=PositionConfig("rotary"))
    module = Model(config).bind(random_params(config))
    tokens = jnp.array([[0, 4, 5, 6, 7], [0, 8, 9, 3, 2]])
    prefix = jnp.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    batch = {"decoder_input_tokens": tokens, "decoder_prefix": prefix}
    hidden, _ = module(batch)
    logits = module.head(module.head_params(), hidden)
    # The first token sees the prefix's last, and nothing after it.
    def changed(position):
        other, _ = module({**batch, "decoder_input_tokens": tokens.at[0, position].add(1)})
        return np.abs(np.asarray(other - hidden))[0, 0].max() > 1e-6
    assert [changed(i) for i in range(5)] == [True, True, True, False, False]
    # Three tokens at once, then one at a time; the second row's third token is past its prefix.
    first, cache = module.decode(tokens[:, :3], module.init_cache(batch, 5))
    rest = []
    for i in (3, 4):
        out, cache = module.decode(tokens[:, i:i + 1], cache)
        rest.append(out)
    np.testing.assert_allclose(jnp.concatenate([first, *rest], axis=1), logits,
                               rtol=1e-4, atol=1e-5)


def test_a_mixture_takes_the_mlps_place():
    """One expert with room for all is the dense MLP, given the router's weight of 1."""
    moe = MoEConfig(num_experts=1, mlp=BLOCK.mlp, capacity_factor=1.0, eval_capacity_factor=1.0)
    dense, sparse = language_model(), language_model(dataclasses.replace(BLOCK, moe=moe))
    params = random_params(dense)
    flat = {}
    for path, info in Model(sparse).table.items():
        source = path.replace("experts/", "")
        flat[path] = jnp.zeros(info.shape) if "router" in path else \
            tree.flatten(params)[source].reshape(info.shape)
    batch = {"decoder_input_tokens": jnp.array([[0, 4, 5, 6]])}
    expected, none = Model(dense).bind(params)(batch)
    found, aux = Model(sparse).bind(tree.unflatten(flat))(batch)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert none == {} and "aux_loss/decoder_0" in aux


@pytest.mark.parametrize("config,message", [
    (language_model(norm=NormConfig("lyer")), "norm.kind='lyer'.*did you mean 'layer'"),
    (language_model(BlockConfig(ATTENTION, mlp=MLPConfig(activation="gelo"))),
     r"blocks\[0\].mlp.activation='gelo'.*did you mean 'gelu'"),
    (language_model(BlockConfig(AttentionConfig(implementation="flash"))),
     "self_attention.implementation='flash': must be one of auto, plain"),
    (language_model(BlockConfig(AttentionConfig(window=-1))), "window=-1: must be at least 0"),
    (dataclasses.replace(language_model(), init=InitConfig(kernel="xavier")),
     "init.kernel='xavier': must be one of fan_in"),
    (encoder(head_transform="tanh"), "head_transform='tanh'"),
    (language_model(dataclasses.replace(BLOCK, moe=MoEConfig(router="expert_choice"))),
     r"blocks\[0\].moe: router='expert_choice'"),
])
def test_impossible_parts_are_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        Model(config)


# --- prompts and adapters -------------------------------------------------------------------------

def prompted(architecture: str) -> tuple[ModelConfig, str]:
    """(a model of 6 tokens' prompt, the side that it stands before)."""
    if architecture == "encoder_decoder":
        config = ModelConfig(vocab_size=20, embed_dim=8, encoder=stack(), decoder=stack(
            BlockConfig(ATTENTION, ATTENTION, BLOCK.mlp), causal=True))
    else:
        config = {"decoder_only": language_model, "encoder_only": encoder}[architecture]()
    sides = {side: dataclasses.replace(getattr(config, side), position=PositionConfig("rotary"))
             for side in ("encoder", "decoder") if getattr(config, side)}
    return (dataclasses.replace(config, prompt_length=6, **sides),
            "decoder" if architecture == "decoder_only" else "encoder")


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only", "encoder_only"])
def test_a_prompt_of_token_embeddings_is_those_tokens(architecture):
    config, side = prompted(architecture)
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, 20, (3, 11))
    tokens[1, 9:] = 0
    tokens[:, :6] = tokens[0, :6]
    batch = {f"{s}_input_tokens": jnp.asarray(tokens[:, 6:] if s == side else tokens[:, :4])
             for s in ("encoder", "decoder")}
    params = random_params(config)
    params["prompt"]["embedding"] = params["token_embedding"]["embedding"][tokens[0, :6]]
    if side == "encoder":
        batch["encoder_mask"] = (batch["encoder_input_tokens"] != 0).astype(jnp.int32)
    found, _ = Model(config).bind(params)({**batch})
    batch.pop("encoder_mask", None)
    plain = dataclasses.replace(config, prompt_length=0)
    del params["prompt"]
    expected, _ = Model(plain).bind(params)({**batch, f"{side}_input_tokens": jnp.asarray(tokens)})
    if architecture != "encoder_decoder":
        expected = expected[:, 6:]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_cached_decoding_with_a_prompt_equals_teacher_forcing(architecture):
    config, _ = prompted(architecture)
    module = Model(config).bind(random_params(config))
    rng = np.random.default_rng(1)
    batch = {f"{s}_input_tokens": jnp.asarray(rng.integers(2, 20, (3, 5)))
             for s in ("encoder", "decoder")}
    hidden, _ = module(batch)
    expected = module.head(module.head_params(), hidden)
    cache, tokens = module.init_cache(batch, 5), batch["decoder_input_tokens"]
    first, cache = module.decode(tokens[:, :2], cache)
    np.testing.assert_allclose(first, expected[:, :2], rtol=1e-4, atol=1e-5)
    for i in range(2, 5):
        logits, cache = module.decode(tokens[:, i:i + 1], cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, i], rtol=1e-4, atol=1e-5)


def test_fresh_adapters_change_nothing_and_stand_behind_every_sublayer():
    config, _ = prompted("encoder_decoder")
    plain = dataclasses.replace(config, prompt_length=0)
    adapted = dataclasses.replace(plain, **{
        side: dataclasses.replace(getattr(plain, side), adapter_dim=3)
        for side in ("encoder", "decoder")})
    fresh = tree.flatten(Model(adapted).init(jax.random.key(0)))
    added = {p.rsplit("/", 2)[0] for p in fresh if "_adapter/" in p}
    assert sorted(p.split("/")[0][:3] + p.split("/")[3] for p in added) == [
        "deccross_attention_adapter", "decmlp_adapter", "decself_attention_adapter",
        "encmlp_adapter", "encself_attention_adapter"]
    batch = {f"{s}_input_tokens": jnp.arange(1, 9).reshape(2, 4) for s in ("encoder", "decoder")}
    same = tree.unflatten({p: fresh[p] for p in Model(plain).table})
    np.testing.assert_array_equal(Model(adapted).bind(tree.unflatten(fresh))(batch)[0],
                                  Model(plain).bind(same)(batch)[0])
    # By hand: a bias of the last adapter goes straight into the residual stream.
    bias = "decoder/segment_0/block_0/mlp_adapter/up/bias"
    bare = dataclasses.replace(adapted, decoder=dataclasses.replace(
        adapted.decoder, final_norm=False))
    moved = {p: fresh[p] for p in Model(bare).table}
    before, _ = Model(bare).bind(tree.unflatten(moved))(batch)
    after, _ = Model(bare).bind(tree.unflatten({**moved, bias: moved[bias] + 0.25}))(batch)
    np.testing.assert_allclose(after, before + 0.25, rtol=1e-5, atol=1e-6)
