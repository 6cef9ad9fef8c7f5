"""Vocabularies at the border: an id 0 that stands in texts, files that are cut off, their sizes."""

import json
import os

import jax
import numpy as np
import pytest
import tensorflow as tf
import tokenizers
from tokenizers import models, pre_tokenizers

from configs.experiments import closed_book_qa
from t5x_lite.data import (
    batches as data_batches,
    denoising,
    document_cache,
    rows as data_rows,
    vocabularies,
    vocabulary as data_vocabulary,
)
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError

WORDS = ("[UNK]", "</s>", "[PAD]", "a", "b", "c")


def word_level(folder, words=WORDS) -> str:
    """The path of a tokenizer.json of these words in this order; others are [UNK]."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]", "</s>", "[PAD]"])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def test_an_unknown_word_of_id_0_is_read_and_padding_is_not(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("a zebra b\tzebra c\n")
    config = DataConfig(validation=str(path), vocabulary=word_level(tmp_path), inputs_length=6,
                        targets_length=5)
    [batch] = data_batches.eval_batches(
        config, str(path), objective="seq2seq", batch_size=2,
        sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    batch = {name: np.asarray(x).tolist() for name, x in batch.items()}
    assert batch["encoder_input_tokens"] == [[3, 0, 4, 1, 0, 0], [0] * 6]
    assert batch["encoder_mask"] == [[1, 1, 1, 1, 0, 0], [0] * 6]
    assert batch["decoder_target_tokens"] == [[0, 5, 1, 0, 0], [0] * 5]
    assert batch["decoder_loss_weights"] == [[1, 1, 1, 0, 0], [0] * 5]


@pytest.mark.parametrize("words, stands", [
    (WORDS, True), (("</s>", "[UNK]", "[PAD]", "a"), True), (("a", "</s>", "[UNK]", "[PAD]"), True),
    (("[PAD]", "</s>", "[UNK]", "a"), False)])
def test_where_id_0_stands_in_rows(words, stands, tmp_path):
    vocabulary = vocabularies.load(word_level(tmp_path, words))
    assert data_vocabulary.zero_in_rows(vocabulary) == stands


def test_shipped_vocabularies_have_no_text_of_id_0():
    for name in ("python", "facts", "scan", "byt5"):
        assert not data_vocabulary.zero_in_rows(vocabularies.load(name))


def test_a_masked_lm_may_ask_for_id_0():
    tokens = tf.zeros([20], tf.int32)
    seeds = [tf.constant([i, 7]) for i in range(3)]
    inputs, targets = denoising.mask_tokens(tokens, 0.25, 99, (3, 90), seeds, unchosen=-1)
    assert (targets.numpy() == 0).sum() == 5 and (targets.numpy() == -1).sum() == 15
    made = data_rows.of("mlm").convert({"inputs": inputs, "targets": targets}, 1)["encoder"]
    assert made["decoder_loss_weights"].numpy().sum() == 5
    assert (made["decoder_target_tokens"].numpy() == 0).all()
    # As before, where no target is negative: 0 is what was not chosen.
    made = data_rows.of("mlm").convert({"inputs": inputs, "targets": tf.constant([7, 0])}, 1)
    assert made["encoder"]["decoder_loss_weights"].numpy().tolist() == [1, 0]


def test_a_mixture_sees_a_decoders_tokens_of_id_0_and_no_padding():
    from t5x_lite.models import language_model
    batch = {"decoder_input_tokens": np.array([[0, 5, 0, 6, 0], [0, 5, 6, 0, 0]]),
             "decoder_loss_weights": np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], np.float32)}
    assert language_model._real(batch, "decoder").astype(int).tolist() == [
        [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]


# --- files ------------------------------------------------------------------------------------

@pytest.mark.parametrize("length", [0, 10, 5_000, -1])
def test_a_sentencepiece_file_that_is_cut_off(length, tmp_path):
    path = tmp_path / "cut.model"
    path.write_bytes(vocabularies.SHIPPED["python"].read_bytes()[:length])
    with pytest.raises(UserError, match=r"cut.model' is no whole SentencePiece model"):
        vocabularies.load(str(path))
    assert data_vocabulary.rows_for_file(str(path)) is None


@pytest.mark.parametrize("content, says", [
    (b"", "is not JSON"), (b'{"model": ', "is not JSON"), (b"\xff", "is not JSON"),
    (b"[" * 50_000, "is not JSON"), (b"[1]", "is not JSON's object but a list"),
    (b'{"model": {}}', "is no tokenizer.json"), (b'{"a": 1' + b"1" * 5000 + b"}", "is not JSON"),
    (json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {
        "a": 0, "</s>": 4_000_000_000}, "unk_token": "a"}}).encode(), "has ids up to 4,000,000,000"),
    (json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}
                ).encode(), "has ids up to -1"),
])
def test_a_tokenizer_json_that_is_none(content, says, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        vocabularies.load(str(path))
    assert len(str(error.value)) < 600
    data_vocabulary.rows_for_file(str(path))   # says nothing, and does not fail


def test_settings_beside_a_tokenizer_json_that_are_none(tmp_path):
    path = word_level(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    for content in (b"{", b"\xff", b"3"):
        settings.write_bytes(content)
        with pytest.raises(UserError, match=f"{settings} is not JSON"):
            vocabularies.TokenizerJson(path)
    settings.write_text('{"eos_token": ["a"]}')   # no name: the file's own </s> it is
    assert vocabularies.TokenizerJson(path).eos_id == 1


def test_a_file_that_is_not_there_is_refused_at_the_door(tmp_path):
    (tmp_path / "words.model").touch()
    with pytest.raises(UserError, match="no such file; did you mean 'words.model'"):
        data_vocabulary.check_there(str(tmp_path / "word.model"))
    for name in ("python", "", str(tmp_path / "words.model")):
        data_vocabulary.check_there(name)


def test_a_files_size_sets_the_rows_that_a_config_leaves_open(tmp_path):
    shipped = str(vocabularies.SHIPPED["python"])
    assert data_vocabulary.rows_for_file(shipped) == 4096    # 3,996 pieces and 100 sentinels
    path = word_level(tmp_path)
    assert data_vocabulary.rows_for_file(path) == 128        # 6 and 100
    options = f"passages=p.txt,questions=q.jsonl[:50%],held_out=q.jsonl[50%:],vocabulary={path}"
    [run, *_] = closed_book_qa.get_runs(options)
    assert run.config.model.vocab_size == 128
    chosen = closed_book_qa.options("passages=p.txt,questions=q.jsonl,held_out=h.jsonl")
    assert chosen.vocabulary == "facts"
    chosen = closed_book_qa.options("passages=c4_span_corruption,questions=natural_questions_open")
    assert chosen.vocabulary == "t5"


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_a_cache_folder_has_the_mode_of_the_umask(mask, tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path))
    source = document_cache.DocumentSource(lambda: "key", ("train",), lambda: [("train", "text")])
    before = os.umask(mask)
    try:
        folder = source.folder()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
    for file in folder.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask
