"""Which implementation of attention runs, and the fused kernels among them.

    plain     all logits in memory; the fastest for short sequences
    chunked   memory linear in the length, any backend, every bias and mask
    cudnn     FlashAttention of cuDNN on NVIDIA GPUs, 16-bit types, no bias
    splash    the Pallas kernel on TPUs (jax.experimental…splash_attention), no bias

"auto" takes a fused kernel where it can run and the sequence is long enough to gain by it,
else the plain one while its logits are few, else the chunked one. The choice is logged once.
All agree with `plain` up to rounding, wherever a query sees any key at all.

Shape letters: B batch, L query length, S key length, N query heads, K key/value heads, H head dim.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp

from t5x_lite.errors import UserError
from t5x_lite.layers.masks import Masking, Terms, allowed
from t5x_lite.parallel import products, sharding

IMPLEMENTATIONS = ("auto", "plain", "chunked", "cudnn", "splash")
FUSED_FROM = 1024          # keys from which a fused kernel repays its start
PLAIN_UP_TO = 2048 * 2048  # logits of a head that the plain implementation may hold
_LANES = 128               # splash works on tiles of this many positions

_log = logging.getLogger(__name__)


def obstacle(name: str, backend: str, q: jax.Array, k: jax.Array, bias: bool, terms_softcap: float,
             masking: Masking, value_dim: int = 0) -> str:
    """Why an implementation cannot run here; "" where it can."""
    if name == "plain":
        return ""
    if masking.q_positions.shape[0] > 1:
        return "rows stand at different positions, as in decoding"
    if name == "chunked":
        return ""
    if behind_cache(q, k, masking):
        return "it counts queries and keys from the same token, and a cache has earlier keys"
    if bias:
        return "it takes no bias on the logits"
    if value_dim not in (0, k.shape[3]):
        return f"it needs values as wide as keys, not {value_dim} and {k.shape[3]} features"
    if sharding.mesh_sizes().get("sequence", 1) > 1:
        return "it needs the whole length on a device, and mesh.sequence splits it"
    length, keys = q.shape[2], k.shape[2]
    if name == "cudnn":
        return _obstacle_of_cudnn(backend, q, terms_softcap)
    if backend != "tpu":
        return f"it needs a TPU, and this is a {backend}"
    if masking.k_prefix is not None:
        return "it has no prefix mask"
    if length % _LANES or keys % _LANES:
        return f"it needs lengths that divide by {_LANES}, not {length} and {keys}"
    return ""


def _obstacle_of_cudnn(backend: str, q: jax.Array, softcap: float) -> str:
    head_dim = q.shape[3]
    if backend != "gpu":
        return f"it needs an NVIDIA GPU, and this is a {backend}"
    if softcap:
        return "it has no logit_softcap"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs a 16-bit compute type, not {q.dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"it needs a head_dim of at most 128 that divides by 8, not {head_dim}"
    return cudnn_lacks()


@functools.cache
def cudnn_lacks() -> str:
    """What cuDNN's attention lacks in this process, "" for nothing: a plan for GPUs is made where
    there are none, and older GPUs (before Ampere) have no kernel."""
    x = jax.ShapeDtypeStruct((1, _LANES, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
                       x, x, x)
    except RuntimeError as error:
        return f"JAX says: {error}"
    return ""


def behind_cache(q: jax.Array, k: jax.Array, masking: Masking) -> bool:
    """Whether the queries come after keys of a cache, as far as shapes tell."""
    return masking.causal and q.shape[2] != k.shape[2]


def by_chunks(implementation: str, masking: Masking) -> bool:
    """Whether logits that no fused kernel can make, for their bias, are made by chunks."""
    (rows, length), (_, keys) = masking.q_positions.shape, masking.k_positions.shape
    return rows == 1 and (implementation == "chunked" or (
        implementation == "auto" and length * keys > PLAIN_UP_TO))


def choose(implementation: str, q: jax.Array, k: jax.Array, *, bias: bool, softcap: float,
           masking: Masking, value_dim: int = 0) -> str:
    """The implementation to run, decided by shapes, types and backend alone.

    Args:
        implementation: what the config asks for.
        q: [B, N, L, H]. k: [B, K, S, H].
        bias: whether anything but q . k makes the logits.
        value_dim: features of a value; 0: as many as a key's.
    Raises:
        UserError: the config names one that cannot run here.
    """
    backend = products.platform()

    def why_not(name):
        return obstacle(name, backend, q, k, bias, softcap, masking, value_dim)

    length, keys = q.shape[2], k.shape[2]
    if why_not("chunked"):
        return "plain"    # one of few tokens after a cache, whatever the config
    fused_after_cache = implementation in FUSED_KERNELS and behind_cache(q, k, masking)
    if implementation != "auto" and not fused_after_cache:
        if reason := why_not(implementation):
            raise UserError(f"attention.implementation={implementation!r}: {reason}. Choose "
                            f"'chunked' (any backend, bias and mask) or 'auto'.")
        chosen = implementation
    else:
        fused = next((n for n in FUSED_KERNELS if keys >= FUSED_FROM and not why_not(n)), "")
        chosen = fused or ("chunked" if by_chunks(implementation, masking) else "plain")
    log_once(f"attention: {chosen} for {length} queries over {keys} keys"
              f"{' with a bias' if bias else ''} on {backend}")
    return chosen


@functools.cache
def log_once(message: str) -> None:
    """Logs a choice the first time that it is made."""
    _log.info(message)


def balanced(kernel: Callable, ways: int, q, k, v, terms: Terms, masking: Masking) -> jax.Array:
    """A causal kernel that skips what is hidden, with as much left to do on every device.

    Of 2 n equal parts of the length, device i of the n along mesh.sequence holds 2 i and 2 i + 1,
    and computes i and 2 n - 1 - i, as Llama 3's context parallelism pairs them (Grattafiori et
    al. 2024, section 3.3.2). Queries go there and results come back; the keys, which are
    whole everywhere, stay. Runs on each device's own part of the arrays (shard_map).

    Args:
        kernel: (q, k, v, terms, masking) -> y_BNLH.
    """
    there = [[(i, min(2 * i + half, 2 * ways - 1 - 2 * i - half)) for i in range(ways)]
             for half in (0, 1)]

    def send(tree, routes):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, "sequence", routes), tree)

    relative = terms.relative
    # (array, its dim of queries); the positions' rows are one, the others' the batch's
    held = {"q": (q, 2), "positions": (masking.q_positions, 1),
            "segments": (masking.q_segments, 1),
            "relative": (None if relative is None else relative.query, 2)}
    parts = []
    for half in (0, 1):
        mine = {name: jnp.split(x, 2, axis=dim)[half] for name, (x, dim) in held.items()
                if x is not None}
        mine = send(mine, there[half])
        part_terms = terms if relative is None else dataclasses.replace(
            terms, relative=dataclasses.replace(relative, query=mine["relative"]))
        part_masking = dataclasses.replace(masking, q_positions=mine["positions"],
                                           q_segments=mine.get("segments"))
        y = kernel(mine["q"], k, v, part_terms, part_masking)
        parts.append(send(y, [(b, a) for a, b in there[half]]))
    return jnp.concatenate(parts, axis=2)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, masking: Masking, *, softcap: float = 0.0,
          implementation: str = "cudnn") -> jax.Array:
    """jax.nn.dot_product_attention of scaled q_BNLH, k_BKSH, v_BKSH -> [B, N, L, H].

    Causality and a causal window cost nothing. Segments and prefixes become a mask of all
    L * S pairs, one bit's byte a pair and row but not a head.

    Args:
        implementation: "xla" checks the arguments' meaning where there is no GPU.
    """
    assert not softcap
    args = {"is_causal": masking.causal}
    if masking.causal and masking.window:
        args["local_window_size"] = (masking.window - 1, 0)
    if masking.q_segments is not None or masking.k_prefix is not None or (
            masking.window and not masking.causal):
        args = {"mask": allowed(masking)}
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation=implementation, **args)
    return y.transpose(0, 2, 1, 3)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, masking: Masking, *, softcap: float = 0.0,
           interpret: bool = False) -> jax.Array:
    """Splash attention of scaled q_BNLH, k_BKSH, v_BKSH -> [B, N, L, H].

    Args:
        interpret: run the kernel's program on the CPU (for tests).
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels
    num_heads, (length, keys) = q.shape[1], (q.shape[2], k.shape[2])
    behind = masking.window - 1 if masking.window else None
    if masking.causal and not masking.window:
        mask = kernels.CausalMask((length, keys))
    elif masking.window:
        mask = kernels.LocalMask((length, keys), (behind, 0 if masking.causal else behind), 0)
    else:
        mask = kernels.FullMask((length, keys))
    l_tile, s_tile = (next(n for n in (512, 256, _LANES) if size % n == 0)
                      for size in (length, keys))
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * num_heads), head_shards=1, q_seq_shards=1,
        attn_logits_soft_cap=softcap or None, interpret=interpret,
        block_sizes=kernels.BlockSizes(
            block_q=l_tile, block_kv=s_tile, block_q_dkv=l_tile, block_kv_dkv=s_tile,
            block_q_dq=l_tile, block_kv_dq=s_tile))
    segments = None
    if masking.q_segments is not None:
        segments = kernels.SegmentIds(
            *(jnp.broadcast_to(x, (q.shape[0], x.shape[1]))
              for x in (masking.q_segments, masking.k_segments)))
    return jax.vmap(kernel)(q, k, v, segments)


FUSED_KERNELS = {"cudnn": cudnn, "splash": splash}
