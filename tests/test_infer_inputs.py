"""What infer reads: formats, pipes, malformed lines; no model takes part."""

import gzip
import os
import pathlib
import threading

import pytest

from t5x_lite import infer
from t5x_lite.errors import UserError


@pytest.mark.parametrize("line, kind, message", [
    (r'{"inputs": "a\ud800b"}', "jsonl", "holds half of a surrogate pair"),
    ("{", "jsonl", "is not JSON"), ("[]", "jsonl", "is not an object but a list"),
    ('{"a": 1}', "jsonl", 'has no string "inputs"'), ("", "text", "is empty"),
    ("\tb", "tsv", "has no inputs before the tab"), ("a", "tsv", "has no targets to score"),
    ('{"inputs": "a", "targets": ""}', "jsonl", "has no targets to score"),
    ('{"inputs": "a", "targets": ["b", ""]}', "jsonl", "has an empty target to score"),
    ('{"inputs": "a", "targets": 3}', "jsonl", 'has "targets" that are neither'),
    (b"\xff", "text", "is not UTF-8"),
])
def test_malformed_lines_are_numbered_and_skipped_or_refused(line, kind, message, capsys):
    good = {"jsonl": '{"inputs": "a", "targets": "b"}', "tsv": "a\tb", "text": "a"}[kind]
    raw = line if isinstance(line, bytes) else line.encode()
    lines = [good.encode() + b"\n", raw + b"\n", good.encode() + b"\n"]
    scored = dict(needs_targets=kind != "text", name="f")
    with pytest.raises(UserError, match=f"f, line 2 {message}"):
        list(infer.read_lines(lines, kind, on_error="refuse", **scored))
    found = list(infer.read_lines(lines, kind, on_error="skip", **scored))
    assert [item.line for item in found] == [1, 3]
    assert f"skipped: f, line 2 {message}" in capsys.readouterr().out


@pytest.mark.parametrize("name, kind, content", [
    ("a.json", "json", b'[{"question": "1", "answer": ["2"]}, {"inputs": "3", "targets": "4"}]'),
    ("a.json", "json", b"\xef\xbb\xbf" b'[{"utterance": "1", "targetValue": '
     b'"(list (description 2))"}, {"inputs": "3", "targets": "4"}]'),
    ("a.jsonl", "jsonl", b"\xef\xbb\xbf" b'{"inputs": "1", "targets": "2"}\n\n'
     b'{"inputs": "3", "targets": "4"}\n\n'),
    ("a.tsv", "tsv", b"1\t2\n\n3\t4\n"),
])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_reads_as_in_training(name, kind, content, zipped, tmp_path):
    from t5x_lite.data import records
    (tmp_path / name).write_bytes(content)
    expected = [(inputs, tuple(targets)) for inputs, targets in records.read_examples(
        str(tmp_path / name))]
    path = str(tmp_path / name) + ".gz" * zipped
    if zipped:
        pathlib.Path(path).write_bytes(gzip.compress(content))
    lines, found = infer.open_input(path)
    assert (infer.format_of(path, ""), found) == (kind, path)
    read = list(infer.read_lines(lines, kind, on_error="refuse", needs_targets=True))
    assert [(item.inputs, item.targets) for item in read] == expected == [
        ("1", ("2",)), ("3", ("4",))]


def test_files_that_cannot_be_read_are_named(tmp_path):
    read = lambda path, kind: list(infer.read_lines(
        infer.open_input(str(path))[0], kind, on_error="skip", needs_targets=False, name="f"))
    (tmp_path / "a.jsonl.gz").write_bytes(b"{}")
    with pytest.raises(UserError, match="f is not a gzip file"):
        read(tmp_path / "a.jsonl.gz", "jsonl")
    (tmp_path / "a.json").write_text('{"inputs": "a"}')
    with pytest.raises(UserError, match="f is not a list of objects"):
        read(tmp_path / "a.json", "json")
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "b", "does not exist")):
        with pytest.raises(UserError, match=message):
            infer.open_input(str(path))


def test_a_pipe_is_read(tmp_path):
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="needs --format"):
        infer.format_of(pipe, "")
    writer = threading.Thread(target=lambda: pathlib.Path(pipe).write_text("a\nb\n"))
    writer.start()
    lines, name = infer.open_input(pipe)
    assert [i.inputs for i in infer.read_lines(
        lines, "text", on_error="refuse", needs_targets=False, name=name)] == ["a", "b"]
    writer.join()
    assert infer.source_of(pipe, "text") == "a pipe as text"


def test_formats_by_name():
    assert infer.format_of("a.tsv", "") == "tsv" and infer.format_of("a", "") == "text"
    assert infer.format_of("a.tsv", "jsonl") == "jsonl"
    with pytest.raises(UserError, match="did you mean 'jsonl'"):
        infer.format_of("a", "jsonlines")
    assert infer.format_of("a.jsonl.gz", "") == "jsonl" and infer.format_of("a.json", "") == "json"
    with pytest.raises(UserError, match="--input=- has no ending: it needs --format"):
        infer.format_of("-", "")
