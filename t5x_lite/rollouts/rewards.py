"""What an answer is worth: a Python function, or a reward model.

    objective.rollout.reward=my_module:my_function

    def my_function(prompt: str, answer: str, record: dict) -> float:
        return float(answer.endswith(record["ending"]))

`prompt` is the text of what the model read and `answer` that of what it wrote, both without special
tokens. `record` is the line of the data's .jsonl file, as JSON has it; of another task {"inputs",
"targets"}, texts. Each process calls it for the answers on its own devices, one after another.

    objective.rollout.reward=REWARD_RUN        the workdir of a run with objective.name=reward

reads the last checkpoint of that run, on the mesh of this one; the score of an answer is its reward. A run
that is resumed goes on with the step of it that it began with. A reward that is no finite number, and a
function that fails, ends the run before anything is learned from it.
"""

import dataclasses
import json
import numbers
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from t5x_lite.build import Program
from t5x_lite.data import rows as data_rows, vocabulary as data_vocabulary
from t5x_lite.data.row_names import ANSWER, RECORD, RECORD_END, RECORD_JSON
from t5x_lite.errors import UserError
from t5x_lite.parallel import sharding
from t5x_lite.training import objectives, policy
from t5x_lite.training.policy import REWARD_FIELD as FIELD
from t5x_lite.training.rollouts import ENCODED, Told


class Reward(Protocol):
    """What an answer is worth."""

    def __call__(self, told: Told, prompts: Mapping[str, jax.Array]) -> jax.Array:
        """(what was drawn, the data's prompts) -> float32 [R], split by rows."""

    def memory(self) -> dict[str, Any]:
        """What a resumed run is to judge by, as JSON values."""

    def resume(self, memory: Mapping[str, Any]) -> None:
        """Judges on by the memory of the run's checkpoint; {}: it has none."""


# (program, workdir, step or "last") -> (the parameters of that checkpoint, its step): init_from.restore.
Restore = Callable[[Program, str, int | str], tuple[dict, int]]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One answer as texts, and the record that came with its prompt."""

    prompt: str
    answer: str
    record: Any

    def refuse(self, name: str, value: Any) -> UserError:
        """The error (not raised) of a reward that is no finite number."""
        return UserError(f"{FIELD}={name!r} gives {_short(value)} for the answer {_short(self.answer)} to the "
                         f"prompt {_short(self.prompt)}: must be a finite number, as float32 has it, and this "
                         f"is of type {type(value).__name__}.")

    def failed(self, name: str, error: Exception) -> UserError:
        """The error (not raised) of a reward function that raised one."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        return UserError(f"{FIELD}={name!r} fails for the answer {_short(self.answer)} to the prompt "
                         f"{_short(self.prompt)}: {type(error).__name__}: {error} ({last.filename}, line "
                         f"{last.lineno}).")


def _short(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 200 else f"{value[:200]}…")
    if isinstance(value, int) and abs(value) >= 1 << 1024:
        return f"an integer of {value.bit_length()} bits"   # Python refuses to write the longest out
    return repr(value)[:200]


def as_number(value: Any) -> np.float32 | None:
    """A number, or an array of one without dimensions, as float32; None where that is not finite, or it is
    something else."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        with np.errstate(over="ignore"):
            number = np.float32(float(value))
    except OverflowError:   # of an integer, beyond float64 even
        return None
    return number if np.isfinite(number) else None


class _Reader:
    """Rows on this process's devices as texts."""

    def __init__(self, program: Program, vocabulary):
        self._vocabulary = vocabulary
        self._answers = program.config.objective.rollout.answers
        self._record_length = program.config.data.record_length

    def read(self, told: Told, prompts: Mapping[str, jax.Array]) -> dict[int, list[Drawn]]:
        """{first row: the answers} of each part of R whose rows stand together on a device."""
        held = {name: _parts(x) for name, x in told._asdict().items() if name != "rows"}
        records = _parts(prompts[RECORD])
        return {first * self._answers: self._texts(
            *(held[name][first] for name in ("prompts", "prompt_lengths")),
            *(held[name][first * self._answers] for name in ("answers", "answer_lengths")),
            records[first]) for first in held["prompts"]}

    def _texts(self, prompts_BP, prompt_lengths_B, answers_RA, lengths_R, records_BK) -> list[Drawn]:
        found = []
        for row, (answer, length) in enumerate(zip(answers_RA, lengths_R, strict=True)):
            at = row // self._answers
            prompt = self._text(prompts_BP[at, :prompt_lengths_B[at]])
            found.append(Drawn(prompt, self._text(answer[:length]), self._record(records_BK[at], prompt)))
        return found

    def _text(self, ids: np.ndarray) -> str:
        return data_vocabulary.text_of(self._vocabulary, ids)

    def _record(self, tokens: np.ndarray, prompt: str) -> Any:
        """What the reward function is given of a row of the side "record"."""
        ends = np.flatnonzero(tokens == RECORD_END)
        if not len(ends):
            raise UserError(f"data.record_length={self._record_length} does not hold what belongs to the "
                            f"prompt {_short(prompt)}, which the reward is to read: set more, or leave "
                            "fields out of the file.")
        kind, content = tokens[0], tokens[1:ends[0]]
        if kind == RECORD_JSON:
            return json.loads(bytes(content.astype(np.uint8)))
        return {"inputs": prompt, "targets": self._text(content)}


def _parts(x: jax.Array) -> dict[int, np.ndarray]:
    """{first row: its rows, whole} on this process's devices, of an array that is split by rows."""
    return {shard.index[0].indices(x.shape[0])[0]: np.asarray(shard.data)
            for shard in x.addressable_shards}


class FunctionReward:
    """The reward of a user's function."""

    def __init__(self, program: Program, vocabulary, function: Callable[[str, str, Any], float]):
        self._name = program.config.objective.rollout.reward
        self._function = function
        self._reader = _Reader(program, vocabulary)
        self._place = rows_sharding(program)

    def __call__(self, told: Told, prompts: Mapping[str, jax.Array]) -> jax.Array:
        found, problem = {}, None
        try:
            found = {first: np.array([self._value(one) for one in drawn], np.float32)
                     for first, drawn in self._reader.read(told, prompts).items()}
        except Exception as error:   # every process ends, where one of them must; raised in _agree
            problem = error
        _agree(problem, self._name)
        shape = told.answer_lengths.shape
        return jax.make_array_from_callback(
            shape, self._place, lambda index: found[index[0].indices(shape[0])[0]])

    def _value(self, drawn: Drawn) -> np.float32:
        try:
            value = self._function(drawn.prompt, drawn.answer, drawn.record)
        except Exception as error:
            raise drawn.failed(self._name, error) from error
        if (number := as_number(value)) is None:
            raise drawn.refuse(self._name, value)
        return number

    def memory(self) -> dict[str, Any]:
        """Nothing: the function is what its module says."""
        return {}

    def resume(self, memory: Mapping[str, Any]) -> None:
        """Goes on as it is."""


def _agree(problem: Exception | None, name: str) -> None:
    """Raises the problem, and UserError in the other processes, where any of them met one."""
    bad = problem is not None
    if jax.process_count() > 1:
        bad = bool(np.any(multihost_utils.process_allgather(np.array(bad))))
    if bad:
        raise problem or UserError(f"{FIELD}={name!r}: another process refuses a reward, and says why.")


def rows_sharding(program: Program) -> NamedSharding:
    """That of an array [R] or [R, …] that is split by rows alone."""
    return sharding.named_sharding(program.mesh, program.rules, ("act_batch",))


class ModelReward:
    """The reward of a reward model's last checkpoint, on the run's own mesh.

    judge: the reward model's program, see judges.judge.
    """

    def __init__(self, program: Program, vocabulary, judge: Program, restore: Restore):
        self._name = program.config.objective.rollout.reward
        self._reader = _Reader(program, vocabulary)
        self._restore, self._judge = restore, judge
        self._params, self._step = self._restored("last")
        self._scores = jax.jit(make_scores(self._judge, vocabulary), out_shardings=rows_sharding(program))

    def _restored(self, step: int | str) -> tuple[dict, int]:
        with self._judge.activate():
            return self._restore(self._judge, self._name, step)

    def memory(self) -> dict[str, Any]:
        """Which judge it is, as JSON values."""
        return {"reward": self._name, "step": self._step}

    def resume(self, memory: Mapping[str, Any]) -> None:
        """Goes on with the step of the judge that the memory names, whatever it has learned since; with the
        last where the memory is of another judge, or of a run that did not keep it.

        Raises:
            UserError: that step is gone.
        """
        if memory.get("reward") != self._name or memory["step"] == self._step:
            return
        try:
            self._params, self._step = self._restored(memory["step"])
        except UserError as error:
            raise UserError(f"{FIELD}={self._name!r}: this run began with step {memory['step']} of it, which "
                            f"cannot be read any more ({error}). Put it back; or, to go on with the last "
                            f"(step {self._step}), give {FIELD} another name of the folder.") from error

    def __call__(self, told: Told, prompts: Mapping[str, jax.Array]) -> jax.Array:
        with self._judge.activate():
            scores = self._scores(self._params, told.rows)
        wrong = {first: np.flatnonzero(~np.isfinite(found)) for first, found in _parts(scores).items()}
        problem = None
        for first, rows in wrong.items():
            if len(rows):
                drawn = self._reader.read(told, prompts)[first][rows[0]]
                problem = drawn.refuse(self._name, float(_parts(scores)[first][rows[0]]))
        _agree(problem, self._name)
        return scores


def make_scores(judge: Program, vocabulary) -> Callable:
    """(params, rows of Told) -> float32 [R]: the score where each answer has been read."""
    encodes = data_rows.of(judge.config.objective.rows).has_encoder
    start_id = 0 if encodes else data_vocabulary.start_id(vocabulary)

    def scores(params, rows):
        rules = sharding.active_rules().replace(act_length=(), act_norm_length=())
        with sharding.using(rules):   # a row has a place more than the mesh may split
            rows = {name: sharding.shard(x, "act_batch", None) for name, x in rows.items()}
            weights = rows["decoder_loss_weights"]
            read = jnp.pad(policy.last_tokens(weights), ((0, 0), (1, 0)))
            batch = {name: rows[name] for name in ENCODED if name in rows} | {
                "decoder_input_tokens": jnp.pad(rows["decoder_target_tokens"], ((0, 0), (1, 0)),
                                                constant_values=start_id),
                "decoder_loss_weights": read.astype(jnp.float32), ANSWER: read.astype(jnp.int32)}
            return objectives.answer_score(judge.model.bind(params), batch)
    return scores
