"""softmax(q k^T + bias, masked) v: all at once, or by chunks in memory linear in the length.

Both take the same arguments. Queries come scaled; the logits and the softmax are float32.

Shape letters: B batch, L query length, S key length, N query heads, K key/value heads
(N = K * G), H head dim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from t5x_lite.layers.masks import MASKED, Masking, Terms, allowed
from t5x_lite.parallel import sharding


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q_BNLH . k_BKSH -> float32 [B, N, L, S]; query head n reads key head n // G."""
    batch, num_heads, length, head_dim = q.shape
    groups = num_heads // k.shape[1]
    if groups == 1:
        return sharding.einsum("BNLH,BNSH->BNLS", q, k, preferred_element_type=jnp.float32,
                               out=("act_batch", "act_heads", "act_length", None))
    if k.shape[1] == 1:   # of all heads, however these are split
        return sharding.einsum("BNLH,BSH->BNLS", q, k[:, 0], preferred_element_type=jnp.float32,
                               out=("act_batch", "act_heads", "act_length", None))
    split = ("act_batch", "act_kv_heads", None, "act_length", None)
    q = sharding.reshape(q, (batch, num_heads // groups, groups, length, head_dim), *split)
    logits = sharding.einsum("BKGLH,BKSH->BKGLS", q, k, out=split,
                             preferred_element_type=jnp.float32)
    return sharding.reshape(logits, (batch, num_heads, length, k.shape[2]),
                            "act_batch", "act_heads", "act_length", None)


def mix(probs: jax.Array, v: jax.Array) -> jax.Array:
    """probs_BNLS, v_BKSH -> [B, N, L, H] in v's dtype."""
    batch, num_heads, length, keys = probs.shape
    groups, probs = num_heads // v.shape[1], probs.astype(v.dtype)
    if groups == 1:
        return sharding.einsum("BNLS,BNSH->BNLH", probs, v,
                               out=("act_batch", "act_heads", "act_length", None))
    if v.shape[1] == 1:
        return sharding.einsum("BNLS,BSH->BNLH", probs, v[:, 0],
                               out=("act_batch", "act_heads", "act_length", None))
    split = ("act_batch", "act_kv_heads", None, "act_length", None)
    probs = sharding.reshape(probs, (batch, num_heads // groups, groups, length, keys), *split)
    y = sharding.einsum("BKGLS,BKSH->BKGLH", probs, v, out=split)
    return sharding.reshape(y, (batch, num_heads, length, v.shape[3]),
                            "act_batch", "act_heads", "act_length", None)


def logits(q: jax.Array, k: jax.Array, terms: Terms, masking: Masking) -> jax.Array:
    """The masked attention logits, float32 [B, N, L, S]."""
    x = scores(q, k)
    if terms.relative is not None:
        x = x + terms.relative(masking)
    if terms.softcap:
        x = terms.softcap * jnp.tanh(x / terms.softcap)
    if terms.bias is not None:
        bias = terms.bias
        if callable(bias):
            bias = bias(masking.q_positions, masking.k_positions)
        x = x + bias.astype(jnp.float32)
    mask = allowed(masking)
    return x if mask is None else jnp.where(mask, x, MASKED)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, terms: Terms, masking: Masking) -> jax.Array:
    """Attention with all L * S logits of a head in memory.

    Args:
        q: [B, N, L, H], scaled. k: [B, K, S, H]. v: [B, K, S, V].
    Returns:
        [B, N, L, H] in v's dtype.
    """
    x = logits(q, k, terms, masking)
    if v.dtype == jnp.float32:
        return mix(jax.nn.softmax(x, axis=-1), v)
    forward, backward = map(sharding.as_here, (_weigh, _weigh_backward))
    run = jax.custom_vjp(lambda x, v: forward(x, v)[0])
    run.defvjp(forward, backward)
    return run(x, v)


def _weigh(x: jax.Array, v: jax.Array):
    """softmax(x_BNLS) v_BKSH, and for the backward pass one copy of the probabilities, in v's type.

    Left to autodiff the softmax keeps a float32 copy and the product one of v's type: in a layer of
    Switch-base three times as many bytes as this, which are the most of all that it keeps.
    """
    probs = jax.nn.softmax(x, axis=-1).astype(v.dtype)
    return mix(probs, v), (probs, v)


def _weigh_backward(residuals, dy: jax.Array):
    """Cotangents of (logits, v), from the probabilities as the product had them, rounded to v's type: the
    logits' gradient is off by up to 1.6 times as much (test_dot_product.py), under 0.5 % of its norm."""
    probs, v = residuals
    d_probs, d_v = jax.vjp(mix, probs, v)[1](dy)
    probs, d_probs = probs.astype(jnp.float32), d_probs.astype(jnp.float32)
    weighted = probs * d_probs
    return weighted - probs * jnp.sum(weighted, axis=-1, keepdims=True), d_v


# --- by chunks ------------------------------------------------------------------------------------

def chunked(q: jax.Array, k: jax.Array, v: jax.Array, terms: Terms, masking: Masking, *,
            chunk: int) -> jax.Array:
    """`plain` with chunk * chunk logits of a head at a time, forward and backward.

    The softmax is accumulated online over chunks of keys (Milakov & Gimelshein 2018; Rabe &
    Staats 2021) and its statistics are kept, so that the backward pass makes each chunk's
    logits again (FlashAttention, Dao et al. 2022). Chunks that the causal mask or the window
    hides altogether are skipped. Positions must be indices of the row, the keys' from 0.

    Args:
        terms: a bias must be a function of positions.
        chunk: queries, and keys, at a time.
    """
    assert masking.q_positions.shape[0] == 1, "chunks need rows that agree on positions"
    assert terms.bias is None or callable(terms.bias), "a bias by positions"
    length, keys = q.shape[2], k.shape[2]
    plan = Plan(min(chunk, length), min(chunk, keys), keys, masking.causal, masking.window,
                masking.k_prefix is not None)
    relative = terms.relative
    queries = tuple(sharding.shard(x, "act_batch", "act_heads", None, None)
                    for x in ((q,) if relative is None else (q, relative.query)))
    if masking.q_segments is not None:
        masking = dataclasses.replace(
            masking, q_segments=sharding.shard(masking.q_segments, "act_batch", None))
    terms = dataclasses.replace(terms, relative=None)
    forward, backward = (sharding.as_here(functools.partial(f, plan))
                         for f in (_forward, _backward))
    run = jax.custom_vjp(lambda *args: forward(*args)[0])
    run.defvjp(forward, backward)
    shared = None if relative is None else dataclasses.replace(relative, query=None)
    y = run(_pad(queries, plan.q_chunk), *_pad((k, v), plan.k_chunk), terms, shared,
            _pad_masking(masking, plan))
    return sharding.shard(y[:, :, :length], "act_batch", "act_heads", "act_length", None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The chunks of one call."""

    q_chunk: int
    k_chunk: int
    keys: int          # before padding
    causal: bool
    window: int
    prefix: bool

    def visible(self, q_positions: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first and one past the last chunk of keys that chunk i of the queries may see.

        Keys count from 0. Queries may begin later: after a cache, and on a device that holds its
        part of a split length. Stages have neither, and the bounds must not differ among them.
        """
        low, high = 0, -(-self.keys // self.k_chunk)
        first = i * self.q_chunk + (0 if sharding.mapped() else q_positions[0, 0])
        last = first + self.q_chunk - 1
        if self.window and not self.prefix:
            low = jnp.maximum(first - self.window + 1, 0) // self.k_chunk
            high = jnp.minimum(high, (last + self.window - 1) // self.k_chunk + 1)
        if self.causal and not self.prefix:
            high = jnp.minimum(high, last // self.k_chunk + 1)
        return jnp.minimum(low, high - 1), high


def _pad(tree, chunk: int):
    """Leaves [B, N, L, H] with L padded to a multiple of `chunk`."""
    return jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % chunk), (0, 0))), tree)


def _pad_masking(masking: Masking, plan: Plan) -> Masking:
    """Positions that count on, segments of padding, no prefix."""
    def pad(x, chunk):
        return None if x is None else jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)))

    def index(x, chunk):
        return x[:, :1] + jnp.arange(x.shape[1] + -x.shape[1] % chunk)

    return dataclasses.replace(
        masking, q_positions=index(masking.q_positions, plan.q_chunk),
        k_positions=index(masking.k_positions, plan.k_chunk),
        q_segments=pad(masking.q_segments, plan.q_chunk),
        k_segments=pad(masking.k_segments, plan.k_chunk),
        k_prefix=pad(masking.k_prefix, plan.k_chunk))


def _slice(tree, i, chunk: int, axis: int):
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=axis), tree)


def _chunk_masking(masking: Masking, plan: Plan, i, j) -> Masking:
    """The masking of chunk i of the queries over chunk j of the keys."""
    q, k = ((masking.q_positions, masking.q_segments),
            (masking.k_positions, masking.k_segments, masking.k_prefix))
    return Masking(*(x for pair in zip(_slice(q, i, plan.q_chunk, 1),
                                       _slice(k[:2], j, plan.k_chunk, 1), strict=True)
                     for x in pair),
                   _slice(k[2], j, plan.k_chunk, 1), masking.causal, masking.window)


def _chunk_logits(plan: Plan, queries, k, terms: Terms, relative, masking: Masking):
    """Logits of one chunk, float32; padded keys at -inf vanish whatever else is masked."""
    if relative is not None:
        terms = dataclasses.replace(
            terms, relative=dataclasses.replace(relative, query=queries[1]))
    x = logits(queries[0], k, terms, masking)
    if plan.keys % plan.k_chunk:
        x = jnp.where(masking.k_positions[:, None, None, :] < plan.keys, x, -jnp.inf)
    return x


def _forward(plan, queries, k, v, terms, relative, masking):
    """-> (y_BNLH, residuals: the arguments, y and the softmax's maximum and sum [B, N, L])."""
    def one_chunk(_, i):
        mine = _slice(queries, i, plan.q_chunk, 2)

        def over_keys(j, state):
            top, total, y = state
            k_j, v_j = _slice((k, v), j, plan.k_chunk, 2)
            x = _chunk_logits(plan, mine, k_j, terms, relative,
                              _chunk_masking(masking, plan, i, j))
            new_top = jnp.maximum(top, jnp.max(x, axis=-1))
            p, shrink = jnp.exp(x - new_top[..., None]), jnp.exp(top - new_top)
            y = y * shrink[..., None] + mix(p, v_j).astype(jnp.float32)
            return new_top, total * shrink + jnp.sum(p, axis=-1), y

        flat = mine[0][..., 0].astype(jnp.float32)
        start = (jnp.full_like(flat, -jnp.inf), jnp.zeros_like(flat),
                 jnp.broadcast_to(jnp.zeros_like(flat)[..., None], (*flat.shape, v.shape[3])))
        top, total, y = jax.lax.fori_loop(*plan.visible(masking.q_positions, i), over_keys, start)
        return None, ((y / total[..., None]).astype(v.dtype), top, total)

    chunks = queries[0].shape[2] // plan.q_chunk
    _, (y, top, total) = jax.lax.scan(one_chunk, None, jnp.arange(chunks))
    y, top, total = _join(y), _join(top), _join(total)
    return y, (queries, k, v, terms, relative, masking, y, top, total)


def _join(x: jax.Array) -> jax.Array:
    """[chunks, B, N, l, …] -> [B, N, L, …]."""
    x = jnp.moveaxis(x, 0, 2)
    return sharding.reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:]),
                            "act_batch", "act_heads", *(None,) * (x.ndim - 3))


def _backward(plan, residuals, dy):
    """Cotangents of (queries, k, v, terms, relative, masking)."""
    queries, k, v, terms, relative, masking, y, top, total = residuals
    delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)
    floats = functools.partial(jax.tree.map, lambda x: jnp.zeros_like(x, jnp.float32))

    def one_chunk(carry, i):
        mine = _slice(queries, i, plan.q_chunk, 2)
        dy_i, top_i, total_i, delta_i = _slice((dy, top, total, delta), i, plan.q_chunk, 2)

        def over_keys(j, carry):
            d_mine, d_kv, d_shared = carry
            kv = _slice((k, v), j, plan.k_chunk, 2)
            x, pull = jax.vjp(
                lambda mine, k, terms, relative: _chunk_logits(
                    plan, mine, k, terms, relative, _chunk_masking(masking, plan, i, j)),
                mine, kv[0], terms, relative)
            p = jnp.exp(x - top_i[..., None]) / total_i[..., None]
            dv_j, = jax.vjp(functools.partial(mix, p), kv[1])[1](dy_i)
            dx = p * (scores(dy_i, kv[1]) - delta_i[..., None])
            *d_pair, d_terms, d_relative = pull(dx)
            d_mine, d_shared = jax.tree.map(
                lambda a, b: a + b.astype(jnp.float32),
                (d_mine, d_shared), (d_pair[0], (d_terms, d_relative)))
            d_kv = jax.tree.map(
                lambda a, b: jax.lax.dynamic_update_slice_in_dim(
                    a, jax.lax.dynamic_slice_in_dim(a, j * plan.k_chunk, plan.k_chunk, axis=2)
                    + b.astype(jnp.float32), j * plan.k_chunk, axis=2),
                d_kv, (d_pair[1], dv_j))
            return d_mine, d_kv, d_shared

        d_mine, *carry = jax.lax.fori_loop(
            *plan.visible(masking.q_positions, i), over_keys, (floats(mine), *carry))
        return tuple(carry), d_mine

    start = (floats((k, v)), floats((terms, relative)))
    chunks = queries[0].shape[2] // plan.q_chunk
    (d_kv, d_shared), d_queries = jax.lax.scan(one_chunk, start, jnp.arange(chunks))
    d_queries = jax.tree.map(_join, d_queries)
    cotangents = jax.tree.map(lambda d, x: d.astype(x.dtype), (d_queries, *d_kv, *d_shared),
                              (queries, k, v, terms, relative))
    return *cotangents, None
