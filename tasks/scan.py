"""SCAN: commands to actions (Lake & Baroni 2018, arXiv:1711.00350)."""

import re
from collections.abc import Iterator

from t5x_lite.data import readers, records, task_metrics, text_to_text
from t5x_lite.errors import UserError

_SCAN_LINE = re.compile(r"IN: (.*) OUT: (.*)")
_SCAN_ORIGIN = "https://github.com/brendenlake/SCAN/tree/master/simple_split"


def read_scan(path: str) -> Iterator[tuple[str, str]]:
    """(command, actions) of SCAN's files: "IN: walk twice OUT: I_WALK I_WALK"."""
    for number, line in readers.lines(path):
        match = _SCAN_LINE.fullmatch(line.strip())
        if not match:
            raise UserError(f"{path}, line {number} is not 'IN: … OUT: …'")
        yield match.groups()


def _scan_files() -> dict[str, list[str]]:
    train, test = (records.published(f"tasks_{s}_simple.txt", _SCAN_ORIGIN)
                   for s in ("train", "test"))
    return {"train": [train], "validation": [test]}


def _register() -> None:
    text_to_text.register(
        "scan_simple", records.RecordSource("scan", _scan_files, read_scan,
                                            splits=("train", "validation")),
        records.unpack(("inputs", "targets")), metric_fns=[task_metrics.sequence_accuracy])


_register()
