"""Texts that a denoiser writes anew, for the view "filled"."""

import json
import random
import types

import jax
import pytest

from t5x_lite import refill
from t5x_lite.build import build
from t5x_lite.errors import UserError
from tests import tiny_config


def test_what_is_hidden_and_filled_by_hand():
    text = "one two three four five six seven"
    masked, hidden = refill.hide(text, random.Random(0), 0.5, 2)   # 2 of 4 pieces
    assert hidden == [w for w in ("one two", "three four", "five six", "seven") if w in hidden] and len(hidden) == 2
    assert refill.fill(masked, "", hidden) == text                   # nothing written: as it was
    written = refill.fill(masked, "<extra_id_0> a b <extra_id_1> c <extra_id_2> d", hidden)
    assert written == text.replace(hidden[0], "a b").replace(hidden[1], "c")
    assert refill.fill(masked, "<extra_id_1> c", hidden) == text.replace(hidden[1], "c")
    assert refill.hide("word", random.Random(0), 0.3, 2) == ("<extra_id_0>", ["word"])
    long, hidden = refill.hide(" ".join(map(str, range(1000))), random.Random(1), 0.9, 1)
    assert len(hidden) == 100 and "<extra_id_99>" in long and "<extra_id_100>" not in long


def test_each_version_hides_words_of_its_own(tmp_path, monkeypatch):
    """Another place for another version, text or seed; the same for the same. Each row has an id to draw with."""
    asked = []

    class Writer:
        def __init__(self, *given):
            pass

        def predict(self, params, texts, ids):
            asked.append((list(texts), list(ids)))
            return [types.SimpleNamespace(texts=[f"<extra_id_0> new{i}"]) for i in ids]

    monkeypatch.setattr(refill, "Predictor", Writer)
    program = types.SimpleNamespace(config=tiny_config.run(tiny_config.write_text(tmp_path / "text.txt")))
    texts = [" ".join("abcdefgh"), " ".join("hgfedcba")]
    first, again, other = (refill.versions_of(program, None, texts, 6, 0.1, 1, seed) for seed in (7, 7, 8))
    assert first == again != other and [len(found) for found in first] == [6, 6]
    assert [ids for _, ids in asked[:6]] == [[2 * n, 2 * n + 1] for n in range(6)]
    for number, found in enumerate(first):
        places = [text.split().index(f"new{2 * version + number}") for version, text in enumerate(found)]
        assert len(set(places)) > 2, places
        assert all(sum(a != b for a, b in zip(text.split(), texts[number].split(), strict=True)) == 1
                   for text in found)   # all else as it was


@pytest.mark.parametrize("line, message", [
    ({"targets": "a"}, "line 1 has no 'inputs'"), ({"inputs": " "}, "line 1 has no words"),
    ({"text": "a <extra_id_0> b"}, "sentinels of its own"), (None, "holds no text")])
def test_lines_that_cannot_be_filled_are_named(tmp_path, line, message):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n" if line is None else json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message):
        refill.read(str(file))


@pytest.mark.slow
def test_a_denoiser_fills_texts_the_same_way_each_time(tmp_path):
    run = tiny_config.run(tiny_config.write_text(tmp_path / "text.txt"))
    program = build(run)
    texts = ["alpha beta gamma delta", "zeta eta theta"]
    with program.activate():
        params = jax.jit(program.model.init)(jax.random.key(0))
        first, again = (refill.versions_of(program, params, texts, 2, 0.5, 1, 7) for _ in range(2))
    assert first == again and [len(found) for found in first] == [2, 2]
    output = tmp_path / "filled.jsonl"
    refill.write([({"inputs": text, "id": 3}, text) for text in texts], first, str(output))
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"inputs": text, "id": 3, "filled": made} for text, made in zip(texts, first, strict=True)]
