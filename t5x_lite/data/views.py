"""Texts without labels as rows: every class's text as an answer to them, once for each view of the text.

A view is what a model sees of a text: the text as it is, with units dropped, with spans hidden, or as a
denoiser filled it in. data.views names one, or two that a consistency loss compares, the weak and the strong
one. A row of a view is a row of the objective's own kind (rows.py) whose decoder holds all of data.classes, as
segments 1, 2, … in their order, so that one pass of the model scores every class. Its arrays carry the view's
prefix: weak/encoder_input_tokens, strong/decoder_target_tokens.

Imports TensorFlow in the functions that take tensors.

Shape letter: L positions of one side of a row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_lite.data.config import DataConfig
from t5x_lite.data.rows import Rows, Sides
from t5x_lite.errors import UserError, known

PREFIXES = ("weak/", "strong/")   # of the arrays of the first view and of the second
RIGHT = "decoder_right"           # 1 at the tokens of the right class, in evaluation alone


@dataclasses.dataclass(frozen=True)
class View:
    """A row of VIEWS."""

    dropout: bool = True       # whether the model drops units, with keys of the view's own
    feature: str = "inputs"    # of the task: which text it is
    hidden: float = 0.0        # share of its tokens behind sentinels, as T5's inputs have them …
    span_length: float = 3.0   # … in spans of so many tokens

    def most_spans(self, inputs_length: int) -> int:
        """How many spans it hides at most, each behind a sentinel of its own."""
        return max(1, round(round(inputs_length * self.hidden) / self.span_length)) if self.hidden else 0


# Add a row to add a view.
VIEWS = {
    "plain": View(dropout=False),
    "dropout": View(),
    "spans": View(hidden=0.3),
    "filled": View(feature="filled"),
}


def classes_of(config: DataConfig) -> tuple[str, ...]:
    """The texts that data.classes lists, in order."""
    return tuple(filter(None, map(str.strip, config.classes.split(","))))


def views_of(config: DataConfig) -> tuple[str, ...]:
    """The names that data.views lists."""
    return tuple(filter(None, map(str.strip, config.views.split(","))))


def hide_text(config: DataConfig) -> bool:
    """Whether a view of the unlabelled texts has sentinels in it."""
    return bool(config.unlabelled) and any(VIEWS[name].hidden for name in views_of(config))


def validate(config: DataConfig, kind: Rows, objective: str) -> None:
    """Raises UserError for classes or views that cannot be, by name.

    kind: of the labelled rows; objective: what errors call it.
    """
    classes, views = classes_of(config), views_of(config)
    if config.unlabelled and not classes:
        raise UserError(f"data.unlabelled={config.unlabelled!r} is learned from by the classes that its "
                        "texts may have: list the labels as they are written, data.classes=negative,positive.")
    if not classes:
        return
    if len(set(classes)) < max(2, len(classes)):
        raise UserError(f"data.classes={config.classes!r}: list at least two classes, each once.")
    if not kind.pairs or kind.compares:
        raise UserError(f"data.classes={config.classes!r} are answers to inputs, which objective.name="
                        f"{objective!r} has none of: use seq2seq, choices, lm or prefix_lm.")
    for name in views:
        known("data.views", "view", name, VIEWS)
    if not 1 <= len(views) <= len(PREFIXES):
        raise UserError(f"data.views={config.views!r}: name one view, or a weak and a strong one.")


# --- rows -----------------------------------------------------------------------------------------

def prefixes_of(config: DataConfig) -> tuple[str, ...]:
    """The prefixes of the views that data.views lists."""
    return PREFIXES[:len(views_of(config))]


def feature_of(prefix: str) -> str:
    """The feature of an example that holds a view's text."""
    return prefix.rstrip("/")


def part(batch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The rows of one view of a batch, under their plain names."""
    return {name.removeprefix(prefix): x for name, x in batch.items() if name.startswith(prefix)}


def labelled(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a batch that are no views."""
    return {name: x for name, x in batch.items() if not name.startswith(PREFIXES)}


def row_config(config: DataConfig, kind: Rows) -> DataConfig:
    """The lengths of a view's rows: where text and answer share a row, one for each class."""
    times = len(classes_of(config)) if kind.shares_row else 1
    return dataclasses.replace(config, packing=False, loss_on_inputs=False,
                               targets_length=times * config.targets_length)


def check_room(config: DataConfig, kind: Rows, tokens: Sequence[Sequence[int]]) -> None:
    """Raises UserError where the classes, given their tokens, are not whole in their rows: beside a text
    each, or all in one row."""
    taken = config.inputs_length if kind.shares_row else 0
    needed = taken + (max if kind.shares_row else sum)(map(len, tokens))
    if needed > config.targets_length:
        raise UserError(f"data.targets_length={config.targets_length} is too short for data.classes="
                        f"{config.classes!r}, which must be whole in their rows: set at least {needed}.")


def check_graded(rows: Mapping[str, np.ndarray], config: DataConfig, task: str) -> None:
    """Raises UserError where the label of a held-out text, in `rows_of`'s graded arrays, is no class."""
    held = part(rows, PREFIXES[0])
    lacking = np.any(held["decoder_segment_ids"] > 0, axis=1) & ~np.any(held[RIGHT] > 0, axis=1)
    if lacking.any():
        raise UserError(f"data.validation={task!r} has a label that is none of data.classes="
                        f"{config.classes!r} (row {int(np.argmax(lacking)) + 1} of a batch): list every "
                        "label as the task writes it.")


def rows_of(kind: Rows, config: DataConfig, *, graded: bool = False) -> Rows:
    """The kind of rows that hold the views of texts, of the kind of labelled rows.

    Its examples have a feature for each view, "targets", which are all classes one after another, each
    with EOS, and, graded, "right": the number of the right class, -1 of none, as int [1].
    """
    prefixes, count = prefixes_of(config), len(classes_of(config))
    features = (*map(feature_of, prefixes), "targets", *(("right",) if graded else ()))
    made = {side: dict(arrays) for side, arrays in kind.made.items()}
    made["decoder"] |= {"decoder_segment_ids": "int32", "decoder_positions": "int32"}
    if graded:
        made["decoder"][RIGHT] = "int32"

    def convert(example: dict, eos_id: int) -> Sides:
        classes = _apart(example["targets"], eos_id, count)
        sides: Sides = {}
        for prefix in prefixes:
            found = _with_all_classes(kind, example[feature_of(prefix)], classes, eos_id)
            if graded:
                found["decoder"][RIGHT] = _right(found["decoder"], example["right"])
            sides |= _named(found, prefix)
        return sides

    def task_lengths(task, inputs_length: int, targets_length: int) -> dict[str, int]:
        texts = (*map(feature_of, prefixes), *{VIEWS[name].feature for name in views_of(config)})
        # A step of the task gives the texts their ends, and must know where.
        return dict.fromkeys(texts, inputs_length) | {"targets": targets_length} | (
            {"right": 1} if graded else {})

    return dataclasses.replace(
        kind, features=features, convert=convert, task_lengths=task_lengths, takes=(), denoiser="", packs=False,
        sides={prefix + side: field for prefix in prefixes for side, field in kind.sides.items()},
        made={name: arrays for prefix in prefixes for name, arrays in _named(made, prefix).items()})


def arrays(kind: Rows, config: DataConfig) -> tuple[int, dict[str, tuple[int, str]]]:
    """(rows for each labelled row, {array: (L, dtype)}) of a batch's views; (0, {}) without."""
    if not config.unlabelled:
        return 0, {}
    return config.unlabelled_ratio, rows_of(kind, config).arrays(row_config(config, kind))


def _named(sides: Mapping[str, Mapping], prefix: str) -> Sides:
    return {prefix + side: {prefix + name: x for name, x in arrays.items()}
            for side, arrays in sides.items()}


def _apart(tokens_L, eos_id: int, count: int) -> list:
    """The classes' tokens, each with the EOS that ends it."""
    import tensorflow as tf
    ends = 1 + tf.cast(tf.where(tokens_L == eos_id)[:, 0], tf.int32)
    starts = tf.concat([[0], ends[:-1]], 0)
    return [tokens_L[starts[i]:ends[i]] for i in range(count)]


def _with_all_classes(kind: Rows, inputs, classes: Sequence, eos_id: int) -> Sides:
    """A row of the kind with each class as an answer to the inputs, in a segment of its own. Loss weights
    are 1 at the classes' own tokens."""
    import tensorflow as tf
    parts = [kind.convert({"inputs": inputs, "targets": tokens}, eos_id) for tokens in classes]
    decoders = [sides["decoder"] for sides in parts]
    sizes = [tf.size(decoder["decoder_target_tokens"]) for decoder in decoders]
    decoder = {name: tf.concat([other[name] for other in decoders], 0) for name in decoders[0]}
    decoder["decoder_segment_ids"] = tf.concat([tf.fill([n], i) for i, n in enumerate(sizes, 1)], 0)
    decoder["decoder_positions"] = tf.concat([tf.range(n) for n in sizes], 0)
    return {**parts[0], "decoder": decoder}


def _right(decoder: Mapping[str, Any], number):
    """int32 [L]: 1 at the tokens of the class of that number, counted from 0."""
    import tensorflow as tf
    is_class = decoder["decoder_loss_weights"] > 0
    return tf.cast(is_class & (decoder["decoder_segment_ids"] == 1 + number), tf.int32)
