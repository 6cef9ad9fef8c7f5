"""A user's own text as a seqio task: `--config.data.train_files=corpus/*.txt`.

Files: plain text, .jsonl (one object a line, its field "text"), either with .gz; local.
They are read by Python once and kept in the document cache.
"""

import glob
import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import seqio

from t5x_lite.data.document_cache import DocumentSource
from t5x_lite.errors import UserError, nearest

DOCUMENTS = ("line", "paragraph", "file")


def find_files(patterns: str | Sequence[str], field: str) -> list[str]:
    """Files named by a path, a glob, a comma-separated list or a sequence of them.

    field: the config field in error messages. Raises UserError for a pattern that matches
    nothing and for a file without content.
    """
    names = patterns.split(",") if isinstance(patterns, str) else patterns
    found: list[str] = []
    for name in names:
        matches = sorted(glob.glob(os.path.expanduser(name.strip()), recursive=True))
        matches = [m for m in matches if os.path.isfile(m)]
        if not matches:
            folder = os.path.dirname(name) or "."
            beside = os.listdir(folder) if os.path.isdir(folder) else ()
            hint = nearest(os.path.basename(name), beside)
            raise UserError(f"{field}={name!r}: no such file (in {os.path.abspath(folder)});{hint}")
        found += matches
    for path in found:
        if os.path.getsize(path) == 0:
            raise UserError(f"{field}: {path} is empty")
    return found


def read_documents(files: Iterable[str], document: str) -> Iterator[str]:
    """The documents of the files, in order.

    document: what a document is in a plain text file: a "line", a "paragraph" (blank lines
    between) or the whole "file". A .jsonl line is always one. Blank ones are left out.
    """
    for path in files:
        opened = gzip.open if path.endswith(".gz") else open
        name = path.removesuffix(".gz")
        try:
            with opened(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8") as lines:
                parts = (_json_lines(lines, path) if name.endswith((".jsonl", ".json"))
                         else _plain(lines, document))
                yield from (p for p in parts if p.strip())
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start} of a block); "
                            "convert it, e.g. with iconv -t utf-8") from error
        except gzip.BadGzipFile as error:
            raise UserError(f"{path} is not a gzip file; rename it without .gz") from error


def _plain(lines: Iterable[str], document: str) -> Iterator[str]:
    if document == "line":
        yield from (line.rstrip("\n") for line in lines)
        return
    block: list[str] = []
    for line in lines:
        if document == "paragraph" and not line.strip():
            yield "".join(block).rstrip("\n")
            block = []
        else:
            block.append(line)
    yield "".join(block).rstrip("\n")


def _json_lines(lines: Iterable[str], path: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error.msg}); a .jsonl file "
                            'holds one object a line, {"text": …}') from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            fields = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{path}, line {number} has no string field 'text' (found {fields})")
        yield record["text"]


def task(name: str, files: Sequence[str], split: str, document: str,
         vocabulary: seqio.Vocabulary, features: Sequence[str],
         preprocessors: Sequence[Callable]) -> seqio.Task:
    """A task over `files` with the one split; it is not registered.

    features: its output features; preprocessors: from {"text": document} to those.
    """
    if document not in DOCUMENTS:
        raise UserError(f"data.text_document={document!r}: one of {', '.join(DOCUMENTS)};"
                        f"{nearest(document, DOCUMENTS)}")

    def key() -> str:
        stats = [(os.path.abspath(f), os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files]
        digest = hashlib.sha256(repr((stats, document, split)).encode()).hexdigest()
        return f"text_files-{digest[:16]}"

    def documents() -> Iterator[tuple[str, str]]:
        return ((split, text) for text in read_documents(files, document))

    return seqio.Task(
        name, source=DocumentSource(key, (split,), documents),
        preprocessors=list(preprocessors),
        output_features={f: seqio.Feature(vocabulary, add_eos=True) for f in features})
