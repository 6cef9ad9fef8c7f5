"""FLOPs and parameter counts: by hand, and against XLA's own count of an unrolled model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from t5x_lite.cost import flops
from t5x_lite.layers import routing
from t5x_lite.layers.config import AttentionConfig, MLPConfig, MoEConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model
from t5x_lite.models.params import ParamInfo
from t5x_lite.parallel.pipeline_schedules import PipelineConfig

_HEADS = AttentionConfig(num_heads=4, head_dim=32)


def _stack(attention=_HEADS, cross=None, mlp=MLPConfig(mlp_dim=512), repeats=2, moe=None,
           **kwargs):
    block = BlockConfig(attention, cross, mlp, moe)
    return StackConfig(segments=(SegmentConfig((block,), repeats),), scan=False, **kwargs)


def _decoder_only(**kwargs):
    return ModelConfig(architecture="decoder_only", vocab_size=1024, embed_dim=256, encoder=None,
                       decoder=_stack(causal=True, **kwargs), tie_logits=True)


ENCODER_DECODER = ModelConfig(vocab_size=1024, embed_dim=256, encoder=_stack(),
                              decoder=_stack(cross=_HEADS, causal=True))


def test_one_layer_by_hand():
    """D 3, N 2, H 5, F 7, V 11, one row of 4 tokens, one kv head, a plain MLP:

    query, out 2 x (2 x 4 x 3 x 10) = 480; key, value 2 x (2 x 4 x 3 x 5) = 240;
    scores and values 2 x (2 x 2 x 4 x 4 x 5) = 640; MLP 2 x (2 x 4 x 3 x 7) = 336;
    logits 2 x 4 x 3 x 11 = 264.
    """
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=5)
    stack = _stack(attention, mlp=MLPConfig(mlp_dim=7, gated=False), repeats=1, causal=True)
    config = ModelConfig(architecture="decoder_only", vocab_size=11, embed_dim=3, encoder=None,
                         decoder=stack)
    found = flops.forward_flops(config, 1, 0, 4)
    assert found == flops.Flops(projections=720, attention=640, mlp=336, logits=264)
    assert flops.train_flops(config, 1, 0, 4) == 3 * 1960
    # Of the 16 pairs of a causal 4 x 4 mask, 10 are visible.
    half = flops.forward_flops(config, 1, 0, 4, causal_half=True)
    assert half.attention == 640 * 10 / 16


def test_cross_attention_projects_the_encoders_tokens():
    """Only keys and values grow with the encoder's length: 2 x (2 x S x D x NH) a layer."""
    short, long = (flops.stack_flops(ENCODER_DECODER, ENCODER_DECODER.decoder, 1, length, 8)
                   for length in (16, 17))
    assert long.projections - short.projections == 2 * 2 * (2 * 1 * 256 * 128)
    assert long.attention - short.attention == 2 * 4 * (4 * 8 * 1 * 32)
    assert long.mlp == short.mlp


@pytest.mark.parametrize("fields, experts, router", [
    ({"router": "switch"}, 1, 8), ({"router": "top_2", "shared_experts": 1}, 3, 8),
    ({"router": "top_k", "top_k": 4}, 4, 8), ({"router": "hash"}, 1, 0),
    ({"router": "expert_choice", "capacity_factor": 2.0}, 2, 8),
    ({"router": "expert_choice", "expert_capacity": 3, "group_size": 12}, 2, 8)])
def test_a_mixture_costs_the_experts_its_tokens_use(fields, experts, router):
    """An expert is a dense MLP; the router a matmul from D=16 to E=8, of 2 x 24 tokens."""
    expert = MLPConfig(mlp_dim=32)
    found = flops.mlp_flops(MoEConfig(num_experts=8, mlp=expert, **fields), 2, 24, 16)
    assert found.mlp == experts * flops.mlp_flops(expert, 2, 24, 16).mlp
    assert found.router == 2 * 48 * 16 * router


@pytest.mark.parametrize("window, causal, half, keys", [
    (0, True, False, 8), (0, True, True, 4.5), (0, False, True, 8),
    (3, True, False, 3), (3, True, True, (1 + 2 + 3 * 6) / 8), (3, False, False, 5),
    (100, False, False, 8), (3, False, True, (3 + 4 + 4 * 5 + 4 + 3) / 8), (100, False, True, 8)])
def test_visible_keys(window, causal, half, keys):
    assert flops.visible_keys(8, 8, causal=causal, window=window, causal_half=half) == keys


def test_six_nd_is_the_kernels_of_a_decoder_only_model():
    """Train FLOPs less scores and logits are 6 N D, N without norms and biases of positions."""
    config = _decoder_only()
    forward = flops.forward_flops(config, 2, 0, 64)
    kernels = sum(info.size for path, info in Model(config).table.items()
                  if path.endswith("kernel"))
    assert 3 * (forward.projections + forward.mlp) == flops.six_nd(kernels, 2 * 64)


@functools.cache
def _xla_flops(config, rows, encoder_length, decoder_length):
    """cost_analysis of the compiled loss and gradient; layers unrolled, so that all count."""
    model = Model(config)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    batch = {f"{side}_input_tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32)
             for side, length in (("encoder", encoder_length), ("decoder", decoder_length))
             if length}

    def loss(params, batch):
        module = model.bind(params)
        x, _ = module(batch)
        return jnp.sum(jnp.square(module.head(module.head_params(), x)))

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("config, lengths", [
    (ENCODER_DECODER, (64, 32)),
    (_decoder_only(attention=dataclasses.replace(_HEADS, num_kv_heads=2)), (0, 64)),
    (ModelConfig(architecture="encoder_only", vocab_size=1024, embed_dim=256, encoder=_stack(),
                 decoder=None), (64, 0)),
], ids=["encoder_decoder", "grouped_decoder", "encoder_only"])
def test_train_flops_are_what_xla_counts(config, lengths):
    """XLA adds elementwise operations: 1 to 2% at this size."""
    ours = flops.train_flops(config, 2, *lengths)
    assert ours < _xla_flops(config, 2, *lengths) < 1.02 * ours


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_costs_at_most_what_is_stated(remat):
    config = _decoder_only(remat=remat)
    plain = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, remat="none"))
    added = _xla_flops(config, 2, 0, 64) - _xla_flops(plain, 2, 0, 64)
    stated = flops.recompute_flops(config, 2, 0, 64)
    assert flops.recompute_flops(plain, 2, 0, 64) == 0
    assert 0.5 * stated < added < 1.1 * stated


def test_1f1b_runs_the_forward_pass_twice_more():
    stack = dataclasses.replace(_stack(causal=True), pipeline=PipelineConfig("1f1b"))
    config = dataclasses.replace(_decoder_only(), decoder=stack)
    forward = flops.stack_flops(config, stack, 2, 0, 64).total
    assert flops.recompute_flops(config, 2, 0, 64) == 0
    assert flops.recompute_flops(config, 2, 0, 64, stages=2) == 2 * forward
    full = dataclasses.replace(config, decoder=dataclasses.replace(stack, remat="full"))
    assert flops.recompute_flops(full, 2, 0, 64, stages=2) == 3 * forward


# --- What trains ------------------------------------------------------------------------------

_MIXTURE = _decoder_only(moe=MoEConfig(num_experts=8, router="top_2", shared_experts=1))


@pytest.mark.parametrize("config, lengths", [
    (ENCODER_DECODER, (64, 32)), (_MIXTURE, (0, 64)), (_decoder_only(), (0, 64))],
    ids=["encoder_decoder", "mixture", "decoder_only"])
def test_where_everything_trains_a_step_is_three_forward_passes(config, lengths):
    table = Model(config).table
    parts = flops.step_flops(config, table, table.keys(), 2, *lengths)
    assert sum(parts.values()) == flops.train_flops(config, 2, *lengths)
    assert parts["logits"] == 3 * 2 * 2 * lengths[1] * 256 * 1024
    forward = flops.forward_flops(config, 2, *lengths).total
    assert sum(flops.step_flops(config, table, (), 2, *lengths).values()) == forward


def test_frozen_weights_have_no_gradient_and_inputs_only_above_what_trains():
    """Two layers; LoRA beside the queries of both, of a model with tied logits."""
    config = _decoder_only()
    table = Model(config).table
    trained = [f"decoder/segment_0/block_0/self_attention/query/lora_{part}" for part in "ab"]
    stack = flops.stack_flops(config, config.decoder, 2, 0, 64)
    found = flops.step_flops(config, table, trained, 2, 0, 64)
    # Only the second layer's inputs need gradients: its kernels once, its attention twice.
    assert found["decoder"] == stack.total + (stack.total + stack.attention) / 2
    assert found["logits"] == 2 * flops.forward_flops(config, 2, 0, 64).logits
    kernel = "decoder/segment_0/block_0/self_attention/query/kernel"
    more = flops.step_flops(config, table, [kernel], 2, 0, 64)
    assert more["decoder"] - found["decoder"] == 2 * flops.matmul_flops(2 * 64, 256, 128)
    embedding = flops.step_flops(config, table, ["token_embedding/embedding"], 2, 0, 64)
    assert embedding["decoder"] == 2 * stack.total + stack.attention
    assert embedding["logits"] == 3 * flops.forward_flops(config, 2, 0, 64).logits


def test_the_decoder_above_a_tuned_encoder_passes_gradients_on():
    """A prompt before the encoder: gradients reach it through cross-attention of layer 2 on."""
    table = Model(ENCODER_DECODER).table
    found = flops.step_flops(ENCODER_DECODER, table, ["prompt/embedding"], 1, 16, 8)
    encoder, decoder = (flops.stack_flops(ENCODER_DECODER, stack, 1, 16, 8)
                        for stack in (ENCODER_DECODER.encoder, ENCODER_DECODER.decoder))
    assert found["encoder"] == 2 * encoder.total + encoder.attention
    assert found["decoder"] == decoder.total + (decoder.total + decoder.attention) / 2


def test_the_least_flops_are_those_of_visible_pairs():
    config = _decoder_only()
    table = Model(config).table
    least = flops.step_flops(config, table, table.keys(), 2, 0, 64, least=True)
    assert sum(least.values()) == flops.train_flops(config, 2, 0, 64, causal_half=True)


@pytest.mark.parametrize("fields, least", [
    ({"router": "top_2", "capacity_factor": 1.0}, 1.0 - 8 / 24),   # rounding takes a token each
    ({"router": "top_2", "capacity_factor": 4.0}, 2),
    ({"router": "top_2", "dropless": True, "second_policy": "random"}, 1),
    ({"router": "top_k", "top_k": 4, "dropless": True}, 4),
    ({"router": "switch", "expert_capacity": 1}, 8 / 24)])
def test_choices_that_may_find_no_room_are_no_lower_bound(fields, least):
    moe = MoEConfig(num_experts=8, **fields)
    assert flops.experts_per_token(moe, 24, least=True) == pytest.approx(least)
    assert flops.experts_per_token(moe, 24) == routing.ROUTERS[moe.router].choices(moe)


def test_parameter_counts_split_the_table():
    model = Model(ENCODER_DECODER)
    counts = flops.parameter_counts(ENCODER_DECODER, model.table)
    assert counts.embedding == counts.logits == 1024 * 256
    assert counts.total == sum(info.size for info in model.table.values()) == counts.active
    assert counts.non_embedding == counts.total - 2 * 1024 * 256
    tied = _decoder_only()
    assert flops.parameter_counts(tied, Model(tied).table).logits == 0


def test_active_parameters_of_a_mixture_are_one_experts_of_eight():
    """Two layers of 8 experts of 16 x 32, their router, and an embedding."""
    config = _decoder_only(moe=MoEConfig(num_experts=8, router="switch"))
    rows = [("decoder/segment_0/block_0/mlp/experts/wi/kernel", (2, 8, 16, 32),
             ("layers", "expert", "embed", "mlp")),
            ("decoder/segment_0/block_0/mlp/router/kernel", (2, 16, 8),
             ("layers", "embed", "router")),
            ("token_embedding/embedding", (100, 16), ("vocab", "embed"))]
    table = {path: ParamInfo(path, shape, jnp.float32, axes, shape, 0, "")
             for path, shape, axes in rows}
    counts = flops.parameter_counts(config, table)
    assert counts.total == 2 * 8 * 16 * 32 + 2 * 16 * 8 + 1600
    assert counts.active == 2 * 16 * 32 + 2 * 16 * 8 + 1600
    assert counts.non_embedding == counts.total - 1600
