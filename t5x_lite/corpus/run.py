"""An audit from start to end: blocks shared among workers, sums, duplicates, what is left out.

Who the workers are, the caller says: processes of this machine (`processes`), or Beam's (beam.py).
"""

import concurrent.futures
import itertools
import json
import multiprocessing
import pathlib
from collections.abc import Callable, Iterator, Sequence

from t5x_lite.corpus import duplicates, measure
from t5x_lite.corpus.documents import Block, Corpus, blocks
from t5x_lite.corpus.measure import Counts, Row, Settings, Workers

REASONS = ("exact", "near", "overlap", "blocked")   # for which a document may be left out
_AHEAD = 4   # blocks a process has waiting, so that a corpus is never in memory as a whole


def processes(number: int) -> Workers:
    """So many processes of this machine; 1 works in this one."""
    return lambda corpus, settings: _results(blocks(corpus()), settings, number)


def measured(corpus: Corpus, settings: Settings, workers: Workers,
             shown: Callable[[int], None] = lambda documents: None) -> tuple[Counts, list[Row]]:
    """The sums over a corpus, and a row a document in its order.

    shown: called with the number of documents done, now and then.
    """
    total, rows = Counts(), []
    for counts, part in workers(corpus, settings):
        total.add(counts)
        rows += part
        shown(total.documents)
    return total, rows


def _results(parts: Iterator[Block], settings: Settings, processes: int
             ) -> Iterator[tuple[Counts, list[Row]]]:
    if processes == 1:
        yield from (measure.measure(block, settings) for block in parts)
        return
    # Spawned: the parent may hold threads of TensorFlow, which a forked child would wait for.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        waiting = [pool.submit(measure.measure, block, settings)
                   for block in itertools.islice(parts, processes * _AHEAD)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(measure.measure, block, settings)
                        for block in itertools.islice(parts, 1)]


def reasons(rows: Sequence[Row], exact: dict[int, int], near: dict[int, int],
            wanted: Sequence[str]) -> dict[int, str]:
    """{document: the first of the wanted reasons for which it is left out}."""
    out: dict[int, str] = {}
    for number, row in enumerate(rows):
        holds = {"exact": number in exact, "near": number in near,
                 "overlap": any(row.overlaps), "blocked": row.blocked}
        reason = next((name for name in wanted if holds[name]), None)
        if reason:
            out[number] = reason
    return out


def write_rest(corpus: Corpus, out: dict[int, str], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes what is left of a corpus, a .jsonl file of {"text", "domain", "date"} for each of its
    files, and files.txt, which lists them for data.train_files; returns their paths.

    out: documents to leave out, by number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[pathlib.Path] = []
    numbered = enumerate(corpus())
    for place, (file, documents) in enumerate(itertools.groupby(
            numbered, key=lambda item: item[1].file)):
        path = folder / f"{place:05}-{pathlib.Path(file).name.split('.')[0]}.jsonl"
        with path.open("w", encoding="utf-8", errors="surrogatepass") as lines:
            for number, document in documents:
                if number in out:
                    continue
                record = {"text": document.text, "domain": document.host, "date": document.year}
                lines.write(json.dumps({k: v for k, v in record.items() if v}) + "\n")
        written.append(path)
    (folder / "files.txt").write_text("".join(f"{path}\n" for path in written), encoding="utf-8")
    return written


def audited(corpus: Corpus, settings: Settings, workers: Workers,
            shown: Callable[[int], None] = lambda documents: None
            ) -> tuple[Counts, list[Row], dict[int, int], dict[int, int]]:
    """(sums, rows, exact duplicates, near duplicates) of a corpus; see duplicates.py."""
    counts, rows = measured(corpus, settings, workers, shown)
    exact = duplicates.exact(rows)
    pairs = duplicates.candidates(rows, exact)
    near = duplicates.near(corpus(), pairs) if pairs else {}
    return counts, rows, exact, near
