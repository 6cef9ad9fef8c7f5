"""Documents of a corpus as a stream of blocks, and the evaluation texts to look for in them.

A corpus is files (.txt, .jsonl, .json lists, also .gz; globs and comma-separated lists) or a seqio
task. A .jsonl line may say where and when its text comes from: C4's fields url and timestamp, or
source, domain, date, created.
"""

import dataclasses
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from t5x_lite.data import readers
from t5x_lite.errors import UserError

BLOCK_CHARACTERS = 1 << 20   # of text that one worker takes at a time
_HOST_FIELDS = ("url", "source", "domain")
_DATE_FIELDS = ("timestamp", "date", "created")
_YEAR = re.compile(r"\b(?:19|20)\d\d\b")
_TEXT_FIELDS = ("text", "inputs", "targets", "question", "answer", "choices")


@dataclasses.dataclass(frozen=True)
class Document:
    """One document of a corpus."""

    text: str
    host: str = ""      # "" where the file does not say
    year: str = ""
    file: str = ""      # the file or task that it stands in


Block = list[Document]
Corpus = Callable[[], Iterable[Document]]   # a fresh stream each call


def blocks(documents: Iterable[Document], characters: int = BLOCK_CHARACTERS) -> Iterator[Block]:
    """The documents in order, gathered into lists of about so many characters of text."""
    block: Block = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.text)
        if size >= characters:
            yield block
            block, size = [], 0
    if block:
        yield block


def of_files(files: Sequence[str], document: str) -> Iterator[Document]:
    """The documents of text files, in order.

    document: what one is in a .txt file: a "line", a "paragraph" or the whole "file".

    Raises:
        UserError: a file that cannot be read as what its name says, with the file and the line.
    """
    from t5x_lite.data import text_files
    for file in files:
        if not _holds_records(file):
            yield from (Document(text, file=file)
                        for text in text_files.read_documents([file], document))
            continue
        for number, record in _records(file):
            text = record.get("text")
            where = f"{file}, line {number}"
            if not isinstance(text, str):
                raise UserError(f"{where} has no string field 'text' (it has "
                                f"{readers.shown(record)}).")
            readers.check_text([text], where)
            if text.strip():
                yield Document(text, _host(record), _year(record), file)


def _holds_records(file: str) -> bool:
    return file.removesuffix(".gz").endswith((".jsonl", ".json"))


def _records(file: str) -> Iterator[tuple[int, Mapping]]:
    """(line or place, object) of a .jsonl file or of a list in a .json file."""
    if file.removesuffix(".gz").endswith(".json"):
        return readers.objects_of(readers.json_file(file), file)
    return readers.json_lines(file)


def of_task(name: str, split: str, modules: str = "", shard: tuple[int, int] | None = None
            ) -> Iterator[Document]:
    """The texts of a seqio task's source, before any preprocessing.

    shard: (number, of so many); None: all, in the source's order.

    Raises:
        UserError: the task is unknown, has not the split, or holds no strings.
    """
    from t5x_lite.data import tasks as data_tasks
    count = 0
    for record in data_tasks.source_records(_task(name, split, modules), split, shard):
        text = text_of(record)
        # Of a source of lines a record is a string and says nothing beside it.
        fields = record if isinstance(record, Mapping) else {}
        if text.strip():
            count += 1
            yield Document(text, _host(fields), _year(fields), name)
    if not count and shard is None:
        raise UserError(f"the split {split!r} of {name!r} holds no texts.")


def shards_of(name: str, split: str, modules: str = "") -> int:
    """Into how many shards a seqio task's split falls, for `of_task`. Raises UserError as it does."""
    return len(_task(name, split, modules).source.list_shards(split))


def _task(name: str, split: str, modules: str) -> Any:
    """The seqio task, which has the split."""
    from t5x_lite.data import tasks as data_tasks
    from t5x_lite.data.config import DataConfig
    task = data_tasks.find(name, "audit", DataConfig(task_modules=modules))
    if split not in task.splits:
        raise UserError(f"the task {name!r} has no split {split!r}; it has "
                        f"{', '.join(sorted(task.splits))}.")
    return task


def text_of(record: Any) -> str:
    """The strings of an example: its "text", else all that it holds, a line each."""
    if isinstance(record, Mapping) and "text" in record:
        return _string(record["text"])
    return "\n".join(filter(None, _strings(record)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        known = [value[name] for name in _TEXT_FIELDS if name in value]
        for part in known or value.values():
            yield from _strings(part)
    elif isinstance(value, (str, bytes)):
        yield _string(value)
    elif isinstance(value, Iterable):
        for part in value:
            yield from _strings(part)


def _string(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _host(record: Mapping) -> str:
    value = next((_string(record[f]) for f in _HOST_FIELDS if record.get(f)), "")
    host = urllib.parse.urlsplit(value).hostname if "//" in value else value
    return (host or "").removeprefix("www.")


def _year(record: Mapping) -> str:
    value = next((_string(record[f]) for f in _DATE_FIELDS if record.get(f)), "")
    year = _YEAR.search(value)
    return year[0] if year else ""


def names_files(name: str) -> bool:
    """Whether a name means files (a path, a glob, a list) and not a task."""
    return any(character in name for character in "./*?[,") or pathlib.Path(name).exists()


def texts_of(name: str, modules: str = "") -> list[str]:
    """The examples of an evaluation set, a text each: of a task its validation or test split, of a
    file its records.

    Raises:
        UserError: nothing is called so, or it holds no texts.
    """
    examples = _file_texts(name) if names_files(name) else _task_texts(name, modules)
    texts = [text for text in examples if text.strip()]
    if not texts:
        raise UserError(f"--against={name}: the evaluation set holds no texts.")
    return texts


def _file_texts(name: str) -> Iterator[str]:
    from t5x_lite.data import text_files
    for file in text_files.find_files([name], "--against"):
        if _holds_records(file):
            yield from (text_of(record) for _, record in _records(file))
        else:
            yield from text_files.read_documents([file], "line")


def _task_texts(name: str, modules: str) -> Iterator[str]:
    from t5x_lite.data import tasks as data_tasks
    from t5x_lite.data.config import DataConfig
    task = data_tasks.find(name, "--against", DataConfig(task_modules=modules))
    split = next((split for split in ("validation", "test") if split in task.splits), None)
    if split is None:
        raise UserError(f"--against={name}: the task has neither a validation nor a test "
                        f"split, only {', '.join(sorted(task.splits))}.")
    return (document.text for document in of_task(name, split, modules))
