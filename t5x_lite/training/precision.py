"""Which number format each tensor has, stochastic rounding, and fp16's loss scaling.

A 16-bit parameter cannot hold small updates: bfloat16 has 8 significant bits, so at 1.0 an
update below 2**-9 rounds away. Three remedies are policies here, as Gopher compared them
(Rae et al. 2021, appendix C2): keep float32 parameters and only compute in bfloat16; round
the updated parameter stochastically, so that what is lost in one step is gained in another;
or keep a float32 copy in the (sharded) optimizer state and round it stochastically to the
bfloat16 parameters that the next forward pass uses. float16 has the bits but not the range:
small gradients underflow, so the loss is multiplied by a scale that grows until something
overflows (Micikevicius et al. 2018). fp8 narrows the products with weights further (fp8.py).

Everything here is a pure function; a random draw depends on its key and position only, so
that a sharded array is rounded like an unsharded one, bit for bit.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from t5x_lite.errors import Count, Positive, at_least, between, one_of, positive


@dataclasses.dataclass(frozen=True)
class Policy:
    """Number formats by role. Losses, logits, softmax, norms, gradients summed over micro-batches
    and second moments are float32 in all of them."""

    name: str
    param_dtype: str = "float32"       # what a forward pass reads and a checkpoint's params hold
    compute_dtype: str = "float32"     # matrix multiplications and activations
    stochastic_rounding: bool = False  # how the updated value becomes param_dtype
    master_copy: bool = False          # float32 parameters in the optimizer state
    loss_scaling: bool = False         # dynamic, for float16's range
    fp8: bool = False                  # products with weights in 8-bit floats (fp8.py)

    @property
    def matmul_dtype(self) -> str:
        """The operands of the products that a step consists of, for peaks of hardware tables."""
        return "float8_e4m3fn" if self.fp8 else self.compute_dtype


POLICIES: dict[str, Policy] = {p.name: p for p in (
    Policy("float32"),
    Policy("bf16", compute_dtype="bfloat16"),
    Policy("bf16_params", param_dtype="bfloat16", compute_dtype="bfloat16"),
    Policy("bf16_params_sr", param_dtype="bfloat16", compute_dtype="bfloat16",
           stochastic_rounding=True),
    Policy("bf16_sr_forward", param_dtype="bfloat16", compute_dtype="bfloat16",
           stochastic_rounding=True, master_copy=True),
    Policy("fp16", compute_dtype="float16", loss_scaling=True),
    Policy("fp8", compute_dtype="bfloat16", fp8=True),
)}


# What other programs call them: PyTorch's and JAX's dtypes, transformers' and DeepSpeed's flags.
ELSEWHERE = {"bfloat16": "bf16", "bf16_mixed": "bf16", "bf16-mixed": "bf16", "mixed": "bf16",
             "float16": "fp16", "half": "fp16", "16": "fp16", "16-mixed": "fp16",
             "fp32": "float32", "f32": "float32", "float": "float32", "32": "float32",
             "float8": "fp8", "float8_e4m3fn": "fp8", "fp8_e4m3": "fp8", "fp8_hybrid": "fp8",
             "tf32": "float32", "full": "float32", "single": "float32", "bf16_full": "bf16_params"}


def policy(name: str) -> Policy:
    """The policy of this name. Raises UserError naming the nearest one."""
    return POLICIES[one_of("precision", name, POLICIES, ELSEWHERE)]


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16, to one of the two neighbours with probabilities whose mean is x.

    bfloat16 is float32 without its low 16 bits, so adding 16 random bits and truncating
    carries into the kept half with exactly the right probability (denormals included).
    Infinities and NaNs are kept; a value between the largest bfloat16 and the largest
    float32 may carry to infinity, as it may under rounding to nearest.

    Args:
        x: float32, any shape and sharding.
        key: a typed JAX key; the result depends on it and on the unsharded position only.
    """
    assert x.dtype == jnp.float32, x.dtype
    sharding = jax.typeof(x).sharding
    noise = jax.random.bits(key, x.shape, jnp.uint32,
                            out_sharding=None if sharding.mesh.empty else sharding)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise & jnp.uint32(0xFFFF))
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


@dataclasses.dataclass(frozen=True)
class LossScaleConfig:
    """Dynamic loss scaling: doubled after a run of finite steps, halved on an overflow."""

    initial: Positive = 2.0**15
    factor: float = 2.0
    growth_interval: Count = 2000  # finite steps before the scale grows
    minimum: Positive = 1.0
    maximum: Positive = 2.0**24

    def __post_init__(self):
        positive("loss_scale.minimum", self.minimum)
        between("loss_scale.initial", self.initial, self.minimum, self.maximum,
                "The ends are loss_scale.minimum and loss_scale.maximum.")
        between("loss_scale.factor", self.factor, 1, math.inf, open_below=True)
        at_least("loss_scale.growth_interval", self.growth_interval, 1)


def loss_scale_init(config: LossScaleConfig) -> dict[str, jax.Array]:
    """{"scale": float32, "finite_steps": int32}: multiply the loss by `scale`."""
    return {"scale": jnp.asarray(config.initial, jnp.float32),
            "finite_steps": jnp.zeros((), jnp.int32)}


def unscale(grads, state: dict[str, jax.Array]):
    """(gradients of the unscaled loss in float32, bool: are all of them finite)."""
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / state["scale"], grads)
    return grads, all_finite(grads)


def all_finite(tree) -> jax.Array:
    """bool scalar: no NaN or infinity in any leaf."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def loss_scale_adjust(state: dict[str, jax.Array], finite: jax.Array,
                      config: LossScaleConfig) -> dict[str, jax.Array]:
    """The next loss-scale state after a step whose gradients were finite, or not."""
    run = jnp.where(finite, state["finite_steps"] + 1, 0)
    grow = run >= config.growth_interval
    factor = jnp.where(finite, jnp.where(grow, config.factor, 1.0), 1.0 / config.factor)
    return {"scale": jnp.clip(state["scale"] * factor, config.minimum, config.maximum),
            "finite_steps": jnp.where(grow, 0, run)}
