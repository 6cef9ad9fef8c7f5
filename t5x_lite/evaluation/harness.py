"""A model of ours for lm-evaluation-harness (Gao et al. 2024, doi:10.5281/zenodo.12608602): extra [lm_eval].

    python -m t5x_lite.eval --workdir=DIR --harness=hellaswag,lambada_openai
    lm_eval --model t5x_lite --model_args workdir=DIR --tasks hellaswag
    python -m t5x_lite.evaluation.harness run --model t5x_lite --model_args workdir=DIR --tasks hellaswag

The first stays in our own command and writes WORKDIR/eval.jsonl; the second is the harness's own program,
which finds the model where t5x_lite is installed by pip (harness_name.py); the third is that program from
a checkout, with our messages in one line. What --model_args takes are the arguments of HarnessModel.
Texts become tokens and windows as in the harness's own `hf` model, so that a workdir and its export to
hf:DIR get the same numbers:

  * A causal LM reads context and continuation as one text, cut at its left to max_length; a start token
    stands in front where the tokenizer's own template puts one, and with other vocabularies as in training.
  * An encoder-decoder reads the context and EOS; the continuation has no EOS. A prefix LM reads start
    token, context and EOS, all visible to one another.
  * A text stops before the first of its `until` strings. Decoding ends as soon as a token holds one.

Every process asks for the same and receives all results; the mesh splits a batch.

Shape letters: B rows of a batch, L positions.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from t5x_lite.errors import UserError, one_of

try:
    from lm_eval import utils as harness_utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise UserError(f"lm-evaluation-harness cannot be imported ({error}): pip install "
                    "'t5x_lite[lm_eval]'") from error

import jax
import numpy as np

from t5x_lite import files, init_from, log
from t5x_lite.build import Program, build
from t5x_lite.config import load
from t5x_lite.data import batches, rows as data_rows, tasks, vocabulary as data_vocabulary
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.evaluation import harness_name, predictor
from t5x_lite.training import losses, steps

BOOTSTRAP_SAMPLES = 1000   # of a standard error that has no formula
SMALLEST_WIDTH = 16   # rows are padded to this and its doubles, so that few programs are compiled

# Fields of DecodeConfig by what the harness calls them in generation_kwargs.
_DECODE = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p",
           "repetition_penalty": "repetition_penalty",
           "no_repeat_ngram_size": "no_repeat_ngram_size", "min_new_tokens": "min_length"}
_SAMPLING = ("temperature", "top_k", "top_p")
_OURS = {"do_sample", "until", "max_gen_toks"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What is scored: log p(continuation | context), in tokens; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


def make_score_step(model) -> Callable:
    """(params, batch) -> (float32 [B] log-probability of the weighted targets, bool [B] whether all
    of them are the most likely tokens)."""
    def score_step(params, batch):
        module = model.bind(params)
        hidden, _ = module(batch, None)
        log_probs_BL, greedy_BL = losses.target_scores(
            module.head, module.head_params(), hidden, batch["decoder_target_tokens"])
        asked_BL = batch["decoder_loss_weights"] > 0
        return (jax.numpy.sum(jax.numpy.where(asked_BL, log_probs_BL, 0), axis=1),
                jax.numpy.all(greedy_BL | ~asked_BL, axis=1))
    return score_step


class HarnessModel(TemplateLM):
    """The harness's interface to the parameters of a workdir.

    Args:
        workdir, step: the checkpoint, "last" or a number. Or `program` and `params`, which are there.
        override: fields of the run's config, "a.b=c;d=e".
        max_length: tokens that a row may have, of the encoder as of the decoder; 0: what the run was
            trained with (data.targets_length, of an encoder-decoder the longer of both lengths).
        max_gen_toks: tokens to write where a task does not say.
        start: whether a causal LM reads a start token first; None: see the module's head.
        batch_size: rounded up to what the mesh splits; 0 or "auto": the run's.
        max_batch_size, device: what the harness gives every model; JAX chooses the devices.

    Raises:
        UserError: no checkpoint, or a model without a decoder.
    """

    def __init__(self, workdir: str = "", step: int | str = "last", override: str = "",
                 max_length: int = 0, max_gen_toks: int = 256, start: bool | None = None,
                 batch_size: int | str | None = 0, max_batch_size: int | None = None,
                 device: str | None = None, *, program: Program | None = None,
                 params: Mapping | None = None):
        super().__init__()
        if program is None:
            program, params = _restored(workdir, step, override)
        self._program, self._params = program, params
        config = program.config
        self._kind = data_rows.of(config.objective.rows)
        if not self._kind.pairs:
            raise UserError(f"objective.name={config.objective.name!r} has no decoder: the harness "
                            "evaluates seq2seq, lm and prefix_lm models.")
        self.backend = "seq2seq" if self._kind.ends else "causal"
        self._vocabulary = tasks.vocabulary_of(config.data)
        self._start = data_vocabulary.start_id(self._vocabulary) if self._kind.shares_row else 0
        self._starts = not self._kind.ends and (
            getattr(self._vocabulary, "starts_texts", True) if start is None else start)
        self.max_length = max_length or (
            config.data.targets_length if self._kind.shares_row else
            max(config.data.inputs_length, config.data.targets_length))
        self.max_gen_toks = max_gen_toks
        self.batch_size = _batch_size(batch_size, program)
        self._score_step = jax.jit(make_score_step(program.model))
        self._decode_steps: dict[DecodeConfig, Callable] = {}
        self._holding: dict[str, tuple[int, ...]] = {}

    # --- what the harness asks of a tokenizer ------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self._vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is read after."""
        return self.eot_token_id if self._kind.ends else self._start

    @property
    def tokenizer_name(self) -> str:
        """Names the vocabulary in the harness's caches."""
        return data_vocabulary.vocabulary_identity(self._vocabulary)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Tokens of a text: a start token in front, or EOS behind, unless add_special_tokens=False."""
        ids = [int(i) for i in self._vocabulary.encode(string)]
        if add_special_tokens is False:
            return ids
        return [*([self._start] if self._starts else []), *ids,
                *([self.eot_token_id] if self._kind.ends else [])]

    # --- what the harness asks of a model ------------------------------------------------------

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_
                              ) -> list[tuple[float, bool]]:
        """[(log-probability, whether greedy decoding says the same)] of (texts, context tokens,
        continuation tokens)."""
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        for (texts, _, _), pair in zip(requests, pairs, strict=True):
            self._check(texts, pair)
        found = self._score(pairs)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _check(self, texts: tuple[str, str] | None, pair: Request) -> None:
        if not pair.continuation:
            raise UserError(f"{texts!r}: the continuation has no tokens of its own.")
        if len(pair.continuation) > self.max_length:
            raise UserError(f"a continuation of {len(pair.continuation)} tokens is longer than "
                            f"max_length={self.max_length}: give a larger one "
                            "(--harness_args=max_length=N, --model_args max_length=N).")

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of max_length tokens."""
        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            found = harness_utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
            own = [Request(*harness_utils.make_disjoint_window(pair)) for pair in found]
            windows += own
            counts.append(len(own))
        scores = iter(score for score, _ in self._score(windows))
        totals = [sum(next(scores) for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The texts that continue contexts, each up to the first of its stop strings."""
        asked = [(context, normalize_gen_kwargs(kwargs, self.max_gen_toks))
                 for context, kwargs in (request.args for request in requests)]
        groups: dict[DecodeConfig, list[int]] = {}
        for number, (_, kwargs) in enumerate(asked):
            groups.setdefault(self._decode_config(kwargs), []).append(number)
        texts = [""] * len(requests)
        for decode, numbers in groups.items():
            prompts = [self._prompt(asked[n][0], decode.max_length) for n in numbers]
            for number, text in zip(numbers, self._write(prompts, decode), strict=True):
                texts[number] = _until(text, asked[number][1]["until"])
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    # --- scores ----------------------------------------------------------------------------------

    def _score(self, pairs: Sequence[Request]) -> list[tuple[float, bool]]:
        def run(chosen: Sequence[Request]):
            scores, greedy = self._score_step(self._params, self._placed(self._rows(chosen)))
            return zip(batches.whole(scores).tolist(), batches.whole(greedy).tolist(), strict=True)

        return self._in_batches(
            pairs, lambda pair: len(pair.context) + len(pair.continuation), run, "scored")

    def _rows(self, pairs: Sequence[Request]) -> dict[str, np.ndarray]:
        """A batch of the objective's features, [batch_size, L]."""
        batch, read, targets, marked = {}, [], [], []
        for pair in pairs:
            context, wanted = list(pair.context), list(pair.continuation)
            if not self._kind.shares_row:
                row = [0, *wanted]
            elif self._kind.ends:
                row = [self._start, *context[-max(self.max_length - len(wanted), 1):], *wanted]
            else:   # the context's first token is read where training has the start token
                row = [*context, *wanted][-(self.max_length + 1):]
            read.append(row[:-1])
            targets.append(row[1:])
            marked.append(len(wanted))
        if not self._kind.shares_row:
            batch = self._encoder_rows([p.context for p in pairs])
        lengths_B1 = _column([len(r) for r in targets], self.batch_size)
        target_tokens_BL = self._pad(targets)
        places = np.arange(target_tokens_BL.shape[1])
        starts_B1 = lengths_B1 - _column(marked, self.batch_size)
        if self._kind.marks_inputs:
            batch["decoder_prefix"] = (places <= starts_B1).astype(np.int32)
        weights_BL = (places >= starts_B1) & (places < lengths_B1)
        return {**batch, "decoder_input_tokens": self._pad(read),
                "decoder_target_tokens": target_tokens_BL,
                "decoder_loss_weights": weights_BL.astype(np.float32)}

    # --- texts ------------------------------------------------------------------------------------

    def _decode_config(self, kwargs: Mapping[str, Any]) -> DecodeConfig:
        """How to decode what a task's generation_kwargs, normalised, ask for.

        Raises:
            UserError: one that we do not have, or no room for the context.
        """
        unknown = sorted(name for name, value in kwargs.items()
                         if name not in {*_DECODE, *_OURS} and value is not None)
        if unknown:
            raise UserError(f"generation_kwargs {', '.join(unknown)}: not supported; there are "
                            f"{', '.join(sorted({*_DECODE, *_OURS}))}.")
        length = kwargs["max_gen_toks"]
        if self._kind.shares_row and length >= self.max_length:
            raise UserError(f"max_gen_toks={length} leaves no room for a context in "
                            f"max_length={self.max_length}: give a smaller or a larger one.")
        fields = {_DECODE[name]: value for name, value in kwargs.items()
                  if name in _DECODE and value is not None}
        if not kwargs["do_sample"]:
            fields = {name: v for name, v in fields.items() if name not in _SAMPLING}
        method = "sample" if kwargs["do_sample"] else "greedy"
        stop_ids = {i for text in kwargs["until"] if text for i in self._tokens_holding(text)}
        return DecodeConfig(method=method, max_length=length, eos_id=self.eot_token_id,
                            stop_ids=tuple(sorted(stop_ids - {self.eot_token_id})), **fields)

    def _tokens_holding(self, text: str) -> tuple[int, ...]:
        """The ids that no text without `text` has."""
        if text not in self._holding:
            size = min(self._vocabulary.vocab_size, self._program.config.model.vocab_size)
            self._holding[text] = tuple(i for i, piece in enumerate(self._pieces(size))
                                        if text in piece)
        return self._holding[text]

    @functools.lru_cache(maxsize=1)   # noqa: B019   one model a process
    def _pieces(self, size: int) -> list[str]:
        return [data_vocabulary.text_of(self._vocabulary, [i]) for i in range(size)]

    def _prompt(self, context: str, new: int) -> list[int]:
        """The context's tokens, cut at the left to leave room for `new` ones in a row that both share."""
        room = self.max_length - new if self._kind.shares_row else self.max_length
        if self._kind.shares_row and self._kind.ends:
            return [self._start, *self.tok_encode(context)[-max(room - 1, 1):]]
        return self.tok_encode(context)[-room:] or [self.prefix_token_id]

    def _write(self, prompts: Sequence[list[int]], decode: DecodeConfig) -> list[str]:
        step = self._decode_steps.setdefault(
            decode, jax.jit(steps.make_decode_step(self._program.model, decode)))

        def run(chosen: Sequence[tuple[int, list[int]]]):
            batch = self._prompt_rows([prompt for _, prompt in chosen])
            numbers = [number for number, _ in chosen]
            batch["row_ids"] = _column(numbers, self.batch_size)[:, 0]
            decoded = step(self._params, self._placed(batch))
            tokens_BL, lengths_B = (batches.whole(x)[:, 0] for x in (decoded.tokens,
                                                                     decoded.lengths))
            return [self._text(row[:n]) for row, n in zip(tokens_BL, lengths_B, strict=True)]

        return self._in_batches(list(enumerate(prompts)), lambda item: len(item[1]), run, "written")

    def _prompt_rows(self, prompts: Sequence[list[int]]) -> dict[str, np.ndarray]:
        if not self._kind.shares_row:
            return self._encoder_rows(prompts)
        tokens_BL = self._pad(prompts)
        lengths_B1 = np.maximum(_column(map(len, prompts), self.batch_size), 1)
        batch = {"decoder_prompt_tokens": tokens_BL, "decoder_prompt_lengths": lengths_B1[:, 0]}
        if self._kind.marks_inputs:
            batch["decoder_prefix"] = (np.arange(tokens_BL.shape[1]) < lengths_B1).astype(np.int32)
        return batch

    def _text(self, ids: np.ndarray) -> str:
        ids = ids.tolist()
        end = ids.index(self.eot_token_id) if self.eot_token_id in ids else len(ids)
        return data_vocabulary.text_of(self._vocabulary, ids[:end])

    # --- rows -------------------------------------------------------------------------------------

    def _encoder_rows(self, contexts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        contexts = [list(ids)[-self.max_length:] for ids in contexts]
        return {"encoder_input_tokens": self._pad(contexts),
                "encoder_mask": self._pad([[1] * len(ids) for ids in contexts])}

    def _in_batches(self, items: Sequence, length: Callable, run: Callable, done: str) -> list:
        """What run(at most batch_size items) gives of all, in their order; the longest go first."""
        order = sorted(range(len(items)), key=lambda i: -length(items[i]))
        found: list = [None] * len(items)
        with self._program.activate():
            for chosen in _cut(order, self.batch_size):
                results = run([items[i] for i in chosen])
                for i, result in zip(chosen, results, strict=False):   # what follows is padding
                    found[i] = result
        log.say(f"{len(items):,} {done}")
        return found

    def _pad(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """int32 [batch_size, L], L the least width that holds them all; zeros elsewhere."""
        width = SMALLEST_WIDTH
        while width < max(map(len, rows)):
            width *= 2
        limit = self.max_length + self._kind.shares_row * self._kind.ends
        table = np.zeros([self.batch_size, max(min(width, limit), max(map(len, rows)))], np.int32)
        for i, row in enumerate(rows):
            table[i, :len(row)] = row
        return table

    def _placed(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: predictor.place(self._program, x) for name, x in batch.items()}


def _restored(workdir: str, step: int | str, override: str) -> tuple[Program, Mapping]:
    """The program of a workdir, and the parameters of a step."""
    if not workdir:
        raise UserError("--model_args workdir=DIR: the folder of the run to evaluate.")
    folder = files.path(workdir)
    program = build(load(folder / "config.json", [o for o in override.split(";") if o]))
    with program.activate():
        return program, init_from.restore(program, folder, step)[0]


def _batch_size(asked: int | str | None, program: Program) -> int:
    config = program.config
    if isinstance(asked, str) and asked.isdigit():
        asked = int(asked)
    size = asked if isinstance(asked, int) and asked > 0 else (
        config.eval.batch_size or config.train.global_batch_size)
    axes = program.rules.mesh_axes("act_batch")
    shards = int(np.prod([program.mesh.shape[axis] for axis in axes]))
    return -(-size // shards) * shards


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the first of these."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


def _cut(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for begin in range(0, len(order), size):
        yield order[begin:begin + size]


def _column(numbers, size: int) -> np.ndarray:
    """int32 [size, 1] of at most so many numbers, zeros behind them."""
    found = np.fromiter(numbers, np.int32)
    return np.pad(found, (0, size - len(found)))[:, None]


# --- as a command ------------------------------------------------------------------------------------

def model_of(program: Program, params: Mapping, arguments: str) -> HarnessModel:
    """The model that arguments like "max_length=512,start=True" describe. Raises UserError for one
    that there is not."""
    given = harness_utils.simple_parse_args_string(arguments)
    known = ("max_length", "max_gen_toks", "start", "batch_size")
    for name in given:
        one_of("--harness_args", name, known)
    return HarnessModel(program=program, params=params, **given)


def evaluate(model: HarnessModel, names: Sequence[str], folder: str = "", limit: int = 0,
             num_fewshot: int | None = None) -> tuple[dict[str, dict[str, float]], str]:
    """({task: {metric: value}}, the harness's table) of its tasks by name.

    Args:
        folder: of further tasks as YAML files; "": the harness's own alone.
        limit: examples a task; 0: all.
        num_fewshot: solved examples before each; None: as the task says.
    Raises:
        UserError: a task that there is not.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=folder or None)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UserError(f"--harness={','.join(unknown)}: the harness has no such task"
                        f"{f', nor has {folder}' if folder else ''}; `lm_eval ls tasks` lists them.")
    os.environ["DISABLE_MULTIPROC"] = "1"   # its bootstrap forks, which JAX's threads do not survive
    found = simple_evaluate(model, tasks=list(names), task_manager=manager, limit=limit or None,
                            num_fewshot=num_fewshot, log_samples=False,
                            bootstrap_iters=BOOTSTRAP_SAMPLES)
    values = {task: {metric.removesuffix(",none"): float(value) for metric, value in of.items()
                     if isinstance(value, (int, float))} for task, of in found["results"].items()}
    return values, harness_utils.make_table(found)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    from t5x_lite import cli

    harness_name.register()
    cli.show_own_lines()
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(cli.EXIT_USER_ERROR)
