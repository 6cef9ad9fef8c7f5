"""Beam search against T5X's and transformers' numbers, brute force and hand-drawn cases."""

import json

import numpy as np
import pytest

from t5x_lite.decoding import beam
from t5x_lite.decoding.decode import DecodeConfig
from tests.decoding.decoding_toys import (
    chain,
    log_softmax,
    mixing_logits,
    run_markov,
    run_mixing,
    table_of,
)
from tests.helpers import golden


def test_equals_t5x_beam_search():
    table = np.load(golden("decode_table.npy"))
    case = json.loads(golden("decoding.json").read_text())["beam empty num_decodes=4 alpha=0.6"]
    found = run_markov(table, DecodeConfig(method="beam", beam_size=4, num_samples=4,
                                           length_penalty=0.6, max_length=16), first=[0] * 4)
    # T5X lists beams worst first
    np.testing.assert_array_equal(found.tokens, np.array(case["sequences"])[:, ::-1])
    np.testing.assert_allclose(found.scores, np.array(case["scores"])[:, ::-1], atol=1e-4)
    assert found.lengths.tolist() == [[1, 5, 6, 10]] * 4


def every_sequence(table, length, unended, said=(0,), total=0.0):
    """(sum of log-probabilities, tokens) of whatever ends within `length`, or with `unended` at it.
    """
    for token, log_prob in enumerate(log_softmax(mixing_logits(table, said))):
        now, tokens = total + log_prob, (*said, token)
        if token == 1 or (unended and len(tokens) > length):
            yield now, tokens[1:]
        elif len(tokens) <= length:
            yield from every_sequence(table, length, unended, tokens, now)


@pytest.mark.parametrize("rule, alpha", [("t5x", 0.0), ("t5x", 2.0), ("transformers", 1.0)])
def test_wide_beam_finds_the_best_sequences(rule, alpha):
    table = table_of(4, 4, scale=1.0)
    config = DecodeConfig(method="beam", beam_size=32, num_samples=10, length_penalty=alpha,
                          max_length=4, beam_rule=rule)
    # one rule lets what stands at max_length count as finished
    sequences = every_sequence(table, 4, unended=rule == "transformers")
    scale = (lambda n: n ** alpha) if rule == "transformers" else (
        lambda n: ((5 + n) / 6) ** alpha)
    ranked = sorted(((total / scale(len(t)), t) for total, t in sequences), reverse=True)[:10]
    found = run_mixing(table, [[0]], config)
    sequences = zip(found.tokens[0], found.lengths[0], strict=True)
    assert [tuple(t[:n].tolist()) for t, n in sequences] == [t for _, t in ranked]
    np.testing.assert_allclose(found.scores[0], [s for s, _ in ranked], rtol=1e-5)


def test_early_stop_does_not_change_the_result():
    # the bound lets a row go on while a longer sequence could still win: with a large alpha
    # the long chain beats the short end that is found first
    table = chain(0, 2, 3, 4, 5, 1, other=[(0, 1, 5.0)])
    short = DecodeConfig(method="beam", beam_size=1, length_penalty=0.0, max_length=6)
    tokens = lambda c: run_markov(table, c).tokens[0, 0].tolist()
    table[0, 1] = 5.5
    assert tokens(short) == [1, 0, 0, 0, 0, 0]
    long = DecodeConfig(method="beam", beam_size=1, length_penalty=3.0, max_length=6)
    assert tokens(long) == [2, 3, 4, 5, 1, 0]


def test_empty_beams_and_no_finished_beam():
    # only [2, 1] can end; every other sequence runs into max_length
    table = np.full((4, 4), -2e7, np.float32)
    table[0, 2] = table[2, 1] = 1.0
    table[2, 3] = table[3, 3] = 0.0
    config = DecodeConfig(method="beam", beam_size=2, num_samples=2, max_length=4)
    found = run_markov(table, config, first=[0, 3])
    assert found.tokens.tolist()[0] == [[2, 1, 0, 0], [0, 0, 0, 0]]
    assert found.lengths.tolist() == [[2, 0], [4, 0]] and found.scores[0, 1] == beam.NEG_INF
    # nothing ended: the live beam, by its plain sum
    assert found.tokens.tolist()[1][0] == [3, 3, 3, 3] and found.scores[1, 0] == 0.0


# GenerationMixin.generate of transformers 5.23.0 with num_beams=3, num_return_sequences=3,
# max_new_tokens=6 over logits HF_TABLE[last token], from the prompts [0] and [4]: tokens and
# sequences_scores by length_penalty.
HF_TABLE = np.sin(np.arange(49, dtype=np.float32).reshape(7, 7) * 1.7 + 0.3) * 2
HF_TABLE[:, 1] += 1
HF_CASES = {
    0.0: ([[[1, 0, 0, 0, 0, 0], [4, 2, 1, 0, 0, 0], [5, 3, 2, 1, 0, 0]],
           [[2, 1, 0, 0, 0, 0], [6, 0, 1, 0, 0, 0], [6, 3, 2, 1, 0, 0]]],
          [[-0.47017, -3.81376, -4.81876], [-1.98294, -2.87888, -3.29186]]),
    2.0: ([[[4, 6, 3, 6, 3, 2], [4, 6, 3, 2, 5, 3], [4, 6, 3, 2, 5, 6]],
           [[6, 3, 6, 3, 2, 1], [6, 3, 2, 5, 6, 3], [6, 3, 2, 5, 3, 2]]],
          [[-0.17323, -0.17805, -0.18388], [-0.14634, -0.1512, -0.15317]]),
}


@pytest.mark.parametrize("alpha", HF_CASES)
def test_equals_transformers_beam_search(alpha):
    config = DecodeConfig(method="beam", beam_size=3, num_samples=3, length_penalty=alpha,
                          max_length=6, beam_rule="transformers")
    found = run_markov(HF_TABLE, config, first=[0, 4])
    tokens, scores = HF_CASES[alpha]
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)
