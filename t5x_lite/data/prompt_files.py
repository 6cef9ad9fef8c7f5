"""Prompts from files, for objectives that draw the answers themselves (ppo, grpo).

    data.train=prompts.jsonl      {"prompt": …, and whatever a reward function reads} a line

The whole object travels with the prompt as JSON, a byte a token of the feature "record", and comes back to
the reward function as it was. A line may also have "targets", a right answer, for held-out likelihood.
"""

import json
from collections.abc import Iterator

import seqio
import tensorflow as tf

from t5x_lite.data import readers, records, text_to_text
from t5x_lite.data.preprocessors import Format
from t5x_lite.errors import UserError


def is_prompts(path: str) -> bool:
    """Whether a file is a .jsonl whose first line has a prompt; asked of what holds no preferences."""
    if not path.removesuffix(".gz").endswith(".jsonl"):
        return False
    first = next((record for _, record in readers.json_lines(path)), {})
    return "prompt" in first


def read(path: str) -> Iterator[records.Record]:
    """(prompt, targets or "", the line's object as JSON); UserError names the line that is malformed."""
    for number, record in readers.json_lines(path):
        where = f"{path}, line {number}"
        prompt = readers.field(record, "prompt", where)
        if not prompt.strip():
            raise UserError(f"{where} has an empty prompt; leave the line out")
        targets = readers.field({"targets": "", **record}, "targets", where)
        readers.check_text((prompt, targets), where)
        yield prompt, targets, json.dumps(record, ensure_ascii=False)


def _bytes(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """{"json": text} -> "record", int32 bytes, beside the rest."""
    def taken_apart(example):
        rest = {name: x for name, x in example.items() if name != "json"}
        return {**rest, "record": tf.cast(tf.io.decode_raw(example["json"], tf.uint8), tf.int32)}
    return dataset.map(tf.autograph.experimental.do_not_convert(taken_apart))


def _preprocessors(format_fn: Format) -> list:
    """text_to_text.preprocessors, and the record as bytes once the texts are tokens."""
    *steps, end = text_to_text.preprocessors(format_fn)
    return [*steps, _bytes, end]


def _features() -> dict[str, seqio.Feature]:
    features = text_to_text.features()
    record = seqio.Feature(features["targets"].vocabulary, add_eos=False, dtype=tf.int32)
    return {**features, "record": record}


KIND = text_to_text.Kind(read, records.unpack(("inputs", "targets", "json")), None, (),
                         _preprocessors, _features)
