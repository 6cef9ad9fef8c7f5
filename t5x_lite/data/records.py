"""Records that Python reads from files, kept so that tf.data can take them apart natively.

tf.data has no JSON parser and cannot save iterators that call Python. A record is therefore
read once, ahead of tf.data, and stored as one document of the cache (document_cache.py): its
fields joined by the ASCII record separator, the items of a list field by the unit separator.

    source = RecordSource("nq", {"train": ["train.jsonl"]}, read=lambda path: ...)
    format_fn = unpack(("question", "answers"), lists=("answers",))

Files of tasks that TFDS does not have are looked up by their published names below
T5X_LITE_FILES (default: ./data).
"""

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import tensorflow as tf

from t5x_lite import files
from t5x_lite.data import readers
from t5x_lite.data.document_cache import DocumentSource
from t5x_lite.data.preprocessors import Format, each
from t5x_lite.errors import UserError

_FIELD, _ITEM = "\x1e", "\x1f"

Record = Sequence[str | Sequence[str]]   # the fields of a record, in the order of `unpack`
Choice = tuple[str, list[str], str]      # inputs, choices, the right one's number


def prompt(question: str) -> str:
    """"Question: … Answer:", the frame of most of GPT-3's prompts."""
    return f"Question: {question}\nAnswer:"


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
        self._name, self._read, self._version = name, read, version
        self._files = files if callable(files) else lambda: files
        self._keep = keep or (lambda split, place: True)
        super().__init__(self._digest, tuple(splits) or tuple(self._files()), self._records)

    def _digest(self) -> str:
        """The cache folder's name: of the files as they are now and of what reads them."""
        stats = []
        for split, paths in sorted(self._files().items()):
            stats += [(split, *files.state_of(path)) for path in paths]
        what = repr((stats, getattr(self._read, "__qualname__", ""), self._version))
        return f"{self._name}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"

    def _records(self) -> Iterator[tuple[str, str]]:
        """(split, packed record) of every record that is kept."""
        for split, paths in self._files().items():
            for path in paths:
                kept = (pair for pair in enumerate(self._read(path)) if self._keep(split, pair[0]))
                for place, record in kept:
                    packed = pack(record)
                    readers.check_text([packed], f"{path}, record {place + 1}")
                    yield split, packed


# --- finding and reading files --------------------------------------------------------------

def folder() -> pathlib.Path:
    """$T5X_LITE_FILES, else ./data."""
    return pathlib.Path(os.environ.get("T5X_LITE_FILES", "data")).expanduser()


def published(name: str, origin: str) -> str:
    """The path of a file of that name anywhere below `folder`; origin: where to get it."""
    files = sorted(folder().rglob(name))
    if not files:
        raise UserError(f"the file {name} is not below T5X_LITE_FILES={folder()}; get it from "
                        f"{origin} and set T5X_LITE_FILES to the folder that holds it")
    return str(files[0])


def read_examples(path: str) -> Iterator[Record]:
    """(inputs, [answers]) of a .jsonl file, of a .json list, or of a .tsv file: inputs, target[,
    more answers]; each may be compressed (.gz). Raises UserError with the line."""
    name = path.removesuffix(".gz")
    if name.endswith(".tsv"):
        yield from _read_tsv(path)
    elif name.endswith(".json"):
        for number, record in json_list(path):
            yield readers.example_of(record, f"{path}, object {number}")
    else:
        for number, record in readers.json_lines(path):
            yield readers.example_of(record, f"{path}, line {number}")


def _read_tsv(path: str) -> Iterator[Record]:
    for number, row in readers.table(path, "\t"):
        if row:
            where = f"{path}, line {number}"
            if len(row) < 2:
                raise UserError(f"{where} has no tab between inputs and targets")
            yield readers.example_of({"inputs": row[0], "targets": row[1:]}, where)


def json_list(path: str) -> Iterator[tuple[int, dict]]:
    """(place from 1, object) of a .json file that is a list, see readers.objects_of."""
    yield from readers.objects_of(readers.json_file(path), path)
