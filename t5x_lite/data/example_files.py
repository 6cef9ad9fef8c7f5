"""Examples from files: a user's own JSONL or TSV, or a task.json of BIG-bench.

    data.train=train.jsonl          any .jsonl, .json or .tsv path is a task: inputs, targets
    data.train=all.jsonl[:80%]      … or a part of its lines, in order; [80%:] is the rest

A .jsonl line is {"inputs": …, "targets": …} or {"question": …, "answer": […]}; a .tsv line
inputs, a tab, the target, and further allowed answers behind more tabs. A .json file is a list of
such objects, or of WebQuestions' own (its published files), or a task of BIG-bench (see below).
A .jsonl of {"prompt", "chosen", "rejected"} is preferences (preferences.py), one of {"messages": [{"role",
"content"}, …]} conversations (chats.py), one of {"prompt", …} prompts (prompt_files.py).
Each may be compressed: .jsonl.gz. Paths with commas, "=" and "[" are read as they are (paths.py).
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import seqio

from t5x_lite.data import (
    chats,
    choices,
    paths,
    preferences,
    prompt_files,
    readers,
    records,
    task_metrics,
    text_files,
    text_to_text,
)
from t5x_lite.errors import UserError

# --- BIG-bench's task.json ----------------------------------------------------------------------

# Optional strings around the parts of a prompt, and what they are where the file has none.
_FRAME = {"task_prefix": "", "example_input_prefix": "\nQ: ", "example_output_prefix": "\nA:",
          "choice_prefix": "\n  choice: "}


def _examples(path: str, needed: str = "") -> tuple[dict[str, Any], list[dict]]:
    """(all of the file, its examples), each an object with the string "input" and `needed`."""
    content = readers.json_file(path)
    examples = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(examples, list) or not examples:
        raise UserError(f'{path} is no task of BIG-bench: it has no list "examples"')
    for number, example in enumerate(examples):
        where = f"{path}, example {number}"
        readers.field(example, "input", where)
        if needed and not example.get(needed):
            other = "target" if needed == "target_scores" else "target_scores"
            hint = f"; it has {other!r}, as all of the file must or none" * (other in example)
            raise UserError(f"{where} has no {needed!r}{hint}")
    return content, examples


def _frame(content: Mapping[str, Any], path: str) -> dict[str, str]:
    """The strings of _FRAME as the file has them."""
    return {name: readers.field({name: default, **content}, name, path)
            for name, default in _FRAME.items()}


def read_answers(path: str) -> Iterator[tuple[str, list[str]]]:
    """(input, targets) of a task.json whose "target" is a string or a list of strings."""
    content, examples = _examples(path, "target")
    front = _frame(content, path)["task_prefix"]
    for number, example in enumerate(examples):
        where = f"{path}, example {number}"
        targets = readers.answers_of({"targets": example["target"]}, where)
        if not all(targets):
            raise UserError(f"{where} has an empty target")
        readers.check_text([example["input"], *targets], where)
        yield front + example["input"], targets


def read_choices(path: str) -> Iterator[records.Choice]:
    """(inputs, choices, "number,number" of the best) of a task.json with "target_scores"."""
    content, examples = _examples(path, "target_scores")
    frame = _frame(content, path)
    shows_choices = content.get("append_choices_to_input", True)
    for number, example in enumerate(examples):
        where = f"{path}, example {number}"
        scores = _scores(example, where)
        shown = [frame["choice_prefix"] + choice for choice in scores] if shows_choices else []
        inputs = "".join([frame["task_prefix"], frame["example_input_prefix"], example["input"],
                          *shown, frame["example_output_prefix"].rstrip(" ")])
        highest = max(scores.values())
        best = [str(place) for place, score in enumerate(scores.values()) if score == highest]
        readers.check_text([inputs, *scores], where)
        yield inputs, list(scores), ",".join(best)


def _scores(example: Mapping[str, Any], where: str) -> dict[str, float]:
    """{choice: score}; UserError where a score is no number or a choice no text."""
    scores = readers.field(example, "target_scores", where, dict)
    for choice, score in scores.items():
        if not isinstance(score, int | float) or score != score:
            raise UserError(f"{where}: the score of {choice[:40]!r} in target_scores is no number")
        if not choice.strip():
            raise UserError(f"{where} has an empty choice in target_scores")
    return scores


ANSWERS = text_to_text.Kind(read_answers, records.with_answers, text_to_text.answers,
                            (task_metrics.exact_match,))
CHOICES = text_to_text.Kind(read_choices, choices.of_records,
                            choices.choice, (task_metrics.rank_classification,))


def is_task(path: str) -> bool:
    """Whether a file is a task.json: an object with "examples"."""
    if not path.removesuffix(".gz").endswith(".json"):
        return False
    content = readers.json_file(path)
    return isinstance(content, dict) and "examples" in content


def kind_of(files: Sequence[str]) -> text_to_text.Kind:
    """CHOICES where the examples have "target_scores", else ANSWERS; UserError for a mixture."""
    kinds = {any("target_scores" in example for example in _examples(path)[1]) for path in files}
    if len(kinds) > 1:
        raise UserError(f"{', '.join(files)}: some have target_scores and some not; name them as "
                        "tasks of their own")
    return CHOICES if kinds == {True} else ANSWERS


def register(name: str, files: Mapping[str, Sequence[str]]) -> seqio.Task:
    """Registers the task of your own task.json files, {split: paths}, and for choices NAME_choices
    to train on. The files are looked into at once, to tell which of the two they are."""
    kind = kind_of([path for paths in files.values() for path in paths])
    if kind is CHOICES:
        return choices.register_files(name, files, kind.read)
    return text_to_text.register(name, records.RecordSource(name, files, kind.read), kind.format_fn,
                                 metric_fns=kind.metric_fns, postprocess_fn=kind.postprocess_fn)


# --- examples of any file -----------------------------------------------------------------------

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


# (whether a file is of the kind, files -> the kind); pairs of texts, where it is of none.
_KINDS: tuple[tuple[Callable[[str], bool], Callable[[Sequence[str]], text_to_text.Kind]], ...] = (
    (is_task, kind_of),
    (preferences.is_preferences, preferences.kind_of),
    (chats.is_chats, lambda files: chats.KIND),
    (prompt_files.is_prompts, lambda files: prompt_files.KIND))


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
        kind = next((of(files) for holds, of in _KINDS if any(map(holds, files))), _EXAMPLES)
        _TASKS[path] = _TASKS[name] = seqio.Task(
            name, source=(kind.source or records.RecordSource)(
                "examples", splits,
                functools.partial(_part, start=start, stop=stop, read=kind.read),
                version=f"{start}:{stop}:{kind.read.__qualname__}"),
            preprocessors=kind.preprocessors(kind.format_fn),
            output_features=kind.features(), postprocess_fn=kind.postprocess_fn,
            metric_fns=list(kind.metric_fns))
    return _TASKS[path]

