"""Span corruption equals T5's, token for token, and loses nothing."""

import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.errors import UserError
from tasks import span_corruption as sc
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
    assert sc.num_sentinels(vocabulary) == 100
    for case in _golden_cases():
        tokens = vocabulary.encode_tf(case["text"])[:512]
        assert tokens.numpy().tolist() == case["tokens"]
        for name, mask in (("inputs", _mask(case)), ("targets", ~_mask(case))):
            found = sc.spans_to_sentinels(tokens, tf.constant(mask), 32099)
            assert found.numpy().tolist() == case[name]
