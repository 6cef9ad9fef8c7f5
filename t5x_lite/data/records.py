"""Records that Python reads from files, kept so that tf.data can take them apart natively.

tf.data has no JSON parser and cannot save iterators that call Python. A record is therefore
read once, ahead of tf.data, and stored as one document of the cache (document_cache.py): its
fields joined by the ASCII record separator, the items of a list field by the unit separator.

    source = RecordSource("nq", {"train": ["train.jsonl"]}, read=lambda path: ...)
    format_fn = unpack(("question", "answers"), lists=("answers",))

Files of tasks that TFDS does not have are looked up by their published names below
T5X_LITE_FILES (default: ./data).
"""

import csv
import gzip
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import tensorflow as tf

from t5x_lite.data.document_cache import DocumentSource
from t5x_lite.data.text_to_text import Format, each
from t5x_lite.errors import UserError

_FIELD, _ITEM = "\x1e", "\x1f"

Record = Sequence[str | Sequence[str]]   # the fields of a record, in the order of `unpack`


def pack(record: Record) -> str:
    """The fields as one string."""
    clean = lambda text: text.replace(_FIELD, " ").replace(_ITEM, " ")
    return _FIELD.join(clean(f) if isinstance(f, str) else _ITEM.join(map(clean, f))
                       for f in record)


def unpack(names: Sequence[str], lists: Sequence[str] = ()) -> Format:
    """A format: packed documents -> {name: string, or strings [n] for those in `lists`}."""
    def fields(example):
        parts = tf.strings.split(example["text"], _FIELD)
        return {name: tf.strings.split(parts[i], _ITEM) if name in lists else parts[i]
                for i, name in enumerate(names)}
    return each(fields)


@each
def first_answer(example):
    """{"inputs", "answers"} -> the same, with the first answer as targets."""
    return {**example, "targets": example["answers"][0]}


def with_answers(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """A format: packed (inputs, answers) -> {"inputs", "answers", "targets": the first of them}."""
    return first_answer(unpack(("inputs", "answers"), lists=("answers",))(dataset))


class RecordSource(DocumentSource):
    """The records of some files, by split.

    name: of the cache's folder. files: {split: paths}, or a function that finds them late.
    read: a path -> its records. keep: (split, place in the file) -> whether a record is of that
    split; None: all are. version: of what is found. The cache is made anew when a file, `read`'s
    name or the version changes.
    """

    def __init__(self, name: str, files: Mapping[str, Sequence[str]] | Callable[[], Mapping],
                 read: Callable[[str], Iterable[Record]], splits: Iterable[str] = (),
                 version: str = "", keep: Callable[[str, int], bool] | None = None):
        found = files if callable(files) else lambda: files

        def key() -> str:
            stats = [(split, os.path.abspath(p), os.path.getsize(p), os.stat(p).st_mtime_ns)
                     for split, paths in sorted(found().items()) for p in paths]
            what = repr((stats, getattr(read, "__qualname__", ""), version))
            return f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"

        def documents() -> Iterator[tuple[str, str]]:
            for split, paths in found().items():
                for path in paths:
                    yield from ((split, pack(record)) for place, record in enumerate(read(path))
                                if keep is None or keep(split, place))

        super().__init__(key, tuple(splits) or tuple(found()), documents)


# --- finding and reading files --------------------------------------------------------------

def folder() -> pathlib.Path:
    """$T5X_LITE_FILES, else ./data."""
    return pathlib.Path(os.environ.get("T5X_LITE_FILES", "data")).expanduser()


def published(name: str, origin: str) -> str:
    """The path of a file of that name anywhere below `folder`; origin: where to get it."""
    found = sorted(folder().rglob(name))
    if not found:
        raise UserError(f"the file {name} is not below T5X_LITE_FILES={folder()}; get it from "
                        f"{origin} and set T5X_LITE_FILES to the folder that holds it")
    return str(found[0])


def json_lines(path: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) of a .jsonl or .jsonl.gz file; UserError names a line that is none."""
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not JSON ({error.msg})") from error
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number} is not an object but a "
                                f"{type(record).__name__}")
            yield number, record


def example_of(record: Mapping, where: str) -> tuple[str, list[str]]:
    """(inputs, answers) of {"inputs", "targets"} or {"question", "answer"}; errors name `where`.

    Targets may be one string or a list of allowed ones; an empty one is refused.
    """
    inputs = next((record[k] for k in ("inputs", "question") if k in record), None)
    targets = next((record[k] for k in ("targets", "answer", "answers") if k in record), None)
    if not isinstance(inputs, str):
        raise UserError(f'{where} has no string "inputs" or "question" (found {sorted(record)})')
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise UserError(f'{where} has no "targets", "answer" or "answers": a string or a list of '
                        f'strings (found {sorted(record)})')
    if not targets or not all(t.strip() for t in targets):
        raise UserError(f"{where} has an empty target; leave the line out")
    return inputs, targets


def json_list(path: str) -> Iterator[tuple[int, dict]]:
    """(place, object) of a .json file, see json_objects."""
    with open(path, "rb") as file:
        yield from json_objects(file.read(), path)


def json_objects(text: bytes, path: str) -> Iterator[tuple[int, dict]]:
    """(place, object) of a list in JSON, places from 1; WebQuestions' objects ("utterance",
    "targetValue") become {"question", "answers"}.

    path: where the text is from. Raises UserError where it is no list of objects.
    """
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from error
    if not isinstance(content, list) or not all(isinstance(r, dict) for r in content):
        raise UserError(f"{path} is not a list of objects; a .jsonl file has one a line")
    for number, record in enumerate(content, 1):
        if {"utterance", "targetValue"} <= record.keys():
            # (list (description "Jazmyn Bieber") (description Jaxon))
            found = [_DESCRIPTION.fullmatch(part).groups()
                     for part in record["targetValue"].split("(description ")[1:]]
            answers = [quoted or plain for quoted, plain in found]
            record = {"question": record["utterance"], "answers": answers,
                      "url": record.get("url", "")}
        yield number, record


_DESCRIPTION = re.compile(r'"(.*)"[) ]*|(.*?)[) ]*')


def read_examples(path: str) -> Iterator[Record]:
    """(inputs, [answers]) of a .jsonl file, of a .json list, or of a .tsv: inputs, target[, more
    answers]."""
    if path.endswith(".tsv"):
        with open(path, encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            for number, row in enumerate(rows, 1):
                if row:
                    where = f"{path}, line {number}"
                    if len(row) < 2:
                        raise UserError(f"{where} has no tab between inputs and targets")
                    yield example_of({"inputs": row[0], "targets": row[1:]}, where)
        return
    read, place = (json_list, "object") if path.endswith(".json") else (json_lines, "line")
    for number, record in read(path):
        yield example_of(record, f"{path}, {place} {number}")
