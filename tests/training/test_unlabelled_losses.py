"""Losses of unlabelled texts against values and gradients drawn in numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.training import unlabelled
from t5x_lite.training.unlabelled_losses import LOSSES, UnlabelledConfig, is_confident, weight_at

WEAK = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]])
STRONG = np.array([[0.5, 0.25, 0.25], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def of_logits(name, config):
    """(weak, strong logits) -> the summed loss; a view's log-probabilities are their log-softmax."""
    row = LOSSES[name]

    def total(*logits):
        return jnp.sum(row.of_rows([jax.nn.log_softmax(x) for x in logits[:row.views]], config))
    return total


def values_and_gradients(name, config):
    """loss_B, and the gradients by the weak and the strong view's logits, by hand."""
    keep = (WEAK.max(axis=1) >= config.threshold).astype(float)[:, None]
    one_hot = np.eye(3)[WEAK.argmax(axis=1)]
    sharp = softmax(np.log(WEAK) / config.temperature)
    zeros = np.zeros_like(WEAK)
    if name == "entropy":   # dH/dz_j = - p_j (log p_j + H)
        h = -(WEAK * np.log(WEAK)).sum(axis=1, keepdims=True)
        return h[:, 0], -WEAK * (np.log(WEAK) + h), zeros
    if name == "pseudo_label":
        return -(keep * one_hot * np.log(WEAK)).sum(axis=1), keep * (WEAK - one_hot), zeros
    if name == "fixmatch":
        return -(keep * one_hot * np.log(STRONG)).sum(axis=1), zeros, keep * (STRONG - one_hot)
    assert name == "uda"
    loss = (keep * sharp * (np.log(sharp) - np.log(STRONG))).sum(axis=1)
    return loss, zeros, keep * (STRONG - sharp)


@pytest.mark.parametrize("threshold, temperature", [(0.0, 1.0), (0.5, 0.4), (0.95, 2.0)])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_by_hand(name, threshold, temperature):
    config = UnlabelledConfig(name, threshold=threshold, temperature=temperature)
    row, logits = LOSSES[name], [jnp.log(WEAK) + 3.0, jnp.log(STRONG) - 1.0]
    wanted, by_weak, by_strong = values_and_gradients(name, config)
    found = row.of_rows([jax.nn.log_softmax(x) for x in logits[:row.views]], config)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    grads = jax.grad(of_logits(name, config), argnums=(0, 1))(*logits)
    np.testing.assert_allclose(grads[0], by_weak, atol=1e-6)
    np.testing.assert_allclose(grads[1], by_strong, atol=1e-6)
    assert row.stops_weak == (name in ("fixmatch", "uda"))


def test_a_row_just_at_the_threshold_counts():
    log_probs = jnp.log(jnp.float32([[0.75, 0.25], [0.7499, 0.2501], [0.5, 0.5]]))
    threshold = float(jnp.exp(log_probs[0, 0]))
    assert is_confident(log_probs, threshold).tolist() == [True, False, False]
    assert is_confident(log_probs, 0.0).all() and not is_confident(log_probs, 1.0).any()
    sure = jnp.float32([[0.0, -jnp.inf]])
    assert is_confident(sure, 1.0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_classes_that_are_impossible_leave_numbers(name):
    """A class of probability 0 in float32: losses and gradients are finite."""
    logits = jnp.float32([[0.0, -200.0, -300.0]])
    for config in (UnlabelledConfig(name), UnlabelledConfig(name, temperature=0.1, threshold=0.9)):
        value, grads = jax.value_and_grad(of_logits(name, config), argnums=(0, 1))(logits, logits)
        assert np.isfinite(float(value)) and all(np.isfinite(g).all() for g in grads)


def test_weights_rise_as_published():
    at = lambda ramp, step: float(weight_at(
        UnlabelledConfig("entropy", weight=2.0, ramp=ramp, ramp_from=10, ramp_to=20), step))
    assert [at("constant", step) for step in (0, 10, 99)] == [2.0] * 3
    assert [at("linear", step) for step in (0, 10, 15, 20, 99)] == [0.0, 0.0, 1.0, 2.0, 2.0]
    assert [at("sigmoid", step) for step in (10, 15, 20)] == pytest.approx(
        [2 * math.exp(-5), 2 * math.exp(-1.25), 2.0])


@pytest.mark.parametrize("change, data, message", [
    (dict(loss="entropie"), {}, "objective.unlabelled.loss='entropie'.*did you mean 'entropy'"),
    (dict(ramp="cosine"), {}, "objective.unlabelled.ramp='cosine'.*linear, sigmoid"),
    (dict(ramp="linear", ramp_from=5, ramp_to=5), {}, "ramp_to=5: must be above .*ramp_from=5"),
    (dict(loss=""), {}, "unlabelled.loss='' and data.unlabelled='texts.txt' go together"),
    ({}, dict(unlabelled=""), "data.unlabelled='' go together"),
    (dict(loss="uda"), {}, "'uda' takes 2 view.* of a text, and data.views='plain' names 1"),
    ({}, dict(views="plain,spans"), "names 2: set data.views to one, plain")])
def test_what_cannot_be_is_refused(change, data, message):
    config = dataclasses.replace(UnlabelledConfig("entropy"), **change)
    held = dataclasses.replace(DataConfig(unlabelled="texts.txt", classes="a,b"), **data)
    with pytest.raises(UserError, match=message):
        unlabelled.validate(config, held)
