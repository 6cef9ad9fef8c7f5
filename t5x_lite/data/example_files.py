"""Examples from files: a user's own JSONL or TSV, a task.json of BIG-bench, and SCAN.

    data.train=train.jsonl          any .jsonl, .json or .tsv path is a task: inputs, targets
    data.train=all.jsonl[:80%]      … or a part of its lines, in order; [80%:] is the rest
    scan_simple                     SCAN's simple split (Lake & Baroni 2018, arXiv:1711.00350)

A .jsonl line is {"inputs": …, "targets": …} or {"question": …, "answer": […]}; a .tsv line
inputs, a tab, the target, and further allowed answers behind more tabs. A .json file is a list of
such objects, or of WebQuestions' own (its published files), or a task of BIG-bench (big_bench.py).
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator

import seqio

from t5x_lite.data import big_bench, records, task_metrics, text_files, text_to_text
from t5x_lite.errors import UserError

_EXAMPLES = text_to_text.Kind(records.read_examples, records.with_answers, text_to_text.answers,
                             (task_metrics.exact_match, task_metrics.squad))
_PATH = re.compile(r"(.*\.(?:jsonl|json|tsv))(?:\[(\d*)%?:(\d*)%?\])?")
_TASKS: dict[str, seqio.Task] = {}   # by path, and by name: what validation lists them under


def is_path(name: str) -> bool:
    """Whether `task` takes the name: a .jsonl, .json or .tsv path, with or without a slice behind
    it, or the name of a task that it made."""
    return name in _TASKS or bool(_PATH.fullmatch(name))


def _part(path: str, start: int, stop: int, read: Callable[[str], Iterable[records.Record]]
          ) -> Iterator[records.Record]:
    """The file's examples from start to stop per cent."""
    found = list(read(path))
    yield from found[len(found) * start // 100:len(found) * stop // 100]


def task(path: str, field: str = "data.train") -> seqio.Task:
    """The task of a .jsonl, .json or .tsv file (or glob); every split is the whole file or slice.

    Its name is the path with ":" for "/" and whatever else seqio allows in no name. Scored by
    exact match of the raw text, and by SQuAD's exact match and F1; BIG-bench's choices by rank.
    """
    if path not in _TASKS:
        pattern, start, stop = _PATH.fullmatch(path).groups()
        start, stop = int(start or 0), int(stop or 100)
        if not 0 <= start < stop <= 100:
            raise UserError(f"{field}={path!r}: a slice goes from a lower to a higher per cent, "
                            "as in [:80%] or [80%:]")
        files = text_files.find_files([pattern], field)
        name = re.sub(r"[^\w.]", ":", path)
        splits = {split: files for split in ("train", "validation", "test")}
        kind = _EXAMPLES
        if any(map(big_bench.is_task, files)):
            kind = big_bench.kind_of(files)
        _TASKS[path] = _TASKS[name] = seqio.Task(
            name, source=records.RecordSource(
                "examples", splits,
                functools.partial(_part, start=start, stop=stop, read=kind.read),
                version=f"{start}:{stop}:{kind.read.__qualname__}"),
            preprocessors=text_to_text.preprocessors(kind.format_fn),
            output_features=text_to_text.features(), postprocess_fn=kind.postprocess_fn,
            metric_fns=list(kind.metric_fns))
    return _TASKS[path]


# --- SCAN -----------------------------------------------------------------------------------


