"""Small vectors of the references' formulas, made by scripts/make_vectors.py; they run everywhere."""

import json
import pathlib
import runpy

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.layers import routing
from t5x_lite.layers.position import relative_position_bucket
from t5x_lite.training import losses, schedules
from t5x_lite.training.adafactor import scale_by_adafactor
from t5x_lite.training.schedules import ScheduleConfig
from tests.decoding.decoding_toys import run_markov

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "vectors"
SCRIPT = FOLDER.parents[1] / "scripts" / "make_vectors.py"


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


@pytest.mark.parametrize("name", [file.stem for file in sorted(FOLDER.glob("*.json"))])
def test_the_script_makes_them(name):
    found = json.loads(json.dumps(runpy.run_path(str(SCRIPT))[name]()))

    def same(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return a == pytest.approx(b, rel=1e-12)

    assert same(found, read(name)), "python scripts/make_vectors.py"


def test_cross_entropy():
    vectors = read("cross_entropy")
    arrays = [jnp.asarray(vectors[name]) for name in ("logits", "targets", "weights")]
    arrays[2] = arrays[2].astype(jnp.float32)
    for case in vectors["cases"]:
        loss, sums = losses.cross_entropy(*arrays, z_loss=case["z_loss"],
                                          label_smoothing=case["label_smoothing"])
        np.testing.assert_allclose([loss, sums["z_loss_sum"]],
                                   [case["loss_sum"], case["z_loss_sum"]], rtol=1e-5)


def test_schedules():
    vectors = read("schedules")
    numbers = {name: vectors[name] for name in (
        "warmup_steps", "base_learning_rate", "decay_factor", "steps_per_decay")}
    for factors, expected in vectors["cases"].items():
        rate = schedules.schedule(ScheduleConfig(factors, **numbers))
        found = [float(rate(step)) for step in vectors["steps"]]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1.1e-8, err_msg=factors)


def test_relative_position_buckets():
    vectors = read("buckets")
    for case in vectors["cases"]:
        found = relative_position_bucket(
            jnp.asarray(vectors["distances"]), bidirectional=case["bidirectional"],
            num_buckets=case["num_buckets"], max_distance=case["max_distance"])
        assert found.tolist() == case["buckets"]


@pytest.mark.parametrize("at", [0, 1])
def test_router(at):
    vectors = read("router")
    case, capacity = vectors["cases"][at], vectors["capacity"]
    logits = jnp.asarray(vectors["logits"], jnp.float32)
    route = (routing.switch(logits, capacity) if case["choices"] == 1
             else routing.top_2(logits, capacity, renormalize=False))
    dispatch, combine = map(np.asarray, routing.dense_masks(route, logits.shape[-1], capacity))
    expected = np.zeros_like(combine)
    for group, served in enumerate(case["served"]):
        for token, expert, slot, gate in served:
            expected[group, token, expert, slot] = gate
    np.testing.assert_array_equal(dispatch, expected > 0)
    np.testing.assert_allclose(combine, expected, atol=1e-6)
    z_loss, groups = routing.router_z_loss(logits)
    assert float(z_loss / groups) == pytest.approx(np.mean(case["z_loss"]), rel=1e-5)
    if case["balance"]:
        balance, groups = routing.load_balancing_loss(
            routing.probabilities(logits), route.expert_index)
        assert float(balance / groups) == pytest.approx(np.mean(case["balance"]), rel=1e-5)


def test_greedy_and_beam_search():
    vectors = read("decoding")
    table, length = np.asarray(vectors["table"], np.float32), vectors["max_length"]
    found = run_markov(table, DecodeConfig(max_length=length))
    assert found.tokens[0, 0, :int(found.lengths[0, 0])].tolist() == vectors["greedy"]
    for case in vectors["beams"]:
        size = case["beam_size"]
        found = run_markov(table, DecodeConfig(
            method="beam", max_length=length, beam_size=size, num_samples=size,
            length_penalty=case["alpha"]))
        lengths = found.lengths[0].tolist()
        tokens = [row[:n].tolist() for row, n in zip(found.tokens[0], lengths, strict=True)]
        assert tokens == case["tokens"]
        np.testing.assert_allclose(found.scores[0], case["scores"], rtol=1e-5)


def test_adafactor():
    vectors = read("adafactor")
    params = {name: jnp.asarray(x, jnp.float32) for name, x in vectors["start"].items()}
    update = scale_by_adafactor(dict.fromkeys(params, 0), min_dim_size_to_factor=4)
    state = update.init(params)
    rate = dict.fromkeys(params, jnp.float32(vectors["learning_rate"]))
    for step in vectors["grads"]:
        grads = {name: jnp.asarray(g, jnp.float32) for name, g in step.items()}
        steps, state = update.update(grads, state, params, learning_rate=rate)
        params = {name: x - steps[name] for name, x in params.items()}
    for name, expected in vectors["final"].items():
        np.testing.assert_allclose(params[name], expected, rtol=2e-5, atol=1e-6)
