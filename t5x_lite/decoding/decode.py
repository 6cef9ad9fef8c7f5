"""From next-token logits to sequences: greedy, sampling, beam search; and scoring.

Shapes: B inputs, R rows the model sees (B times beams or samples), N sequences returned an
input, K beams, P prompt width, T history width (P + max_length), L max_length, V vocabulary.

The cache protocol, all that a model has to offer:

    decode_fn(tokens_RL, cache, counts_R=None) -> (logits_RLV float32, cache)
    take_rows(cache, rows_R) -> cache     row i of the result is row rows_R[i] of the argument

`cache` is a dict of arrays whose "position" is int32[R], the position at which each row's
next token stands. The model reads it, writes keys and values there, advances it by L, or of
each row by its count, and keeps shapes, dtypes and shardings as they were. Easily missed:

  * Rows stand at different positions. Prompts of different lengths are left-aligned and
    prefilled in one call; the padding of a shorter one leaves garbage at and after its
    length, which later tokens overwrite. So a query at position p attends to slots <= p
    only, and a token dropped by an MoE's capacity must not depend on that padding.
  * What the cache holds must be that of the counted tokens alone: a recurrent state cannot be
    overwritten, so it takes up no more of a row than its count. Tokens behind are only read.
  * The number of slots must be at least P + max_length - 1; nothing can check it here.

take_rows never moves a row between inputs (rows of input b are b*N … b*N + N - 1, as
contiguous on the way in as out), so where the batch is sharded every copy is local.

Cost: one decode_fn call of P tokens (none where P is 1), then one of a single token for each
emitted one, until every row is done. A call's own work is O(R V), beam search takes the top 2K of
K V. Memory: logits of one position, [R, V], ever.

Everything is a pure function and compiles to one program with one `lax.while_loop`. Under
an explicit mesh the row-wise arithmetic runs as local code on each device's own rows, by
the sharding of cache["position"]; results do not depend on the mesh, nor, for sampling, on
the batch a row stands in (see `row_ids_B`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from t5x_lite.decoding import beam, truncate
from t5x_lite.decoding.logits_fn import LogitsFn
from t5x_lite.errors import Axis, Count, Positive, Rate, Seed, UserError, nearest

NEG_INF = beam.NEG_INF

METHODS = ("greedy", "sample", "beam")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How to decode. Lengths count emitted tokens, the end token included."""

    method: str = "greedy"  # one of METHODS
    max_length: Count = 128
    min_length: int = 0  # tokens that must stand before an end token (min_new_tokens of others)
    num_samples: Count = 1  # sequences returned an input: independent samples, or the best beams
    # sample: temperature first, then the truncations in this order, each of what is left
    # (truncate.py has their formulas and papers)
    temperature: Positive = 1.0
    top_k: int = 0  # the k most probable tokens; 0: off
    top_p: float = 1.0  # the nucleus of this probability; 1: off
    min_p: Rate = 0.0  # tokens at least this share as probable as the most probable one; 0: off
    typical_p: float = 1.0  # those of a surprise next to the entropy, of this probability; 1: off
    epsilon: Rate = 0.0  # tokens of at least this probability; 0: off
    seed: Seed = 0
    # beam
    beam_size: Count = 4
    length_penalty: float = 0.6  # alpha; 0 ranks by plain log-probability
    beam_rule: str = "t5x"  # or "transformers"; beam.py tells them apart
    # repetition control; prompt tokens count as already said
    repetition_penalty: Positive = 1.0  # CTRL, arXiv:1909.05858; 1: off
    no_repeat_ngram_size: int = 0  # 0: off
    logits_fn: str = ""  # MODULE:FUNCTION of yours that changes the logits, see logits_fn.py
    # T5X's forced decoding: the prompt after its first (start) token is part of the output,
    # so it is returned, and max_length, min_length and the length penalty count it
    include_prefix: bool = False
    # score by the distribution drawn from (after controls, temperature, truncations; 0 for
    # greedy, T5X's rescale_log_probs) instead of by the model's own
    rescale_scores: bool = False
    eos_id: Axis = 1  # T5's; for it, a run decodes with the end token of its own vocabulary
    stop_ids: tuple[int, ...] = ()  # further end tokens, such as the newline after an answer
    pad_id: Axis = 0

    def __post_init__(self):
        def check(ok: bool, field: str, allowed: str):
            if not ok:
                raise UserError(f"decode.{field} is {getattr(self, field)!r}: {allowed}")

        check(self.method in METHODS, "method",
              f"choose one of {', '.join(METHODS)}.{nearest(self.method, METHODS)}")
        check(self.beam_rule in beam.RULES, "beam_rule",
              f"choose one of {', '.join(beam.RULES)}.{nearest(self.beam_rule, beam.RULES)}")
        check(self.max_length >= 1, "max_length", "must be at least 1")
        check(0 <= self.min_length < self.max_length, "min_length",
              f"must be at least 0 and below max_length ({self.max_length})")
        check(self.beam_size >= 1, "beam_size", "must be at least 1")
        most = {"greedy": 1, "beam": self.beam_size}.get(self.method, self.num_samples)
        check(1 <= self.num_samples <= most, "num_samples",
              f"must be 1 to {most} with method={self.method!r}"
              if self.method != "sample" else "must be at least 1")
        check(self.temperature > 0, "temperature",
              "must be positive; for the limit of 0 set method='greedy'")
        check(self.top_k >= 0, "top_k", "must be positive, or 0 to switch it off")
        for field in ("top_p", "typical_p"):
            check(0 < getattr(self, field) <= 1, field, "must lie in (0, 1]; 1 switches it off")
        for field in ("min_p", "epsilon"):
            check(0 <= getattr(self, field) < 1, field, "must lie in [0, 1); 0 switches it off")
        check(self.length_penalty >= 0, "length_penalty",
              "must be at least 0 (0 ranks by plain log-probability, more favours length)")
        check(self.repetition_penalty > 0, "repetition_penalty", "must be positive; 1 is off")
        check(self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size",
              "must be positive, or 0 to switch it off")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends a sequence."""
        return (self.eos_id, *self.stop_ids)


class Decoded(NamedTuple):
    """What came out. Beams are ordered best first; samples in the order of their index.

    tokens: int32 [B, N, L], the end token included, pad_id after it.
    scores: float32 [B, N]. Greedy and sampling: the sum of the emitted tokens' model
        log-probabilities (the controls do not change it; see rescale_scores). Beam search:
        the sum after the controls, over the length penalty; NEG_INF for an empty slot.
    lengths: int32 [B, N], tokens before the padding; 0 for an empty slot.
    """

    tokens: jax.Array
    scores: jax.Array
    lengths: jax.Array


# --- What changes the logits: each [R, V] -> [R, V], one row at a time -----------------------


def penalise_repetition(logits_RV, history_RT, penalty: float):
    """Divides positive and multiplies negative logits of the tokens in `history_RT`.

    CTRL (arXiv:1909.05858), in transformers' form. Negative history entries are no tokens.
    """
    penalised_RV = jnp.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty)
    return jnp.where(_mark(history_RT, logits_RV.shape[1]), penalised_RV, logits_RV)


def ban_repeated_ngrams(logits_RV, history_RT, end, size: int):
    """Bans each token that would repeat an n-gram of `size` tokens already in the history.

    history_RT: tokens up to column `end` (an int32 scalar); negative entries, among them
    all from `end` on, are no tokens.
    """
    rows, width = history_RT.shape
    if width < size:
        return logits_RV
    # columns end - size + 1 … end - 1; the padding keeps the slice from being clamped at 0
    padded = jnp.concatenate([jnp.full((rows, size), -1, jnp.int32), history_RT], axis=1)
    tail = lax.dynamic_slice_in_dim(padded, end + 1, size - 1, axis=1)
    starts = width - size + 1
    match = jnp.broadcast_to(jnp.all(tail >= 0, axis=1, keepdims=True), (rows, starts))
    for offset in range(size - 1):
        match &= history_RT[:, offset:offset + starts] == tail[:, offset:offset + 1]
    banned = _mark(jnp.where(match, history_RT[:, size - 1:], -1), logits_RV.shape[1])
    return jnp.where(banned, NEG_INF, logits_RV)


def _mark(tokens_RT, vocab: int):
    """bool [R, V]: does the row hold this token? Negative entries are no tokens."""
    tokens_RT = jnp.where(tokens_RT < 0, vocab, tokens_RT)
    mark = lambda tokens_T: jnp.zeros(vocab, bool).at[tokens_T].set(True, mode="drop")
    return jax.vmap(mark)(tokens_RT)


def _changed(logits_R1V, history_RT, step, logits_fn: LogitsFn | None):
    """float32 logits [R, V] of the next token, after the user's own function."""
    logits_RV = logits_R1V[:, 0].astype(jnp.float32)
    return logits_RV if logits_fn is None else logits_fn(logits_RV, history_RT, step)


def _control(logits_RV, history_RT, end, emitted_R, config: DecodeConfig):
    """The controls that hold for every method, in transformers' order."""
    if config.repetition_penalty != 1:
        logits_RV = penalise_repetition(logits_RV, history_RT, config.repetition_penalty)
    if config.no_repeat_ngram_size:
        logits_RV = ban_repeated_ngrams(logits_RV, history_RT, end, config.no_repeat_ngram_size)
    if config.min_length:
        is_end_V = jnp.isin(jnp.arange(logits_RV.shape[1]), jnp.array(config.end_ids))
        too_early_R = emitted_R < config.min_length
        logits_RV = jnp.where(too_early_R[:, None] & is_end_V, NEG_INF, logits_RV)
    return logits_RV


# --- Decoding ---------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """What a row knows before it emits anything; every leaf has the rows in dim 0."""

    history: jax.Array  # [R, T]: the prompt right-aligned against column P, -1 elsewhere
    prefix: jax.Array  # [R]: prompt tokens that count as output
    index: jax.Array  # [R]: the input's row in the batch
    key: jax.Array  # [R]: of the input, to sample with; fixed over steps


class _Samples(NamedTuple):
    """The loop state of greedy and sampling, over rows R."""

    rows: _Rows
    scores: jax.Array
    lengths: jax.Array
    done: jax.Array


def decode(decode_fn: Callable, take_rows: Callable, cache: dict[str, Any], prompt_BP,
           prompt_lengths_B, config: DecodeConfig, row_ids_B=None,
           logits_fn: LogitsFn | None = None) -> Decoded:
    """Continues each prompt until an end token or config.max_length.

    decode_fn, take_rows, cache: the protocol at the head of this file; cache["position"]
        says where the prompts start (0, unless something stands before them).
    prompt_BP, prompt_lengths_B: int32, left-aligned; each row has at least one token, for an
        encoder-decoder its start token. All of them are read in one call.
    row_ids_B: int32, who each row is, by default its row in the batch. Sample s of a row is
        drawn with keys folded from (seed, row id, s, step), so that a line's number as its
        id gives the same samples in any batch.
    logits_fn: changes the next token's logits, see logits_fn.py. Scores are of what it leaves.
    """
    batch, width = prompt_BP.shape
    local = functools.partial(per_row, batch_axes=batch_axes_of(cache["position"]))
    index_B = jnp.arange(batch, dtype=jnp.int32)
    ids_B = index_B if row_ids_B is None else row_ids_B
    rows = local(functools.partial(_start, config=config))(
        prompt_BP, prompt_lengths_B, index_B, ids_B)
    if width > 1:
        prompt_BP, lengths_B = local(lambda *x: x)(prompt_BP, prompt_lengths_B)
        # The loop reads each row's last token again, so that no logits are computed here; yet
        # it is read here too, because a prefix LM lets the whole prompt see it.
        _, cache = decode_fn(prompt_BP, cache, lengths_B - 1)
    run = _decode_beams if config.method == "beam" else _decode_samples
    return run(decode_fn, take_rows, cache, rows, width, config, local, logits_fn)


def _start(prompt_BP, lengths_B, index_B, ids_B, config: DecodeConfig) -> _Rows:
    width = prompt_BP.shape[1]
    source = jnp.arange(width) - (width - lengths_B[:, None])
    prompt = jnp.take_along_axis(prompt_BP, jnp.maximum(source, 0), axis=1)
    prompt = jnp.where(source >= 0, prompt, -1).astype(jnp.int32)
    history = jnp.pad(prompt, ((0, 0), (0, config.max_length)), constant_values=-1)
    prefix = (lengths_B - 1 if config.include_prefix else 0 * lengths_B).astype(jnp.int32)
    return _Rows(history, prefix, index_B, _fold_each(jax.random.key(config.seed), ids_B))


def _fold_each(key, numbers_R):
    """Folds each number into its own key, or into the one key."""
    return jax.vmap(jax.random.fold_in, (0 if key.ndim else None, 0))(key, numbers_R)


def _decode_samples(decode_fn, take_rows, cache, rows: _Rows, width: int,
                    config: DecodeConfig, local, logits_fn) -> Decoded:
    """Greedy decoding and sampling; the N samples of an input are rows side by side."""
    count = config.num_samples

    def begin(rows: _Rows) -> _Samples:
        sample = jnp.tile(jnp.arange(count), rows.index.shape[0])
        rows = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), rows)
        rows = rows._replace(key=_fold_each(rows.key, sample))
        return _Samples(rows, scores=jnp.zeros(sample.shape, jnp.float32),
                        lengths=jnp.minimum(rows.prefix, config.max_length),
                        done=rows.prefix >= config.max_length)

    def unfinished(carry):
        step, samples, _ = carry
        return (step < config.max_length) & ~jnp.all(samples.done)

    def advance(carry):
        step, samples, cache = carry
        token_R1 = lax.dynamic_slice_in_dim(samples.rows.history, width - 1 + step, 1, axis=1)
        logits_R1V, cache = decode_fn(token_R1, cache)
        samples = local(functools.partial(_emit, width=width, config=config, logits_fn=logits_fn))(
            samples, logits_R1V, step)
        return step + 1, samples, cache

    samples = local(begin)(rows)
    if count > 1:
        cache = take_rows(cache, samples.rows.index)
    _, samples, _ = lax.while_loop(unfinished, advance, (jnp.int32(0), samples, cache))

    def end(samples: _Samples) -> Decoded:
        tokens = _output(samples.rows.history, samples.rows.prefix, samples.lengths, config)
        return Decoded(*(x.reshape(-1, count, *x.shape[1:])
                         for x in (tokens, samples.scores, samples.lengths)))

    return local(end)(samples)


def _emit(samples: _Samples, logits_R1V, step, width: int, config: DecodeConfig,
          logits_fn: LogitsFn | None) -> _Samples:
    """One more token for every row that is not done."""
    rows, done = samples.rows, samples.done
    logits_RV = _changed(logits_R1V, rows.history, step, logits_fn)
    emitted_R = rows.prefix + step
    drawn_RV = _control(logits_RV, rows.history, width + step, emitted_R, config)
    if config.method == "greedy":
        token_R = _first_of_largest(drawn_RV)
        gain_R = 0.0 if config.rescale_scores else _log_prob(logits_RV, token_R)
    else:
        drawn_RV = truncate.truncate(drawn_RV / config.temperature, config)
        keys_R = jax.vmap(jax.random.fold_in, (0, None))(rows.key, step)
        token_R = jax.vmap(jax.random.categorical)(keys_R, drawn_RV)
        gain_R = _log_prob(drawn_RV if config.rescale_scores else logits_RV, token_R)
    token_R = jnp.where(done, config.pad_id, token_R).astype(jnp.int32)
    ended_R = jnp.isin(token_R, jnp.array(config.end_ids)) | (emitted_R + 1 >= config.max_length)
    history = lax.dynamic_update_slice_in_dim(
        rows.history, token_R[:, None], width + step, axis=1)
    return samples._replace(
        rows=rows._replace(history=history), done=done | ended_R,
        scores=samples.scores + jnp.where(done, 0, gain_R),
        lengths=samples.lengths + jnp.where(done, 0, 1))


def _decode_beams(decode_fn, take_rows, cache, rows: _Rows, width: int, config: DecodeConfig,
                  local, logits_fn) -> Decoded:
    """Beam search; the K beams of an input are rows side by side, the best live one first."""
    size = config.beam_size

    def unfinished(carry):
        step, beams, _ = carry
        return (step < config.max_length) & jnp.any(beams.active)

    def advance(carry):
        step, beams, cache = carry
        token_BK = lax.dynamic_index_in_dim(
            beams.live_tokens, width - 1 + step, axis=2, keepdims=False)
        token_R1 = local(lambda x: x.reshape(-1, 1))(token_BK)
        logits_R1V, cache = decode_fn(token_R1, cache)
        emit = functools.partial(_emit_beams, width=width, config=config, logits_fn=logits_fn)
        beams, source_R = local(emit)(beams, logits_R1V, rows, step)
        return step + 1, beams, take_rows(cache, source_R)

    beams = local(functools.partial(beam.start, config=config))(rows.history, rows.prefix)
    cache = take_rows(cache, local(lambda x: jnp.repeat(x, size))(rows.index))
    _, beams, _ = lax.while_loop(unfinished, advance, (jnp.int32(0), beams, cache))

    def end(beams: beam.Beams, rows: _Rows) -> Decoded:
        best = [x[:, :config.num_samples] for x in beam.best(beams, config)]
        (history_BNT, scores_BN, lengths_BN), prefix_BN = best, jnp.broadcast_to(
            rows.prefix[:, None], best[1].shape)
        tokens_RL = _output(history_BNT.reshape(-1, history_BNT.shape[-1]),
                            prefix_BN.reshape(-1), lengths_BN.reshape(-1), config)
        return Decoded(tokens_RL.reshape(*scores_BN.shape, -1), scores_BN, lengths_BN)

    return local(end)(beams, rows)


def _emit_beams(beams: beam.Beams, logits_R1V, rows: _Rows, step, width: int,
                config: DecodeConfig, logits_fn: LogitsFn | None):
    """One more token for every input; also the rows that the new live beams come from."""
    size = config.beam_size
    # controls see log-probabilities here, as in transformers, and are not renormalised
    history_RT = beams.live_tokens.reshape(logits_R1V.shape[0], -1)
    log_probs_RV = jax.nn.log_softmax(_changed(logits_R1V, history_RT, step, logits_fn))
    log_probs_RV = _control(log_probs_RV, history_RT, width + step,
                            jnp.repeat(rows.prefix, size) + step, config)
    beams, source_BK = beam.advance(
        beams, log_probs_RV.reshape(-1, size, log_probs_RV.shape[-1]), step, width,
        rows.prefix, config)
    return beams, (rows.index[:, None] * size + source_BK).reshape(-1)


def _output(history_RT, prefix_R, lengths_R, config: DecodeConfig):
    """The emitted tokens [R, L] of a history, with those of the prefix that count as output."""
    width = history_RT.shape[1] - config.max_length
    columns = jnp.arange(config.max_length)
    tokens = jnp.take_along_axis(history_RT, width - prefix_R[:, None] + columns, axis=1)
    return jnp.where(columns < lengths_R[:, None], tokens, config.pad_id)


def _first_of_largest(logits_RV):
    """argmax as two plain reductions, which CPUs run three times as fast as one over pairs."""
    vocab = logits_RV.shape[1]
    less = logits_RV < jnp.max(logits_RV, axis=1, keepdims=True)
    return jnp.min(jnp.where(less, vocab, jnp.arange(vocab)), axis=1)


def _log_prob(logits_RV, token_R):
    picked = jnp.take_along_axis(logits_RV, token_R[:, None], axis=1)[:, 0]
    return picked - jax.nn.logsumexp(logits_RV, axis=-1)


# --- Scoring ----------------------------------------------------------------------------------


class Scored(NamedTuple):
    """Log-probabilities of given targets.

    scores: float32 [B], summed over the counted targets; rank choices by it, or by
        scores / lengths.
    lengths: float32 [B], the sum of the weights.
    token_scores: float32 [B, L], each target's own log-probability, 0 where not counted.
    """

    scores: jax.Array
    lengths: jax.Array
    token_scores: jax.Array


def score(logits_BLV, targets_BL, weights_BL) -> Scored:
    """The log-probability of each row's targets under teacher-forced logits.

    weights_BL: 1 where a target counts (not padding, not the prompt), else 0.
    """

    def rowwise(logits_BLV, targets_BL, weights_BL) -> Scored:
        vocab = logits_BLV.shape[-1]
        picked = _log_prob(logits_BLV.astype(jnp.float32).reshape(-1, vocab),
                           targets_BL.reshape(-1)).reshape(targets_BL.shape)
        # not a product: a padded position may be -inf
        token_scores = jnp.where(weights_BL > 0, picked * weights_BL, 0)
        return Scored(token_scores.sum(axis=1), weights_BL.sum(axis=1), token_scores)

    return per_row(rowwise, batch_axes=batch_axes_of(logits_BLV))(
        logits_BLV, targets_BL, weights_BL)


# --- Sharding ---------------------------------------------------------------------------------


def batch_axes_of(x):
    """The mesh axes over which dim 0 of x is sharded, or None."""
    return jax.typeof(x).sharding.spec[0]


def per_row(fn: Callable, batch_axes) -> Callable:
    """fn, whose arrays (scalars apart) have rows in dim 0 that never meet, run shard by shard.

    Under an explicit mesh each argument is first sharded over `batch_axes` in dim 0 and
    whole in the others (logits: the vocabulary is gathered), so that fn is plain local code,
    sorts and scatters included, and its results are the same on every mesh.
    """
    if not _is_explicit():
        return fn

    def sharded(*args):
        spec = lambda x: PartitionSpec(batch_axes) if x.ndim else PartitionSpec()
        specs = jax.tree.map(spec, args)
        args = jax.tree.map(jax.sharding.reshard, args, specs)
        return jax.shard_map(fn, in_specs=specs, out_specs=PartitionSpec(batch_axes),
                             check_vma=False)(*args)

    return sharded


def _is_explicit() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(
        kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)
