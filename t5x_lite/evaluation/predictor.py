"""From texts to predictions and scores: what infer, interactive and evaluate share.

    predictor = Predictor(program, vocabulary, DecodeConfig(method="beam"))
    with program.activate():
        predictor.predict(params, ["translate English to German: Good."])
        predictor.score(params, ["nq question: who"], ["Ada"])

Rows are of few fixed widths (eval.length_buckets) and batches of a fixed size, so each function
compiles once a width, and a row's result, whose width is a function of its own length, does not
depend on what stands beside it. An encoder-decoder reads the inputs and EOS, as
in training. A prefix LM reads start token, inputs and EOS, all visible to one another. A causal
LM continues start token and inputs, and neither they nor scored targets get an EOS. In both,
inputs and targets share a row of data.targets_length, as in training.

Every process gives the same texts and receives all results; the mesh splits the work.

Shape letters: B rows of a batch, N sequences an input, L positions.
"""

import collections
import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from t5x_lite import log
from t5x_lite.build import Program
from t5x_lite.config import RunConfig
from t5x_lite.data import batches as data_batches, rows as data_rows, vocabulary as data_vocabulary
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.decoding.logits_fn import LogitsFn
from t5x_lite.errors import UserError
from t5x_lite.parallel import sharding
from t5x_lite.training import losses, steps

# What may be wrong with a row, and what to do.
NO_NUMBER = ("a score that is not a number: the model overflows its number format, so use "
             "precision=bf16 or float32, or its parameters hold NaN")
_EMPTY = ("an empty text: the model ends at once, or its tokens spell none; check the vocabulary, "
          "the task's prefix and how long it was trained")

MIN_WIDTH = 64   # narrower inputs are not worth a program of their own

Text = str | Sequence[int]   # a text, or its tokens without padding


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The decoded sequences of one input, best first, and their scores (see decoding.Decoded)."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]   # with the end token, without padding


def widths(config: RunConfig) -> tuple[int, ...]:
    """The widths that inputs are read at, falling: data.inputs_length, its half, its quarter … as many
    as eval.length_buckets. One where a mixture's room for tokens follows from the width."""
    whole = config.data.inputs_length
    halves = [-(-whole // 2**n) for n in range(1, config.eval.length_buckets)]
    return (whole, *(width for width in halves if width >= MIN_WIDTH and not config.model.has_mixtures))


def make_score_step(model):
    """(params, batch) -> float32 [B], the log-probability of each row's weighted targets."""
    def score_step(params, batch):
        module = model.bind(params)
        hidden, _ = module(batch, None)
        log_probs_BL = losses.target_log_probs(
            module.head, module.head_params(), hidden, batch["decoder_target_tokens"])
        weights_BL = batch["decoder_loss_weights"]
        return jax.numpy.sum(jax.numpy.where(weights_BL > 0, log_probs_BL * weights_BL, 0), axis=1)
    return score_step


class Predictor:
    """Predicts and scores texts with given parameters, under program.activate()."""

    def __init__(self, program: Program, vocabulary, decode: DecodeConfig,
                 batch_size: int = 0, logits_fn: LogitsFn | None = None):
        config = program.config
        self._kind = data_rows.of(config.objective.rows)
        if not self._kind.pairs:
            raise UserError(f"objective.name={config.objective.name!r} writes no answers: use a "
                            "seq2seq, lm or prefix_lm model.")
        self._program = program
        self._inputs_length = config.data.inputs_length
        self.widths = widths(config)
        self._targets_length = config.data.targets_length
        self._vocabulary = vocabulary
        if decode.eos_id == DecodeConfig.eos_id:
            decode = dataclasses.replace(decode, eos_id=vocabulary.eos_id)
        self._eos = decode.eos_id
        self._start = data_vocabulary.start_id(vocabulary) if self._kind.shares_row else 0
        self.batch_size = batch_size or config.eval.batch_size or config.train.global_batch_size
        self._decode_step = jax.jit(steps.make_decode_step(program.model, decode, logits_fn))
        self._score_step = jax.jit(make_score_step(program.model))
        self._counts = collections.Counter()   # since the last say_misfits
        self._rows: dict[str, list[int]] = {}   # … and the rows that something is wrong with

    def predict(self, params, inputs: Sequence[Text], row_ids: Sequence[int] | None = None
                ) -> list[Prediction]:
        """A Prediction for each input.

        row_ids: who each row is, for sampling; default: its place in `inputs`.
        """
        ids = np.arange(len(inputs)) if row_ids is None else np.asarray(row_ids)
        predictions: list[Prediction | None] = [None] * len(inputs)
        read = [self._inputs(text, self._inputs_length) for text in inputs]
        for width, rows in self._grouped([len(row) for row in read]):
            batch = self._prompts([read[i] for i in rows], width)
            batch["row_ids"] = _fill(ids[rows], self.batch_size)
            decoded = self._decode_step(params, {n: self._place(x) for n, x in batch.items()})
            tokens_BNL, scores_BN, lengths_BN = map(data_batches.whole, decoded)
            for i, row in enumerate(rows):
                tokens = tuple(tuple(map(int, ids[:n]))
                               for ids, n in zip(tokens_BNL[i], lengths_BN[i], strict=True))
                predictions[row] = Prediction(tuple(map(self._text, tokens)),
                                              tuple(map(float, scores_BN[i])), tokens)
        for row_id, prediction in zip(ids, predictions, strict=True):
            self._look_at(int(row_id), prediction.scores[0], prediction.texts[0])
        return predictions

    def score(self, params, inputs: Sequence[Text], targets: Sequence[Text],
              row_ids: Sequence[int] | None = None) -> list[float]:
        """log p(target | inputs) of each pair, in nats, EOS included but for a causal LM.

        row_ids: who each row is, for say_misfits; default: its place in `inputs`.
        """
        predictions = []
        row_ids = range(len(inputs)) if row_ids is None else row_ids
        for rows in self._batches(len(inputs)):
            batch = self.training_rows([inputs[i] for i in rows], [targets[i] for i in rows])
            scores = self._score_step(params, {n: self._place(x) for n, x in batch.items()})
            predictions += [float(s) for s in data_batches.whole(scores)[:len(rows)]]
        for row, score in zip(row_ids, predictions, strict=True):
            self._look_at(row, score)
        return predictions

    def _look_at(self, row: int, score: float, text: str | None = None) -> None:
        """Remembers a row whose score is no number, or whose text is empty."""
        if not math.isfinite(score):
            rows = self._rows.setdefault(NO_NUMBER, [])
        elif text is not None and not text.strip():
            rows = self._rows.setdefault(_EMPTY, [])
        else:
            return
        if row not in rows[-1:]:   # several targets of one row
            rows.append(row)

    def training_rows(self, inputs: Sequence[Text], targets: Sequence[Text],
                      loss_on_inputs: bool = False) -> dict[str, np.ndarray]:
        """A batch of the objective's features [batch_size, L], the missing rows zeros.

        loss_on_inputs: predict the inputs that share the targets' row too.

        What does not fit is cut: inputs at their end (a causal LM's at their start), to what the
        targets leave of a row that they share; targets at their end where they alone are longer
        than the row. say_misfits tells how many.
        """
        pairs = [self._pair(i, t) for i, t in zip(inputs, targets, strict=True)]
        length = self._targets_length
        if not self._kind.shares_row:
            target_rows = [t for _, t in pairs]
            batch = self._encoder_rows([i for i, _ in pairs], self._inputs_length)
        else:
            batch, target_rows = {}, [[*i, *t] for i, t in pairs]
        tokens = self._pad(target_rows, length)
        weights = (np.arange(length) < _column(map(len, target_rows), self.batch_size))
        if self._kind.shares_row:
            starts = _column((len(i) for i, _ in pairs), self.batch_size)
            weights &= loss_on_inputs | (np.arange(length) >= starts)
            if self._kind.marks_inputs:
                batch["decoder_prefix"] = (np.arange(length) <= starts).astype(np.int32)
        shifted = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=self._start)
        return {**batch, "decoder_input_tokens": shifted, "decoder_target_tokens": tokens,
                "decoder_loss_weights": weights.astype(np.float32)}

    def target_text(self, example: Mapping) -> str:
        """The target of an example of data.eval_examples as text."""
        text = example.get("targets_pretokenized")
        if text is None:
            return self._text(example["targets"])
        return text.decode() if isinstance(text, bytes) else str(text)

    def with_text(self, example: Mapping) -> Mapping:
        """The example with its inputs' text, as "inputs_pretokenized", where it has tokens alone."""
        if "inputs" not in example or "inputs_pretokenized" in example:
            return example
        return {**example, "inputs_pretokenized": self._text(example["inputs"])}

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch on the devices, sharded as in training."""
        return {name: self._place(x) for name, x in batch.items()}

    def _prompts(self, ids: Sequence[Sequence[int]], width: int) -> dict[str, np.ndarray]:
        if not self._kind.shares_row:
            return self._encoder_rows(ids, width)
        prompts = [[self._start, *row] for row in ids]
        width = width + 1
        lengths = np.maximum(_column(map(len, prompts), self.batch_size), 1)
        batch = {"decoder_prompt_tokens": self._pad(prompts, width),
                 "decoder_prompt_lengths": lengths[:, 0].astype(np.int32)}
        if self._kind.marks_inputs:
            batch["decoder_prefix"] = (np.arange(width) < lengths).astype(np.int32)
        return batch

    def _encoder_rows(self, ids: Sequence[Sequence[int]], width: int) -> dict[str, np.ndarray]:
        return {"encoder_input_tokens": self._pad(ids, width),
                "encoder_mask": self._pad([[1] * len(row) for row in ids], width)}

    def _inputs(self, text: Text, room: int) -> list[int]:
        """At most `room` tokens, with EOS but for a causal LM."""
        ids = self._ids(text)
        self._counts["inputs"] += 1
        self._counts["cut inputs"] += len(ids) + self._kind.ends > room
        if not self._kind.ends:
            return ids[max(0, len(ids) - room):]
        return [*ids[:room - 1], self._eos]

    def _pair(self, inputs: Text, targets: Text) -> tuple[list[int], list[int]]:
        """The tokens of both as their row or rows hold them."""
        ids = self._ids(targets)
        end = [self._eos] if self._kind.ends else []
        # Inputs in the row of their targets need room for an EOS of their own.
        room = max(0, self._targets_length - len(end) - (self._kind.shares_row and self._kind.ends))
        self._counts["targets"] += 1
        self._counts["cut targets"] += len(ids) > room
        self._counts["empty targets"] += not ids
        ids = [*ids[:room], *end]
        left = self._inputs_length
        if self._kind.shares_row:
            left = min(left, self._targets_length - len(ids))
        return self._inputs(inputs, left), ids

    def count(self, inputs: Sequence[Text], targets: Sequence[Text]) -> None:
        """Counts what does not fit among pairs, for say_misfits, without using them."""
        for pair in zip(inputs, targets, strict=True):
            self._pair(*pair)

    def say_misfits(self, name: str = "") -> None:
        """Says how many inputs and targets were cut, or empty, since the last time, and what
        say_rows says.

        name: of what they belong to.
        """
        counts, self._counts = self._counts, collections.Counter()
        shared = "" if not self._kind.shares_row else (
            f", or than their targets leave of data.targets_length={self._targets_length},")
        limits = {"inputs": f"data.inputs_length={self._inputs_length}{shared}",
                  "targets": f"data.targets_length={self._targets_length}"}
        before = f"{name}: " if name else ""
        for side, limit in limits.items():
            of = f"of {counts[side]:,} {side} are"
            if counts[f"cut {side}"]:
                log.say(f"{before}{counts[f'cut {side}']:,} {of} longer than {limit} and are cut")
            if counts[f"empty {side}"]:
                log.say(f"{before}{counts[f'empty {side}']:,} {of} empty")
        self.say_rows(name)

    def say_rows(self, name: str = "") -> None:
        """Says which rows have a score that is no number, or an empty text, since the last time."""
        rows, self._rows = self._rows, {}
        for what, which in rows.items():
            say_rows(name, what, which)

    def _ids(self, text: Text) -> list[int]:
        ids = self._vocabulary.encode(text) if isinstance(text, str) else list(map(int, text))
        return ids[:-1] if ids and ids[-1] == self._eos else ids

    def _grouped(self, lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """(width, places of the rows in `lengths`) of each batch: rows of one width together."""
        for width, lower in zip(self.widths, (*self.widths[1:], -1), strict=True):
            rows = [i for i, length in enumerate(lengths) if lower < length <= width]
            for batch in self._batches(len(rows)):
                yield width, [rows[i] for i in batch]

    def _batches(self, count: int) -> Iterator[range]:
        for start in range(0, count, self.batch_size):
            yield range(start, min(start + self.batch_size, count))

    def _pad(self, rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
        table = np.zeros([self.batch_size, width], np.int32)
        for i, row in enumerate(rows):
            table[i, :len(row)] = row
        return table

    def _place(self, array: np.ndarray) -> jax.Array:
        return place(self._program, array)

    def _text(self, ids: Sequence[int]) -> str:
        ids = list(map(int, ids))
        end = ids.index(self._eos) if self._eos in ids else len(ids)
        return data_vocabulary.text_of(self._vocabulary, ids[:end])


def place(program: Program, array: np.ndarray) -> jax.Array:
    """An array [B] or [B, L], whole in every process, on the devices as in training."""
    where = sharding.named_sharding(program.mesh, program.rules,
                                    ("act_batch", "act_length")[:array.ndim])
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def say_rows(name: str, what: str, rows: Sequence[int]) -> None:
    """A warning that these rows, of something with this name, have `what`."""
    shown = ", ".join(map(str, rows[:10])) + (", …" if len(rows) > 10 else "")
    rows_have = f"{len(rows):,} rows have" if len(rows) > 1 else "1 row has"
    log.say(f"warning: {f'{name}: ' if name else ''}{rows_have} {what} (row"
            f"{'s' * (len(rows) > 1)} {shown})")


def task_metrics(predictor: Predictor, params, task, examples: Sequence[Mapping]
                 ) -> dict[str, float]:
    """The metric functions of a seqio task over examples as data.eval_examples gives them.

    predict_metric_fns see the best prediction's text, score_metric_fns the log-probability of
    the targets; both after the task's postprocessor. Values that are no numbers are left out.
    """
    examples = list(map(predictor.with_text, examples))
    inputs = [e.get("inputs", ()) for e in examples]
    targets = [task.postprocess_fn(predictor.target_text(e), example=e, is_target=True)
               for e in examples]
    values: dict = {}
    if task.predict_metric_fns:
        decoded = predictor.predict(params, inputs)
        predictions = [task.postprocess_fn(p.texts[0], example=e, is_target=False)
                       for p, e in zip(decoded, examples, strict=True)]
        for metric_fn in task.predict_metric_fns:
            values.update(metric_fn(targets, predictions))
    if task.score_metric_fns:
        scores = predictor.score(params, inputs, [e["targets"] for e in examples])
        for metric_fn in task.score_metric_fns:
            values.update(metric_fn(targets, scores))
    plain = {name: getattr(v, "value", v) for name, v in values.items()}   # seqio's Scalar
    return {name: float(v) for name, v in plain.items() if isinstance(v, numbers.Real)}


def _column(lengths, size: int) -> np.ndarray:
    return _fill(np.fromiter(lengths, np.int64), size)[:, None]


def _fill(values: np.ndarray, size: int) -> np.ndarray:
    return np.pad(values, (0, size - len(values))).astype(np.int32)
