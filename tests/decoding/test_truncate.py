"""What cuts off the tail of a distribution: by hand, and as transformers' logits warpers do; and the
user's own function of the logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decoding import decode, logits_fn, truncate
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.errors import UserError
from tests.decoding.decoding_toys import chain, markov, markov_cache, run_markov

PROBS = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32)   # entropy 1.875 bits
LOGITS = jnp.log(jnp.asarray(PROBS))[None]


def kept(masked):
    return np.flatnonzero(np.asarray(masked)[0] > truncate.NEG_INF / 2).tolist()


@pytest.mark.parametrize(("p", "expected"), [
    (0.0, [0, 1, 2, 3, 4]), (0.12, [0, 1, 2, 3, 4]), (0.13, [0, 1, 2]), (0.3, [0, 1]), (0.51, [0]),
    (0.999, [0])])
def test_min_p_is_a_share_of_the_most_probable(p, expected):
    assert kept(truncate.keep_min_p(LOGITS, p)) == expected


@pytest.mark.parametrize(("mass", "expected"), [
    # surprises are 1, 2, 3, 4, 4 bits, the entropy 1.875: the nearest are 2, 1, 3, 4 and 4
    (0.2, [1]), (0.26, [0, 1]), (0.74, [0, 1]), (0.76, [0, 1, 2]), (0.88, [0, 1, 2, 3, 4])])
def test_typical_tokens_have_a_surprise_near_the_entropy(mass, expected):
    assert kept(truncate.keep_typical(LOGITS, mass)) == expected


@pytest.mark.parametrize(("epsilon", "expected"), [
    (0.0, [0, 1, 2, 3, 4]), (0.06, [0, 1, 2, 3, 4]), (0.07, [0, 1, 2]), (0.2, [0, 1]), (0.9, [0])])
def test_epsilon_is_a_least_probability_and_one_token_stays(epsilon, expected):
    assert kept(truncate.keep_above_epsilon(LOGITS, epsilon)) == expected


def test_what_was_cut_off_before_stays_so():
    one = truncate.keep_top_k(LOGITS, 1)
    for row, value in ((truncate.keep_min_p, 0.1), (truncate.keep_typical, 0.9),
                       (truncate.keep_above_epsilon, 0.01), (truncate.keep_top_p, 0.9)):
        assert kept(row(one, value)) == [0]
    config = DecodeConfig(method="sample", top_k=3, min_p=0.3)
    assert kept(truncate.truncate(LOGITS, config)) == [0, 1]
    off = DecodeConfig(method="sample")
    assert all(getattr(off, field) == row.off for field, row in truncate.TRUNCATIONS.items())
    assert truncate.truncate(LOGITS, off) is LOGITS


WARPERS = {"top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper",
           "typical_p": "TypicalLogitsWarper", "epsilon": "EpsilonLogitsWarper"}


@pytest.mark.parametrize(("field", "value"), [
    ("top_k", 7), ("top_p", 0.6), ("min_p", 0.02), ("min_p", 0.3), ("typical_p", 0.2),
    ("typical_p", 0.95), ("epsilon", 0.001), ("epsilon", 0.02)])
def test_equals_transformers_warper(field, value):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(0).normal(size=(9, 311)).astype(np.float32) * 2
    warped = getattr(process, WARPERS[field])(value)(None, torch.tensor(logits)).numpy()
    found = np.asarray(truncate.TRUNCATIONS[field].keep(jnp.asarray(logits), value))
    np.testing.assert_array_equal(found > truncate.NEG_INF, np.isfinite(warped))
    np.testing.assert_array_equal(found[np.isfinite(warped)], logits[np.isfinite(warped)])
    assert list(WARPERS) == list(truncate.TRUNCATIONS)


def test_samples_come_from_what_is_kept():
    table = np.log(np.tile(PROBS, (5, 1)))
    config = DecodeConfig(method="sample", max_length=5, eos_id=99, typical_p=0.74)
    tokens = np.asarray(run_markov(table, config, first=[0] * 500).tokens)
    shares = np.bincount(tokens.ravel(), minlength=5) / tokens.size
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3, 0, 0, 0], atol=0.03)


@pytest.mark.parametrize(("field", "value", "allowed"), [
    ("min_p", 1.0, r"\[0, 1\)"), ("epsilon", -0.1, r"\[0, 1\)"), ("typical_p", 0.0, r"\(0, 1\]")])
def test_values_out_of_bounds_are_refused(field, value, allowed):
    with pytest.raises(UserError, match=rf"decode.{field} is {value}: must lie in {allowed}"):
        DecodeConfig(method="sample", **{field: value})


# --- a function of the logits -----------------------------------------------------------------

def never_three(logits_RV, tokens_RT, step):
    """No token 3, and no end before three tokens."""
    return logits_RV.at[:, 3].set(-1e9).at[:, 1].add(jnp.where(step < 2, -1e9, 0.0))


@pytest.mark.parametrize("config", [
    DecodeConfig(max_length=5), DecodeConfig(method="sample", max_length=5, top_k=1),
    DecodeConfig(method="beam", beam_size=2, max_length=5)], ids=lambda c: c.method)
def test_a_function_changes_the_logits_of_every_method(config):
    # 0 -> 2 -> 3 -> 1; without 3, 2 goes to 4, which ends
    table = chain(0, 2, 3, 1, other=[(2, 4, 3.0), (4, 1, 4.0)])
    plain = run_markov(table, config).tokens[0, 0].tolist()
    prompt, lengths = jnp.array([[0]]), jnp.array([1])
    found = decode.decode(markov, lambda cache, rows: {**cache, "position": cache["position"][rows]},
                          markov_cache(table, 1), prompt, lengths, config, logits_fn=never_three)
    assert plain == [2, 3, 1, 0, 0] and found.tokens[0, 0].tolist() == [2, 4, 1, 0, 0]


def test_it_sees_what_stands_before_and_the_step():
    seen = []

    def watch(logits_RV, tokens_RT, step):
        jax.debug.callback(lambda t, s: seen.append((np.asarray(t).tolist(), int(s))), tokens_RT, step)
        return logits_RV

    decode.decode(markov, None, markov_cache(chain(0, 2, 3, 1), 1), jnp.array([[0, 2]]), jnp.array([2]),
                  DecodeConfig(max_length=3), logits_fn=watch)
    jax.effects_barrier()
    assert sorted(seen, key=lambda x: x[1]) == [([[0, 2, -1, -1, -1]], 0), ([[0, 2, 3, -1, -1]], 1)]


def test_a_function_by_its_name():
    assert logits_fn.load("tests.decoding.test_truncate:never_three") is never_three
    assert logits_fn.load("") is None
    for name, message in (("nowhere.at_all:x", "no module named 'nowhere'"),
                          ("tests.decoding.test_truncate:never_thre", "did you mean 'never_three'"),
                          ("tests.decoding.test_truncate", "must be MODULE:FUNCTION")):
        with pytest.raises(UserError, match=message):
            logits_fn.load(name)
    assert dataclasses.replace(DecodeConfig(), logits_fn="a:b").logits_fn == "a:b"
