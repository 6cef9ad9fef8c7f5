"""Held-out evaluation of one set of parameters, in the loop and alone."""

import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.build import Program
from t5x_lite.config import RunConfig
from t5x_lite.data import (
    batches as data_batches,
    rows as data_rows,
    tasks as data_tasks,
    vocabulary as data_vocabulary,
)
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.evaluation import predictor
from t5x_lite.models.blocks import mixture_metrics
from t5x_lite.training import metrics, objectives

ALL = "all"   # the key of the metrics over every task together


def max_rows(config: RunConfig) -> int | None:
    """Rows of each task that are evaluated at most: the lesser of eval.num_examples and
    eval.num_batches batches, of which 0 is no limit; None: the whole split."""
    size = config.eval.batch_size or config.train.global_batch_size
    limits = [n for n in (config.eval.num_examples, config.eval.num_batches * size) if n]
    return min(limits, default=None)


class Evaluator:
    """Teacher-forced metrics over the validation tasks, and completed samples.

    The batches are read once and kept: evaluation is on the same rows every time.
    """

    def __init__(self, program: Program):
        config = program.config
        self._program = program
        self._eval_step = jax.jit(program.eval_step)
        names = data_tasks.validation_tasks(config.data)
        if names:
            self._vocabulary = data_tasks.vocabulary_of(config.data)
            data_vocabulary.check_vocabulary(
                self._vocabulary, config.model.vocab_size,
                data_tasks.uses_sentinels(config.data, config.objective.rows, held_out=True))
            self._token_bytes = jnp.asarray(
                data_vocabulary.bytes_of_tokens(self._vocabulary, config.model.vocab_size), jnp.float32)
        self._batches = {
            task: list(data_batches.eval_batches(
                config.data, task, objective=config.objective.rows,
                batch_size=config.eval.batch_size or config.train.global_batch_size,
                sharding=program.batch_sharding,
                max_rows=max_rows(config)))
            for task in names}
        self._graded = self._graded_batches()
        self._graded_step = jax.jit(program.graded_step) if self._graded else None
        self._unigram_entropy = {
            name: data_batches.unigram_entropy(batches) for name, batches in self._groups()}
        self._examples = self._tasks_with_metrics()
        if self._examples:
            self._predictor = predictor.Predictor(program, self._vocabulary, config.eval.decode)
        for name, (_, examples) in self._examples.items():
            self._predictor.count([e.get("inputs", ()) for e in examples],
                                  [e["targets"] for e in examples])
            self._predictor.say_misfits(name)

    def _graded_batches(self) -> dict[str, list]:
        """{task: the texts of its rows beside all of data.classes}; {} where there are no classes."""
        config = self._program.config
        if not config.data.classes:
            return {}
        return {task: list(data_batches.graded_batches(
            config.data, task, objective=config.objective.rows,
            batch_size=config.eval.batch_size or config.train.global_batch_size,
            sharding=self._program.batch_sharding, max_rows=max_rows(config)))
            for task in self._batches}

    def _tasks_with_metrics(self) -> dict:
        """{task: (seqio task, as many examples as it has rows)} where it has metric functions."""
        config = self._program.config
        if not config.eval.metrics or not data_rows.of(config.objective.rows).pairs:
            return {}
        metrics = {}
        for name in self._batches:
            task, examples = data_tasks.eval_examples(config.data, name, objective=config.objective.rows)
            if task.predict_metric_fns or task.score_metric_fns:
                metrics[name] = task, list(itertools.islice(
                    examples, max_rows(config)))
        return metrics

    @property
    def has_data(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self._batches)

    def _groups(self):
        """(name, batches) of each task, and of all together where there are several."""
        yield from self._batches.items()
        if len(self._batches) > 1:
            yield ALL, [b for batches in self._batches.values() for b in batches]

    def evaluate(self, params: Mapping) -> dict[str, dict[str, float]]:
        """{task: {loss (nats a target token), accuracy, perplexity, bits_per_byte,
        unigram_entropy, …}}, with ALL where there are several tasks, and what a task's own metric
        functions give under "metric/NAME"."""
        totals = {task: {} for task in self._batches}
        for task, batches in self._batches.items():
            without_number: list[int] = []
            for number, batch in enumerate(batches):
                sums = jax.device_get(self._eval_step(params, batch, self._token_bytes))
                totals[task] = metrics.add(totals[task], sums)
                if not math.isfinite(float(sums["loss"][0])):
                    without_number += self._rows_without_number(params, batch, number)
            if without_number:
                predictor.say_rows(task, predictor.NO_NUMBER, without_number)
        for task, batches in self._graded.items():
            for batch in batches:
                totals[task] = metrics.add(totals[task], jax.device_get(self._graded_step(params, batch)))
        if len(totals) > 1:
            together: dict = {}
            for total in totals.values():
                together = metrics.add(together, total)
            totals[ALL] = together
        results = {task: self._finish(task, total) for task, total in totals.items()}
        for name, (task, examples) in self._examples.items():
            own = predictor.task_metrics(self._predictor, params, task, examples)
            self._predictor.say_rows(name)
            results[name].update({metrics.METRIC + n: v for n, v in own.items()})
        return results

    def _rows_without_number(self, params: Mapping, batch: Mapping, number: int) -> list[int]:
        """Which rows of a task, counted from 0, have a loss that is no number: of its
        number-th batch."""
        score_step = jax.jit(predictor.make_score_step(self._program.model))
        scores = data_batches.whole(score_step(params, batch))
        wrong = np.flatnonzero(~np.isfinite(scores)) if not np.isfinite(scores).all() \
            else np.arange(len(scores))
        return [number * len(scores) + int(row) for row in wrong]

    def _finish(self, task: str, total: Mapping) -> dict[str, float]:
        nats, tokens = map(float, total["loss"])
        num_bytes = float(total["bytes"][0])
        result = metrics.divide(mixture_metrics({n: v for n, v in total.items() if n != "bytes"}))
        if not objectives.OBJECTIVES[self._program.config.objective.name].predicts:
            return result
        return {**result, "perplexity": metrics.perplexity(nats, tokens),
                "bits_per_byte": metrics.bits_per_byte(nats, num_bytes) if num_bytes else math.nan,
                "unigram_entropy": self._unigram_entropy[task]}

    def samples(self, params: Mapping, count: int) -> list[tuple[str, str, str]]:
        """(input, greedy completion, target) texts of held-out rows, the tasks in turn.

        A language model goes on from a row's inputs, or from its first half; a masked one names
        the tokens of a row that are to be named. Of a reward model there are none.
        """
        config = self._program.config
        if not objectives.OBJECTIVES[config.objective.name].predicts:
            return []
        rows = []
        for i in range(count):   # spread over a batch: neighbours come from one document
            task = list(self._batches)[i % len(self._batches)]
            batch = self._batches[task][0]
            place = (i + 1) * batch["decoder_target_tokens"].shape[0] // (count + 1)
            rows.append({name: data_batches.whole(x)[place] for name, x in batch.items()})
        if not data_rows.of(config.objective.rows).pairs:
            return self._named(params, rows)
        pairs = [_example(row) for row in rows]
        predictions = predictor.Predictor(
            self._program, self._vocabulary,
            DecodeConfig(max_length=max(1, *(len(target) for _, target in pairs)))).predict(
                params, [inputs for inputs, _ in pairs])
        return [(self._text(inputs), prediction.texts[0], self._text(target))
                for (inputs, target), prediction in zip(pairs, predictions, strict=True)]

    def _named(self, params: Mapping, rows: Sequence[Mapping]) -> list[tuple[str, str, str]]:
        batch = self._batches[next(iter(self._batches))][0]
        size = batch["decoder_target_tokens"].shape[0]
        batch = {name: np.stack([row[name] for row in rows] * -(-size // len(rows)))[:size]
                 for name in rows[0]}
        model = self._program.model

        def most_likely(params, batch):
            module = model.bind(params)
            return jnp.argmax(module.head(module.head_params(), module(batch, None)[0]), axis=-1)

        sharding = self._program.batch_sharding
        tokens = data_batches.whole(jax.jit(most_likely)(params, {
            name: jax.device_put(x, sharding) for name, x in batch.items()}))
        texts = []
        for i, row in enumerate(rows):
            inputs, asked = row["encoder_input_tokens"], row["decoder_loss_weights"] > 0
            used = row.get("encoder_segment_ids", row.get("encoder_mask")) > 0
            texts.append(tuple(self._text(ids[used]) for ids in (
                inputs, np.where(asked, tokens[i], inputs),
                np.where(asked, row["decoder_target_tokens"], inputs))))
        return texts

    def _text(self, ids) -> str:
        return data_vocabulary.text_of(self._vocabulary, np.asarray(ids))


def _example(row: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, target) tokens of the first example of a row [L]."""
    def first(side: str, tokens: np.ndarray, used: np.ndarray | None) -> np.ndarray:
        if f"{side}_segment_ids" in row:
            used = row[f"{side}_segment_ids"] == 1
        return tokens[:np.flatnonzero(used)[-1] + 1 if used.any() else 0]

    asked = row["decoder_loss_weights"] > 0
    targets = first("decoder", row["decoder_target_tokens"], asked)
    if "encoder_input_tokens" in row:
        return first("encoder", row["encoder_input_tokens"], row.get("encoder_mask")), targets
    begin = int(np.argmax(asked))
    cut = begin or len(targets) // 2
    return targets[:cut], targets[cut:]
