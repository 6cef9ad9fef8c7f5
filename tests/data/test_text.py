"""Text gathered ahead of tf.data: Python's own, and a user's files."""

import gzip
import json
import os

import numpy as np
import pytest

from t5x_lite.data import (
    batches as data_batches,
    document_cache,
    pipeline,
    tasks as data_tasks,
    text_files,
    vocabularies,
)
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from tasks import python_text

# --- text files -----------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("first line\nsecond line\n\n  \nthird\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one\\ntwo", "id": 1}\n\n{"text": "three"}\n')
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("zipped\n")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def test_documents_of_every_kind(folder):
    def read(name, document="line"):
        return list(text_files.read_documents([str(folder / name)], document))
    assert read("a.txt") == ["first line", "second line", "third"]
    assert read("a.txt", "paragraph") == ["first line\nsecond line", "third"]
    assert read("a.txt", "file") == ["first line\nsecond line\n\n  \nthird"]
    assert read("b.jsonl") == ["one\ntwo", "three"] == read("b.jsonl", "file")
    assert read("c.txt.gz") == ["zipped"]


def test_files_by_glob_list_and_sequence(folder):
    a, c = str(folder / "a.txt"), str(folder / "c.txt.gz")
    assert text_files.find_files(f"{a},{c}", "f") == [a, c]
    assert text_files.find_files([a, str(folder / "*.gz")], "f") == [a, c]


@pytest.mark.parametrize("name,content,message", [
    ("missing.txt", None, "data.train_files='.*missing.txt': no such file"),
    ("/dev/null", None, "data.train_files='/dev/null': a pipe or a device, which cannot be read again"),
    ("..", None, r"data.train_files='.*\.\.': a folder; name its files \(.*\*.txt\)"),
    ("b.txt", "", "data.train_files: .*b.txt is empty"),
    ("bad.jsonl", '{"text": 1}\n', r"bad.jsonl, line 1 has no string field 'text' \(found \['text"),
    ("bad.jsonl", '{"text": "x"}\nnot json', "bad.jsonl, line 2 is not JSON"),
    ("bad.txt", b"caf\xe9\n", "bad.txt, line 1 is not UTF-8 text"),
    ("bad.txt.gz", "plain", "bad.txt.gz is not a gzip file"),
    ("blank.txt", "  \n\n", "'train_files' has 0 documents in 'train', too few for data.num_shards=2"),
    ("one.txt", "a single line", "'train_files' has 1 documents in 'train', too few"),
])
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = DataConfig(train_files=str(path), vocabulary="byt5", num_shards=2,
                        inputs_length=32, targets_length=32)
    with pytest.raises(UserError, match=message):
        data_batches.ShardedRows(config, objective="seq2seq", global_batch_size=2, seed=0, shards=[0])


def test_other_bad_settings_of_text_files(folder):
    config = DataConfig(train_files=str(folder / "a.txt"), inputs_length=32, targets_length=32)
    with pytest.raises(UserError, match="which vocabulary"):
        data_tasks.train_mixture(config, "seq2seq")
    with pytest.raises(UserError, match="data.text_document='lines': .*did you mean 'line'"):
        data_tasks.train_mixture(DataConfig(train_files=str(folder / "a.txt"), vocabulary="byt5",
                                      text_document="lines"), "seq2seq")
    with pytest.raises(UserError, match="bert is for objective.name=mlm, not 'seq2seq'"):
        data_tasks.train_mixture(DataConfig(train_files=str(folder / "a.txt"), vocabulary="byt5",
                                      denoising="bert"), "seq2seq")
    with pytest.raises(UserError, match="text cache .* cannot be written"):
        (folder / "file").touch()
        config = DataConfig(train_files=str(folder / "a.txt"), vocabulary="byt5",
                            cache_dir=str(folder / "file"))
        data_tasks.train_mixture(config, "seq2seq")[0].task.source.folder()
    document_cache.set_root("")


def test_text_comes_back_from_validation_rows(tmp_path):
    """Causal LM rows, put end to end, are the documents with EOS between them."""
    import jax
    lines = [f"document number {i} " + "x" * i for i in range(30)]
    (tmp_path / "v.txt").write_text("\n".join(lines))
    config = DataConfig(validation_files=str(tmp_path / "v.txt"), vocabulary="byt5",
                        targets_length=50)
    batches = list(data_batches.eval_batches(
        config, data_tasks.validation_tasks(config)[0], objective="lm", batch_size=4,
        sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])))
    tokens = np.concatenate([b["decoder_target_tokens"].ravel() for b in batches])
    weights = np.concatenate([b["decoder_loss_weights"].ravel() for b in batches])
    vocabulary = vocabularies.load("byt5")
    expected = [token for line in lines for token in [*vocabulary.encode(line), 1]]
    assert tokens[weights > 0].tolist() == expected
    assert (weights[:len(expected)] == 1).all() and not tokens[weights == 0].any()


def test_cache_is_written_once_and_renewed_with_the_content(tmp_path, monkeypatch):
    calls = []
    real = text_files.read_documents
    monkeypatch.setattr(text_files, "read_documents", lambda *a: calls.append(a) or real(*a))
    path = tmp_path / "t.txt"
    path.write_text("a\nb\nc\n")

    def files():
        config = DataConfig(train_files=str(path), vocabulary="byt5", cache_dir=str(tmp_path / "k"))
        source = data_tasks.train_mixture(config, "lm")[0].task.source
        names = {os.path.basename(f) for f in source.list_shards("train")}
        return source.num_input_examples("train"), names

    first = files()
    assert first == files() and first[0] == 3 and len(calls) == 1
    path.write_text("a\nb\nd\ne\n")
    second = files()
    assert second[0] == 4 and len(calls) == 2 and not first[1] & second[1]
    document_cache.set_root("")


def test_half_written_cache_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path))

    def documents():
        yield "train", "one"
        raise KeyboardInterrupt

    broken = document_cache.DocumentSource(lambda: "key", ("train",), documents)
    with pytest.raises(KeyboardInterrupt):
        broken.folder()
    assert os.listdir(tmp_path) == []
    whole = document_cache.DocumentSource(lambda: "key", ("train",), lambda: [("train", "two")])
    texts = [x["text"].numpy() for x in whole.get_dataset("train", shuffle=False)]
    assert texts == [b"two"]
    manifest = json.loads((tmp_path / "key" / "manifest.json").read_text())
    assert manifest["train"]["documents"] == 1


def test_a_damaged_cache_is_put_aside_and_made_anew(tmp_path, monkeypatch, capsys):
    """A manifest that is torn or another's, a missing one, missing files; a file cut in the middle is
    met while it is read, and named."""
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path))
    made = []

    def documents():
        made.append(1)
        return [("train", text) for text in ("one", "two", "three")]

    source = document_cache.DocumentSource(lambda: "key", ("train",), documents)
    manifest = source.folder() / "manifest.json"
    for content in ("null", "{", "{}", '{"train": null}', '{"train": {"documents": 4}}', "\0", None):
        manifest.unlink() if content is None else manifest.write_text(content)
        assert source.num_input_examples("train") == 3 and len(source.list_shards("train")) == 3
        assert "is damaged: it is made anew" in capsys.readouterr().out
    os.remove(source.list_shards("train")[1])
    assert len(source.list_shards("train")) == 3 and len(made) == 9
    assert sum(".damaged." in name for name in os.listdir(tmp_path)) == 8
    cut = source.list_shards("train")[0]
    os.truncate(cut, os.path.getsize(cut) - 3)
    with pytest.raises(UserError, match="the data are damaged: .*text cache.*remove its folder"):
        list(pipeline._read(source.get_dataset("train", shuffle=False)))


# --- Python's own text ----------------------------------------------------------------------

def test_split_is_stable_and_about_one_in_twenty():
    sides = [python_text.split_of(f"module_{i}") for i in range(4000)]
    assert 150 < sides.count("validation") < 250
    assert python_text.split_of("json.decoder") == "train"
    assert python_text.split_of("unittest.util") == "train"


def test_docs_and_source_of_a_module_are_on_one_side():
    modules = dict(python_text.modules())
    assert "json.decoder" in modules and "asyncio" in modules
    assert not any("test" in name.split(".") or name.startswith(("idlelib", "encodings"))
                   for name in modules)
    source = {text: split for split, text in python_text.source_documents()}
    docs = {text: split for split, text in python_text.docs_documents()}
    held_out = 0
    for name, text in modules.items():
        documentation = python_text.docstrings(text)
        if text.strip() and documentation in docs:
            assert source[text] == docs[documentation] == python_text.split_of(name)
            held_out += docs[documentation] == "validation"
    assert held_out >= 5


def test_docstrings_of_every_level_in_order():
    source = ('"""Module."""\nclass A:\n    """Class."""\n    def f(self):\n        """Method.\n\n'
              '        More."""\nasync def g():\n    """Function."""\n    x = "no docstring"\n')
    assert python_text.docstrings(source) == "Module.\n\nClass.\n\nMethod.\n\nMore.\n\nFunction."
    assert python_text.docstrings("not python at all (") == ""


def test_shipped_vocabulary():
    vocabulary = vocabularies.load("python")
    pieces = vocabulary.tokenizer
    assert vocabulary.vocab_size == 4096 and vocabulary.extra_ids == 100
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id()) == (0, 1, 2)
    assert vocabularies.SHIPPED["python"].stat().st_size < 150_000
    text = "def f(x: int):\n        return x  # naïve 漢字\n\n\n\tpass  "
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert 2 not in vocabulary.encode(text)   # bytes stand in for the unknown
    split, document = next(python_text.docs_documents())
    assert len(document) / len(vocabulary.encode(document)) > 2.5
