"""What a row of a batch holds: the one table that makes rows, shapes them and reads them back.

An objective names the kind of rows that it learns from (training/objectives.py), and everything
that handles rows reads that kind here and compares no names: pipeline.py makes them of a task's
examples, batches.py puts them on the devices, build.py knows the shapes before there are any,
evaluation/predictor.py makes them of texts, inspect_task.py shows them.

A row has sides, each of a length that the config fixes: "encoder" and "decoder" are what the model
reads; others (a rejected answer beside a chosen one, say) carry arrays of the names that their
objective's loss asks for. The first array of a side holds its tokens. A side with an array
SIDE_target_tokens gains SIDE_input_tokens, the targets shifted right by one. A side that is read as
it stands gains SIDE_mask, 1 on tokens and 0 on padding, or, packed, SIDE_segment_ids: what was padded
travels with the row. Where texts may hold id 0 the pipeline makes the mask of lengths; where the vocabulary
keeps id 0 for padding, `Rows.masked` makes it of the ids.

TensorFlow is imported by the functions that convert, so that a config can be built and planned
without it.

Shape letter: L positions of one side of a row.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from t5x_lite.data.config import DataConfig
from t5x_lite.data.row_names import (
    ADVANTAGE,
    ANSWER,
    OLD,
    RECORD,
    RECORD_END,
    RECORD_JSON,
    RECORD_TARGETS,
    REFERENCE,
    RETURN,
    REWARD,
    VALUE,
)
from t5x_lite.errors import UserError, one_of

if TYPE_CHECKING:
    import seqio

# A feature that tasks may have, of conversations: the loss weights of the tokens of "inputs".
INPUTS_WEIGHTS = "inputs_weights"
# What to do about a task that lacks a feature, of those that few tasks have.
FIXES = {
    "rejected": 'take a .jsonl file of {"prompt", "chosen", "rejected"}',
    "reference": "python -m t5x_lite.score_preferences writes the reference model's scores into "
                 "the file; or train with peft.method=lora and objective.reference=base, where the "
                 "untuned model is the reference, or with objective.reference=none",
}
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
    # Output features that are read where a task has them.
    optional: tuple[str, ...] = ("inputs",)

    @property
    def has_encoder(self) -> bool:
        """Whether a side of the row, or of a view of it (views.py), is an encoder's."""
        return any(side.endswith("encoder") for side in self.sides)

    @property
    def shares_row(self) -> bool:
        """Whether inputs and targets stand in one row, of data.targets_length."""
        return self.pairs and not self.has_encoder

    @property
    def marks_inputs(self) -> bool:
        """Whether attention looks both ways over the inputs in the decoder's row."""
        return "decoder_prefix" in self.made.get("decoder", {})

    @property
    def compares(self) -> bool:
        """Whether a row holds two answers to one prompt, see `_preference`."""
        return ANSWER in self.made.get("decoder", {})

    @property
    def cuts_prompt(self) -> bool:
        """Whether a decoder's row is several segments, of which a soft prompt before it would reach
        the first alone."""
        return "encoder" not in self.sides and "decoder_segment_ids" in self.made["decoder"]

    @property
    def reading_sides(self) -> list[str]:
        """The sides that are read as they stand, and whose attention looks both ways."""
        return [side for side, arrays in self.made.items() if f"{side}_input_tokens" in arrays]

    def masked(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows {array: [B, L]} of the pipeline with SIDE_mask, int32, where they came without: their
        vocabulary keeps id 0 for padding."""
        bare = [side for side in self.reading_sides
                if f"{side}_mask" not in rows and f"{side}_segment_ids" not in rows]
        return rows | {f"{side}_mask": (rows[f"{side}_input_tokens"] != 0).astype(np.int32)
                       for side in bare}

    def weighted(self, sides: Sides, loss_on_inputs: bool) -> Sides:
        """What `convert` made, with the inputs predicted as well as the targets where asked for.

        Raises:
            UserError: inputs that stand in a row of their own.
        """
        if not loss_on_inputs:
            return sides
        if not self.shares_row or self.compares:
            able = [n for n, kind in ROWS.items() if kind.shares_row and not kind.compares]
            why = ("a loss of two answers has no part for their inputs" if self.compares else
                   "these inputs stand in a row of their own, where nothing predicts them")
            raise UserError(f"data.loss_on_inputs=True: {why}; it is for "
                            f"objective.name={' or '.join(able)}.")
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
            elif side in self.reading_sides:
                dtypes[f"{side}_mask"] = "int32"
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
    before = example.get(INPUTS_WEIGHTS, tf.zeros_like(inputs, tf.float32))
    weights = tf.concat([before, tf.ones_like(targets, tf.float32)], 0)
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


def _preference(example: dict, eos_id: int, shared: bool) -> Sides:
    """Two answers to one prompt, as two segments of the decoder's row: the chosen one, "targets",
    is segment 1 and bears the loss weights; the rejected one is segment 2.

    shared: whether each answer has the prompt in front, in its own segment, as a decoder-only
    model reads it; else the encoder reads it once for both.

    ANSWER is 1 at the tokens of the chosen answer, 2 at those of the rejected one, else 0. Where the
    example has "reference" [2], the log-probabilities of both under a reference model, REFERENCE
    holds each at its answer's first token and is 0 elsewhere.
    """
    import tensorflow as tf
    prompt = example["inputs"] if shared else example["inputs"][:0]
    answers = [example["targets"], example["rejected"]]
    zeros = tf.zeros_like(prompt)
    ones = [tf.ones_like(tokens) for tokens in answers]
    answer = tf.concat([zeros, ones[0], zeros, 2 * ones[1]], 0)
    sizes = [tf.size(prompt) + tf.size(tokens) for tokens in answers]
    decoder = {
        **_predict(tf.concat([prompt, answers[0], prompt, answers[1]], 0),
                   tf.cast(answer == 1, tf.float32)),
        "decoder_segment_ids": tf.concat([tf.fill([n], i) for i, n in enumerate(sizes, 1)], 0),
        "decoder_positions": tf.concat([tf.range(n) for n in sizes], 0), ANSWER: answer}
    if "reference" in example:
        firsts = [tf.size(prompt), sizes[0] + tf.size(prompt)]
        decoder[REFERENCE] = tf.scatter_nd(
            tf.stack(firsts)[:, None], example["reference"], [sizes[0] + sizes[1]])
    encoder = {} if shared else {"encoder": {"encoder_input_tokens": example["inputs"]}}
    return {**encoder, "decoder": decoder}


def _ranked(example: dict, eos_id: int, shared: bool) -> Sides:
    """Two answers to one prompt as in `_preference`, each with a place more, of target 0, where the whole
    answer has been read, EOS included: ANSWER is 1 or 2 there alone."""
    import tensorflow as tf
    prompt = example["inputs"] if shared else example["inputs"][:0]
    decoder: dict = {}
    for number, tokens in enumerate((example["targets"], example["rejected"]), 1):
        inside = tf.concat([tf.zeros_like(prompt), tf.ones_like(tokens), [0]], 0)
        segment = {
            **_predict(tf.concat([prompt, tokens, [0]], 0),
                       tf.cast(inside, tf.float32) if number == 1 else
                       tf.zeros_like(inside, tf.float32)),
            "decoder_segment_ids": number * tf.ones_like(inside),
            "decoder_positions": tf.range(tf.size(inside)),
            ANSWER: tf.concat([tf.zeros_like(inside[1:]), [number]], 0)}
        decoder = {name: tf.concat([decoder[name], x], 0) if decoder else x
                   for name, x in segment.items()}
    encoder = {} if shared else {"encoder": {"encoder_input_tokens": example["inputs"]}}
    return {**encoder, "decoder": decoder}


def _prompt(example: dict, eos_id: int, shared: bool) -> Sides:
    """A prompt that the model is to answer, and what a reward function reads beside it."""
    import tensorflow as tf
    inputs = example["inputs"]
    prompt = {"prompt": {"prompt_tokens": inputs, "prompt_mask": tf.ones_like(inputs)}} if shared else {
        "encoder": {"encoder_input_tokens": inputs}}
    mark, read = (RECORD_JSON, example["record"]) if "record" in example else (
        RECORD_TARGETS, example["targets"])
    return {**prompt, "record": {RECORD: tf.concat([[mark], read, [RECORD_END]], 0)}}


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


def _one_row_of_turns(task: "seqio.Task", inputs_length: int, targets_length: int) -> dict[str, int]:
    """As _one_row; where inputs bear loss as well they may have all of the row."""
    if INPUTS_WEIGHTS not in task.output_features:
        return _one_row(task, inputs_length, targets_length)
    return dict.fromkeys(("inputs", INPUTS_WEIGHTS, "targets", "row"), targets_length)


def _inputs_alone(task: "seqio.Task", inputs_length: int, targets_length: int) -> dict[str, int]:
    """Targets stand where the inputs do."""
    return {"inputs": inputs_length, "targets": inputs_length}


_WHOLE = 1 << 16   # tokens: no record is longer


def _prompt_alone(task: "seqio.Task", inputs_length: int, targets_length: int) -> dict[str, int]:
    """The prompt, and the record whole: a part of it is no record."""
    read = "record" if "record" in task.output_features else "targets"
    return {"inputs": inputs_length, read: _WHOLE}


def _two_answers(task: "seqio.Task", inputs_length: int, targets_length: int, *, shared: bool,
                 more: int = 0) -> dict[str, int]:
    """Half of the decoder's row for each answer, with its prompt where they share the row, and `more`
    places behind."""
    room = targets_length // 2 - shared * inputs_length - more
    if room < 2:
        prompt = f"data.inputs_length={inputs_length} tokens of prompt and " if shared else ""
        raise UserError(f"data.targets_length={targets_length} holds two answers of {task.name!r}, "
                        f"each with {prompt}at least 2 of its own: set at least "
                        f"{2 * (shared * inputs_length + 2 + more)}")
    lengths = {"inputs": inputs_length, "targets": room, "rejected": room}
    return lengths | ({"reference": 2} if "reference" in task.output_features else {})


_TWO_SIDES = {"encoder": "inputs_length", "decoder": "targets_length"}
_DECODER = {"decoder": "targets_length"}
_CHOICE = {"decoder_segment_ids": "int32", "decoder_positions": "int32"}
_ANSWERS = _TARGETS | _CHOICE | {ANSWER: "int32"}

def _preferences(shared: bool, scored: bool) -> Rows:
    """The kind of rows of `_preference`; scored: with REFERENCE."""
    return Rows(
        ("inputs", "targets", "rejected") + ("reference",) * scored,
        _DECODER if shared else _TWO_SIDES,
        ({} if shared else {"encoder": _INPUTS}) | {
            "decoder": _ANSWERS | ({REFERENCE: "float32"} if scored else {})},
        lambda example, eos_id: _preference(
            example if scored else {n: x for n, x in example.items() if n != "reference"},
            eos_id, shared),
        functools.partial(_two_answers, shared=shared), ends=not shared, packs=False)


def _rankings(shared: bool) -> Rows:
    """The kind of rows of `_ranked`."""
    return Rows(
        ("inputs", "targets", "rejected"), _DECODER if shared else _TWO_SIDES,
        ({} if shared else {"encoder": _INPUTS}) | {"decoder": _ANSWERS},
        functools.partial(_ranked, shared=shared),
        functools.partial(_two_answers, shared=shared, more=1), pairs=False, ends=not shared,
        packs=False)


def _prompts(shared: bool) -> Rows:
    """The kind of rows of `_prompt`."""
    side = {"prompt": {"prompt_tokens": "int32", "prompt_mask": "int32"}} if shared else {
        "encoder": _INPUTS}
    return Rows(
        ("inputs",), {next(iter(side)): "inputs_length", "record": "record_length"},
        {**side, "record": {RECORD: "int32"}}, functools.partial(_prompt, shared=shared),
        _prompt_alone, pairs=False, ends=not shared, packs=False,
        optional=("record", "targets"))


def _answered(shared: bool, valued: bool) -> Rows:
    """The kind of rows that hold an answer which the model drew to a prompt (training/policy.py), laid out
    as those of a task's targets are; made of targets they are not judged yet. valued: with ppo's arrays."""
    plain = ROWS["lm" if shared else "seq2seq"]
    added = (OLD, REFERENCE, ADVANTAGE, REWARD) + (VALUE, RETURN) * valued

    def unjudged(example: dict, eos_id: int) -> Sides:
        import tensorflow as tf
        sides = plain.convert(example, eos_id)
        nothing = tf.zeros_like(sides["decoder"]["decoder_loss_weights"])
        return {**sides, "decoder": {**sides["decoder"], **dict.fromkeys(added, nothing)}}

    return dataclasses.replace(plain, convert=unjudged, takes=(), denoiser="", packs=False, made={
        **plain.made, "decoder": {**plain.made["decoder"], **dict.fromkeys(added, "float32")}})


# An objective of training/objectives.py names its kind of rows. Add a row to add a kind.
ROWS: dict[str, Rows] = {
    "seq2seq": Rows(
        ("inputs", "targets"), _TWO_SIDES, {"encoder": _INPUTS, "decoder": _TARGETS}, _seq2seq,
        _rows_apart, takes=("pairs",), denoiser="span_corruption"),
    "choices": Rows(
        ("inputs", "targets"), _TWO_SIDES, {"encoder": _INPUTS, "decoder": _TARGETS | _CHOICE},
        _choices, _rows_apart, packs=False),
    "lm": Rows(
        ("targets",), _DECODER, {"decoder": _TARGETS}, _lm, _one_row_of_turns,
        takes=("text", "pairs"), denoiser="causal_lm", ends=False,
        optional=("inputs", INPUTS_WEIGHTS)),
    "prefix_lm": Rows(
        ("inputs", "targets"), _DECODER, {"decoder": {**_TARGETS, "decoder_prefix": "int32"}},
        _prefix_lm, _one_row, takes=("pairs",), denoiser="prefix_lm"),
    "mlm": Rows(
        ("inputs", "targets"), {"encoder": "inputs_length"}, {"encoder": _INPUTS | _TARGETS}, _mlm,
        _inputs_alone, takes=("masked",), denoiser="bert", pairs=False),
    "preferences": _preferences(shared=True, scored=False),
    "scored_preferences": _preferences(shared=True, scored=True),
    "seq2seq_preferences": _preferences(shared=False, scored=False),
    "seq2seq_scored_preferences": _preferences(shared=False, scored=True),
    "rankings": _rankings(shared=True),
    "seq2seq_rankings": _rankings(shared=False),
}

ROWS |= {"prompts": _prompts(shared=True), "seq2seq_prompts": _prompts(shared=False),
         "answers": _answered(True, False), "seq2seq_answers": _answered(False, False),
         "valued_answers": _answered(True, True), "seq2seq_valued_answers": _answered(False, True)}


def of(objective: str) -> Rows:
    """The rows of this kind; an objective of the table of objectives has the kind of its row.

    Raises:
        UserError: no such kind.
    """
    return ROWS[one_of("objective.name", objective, ROWS)]
