"""Preferences from files: which of two answers to a prompt is the better one.

    data.train=pairs.jsonl      {"prompt" or "inputs": …, "chosen": …, "rejected": …} a line

Lines that also hold "reference_chosen" and "reference_rejected", the log-probabilities of both
answers under a reference model in nats, make a task that objective.reference=rows reads;
`python -m t5x_lite.score_preferences` writes them.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import seqio
import tensorflow as tf

from t5x_lite.data import readers, records, text_to_text
from t5x_lite.data.preprocessors import Format
from t5x_lite.errors import UserError

PROMPTS = ("prompt", "inputs")
SCORES = ("reference_chosen", "reference_rejected")


def is_preferences(path: str) -> bool:
    """Whether a file is a .jsonl whose first line has a chosen or a rejected answer."""
    if not path.removesuffix(".gz").endswith(".jsonl"):
        return False
    return bool(_first(path).keys() & {"chosen", "rejected"})


def _first(path: str) -> dict:
    return next((record for _, record in readers.json_lines(path)), {})


def read(path: str) -> Iterator[records.Record]:
    """(prompt, chosen, rejected) of each line; UserError names the line that is malformed."""
    for number, record in readers.json_lines(path):
        yield _answers(record, f"{path}, line {number}")


def read_scored(path: str) -> Iterator[records.Record]:
    """(prompt, chosen, rejected, "score score") of each line, the reference's log-probabilities."""
    for number, record in readers.json_lines(path):
        where = f"{path}, line {number}"
        yield *_answers(record, where), " ".join(repr(_score(record, n, where)) for n in SCORES)


def _answers(record: Mapping, where: str) -> tuple[str, str, str]:
    prompt = next((name for name in PROMPTS if name in record), PROMPTS[0])
    texts = tuple(readers.field(record, name, where) for name in (prompt, "chosen", "rejected"))
    for name, text in zip(("chosen", "rejected"), texts[1:], strict=True):
        if not text.strip():
            raise UserError(f"{where} has an empty answer {name!r}; leave the line out")
    if texts[1] == texts[2]:
        raise UserError(f"{where}: the chosen and the rejected answer are the same, "
                        f"{texts[1][:40]!r}; leave the line out, nothing can be learned from it")
    readers.check_text(texts, where)
    return texts


def _score(record: Mapping, name: str, where: str) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} has {name}={value!r}, which must be a finite log-probability, as "
                        "in the file's other lines; python -m t5x_lite.score_preferences writes it")
    return float(value)


def _numbers(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """{"scores": "score score"} -> "reference", float32 [2], beside the rest."""
    def parsed(example):
        rest = {name: x for name, x in example.items() if name != "scores"}
        scores = tf.strings.to_number(tf.strings.split(example["scores"], " "), tf.float32)
        return {**rest, "reference": tf.ensure_shape(scores, [2])}
    return dataset.map(tf.autograph.experimental.do_not_convert(parsed))


def _scored_preprocessors(format_fn: Format) -> list:
    """text_to_text.preprocessors, and the scores as numbers once the texts are tokens."""
    *steps, end = text_to_text.preprocessors(format_fn)
    return [*steps, _numbers, end]


def _features(scored: bool) -> dict[str, seqio.Feature]:
    features = text_to_text.features()
    features["rejected"] = features["targets"]
    if scored:
        features["reference"] = seqio.Feature(
            features["targets"].vocabulary, add_eos=False, dtype=tf.float32)
    return features


_TEXTS = ("inputs", "targets", "rejected")
PLAIN = text_to_text.Kind(read, records.unpack(_TEXTS), None, (),
                          features=functools.partial(_features, False))
SCORED = text_to_text.Kind(read_scored, records.unpack((*_TEXTS, "scores")), None, (),
                           _scored_preprocessors, functools.partial(_features, True))


def kind_of(files: Sequence[str]) -> text_to_text.Kind:
    """SCORED where each file's first line has a reference's score, else PLAIN."""
    scored = all(_first(path).keys() & set(SCORES) for path in files)
    return SCORED if scored else PLAIN
