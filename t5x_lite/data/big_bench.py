"""BIG-bench's task.json: answers to write, or choices to rank where it has target_scores."""

import json
from collections.abc import Iterator, Mapping, Sequence

import seqio

from t5x_lite.data import choice_files, choices, records, task_metrics, text_to_text
from t5x_lite.errors import UserError


def _load(path: str):
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from error


def _examples(path: str, field: str) -> tuple[dict, list[dict]]:
    """(all of the file, its examples), each with the strings "input" and the field."""
    content = _load(path)
    examples = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(examples, list) or not examples:
        raise UserError(f'{path} is no task of BIG-bench: it has no list "examples"')
    for number, example in enumerate(examples):
        if not isinstance(example.get("input"), str) or not example.get(field):
            other = "target" if field == "target_scores" else "target_scores"
            hint = f"; it has {other!r}, as all of the file must or none" * (other in example)
            raise UserError(f'{path}, example {number} has no "input" or no {field!r}{hint}')
    return content, examples


def read_answers(path: str) -> Iterator[tuple[str, list[str]]]:
    """(input, targets) of a task.json whose "target" is a string or a list."""
    content, examples = _examples(path, "target")
    for number, example in enumerate(examples):
        targets = example["target"]
        targets = [targets] if isinstance(targets, str) else targets
        if not all(targets):
            raise UserError(f"{path}, example {number} has an empty target")
        yield content.get("task_prefix", "") + example["input"], targets


def read_choices(path: str) -> Iterator[choice_files.Choice]:
    """(inputs, choices, "number,number" of the best) of a task.json with "target_scores"."""
    content, examples = _examples(path, "target_scores")
    front = content.get("task_prefix", "") + content.get("example_input_prefix", "\nQ: ")
    back = content.get("example_output_prefix", "\nA:").rstrip(" ")
    mark = content.get("choice_prefix", "\n  choice: ")
    for example in examples:
        scores = example["target_scores"]
        shown = scores if content.get("append_choices_to_input", True) else ()
        inputs = "".join([front, example["input"], *(mark + choice for choice in shown), back])
        best = [str(i) for i, v in enumerate(scores.values()) if v == max(scores.values())]
        yield inputs, list(scores), ",".join(best)


ANSWERS = text_to_text.Kind(read_answers, records.with_answers, text_to_text.answers,
                            (task_metrics.exact_match,))
CHOICES = text_to_text.Kind(read_choices, choices.of_records,
                            choices.choice, (task_metrics.rank_classification,))
def is_task(path: str) -> bool:
    """Whether a file is a task.json: an object with "examples"."""
    if not path.endswith(".json"):
        return False
    content = _load(path)
    return isinstance(content, dict) and "examples" in content


def kind_of(files: Sequence[str]) -> text_to_text.Kind:
    """CHOICES where the examples have "target_scores", else ANSWERS; UserError for a mixture."""
    found = {any("target_scores" in e for e in _examples(path, "input")[1]) for path in files}
    if len(found) > 1:
        raise UserError(f"{', '.join(files)}: some have target_scores and some not; name them as "
                        "tasks of their own")
    return CHOICES if found == {True} else ANSWERS


def register(name: str, files: Mapping[str, Sequence[str]]) -> seqio.Task:
    """Registers the task of your own task.json files, {split: paths}, and for choices NAME_choices
    to train on. The files are looked into at once, to tell which of the two they are."""
    kind = kind_of([path for paths in files.values() for path in paths])
    if kind is CHOICES:
        return choices.register_files(name, files, kind.read)
    return text_to_text.register(name, records.RecordSource(name, files, kind.read), kind.format_fn,
                                 metric_fns=kind.metric_fns, postprocess_fn=kind.postprocess_fn)
