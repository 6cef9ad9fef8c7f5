"""Every row of MIXERS in a model: the equalities that hold between ways to run it, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import build as build_lib, tree
from t5x_lite.cost import flops
from t5x_lite.decoding import decode
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.errors import UserError
from t5x_lite.formats.functions import differences
from t5x_lite.layers.config import (
    AttentionConfig,
    InitConfig,
    MixerConfig,
    MLPConfig,
    PositionConfig,
)
from t5x_lite.layers.masks import Masking
from t5x_lite.models.blocks import MIXERS
from t5x_lite.models.cache import take_rows
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model
from t5x_lite.parallel import sharding
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training.objectives import ObjectiveConfig
from tests import tiny

OTHERS = [name for name in MIXERS if name != "attention"]
CONSTANT = [name for name in OTHERS if name != "gmlp"]   # whose state no length changes
BOTH_WAYS = [name for name, row in MIXERS.items() if not row.causal]


def block(kind, **fields):
    config = MixerConfig(kind, **{"head_dim": 4, "state_dim": 6, "taps": 3, "max_length": 16, "chunk": 3,
                                  "use_bias": True, **fields})
    return BlockConfig(AttentionConfig(4, 4), mlp=MLPConfig(mlp_dim=16), mixer=config)


def model(*kinds, causal=True, position="none", **fields) -> ModelConfig:
    """A decoder (or an encoder) with a layer of each kind."""
    segments = (SegmentConfig(tuple(block(kind, **fields) for kind in kinds), 1),)
    stack = StackConfig(segments, causal=causal, position=PositionConfig(position), scan=False)
    sides = {"encoder": None, "decoder": stack} if causal else {"encoder": stack, "decoder": None}
    return ModelConfig("decoder_only" if causal else "encoder_only", vocab_size=64, embed_dim=16, **sides,
                       tie_logits=True, init=InitConfig(embedding_std=0.5))


ALL = model(*MIXERS)


@functools.cache
def reference(config):
    """(the model, its parameters)."""
    made = Model(config)
    return made, jax.tree.map(np.asarray, jax.jit(made.init)(jax.random.key(1)))


def tokens_of(rows=8, length=8, seed=0):
    return np.random.default_rng(seed).integers(2, 64, (rows, length)).astype(np.int32)


def logits_of(made, params, batch):
    module = made.bind(params)
    return module.head(module.head_params(), module(batch)[0])


def close(found, expected, tolerance=2e-5):
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.max(np.abs(found - expected)) <= tolerance * np.max(np.abs(expected))


@functools.cache
def whole(config, rows=8, length=8):
    """(tokens, logits of all positions at once)."""
    made, params = reference(config)
    tokens = tokens_of(rows, length)
    return tokens, jax.jit(functools.partial(logits_of, made))(params, {"decoder_input_tokens": tokens})


# --- recurrent form, cache, decoding --------------------------------------------------------------

def by_token(made, params, tokens, prompts):
    """Logits of all positions: prompts_B tokens of each row at once, then one at a time."""
    module = made.bind(params)
    length, widest = tokens.shape[1], max(prompts)
    counts = jnp.asarray(prompts, jnp.int32)
    cache = module.init_cache({"decoder_input_tokens": tokens}, length)
    out, cache = module.decode(tokens[:, :widest], cache, counts=counts)
    logits = jnp.pad(out, ((0, 0), (0, length - widest), (0, 0)))

    def step(carry, _):
        logits, cache = carry
        position = cache["position"]
        at = jnp.arange(length) == position[:, None]   # of no token once a row is at its end
        token = jnp.sum(tokens * at, axis=1, keepdims=True)
        out, cache = module.decode(token, cache)
        return (jnp.where(at[..., None], out, logits), cache), None

    (logits, _), _ = jax.lax.scan(step, (logits, cache), None, length - min(prompts))
    return logits


@pytest.mark.parametrize("kind", ["all", *(pytest.param(k, marks=pytest.mark.slow) for k in MIXERS)])
def test_cached_decoding_equals_teacher_forcing(kind):
    """Rows read prompts of different lengths in one call: a state takes up each row's own alone."""
    config = ALL if kind == "all" else model(kind, kind)
    made, params = reference(config)
    tokens, expected = whole(config)
    prompts = (3, 1, 5, 2) * 2
    found = jax.jit(lambda p, t: by_token(made, p, t, prompts))(params, tokens)
    close(found, expected)


def test_the_state_does_not_grow_with_the_length():
    sizes = []
    for length in (8, 800):
        made, tokens = Model(model(*CONSTANT)), {"decoder_input_tokens": jnp.zeros((2, 1), jnp.int32)}
        cache = jax.eval_shape(lambda made=made, tokens=tokens, length=length: made.bind(
            made.init(jax.random.key(0))).init_cache(tokens, length)["layers"])
        sizes.append({path: x.shape for path, x in tree.flatten(cache).items()})
    assert sizes[0] == sizes[1] and len(sizes[0]) == 12


def decoded(config, method, prompts, lengths):
    made, params = reference(config)

    @jax.jit
    def run(params, prompts, lengths):
        module = made.bind(params)
        cache = module.init_cache({"decoder_input_tokens": prompts}, 12)
        return decode.decode(lambda t, c, counts=None: module.decode(t, c, counts=counts), take_rows,
                             cache, prompts, lengths, method)
    return run(params, prompts, lengths)


@pytest.mark.parametrize("method", [
    pytest.param(DecodeConfig(max_length=6), marks=pytest.mark.slow), DecodeConfig(
        "beam", max_length=6, min_length=4, beam_size=3, num_samples=3, length_penalty=0.0)],
    ids=lambda m: m.method)
def test_what_is_decoded_scores_as_teacher_forcing_says(method):
    """Beams move states between rows; prompts differ in length."""
    prompts, lengths = tokens_of(3, 4, seed=2), np.array([4, 1, 2], np.int32)
    found = decoded(ALL, method, prompts, lengths)
    made, params = reference(ALL)
    rows = np.zeros((9, 12), np.int32)
    for i, n in np.ndindex(found.lengths.shape):
        row = [*prompts[i, :lengths[i]], *found.tokens[i, n, :found.lengths[i, n]]]
        rows[i * 3 + n, :len(row)] = row
    logits = jax.jit(functools.partial(logits_of, made))(params, {"decoder_input_tokens": rows})
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    assert np.sum(found.lengths > 4) >= 3 * method.num_samples - 1
    for i, n in zip(*np.nonzero(found.lengths), strict=True):   # a beam may find fewer
        first, count = lengths[i], int(found.lengths[i, n])
        places = np.arange(first - 1, first - 1 + count)
        ours = log_probs[i * 3 + n, places]
        np.testing.assert_allclose(found.scores[i, n], ours[np.arange(count), rows[i * 3 + n, places + 1]].sum(),
                                   rtol=1e-4)
        if method.method == "greedy":
            assert ours.argmax(-1).tolist() == found.tokens[i, n, :count].tolist()


# --- packed rows, meshes --------------------------------------------------------------------------

@pytest.mark.parametrize("causal", [True, False])
def test_packed_examples_are_those_alone(causal):
    """Two examples and padding in a row, against each in a row of its own."""
    kinds = MIXERS if causal else BOTH_WAYS
    made, params = reference(model(*kinds, causal=causal))
    side = "decoder" if causal else "encoder"
    tokens = tokens_of(2, 8)
    run = jax.jit(functools.partial(logits_of, made))
    packed = {f"{side}_input_tokens": tokens, f"{side}_positions": np.array([[0, 1, 2, 0, 1, 2, 0, 0]] * 2),
              f"{side}_segment_ids": np.array([[1, 1, 1, 2, 2, 2, 0, 0]] * 2)}
    alone = {f"{side}_input_tokens": np.concatenate([tokens[:, :3], tokens[:, 3:6]])}
    found, expected = run(params, packed), run(params, alone)
    close(found[:, :3], expected[:2])
    close(found[:, 3:6], expected[2:])


@pytest.mark.parametrize("causal", [True, False])
def test_packed_rows_never_leak(causal):
    """Gradients of one example's outputs by another's inputs are 0, of its own they are not."""
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    index = jnp.arange(8)[None]
    masking = Masking(index, index, segments, segments, causal=causal)
    config = model(*(MIXERS if causal else BOTH_WAYS), causal=causal)
    stack = config.decoder or config.encoder
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 16)), jnp.float32)
    mixers = {b.mixer.kind: MIXERS[b.mixer.kind].module(
        jax.random.key(0), 16, b, stack, config.init, jnp.float32) for b in stack.segments[0].blocks}

    @jax.jit
    def all_gradients(x):
        def by_example(mixer):
            y, pull = jax.vjp(lambda x: mixer(x, None, masking, None)[0], x)
            return jax.vmap(lambda example: pull(jnp.cos(y) * (segments == example)[..., None])[0])(
                jnp.array([1, 2, 0]))
        return {kind: by_example(mixer) for kind, mixer in mixers.items()}

    for kind, by_example in all_gradients(x).items():
        for gradient, own in zip(by_example, (slice(0, 3), slice(3, 6), slice(6, 8)), strict=True):
            size = np.abs(np.asarray(gradient[0])).max(axis=-1)
            assert np.all(size[own] > 0), kind
            assert np.all(np.delete(size, np.r_[own]) == 0), kind


@pytest.mark.parametrize("kind,axes", [
    ("lstm,ssd,gmlp", {"data": 2, "fsdp": 2, "tensor": 2}),
    *(pytest.param(k, {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow) for k in OTHERS),
    *(pytest.param(k, {"stage": 2, "data": 1, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)
      for k in OTHERS)])
def test_a_mesh_of_8_equals_one_device(kind, axes):
    """Loss and gradients of packed rows; layers of a pipeline too."""
    config = model(*kind.split(","))
    if "stage" in axes:
        [segment] = config.decoder.segments
        config = dataclasses.replace(config, decoder=dataclasses.replace(
            config.decoder, segments=(dataclasses.replace(segment, repeats=2),)))
    made, params = reference(config)
    batch = {"decoder_input_tokens": tokens_of(8, 8), "decoder_positions": np.tile(np.arange(4), (8, 2)),
             "decoder_segment_ids": np.tile(np.repeat([1, 2], 4), (8, 1))}

    def loss(params, batch):
        return jnp.mean(jax.nn.logsumexp(logits_of(made, params, batch), axis=-1))

    run = jax.value_and_grad(loss)
    expected, wanted = jax.jit(run)(params, batch)
    mesh, rules = sharding.make_mesh(MeshConfig(**axes)), sharding.Rules()
    params = tree.map_with_path(lambda p, x: jax.device_put(x, sharding.named_sharding(
        mesh, rules, made.table[p].logical_axes)), params)
    batch = {k: jax.device_put(x, sharding.named_sharding(mesh, rules, ("act_batch", None)))
             for k, x in batch.items()}
    with sharding.activate(mesh, rules):
        found, gradients = jax.jit(run)(params, batch)
    close(found, expected)
    # Two layers whose outputs are normed enlarge rounding: another chunk alone moves retention's gradients by 2e-5.
    tiny.assert_close(gradients, jax.tree.map(np.asarray, wanted), 5e-4 if "stage" in axes else 5e-5)


@pytest.mark.slow
def test_decoding_over_a_mesh():
    made, params = reference(ALL)
    tokens, expected = whole(ALL)
    mesh, rules = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), sharding.Rules()
    params = tree.map_with_path(lambda p, x: jax.device_put(x, sharding.named_sharding(
        mesh, rules, made.table[p].logical_axes)), params)
    tokens = jax.device_put(tokens, sharding.named_sharding(mesh, rules, ("act_batch", None)))

    def run(params, tokens):
        module = made.bind(params)
        cache, found = module.init_cache({"decoder_input_tokens": tokens}, 8), []
        for i in range(8):
            out, cache = module.decode(tokens[:, i:i + 1], cache)
            found.append(out)
        return jnp.concatenate(found, axis=1)
    with sharding.activate(mesh, rules):
        found = jax.jit(run)(params, tokens)
    close(found, expected)


# --- what rows say --------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", MIXERS)
def test_flops_are_those_of_the_kernels(kind):
    config = model(kind, kind)
    table = Model(config).table
    kernels = sum(info.size for path, info in table.items()
                  if ("/mixer/" in path or "/self_attention/" in path) and path.endswith("/kernel"))
    forward = flops.forward_flops(config, 3, 0, 8)
    assert forward.projections == 2 * 3 * 8 * kernels
    assert (forward.attention > 0) == (kind not in ("lstm", "rg_lru", "conv"))
    stepped = flops.step_flops(config, table, set(table), 3, 0, 8)
    assert sum(stepped.values()) == pytest.approx(flops.train_flops(config, 3, 0, 8))


def test_flops_are_linear_in_the_length_without_pairs():
    for kind in CONSTANT:
        one, two = (flops.forward_flops(model(kind), 1, 0, n).total for n in (64, 128))
        assert two == 2 * one, kind
    for kind in ("attention", "gmlp"):
        one, two = (flops.forward_flops(model(kind), 1, 0, n).attention for n in (64, 128))
        assert two == 4 * one, kind


def test_only_settings_of_its_row_tell_two_models_apart():
    one, other = (model("lstm", head_dim=n, expand=n / 4) for n in (4, 8))
    assert differences(one, other) == ["decoder.layers[0].mixer.expand: 1.0, there 2.0"]
    assert differences(model("attention"), model("attention", taps=7)) == []


def run_config(config, **fields):
    base = tiny.seq2seq()
    return dataclasses.replace(base, model=config, objective=ObjectiveConfig("lm"), **fields)


@pytest.mark.parametrize("config,message", [
    (model("rnn"), "mixer.kind='rnn': must be one of attention, lstm"),
    (model("lstm", causal=False), "kind='lstm' reads from left to right.*Use one of attention, conv, gmlp, linear"),
    (model("rg_lru", head_dim=5), "expand=1: 16 inner features .* must be a multiple of .*head_dim=5"),
    (model("lstm", expand=0.7), "expand=0.7: 11.2 inner features .* must be a whole number"),
    (model("conv", causal=False, taps=4), "taps=4: in an encoder .* Use an odd number, such as 5"),
    (model("lstm", "conv", position="rotary"), "position.kind='rotary' acts on queries.*Use one of none, learned"),
    (dataclasses.replace(model("ssd"), parametrization="mup", base_width=8),
     "mixer.kind='ssd' has no maximal-update")])
def test_what_cannot_be_is_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        Model(config)


def test_what_a_run_asks_in_vain_is_refused_by_name():
    with pytest.raises(UserError, match="mesh.sequence=2 splits rows, and model.decoder has .*kind='lstm'"):
        build_lib.build(run_config(model("lstm"), mesh=MeshConfig(data=4, sequence=2)))
    prefix = dataclasses.replace(run_config(model("conv")), objective=ObjectiveConfig("prefix_lm"))
    with pytest.raises(UserError, match="objective.name='prefix_lm' reads inputs both ways"):
        build_lib.build(prefix, jax.devices()[:1])
    with pytest.raises(UserError, match="mixer.max_length=4: a row of 8 tokens is longer"):
        whole(model("gmlp", max_length=4))
