"""BIG-bench's JSON tasks: choices to rank where they have target_scores, else answers to write.

    bigbench_NAME           BIG-Bench Hard's NAME.json, one of HARD: answers (Suzgun et al. 2022)
    bigbench_NAME_ranked    BIG-bench's own NAME/task.json, one of RANKED: choices (Srivastava et
                            al. 2022, arXiv:2206.04615), and bigbench_NAME_ranked_choices
    register("mine", {"validation": ["mine/task.json"]})    your own; the file says which
    data.validation=mine/task.json                          … or without a name

A task.json of choices is prompted as BIG-bench's json_task.py does: task_prefix,
example_input_prefix ("\\nQ: "), the input, each choice behind choice_prefix ("\\n  choice: ")
unless append_choices_to_input is false, and example_output_prefix ("\\nA:"). Choices keep the
file's order; those of the highest score are right. Tasks of answers are prompted by task_prefix
and the input.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

import seqio

from t5x_lite.errors import UserError
from tasks import choice_files, metrics, rank_classification, records, text_to_text

HARD = ("date_understanding", "boolean_expressions", "causal_judgement", "disambiguation_qa",
        "formal_fallacies", "geometric_shapes", "hyperbaton", "movie_recommendation",
        "navigate", "object_counting", "penguins_in_a_table", "ruin_names", "snarks",
        "sports_understanding", "temporal_sequences", "web_of_lies", "word_sorting")
RANKED = ("causal_judgment", "date_understanding", "disambiguation_qa",
          "formal_fallacies_syllogisms_negation", "geometric_shapes", "hyperbaton",
          "logical_deduction", "movie_recommendation", "navigate", "penguins_in_a_table",
          "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection",
          "snarks", "sports_understanding", "temporal_sequences", "tracking_shuffled_objects")
_HARD_ORIGIN = "https://github.com/suzgunmirac/BIG-Bench-Hard/tree/main/bbh"
_ORIGIN = "https://github.com/google/BIG-bench/tree/main/bigbench/benchmark_tasks"


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
                            (metrics.exact_match,))
CHOICES = text_to_text.Kind(read_choices, rank_classification.of_records,
                            rank_classification.choice, (metrics.rank_classification,))


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
        return rank_classification.register_files(name, files, kind.read)
    return text_to_text.register(name, records.RecordSource(name, files, kind.read), kind.format_fn,
                                 metric_fns=kind.metric_fns, postprocess_fn=kind.postprocess_fn)


def _register() -> None:
    for name in HARD:
        files = choice_files.Published({"validation": f"{name}.json"}, read_answers, _HARD_ORIGIN)
        text_to_text.register(
            f"bigbench_{name}", records.RecordSource(
                f"bigbench_{name}", files.files, read_answers, splits=("validation",)),
            ANSWERS.format_fn, metric_fns=ANSWERS.metric_fns,
            postprocess_fn=ANSWERS.postprocess_fn)
    for name in RANKED:
        files = choice_files.Published({"validation": f"{name}/**/task.json"}, read_choices,
                                       _ORIGIN)
        rank_classification.register_files(f"bigbench_{name}_ranked", files.files, read_choices,
                                           files.globs)


_register()
