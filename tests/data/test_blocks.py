"""Text in blocks of documents: the same rows, places of both kinds, and how many documents a block has."""

import numpy as np
import pytest

from t5x_lite.data import tasks as data_tasks
from t5x_lite.data.batches import ShardedRows
from t5x_lite.data.config import DataConfig

pipeline = data_tasks.tensorflow_side()

LENGTHS = dict(inputs_length=24, targets_length=24, num_shards=1, shuffle_buffer=5, packing=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 150 documents, the empty one and one of many windows among them."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"line {i} says: {'def f(x): return x + 1 ' * (i % 7)}" for i in range(149)]
    path.write_text("\n".join([*lines, "import os " * 300]) + "\n")
    return str(path)


def rows_of(text, monkeypatch, objective="seq2seq", in_blocks=True, **changes):
    config = DataConfig(train_files=text, **{"vocabulary": "python", **LENGTHS, **changes})
    with monkeypatch.context() as patch:
        if not in_blocks:
            patch.setattr(pipeline.blocks, "documents_of", lambda *_: 0)
        return ShardedRows(config, objective=objective, global_batch_size=4, seed=3, shards=[0])


def check_equal(rows, others, steps):
    for _ in range(steps):
        for part, other in zip(next(rows).values(), next(others).values(), strict=True):
            assert part.keys() == other.keys()
            for name in part:
                assert part[name].dtype == other[name].dtype
                np.testing.assert_array_equal(part[name], other[name], name)


@pytest.mark.parametrize("objective, changes", [
    ("seq2seq", dict(vocabulary="byt5", packing=False)),
    ("seq2seq", dict(denoising="ul2", inputs_length=48, targets_length=48)),
    ("lm", {}),
    ("prefix_lm", dict(denoising="span_corruption", inputs_length=20, targets_length=64)),   # two a row
])
def test_rows_are_those_of_single_documents(text, monkeypatch, objective, changes):
    check_equal(*(rows_of(text, monkeypatch, objective, kind, **changes) for kind in (True, False)), 60)


def test_a_place_of_either_kind_goes_on_as_it_was(text, monkeypatch):
    """Through more than an epoch, with whatever a run of the other kind holds ahead."""
    blocks, single = (rows_of(text, monkeypatch, in_blocks=kind) for kind in (True, False))
    check_equal(blocks, single, 60)
    places = [rows.state([0]) for rows in (blocks, single)]
    resumed = [rows_of(text, monkeypatch) for _ in places]
    for rows, place in zip(resumed, places, strict=True):
        rows.restore(place)
    for _ in range(3):
        expected = next(blocks)
        for rows in resumed:
            check_equal(iter([expected]), rows, 1)
    assert [rows._readers[0]._documents for rows in resumed] == [(256,), ()]


@pytest.mark.parametrize("length, documents", [(0, 256), (100, 256), (1000, 128), (70_000, 1), (200_000, 1)])
def test_documents_of_a_block_by_hand(tmp_path, length, documents):
    """As many as 128 KiB hold, a power of two, 256 at most."""
    (tmp_path / "text.txt").write_text(f"{'x' * max(1, length)}\n" * 3)
    config = DataConfig(train_files=f"{tmp_path}/text.txt", vocabulary="python", inputs_length=24,
                        targets_length=24)
    (task, _), = data_tasks.train_mixture(config, "seq2seq")
    assert pipeline.blocks.documents_of(task, "train") == documents


def test_pairs_of_texts_are_not_joined(tmp_path):
    """Examples that are a record each have no blocks."""
    (tmp_path / "pairs.jsonl").write_text('{"inputs": "2 + 3", "targets": "5"}\n' * 3)
    config = DataConfig(train=f"{tmp_path}/pairs.jsonl", vocabulary="python", inputs_length=24,
                        targets_length=24)
    (task, _), = data_tasks.train_mixture(config, "seq2seq")
    assert pipeline.blocks.documents_of(task, "train") == 0
