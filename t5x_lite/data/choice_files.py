"""Multiple-choice data sets that TFDS has not or has otherwise, read as their authors publish them.

    mmlu         data/{dev,val,test}/SUBJECT_{dev,val,test}.csv       Hendrycks et al. 2021
    siqa         {train,dev}.jsonl with {train,dev}-labels.lst        Sap et al. 2019
    truthfulqa   mc_task.json, its single-true targets (MC1)          Lin et al. 2022
    fever        paper_dev.jsonl: the claim alone, three labels       Thorne et al. 2018
    multifc      dev.tsv: labels are those of the claim's site        Augenstein et al. 2019
    raft         raft/data/TASK/train.csv, 50 labelled lines each     Alex et al. 2021 (split below)
    piqa         piqa.valid.jsonl with piqa.valid-labels.lst          Bisk et al. 2020

RAFT publishes labels of 50 lines a task and keeps those of the test to itself. Of the 50, the
1st, 3rd, 5th … are "train" and the 2nd, 4th … "validation", so that what is trained on or shown as a
demonstration is not what is scored; figures are thus not those of its leaderboard.

A reader gives (inputs, choices, number of the right one) of a file; UserError names a line that is
malformed.
"""

import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from t5x_lite.data import readers, records
from t5x_lite.errors import UserError


class Published(NamedTuple):
    """Where a data set's files stand below T5X_LITE_FILES, and how they are read."""
    globs: dict[str, str]                      # {split: pattern}
    read: Callable[[str], Iterator[records.Choice]]
    origin: str
    keep: Callable[[str, int], bool] | None = None   # see records.RecordSource

    def files(self) -> dict[str, list[str]]:
        """{split: paths}; UserError where a split has none."""
        files = {split: sorted(map(str, records.folder().rglob(pattern)))
                 for split, pattern in self.globs.items()}
        for split, pattern in self.globs.items():
            if not files[split]:
                raise UserError(f"no file {pattern} below T5X_LITE_FILES={records.folder()}; get "
                                f"it from {self.origin} and set T5X_LITE_FILES to the folder that "
                                "holds it")
        return files


def _mmlu(path: str) -> Iterator[records.Choice]:
    """The authors' own prompt, whose choices are the letters."""
    subject = " ".join(pathlib.Path(path).stem.split("_")[:-1])
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    for number, row in _rows(path, ",", 6):
        question, *texts, answer = row
        if answer not in tuple("ABCD"):
            raise UserError(f"{path}, line {number} has the answer {answer!r}, none of A, B, C, D")
        lines = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", texts, strict=True))
        yield f"{head}{question}{lines}\nAnswer:", list("ABCD"), str("ABCD".index(answer))


def _siqa(path: str) -> Iterator[records.Choice]:
    for where, record, label in _labelled(path, "123"):
        context, question, *texts = (readers.field(record, name, where) for name in (
            "context", "question", "answerA", "answerB", "answerC"))
        yield f"Context: {context}\n{records.prompt(question)}", texts, str(int(label) - 1)


def _piqa(path: str) -> Iterator[records.Choice]:
    for where, record, label in _labelled(path, "01"):
        goal, *texts = (readers.field(record, name, where) for name in ("goal", "sol1", "sol2"))
        yield records.prompt(goal), texts, label


def _truthfulqa(path: str) -> Iterator[records.Choice]:
    for number, record in readers.objects_of(readers.json_file(path), path):
        where = f"{path}, question {number}"
        targets = readers.field(record, "mc1_targets", where, dict)
        if list(targets.values()).count(1) != 1:
            raise UserError(f"{where} has not one true target in mc1_targets")
        right = list(targets.values()).index(1)
        yield records.prompt(readers.field(record, "question", where)), list(targets), str(right)


_FEVER = {"SUPPORTS": "true", "REFUTES": "false", "NOT ENOUGH INFO": "unknown"}


def _fever(path: str) -> Iterator[records.Choice]:
    for number, record in readers.json_lines(path):
        where = f"{path}, line {number}"
        label, claim = (readers.field(record, name, where) for name in ("label", "claim"))
        if label not in _FEVER:
            raise UserError(f"{where} has the label {label[:40]!r}, none of {', '.join(_FEVER)}")
        yield (f"Claim: {claim}\nIs the claim true, false or unknown?\nAnswer:",
               list(_FEVER.values()), str(list(_FEVER).index(label)))


def _multifc(path: str) -> Iterator[records.Choice]:
    rows = [row for _, row in _rows(path, "\t", 3, more=True)]
    labels: dict[str, list[str]] = {}   # of each site, which a claim's id begins with
    for claim_id, _, label, *_ in rows:
        labels.setdefault(claim_id.split("-")[0], []).append(label)
    for claim_id, claim, label, *_ in rows:
        choices = sorted(set(labels[claim_id.split("-")[0]]))
        yield f"Claim: {claim}\nRating:", choices, str(choices.index(label))


def _raft(path: str) -> Iterator[records.Choice]:
    rows = list(readers.records(path, ",", ("ID", "Label")))
    choices = sorted({row["Label"] for row in rows})
    for row in rows:
        fields = "\n".join(f"{k}: {v}" for k, v in row.items() if k not in ("ID", "Label"))
        yield f"{fields}\nLabel:", choices, str(choices.index(row["Label"]))


def _labelled(path: str, allowed: str) -> Iterator[tuple[str, dict, str]]:
    """(what errors call it, record, label) of X.jsonl with X-labels.lst beside it."""
    beside = path.removesuffix(".jsonl") + "-labels.lst"
    if not os.path.exists(beside):
        raise UserError(f"{path} has no {os.path.basename(beside)} beside it")
    labels = readers.whole(beside).split()
    rows = list(readers.json_lines(path))
    if len(rows) != len(labels):
        raise UserError(f"{path} has {len(rows)} questions, but there are {len(labels)} labels")
    for place, ((number, record), label) in enumerate(zip(rows, labels, strict=True), 1):
        if label not in tuple(allowed):
            raise UserError(f"{beside}: label {place} is {label[:40]!r}, none of "
                            f"{', '.join(allowed)}")
        yield f"{path}, line {number}", record, label


def _rows(path: str, delimiter: str, fields: int, more: bool = False
          ) -> Iterator[tuple[int, list[str]]]:
    for number, row in readers.table(path, delimiter):
        if len(row) < fields or (len(row) > fields and not more):
            raise UserError(f"{path}, line {number} has {len(row)} fields; it must have "
                            f"{fields}{' or more' if more else ''}")
        yield number, row


def _every_other(split: str, place: int) -> bool:
    return (place % 2 == 1) == (split == "validation")


PUBLISHED = {
    "mmlu": Published({"train": "dev/*_dev.csv", "validation": "val/*_val.csv",
                       "test": "test/*_test.csv"}, _mmlu, "https://github.com/hendrycks/test"),
    "siqa": Published({"train": "socialiqa-train-dev/train.jsonl",
                       "validation": "socialiqa-train-dev/dev.jsonl"}, _siqa,
                      "https://leaderboard.allenai.org/socialiqa"),
    "truthfulqa": Published({"validation": "mc_task.json"}, _truthfulqa,
                            "https://github.com/sylinrl/TruthfulQA"),
    "fever": Published({"validation": "paper_dev.jsonl"}, _fever, "https://fever.ai"),
    "multifc": Published({"validation": "multifc/dev.tsv"}, _multifc,
                         "https://copenlu.github.io/publication/2019_emnlp_augenstein"),
    "raft": Published({"train": "raft/data/*/train.csv", "validation": "raft/data/*/train.csv"},
                      _raft, "https://huggingface.co/datasets/ought/raft", _every_other),
    "piqa": Published({"validation": "piqa.valid.jsonl"}, _piqa, "https://yonatanbisk.com/piqa"),
}
