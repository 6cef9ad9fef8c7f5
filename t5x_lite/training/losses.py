"""Cross-entropy over a large vocabulary, whole or a chunk of the logits at a time.

For one token with logits x, target t, vocabulary V, label smoothing s and Z = sum exp x,

    loss = -sum_v q_v log p_v  -  H(q)  +  z_loss (log Z)^2
    q_t = 1 - s,   q_v = s / (V - 1) elsewhere,   H(q) the entropy of q

as in T5X and Mesh TensorFlow: subtracting the constant H(q) makes a perfect prediction cost
0 under smoothing, and the z term keeps log Z near 0 so that bfloat16 logits stay exact.

The logits of a batch are the largest tensor of a small model's step (8 x 114 x 32,128 floats
are 112 MiB, and as much again for their gradient). `chunked_cross_entropy` takes the
function that makes them instead, applies it to a chunk of positions at a time and, when it is
differentiated, computes each chunk's gradient in the forward pass: the loss is a sum, so its
gradient needs only to be multiplied by the incoming scalar later, nothing is computed twice
and only one chunk of logits ever exists.

Shape letters: B batch, L length, D model, V vocabulary, C positions in a chunk (a dim), N
number of chunks, S shards of the length dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5x_lite.errors import at_least
from t5x_lite.parallel.sharding import place_like, split_of

# A device's logits above this are chunked when `chunk` is 0. Two chunks cost a CPU no time, but
# each one adds a float32 gradient of the head to the sum: 4, 8 chunks of T5-small's 112 MiB took
# 1.1, 1.25 times as long. On accelerators a chunk should hold several hundred tokens likewise.
AUTO_CHUNK_BYTES = 256 * 2**20

HeadFn = Callable[[Any, jax.Array], jax.Array]  # (head_params, hidden_BCD) -> logits_BCV


def _vocab_is_sharded(logits_BLV: jax.Array) -> bool:
    partitions = jax.typeof(logits_BLV).sharding.spec
    return len(partitions) == logits_BLV.ndim and partitions[-1] is not None


def _target_logits(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """logits_BL at the targets: a gather, or a masked sum where the vocabulary is sharded
    (a gather would need all shards of it)."""
    if not _vocab_is_sharded(logits_BLV):
        return jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    is_target_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
    return jnp.sum(jnp.where(is_target_BLV, logits_BLV, 0.0), axis=-1)


def _smoothing(label_smoothing: float, vocab_size: int) -> tuple[float, float, float]:
    """(q at the target, q elsewhere, entropy of q)."""
    high, low = 1.0 - label_smoothing, label_smoothing / (vocab_size - 1)
    entropy = -(high * math.log(high) + (vocab_size - 1) * low * math.log(low + 1e-20))
    return high, low, entropy


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def token_cross_entropy(logits_BLV: jax.Array, targets_BL: jax.Array, z_loss: float = 0.0,
                        label_smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """(loss_BL with its z term, z_BL = z_loss (log Z)^2), float32.

    Only the loss has a gradient; z is for logging. The backward pass is one fused sweep over
    the logits, (1 + 2 z_loss log Z) p - q, without a one-hot array.
    """
    return _token_forward(logits_BLV, targets_BL, z_loss, label_smoothing)[0]


def _token_forward(given_BLV, targets_BL, z_loss, label_smoothing):
    logits_BLV = given_BLV.astype(jnp.float32)
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    loss_BL = log_z_BL - _target_logits(logits_BLV, targets_BL)
    if label_smoothing:
        size = logits_BLV.shape[-1]
        high, low, entropy = _smoothing(label_smoothing, size)
        all_BL = size * log_z_BL - jnp.sum(logits_BLV, axis=-1)  # -sum_v log p_v
        loss_BL = (high - low) * loss_BL + low * all_BL - entropy
    z_BL = z_loss * jnp.square(log_z_BL)
    return (loss_BL + z_BL, z_BL), (given_BLV, targets_BL, log_z_BL)


def _token_backward(z_loss, label_smoothing, residuals, cotangents):
    logits_BLV, targets_BL, log_z_BL = residuals
    high, low, _ = _smoothing(label_smoothing, logits_BLV.shape[-1])
    is_target_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
    q_BLV = jnp.where(is_target_BLV, jnp.float32(high), jnp.float32(low))
    p_BLV = jnp.exp(logits_BLV.astype(jnp.float32) - log_z_BL[..., None])
    gradient_BLV = (1.0 + 2.0 * z_loss * log_z_BL)[..., None] * p_BLV - q_BLV
    return (cotangents[0][..., None] * gradient_BLV).astype(logits_BLV.dtype), None


token_cross_entropy.defvjp(_token_forward, _token_backward)


def _is_correct(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """float32 1 where the target is the argmax: no logit is larger, no earlier one as large.

    On CPU that takes a quarter of jnp.argmax's time (28 against 104 ms for 912 x 32,128), and
    a sharded vocabulary needs no gather of candidates.
    """
    target_BL1 = _target_logits(logits_BLV, targets_BL)[..., None]
    is_earlier_BLV = jnp.arange(logits_BLV.shape[-1]) < targets_BL[..., None]
    beaten_BL = jnp.any((logits_BLV > target_BL1) |
                        ((logits_BLV == target_BL1) & is_earlier_BLV), axis=-1)
    return (~beaten_BL & ~jnp.isnan(target_BL1[..., 0])).astype(jnp.float32)


def cross_entropy(logits_BLV: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, *,
                  z_loss: float = 0.0, label_smoothing: float = 0.0
                  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sums over tokens of logits that are there already.

    Args:
        weights_BL: float32, 0 for padding and for what no loss belongs to; not differentiated.
    Returns:
        (loss_sum, sums): loss_sum includes the z term; sums hold loss_sum, z_loss_sum,
        weight_sum and correct_sum (argmax is the target), float32 scalars without gradient.
        Dividing by weight_sum, or by T5's constant, is the caller's choice.
    """
    weights_BL = jax.lax.stop_gradient(weights_BL)
    loss_BL, z_BL = token_cross_entropy(logits_BLV, targets_BL, z_loss, label_smoothing)
    correct_BL = _is_correct(jax.lax.stop_gradient(logits_BLV), targets_BL)
    loss_sum = jnp.sum(loss_BL * weights_BL)
    sums = {"loss_sum": loss_sum, "z_loss_sum": jnp.sum(z_BL * weights_BL),
            "weight_sum": jnp.sum(weights_BL), "correct_sum": jnp.sum(correct_BL * weights_BL)}
    return loss_sum, jax.lax.stop_gradient(sums)


def chunked_cross_entropy(head_fn: HeadFn, head_params: Any, hidden_BLD: jax.Array,
                          targets_BL: jax.Array, weights_BL: jax.Array, *,
                          z_loss: float = 0.0, label_smoothing: float = 0.0, chunk: int = 0,
                          gather: Callable[[Any], Any] = lambda params: params
                          ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`cross_entropy(head_fn(gather(head_params), hidden_BLD), …)` without ever holding all logits.

    Equal to it in values and gradients (with respect to head_params and hidden_BLD). The
    length is cut, never the batch, so that a sharded batch stays where it is; a sharded
    length is cut within each shard.

    Args:
        head_fn: (gather(head_params), hidden_BCD) -> logits_BCV; applied to positions
            independently. It must not close over anything that is to be differentiated.
        head_params: any pytree of arrays, as they are stored.
        gather: makes of them what head_fn takes, once for all chunks (over FSDP axes, say).
            The gradient is summed over chunks in float32, across the devices that share the
            batch reduced once after the last chunk, and taken back through `gather` at once:
            a whole head's gradient does not live through the layers' backward pass.
        chunk: positions (of each batch row) at a time; 0 chooses, and takes all of them
            where a device's logits are under AUTO_CHUNK_BYTES.
    Raises:
        UserError: a negative chunk.
    """
    whole_fn = lambda params, x: head_fn(gather(params), x)
    num_chunks = _num_chunks(whole_fn, head_params, hidden_BLD, chunk)
    if num_chunks == 1:
        return cross_entropy(whole_fn(head_params, hidden_BLD), targets_BL, weights_BL,
                             z_loss=z_loss, label_smoothing=label_smoothing)
    settings = (head_fn, num_chunks, z_loss, label_smoothing, gather)
    loss_sum, sums = _chunked(settings, head_params, hidden_BLD, targets_BL,
                              jax.lax.stop_gradient(weights_BL))
    return loss_sum, jax.lax.stop_gradient(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(settings, head_params, hidden_BLD, targets_BL, weights_BL):
    """Undifferentiated: the loss alone."""
    gathered = settings[-1](head_params)

    def step(sums, xs):
        return _add(sums, _chunk_loss(settings, gathered, *xs)[1]), None

    chunks = _split(settings[1], hidden_BLD, targets_BL, weights_BL)
    sums, _ = jax.lax.scan(step, _zero_sums(), chunks)
    return sums["loss_sum"], sums


def _chunked_forward(settings, head_params, hidden_BLD, targets_BL, weights_BL):
    """The loss, with its gradient as the residual."""
    differentiate = jax.value_and_grad(
        functools.partial(_chunk_loss, settings), argnums=(0, 1), has_aux=True)
    gathered, scatter = jax.vjp(settings[-1], head_params)
    local = jax.tree.map(lambda w: _reduced_later(w, hidden_BLD), gathered)

    def step(carry, xs):
        sums, d_head = carry
        (_, chunk_sums), (d_head_chunk, d_hidden) = differentiate(local, *xs)
        d_head = jax.tree.map(lambda a, d: a + d.astype(jnp.float32), d_head, d_head_chunk)
        return (_add(sums, chunk_sums), d_head), d_hidden

    chunks = _split(settings[1], hidden_BLD, targets_BL, weights_BL)
    start = (_zero_sums(), jax.tree.map(_zero_gradient, local))
    (sums, d_head), d_hidden = jax.lax.scan(step, start, chunks)
    d_head = jax.tree.map(lambda d, w: place_like(d, w).astype(w.dtype), d_head, gathered)
    # The barrier makes the layers' backward pass wait: else XLA reduces the whole gradient last.
    residuals = jax.lax.optimization_barrier((*scatter(d_head), _join(d_hidden, hidden_BLD)))
    return (sums["loss_sum"], sums), residuals


def _chunked_backward(settings, residuals, cotangents):
    scale = cotangents[0]
    d_head, d_hidden = jax.tree.map(lambda d: (scale * d).astype(d.dtype), residuals)
    return d_head, d_hidden, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _chunk_loss(settings, head_params, hidden_BCD, targets_BC, weights_BC):
    head_fn, _, z_loss, label_smoothing, _ = settings
    return cross_entropy(head_fn(head_params, hidden_BCD), targets_BC, weights_BC,
                         z_loss=z_loss, label_smoothing=label_smoothing)


def target_log_probs(head_fn: HeadFn, head_params: Any, hidden_BLD: jax.Array,
                     targets_BL: jax.Array, *, chunk: int = 0) -> jax.Array:
    """float32 log p(target)_BL a chunk at a time, for scoring (arguments as above).

    It can be differentiated, but then keeps every chunk's logits."""
    def of_chunk(logits_BCV, targets_BC):
        return -token_cross_entropy(logits_BCV, targets_BC)[0]

    return _per_chunk(of_chunk, head_fn, head_params, hidden_BLD, targets_BL, chunk)


def target_scores(head_fn: HeadFn, head_params: Any, hidden_BLD: jax.Array,
                  targets_BL: jax.Array, *, chunk: int = 0) -> tuple[jax.Array, jax.Array]:
    """(float32 log p(target)_BL, bool_BL whether the target is the most likely token); arguments as
    above."""
    def of_chunk(logits_BCV, targets_BC):
        return (-token_cross_entropy(logits_BCV, targets_BC)[0],
                _is_correct(logits_BCV, targets_BC) > 0)

    return _per_chunk(of_chunk, head_fn, head_params, hidden_BLD, targets_BL, chunk)


def with_aux(total: jax.Array, aux: dict[str, Any], parts: int) -> tuple[jax.Array, dict[str, Any]]:
    """The loss with the layers' own, and their metrics, of one of `parts` micro-batches."""
    if "aux_loss" not in aux:
        return total, aux
    mean = aux["aux_loss"][0] / parts
    return total + mean, {**aux, "aux_loss": (mean, jnp.float32(1.0 / parts))}


def drawn_scores(head_fn: HeadFn, head_params: Any, hidden_BLD: jax.Array,
                 targets_BL: jax.Array, *, chunk: int = 0) -> tuple[jax.Array, jax.Array]:
    """(float32 log p(target)_BL, entropy_BL in nats of what it was drawn from); arguments as above."""
    def of_chunk(logits_BCV, targets_BC):
        log_probs_BCV = jax.nn.log_softmax(logits_BCV.astype(jnp.float32), axis=-1)
        entropy_BC = -jnp.sum(jnp.exp(log_probs_BCV) * log_probs_BCV, axis=-1)
        return -token_cross_entropy(logits_BCV, targets_BC)[0], entropy_BC

    return _per_chunk(of_chunk, head_fn, head_params, hidden_BLD, targets_BL, chunk)


def _per_chunk(of_chunk, head_fn, head_params, hidden_BLD, targets_BL, chunk):
    """of_chunk(logits_BCV, targets_BC) -> [B, C], or several, of every chunk of the length, joined."""
    def step(_, xs):
        return None, of_chunk(head_fn(head_params, xs[0]), xs[1])

    num_chunks = _num_chunks(head_fn, head_params, hidden_BLD, chunk)
    found = jax.lax.scan(step, None, _split(num_chunks, hidden_BLD, targets_BL))[1]
    return jax.tree.map(lambda x: _join(x, targets_BL), found)


def choice_losses(log_probs_BL: jax.Array, segments_BL: jax.Array
                  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """T-Few's two losses beside the likelihood of the right choice (Liu et al. 2022,
    arXiv:2205.05638, section 3.2), and whether it ranks first.

        unlikelihood       - sum log(1 - p(y_t) + 0.01)   over the tokens of wrong choices
        length-normalised  - log(exp b_1 / sum_c exp b_c),   b_c = 1/T_c sum_t log p(y_t)

    0.01 is not in the paper but in its authors' code: the loss of a wrong token that the model
    is sure of stays finite.

    Args:
        log_probs_BL: float32 log p(target); segments_BL: int32, the number of the choice that
            a token belongs to, 1 for the right one, 0 for padding.
    Returns:
        Unlikelihood_BL (0 but for wrong choices), float32; the second loss_B and is_first_B,
        float32, both 0 for a row without a right choice.
    """
    is_wrong_BL = segments_BL > 1
    # Where p is 1 the gradient of log(1 - p + 0.01) is large but finite.
    unlikelihood_BL = jnp.where(is_wrong_BL, -jnp.log(1.01 - jnp.exp(log_probs_BL)), 0.0)
    count = segments_BL.shape[1]   # every choice has a token
    is_in_BLC = segments_BL[..., None] == 1 + jnp.arange(count)
    lengths_BC = jnp.sum(is_in_BLC, axis=1)
    sums_BC = jnp.sum(jnp.where(is_in_BLC, log_probs_BL[..., None], 0.0), axis=1)
    means_BC = jnp.where(lengths_BC > 0, sums_BC / jnp.maximum(lengths_BC, 1), -jnp.inf)
    has_right_B = lengths_BC[:, 0] > 0
    means_BC = jnp.where(has_right_B[:, None], means_BC, 0.0)
    normalised_B = jnp.where(has_right_B, jax.nn.logsumexp(means_BC, axis=1) - means_BC[:, 0], 0.0)
    is_first_B = has_right_B & (means_BC[:, 0] >= jnp.max(means_BC, axis=1))
    return unlikelihood_BL, normalised_B, is_first_B.astype(jnp.float32)


def _num_chunks(head_fn: HeadFn, head_params: Any, hidden_BLD: jax.Array, chunk: int) -> int:
    """Into how many parts the length (of one shard) is cut."""
    at_least("objective.logits_chunk", chunk, 0, "0 chooses.")
    length = hidden_BLD.shape[1] // _length_shards(hidden_BLD)
    if chunk:
        return -(-length // chunk)
    logits = jax.eval_shape(head_fn, head_params, hidden_BLD)
    shape = logits.sharding.shard_shape(logits.shape) if logits.sharding else logits.shape
    return min(length, -(-4 * math.prod(shape) // AUTO_CHUNK_BYTES))


def _length_shards(x_BL: jax.Array) -> int:
    sizes = jax.typeof(x_BL).sharding.mesh.shape
    return math.prod(sizes[axis] for axis in split_of(x_BL)[1])


def _split(num_chunks: int, hidden_BLD: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """(B, L, …) -> (N, B, C, …) each; a last chunk that is short is filled with zeros, whose
    zero weight keeps them out of the sums."""
    shards = _length_shards(hidden_BLD)
    parts = []
    for x in (hidden_BLD, *others):
        batch, length, *rest = x.shape
        short = -(length // shards) % num_chunks
        x = x.reshape(batch, shards, length // shards, *rest)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, short)] + [(0, 0)] * len(rest))
        x = jnp.moveaxis(x.reshape(batch, shards, num_chunks, -1, *rest), 2, 0)
        parts.append(x.reshape(num_chunks, batch, -1, *rest))
    return tuple(parts)


def _join(x_NBC: jax.Array, like_BL: jax.Array) -> jax.Array:
    """(N, B, C, …) -> (B, L, …): the chunks of `_split` put together, laid out as like_BL is."""
    shards = _length_shards(like_BL)
    batch, length = like_BL.shape[:2]
    num_chunks, _, _, *rest = x_NBC.shape
    x = jnp.moveaxis(x_NBC.reshape(num_chunks, batch, shards, -1, *rest), 0, 2)
    x = x.reshape(batch, shards, -1, *rest)[:, :, :length // shards]
    return x.reshape(batch, length, *rest)


def _reduced_later(w: jax.Array, hidden_BLD: jax.Array) -> jax.Array:
    """w with a type that leaves its gradient unreduced over the devices that share the batch.

    Without it every chunk would end in an all-reduce of the head's whole gradient. Matrices
    only: a bias or norm scale is small, and such a type cannot be broadcast to the batch.
    """
    own = {axis for axes in split_of(w) for axis in axes}
    shared = {axis for axes in split_of(hidden_BLD)[:2] for axis in axes} - own
    if not shared or w.ndim < 2:
        return w
    return jax.sharding.reshard(
        w, PartitionSpec(*jax.typeof(w).sharding.spec.partitions, reduced=shared))


def _zero_gradient(w: jax.Array) -> jax.Array:
    """float32 zeros of the type that a gradient with respect to w has."""
    spec = jax.typeof(w).sharding.spec
    zeros = jnp.zeros_like(w, dtype=jnp.float32)
    if not spec.reduced:
        return zeros
    return jax.sharding.reshard(zeros, PartitionSpec(*spec.partitions, unreduced=spec.reduced))


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


def _zero_sums():
    return {name: jnp.zeros((), jnp.float32)
            for name in ("loss_sum", "z_loss_sum", "weight_sum", "correct_sum")}
