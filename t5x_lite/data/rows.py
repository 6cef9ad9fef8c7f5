"""What a row of a batch holds: the one table that makes rows, shapes them and reads them back.

An objective names the kind of rows that it learns from (training/objectives.py), and everything
that handles rows reads that kind here and compares no names: pipeline.py makes them of a task's
examples, batches.py puts them on the devices, build.py knows the shapes before there are any,
evaluation/predictor.py makes them of texts, inspect_task.py shows them.

A row has sides, each of a length that the config fixes: "encoder" and "decoder" are what the model
reads; others (a rejected answer beside a chosen one, say) carry arrays of the names that their
objective's loss asks for. The first array of a side holds its tokens. A side with an array
SIDE_target_tokens gains SIDE_input_tokens, the targets shifted right by one.

TensorFlow is imported by the functions that convert, so that a config can be built and planned
without it.

Shape letter: L positions of one side of a row.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError, one_of

if TYPE_CHECKING:
    import seqio

Sides = dict[str, dict[str, Any]]   # {side: {array: 1-D tensor}}


@dataclasses.dataclass(frozen=True)
class Rows:
    """A kind of rows. Every function is pure, and traced by TensorFlow where it takes tensors."""

    # Output features that a task must have.
    features: tuple[str, ...]
    # side -> the field of DataConfig that is its length.
    sides: Mapping[str, str]
    # side -> {array: dtype} that `convert` makes, its tokens first. See `arrays` for all.
    made: Mapping[str, Mapping[str, str]]
    # ({feature: int32 tokens [n]}, the vocabulary's EOS id) -> `made`, as tensors of any lengths.
    convert: Callable[[dict, int], Sides]
    # (task, inputs_length, targets_length) -> {feature: tokens that a task may give it}, and
    # "row": the length of the row, where inputs and targets share one.
    task_lengths: Callable[["seqio.Task", int, int], dict[str, int]]
    # What becomes of documents here: kinds of denoising.Denoiser, and the denoiser that plain text
    # files get by default. () and "": rows that only tasks made for them fill.
    takes: tuple[str, ...] = ()
    denoiser: str = ""
    pairs: bool = True    # inputs are read and targets written, which can be completed and scored
    ends: bool = True     # inputs and scored targets end in EOS; False: text is read on unbroken
    packs: bool = True    # several examples may stand in one row (data.packing)

    @property
    def shares_row(self) -> bool:
        """Whether inputs and targets stand in one row, of data.targets_length."""
        return self.pairs and "encoder" not in self.sides

    @property
    def marks_inputs(self) -> bool:
        """Whether attention looks both ways over the inputs in the decoder's row."""
        return "decoder_prefix" in self.made.get("decoder", {})

    @property
    def token_arrays(self) -> list[str]:
        """The array of each side that holds its tokens."""
        return [next(iter(arrays)) for arrays in self.made.values()]

    def weighted(self, sides: Sides, loss_on_inputs: bool) -> Sides:
        """What `convert` made, with the inputs predicted as well as the targets where asked for.

        Raises:
            UserError: inputs that stand in a row of their own.
        """
        if not loss_on_inputs:
            return sides
        if not self.shares_row:
            able = [name for name, kind in ROWS.items() if kind.shares_row]
            raise UserError("data.loss_on_inputs=True: these inputs stand in a row of their own, where "
                            f"nothing predicts them; it is for objective.name={' or '.join(able)}.")
        import tensorflow as tf
        decoder = dict(sides["decoder"])
        decoder["decoder_loss_weights"] = tf.ones_like(decoder["decoder_loss_weights"])
        return {**sides, "decoder": decoder}

    def lengths(self, config: DataConfig) -> dict[str, int]:
        """{side: L}."""
        return {side: getattr(config, field) for side, field in self.sides.items()}

    def arrays(self, config: DataConfig) -> dict[str, tuple[int, str]]:
        """{array of a batch: (L, dtype)}, those of packing included."""
        held = {}
        for side, length in self.lengths(config).items():
            dtypes = dict(self.made[side])
            # A masked LM's targets stand on the encoder's side: no decoder reads them shifted.
            if f"{side}_target_tokens" in dtypes:
                dtypes[f"{side}_input_tokens"] = "int32"
            if config.packing:
                dtypes |= {f"{side}_segment_ids": "int32", f"{side}_positions": "int32"}
            held |= {name: (length, dtype) for name, dtype in dtypes.items()}
        return held


_INPUTS = {"encoder_input_tokens": "int32"}
_TARGETS = {"decoder_target_tokens": "int32", "decoder_loss_weights": "float32"}


def _predict(tokens, weights=None) -> dict:
    import tensorflow as tf
    weights = tf.ones_like(tokens, tf.float32) if weights is None else weights
    return {"decoder_target_tokens": tokens, "decoder_loss_weights": weights}


def _seq2seq(example: dict, eos_id: int) -> Sides:
    return {"encoder": {"encoder_input_tokens": example["inputs"]},
            "decoder": _predict(example["targets"])}


def _choices(example: dict, eos_id: int) -> Sides:
    """Targets are choices, each ending in EOS: segments that all read the same inputs."""
    import tensorflow as tf
    tokens = example["targets"]
    ends = tokens == eos_id
    segments = 1 + tf.cumsum(tf.cast(ends, tf.int32), exclusive=True)
    starts = tf.concat([[0], 1 + tf.cast(tf.where(ends)[:, 0], tf.int32)], 0)
    positions = tf.range(tf.size(tokens)) - tf.gather(starts, segments - 1)
    is_right = tf.cast(segments == 1, tf.float32)
    return {"encoder": {"encoder_input_tokens": example["inputs"]},
            "decoder": {**_predict(tokens, is_right), "decoder_segment_ids": segments,
                        "decoder_positions": positions}}


def _lm(example: dict, eos_id: int) -> Sides:
    import tensorflow as tf
    if "inputs" not in example:
        return {"decoder": _predict(example["targets"])}
    inputs, targets = example["inputs"], example["targets"]
    weights = tf.concat([tf.zeros_like(inputs, tf.float32), tf.ones_like(targets, tf.float32)], 0)
    return {"decoder": _predict(tf.concat([inputs, targets], 0), weights)}


def _prefix_lm(example: dict, eos_id: int) -> Sides:
    import tensorflow as tf
    decoder = _lm(example, eos_id)["decoder"]
    # Inputs are read one place later: the last of them where the first target is predicted.
    places = tf.range(tf.size(decoder["decoder_target_tokens"]))
    prefix = tf.cast(places <= tf.size(example["inputs"]), tf.int32)
    return {"decoder": {**decoder, "decoder_prefix": prefix}}


def _mlm(example: dict, eos_id: int) -> Sides:
    import tensorflow as tf
    # Targets are 0 wherever the input token was not chosen for prediction, or -1 where id 0 is a
    # token like others (denoising.bert).
    targets = example["targets"]
    chosen = tf.where(tf.reduce_any(targets < 0), targets >= 0, targets != 0)
    return {"encoder": {"encoder_input_tokens": example["inputs"],
                        **_predict(tf.maximum(targets, 0), tf.cast(chosen, tf.float32))}}


def _rows_apart(task: "seqio.Task", inputs_length: int, targets_length: int) -> dict[str, int]:
    """Inputs and targets on a side each."""
    return {"inputs": inputs_length, "targets": targets_length}


def _one_row(task: "seqio.Task", inputs_length: int, targets_length: int) -> dict[str, int]:
    """Inputs and targets share a row of targets_length."""
    if "inputs" not in task.output_features:
        return {"targets": targets_length}
    if targets_length < inputs_length + 2:
        raise UserError(f"data.targets_length={targets_length} is the whole row of a decoder-only "
                        f"model: data.inputs_length={inputs_length} of it are for the inputs of "
                        f"{task.name!r}, and at least 2 more for targets")
    return {"inputs": inputs_length, "targets": targets_length - inputs_length,
            "row": targets_length}


def _inputs_alone(task: "seqio.Task", inputs_length: int, targets_length: int) -> dict[str, int]:
    """Targets stand where the inputs do."""
    return {"inputs": inputs_length, "targets": inputs_length}


_TWO_SIDES = {"encoder": "inputs_length", "decoder": "targets_length"}
_DECODER = {"decoder": "targets_length"}
_CHOICE = {"decoder_segment_ids": "int32", "decoder_positions": "int32"}

# An objective of training/objectives.py names its kind of rows. Add a row to add a kind.
ROWS: dict[str, Rows] = {
    "seq2seq": Rows(
        ("inputs", "targets"), _TWO_SIDES, {"encoder": _INPUTS, "decoder": _TARGETS}, _seq2seq,
        _rows_apart, takes=("pairs",), denoiser="span_corruption"),
    "choices": Rows(
        ("inputs", "targets"), _TWO_SIDES, {"encoder": _INPUTS, "decoder": _TARGETS | _CHOICE},
        _choices, _rows_apart, packs=False),
    "lm": Rows(
        ("targets",), _DECODER, {"decoder": _TARGETS}, _lm, _one_row,
        takes=("text", "pairs"), denoiser="causal_lm", ends=False),
    "prefix_lm": Rows(
        ("inputs", "targets"), _DECODER, {"decoder": {**_TARGETS, "decoder_prefix": "int32"}},
        _prefix_lm, _one_row, takes=("pairs",), denoiser="prefix_lm"),
    "mlm": Rows(
        ("inputs", "targets"), {"encoder": "inputs_length"}, {"encoder": _INPUTS | _TARGETS}, _mlm,
        _inputs_alone, takes=("masked",), denoiser="bert", pairs=False),
}


def of(objective: str) -> Rows:
    """The rows of this kind; an objective of the table of objectives has the kind of its row.

    Raises:
        UserError: no such kind.
    """
    return ROWS[one_of("objective.name", objective, ROWS)]
