"""Users' text at the border: damaged, in another encoding, too deep, too long, or oddly named."""

import functools
import gzip
import io
import json

import pytest

from t5x_lite import infer
from t5x_lite.data import choices, example_files, paths, readers, records, text_files
from t5x_lite.errors import UserError

GOOD = b'{"text": "a", "inputs": "a", "targets": "b"}\n'
DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"

# What each reader makes of a file, for the kinds of file that it takes.
READERS = {
    "train_files": lambda path: text_files.read_documents([path], "line"),
    "data.train": records.read_examples,
    "infer": lambda path: infer.read_lines(
        infer.open_input(path)[0], infer.format_of(path, ""), on_error="refuse",
        needs_targets=False, name=path),
    "any lines of JSON": readers.json_lines,
}


def write(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def taken(items) -> tuple[int, str]:
    """(how many came, what the UserError behind them says)."""
    count = 0
    with pytest.raises(UserError) as error:
        for _ in items:
            count += 1
    message = str(error.value)
    assert len(message) < 600 and "\n" not in message
    return count, message


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("line, says", [
    (b'{"text": "caf\xe9"}\n', "line 3 is not UTF-8 text (byte 14: 0xe9)"),
    (b'{"text": "a\0"}\n', "line 3 holds a NUL byte (byte 12)"),
    (b'{"text": 1' + b"2" * 6000 + b"}\n", "line 3 is JSON with a number of too many digits"),
    (DEEP, "line 3 is JSON nested too deeply"),
    (b'{"text": \n', "line 3 is not JSON"),
    (b"[1]\n", "line 3 is not an object but a list"),
])
def test_a_bad_line_of_a_jsonl_file_is_named_and_what_stands_before_kept(read, line, says,
                                                                         tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD + b"\n" + line + GOOD)
    count, message = taken(read(path))
    assert count == 1 and message.startswith(f"{path}, {says}")


@pytest.mark.parametrize("read", [READERS[n] for n in ("train_files", "data.train", "infer")])
def test_half_of_a_surrogate_pair_is_named(read, tmp_path):
    half = b'{"text": "a\\ud83d", "inputs": "a\\ud83d", "targets": "b"}\n'
    path = write(tmp_path / "a.jsonl", GOOD + half)
    assert taken(read(path)) == (1, f"{path}, line 2 holds half of a surrogate pair, "
                                    "'\\ud83d', which is no text" + ADVICE.get(read, ""))


ADVICE = {READERS["infer"]: "; --on_error=skip leaves such lines out"}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_damaged_gzip_file_gives_what_stands_before(read, tmp_path):
    lines = b"".join(GOOD.replace(b'"a"', b'"%d"' % i) for i in range(5000))
    packed = gzip.compress(lines)
    count, message = taken(read(write(tmp_path / "cut.jsonl.gz", packed[:len(packed) // 2])))
    assert count > 100 and f"cut.jsonl.gz, behind line {count}: the gzip file is cut off" in message
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0x55
    _, message = taken(read(write(tmp_path / "flipped.jsonl.gz", bytes(flipped))))
    assert "flipped.jsonl.gz" in message
    count, message = taken(read(write(tmp_path / "plain.jsonl.gz", lines)))
    assert count == 0 and "plain.jsonl.gz is not a gzip file" in message


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_byte_order_marks(read, tmp_path):
    plain, marked = (list(read(write(tmp_path / name, mark + GOOD * 2)))
                     for name, mark in (("a.jsonl", b""), ("b.jsonl", b"\xef\xbb\xbf")))
    assert plain == marked and len(plain) == 2
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        text = ("\ufeff" * (encoding == "utf-16-be") + GOOD.decode()).encode(encoding)
        count, message = taken(read(write(tmp_path / "c.jsonl", text)))
        assert count == 0 and f"c.jsonl is not UTF-8 text but {encoding.upper()[:6]};" in message


def test_plain_text_without_its_mark(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbffirst\r\nsec\rond\x0c\xe2\x80\xa8\nthird")
    assert list(text_files.read_documents([path], "line")) == [
        "first", "sec\rond\x0c\u2028", "third"]
    assert list(text_files.read_documents([path], "file")) == [
        "first\nsec\rond\x0c\u2028\nthird"]


def test_a_tsv_reads_alike_in_training_and_infer(tmp_path):
    content = b"a\tb\nfirst\rsecond\tthird\r\n\n" + b"x" * 150_000 + b'\ty\n"quoted\tas it is"\n'
    path = write(tmp_path / "a.tsv", content)
    trained = [(inputs, tuple(targets)) for inputs, targets in records.read_examples(path)]
    assert trained == [(item.inputs, item.targets) for item in READERS["infer"](path)]
    assert trained[1] == ("first\rsecond", ("third",)) and len(trained[2][0]) == 150_000
    assert trained[3] == ('"quoted', ('as it is"',))


def test_a_line_beyond_the_bound_is_skipped_without_being_held(monkeypatch, capsys):
    monkeypatch.setattr(readers, "LONGEST", 100)
    monkeypatch.setattr(readers, "_BLOCK", 16)
    lines = b"a\n" + b"x" * 1000 + b"\nb\n" + b"y" * 100 + b"\n"
    with pytest.raises(UserError, match="f, line 2 is longer than"):
        list(readers.lines_of(io.BytesIO(lines), "f"))
    kept = list(readers.lines_of(io.BytesIO(lines), "f", lambda error: None))
    assert [number for number, _ in kept] == [1, 3]   # the line end counts
    assert list(readers.lines_of(io.BytesIO(b"x" * 100), "f")) == [(1, "x" * 100)]


@pytest.mark.parametrize("content, kept", [
    (GOOD + b'{"inputs": "caf\xe9"}\n' + GOOD, [1, 3]),
    (GOOD + b"\0\0\0\n" + GOOD, [1, 3]),
    (GOOD + DEEP + b'{"inputs": ' + b"9" * 6000 + b"}\n" + GOOD, [1, 4]),
    (("\ufeff" + GOOD.decode()).encode("utf-16-le"), []),
])
def test_skipping_goes_on_behind_any_of_them(content, kept, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", content)
    items = list(infer.read_lines(infer.open_input(path)[0], "jsonl", on_error="skip",
                                  needs_targets=True, name=path))
    assert [item.line for item in items] == kept
    assert f"skipped: {path}" in capsys.readouterr().out


def test_skipping_ends_where_a_gzip_file_is_cut(tmp_path, capsys):
    packed = gzip.compress(b"".join(b"%d\n" % i for i in range(9999)))
    path = write(tmp_path / "a.txt.gz", packed[:len(packed) // 2])
    items = list(infer.read_lines(infer.open_input(path)[0], "text", on_error="skip",
                                  needs_targets=False, name=path))
    assert len(items) > 1000 and items[-1].inputs.isdigit()
    assert "the gzip file is cut off" in capsys.readouterr().out


@pytest.mark.parametrize("content, says", [
    (b"", "is not JSON"), (b"\xff\xfe", "UTF-16"), (b'{"examples": 3}', "no list \"examples\""),
    (b'{"examples": [3]}', "example 0 is not an object but a int"),
    (b'{"examples": [{"input": 1, "target": "a"}]}', "example 0 has no 'input' that is a string"),
    (b'{"examples": [{"input": "a", "target": 3}]}', 'example 0 has "targets" that are neither'),
    (b'{"task_prefix": 1, "examples": [{"input": "a", "target": "b"}]}',
     "has no 'task_prefix' that is a string"),
    (b'{"examples": [{"input": "a", "target": "\\ud83d"}]}', "example 0 holds half of a surrogate"),
    (b'{"examples": [{"input": "a", "target_scores": {"b": "c"}}]}',
     "example 0: the score of 'b' in target_scores is no number"),
    (b'{"examples": [{"input": "a", "target_scores": [1]}]}',
     "example 0 has no 'target_scores' that is an object"),
])
def test_a_malformed_task_of_big_bench(content, says, tmp_path):
    path = write(tmp_path / "task.json", content)

    def read():
        if example_files.is_task(path):
            yield from example_files.kind_of([path]).read(path)
        else:
            yield from records.read_examples(path)
    assert says in taken(read())[1]


def test_paths_hold_what_lists_and_globs_are_made_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["lang=en/train.jsonl", "set, two/train.jsonl", "v[2]/train.jsonl", "a=b,c[1].tsv"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(GOOD if name.endswith("l") else b"a\tb\n")
    for name in names:
        assert text_files.find_files(name, "f") == [name] == text_files.find_files([name], "f")
        assert example_files.task(name).num_input_examples("train") == 1
    assert paths.split(",".join(names)) == names
    assert paths.split(" a , b=2,, c=3") == ["a", "b=2", "c=3"]
    shares = [paths.share(entry) for entry in paths.split("lang=en/train.jsonl=2,set, two/train."
                                                          "jsonl[:50%]=.5,x=1,y")]
    assert shares == [("lang=en/train.jsonl", "=", "2"), ("set, two/train.jsonl[:50%]", "=", ".5"),
                      ("x", "=", "1"), ("y", "", "")]
    assert paths.matches("v[2]/*.jsonl") == ["v[2]/train.jsonl"]
    (tmp_path / "v2").mkdir()
    write(tmp_path / "v2/t.txt", b"a")
    assert paths.matches("v[2]/t.txt") == []        # the folder that is there wins
    assert paths.matches("v[23]/t.txt") == ["v2/t.txt"]
    assert paths.sizes("lang=en/train.jsonl=2,v[2]/*.jsonl,a_task", "set, two/train.jsonl[:50%]", "") \
        == dict.fromkeys(["lang=en/train.jsonl", "v[2]/train.jsonl", "set, two/train.jsonl"],
                         len(GOOD))
    with pytest.raises(UserError, match=r"write \[\[\] for the character itself"):
        text_files.find_files("v[9]/none.txt", "f")


def test_tables_with_and_without_quotes(tmp_path):
    path = write(tmp_path / "a.csv", b'ID,Label\n1,"a, ""b""\nc"\n\n2,d\n')
    assert list(readers.records(path, ",", ("ID",))) == [
        {"ID": "1", "Label": 'a, "b"\nc'}, {"ID": "2", "Label": "d"}]
    with pytest.raises(UserError, match="has no column X"):
        list(readers.records(path, ",", ("X",)))
    path = write(tmp_path / "b.csv", b"ID,Label\n1\n")
    with pytest.raises(UserError, match="line 2 has 1 fields, and there are 2 columns"):
        list(readers.records(path, ","))


# --- whatever stands in a file, nothing but a UserError comes out -----------------------------

@pytest.mark.slow
def test_no_bytes_make_a_reader_fail_otherwise(tmp_path):
    import hypothesis
    from hypothesis import strategies as st

    from tasks import scan, t5_benchmarks

    keys = st.sampled_from(["text", "inputs", "targets", "question", "answers", "examples", "input",
                            "target", "target_scores", "task_prefix", "choices", "label", "data",
                            "utterance", "targetValue", "paragraphs", "qas", "context"])
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
        | st.just("\ud800") | st.just("(list (description \"a"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=8)
    as_json = value.map(lambda v: json.dumps(v).encode())
    junk = st.binary(max_size=60) | st.sampled_from(
        [b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n", b"\0", b"\t", b'"', b"[" * 3000, b"1" * 5000])
    content = st.lists(as_json | junk, max_size=6).map(b"\n".join)
    packed = st.tuples(content, st.integers(0, 40), st.integers(0, 255)).map(
        lambda x: gzip.compress(x[0])[:-x[1] or None] + bytes([x[2]]))
    read = {
        **READERS, "big_bench": lambda p: example_files.kind_of([p]).read(p),
        "questions": choices.read_questions, "squad": t5_benchmarks.read_squad,
        "scitldr": t5_benchmarks.read_scitldr, "scan": scan.read_scan,
        "documents": functools.partial(_documents), "csv": lambda p: readers.records(p, ",")}

    @hypothesis.settings(max_examples=1500, derandomize=True, deadline=None, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(content, packed, st.sampled_from(["jsonl", "json", "tsv", "txt"]))
    def reads(plain, gz, ending):
        for name, written in ((f"a.{ending}", plain), (f"a.{ending}.gz", gz)):
            path = write(tmp_path / name, written)
            for reader in read.values():
                try:
                    for item in reader(path):
                        repr(item).encode("utf-8", "backslashreplace")
                except UserError as error:
                    assert len(str(error)) < 1000

    reads()


@pytest.mark.slow
def test_no_name_of_a_file_makes_the_door_fail_otherwise(tmp_path, monkeypatch):
    """Names of what is there and of what is not, with all that lists, shares and globs are made of."""
    import hypothesis
    from hypothesis import strategies as st
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.jsonl", "c,d.jsonl", "v[2].jsonl", "plain.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    part = st.sampled_from(["a=b", "c,d", "v[2]", "plain", ".jsonl", ".json", ".tsv", ".gz", "[:80%]",
                            "[80%:20%]", "[", "]", "[]", "**", "*", "?", "=", "=2", "=nan", ",", "/",
                            "..", "~", "~nobody", "\0", "\ud800", " ", "\n", "x" * 300, "[!", "[z-a]"])
    names = st.lists(part, max_size=6).map("".join) | st.text(max_size=8)

    @hypothesis.settings(max_examples=1500, derandomize=True, deadline=None, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(names)
    def names_are_files_or_refused(name):
        for look in (lambda: text_files.find_files(name, "data.train_files"),
                     lambda: [paths.share(entry) for entry in paths.split(name)],
                     lambda: example_files.is_path(name) and example_files.task(name),
                     lambda: infer.open_input(name)[0].close()):
            try:
                look()
            except UserError as error:
                assert len(str(error)) < 2000

    monkeypatch.setattr("sys.stdin", type("In", (), {"buffer": io.BytesIO()}))
    names_are_files_or_refused()


def _documents(path: str):
    for document in text_files.DOCUMENTS:
        for text in text_files.read_documents([path], document):
            text.encode()
            yield text
