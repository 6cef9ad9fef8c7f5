"""Train, predict, score and evaluate on plain lists, in a notebook.

    from t5x_lite import interactive
    session = interactive.load("runs/my_run")               # or interactive.start(config)
    session.train([("2 + 2", "4"), ("3 + 1", "4")], num_steps=20)
    session.predict(["2 + 3"], method="beam", beam_size=4)   # ["5"]
    session.chat([[{"role": "user", "content": "2 + 3?"}]])  # ["5"], by the tokenizer's chat template
    session.score(["2 + 3"], ["5"])                          # [-0.31], nats
    session.evaluate([("2 + 3", "5")], [metrics.accuracy])   # {"accuracy": 100.0}

Nothing is written; the steps are those of t5x_lite.train, on the config's mesh.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import

# isort: split

import jax
import numpy as np

from t5x_lite import config as configs, errors, files, init_from
from t5x_lite.build import Program, build
from t5x_lite.config import RunConfig
from t5x_lite.data import tasks as data_tasks, vocabulary as data_vocabulary
from t5x_lite.data.chat_prompts import ChatPrompts
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.decoding.logits_fn import LogitsFn
from t5x_lite.errors import UserError
from t5x_lite.evaluation.predictor import Predictor
from t5x_lite.training import metrics

Examples = Sequence[tuple[str, str]]   # (inputs, targets)
MAX_PREDICTORS = 8   # that a session keeps, each with its compiled functions


class Session:
    """A model with its parameters and optimizer state, in this process's memory.

    program: what build gave. state: as training keeps it; step counts the steps done here.
    """

    def __init__(self, program: Program, state: dict):
        self.program = program
        self.state = state
        self._vocabulary = data_tasks.vocabulary_of(program.config.data)
        data_vocabulary.check_vocabulary(self._vocabulary, program.config.model.vocab_size,
                              sentinels=False)
        self._train_step = program.jit_train_step()
        self._predictors: dict[tuple, Predictor] = {}   # with compiled functions; newest last

    @property
    def params(self) -> dict:
        """The whole model's parameters, nested; what models/peft.py trains is merged in,
        and the moving average is taken where the run keeps one (train.ema_decay, eval.ema)."""
        return self.program.evaluated_params(self.state)

    def train(self, examples: Examples, num_steps: int) -> list[float]:
        """Steps over the examples, shuffled anew each epoch; the loss (nats a token) of each."""
        examples = _pairs(examples, "train on")
        config = self.program.config
        size = config.train.global_batch_size
        rows = self._predictor(config.eval.decode, size)
        order = _endless(len(examples), config.train.seed, int(self.state["step"]) * size)
        losses = []
        with self.program.activate():
            for _ in range(num_steps):
                chosen = [examples[next(order)] for _ in range(size)]
                batch = rows.place(rows.training_rows(
                    *zip(*chosen, strict=True), config.data.loss_on_inputs))
                self.state, sums = self._train_step(self.state, batch)
                losses.append(metrics.divide({"loss": jax.device_get(sums["loss"])})["loss"])
        rows.say_misfits()
        return losses

    def predict(self, inputs: Sequence[str], **decode) -> list[str]:
        """The best continuation of each input; decode: fields of DecodeConfig. logits_fn may be a
        function (decoding/logits_fn.py) as well as its name."""
        return [p.texts[0] for p in self.predict_many(inputs, **decode)]

    def predict_many(self, inputs: Sequence[str], **decode) -> list:
        """All sequences of each input with their scores, as predictor.Prediction."""
        inputs = _texts(inputs, "inputs")
        own = decode.pop("logits_fn") if callable(decode.get("logits_fn")) else None
        config = _decode_config(self.program.config.eval.decode, decode)
        predictor = self._predictor(config, logits_fn=own)
        with self.program.activate():
            predictions = predictor.predict(self.params, inputs)
        predictor.say_misfits()
        return predictions

    def chat(self, conversations: Sequence[Sequence[Mapping[str, str]]], **decode) -> list[str]:
        """The assistant's next message in each conversation, a list of {"role", "content"} that the
        chat template of the vocabulary writes out; decode: fields of DecodeConfig."""
        prompts = ChatPrompts(self.program.config.data)
        read = [prompts.prompt({"messages": list(turns)}, f"conversation {number}")[1]
                for number, turns in enumerate(conversations, 1)]
        config = prompts.ending(_decode_config(self.program.config.eval.decode, decode))
        predictor = self._predictor(config)
        with self.program.activate():
            predictions = predictor.predict(self.params, read)
        predictor.say_misfits()
        return [p.texts[0] for p in predictions]

    def score(self, inputs: Sequence[str], targets: Sequence[str]) -> list[float]:
        """log p(target | input) of each pair, in nats."""
        inputs, targets = _texts(inputs, "inputs"), _texts(targets, "targets")
        if len(inputs) != len(targets):
            raise UserError(f"{len(inputs)} inputs and {len(targets)} targets to score")
        predictor = self._predictor(self.program.config.eval.decode)
        with self.program.activate():
            scores = predictor.score(self.params, inputs, targets)
        predictor.say_misfits()
        return scores

    def evaluate(self, examples: Examples, metric_fns: Sequence[Callable] = (), **decode
                 ) -> dict[str, float]:
        """What metric functions (targets, predictions) -> {name: value} give, and "score": the
        mean log-probability of the targets."""
        inputs, targets = map(list, zip(*_pairs(examples, "evaluate on"), strict=True))
        values: dict[str, float] = {}
        if metric_fns:
            predictions = self.predict(inputs, **decode)
            for metric_fn in metric_fns:
                values.update(metric_fn(targets, predictions))
        return {**values, "score": float(np.mean(self.score(inputs, targets)))}

    def _predictor(self, decode: DecodeConfig, batch_size: int = 0,
                   logits_fn: LogitsFn | None = None) -> Predictor:
        """The predictor of these settings. It is the session's own, and goes when that goes."""
        key = (decode, batch_size, logits_fn)
        predictor = self._predictors.pop(key, None)
        if predictor is None:
            predictor = Predictor(self.program, self._vocabulary, decode, batch_size, logits_fn)
        while len(self._predictors) >= MAX_PREDICTORS:
            del self._predictors[next(iter(self._predictors))]
        self._predictors[key] = predictor
        return predictor


def start(config: RunConfig) -> Session:
    """A session with the parameters of config.init_from, or fresh ones."""
    cli.show_own_lines()
    program = build(config)
    return Session(program, init_from.start(program))


def load(workdir: str | os.PathLike, step: int | str = "last", overrides: Sequence[str] = ()
         ) -> Session:
    """A session with a checkpoint's parameters and a fresh optimizer.

    overrides: "field=value" of the run's config, as t5x_lite.eval takes them.
    """
    cli.show_own_lines()
    workdir = files.path(workdir)
    program = build(configs.override(cli.saved_config(workdir), overrides))
    return Session(program, init_from.restore_state(program, workdir, step)[0])


def _texts(texts: Iterable[str], what: str) -> list[str]:
    """The texts as a list. Raises UserError for a single string, and for what is no string."""
    if isinstance(texts, str):
        raise UserError(f"{what} must be a list of strings; for one, write [{texts!r}]")
    texts = list(texts)
    wrong = next((t for t in texts if not isinstance(t, str)), None)
    if wrong is not None:
        raise UserError(f"{what} must be strings, not {type(wrong).__name__} ({wrong!r})")
    return texts


def _pairs(examples: Examples, what: str) -> list[tuple[str, str]]:
    """The examples as a list. Raises UserError for none, and for what is no pair of strings."""
    examples = list(examples)
    if not examples:
        raise UserError(f"no examples to {what}")
    wrong = next((e for e in examples if isinstance(e, str) or len(e) != 2), None)
    if wrong is not None:
        raise UserError(f"examples must be pairs (inputs, targets), not {wrong!r}")
    _texts([text for pair in examples for text in pair], "inputs and targets of examples")
    return examples


def _decode_config(config: DecodeConfig, changes: dict) -> DecodeConfig:
    fields = [field.name for field in dataclasses.fields(config)]
    for name in changes:
        errors.known("decode", "field", name, fields)
    return dataclasses.replace(config, **changes)


def _endless(count: int, seed: int, start: int) -> Iterator[int]:
    """Numbers below count, every epoch in another order; goes on behind the first `start`."""
    epoch, skip = divmod(start, count)
    while True:
        yield from np.random.default_rng((seed, epoch)).permutation(count)[skip:]
        epoch, skip = epoch + 1, 0
