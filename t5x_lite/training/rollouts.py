"""Drawing answers on the devices: pure functions of (state, prompts) that make what a step learns from.

    told = draw(state, prompts)            sampled answers, laid out as rows, and measured
    rows = judged(told.rows, rewards_R)    with what each of their tokens was worth

What is drawn follows from train.seed, the step and the row of the global batch, so that a resumed run
draws what the uninterrupted one drew, on any mesh. In between stands the reward, which may be Python
(rollouts/rewards.py).

Shape letters: B prompts, N answers to each, R = B N rows, prompt by prompt; P prompt tokens, A tokens of an
answer, L positions of a row.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_lite import tree
from t5x_lite.data import rows as data_rows
from t5x_lite.data.row_names import OLD, REFERENCE, REWARD, VALUE
from t5x_lite.decoding import decode as decoding
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.parallel import sharding
from t5x_lite.training import policy, steps
from t5x_lite.training.policy_losses import drawn
from t5x_lite.training.state import State
from t5x_lite.training.steps import Batch, Differentiated

ENCODED = ("encoder_input_tokens", "encoder_mask")   # what an encoder reads of the prompts


class Told(NamedTuple):
    """What `draw` gives: rows to be judged, and what a judge reads, split by rows alone."""

    rows: dict[str, jax.Array]   # {array of data/rows.py: [R, L]}, but for what follows from rewards
    prompts: jax.Array           # int32 [B, P], and how many of them are tokens, [B]
    prompt_lengths: jax.Array
    answers: jax.Array           # int32 [R, A], the end token included
    answer_lengths: jax.Array    # int32 [R]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How answers are drawn, fixed when the run is built."""

    of: Differentiated
    places: Mapping[str, jax.sharding.PartitionSpec]   # of each parameter while decoding
    prompts_a_batch: int   # of a full one; smaller ones do not draw with another's keys
    row_length: int        # L
    answer_length: int     # A
    start_id: int          # what a decoder reads before its row
    eos_id: int
    seed: int
    stop_ids: tuple[int, ...] = ()   # where an answer ends, too: with the turn of a conversation

    @property
    def shares_row(self) -> bool:
        """Whether the prompt stands in the decoder's row."""
        return data_rows.of(self.of.objective.learned).shares_row

    @property
    def decode(self) -> DecodeConfig:
        rollout = self.of.objective.rollout
        return DecodeConfig(
            method="sample", num_samples=rollout.answers, temperature=rollout.temperature,
            max_length=self.answer_length, eos_id=self.eos_id, seed=self.seed, stop_ids=self.stop_ids)


def make_draw(drawing: Drawing) -> Callable[[State, Batch], Told]:
    """(state without its optimizer, prompts as rows of objective.given) -> Told."""
    of, rollout = drawing.of, drawing.of.objective.rollout
    decode_step = steps.make_decode_step(of.model, drawing.decode)

    def draw(state, prompts):
        flat = tree.flatten(state["params"]) | tree.flatten(state.get("frozen", {}))
        whole = of.tuning.combine(flat, {})
        decoded = decode_step(_placed(whole, drawing.places), {
            **_asked(prompts, drawing), "row_ids": _row_ids(state["step"], prompts, drawing)})
        tokens_BP, lengths_B = _prompt_tokens(prompts)
        before = (tokens_BP, lengths_B) if drawing.shares_row else (tokens_BP[:, :0], 0 * lengths_B)
        local = functools.partial(
            decoding.per_row, batch_axes=decoding.batch_axes_of(decoded.lengths))
        rows = local(functools.partial(lay_out, length=drawing.row_length, start=drawing.start_id))(
            *before, decoded.tokens, decoded.lengths)
        repeat = local(functools.partial(jnp.repeat, repeats=rollout.answers, axis=0))
        rows |= {name: repeat(prompts[name]) for name in ENCODED if name in prompts}
        rows = {name: sharding.shard(x, "act_batch", "act_length") for name, x in rows.items()}
        flattened = local(lambda x: x.reshape(-1, *x.shape[2:]))
        return Told(_measured(of, whole, flat, rows), tokens_BP, lengths_B,
                    flattened(decoded.tokens), flattened(decoded.lengths))
    return draw


def _placed(flat: Mapping[str, jax.Array], places: Mapping) -> dict:
    """The parameters as decoding wants them, nested."""
    if sharding.mesh_sizes():
        flat = {path: jax.sharding.reshard(x, places[path]) for path, x in flat.items()}
    return tree.unflatten(flat)


def _prompt_tokens(prompts: Batch) -> tuple[jax.Array, jax.Array]:
    """(int32 [B, P], int32 [B]), split by rows alone."""
    names = ENCODED if ENCODED[0] in prompts else ("prompt_tokens", "prompt_mask")
    tokens, mask = (sharding.shard(prompts[name], "act_batch", None) for name in names)
    return tokens, jnp.sum(mask, axis=1)


def _asked(prompts: Batch, drawing: Drawing) -> dict[str, jax.Array]:
    """What the decode step reads."""
    if not drawing.shares_row:
        return {name: prompts[name] for name in ENCODED}
    tokens_BP, lengths_B = _prompt_tokens(prompts)
    started = jnp.pad(tokens_BP, ((0, 0), (1, 0)), constant_values=drawing.start_id)
    return {"decoder_prompt_tokens": started, "decoder_prompt_lengths": lengths_B + 1}


def _row_ids(step: jax.Array, prompts: Batch, drawing: Drawing) -> jax.Array:
    """int32 [B]: who each prompt of this step is, for the keys that its answers are drawn with."""
    count = next(iter(prompts.values())).shape[0]
    return sharding.shard(step * drawing.prompts_a_batch + jnp.arange(count), "act_batch")


def lay_out(prompts_BP: jax.Array, prompt_lengths_B: jax.Array, answers_BNA: jax.Array,
            lengths_BN: jax.Array, *, length: int, start: int) -> dict[str, jax.Array]:
    """{array: [B N, length]}: each prompt and one of its answers in a row, weights on the answer's tokens."""
    count, width = answers_BNA.shape[1], prompts_BP.shape[1]
    prompts = jnp.repeat(prompts_BP, count, axis=0)
    begin = jnp.repeat(prompt_lengths_B, count)[:, None]
    end = begin + lengths_BN.reshape(-1, 1)
    places = jnp.arange(length)[None]
    sources = jnp.where(places < begin, places, width + places - begin)
    both = jnp.concatenate([prompts, answers_BNA.reshape(-1, answers_BNA.shape[2])], axis=1)
    tokens = jnp.take_along_axis(both, jnp.minimum(sources, both.shape[1] - 1), axis=1)
    tokens = jnp.where(places < end, tokens, 0)
    return {"decoder_input_tokens": jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=start),
            "decoder_target_tokens": tokens,
            "decoder_loss_weights": ((places >= begin) & (places < end)).astype(jnp.float32)}


def _measured(of: Differentiated, whole: Mapping[str, jax.Array], flat: Mapping[str, jax.Array],
              rows: Batch) -> dict[str, jax.Array]:
    """The rows with the log-probabilities of their tokens now and under the reference, and where the model
    has them their values; as many rows at a time as an update takes."""
    parts = of.parts * of.objective.passes[1]
    valued = VALUE in data_rows.of(of.objective.learned).made["decoder"]

    def measure(part):
        weights = part["decoder_loss_weights"]
        module = of.model.bind(tree.unflatten(whole))
        log_probs, _, hidden, _ = drawn(module, part, of.objective)
        found = {OLD: log_probs, REFERENCE: log_probs}
        if of.objective.compares_with_base:
            found[REFERENCE] = drawn(of.base(flat), part, of.objective)[0]
        if valued:
            found[VALUE] = module.scalar_head(hidden)
        return {name: x * weights for name, x in found.items()}

    if parts == 1:
        return {**rows, **measure(rows)}
    found = jax.lax.map(measure, steps.split_batch(rows, parts))
    return {**rows, **{name: _joined(x) for name, x in found.items()}}


def _joined(x: jax.Array) -> jax.Array:
    """[parts, R / parts, L] of steps.split_batch -> [R, L]."""
    x = jnp.swapaxes(x, 0, 1)
    return sharding.reshape(x, (x.shape[0] * x.shape[1], x.shape[2]), "act_batch", "act_length")


def make_judged(of: Differentiated, names: Collection[str]
                ) -> Callable[[Batch, jax.Array], dict[str, jax.Array]]:
    """(rows of Told, float32 rewards [R]) -> a batch of these arrays, those of objective.learned."""
    def judged(rows, rewards_R):
        whole = {name: sharding.shard(x, "act_batch", None) for name, x in rows.items()}
        last_RL = policy.last_tokens(whole["decoder_loss_weights"])
        whole[REWARD] = jnp.where(last_RL, rewards_R[:, None], 0.0)
        worth = of.objective.draws.advantages(whole, of.objective)
        return {name: sharding.shard(x, "act_batch", "act_length")
                for name, x in worth.items() if name in names}
    return judged
