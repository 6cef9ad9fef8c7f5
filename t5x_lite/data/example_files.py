"""Examples from files: a user's own JSONL or TSV, or a task.json of BIG-bench.

    data.train=train.jsonl          any .jsonl, .json or .tsv path is a task: inputs, targets
    data.train=all.jsonl[:80%]      … or a part of its lines, in order; [80%:] is the rest

A .jsonl line is {"inputs": …, "targets": …} or {"question": …, "answer": […]}; a .tsv line
inputs, a tab, the target, and further allowed answers behind more tabs. A .json file is a list of
such objects, or of WebQuestions' own (its published files), or a task of BIG-bench (big_bench.py).
Each may be compressed: .jsonl.gz. Paths with commas, "=" and "[" are read as they are (paths.py).
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator

import seqio

from t5x_lite.data import big_bench, paths, records, task_metrics, text_files, text_to_text
from t5x_lite.errors import UserError

_EXAMPLES = text_to_text.Kind(records.read_examples, records.with_answers, text_to_text.answers,
                             (task_metrics.exact_match, task_metrics.squad))
_TASKS: dict[str, seqio.Task] = {}   # by path, and by name: what validation lists them under


def is_path(name: str) -> bool:
    """Whether `task` takes the name: a .jsonl, .json or .tsv path (also .gz), with or without a
    slice behind it, or the name of a task that it made."""
    return name in _TASKS or bool(paths.EXAMPLES.fullmatch(name))


def _part(path: str, start: int, stop: int, read: Callable[[str], Iterable[records.Record]]
          ) -> Iterator[records.Record]:
    """The file's examples from start to stop per cent."""
    examples = list(read(path))
    yield from examples[len(examples) * start // 100:len(examples) * stop // 100]


def task(path: str, field: str = "data.train") -> seqio.Task:
    """The task of a .jsonl, .json or .tsv file (or glob); every split is the whole file or slice.

    Its name is the path with ":" for "/" and whatever else seqio allows in no name. Scored by
    exact match of the raw text, and by SQuAD's exact match and F1; BIG-bench's choices by rank.
    """
    if path not in _TASKS:
        pattern, start, stop = paths.EXAMPLES.fullmatch(path).groups()
        start, stop = int(start or 0), int(stop or 100)
        if not 0 <= start < stop <= 100:
            raise UserError(f"{field}={path!r}: a slice goes from a lower to a higher per cent, "
                            "as in [:80%] or [80%:]")
        files = text_files.find_files([pattern], field)
        name = re.sub(r"[^\w.]", ":", path)
        while name in _TASKS:   # a=b.tsv and a,b.tsv
            name += "_"
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

