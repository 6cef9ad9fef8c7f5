"""The table of rows: what each kind says of itself is what the pipeline makes of examples."""

import pytest
import tensorflow as tf

from t5x_lite.data import rows as data_rows, tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.data.denoising import DENOISERS
from t5x_lite.errors import UserError

EXAMPLE = {"inputs": [5, 6, 1], "targets": [7, 1, 8, 9, 1], "rejected": [4, 1],
           "reference": [-1.5, -2.5]}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", data_rows.ROWS)
def test_the_pipeline_makes_the_arrays_that_the_table_tells(kind, packing):
    rows = data_rows.of(kind)
    if packing and not rows.packs:
        return
    config = DataConfig(inputs_length=9, targets_length=12, packing=packing)
    pipeline = data_tasks.tensorflow_side()
    example = {name: tf.constant(tokens) for name, tokens in EXAMPLE.items()}
    dataset = tf.data.Dataset.from_tensors(example).map(lambda x: rows.convert(x, 1))
    if packing:
        dataset = pipeline.pack(dataset, rows.lengths(config))
    for marked in (False, True):   # whether id 0 stands in texts
        row, = (pipeline._finish_row(sides, rows.lengths(config), marked=marked) for sides in dataset)
        made = rows.masked({name: x.numpy() for name, x in row.items()})
        assert {name: (x.shape[0], x.dtype.name) for name, x in made.items()} == rows.arrays(config)


def test_every_kind_of_documents_has_readers_and_every_default_fits():
    for name, denoiser in DENOISERS.items():
        assert any(denoiser.makes in rows.takes for rows in data_rows.ROWS.values()), name
    for kind, rows in data_rows.ROWS.items():
        assert (not rows.denoiser and not rows.takes) or \
            DENOISERS[rows.denoiser].makes in rows.takes, kind


def test_a_side_of_its_own_is_shifted_and_padded(monkeypatch):
    """A pair of answers to one question: sides beside the model's own need nothing elsewhere."""
    rows = data_rows.Rows(
        ("inputs", "targets", "rejected"),
        {"encoder": "inputs_length", "decoder": "targets_length", "rejected": "targets_length"},
        {"encoder": {"encoder_input_tokens": "int32"},
         "decoder": {"decoder_target_tokens": "int32", "decoder_loss_weights": "float32"},
         "rejected": {"rejected_target_tokens": "int32"}},
        lambda x, eos: {**data_rows.of("seq2seq").convert(x, eos),
                        "rejected": {"rejected_target_tokens": x["rejected"]}},
        lambda task, i, t: {"inputs": i, "targets": t, "rejected": t})
    monkeypatch.setitem(data_rows.ROWS, "pairs", rows)
    config = DataConfig(inputs_length=4, targets_length=3)
    sides = rows.convert({"inputs": tf.constant([5, 1]), "targets": tf.constant([7, 1]),
                          "rejected": tf.constant([8, 9, 1, 4])}, 1)
    made = data_tasks.tensorflow_side()._finish_row(sides, rows.lengths(config))
    row = {name: x.tolist() for name, x in rows.masked(
        {name: x.numpy() for name, x in made.items()}).items()}
    assert row["rejected_target_tokens"] == [8, 9, 1]
    assert row["rejected_input_tokens"] == [0, 8, 9]
    assert row["decoder_input_tokens"] == [0, 7, 1]
    assert row.keys() == rows.arrays(config).keys()


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="objective.name='seq2sek'.*did you mean 'seq2seq'"):
        data_rows.of("seq2sek")


@pytest.mark.parametrize("kind", ["lm", "prefix_lm"])
def test_the_loss_counts_inputs_where_asked_for(kind):
    rows = data_rows.of(kind)
    made = rows.convert({name: tf.constant(tokens) for name, tokens in EXAMPLE.items()}, 1)
    weights = lambda sides: sides["decoder"]["decoder_loss_weights"].numpy().tolist()
    assert weights(rows.weighted(made, False)) == [0, 0, 0, 1, 1, 1, 1, 1]
    changed = rows.weighted(made, True)
    assert weights(changed) == [1] * 8
    assert {n: x for n, x in changed["decoder"].items() if n != "decoder_loss_weights"} == {
        n: x for n, x in made["decoder"].items() if n != "decoder_loss_weights"}


def test_inputs_in_a_row_of_their_own_have_no_loss():
    with pytest.raises(UserError, match="data.loss_on_inputs=True.* objective.name=lm or prefix_lm"):
        data_rows.of("seq2seq").weighted({}, True)
