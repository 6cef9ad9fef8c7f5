"""Tables of measured runs: a CSV, JSON lines, or a folder of workdirs, as columns of numbers.

Columns are named by what laws call them: params=COL, flops=COL, tokens=COL, loss=COL, …; a column
may carry a factor, params=N*1e6. Where tokens, params or flops is missing and the other two are
there, it follows from C = 6 N D.

A folder of workdirs has the columns of metrics.jsonl, by the names of running/counts.py, and one
choice of them where nothing else is said: WORKDIR_COLUMNS.
"""

import csv
import dataclasses
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from t5x_lite import files
from t5x_lite.errors import UserError, nearest
from t5x_lite.running.counts import MEANINGS

# Columns that a logarithm is taken of, or that count something.
_POSITIVE = ("params", "tokens", "flops", "loss", "unique_tokens", "steps", "lr", "batch", "std",
             "budget", "experts", "granularity", "error", "accuracy", "tokens_transferred")
# What a law's N, D, C and loss are of a folder of workdirs, unless --columns says otherwise.
WORKDIR_COLUMNS = {"params": "params_no_embed_head", "tokens": "tokens_seen", "flops": "flops",
                   "loss": "loss"}
_THIRDS = {"tokens": ("flops", "params"), "params": ("flops", "tokens")}
_DERIVED = ("flops / (6 params)", "flops / (6 tokens)", "6 params tokens")


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns of equal length [R]; sources says where each came from."""

    columns: Mapping[str, np.ndarray]
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)   # words a run
    # {a source: what it counts, in words}, where that is known: of workdirs.
    meanings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @property
    def counted(self) -> dict[str, str]:
        """What N, D and C are, in words: {"params": "all parameters", …}."""
        return {name: self.meanings.get(source.partition("*")[0], f"as {source!r} of the table counts")
                if source not in _DERIVED else source
                for name, source in self.sources.items() if name in ("params", "tokens", "flops")}

    def rows(self, chosen: np.ndarray) -> "Table":
        """The table of some runs alone. chosen: a mask, bool [R], or indices, int [n]."""
        places = np.arange(len(self))[chosen]
        return dataclasses.replace(
            self, columns={n: v[chosen] for n, v in self.columns.items()},
            labels={n: [v[i] for i in places] for n, v in self.labels.items()})

    def require(self, names: Iterable[str], law: str) -> None:
        """Raises UserError where a column is not there."""
        for name in names:
            if name not in self.columns:
                raise UserError(
                    f"{law} needs the column {name}: add {name}=COL to --columns, which gives "
                    f"{', '.join(self.columns)}.{nearest(name, self.columns)}")

    def without_highest(self, count: int, column: str = "loss") -> "Table":
        """Less the runs with the highest values of a column."""
        self.require((column,), "--drop_highest")
        if not 0 <= count < len(self):
            raise UserError(f"--drop_highest={count}: must be from 0 to {len(self) - 1}, one less "
                            f"than the runs.")
        order = np.argsort(self.columns[column], kind="stable")
        return self.rows(np.sort(order[:len(self) - count]))


def pairs(text: str, flag: str) -> dict[str, str]:
    """{"a": "b"} of "a=b,…", as --columns and --where are written."""
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not value.strip():
            raise UserError(f"--{flag}: {part!r} must be NAME=VALUE.")
        found[name.strip()] = value.strip()
    return found


def from_columns(columns: Mapping[str, Iterable[float]]) -> Table:
    """A table of numbers that are at hand, checked as files are."""
    arrays = {n: np.asarray(list(v), float) for n, v in columns.items()}
    return _complete(arrays, dict.fromkeys(arrays, "given"), np.arange(1, 1 + len(
        next(iter(arrays.values())))), {}, skip_bad=False)


def read(path: str | pathlib.Path, columns: Mapping[str, str], *,
         where: Mapping[str, str] | None = None, skip_bad: bool = False,
         labels: Sequence[str] = (), curves: bool = False) -> Table:
    """A table from a file or a folder.

    Args:
        columns: {a law's name: the file's column, perhaps "*FACTOR" behind it}. {}: the file's
            own names.
        where: {the file's column: the value that a row must have; "a|b" allows several}.
        skip_bad: leave out rows with empty cells, or with numbers that are not finite and
            positive, instead of refusing them.
        labels: the file's columns to keep as words.
        curves: of a folder of workdirs a row an evaluation, told apart by the column run, and not a
            row a run.

    Raises:
        UserError: no such file or column, no rows, or rows that hold no numbers, by line.
    """
    path = files.path(path)
    rows = _read_rows(path, curves)
    if not rows:
        raise UserError(f"--table={path} has no rows: it needs a line of names and a line a run.")
    columns = _columns_to_read(path, rows, columns, curves)
    _check_names(path, rows, [*columns.values(), *(where or {}), *labels])
    numbers = [i for i, row in enumerate(rows) if _matches(row, where or {})]
    if not numbers:
        raise UserError(f"--where={_shown(where)}: no row of {path} has that. "
                        f"{_seen(rows, where)}")
    arrays, sources = {}, {}
    cells = {}
    for name, source in columns.items():
        column, factor = _factor(source, rows[0])
        cells[name] = [rows[i].get(column) for i in numbers]
        arrays[name] = _codes(cells[name]) if name == "run" else np.array(
            [_number(cell) for cell in cells[name]]) * factor
        sources[name] = source
    words = {n: [str(rows[i].get(n, "")) for i in numbers] for n in labels}
    lines = np.array([rows[i].get("_line", i + 1) for i in numbers])
    table = _complete(arrays, sources, lines, words, skip_bad=skip_bad, cells=cells)
    return dataclasses.replace(table, meanings=MEANINGS if path.is_dir() else {})


def _codes(cells: Sequence[object]) -> np.ndarray:
    """A number for each name of a run, float [R]; NaN for an empty cell."""
    names = [str(cell).strip() if cell is not None else "" for cell in cells]
    numbers = {name: float(number) for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] if name else np.nan for name in names])


def _columns_to_read(path: files.Path, rows: list[dict], columns: Mapping[str, str],
                     curves: bool) -> dict[str, str]:
    """{a law's name: the column}, where nothing was said those of the file that laws know."""
    if path.is_dir():
        return _workdir_columns(path, rows, columns, curves)
    told_apart = {"run": "run"} if curves and "run" in rows[0] else {}
    if columns:
        return {**told_apart, **columns}
    named = {n: n for n in rows[0] if n in _POSITIVE}
    if named:
        return {**named, **told_apart}
    known = ", ".join(n for n in rows[0] if n != "_line")
    raise UserError(f"--table={path} has {known}, and none of the columns that laws know: say which "
                    f"are what by --columns=params=COL,flops=COL,loss=COL.")


def _read_rows(path: files.Path, curves: bool) -> list[dict]:
    if not path.exists():
        raise UserError(f"--table={path} does not exist: a CSV, a .jsonl or a folder of workdirs.")
    if path.is_dir():
        return _workdirs(path, curves)
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"--table={path} is not text in UTF-8, or not a whole .gz of it ({error}); write it "
                        "as CSV.") from error
    name = path.name.removesuffix(".gz")
    if name.endswith((".json", ".jsonl")):
        return _json_rows(path, text)
    return _csv_rows(path, text.replace("\r\n", "\n").replace("\r", "\n"))


def _csv_rows(path: files.Path, text: str) -> list[dict]:
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))   # a cell of notes may be long
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    names = _unlike([name.strip() for name in next(reader, [])])
    rows = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells[len(names):]):
                raise UserError(f"--table={path}, line {reader.line_num} has {len(cells)} cells, and the line of "
                                f"names has {len(names)}: quote a cell that holds a {delimiter!r}.")
            if any(cell.strip() for cell in cells):
                rows.append({**dict(zip(names, cells, strict=False)), "_line": reader.line_num})
    except csv.Error as error:
        raise UserError(f"--table={path}, line {reader.line_num}: {error}; write it as CSV.") from error
    return rows


def _unlike(names: Sequence[str]) -> list[str]:
    """The names of columns; one that stands twice gets a number, so that a column is chosen by whoever
    names it and not by its place: loss#1, loss#2."""
    result = []
    for place, name in enumerate(names):
        number = names[:place + 1].count(name)
        result.append(f"{name}#{number}" if name and names.count(name) > 1 else name)
    return result


def _json_rows(path: files.Path, text: str) -> list[dict]:
    try:
        found = [json.loads(line) for line in text.splitlines() if line.strip()] \
            if ".jsonl" in path.name else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--table={path} is not JSON: {str(error)[:200]}.") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UserError(f"--table={path}: JSON must be a list of objects, one a run.")
    return found


def _workdirs(folder: files.Path, curves: bool) -> list[dict]:
    """A row for every run below the folder, its last evaluation; or a row for every evaluation."""
    rows = []
    for number, path in enumerate(files.find(folder, "metrics.jsonl")):
        found = _evaluations(path)
        where = {"workdir": str(path.parent.relative_to(folder)), "run": number}
        rows += [{**line, **where, "loss": _loss(line)} for line in
                 (found if curves else found[-1:])]
    if not rows:
        raise UserError(f"--table={folder} has no metrics.jsonl with an evaluation below it: a "
                        f"workdir, or a folder of them, that t5x_lite.train wrote.")
    return rows


def _evaluations(path: files.Path) -> list[dict]:
    """What the lines of each evaluation's step hold, of all its tasks. Lines that a kill or a full
    disk damaged do not count."""
    found: dict[int, dict] = {}
    for text in files.read_text(path).splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue   # of a log: training itself goes on over such lines
        if isinstance(line, dict) and "step" in line and any(name.startswith("eval/") for name in line):
            found[line["step"]] = {**found.get(line["step"], {}), **line}
    return list(found.values())


def _loss(line: Mapping) -> float | None:
    """eval/all/loss, else the first task's."""
    losses = [v for n, v in line.items() if n.startswith("eval/") and n.endswith("/loss")]
    return line.get("eval/all/loss", losses[0] if losses else None)


def _workdir_columns(path: files.Path, rows: list[dict], columns: Mapping[str, str],
                     curves: bool) -> dict[str, str]:
    """The columns of a folder of workdirs: those asked for, and WORKDIR_COLUMNS for the rest.

    Raises:
        UserError: runs of before those columns were recorded, by name.
    """
    chosen = {**WORKDIR_COLUMNS, **({"run": "run"} if curves else {}), **columns}
    for law, column in WORKDIR_COLUMNS.items():
        old = [row["workdir"] for row in rows if column not in row]
        if law not in columns and old:
            raise UserError(
                f"--table={path}: {', '.join(old[:5])}{' …' if old[5:] else ''} "
                f"{'has' if len(old) == 1 else 'have'} no {column}: written before runs recorded "
                f"it. Name a column that all runs have, such as "
                f"--columns=params=non_embedding_params (which leaves the head out), or leave such "
                f"runs out of the folder.")
    return chosen


def _check_names(path, rows: list[dict], names: Iterable[str]) -> None:
    known = {n for row in rows for n in row if n != "_line"}
    for name in names:
        column = name if name in known else name.rpartition("*")[0] or name
        if column not in known:
            raise UserError(f"--table={path} has no column {column!r}.{nearest(column, known)} It "
                            f"has {', '.join(sorted(known)[:40])}.")


def _factor(source: str, row: Mapping) -> tuple[str, float]:
    if source in row or "*" not in source:
        return source, 1.0
    column, _, factor = source.rpartition("*")
    number = _number(factor)
    if not np.isfinite(number) or number <= 0:
        raise UserError(f"--columns={source}: {factor!r} must be a positive number, as in N*1e6.")
    return column, number


def _number(value: object) -> float:
    """The number in a cell; NaN where there is none."""
    try:
        return float(str(value).replace(" ", "")) if value is not None else np.nan
    except ValueError:
        return np.nan


def _said(cell: object) -> str:
    """A cell that cannot be fitted, in words."""
    text = str(cell).strip() if cell is not None else ""
    if not text:
        return "empty"
    if not np.isnan(_number(cell)) or text.lower() == "nan":
        return text
    return f"{text[:40]!r}, which is no number (write 9523909 or 9.52e6, without unit, % or thousands commas),"


def _matches(row: Mapping, where: Mapping[str, str]) -> bool:
    return all(_equal(str(row.get(column, "")), value.split("|"))
               for column, value in where.items())


def _equal(cell: str, allowed: list[str]) -> bool:
    number = _number(cell)
    return any(cell == v or number == _number(v) for v in allowed)


def _shown(where: Mapping[str, str] | None) -> str:
    return ",".join(f"{n}={v}" for n, v in (where or {}).items())


def _seen(rows: list[dict], where: Mapping[str, str] | None) -> str:
    name = next(iter(where or {}), "")
    return f"{name} is {', '.join(sorted({str(r.get(name)) for r in rows})[:12])}."


def _complete(arrays: dict[str, np.ndarray], sources: dict[str, str], lines: np.ndarray,
              words: Mapping[str, Sequence[str]], *, skip_bad: bool,
              cells: Mapping[str, Sequence[object]] | None = None) -> Table:
    """Checked columns, and the one that follows from two others. cells: what stood in the file."""
    bad = np.zeros(len(lines), bool)
    why = ""
    for name, values in arrays.items():
        wrong = ~np.isfinite(values) | (values <= 0 if name in _POSITIVE else False)
        if wrong.any() and not why:
            first = int(np.flatnonzero(wrong)[0])
            cell = cells[name][first] if cells else values[first]
            why = f"{name} ({sources[name]}) is {_said(cell)} in line {lines[first]}"
        bad |= wrong
    if bad.all() and len(bad):
        raise UserError(f"no row has all of {', '.join(sources.values())}: {why}. Name other "
                        f"columns, or another --where.")
    if bad.any() and not skip_bad:
        shown = ", ".join(map(str, lines[bad][:10]))
        raise UserError(f"{bad.sum()} of {len(bad)} rows cannot be fitted: {why}; lines {shown}. "
                        f"Mend them, choose rows by --where, or leave them out by --skip_bad.")
    table = Table(arrays, sources, words).rows(~bad)
    columns, sources = dict(table.columns), dict(sources)
    for name, (whole, part) in _THIRDS.items():
        if name not in columns and whole in columns and part in columns:
            columns[name] = columns[whole] / (6 * columns[part])
            sources[name] = f"{whole} / (6 {part})"
    if "flops" not in columns and {"params", "tokens"} <= columns.keys():
        columns["flops"] = 6 * columns["params"] * columns["tokens"]
        sources["flops"] = "6 params tokens"
    return dataclasses.replace(table, columns=columns, sources=sources)
