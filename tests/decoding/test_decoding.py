"""Decoding against T5X's numbers, hand-drawn cases, an uncached model and one device."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from t5x_lite.decoding import decode, truncate
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.errors import UserError
from tests.decoding.decoding_toys import (
    BATCH_AXES,
    chain,
    log_softmax,
    markov,
    markov_cache,
    mixing,
    mixing_cache,
    mixing_logits,
    pad_prompts,
    prefix_lm,
    run,
    run_markov,
    run_mixing,
    table_of,
)
from tests.helpers import golden

NEG = decode.NEG_INF

def test_equals_t5x_greedy():
    table = np.load(golden("decode_table.npy"))
    case = json.loads(golden("decoding.json").read_text())["greedy empty"]
    config = dict(method="greedy", max_length=16)
    found = run_markov(table, DecodeConfig(rescale_scores=True, **config), first=[0] * 4)
    np.testing.assert_array_equal(found.tokens, case["sequences"])
    np.testing.assert_allclose(found.scores, case["scores"], atol=1e-4)
    tokens = case["sequences"][0][0]
    expected = sum(log_softmax(table)[a, b] for a, b in zip([0] + tokens, tokens, strict=False))
    np.testing.assert_allclose(run_markov(table, DecodeConfig(**config)).scores, [[expected]],
                               rtol=1e-5)


# --- greedy, lengths, ends --------------------------------------------------------------------


def test_greedy_by_hand():
    table = chain(0, 2, 3, 4, 1)
    found = run_markov(table, DecodeConfig(max_length=6), first=[0, 3, 2])
    assert found.tokens[:, 0].tolist() == [
        [2, 3, 4, 1, 0, 0], [4, 1, 0, 0, 0, 0], [3, 4, 1, 0, 0, 0]]
    assert found.lengths.tolist() == [[4], [2], [3]]
    step = log_softmax(table)[[0, 2, 3, 4], [2, 3, 4, 1]]
    np.testing.assert_allclose(found.scores[:, 0], [step.sum(), step[2:].sum(), step[1:].sum()],
                               rtol=1e-4)


def test_max_length_cuts_and_pads_with_pad_id():
    found = run_markov(chain(0, 2, 3, 4, 1), DecodeConfig(max_length=3, pad_id=5), first=[0, 4])
    assert found.tokens[:, 0].tolist() == [[2, 3, 4], [1, 5, 5]]
    assert found.lengths.tolist() == [[3], [1]]


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_min_length_puts_off_the_end(method):
    # 2 wants to end; else it goes to 3, which goes back to 2
    table = chain(0, 2, 1, other=[(2, 3, 4.0), (3, 2, 5.0)])
    tokens = lambda least: run_markov(table, DecodeConfig(
        method=method, max_length=8, min_length=least)).tokens[0, 0].tolist()
    assert tokens(1) == [2, 1, 0, 0, 0, 0, 0, 0]
    assert tokens(2) == [2, 3, 2, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_stop_ids_end_a_sequence_too(method):
    config = DecodeConfig(method=method, max_length=6, stop_ids=(4, 5), beam_size=2)
    found = run_markov(chain(0, 2, 3, 4, 1), config)
    assert found.tokens[0, 0].tolist() == [2, 3, 4, 0, 0, 0] and found.lengths[0, 0] == 3


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_stops_when_every_row_is_done(method):
    calls = []

    def counting(tokens, cache, counts=None):
        jax.debug.callback(lambda: calls.append(1))
        return markov(tokens, cache, counts)

    config = DecodeConfig(method=method, max_length=200, beam_size=1)
    run(counting, markov_cache(chain(0, 2, 3, 1), 2), jnp.array([[0], [2]]),
        jnp.ones(2, jnp.int32), config)
    jax.effects_barrier()
    assert len(calls) == 3


# --- prompts ----------------------------------------------------------------------------------

PROMPTS = [[0], [0, 4, 2, 6], [5, 5], [0, 3, 2, 7, 1, 4, 4]] * 2
METHODS = {
    "greedy": DecodeConfig(max_length=10, no_repeat_ngram_size=2, repetition_penalty=1.3),
    "sample": DecodeConfig(method="sample", num_samples=3, top_k=6, top_p=0.9, max_length=10),
    "beam": DecodeConfig(method="beam", num_samples=4, max_length=10, repetition_penalty=1.1),
    "transformers": DecodeConfig(method="beam", num_samples=3, max_length=10, length_penalty=1.0,
                                 beam_rule="transformers"),
}


@pytest.mark.parametrize("method, include_prefix", [
    ("greedy", False), ("sample", False), ("beam", False), ("beam", True), ("transformers", True)])
def test_prompts_together_equal_one_by_one(method, include_prefix):
    table = table_of(1, 10)
    config = DecodeConfig(**{**vars(METHODS[method]), "include_prefix": include_prefix})
    together = run_mixing(table, PROMPTS, config)
    alone = run_mixing(table, [PROMPTS[5]], config, row_ids=jnp.array([5]))
    np.testing.assert_array_equal(together.tokens[5], alone.tokens[0])
    np.testing.assert_array_equal(together.lengths[5], alone.lengths[0])
    np.testing.assert_allclose(together.scores[5], alone.scores[0], rtol=1e-5)


def test_greedy_with_a_cache_equals_without():
    table = table_of(2, 10)
    found = run_mixing(table, PROMPTS, DecodeConfig(max_length=10))
    for i, prompt in enumerate(PROMPTS[:4]):
        tokens, total = list(prompt), 0.0
        while len(tokens) < len(prompt) + 10 and (len(tokens) == len(prompt) or tokens[-1] != 1):
            log_probs = log_softmax(mixing_logits(table, tokens))
            tokens.append(int(log_probs.argmax()))
            total += log_probs.max()
        length = len(tokens) - len(prompt)
        assert found.lengths[i, 0] == length
        assert found.tokens[i, 0, :length].tolist() == tokens[len(prompt):]
        np.testing.assert_allclose(found.scores[i, 0], total, rtol=1e-5)


def test_prompts_continue_after_what_the_cache_holds():
    table = table_of(2, 10)
    config = DecodeConfig(max_length=10)
    _, cache = mixing(jnp.array([[0, 4]]), mixing_cache(table, 1))
    found = run(mixing, cache, jnp.array([[2, 6]]), jnp.array([2]), config)
    whole = run_mixing(table, PROMPTS, config)
    np.testing.assert_array_equal(found.tokens, whole.tokens[1:2])


def test_a_prefix_lm_sees_its_whole_prompt():
    table = table_of(6, 10)
    padded, lengths = pad_prompts(PROMPTS[:2])
    empty = jnp.full((2, 24, 10), 1e3)
    cache = {"table": jnp.asarray(table), "raw": empty, "mixed": empty,
             "prefix": jnp.asarray(lengths), "position": jnp.zeros(2, jnp.int32)}
    found = run(prefix_lm, cache, padded, lengths, DecodeConfig(max_length=5, eos_id=99))
    for i, prompt in enumerate(PROMPTS[:2]):
        tokens = list(prompt)
        for _ in range(5):
            logits = np.sin(table[tokens] * table[prompt].sum(axis=0)).sum(axis=0)
            tokens.append(int(logits.argmax()))
        assert found.tokens[i, 0].tolist() == tokens[len(prompt):]


def test_included_prefix_is_returned_and_counted():
    table = chain(0, 2, 3, 4, 5, 2)
    prompt, lengths = jnp.array([[0, 2, 3], [0, 5, 0], [0, 0, 0]]), jnp.array([3, 2, 1])
    for method in ("greedy", "beam"):
        config = DecodeConfig(method=method, max_length=5, include_prefix=True, beam_size=2)
        found = run(markov, markov_cache(table, 3), prompt, lengths, config)
        assert found.tokens[:, 0].tolist() == [
            [2, 3, 4, 5, 2], [5, 2, 3, 4, 5], [2, 3, 4, 5, 2]]
        assert found.lengths[:, 0].tolist() == [5, 5, 5]
    step = log_softmax(table)[0, 2]
    np.testing.assert_allclose(found.scores[:, 0], step * np.array([3, 4, 5]), rtol=1e-4)


# --- controls ---------------------------------------------------------------------------------


def test_repetition_penalty_divides_positive_and_multiplies_negative():
    logits = jnp.array([[2.0, -2.0, 0.0, 3.0, -1.0], [2.0, -2.0, 0.0, 3.0, -1.0]])
    history = jnp.array([[-1, 0, 1, 0], [-1, -1, -1, 4]])
    found = decode.penalise_repetition(logits, history, 2.0)
    assert found.tolist() == [[1.0, -4.0, 0.0, 3.0, -1.0], [2.0, -2.0, 0.0, 3.0, -2.0]]


@pytest.mark.parametrize("history, size, banned", [
    ([5, 6, 7, 5, 6], 3, [7]),  # 5 6 was followed by 7
    ([5, 6, 7, 5, 6], 2, [7]),
    ([5, 6, 7, 5], 2, [6]),
    ([5, 6, 7, 5], 3, []),  # 7 5 is new
    ([5, 5, 5], 2, [5]),
    ([5, 6, 7, 5], 1, [5, 6, 7]),
    ([5, 6, 2, 5, 6, 3, 5, 6], 3, [2, 3]),
    ([6], 3, []),
    ([6], 2, []),
])
def test_ngrams_are_banned_by_hand(history, size, banned):
    filled = jnp.array([[-1, -1] + history + [-1] * 4])
    found = decode.ban_repeated_ngrams(jnp.zeros((1, 9)), filled, 2 + len(history), size)
    assert np.flatnonzero(found[0] == NEG).tolist() == banned


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_no_ngram_comes_twice(method):
    table = chain(0, 2, 3, 2, other=[(3, 4, 1.0), (2, 4, 1.0), (4, 2, 2.0), (3, 1, -8), (4, 5, 0)])
    config = lambda n: DecodeConfig(method=method, max_length=7, no_repeat_ngram_size=n,
                                    length_penalty=0.0, beam_size=3)
    tokens = lambda n: run_markov(table, config(n)).tokens[0, 0].tolist()
    if method == "greedy":
        assert tokens(0) == [2, 3, 2, 3, 2, 3, 2]
        # 2 3 is taken: 2 goes to 4; 4 2 is new, but then 3 and 4 are taken after 2
        assert tokens(2)[:5] == [2, 3, 2, 4, 2]
    pairs = list(itertools.pairwise([0] + [t for t in tokens(2)]))
    pairs = [p for p in pairs if p != (0, 0)]
    assert len(set(pairs)) == len(pairs)


def test_prompt_tokens_count_as_said():
    # 2 would go to 3, but the prompt already went there
    table = chain(0, 2, 3, 1, other=[(2, 4, 1.0), (4, 1, 5.0)])
    prompt, lengths = jnp.array([[2, 3, 2]]), jnp.array([3])
    found = run(markov, markov_cache(table, 1), prompt, lengths,
                DecodeConfig(max_length=4, no_repeat_ngram_size=2))
    assert found.tokens[0, 0].tolist() == [4, 1, 0, 0]


# --- sampling ---------------------------------------------------------------------------------

PROBS = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32)


def kept(masked):
    return np.flatnonzero(np.asarray(masked)[0] > NEG / 2).tolist()


@pytest.mark.parametrize("p, expected", [
    (0.3, [0]), (0.49, [0]), (0.51, [0, 1]), (0.74, [0, 1]), (0.76, [0, 1, 2]),
    (0.874, [0, 1, 2]), (0.88, [0, 1, 2, 3, 4]),  # the last two are equal: both or neither
    (1e-6, [0]), (0.9999999, [0, 1, 2, 3, 4]),
])
def test_top_p_keeps_the_smallest_sufficient_set(p, expected):
    order = np.array([3, 0, 4, 2, 1])  # in any order
    masked = truncate.keep_top_p(jnp.log(jnp.asarray(PROBS[order]))[None], p)
    assert sorted(order[kept(masked)]) == expected


def test_top_p_at_an_exact_boundary():
    # softmax of these is exactly [1/2, 1/4, 1/4] in float32
    logits = jnp.log2(jnp.array([[2.0, 1.0, 1.0]])) * np.float32(np.log(2))
    assert jax.nn.softmax(logits)[0].tolist() == [0.5, 0.25, 0.25]
    assert kept(truncate.keep_top_p(logits, 0.5)) == [0]
    assert kept(truncate.keep_top_p(logits, float(np.nextafter(0.5, 1)))) == [0]  # float32: 0.5
    assert kept(truncate.keep_top_p(logits, 0.50001)) == [0, 1, 2]


@pytest.mark.parametrize("k, expected", [
    (1, [1]), (2, [1, 3]), (3, [0, 1, 3, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4]),
    (9, [0, 1, 2, 3, 4])])
def test_top_k_keeps_k_and_ties(k, expected):
    assert kept(truncate.keep_top_k(jnp.array([[-1.0, 3.0, -7.0, 0.5, -1.0]]), k)) == expected


def test_thresholds_equal_sorting():
    logits = np.random.default_rng(0).normal(size=(7, 211)).astype(np.float32) * 3
    probs = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    order = np.argsort(-logits, axis=1)
    for k, p in [(17, 0.5), (211, 0.99)]:
        in_k, in_p = np.zeros(logits.shape, bool), np.zeros(logits.shape, bool)
        for row in range(7):
            in_k[row, order[row, :k]] = True
            sums = np.cumsum(probs[row, order[row]].astype(np.float64))
            in_p[row, order[row, :1 + np.searchsorted(sums, p)]] = True
        np.testing.assert_array_equal(truncate.keep_top_k(logits, k) > NEG, in_k)
        np.testing.assert_array_equal(truncate.keep_top_p(logits, p) > NEG, in_p)


def test_sampled_frequencies():
    table = np.log(np.tile(PROBS, (5, 1)))

    def frequencies(**fields):
        config = DecodeConfig(method="sample", max_length=5, eos_id=99, **fields)
        tokens = run_markov(table, config, first=[0] * 4000).tokens
        return np.bincount(np.asarray(tokens).ravel(), minlength=5) / tokens.size

    # temperature 1/2 squares: 16 4 1 1/4 1/4; top_k leaves 16 4 1, of which 0.8 needs two
    np.testing.assert_allclose(frequencies(temperature=0.5, top_k=3, top_p=0.8),
                               [0.8, 0.2, 0, 0, 0], atol=0.01)
    # top_p is of what top_k leaves: 4/7 is enough there, 1/2 of everything is not
    assert frequencies(top_k=3, top_p=0.55)[0] == 1


def test_a_sample_depends_on_its_id_not_on_its_batch():
    table = table_of(3, 9, scale=0.7)
    config = DecodeConfig(method="sample", num_samples=4, max_length=8)
    ids = jnp.array([10, 11, 12, 13])
    whole = run_markov(table, config, first=[0, 2, 3, 4], row_ids=ids)
    fewer = DecodeConfig(method="sample", num_samples=2, max_length=8)
    part = run_markov(table, fewer, first=[4, 2], row_ids=jnp.array([13, 11]))
    np.testing.assert_array_equal(np.asarray(whole.tokens)[[3, 1], :2], part.tokens)
    # and on the seed, the sample and the id
    assert len({tuple(t) for t in np.asarray(whole.tokens).reshape(16, -1).tolist()}) == 16
    other = run_markov(table, DecodeConfig(method="sample", num_samples=4, max_length=8, seed=1),
                       first=[0, 2, 3, 4], row_ids=ids)
    assert (np.asarray(other.tokens) != np.asarray(whole.tokens)).any()


def test_sample_scores_by_the_model_or_by_what_was_drawn_from():
    table = table_of(3, 9, scale=0.7)
    config = dict(method="sample", num_samples=3, max_length=8, top_k=1)
    model = run_markov(table, DecodeConfig(**config))
    greedy = run_markov(table, DecodeConfig(max_length=8))
    np.testing.assert_allclose(model.scores[0], np.repeat(greedy.scores[0], 3), rtol=1e-6)
    drawn = run_markov(table, DecodeConfig(rescale_scores=True, **config))
    np.testing.assert_allclose(drawn.scores, 0, atol=1e-6)


# --- scoring ----------------------------------------------------------------------------------


def test_score_by_hand():
    probs = np.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]], np.float32)
    with np.errstate(divide="ignore"):
        logits = np.log(probs) + 3.0
    found = decode.score(jnp.asarray(logits), jnp.array([[1, 2, 2]]), jnp.array([[1., 1., 0.]]))
    np.testing.assert_allclose(found.token_scores, [[np.log(0.25), np.log(0.7), 0]], rtol=1e-5)
    np.testing.assert_allclose(found.scores, [np.log(0.25 * 0.7)], rtol=1e-5)
    assert found.lengths.tolist() == [2.0]


def test_score_equals_the_score_of_decoding():
    table = table_of(2, 10)
    found = run_mixing(table, PROMPTS, METHODS["sample"])
    tokens, lengths = np.asarray(found.tokens[:4, 1]), np.asarray(found.lengths[:4, 1])
    logits = np.zeros((4, 10, 10), np.float32)
    for i, length in enumerate(lengths):
        for j in range(length):
            logits[i, j] = mixing_logits(table, [*PROMPTS[i], *tokens[i, :j]])
    scored = decode.score(logits, tokens, (np.arange(10) < lengths[:, None]).astype(np.float32))
    np.testing.assert_allclose(scored.scores, found.scores[:4, 1], rtol=1e-5)
    np.testing.assert_array_equal(scored.lengths, lengths)


# --- meshes -----------------------------------------------------------------------------------

@pytest.mark.parametrize("method, shape", [
    ("greedy", (8, 1, 1)), ("sample", (2, 2, 2)), ("sample", (1, 4, 2)), ("beam", (2, 2, 2))])
def test_a_mesh_gives_the_results_of_one_device(method, shape):
    table = table_of(5, 10)
    config = METHODS[method]
    expected = run_mixing(table, PROMPTS, config)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, P(BATCH_AXES)))
        cache = mixing_cache(table, 8)
        cache = {**cache, "slots": put(cache["slots"]), "position": put(cache["position"])}
        padded, lengths = pad_prompts(PROMPTS)
        # prompts may come sharded or not: the cache decides
        found = run(mixing, cache, put(padded), lengths, config)
        assert found.tokens.sharding.spec[0] == BATCH_AXES
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.lengths, expected.lengths)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_score_on_a_mesh():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 4, 10)).astype(np.float32)
    targets, weights = rng.integers(0, 10, (8, 4)), rng.integers(0, 2, (8, 4)).astype(np.float32)
    expected = decode.score(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"),
                         axis_types=(AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
        found = jax.jit(decode.score)(put(logits, P(BATCH_AXES, None, "tensor")),
                                        put(targets, P(BATCH_AXES)), put(weights, P(BATCH_AXES)))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, message", [
    (dict(method="gredy"), "decode.method is 'gredy'.*did you mean 'greedy'"),
    (dict(beam_rule="t5"), "decode.beam_rule is 't5'.*t5x, transformers"),
    (dict(max_length=0), "decode.max_length is 0: must be at least 1"),
    (dict(min_length=128), r"below max_length \(128\)"),
    (dict(num_samples=2), "decode.num_samples is 2: must be 1 to 1 with method='greedy'"),
    (dict(method="beam", beam_size=2, num_samples=3), "must be 1 to 2 with method='beam'"),
    (dict(temperature=0.0), "set method='greedy'"),
    (dict(top_p=0.0), r"decode.top_p is 0.0: must lie in \(0, 1\]"),
    (dict(top_k=-1), "decode.top_k is -1"),
    (dict(length_penalty=-1.0), "decode.length_penalty is -1.0"),
    (dict(repetition_penalty=0.0), "decode.repetition_penalty is 0.0"),
    (dict(no_repeat_ngram_size=-1), "decode.no_repeat_ngram_size is -1"),
])
def test_config_errors_name_the_field(fields, message):
    with pytest.raises(UserError, match=message):
        DecodeConfig(**fields)
