"""A user's own text as a seqio task: `--config.data.train_files=corpus/*.txt`.

Files: plain text, .jsonl (one object a line, its field "text"), either with .gz; local or gs://.
They are read by Python once and kept in the document cache.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import seqio

from t5x_lite import files as file_lib
from t5x_lite.data import paths, readers, rewriting
from t5x_lite.data.document_cache import DocumentSource
from t5x_lite.errors import UserError, nearest

DOCUMENTS = ("line", "paragraph", "file")


def find_files(patterns: str | Sequence[str], field: str) -> list[str]:
    """Files named by a path, a glob, a comma-separated list or a sequence of them.

    field: the config field in error messages. Raises UserError for a pattern that matches
    nothing and for a file without content.
    """
    names = paths.split(patterns) if isinstance(patterns, str) else patterns
    files: list[str] = []
    for name in names:
        matches = paths.matches(name)
        if not matches:
            raise UserError(f"{field}={name!r}: {paths.missing(name)}")
        files += matches
    for path in files:
        if file_lib.state_of(path)[1] == 0:
            raise UserError(f"{field}: {path} is empty")
    return files


def read_documents(files: Iterable[str], document: str) -> Iterator[str]:
    """The documents of the files, in order.

    document: what a document is in a plain text file: a "line", a "paragraph" (blank lines
    between) or the whole "file". A .jsonl line is always one. Blank ones are left out.
    Raises UserError that names the file and the line (readers.py).
    """
    for path in files:
        if path.removesuffix(".gz").endswith((".jsonl", ".json")):
            texts = _json_texts(path)
        else:
            texts = _plain((line for _, line in readers.lines(path)), document)
        yield from (text for text in texts if text.strip())


def _plain(lines: Iterable[str], document: str) -> Iterator[str]:
    if document == "line":
        yield from lines
        return
    block: list[str] = []
    for line in lines:
        if document == "paragraph" and not line.strip():
            yield "\n".join(block)
            block = []
        else:
            block.append(line)
    yield "\n".join(block).rstrip("\n")


def _json_texts(path: str) -> Iterator[str]:
    """The field "text" of every line."""
    for number, record in readers.json_lines(path):
        text = record.get("text")
        where = f"{path}, line {number}"
        if not isinstance(text, str):
            raise UserError(f"{where} has no string field 'text' (found {readers.shown(record)}); "
                            'a .jsonl file holds one object a line, {"text": …}')
        readers.check_text([text], where)
        yield text


def task(name: str, files: Sequence[str], split: str, document: str,
         vocabulary: seqio.Vocabulary, features: Sequence[str],
         preprocessors: Sequence[Callable],
         rewrite: rewriting.Rewriting = rewriting.NONE) -> seqio.Task:
    """A task over `files` with the one split; it is not registered.

    features: its output features; preprocessors: from {"text": document} to those.
    rewrite: what happens to the documents first.
    """
    if document not in DOCUMENTS:
        raise UserError(f"data.text_document={document!r}: one of {', '.join(DOCUMENTS)};"
                        f"{nearest(document, DOCUMENTS)}")

    def key() -> str:
        stats = [file_lib.state_of(file) for file in files]
        how = (rewrite, rewriting.VERSION) if rewrite.steps else ()
        digest = hashlib.sha256(repr((stats, document, split, *how)).encode()).hexdigest()
        return f"text_files-{digest[:16]}"

    def documents() -> Iterator[tuple[str, str]]:
        for number in range(rewrite.rewrites):
            for text in read_documents(files, document):
                yield split, rewriting.version(rewriting.whole(text), rewrite, number).text

    return seqio.Task(
        name, source=DocumentSource(key, (split,), documents),
        preprocessors=list(preprocessors),
        output_features={f: seqio.Feature(vocabulary, add_eos=True) for f in features})
