"""What denoisers hide, drawn by hand; what must hold for any text; which objectives take them."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.data import batches as data_batches, denoising, rows as data_rows, vocabularies
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError

PYTHON = vocabularies.load("python")
MASK = PYTHON.vocab_size - 1   # the first sentinel
SEEDS = [[1, 2], [3, 4], [5, 6], [7, 8]]


def run(preprocessor, documents, inputs=32, targets=32, seed=0, vocabulary=PYTHON, **settings):
    """The examples as lists of ints."""
    dataset = tf.data.Dataset.from_generator(
        lambda: iter({"targets": d} for d in documents),
        output_signature={"targets": tf.TensorSpec([None], tf.int32)})
    features = {f: seqio.Feature(vocabulary) for f in ("inputs", "targets")}
    with seqio.map_seed_manager(seed):
        dataset = preprocessor(dataset, {"inputs": inputs, "targets": targets}, features,
                               **settings)
    return [{n: x.tolist() for n, x in e.items()} for e in dataset.as_numpy_iterator()]


DOCUMENTS = [np.arange(10, 10 + n) for n in (50, 3, 400, 0, 97)]
WHOLE = np.concatenate(DOCUMENTS).tolist()


# --- prefix LM ------------------------------------------------------------------------------

@pytest.mark.parametrize("inputs,targets,fewest,most", [(32, 32, 1, 30), (32, 12, 20, 30),
                                                        (12, 32, 1, 11)])
def test_a_prefix_and_the_rest_are_the_window(inputs, targets, fewest, most):
    examples = run(denoising.prefix_lm, DOCUMENTS, inputs, targets)
    parts = [(e["inputs"], e["targets"]) for e in examples]
    assert all(i.pop() == t.pop() == 1 for i, t in parts)
    assert sum((i + t for i, t in parts), []) == WHOLE
    whole = [len(i) for i, t in parts[:-1]]
    assert fewest <= min(whole) and max(whole) <= most and len(set(whole)) > 3
    assert all(len(t) <= targets - 1 for _, t in parts)


def test_a_prefix_and_the_rest_fill_the_row_of_a_decoder():
    dataset = tf.data.Dataset.from_tensor_slices({"targets": np.arange(10, 610)[None]})
    features = {f: seqio.Feature(PYTHON) for f in ("inputs", "targets")}
    with seqio.map_seed_manager(0):
        dataset = denoising.prefix_lm(
            dataset, {"inputs": 24, "targets": 8, "row": 32}, features)
    sizes = [(len(e["inputs"]), len(e["targets"])) for e in dataset.as_numpy_iterator()]
    assert {sum(s) for s in sizes} == {32}   # 600 tokens in 20 rows of 30
    assert 20 < max(i for i, _ in sizes) <= 24 and min(i for i, _ in sizes) < 6


def test_prefix_lm_needs_room():
    with pytest.raises(UserError, match="take at least 3 of each"):
        run(denoising.prefix_lm, DOCUMENTS, 2, 2)


# --- BERT -----------------------------------------------------------------------------------

def test_bert_masks_by_hand(monkeypatch):
    """Six tokens, half of them chosen: the lowest draws; id 0 never is."""
    draws = iter([[.1, .9, .3, .8, .0, .2],     # choice: places 0, 5 and 2, for 4 holds id 0
                  [.79, .0, .95, .0, .0, .85],  # 0 becomes the mask, 2 stays, 5 is at random
                  [77] * 6])
    monkeypatch.setattr(tf.random, "stateless_uniform",
                        lambda *a, **k: tf.constant(next(draws)))
    inputs, targets = denoising.mask_tokens(
        tf.constant([11, 12, 13, 14, 0, 16]), 0.5, 99, (3, 90), SEEDS)
    assert inputs.numpy().tolist() == [99, 12, 13, 14, 0, 77]
    assert targets.numpy().tolist() == [11, 0, 13, 0, 0, 16]


def test_bert_rates():
    tokens = tf.range(100, 20_100)
    inputs, targets = (x.numpy() for x in denoising.mask_tokens(
        tokens, 0.15, 99, (3, 90), SEEDS))
    chosen = targets != 0
    assert chosen.sum() == 3000
    np.testing.assert_array_equal(targets[chosen], tokens.numpy()[chosen])
    np.testing.assert_array_equal(inputs[~chosen], tokens.numpy()[~chosen])
    fates = inputs[chosen]
    rates = [(fates == 99).mean(), ((fates >= 3) & (fates < 90)).mean(), (fates >= 100).mean()]
    np.testing.assert_allclose(rates, [0.8, 0.1, 0.1], atol=0.03)


def test_bert_rows_end_with_an_eos_that_is_not_asked_for():
    examples = run(denoising.bert, DOCUMENTS)
    restored = []
    for e in examples:
        assert len(e["inputs"]) == len(e["targets"]) <= 32
        assert e["inputs"].pop() == 1 and e["targets"].pop() == 0
        assert any(e["targets"])
        restored += [t or i for i, t in zip(e["inputs"], e["targets"], strict=True)]
    assert restored == WHOLE


# --- BART -----------------------------------------------------------------------------------

def test_sentences_move_whole():
    tokens = tf.constant([11, 12, 13, 21, 31, 32, 41])   # the last one has no end
    ends = tf.constant([0, 0, 1, 1, 0, 1, 0]) > 0
    sentences = [[11, 12, 13], [21], [31, 32], [41]]
    found = set()
    for seed in range(40):
        permuted = denoising.permute_sentences(tokens, ends, [seed, 0]).numpy().tolist()
        order = sorted(range(4), key=lambda i: permuted.index(sentences[i][0]))
        assert permuted == sum((sentences[i] for i in order), [])
        found.add(tuple(order))
    assert len(found) > 12   # of 24
    assert denoising.permute_sentences(tokens[:0], ends[:0], [0, 0]).shape == (0,)


def test_infilling_by_hand():
    tokens = tf.constant([10, 11, 12, 13, 14, 15])
    fill = lambda lengths, gaps: denoising.infill(
        tokens, tf.constant(lengths, tf.int32), tf.constant(gaps, tf.int32), 99).numpy().tolist()
    assert fill([2, 1], [1, 3]) == [10, 99, 13, 14, 99]       # hides 11 12, and 15
    assert fill([3, 0, 1], [0, 1, 2]) == [99, 13, 99, 14, 99]   # 0: a mask where nothing was
    assert fill([0], [6]) == [10, 11, 12, 13, 14, 15, 99]
    assert fill([], []) == tokens.numpy().tolist()


@pytest.mark.parametrize("size,density,mean", [(0, .3, 3.), (1, .3, 3.), (1, .9, 3.), (2, .5, 3.),
                                               (17, .3, 3.), (511, .3, 3.), (511, .9, 1.),
                                               (511, .5, .2)])
def test_spans_are_poisson_up_to_the_density(size, density, mean):
    for seed in range(20):
        seeds = [[seed, s] for s in range(3)]
        lengths, gaps = (x.numpy() for x in denoising.draw_spans(size, density, mean, seeds))
        noise = round(float(np.float32(size) * np.float32(density)))
        assert lengths.sum() == noise and len(lengths) == len(gaps) <= noise
        assert (np.diff(gaps) > 0).all() and (not len(gaps) or 0 <= gaps[0])
        assert (not len(gaps)) or gaps[-1] <= size - noise
    if (size, density) == (511, .3):
        many = np.concatenate([denoising.draw_spans(511, .3, 3., [[s, 1], [s, 2], [s, 3]])[0]
                               for s in range(100)])
        assert abs(many.mean() - 3) < 0.1 and abs((many == 0).mean() - math.exp(-3)) < 0.01


def test_bart_noises_the_inputs_and_asks_for_everything():
    text = "It rains. Do you mind? We do! The end is near."
    tokens = PYTHON.encode(text) * 3
    example, = run(denoising.bart, [tokens], 128, 128)
    assert example["targets"] == [*tokens, 1]
    assert example["inputs"][-1] == 1 and len(example["inputs"]) <= 128
    shown = [t for t in example["inputs"] if t != MASK]
    assert len(shown) == len(tokens) - round(0.3 * len(tokens)) + 1
    assert not set(shown) - {*tokens, 1} and shown[:-1] != [t for t in tokens if t in shown]
    ends = denoising.sentence_ends(PYTHON)
    assert sum(ends[t] for t in PYTHON.encode(text)) == 4


# --- UL2 ------------------------------------------------------------------------------------

def test_ul2_draws_seven_denoisers_with_their_modes():
    documents = [np.arange(500, 500 + 3000)]
    examples = run(denoising.ul2, documents, 128, 128)
    names = {mode: PYTHON.encode(text) for mode, text in denoising.UL2_MODES.items()}
    restored, kinds = [], []
    for e in examples:
        mode = next(m for m, name in names.items() if e["inputs"][:len(name)] == name)
        inputs, targets = e["inputs"][len(names[mode]):], e["targets"]
        assert len(e["inputs"]) <= 128 and inputs.pop() == targets.pop() == 1
        is_sentinel = lambda t: t >= PYTHON.vocab_size - 100
        spans, sentinel = {}, None
        for t in targets:
            if is_sentinel(t):
                sentinel, spans[t] = t, []
            else:
                spans[sentinel].append(t)
        hidden = sum(map(len, spans.values()))
        if mode == "S":   # one span, at the end
            assert is_sentinel(inputs[-1]) and len(spans) == 1
        whole = sum((spans.pop(t) if is_sentinel(t) else [t] for t in inputs), [])
        assert not spans
        restored += whole
        kinds.append((mode, round(hidden / len(whole), 2)))
    assert restored == documents[0].tolist()
    rounds = [sorted(kinds[i:i + 7]) for i in range(0, len(kinds) - 7, 7)]
    assert len(rounds) >= 2 and kinds[:7] != kinds[7:14]
    assert min(len(e["inputs"]) for e in examples[:14]) >= 126   # windows fill their rows
    for found in rounds:
        assert [m for m, _ in found] == [*"RRSXXXX"]
        np.testing.assert_allclose([d for _, d in found], [.15, .15, .25, .15, .5, .5, .5], atol=.01)


def test_ul2_keeps_to_the_sentinels():
    """Half of 512 tokens in spans of 3 would need 127 of them."""
    examples = run(denoising.ul2, [np.arange(500, 500 + 4500) % 900 + 500], 512, 512)
    most = max(sum(t >= PYTHON.vocab_size - 100 for t in e["targets"]) for e in examples)
    assert most == 100


def test_ul2_says_which_targets_it_needs():
    with pytest.raises(UserError, match="density 0.5 and mean span .* gives .*; raise data.targets_length"):
        run(denoising.ul2, DOCUMENTS, 128, 32)


# --- all of them ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", denoising.DENOISERS)
def test_the_seed_decides(name):
    preprocessor = denoising.DENOISERS[name].preprocessor
    first, again, other = (run(preprocessor, DOCUMENTS, 64, 64, seed) for seed in (3, 3, 4))
    assert first == again
    assert (first == other) == (name == "causal_lm")


# Words are found by the marks of pieces, which bytes have not: tests/data/test_word_spans.py.
@pytest.mark.parametrize("name", sorted(denoising.DENOISERS.keys() - {"word_spans"}))
def test_bytes_too(name):
    documents = [np.frombuffer("Ça va. Und nun? ".encode() * 20, np.uint8).astype(np.int32) + 3]
    examples = run(denoising.DENOISERS[name].preprocessor, documents, 96, 96,
                   vocabulary=vocabularies.load("byt5"))
    assert max(max(e["targets"]) for e in examples) < 259


SHARDING = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def batch_of(config, task, objective):
    return next(data_batches.eval_batches(config, task, objective=objective, batch_size=4,
                                  sharding=SHARDING, max_batches=1))


@pytest.mark.parametrize("name,objective", [
    (n, o) for n, d in denoising.DENOISERS.items() for o, kind in data_rows.ROWS.items()
    if d.makes in kind.takes])
@pytest.mark.parametrize("packing", [False, True])
def test_text_files_under_every_objective(tmp_path, name, objective, packing):
    """Loss on what the denoiser asks for, and on nothing else."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {n} of it says nothing. But {n + 1} does!\n" for n in range(99)))
    config = DataConfig(
        validation_files=str(path), vocabulary="python", denoising=name, packing=packing,
        inputs_length=64, targets_length=144 if objective.endswith("lm") else 80)
    batch = {n: np.asarray(x) for n, x in batch_of(config, "validation_files", objective).items()}
    weights, targets = batch["decoder_loss_weights"], batch["decoder_target_tokens"]
    assert set(np.unique(weights)) <= {0, 1} and (targets[weights == 1] != 0).all()
    share = {"causal_lm": 0.9, "bert": 0.1}.get(name, 0.05)
    assert share < weights.mean() < {"bert": 0.2}.get(name, 1.01)
    if objective == "prefix_lm":   # what is seen both ways is asked for once an example: next
        segments = batch.get("decoder_segment_ids", (targets != 0).astype(int))
        assert weights[batch["decoder_prefix"] == 1].sum() == sum(
            len(set(row[row > 0])) for row in segments)
    if packing:
        side = "encoder" if objective == "mlm" else "decoder"
        assert batch[f"{side}_segment_ids"].max() >= 1


@pytest.mark.parametrize("changes,objective,message", [
    ({"denoising": "ul3"}, "seq2seq", "did you mean 'ul2'"),
    ({"denoising": "bert"}, "seq2seq", "bert is for objective.name=mlm, not 'seq2seq', which "
     "takes prefix_lm, span_corruption, word_spans, bart, ul2"),
    ({"denoising": "ul2"}, "mlm", "not 'mlm', which takes bert"),
    ({"denoising": "ul2", "noise_density": 0.3}, "seq2seq", "no setting of data.denoising='ul2'"),
    ({"denoising": "bart", "noise_density": 1.5}, "seq2seq", r"must be in \(0, 1\)"),
    ({"denoising": "salient"}, "mlm", "data.denoising='salient': must be one of"),
    ({"inputs_length": 64}, "prefix_lm", "targets_length=64 is the whole row"),
])
def test_wrong_choices_of_text_files(tmp_path, changes, objective, message):
    path = tmp_path / "text.txt"
    path.write_text("nothing to see\n")
    config = dataclasses.replace(
        DataConfig(validation_files=str(path), vocabulary="python", inputs_length=32,
                   targets_length=64), **changes)
    with pytest.raises(UserError, match=message):
        batch_of(config, "validation_files", objective)


@pytest.mark.parametrize("task,changes,objective,message", [
    ("python_docs_bert", {}, "seq2seq", "data.validation='python_docs_bert': bert is for"),
    ("python_docs_ul2", {"denoising": "bart"}, "seq2seq", "take .* python_docs_bart"),
    ("python_docs_causal_lm", {}, "seq2seq", "causal_lm is for objective.name=lm"),
])
def test_wrong_tasks(task, changes, objective, message):
    with pytest.raises(UserError, match=message):
        batch_of(DataConfig(validation=task, **changes), task, objective)
