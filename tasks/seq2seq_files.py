"""Examples from files: a user's own JSONL or TSV, SCAN, and BIG-bench's JSON.

    data.train=train.jsonl          any .jsonl, .json or .tsv path is a task: inputs, targets
    data.train=all.jsonl[:80%]      … or a part of its lines, in order; [80%:] is the rest
    scan_simple                     SCAN's simple split (Lake & Baroni 2018, arXiv:1711.00350)
    bigbench_NAME                   BIG-bench or BIG-Bench Hard, one of BIG_BENCH, by its JSON

A .jsonl line is {"inputs": …, "targets": …} or {"question": …, "answer": […]}; a .tsv line
inputs, a tab, the target, and further allowed answers behind more tabs. A .json file is a list of
such objects, or of WebQuestions' own (its published files).
"""

import functools
import json
import re
from collections.abc import Iterator

import seqio
import tensorflow as tf

from t5x_lite.errors import UserError
from tasks import metrics, records, text_files, text_to_text
from tasks.text_to_text import each

BIG_BENCH = ("date_understanding", "boolean_expressions", "causal_judgement", "disambiguation_qa",
             "formal_fallacies", "geometric_shapes", "hyperbaton", "movie_recommendation",
             "navigate", "object_counting", "penguins_in_a_table", "ruin_names", "snarks",
             "sports_understanding", "temporal_sequences", "web_of_lies", "word_sorting")


@each
def first_answer(example):
    """{"inputs", "answers"} -> the same, with the first answer as targets."""
    return {**example, "targets": example["answers"][0]}


def _format(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return first_answer(records.unpack(("inputs", "answers"), lists=("answers",))(dataset))


_PATH = re.compile(r"(.*\.(?:jsonl|json|tsv))(?:\[(\d*)%?:(\d*)%?\])?")
_TASKS: dict[str, seqio.Task] = {}   # by path, and by name: what validation lists them under


def is_path(name: str) -> bool:
    """Whether `task` takes the name: a .jsonl, .json or .tsv path, with or without a slice behind
    it, or the name of a task that it made."""
    return name in _TASKS or bool(_PATH.fullmatch(name))


def _part(path: str, start: int, stop: int) -> Iterator[records.Record]:
    """The file's examples from start to stop per cent."""
    found = list(records.read_examples(path))
    yield from found[len(found) * start // 100:len(found) * stop // 100]


def task(path: str, field: str = "data.train") -> seqio.Task:
    """The task of a .jsonl, .json or .tsv file (or glob); every split is the whole file or slice.

    Its name is the path with ":" for "/" and whatever else seqio allows in no name. Scored by
    exact match of the raw text, and by SQuAD's exact match and F1.
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
        _TASKS[path] = _TASKS[name] = seqio.Task(
            name, source=records.RecordSource(
                "examples", splits, functools.partial(_part, start=start, stop=stop),
                version=f"{start}:{stop}"),
            preprocessors=text_to_text.preprocessors(_format),
            output_features=text_to_text.features(), postprocess_fn=text_to_text.answers,
            metric_fns=[metrics.exact_match, metrics.squad])
    return _TASKS[path]


# --- SCAN -----------------------------------------------------------------------------------

_SCAN_LINE = re.compile(r"IN: (.*) OUT: (.*)")
_SCAN_ORIGIN = "https://github.com/brendenlake/SCAN/tree/master/simple_split"


def read_scan(path: str) -> Iterator[tuple[str, str]]:
    """(command, actions) of SCAN's files: "IN: walk twice OUT: I_WALK I_WALK"."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            match = _SCAN_LINE.fullmatch(line.strip())
            if not match:
                raise UserError(f"{path}, line {number} is not 'IN: … OUT: …'")
            yield match.groups()


def _scan_files() -> dict[str, list[str]]:
    train, test = (records.published(f"tasks_{s}_simple.txt", _SCAN_ORIGIN)
                   for s in ("train", "test"))
    return {"train": [train], "validation": [test]}


# --- BIG-bench ------------------------------------------------------------------------------

def read_big_bench(path: str) -> Iterator[tuple[str, list[str]]]:
    """(input, targets) of a task.json: "target" a string or a list, or "target_scores"."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    prefix = content.get("task_prefix", "")
    for number, example in enumerate(content["examples"]):
        if "target" in example:
            targets = example["target"]
        else:
            scores = example.get("target_scores", {})
            targets = [t for t, score in scores.items() if score == max(scores.values())]
        targets = [targets] if isinstance(targets, str) else targets
        if not targets or not all(targets):
            raise UserError(f"{path}, example {number} has no target")
        yield prefix + example["input"], targets


def _big_bench_files(name: str) -> dict[str, list[str]]:
    return {"validation": [records.published(
        f"{name}.json", "https://github.com/suzgunmirac/BIG-Bench-Hard/tree/main/bbh")]}


def _register() -> None:
    text_to_text.register(
        "scan_simple", records.RecordSource("scan", _scan_files, read_scan,
                                            splits=("train", "validation")),
        records.unpack(("inputs", "targets")), metric_fns=[metrics.sequence_accuracy])
    for name in BIG_BENCH:
        text_to_text.register(
            f"bigbench_{name}", records.RecordSource(
                f"bigbench_{name}", functools.partial(_big_bench_files, name), read_big_bench,
                splits=("validation",)),
            _format, metric_fns=[metrics.exact_match], postprocess_fn=text_to_text.answers)


_register()
