"""The one reader of users' text: bytes of a file or a pipe to lines, and lines to JSON.

Training, validation, demonstrations, BIG-bench, infer and the audit all read through it, so that a
file means the same everywhere and whatever is wrong with it is said in one way: the file, the
line, what is the matter, what to do.

    for number, line in lines("a.jsonl.gz"): …         # text without its line end
    record = json_object(line, "a.jsonl.gz, line 3")

- A line ends with a line feed, behind which or before which nothing else counts: a carriage return
  inside a line is text, those at its end are dropped. U+2028 and form feeds are text as well.
- Text is UTF-8; a byte-order mark at the file's beginning is dropped. UTF-16 is named.
- `.gz` at the end of the name is decompressed. What stands before the place where such a file is
  cut or damaged is given, then the error.
- A line of more than LONGEST bytes, or one with a NUL byte, is refused: the first is of a file that
  has lost its line ends, the second of one that a crash has left holes in.

Every function takes `on_error`, which is called with the UserError of a line and, where it
returns, leaves the line out; by default it raises.

Imports no TensorFlow.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from t5x_lite import files
from t5x_lite.errors import UserError

LONGEST = 1 << 26   # bytes of a line
_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"

OnError = Callable[[UserError], None]


def refuse(error: UserError) -> NoReturn:
    """The default of `on_error`: raises."""
    raise error


# --- bytes to lines -------------------------------------------------------------------------

def open_binary(path: str):
    """The file's bytes, decompressed where the name ends in .gz. Raises UserError."""
    try:
        file = files.open_binary(path)
        return _Unzipped(file) if path.endswith(".gz") else file
    except files.failures(ValueError) as error:   # ValueError: a NUL in the name
        raise _unreadable(path, error) from error


class _Unzipped(gzip.GzipFile):
    """Closes the file below with it."""

    def __init__(self, file):
        super().__init__(fileobj=file)
        self._below = file

    def close(self):
        super().close()
        self._below.close()


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})")


def lines(path: str, on_error: OnError = refuse) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of the lines of a file, the blank ones too."""
    with open_binary(path) as file:
        yield from lines_of(file, path, on_error)


def lines_of(file, name: str, on_error: OnError = refuse) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of each line.

    Args:
        file: a binary file or pipe, or any iterable of lines as bytes.
        name: what errors call it.
    """
    for number, raw in raw_lines(file, name, on_error):
        try:
            yield number, text_of(raw, f"{name}, line {number}").rstrip("\r\n")
        except UserError as error:
            on_error(error)


def raw_lines(file, name: str, on_error: OnError = refuse) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line, the file's byte-order mark left out.

    Raises UserError, whatever on_error does, where nothing at all can be read.
    """
    number = 0
    try:
        for number, raw in enumerate(_bounded(file), 1):
            if number == 1:
                raw = raw.removeprefix(_BOM)
                if raw.startswith(_UTF_16):
                    on_error(_wide(name, raw))
                    return
                if not raw:
                    continue
            if len(raw) > LONGEST:
                on_error(UserError(f"{name}, line {number} is longer than {LONGEST >> 20} MiB; "
                                   "end its lines with line feeds, or cut it into documents"))
                continue
            yield number, raw
    except files.failures(*_READ_ERRORS) as error:
        problem = _explained(error, name, number)
        problem.__cause__ = error
        if not number:
            raise problem from error
        on_error(problem)


_READ_ERRORS = (OSError, EOFError, zlib.error)   # gzip.BadGzipFile is an OSError


def _explained(error: Exception, name: str, number: int) -> UserError:
    """What went wrong in reading a file, behind so many lines of it."""
    if isinstance(error, gzip.BadGzipFile) and "Not a gzipped file" in str(error) and not number:
        return UserError(f"{name} is not a gzip file; rename it without .gz")
    if isinstance(error, files.failures()) and not isinstance(error, gzip.BadGzipFile):
        return _unreadable(name, error)
    how = "cut off" if isinstance(error, EOFError) else "damaged"
    place = f", behind line {number}" if number else ""
    return UserError(f"{name}{place}: the gzip file is {how} ({error}); fetch it again, "
                     "`gzip -t` tells whether it is whole")


def _wide(name: str, raw: bytes) -> UserError:
    bits = 32 if raw.startswith(b"\xff\xfe\0\0") else 16
    return UserError(f"{name} is not UTF-8 text but UTF-{bits}; convert it with iconv -f utf-{bits} "
                     "-t utf-8")


def _bounded(file) -> Iterator[bytes]:
    """Lines, of which those longer than LONGEST are cut to LONGEST + 1 bytes."""
    if not hasattr(file, "readline"):
        yield from file
        return
    while raw := file.readline(LONGEST + 1):
        if len(raw) > LONGEST and not raw.endswith(b"\n"):
            while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                pass
        yield raw


def text_of(raw: bytes, where: str) -> str:
    """UTF-8 bytes as text. Raises UserError, `where` in front, for others and for a NUL byte."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        hint = ("it is compressed: give its name the ending .gz" if raw.startswith(_GZIP)
                else "convert it, e.g. with iconv -f latin1 -t utf-8")
        raise UserError(f"{where} is not UTF-8 text (byte {error.start + 1}: "
                        f"0x{raw[error.start]:02x}); {hint}") from error
    if "\0" in text:
        raise UserError(f"{where} holds a NUL byte (byte {raw.index(0) + 1}), which is no text: "
                        "the file is damaged, or in UTF-16 or -32")
    return text


def whole(path: str) -> str:
    """All of a file's text, without its byte-order mark. Raises UserError."""
    with open_binary(path) as file:
        return whole_of(file, path)


def whole_of(file, name: str) -> str:
    """All the text of a binary file, or of an iterable of bytes. Raises UserError."""
    try:
        raw = file.read() if hasattr(file, "read") else b"".join(file)
    except files.failures(*_READ_ERRORS) as error:
        raise _explained(error, name, 0) from error
    raw = raw.removeprefix(_BOM)
    if raw.startswith(_UTF_16):
        raise _wide(name, raw)
    return text_of(raw, name)


# --- lines to values ------------------------------------------------------------------------

def json_value(text: str, where: str) -> Any:
    """The value of a JSON text. Raises UserError, `where` in front, for whatever is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}: " if "\n" in text.rstrip() else ""
        raise UserError(f"{where} is not JSON ({line}{error.msg})") from error
    except RecursionError as error:
        raise UserError(f"{where} is JSON nested too deeply to be read") from error
    except ValueError as error:   # Python reads no integers of thousands of digits
        raise UserError(f"{where} is JSON with a number of too many digits ({error})") from error


def json_object(text: str, where: str) -> dict[str, Any]:
    """The object of a JSON text. Raises UserError, `where` in front."""
    value = json_value(text, where)
    if not isinstance(value, dict):
        raise UserError(f"{where} is not an object but a {type(value).__name__}")
    return value


def json_lines(path: str, on_error: OnError = refuse) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a .jsonl file; blank lines hold nothing."""
    for number, line in lines(path, on_error):
        if not line.strip():
            continue
        try:
            record = json_object(line, f"{path}, line {number}")
        except UserError as error:
            on_error(error)
            continue
        yield number, record


def json_file(path: str) -> Any:
    """The value of a .json file. Raises UserError."""
    return json_value(whole(path), path)


def table(path: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(row number, fields) of a .csv file with quotes, or of a .tsv file, which has none."""
    if delimiter == "\t":
        for number, line in lines(path):
            yield number, line.split("\t") if line else []
        return
    texts = (f"{line}\n" for _, line in lines(path))
    csv.field_size_limit(LONGEST)
    rows = csv.reader(texts, delimiter=delimiter)
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield number, row
    except csv.Error as error:
        raise UserError(f"{path}, behind row {number}: {error}") from error


def records(path: str, delimiter: str, needs: Iterable[str] = ()) -> Iterator[dict[str, str]]:
    """The rows below a table's first, {column: field}.

    Raises UserError where a column of `needs` is missing or a row has more or fewer fields.
    """
    rows = table(path, delimiter)
    _, names = next(rows, (0, []))
    missing = sorted(set(needs) - set(names))
    if missing:
        raise UserError(f"{path} has no column {' or '.join(missing)}")
    for number, row in rows:
        if not row:
            continue
        if len(row) != len(names):
            raise UserError(f"{path}, line {number} has {len(row)} fields, and there are "
                            f"{len(names)} columns")
        yield dict(zip(names, row, strict=True))


# --- values to fields -----------------------------------------------------------------------

_KINDS = {str: "a string", dict: "an object", list: "a list", int: "a whole number"}


def field(record: Mapping[str, Any], name: str, where: str, kind: type = str) -> Any:
    """A field of that kind (str, dict, list or int). Raises UserError, `where` in front."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where} is not an object but a {type(record).__name__}")
    value = record.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where} has no {name!r} that is {_KINDS[kind]} (it has {shown(record)})")
    return value


def strings(record: Mapping[str, Any], name: str, where: str) -> list[str]:
    """A field that is a list of strings. Raises UserError, `where` in front."""
    values = field(record, name, where, list)
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: {name!r} is a list of other things than strings")
    return values


def shown(record: Iterable[str]) -> str:
    """The first names of a record's fields for an error, cut so that they fit on a line."""
    names = sorted(name[:30] for name in record)
    return f"[{', '.join(map(repr, names[:8]))}{', …' * (len(names) > 8)}]"


def check_text(texts: Iterable[str], where: str) -> None:
    """Raises UserError where a text holds half of a surrogate pair, as JSON's escapes may.

    Such a text has no UTF-8, and hence no tokens.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start:error.start + 1]
            raise UserError(f"{where} holds half of a surrogate pair, {half!a}, which is no "
                            "text") from error


# --- examples -------------------------------------------------------------------------------

QUESTIONS = ("inputs", "question")
ANSWERS = ("targets", "answer", "answers")


def answers_of(record: Mapping[str, Any], where: str) -> list[str] | None:
    """The targets of a record under any of their names, as a list; None where it has none.

    Raises UserError where they are neither a string nor a list of strings.
    """
    targets = next((record[k] for k in ANSWERS if k in record), None)
    if targets is None:
        return None
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise UserError(f'{where} has "targets" that are neither a string nor a list of strings '
                        f"(found {shown(record)})")
    return targets


def example_of(record: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
    """(inputs, answers) of {"inputs", "targets"} or {"question", "answer"}, to learn from.

    Targets may be one string or a list of allowed ones; an empty one is refused.
    """
    inputs = next((record[k] for k in QUESTIONS if k in record), None)
    if not isinstance(inputs, str):
        raise UserError(f'{where} has no string "inputs" or "question" (found {shown(record)})')
    targets = answers_of(record, where)
    if targets is None:
        raise UserError(f'{where} has no "targets", "answer" or "answers": a string or a list of '
                        f'strings (found {shown(record)})')
    if not targets or not all(t.strip() for t in targets):
        raise UserError(f"{where} has an empty target; leave the line out")
    check_text([inputs, *targets], where)
    return inputs, targets


def objects_of(content: Any, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place from 1, object) of a list in JSON; WebQuestions' objects ("utterance",
    "targetValue") become {"question", "answers"}.

    Raises UserError where it is no list of objects.
    """
    if not isinstance(content, list) or not all(isinstance(r, dict) for r in content):
        raise UserError(f"{path} is not a list of objects; a .jsonl file has one a line")
    for number, record in enumerate(content, 1):
        value = record.get("targetValue")
        if isinstance(value, str) and "utterance" in record:
            record = {"question": record["utterance"], "answers": _descriptions(value),
                      "url": record.get("url", "")}
        yield number, record


def _descriptions(value: str) -> list[str]:
    """The answers of (list (description "Jazmyn Bieber") (description Jaxon))."""
    answers = []
    for part in value.split("(description ")[1:]:
        part = part.rstrip(") ")
        answers.append(part[1:-1] if len(part) > 1 and part[0] == part[-1] == '"' else part)
    return answers
