"""P3: every promptsource template of a data set as a task, all of them as one mixture.

    --config.data.task_modules=tasks.p3 --config.data.train=p3

registers, for each template file p3_NAME.yaml and its data set's own files below T5X_LITE_FILES,
a task p3_NAME_TEMPLATE for every template and the mixture p3_NAME; the mixture p3 holds all of
them at the rates of T0 (Sanh et al. 2021, arXiv:2110.08207, section 5). The templates are those
of https://github.com/bigscience-workshop/promptsource. `register` takes a data set of your own.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import seqio

from t5x_lite.data import prompts, readers, records
from t5x_lite.errors import UserError
from tasks import t5_benchmarks

Reader = Callable[[str], Iterable[Mapping]]


class DataSet(NamedTuple):
    """Files by split (patterns below T5X_LITE_FILES) and a reader of what the templates name."""
    files: Mapping[str, str]
    read: Reader


def _lines(path: str) -> Iterator[dict]:
    return (record for _, record in readers.json_lines(path))


def _super_glue(path: str, labels: Sequence) -> Iterator[dict]:
    for number, record in readers.json_lines(path):
        label = record.get("label")
        if "label" in record and label not in labels:
            raise UserError(f"{path}, line {number} has the label {str(label)[:40]!r}, none of "
                            f"{', '.join(map(str, labels))}")
        yield {**record, "label": labels.index(label) if "label" in record else -1}


def _squad(path: str) -> Iterator[dict]:
    for number, question, context, answers in t5_benchmarks.read_squad(path):
        yield {"id": number, "question": question, "context": context, "title": "",
               "answers": {"text": answers}}


def _web_questions(path: str) -> Iterator[dict]:
    return (record for _, record in records.json_list(path))


DATASETS = {
    "nq_open": DataSet({"train": "NQ-open.train*.jsonl", "validation": "NQ-open.dev.jsonl"},
                       _lines),
    "squad": DataSet({"train": "train-v1.1.json", "validation": "dev-v1.1.json"}, _squad),
    "web_questions": DataSet({"train": "webquestions*.train*"}, _web_questions),
    "super_glue_boolq": DataSet({"train": "BoolQ/train.jsonl", "validation": "BoolQ/val.jsonl"},
                                functools.partial(_super_glue, labels=(False, True))),
    "super_glue_rte": DataSet({"train": "RTE/train.jsonl", "validation": "RTE/val.jsonl"},
                              functools.partial(_super_glue,
                                                labels=("entailment", "not_entailment"))),
}


def register(name: str, templates: str, files: Mapping[str, Sequence[str]], read: Reader,
             original_only: bool = False) -> tuple[list[str], int]:
    """The tasks of a data set's templates, and how many training records it has."""
    tasks = prompts.register_templates(f"p3_{name}", templates, files, read, original_only)
    return tasks, sum(1 for path in files.get("train", ()) for _ in read(path))


def mixture(name: str, registered: Mapping[str, tuple[list[str], int]]) -> seqio.Mixture:
    """All templates of all data sets at T0's rates; {data set: what register gave}."""
    rates = prompts.p3_rates({n: size for n, (_, size) in registered.items()},
                             {n: len(tasks) for n, (tasks, _) in registered.items()})
    return seqio.MixtureRegistry.add(name, [
        (task, rates[n] / len(tasks)) for n, (tasks, _) in registered.items() for task in tasks])


def register_found() -> list[str]:
    """Registers what is below T5X_LITE_FILES and the mixture p3; the data sets' names."""
    registered = {}
    for name, dataset in DATASETS.items():
        templates = sorted(records.folder().rglob(f"p3_{name}.yaml"))
        files = {split: sorted(map(str, records.folder().rglob(pattern)))
                 for split, pattern in dataset.files.items()}
        files = {split: paths for split, paths in files.items() if paths}
        if templates and "train" in files:
            registered[name] = register(name, str(templates[0]), files, dataset.read)
    if not registered:
        raise UserError(f"tasks.p3: below T5X_LITE_FILES={records.folder()} there is no template "
                        f"file p3_NAME.yaml with its data, NAME being one of {', '.join(DATASETS)}")
    mixture("p3", registered)
    return list(registered)


if "p3" not in seqio.MixtureRegistry.names():
    register_found()
