"""Span corruption equals T5's, token for token, and loses nothing."""

import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.data import span_corruption as sc, vocabularies
from t5x_lite.errors import UserError
from tests.helpers import golden, shared_data


def _golden_cases():
    return [json.loads(line) for line in golden("span_corruption.jsonl").read_text().splitlines()]


def _mask(case):
    return np.array([c == "1" for c in case["mask"]])


def test_random_spans_helper_golden():
    for case in json.loads(golden("random_spans_helper.json").read_text()):
        assert sc.random_spans_helper(case["inputs_length"], case["noise_density"],
                                      case["mean_span"]) == (
            case["tokens_length"], case["targets_length"]), case


def test_seeds_to_mask_golden():
    cases = _golden_cases()
    assert len(cases) == 120
    for case in cases:
        mask = sc.random_spans_noise_mask(len(case["tokens"]), case["noise_density"],
                                          case["mean_span"], case["seeds"])
        np.testing.assert_array_equal(mask, _mask(case))


def test_mask_to_inputs_and_targets_golden():
    vocabulary = seqio.SentencePieceVocabulary(
        str(shared_data("vocab/cc_all.32000.100extra.sentencepiece.model")))
    assert vocabularies.num_sentinels(vocabulary) == 100
    for case in _golden_cases():
        tokens = vocabulary.encode_tf(case["text"])[:512]
        assert tokens.numpy().tolist() == case["tokens"]
        for name, mask in (("inputs", _mask(case)), ("targets", ~_mask(case))):
            found = sc.spans_to_sentinels(tokens, tf.constant(mask), 32099)
            assert found.numpy().tolist() == case[name]


@pytest.mark.parametrize("density", [0.01, 0.15, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("mean_span", [1.0, 3.0, 64.0])
def test_any_density_and_span_length(density, mean_span):
    """Counts of noise tokens and spans; a span of each kind at least, the last one noise."""
    for length in (2, 3, 17, 114, 500):
        mask = sc.random_spans_noise_mask(length, density, mean_span, [[1, length], [2, 3]]).numpy()
        noise = min(max(round(float(np.float32(length) * np.float32(density))), 1), length - 1)
        spans = min(max(round(noise / mean_span), 1), noise, length - noise)
        assert mask.shape == (length,) and mask.sum() == noise
        assert (np.diff(mask.astype(int)) == 1).sum() == spans
        assert not mask[0] and mask[-1]


def test_lengths_below_two():
    assert sc.random_spans_noise_mask(1, 0.15, 3.0, [[0, 1], [0, 2]]).numpy().tolist() == [False]
    assert sc.random_spans_noise_mask(0, 0.15, 3.0, [[0, 1], [0, 2]]).shape == (0,)


def test_spans_to_sentinels_by_hand():
    tokens = tf.constant([10, 11, 12, 13, 14, 15])
    mask = tf.constant([False, True, True, False, False, True])
    assert sc.spans_to_sentinels(tokens, mask, 99).numpy().tolist() == [10, 99, 13, 14, 98]
    assert sc.spans_to_sentinels(tokens, ~mask, 99).numpy().tolist() == [99, 11, 12, 98, 15]


def _features(extra_ids=100):
    vocabulary = seqio.PassThroughVocabulary(size=1000, eos_id=1)
    vocabulary._extra_ids = extra_ids
    return {name: seqio.Feature(vocabulary) for name in ("inputs", "targets")}


def _corrupt(documents, inputs_length=64, targets_length=64, seed=0, **kwargs):
    dataset = tf.data.Dataset.from_generator(
        lambda: iter({"targets": d} for d in documents),
        output_signature={"targets": tf.TensorSpec([None], tf.int32)})
    with seqio.map_seed_manager(seed):
        dataset = sc.span_corruption(dataset, {"inputs": inputs_length, "targets": targets_length},
                                     _features(), **kwargs)
    return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize("density,mean_span", [(0.15, 3.0), (0.5, 3.0), (0.3, 1.0), (0.15, 40.0)])
def test_no_token_is_lost_and_every_window_fits(density, mean_span):
    documents = [np.arange(2, 2 + n) for n in (5, 1, 300, 0, 77)]
    examples = _corrupt(documents, noise_density=density, mean_span_length=mean_span)
    restored = []
    for example in examples:
        inputs, targets = example["inputs"].tolist(), example["targets"].tolist()
        assert len(inputs) <= 64 and len(targets) <= 64
        assert inputs.pop() == targets.pop() == 1   # EOS
        spans, sentinel = {}, None
        for token in targets:
            if token >= 900:
                sentinel, spans[token] = token, []
            else:
                spans[sentinel].append(token)
        for token in inputs:
            restored += spans.pop(token) if token >= 900 else [token]
        assert not spans
    assert restored == np.concatenate(documents).tolist()
    full = [len(e["inputs"]) for e in examples[:-1]]
    assert min(full) >= 63   # windows fill their rows, but for the last one


def test_seeds_decide_the_masks():
    documents = [np.arange(2, 400)]
    first, again, other = (_corrupt(documents, seed=s) for s in (3, 3, 4))
    same = lambda a, b: all(np.array_equal(x["inputs"], y["inputs"])
                            for x, y in zip(a, b, strict=True))
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("kwargs,message", [
    (dict(targets_length=10), "leaves 10 tokens to targets, which is too short"),
    (dict(inputs_length=512, targets_length=512, mean_span_length=1.0, noise_density=0.4),
     "needs .* sentinels, the vocabulary has 100"),
    (dict(noise_density=1.0), "density lies between 0 and 1"),
    (dict(inputs_length=2), "take at least 4"),
])
def test_bad_lengths(kwargs, message):
    with pytest.raises(UserError, match=message):
        _corrupt([np.arange(2, 9)], **kwargs)
