"""Modules that predict further tokens, against numpy and by what they must not see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gpt2
from t5x_lite import tree
from t5x_lite.cost import flops
from t5x_lite.errors import UserError
from t5x_lite.formats import hf
from t5x_lite.layers.config import AttentionConfig, InitConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model
from t5x_lite.parallel import sharding
from t5x_lite.training import objectives
from t5x_lite.training.objectives import ObjectiveConfig

DIM, HEADS, VOCAB, LENGTH = 8, 2, 12, 8


def model(further=2, **kwargs) -> Model:
    block = BlockConfig(AttentionConfig(HEADS, 4), mlp=MLPConfig(12, "relu", gated=False))
    return Model(ModelConfig(
        "decoder_only", VOCAB, DIM, encoder=None, tie_logits=True, further_tokens=further,
        decoder=StackConfig((SegmentConfig((block,), 1),), causal=True,
                            position=PositionConfig("none"), **kwargs),
        init=InitConfig(embedding_std=0.7)))


def batch(rows=4, seed=0) -> dict:
    """Two examples a row, the second one shorter than the modules reach; some without weight."""
    rng = np.random.default_rng(seed)
    segments = np.tile([1, 1, 1, 1, 1, 2, 2, 0], (rows, 1))
    targets = rng.integers(1, VOCAB, (rows, LENGTH)) * (segments > 0)
    inputs = np.roll(targets, 1, axis=1) * (segments == np.roll(segments, 1, axis=1))
    inputs[:, 0] = 0
    weights = (segments > 0).astype(np.float32)
    weights[1, 2] = 0.0
    found = {"decoder_input_tokens": inputs, "decoder_target_tokens": targets,
             "decoder_segment_ids": segments,
             "decoder_positions": np.tile([0, 1, 2, 3, 4, 0, 1, 0], (rows, 1))}
    return {**{n: jnp.asarray(x, jnp.int32) for n, x in found.items()},
            "decoder_loss_weights": jnp.asarray(weights)}


@functools.cache
def drawn(further=2):
    params = jax.jit(model(further).init)(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)


def norm(x, scale):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def by_hand(flat, hidden, data):
    """[(sum of the loss, number)] of the two modules, a row and a token at a time, in numpy."""
    table = np.asarray(flat["token_embedding/embedding"], np.float64)
    sums, counts = [0.0, 0.0], [0, 0]
    for row in range(hidden.shape[0]):
        inputs, targets, segments, weights = (
            np.asarray(data[f"decoder_{n}"][row]) for n in
            ("input_tokens", "target_tokens", "segment_ids", "loss_weights"))
        h = np.asarray(hidden[row], np.float64)
        for k in (1, 2):
            p = {name.removeprefix(f"further_token_{k}/"): np.asarray(x, np.float64)
                 for name, x in flat.items() if name.startswith(f"further_token_{k}/")}
            token = [inputs[i + k] if i + k < LENGTH else 0 for i in range(LENGTH)]
            x = np.concatenate([norm(h, p["hidden_norm/scale"]),
                                norm(table[token], p["token_norm/scale"])], axis=-1)
            x = x @ p["merge/kernel"]
            a = norm(x, p["block/pre_self_attention_norm/scale"])
            q, key, v = (a @ p[f"block/self_attention/{n}/kernel"] for n in ("query", "key", "value"))
            y = np.zeros_like(x)
            for head in range(HEADS):
                part = slice(4 * head, 4 * head + 4)
                for i in range(LENGTH):
                    seen = [j for j in range(i + 1) if segments[j] == segments[i]]
                    y[i, part] = softmax(q[i, part] @ key[seen][:, part].T / 2) @ v[seen][:, part]
            x = x + y @ p["block/self_attention/out/kernel"]
            m = norm(x, p["block/pre_mlp_norm/scale"])
            x = x + np.maximum(m @ p["block/mlp/wi/kernel"], 0) @ p["block/mlp/wo/kernel"]
            h = norm(x, p["final_norm/scale"])
            for i in range(LENGTH - k):
                if segments[i + k] == segments[i] and weights[i + k]:
                    sums[k - 1] -= np.log(softmax(table @ h[i]))[targets[i + k]]
                    counts[k - 1] += 1
    return list(zip(sums, counts, strict=True))


CONFIG = ObjectiveConfig("lm", z_loss=0.0, further_weight=0.4)


def value(params, data, config=CONFIG, further=2, divisors=None):
    """(loss, metrics) of training without dropout."""
    divisors = objectives.totals(config, data) if divisors is None else divisors
    return objectives.loss(model(further).bind(params), data, None, config, divisors)


def test_losses_are_those_of_the_paper_by_hand():
    params, data = drawn(), batch()
    total, metrics = jax.jit(value)(params, data)
    hidden = jax.jit(lambda p: model().bind(p)(data)[0])(params)
    expected = by_hand(tree.flatten(params), hidden, data)
    weight = float(jnp.sum(data["decoder_loss_weights"]))
    for step, (loss_sum, count) in enumerate(expected, 2):
        found = [float(x) for x in metrics[f"further_loss/{step}"]]
        assert found == pytest.approx([loss_sum, count], rel=1e-5), step
    plain = float(metrics["loss"][0])
    assert float(total) == pytest.approx(
        (plain + 0.4 * np.mean([s for s, _ in expected])) / weight, rel=1e-5)
    # Reported apart: the loss of the next token is that of the model without the modules.
    without = {n: x for n, x in params.items() if not n.startswith("further")}
    alone, theirs = jax.jit(functools.partial(value, further=0))(without, data)
    assert float(theirs["loss"][0]) == pytest.approx(plain, rel=1e-6)
    assert float(alone) == pytest.approx(plain / weight, rel=1e-6)


def test_no_module_sees_what_it_predicts():
    """Also in a prefix, whose tokens see one another in the model itself."""
    data = batch()
    data = {n: data[n] for n in ("decoder_input_tokens", "decoder_target_tokens",
                                 "decoder_loss_weights")}
    prefix = jnp.broadcast_to(jnp.arange(LENGTH) < 3, data["decoder_input_tokens"].shape)

    @jax.jit
    def states(tokens):
        module = model().bind(drawn())
        given = {**data, "decoder_input_tokens": tokens, "decoder_prefix": prefix}
        hidden, aux = module(given)
        return module.further(given, hidden, aux)[0]

    tokens = data["decoder_input_tokens"]
    before = states(tokens)
    for changed in (4, 6):
        after = states(tokens.at[:, changed].set(tokens[:, changed] % (VOCAB - 1) + 1))
        for step in (1, 2):
            differs = np.any(np.asarray(before[step - 1] != after[step - 1]), axis=(0, 2))
            assert not differs[:changed - step].any() and differs[changed - step:].all()


def test_parts_and_meshes_give_the_same():
    data, params = batch(rows=8), drawn()
    grad = jax.jit(jax.value_and_grad(lambda p, d, divisors: value(p, d, divisors=divisors)[0]))
    divisors = objectives.totals(CONFIG, data)
    whole, grads = grad(params, data, divisors)
    halves = [grad(params, {n: x[part] for n, x in data.items()}, divisors)[0]
              for part in (slice(0, 4), slice(4, 8))]
    assert sum(map(float, halves)) == pytest.approx(float(whole), rel=1e-6)

    rules, table = sharding.Rules(), model().table
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, sequence=2, fsdp=2, tensor=2))
    placed = tree.map_with_path(lambda p, x: jax.device_put(x, sharding.named_sharding(
        mesh, rules, table[p].logical_axes)), params)
    rows = {n: jax.device_put(x, sharding.named_sharding(mesh, rules, ("act_batch", "act_length")))
            for n, x in data.items()}
    with sharding.activate(mesh, rules):
        found, split = jax.jit(jax.value_and_grad(lambda p, d: value(p, d)[0]))(placed, rows)
    assert float(found) == pytest.approx(float(whole), rel=1e-5)
    for path, want in tree.flatten(grads).items():
        np.testing.assert_allclose(tree.flatten(split)[path], want, atol=1e-5, err_msg=path)


def test_flops_count_the_modules():
    one, none = model(1).config, model(0).config
    more = flops.train_flops(one, 3, 0, LENGTH) - flops.train_flops(none, 3, 0, LENGTH)
    tokens = 3 * LENGTH
    layer = 4 * DIM * DIM + 2 * DIM * 12 + 2 * LENGTH * DIM   # projections, MLP, attention
    assert more == 3 * 2 * tokens * (layer + 2 * DIM * DIM + DIM * VOCAB)
    table = model(1).table
    assert sum(flops.step_flops(one, table, table, 3, 0, LENGTH).values()) == pytest.approx(
        flops.train_flops(one, 3, 0, LENGTH))


@pytest.mark.parametrize("changes,message", [
    ({"prompt_length": 2}, "does not go with model.prompt_length=2"),
    ({"parametrization": "mup", "base_width": 8}, "parametrization='mup'"),
    ({"further_tokens": -1}, "model.further_tokens=-1")])
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Model(dataclasses.replace(model().config, **changes))


def test_an_export_is_refused_by_the_fields_name():
    """GPT-2 says the model but for its modules, and the message nothing else of it."""
    written = dataclasses.replace(gpt2.run("small").model, further_tokens=1)
    with pytest.raises(UserError, match="no Hugging Face family can express") as error:
        hf.hf_config(written, "gpt2")
    assert str(error.value).count("there") == 1 and "further_tokens: 1, there 0" in str(error.value)
