"""Families without an implementation in transformers, against the papers' equations in float64.

The tiny models are the presets' own, at another size.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import deepnet, gopher, palm
from t5x_lite import tree
from t5x_lite.models.blocks import deepnorm_constants
from t5x_lite.models.language_model import Model
from tests.parity import numpy_deepnet, numpy_gopher, numpy_palm

VOCAB, LENGTH, SOURCE = 40, 7, 9


def palm_model(monkeypatch):
    monkeypatch.setitem(palm.SIZES, "tiny", palm.Size(2, 2, 16, 8, ()))
    model = palm.run("tiny").model
    # RoFormer pairs neighbours; test_position.py shows that other pairings are permutations.
    position = dataclasses.replace(model.decoder.position, rotary_interleaved=True)
    return dataclasses.replace(
        model, decoder=dataclasses.replace(model.decoder, position=position))


def gopher_model(monkeypatch):
    return gopher.model(gopher.Size(2, 3, 4, 16, 1e-3, 8))


def deepnet_model(monkeypatch):
    monkeypatch.setitem(deepnet.SIZES, "tiny", (3, 16, 24, 2))
    return deepnet.run("tiny").model


FAMILIES = {"palm": (palm_model, numpy_palm), "gopher": (gopher_model, numpy_gopher),
            "deepnet": (deepnet_model, numpy_deepnet)}


def random_params(model, rng):
    """Every leaf random, so that scales and biases count: {path: float64}."""
    return {path: rng.normal(float("scale" in path), 0.3 if len(info.shape) < 2 else 0.2, info.shape)
            for path, info in model.table.items()}


def reference_loss(reference, flat, config, batch):
    """(logits, mean cross-entropy) of all rows."""
    extra = [(row,) for row in batch["encoder_input_tokens"]] if config.encoder else [()] * 2
    logits = np.stack([reference.forward(flat, row, config, *more) for row, more
                       in zip(batch["decoder_input_tokens"], extra, strict=True)])
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    targets = batch["decoder_target_tokens"][..., None]
    return logits, -np.mean(np.take_along_axis(log_probs, targets, -1))


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_papers_equations(name, monkeypatch):
    make, reference = FAMILIES[name]
    config = dataclasses.replace(make(monkeypatch), vocab_size=VOCAB)
    model, rng = Model(config), np.random.default_rng(0)
    flat = random_params(model, rng)
    batch = {f"decoder_{kind}_tokens": rng.integers(1, VOCAB, (2, LENGTH))
             for kind in ("input", "target")}
    if config.encoder:
        batch["encoder_input_tokens"] = rng.integers(1, VOCAB, (2, SOURCE))

    def loss(params, batch):
        module = model.bind(params)
        hidden, _ = module(batch)
        logits = module.head(module.head_params(), hidden)
        targets = jax.nn.one_hot(batch["decoder_target_tokens"], VOCAB)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, -1)), logits

    params = tree.unflatten({p: jnp.asarray(x, jnp.float32) for p, x in flat.items()})
    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params, {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()})
    expected_logits, expected = reference_loss(reference, flat, config, batch)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-5 * np.abs(expected_logits).max())
    assert value == pytest.approx(expected, rel=1e-5)

    # The slope along a random direction: our gradient against a central difference.
    direction = {p: rng.normal(size=x.shape) for p, x in flat.items()}
    up, down = (reference_loss(reference, {p: x + step * direction[p] for p, x in flat.items()},
                               config, batch)[1] for step in (1e-6, -1e-6))
    slope = sum(np.sum(np.asarray(g, np.float64) * direction[p])
                for p, g in tree.flatten(grads).items())
    assert slope == pytest.approx((up - down) / 2e-6, rel=1e-4)


def test_deepnorm_constants_are_the_papers():
    """Figure 2: N = M = 6 and the single stacks, by hand."""
    (alpha, beta), decoder = deepnorm_constants(6, 6)
    assert alpha == pytest.approx(0.81 * 6 ** (5 / 16)) and beta == pytest.approx(0.87 / 6 ** (5 / 16))
    assert decoder == pytest.approx((18 ** 0.25, 72 ** -0.25))
    assert deepnorm_constants(8, 0)[0] == pytest.approx((2.0, 64 ** -0.25))
    assert deepnorm_constants(0, 8)[1] == pytest.approx((2.0, 64 ** -0.25))


def test_deepnorm_scales_the_fresh_kernels(monkeypatch):
    """Values, outputs and MLPs are drawn from Xavier's normal times beta, queries and keys not."""
    config = deepnet_model(monkeypatch)
    table = Model(config).table
    for side, (_, beta) in zip(("encoder", "decoder"), deepnorm_constants(3, 3), strict=True):
        block = f"{side}/segment_0/block_0"
        for name, gain, fans in (("self_attention/query", 1, (16, 16)), ("mlp/wi", beta, (16, 24)),
                                 ("self_attention/key", 1, (16, 16)), ("mlp/wo", beta, (24, 16)),
                                 ("self_attention/value", beta, (16, 16)),
                                 ("self_attention/out", beta, (16, 16))):
            std = gain * (2 / sum(fans)) ** 0.5
            assert table[f"{block}/{name}/kernel"].init == f"truncated_normal({std:.4g})", name
