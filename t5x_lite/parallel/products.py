"""Products of bfloat16 matrices that a CPU multiplies as such, and what machine this is.

XLA's CPU backend widens the operands of a bfloat16 product with a bfloat16 result to float32, and
is then no faster than in float32. With a float32 result the same operands go to the chip's own
instructions (AMX, AVX-512 BF16). So the products with weights are made with a float32 result
here, forward and backward, and rounded afterwards: what the widened product gives, up to the
order of its sums.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_FLAGS = ("amx_bf16", "avx512_bf16")


def platform() -> str:
    """cpu, gpu or tpu: of the mesh, which may be only described (plan), else of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device is not None else jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


@functools.cache
def chip_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16 products, as Linux says."""
    described = pathlib.Path("/proc/cpuinfo")
    if not described.exists():
        return False
    flags = next((line for line in described.read_text().splitlines()
                  if line.startswith("flags")), "")
    return any(flag in flags.split() for flag in _FLAGS)


def read_as(dtype: jnp.dtype) -> jnp.dtype:
    """The type that products of a cache in this type read: a CPU widens 16-bit ones to float32, which
    a cache is better kept in than widened at every token."""
    return jnp.dtype(jnp.float32) if platform() == "cpu" and jnp.dtype(dtype).itemsize == 2 \
        else jnp.dtype(dtype)


def wide(x: jax.Array, w: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    """x_…D @ w_DF with a float32 result, whatever the operands' type; for use without a gradient."""
    return jnp.einsum("...D,DF->...F", x, w, preferred_element_type=jnp.float32,
                      out_sharding=spec)


def applies(x: jax.Array, w: jax.Array) -> bool:
    """Whether `product` is the way to multiply these: two bfloat16 matrices on such a CPU.

    XLA has no such product of every shape: one of more dims may end as "Unsupported element type".
    """
    narrow = all(a.ndim == 2 and a.dtype == jnp.bfloat16 for a in (x, w))
    return narrow and platform() == "cpu" and chip_multiplies_bfloat16()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, w: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    """x_AD @ w_DF in bfloat16, sharded by `spec` where there is a mesh (else None)."""
    return _wide("AD,DF->AF", x, w, spec)


def _wide(equation: str, a: jax.Array, b: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    wide = jnp.einsum(equation, a, b, preferred_element_type=jnp.float32, out_sharding=spec)
    return wide.astype(jnp.bfloat16)


def _backward(spec, operands, g):
    x, w = operands
    like = (lambda a: None) if spec is None else (lambda a: jax.typeof(a).sharding.spec)
    return _wide("AF,DF->AD", g, w, like(x)), _wide("AD,AF->DF", x, g, like(w))


product.defvjp(lambda x, w, spec: (product(x, w, spec), (x, w)), _backward)
