"""BIG-bench's task.json: answers to write, or choices to rank where it has target_scores.

    data.train=task.json                        a task by its path (example_files.py)
    big_bench.register("name", {"train": [path]})

The format: Srivastava et al. 2022 (arXiv:2206.04615), google/BIG-bench's docs/doc.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import seqio

from t5x_lite.data import choice_files, choices, readers, records, task_metrics, text_to_text
from t5x_lite.errors import UserError

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


def read_choices(path: str) -> Iterator[choice_files.Choice]:
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
