"""Checksums of arrays' bits, which do not depend on the mesh, and whether their numbers are finite."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_lite.parallel import offload


def digest(x: jax.Array) -> jax.Array:
    """uint32 checksum of an array's bits: sum_i bits_i * w_i mod 2^32, w_i odd and unlike.

    Integer addition has no rounding, so every mesh computes the same number. The weights
    depend on the index, so that exchanged or shifted blocks are noticed.
    """
    x = offload.to_device(x)
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool:
        bits = x.astype(jnp.uint32)
    else:
        width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    weight = jnp.uint32(1)
    for dim, size in enumerate(bits.shape):
        shape = [size if d == dim else 1 for d in range(bits.ndim)]
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
        weight = weight * jnp.uint32(2654435761) + 2 * index  # odd * odd + even: stays odd
    if bits.ndim < 2:
        return jnp.sum(bits * weight, dtype=jnp.uint32)
    # Row by row, which CPUs do faster than one sum over all: XLA would join the two.
    rows = jnp.sum(bits * weight, axis=-1, dtype=jnp.uint32)
    return jnp.sum(jax.lax.optimization_barrier(rows), dtype=jnp.uint32)


def _has_finite_numbers(x: jax.Array) -> jax.Array:
    """bool scalar: no NaN or infinity; True of integers."""
    x = offload.to_device(x)
    return jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool(True)


class Digests(NamedTuple):
    """What a checkpoint is verified by: {path: uint32} and {path: no NaN and no infinity}."""

    bits: dict[str, jax.Array]
    finite: dict[str, jax.Array]


@functools.partial(jax.jit, static_argnames="finite")
def _digest_all(arrays: Mapping[str, jax.Array], finite: bool) -> Digests:
    # One program: simulated CPU devices stand still for ever once more than 32 programs with
    # collectives have been started and none has ended; and waiting for one program an array took
    # three quarters of a save's time.
    return Digests({path: digest(x) for path, x in arrays.items()},
                    {path: _has_finite_numbers(x) for path, x in arrays.items() if finite})


def digests_of(arrays: Mapping[str, jax.Array], finite: bool = False) -> Digests:
    """The digests of these arrays; without `finite`, the bits alone. Dispatched, not waited for, but for
    arrays in the host's memory: those visit the device one by one, which may have no room for all."""
    on_host = [p for p, x in arrays.items() if offload.is_on_host(x)]
    places: dict = {}   # a program is for arrays on the same devices
    for path in sorted(arrays.keys() - set(on_host)):
        places.setdefault(frozenset(arrays[path].sharding.device_set), []).append(path)
    total = Digests({}, {})
    for paths in places.values():
        some = _digest_all({p: arrays[p] for p in paths}, finite)
        total = Digests(total.bits | some.bits, total.finite | some.finite)
    for path in on_host:
        one = jax.block_until_ready(_digest_all({path: arrays[path]}, finite))
        total = Digests(total.bits | one.bits, total.finite | one.finite)
    return total
