"""The optimizers by name, one row each: how gradients become steps.

A row makes an optax transformation, chains, masks and partitions included, of float32 flat dicts
{path: array}: gradients to directions, which the optimizer multiplies by the learning rate and
subtracts. What of its state mirrors the parameters is sharded, offloaded and saved like them
(optax_state.py). It must act on each layer alone: an array with `Trained.stacked` leading dims is as
many parameters, which matters where a transformation averages over an array.

    METHODS["yogi"] = Method(lambda c, trained: optax.scale_by_yogi(c.beta1, c.beta2, c.eps))

Equal to optax's own of the same names (a test holds three steps to it, twenty of muon): adamw, adam,
lion, sgd, muon, lamb, ademamix; ours: adafactor.py, which has T5X's numbers, and sophia, which has
optax's Sophia with another estimate of the curvature (see _sophia).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from t5x_lite.errors import Count, Positive, Rate
from t5x_lite.training import adafactor, muon, schedules

# Leading logical axes that enumerate independent parameters.
STACK_AXES = ("layers", "expert")
# Logical axes of tables that are looked up, or end in a choice among their rows: no maps between
# spaces, which is what muon makes orthogonal.
TABLE_AXES = frozenset({"vocab", "position", "buckets"})


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Parameters whose whole path matches `pattern`; the first group that matches wins."""

    pattern: str
    learning_rate_multiplier: float = 1.0
    schedule: schedules.ScheduleConfig | None = None  # None: the optimizer's own
    weight_decay: float | None = None  # given: for every member, vectors too
    frozen: bool = False               # no update and no optimizer state


@dataclasses.dataclass(frozen=True)
class AdafactorConfig:
    """See adafactor.scale_by_adafactor."""

    factored: bool = True
    min_dim_size_to_factor: int = 128
    decay_rate: float = 0.8
    step_offset: int = 0
    clipping_threshold: float = 1.0
    multiply_by_parameter_scale: bool = True
    epsilon1: float = 1e-30
    epsilon2: float = 1e-3


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Of matrices, see muon.py; tables, vectors and the head have AdamW with beta1, beta2, eps."""

    beta: Rate = 0.95           # of the momentum
    steps: Count = 5               # Newton-Schulz iterations
    nesterov: bool = True        # of both, as in optax
    # RMS of a matrix's steps over the learning rate: 0.2 makes AdamW's learning rates serve (Liu
    # et al. 2025); 0: spectral norm sqrt(max(1, out / in)) (Jordan et al. 2024).
    consistent_rms: float = 0.0


@dataclasses.dataclass(frozen=True)
class AdemamixConfig:
    """The slow average of gradients beside Adam's (Pagliardini et al. 2024, arXiv:2409.03137)."""

    beta3: Rate = 0.9999   # of the slow average
    alpha: float = 5.0      # its weight; both without the paper's warm-up


@dataclasses.dataclass(frozen=True)
class SophiaConfig:
    """Sophia (Liu et al. 2023, arXiv:2305.14342); take beta1 0.965 and beta2 0.99."""

    gamma: Positive = 0.01      # scales the curvature; larger clips fewer numbers
    interval: Count = 10       # steps between estimates of the curvature
    clip: Positive = 1.0        # largest step in units of the learning rate


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One optimizer for all parameters, with exceptions by group."""

    name: str = "adafactor"    # a key of methods.METHODS
    schedule: schedules.ScheduleConfig = schedules.ScheduleConfig()
    clip_norm: float = 0.0     # largest global gradient norm; 0: no clipping
    weight_decay: float = 0.0  # of matrices; biases and norm scales have none unless a group says
    # AdamW, Lion, Adafactor and others that decay apart from the gradient subtract weight_decay *
    # learning_rate**exponent * parameter; 0 is T5X's Adafactor, 2 (with weight_decay 1) PaLM's. Adam
    # and SGD add weight_decay * parameter to the gradient instead, LAMB to the direction.
    weight_decay_lr_exponent: float = 1.0
    beta1: Rate = 0.9         # Adam, AdamW, Lion, LAMB, AdEMAMix, Sophia, Muon's AdamW
    beta2: Rate = 0.999       # … (GPT-3 and LLaMA take 0.95, Lion 0.99)
    eps: float = 1e-8          # all of them but Lion
    momentum: Rate = 0.0      # SGD, Adafactor
    momentum_dtype: str = "float32"  # of first moments: float32 or bfloat16
    adafactor: AdafactorConfig = AdafactorConfig()
    muon: MuonConfig = MuonConfig()
    ademamix: AdemamixConfig = AdemamixConfig()
    sophia: SophiaConfig = SophiaConfig()
    # Steps after which every update uses the gradients of the step before (ZeRO-Offload's one-step
    # delayed update, Ren et al. 2021, section 5.2), kept beside the moments; None: its own step's.
    delay_after: int | None = None
    groups: tuple[GroupConfig, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a row may know of the parameters that train, each by its path."""

    logical_axes: Mapping[str, tuple[str | None, ...]]
    stacked: Mapping[str, int]         # leading dims that enumerate layers or experts
    weight_decay: Mapping[str, float]

    def is_map(self, path: str) -> bool:
        """Whether one layer of it is a matrix that maps one space to another, and no table."""
        axes = self.logical_axes[path]
        return len(axes) - self.stacked[path] == 2 and not TABLE_AXES & set(axes)


# Powers of the width that learning rates have under model.parametrization=mup, by ParamInfo.role:
# what makes every update change activations as much at any width (Yang et al. 2022, table 3).
Widths = Mapping[str, float]
_BY_ELEMENT = {"vector": 0.0, "hidden": -1.0, "head": -1.0, "narrow": -1.0}    # table 3's Adam
# Steps in proportion to parameters, whose deviation is width^-1/2 where hidden, width^-1 in heads.
_BY_SIZE = {"vector": 0.0, "hidden": -0.5, "head": 0.0, "narrow": 0.0}
_BY_GRADIENT = {"vector": 1.0, "hidden": 0.0, "head": -1.0, "narrow": -1.0}    # table 3's SGD
# Steps of spectral norm sqrt(out / in) leave activations alike (Yang et al. 2023,
# arXiv:2310.17813): muon's have 1 where out <= in, or sqrt(max(in, out)) by consistent_rms.
_MUON = {"vector": 0.0, "hidden": 0.0, "head": -1.0, "narrow": -0.5}
_MUON_RMS = {"vector": 0.0, "hidden": -0.5, "head": -1.0, "narrow": -1.0}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row: how a name becomes an optax transformation, and what is left to do around it."""

    transformation: Callable[[OptimizerConfig, Trained], optax.GradientTransformation]
    # What weight decay is added to: the parameter's change, the gradient, or what the
    # transformation adds it to by itself.
    decay: Literal["change", "gradient", "own"] = "change"
    scales_by_rate: bool = False     # the transformation applies the learning rate, a dict by path
    # (config, moment, a layer's stacked dims, shape, logical axes) -> the logical axes of a moment
    # that has not its parameter's shape; None: such arrays are whole on every device.
    moment_axes: Callable[..., Sequence[str | None]] | None = None
    widths: Callable[[OptimizerConfig], Widths] = lambda c: _BY_ELEMENT   # see Widths


def _adam(c: OptimizerConfig, trained: Trained):
    return optax.scale_by_adam(c.beta1, c.beta2, c.eps, mu_dtype=c.momentum_dtype)


def _lion(c: OptimizerConfig, trained: Trained):
    return optax.scale_by_lion(c.beta1, c.beta2, mu_dtype=c.momentum_dtype)


def _sgd(c: OptimizerConfig, trained: Trained):
    if c.momentum:
        return optax.trace(c.momentum, accumulator_dtype=c.momentum_dtype)
    return optax.identity()


def _adafactor(c: OptimizerConfig, trained: Trained):
    return adafactor.scale_by_adafactor(
        trained.stacked, momentum=c.momentum, momentum_dtype=c.momentum_dtype,
        **dataclasses.asdict(c.adafactor))


def _adafactor_axes(c: OptimizerConfig, moment: str, stacked: int, shape, axes):
    row, col = adafactor.factored_dims(shape, stacked, c.adafactor.min_dim_size_to_factor)
    gone = {"v_row": col, "v_col": row}[moment]
    return axes[:gone] + axes[gone + 1:]


def _muon(c: OptimizerConfig, trained: Trained):
    adam = optax.scale_by_adam(c.beta1, c.beta2, c.eps, mu_dtype=c.momentum_dtype,
                               nesterov=c.muon.nesterov)
    maps = muon.scale_by_muon(trained.stacked, eps=c.eps, momentum_dtype=c.momentum_dtype,
                              **dataclasses.asdict(c.muon))
    return optax.partition({"map": maps, "rest": adam}, lambda params: {
        path: "map" if trained.is_map(path) else "rest" for path in params})


def _lamb(c: OptimizerConfig, trained: Trained):
    return optax.chain(_adam(c, trained), add_decay(trained.weight_decay),
                       scale_by_trust_ratio(trained.stacked))


def _ademamix(c: OptimizerConfig, trained: Trained):
    return optax.contrib.scale_by_ademamix(
        c.beta1, c.beta2, c.ademamix.beta3, c.ademamix.alpha, c.eps, mu_dtype=c.momentum_dtype)


def _sophia(c: OptimizerConfig, trained: Trained):
    """Optax's Sophia whose curvature is the mean square of the training gradient: the diagonal of
    the empirical Fisher matrix, where the paper draws labels from the model, or a product with the
    Hessian, in a backward pass of its own."""
    squares = optax.stateless(lambda grads, _: jax.tree.map(jnp.square, grads))
    sophia = optax.contrib.sophia(
        1.0, c.beta1, c.beta2, c.eps, gamma=c.sophia.gamma, clip_threshold=c.sophia.clip,
        update_interval=c.sophia.interval, hessian_diagonal_fn=squares,
        weight_decay=0.0, mu_dtype=c.momentum_dtype)
    return optax.chain(sophia, optax.scale(-1.0))   # it has the sign of updates


# Add a row to add an optimizer.
METHODS: dict[str, Method] = {
    "adafactor": Method(
        _adafactor, scales_by_rate=True, moment_axes=_adafactor_axes, widths=lambda c:
        _BY_SIZE if c.adafactor.multiply_by_parameter_scale else _BY_ELEMENT),
    "adamw": Method(_adam),
    "adam": Method(_adam, decay="gradient"),
    "lion": Method(_lion),
    "sgd": Method(_sgd, decay="gradient", widths=lambda c: _BY_GRADIENT),
    "muon": Method(_muon, widths=lambda c: _MUON_RMS if c.muon.consistent_rms else _MUON),
    "lamb": Method(_lamb, decay="own", widths=lambda c: _BY_SIZE),
    "ademamix": Method(_ademamix),
    "sophia": Method(_sophia),
}


def add_decay(weight_decay: Mapping[str, float]) -> optax.GradientTransformation:
    """Adds weight_decay[path] * parameter to each direction."""
    def update(updates: dict[str, Any], params: dict[str, Any]):
        return {path: u + weight_decay[path] * params[path] if weight_decay[path] else u
                for path, u in updates.items()}
    return optax.stateless(update)


def scale_by_trust_ratio(stacked: Mapping[str, int]) -> optax.GradientTransformation:
    """optax.scale_by_trust_ratio (You et al. 2020) of each layer of a stack alone: directions
    times |parameter| / |direction|, where both are above 0."""
    def norm(x: jax.Array, dims: int) -> jax.Array:
        within = tuple(range(dims, x.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=within, keepdims=True))

    def update(updates: dict[str, Any], params: dict[str, Any]):
        scaled = {}
        for path, u in updates.items():
            size, length = norm(params[path], stacked[path]), norm(u, stacked[path])
            usable = (size > 0) & (length > 0)
            scaled[path] = u * jnp.where(usable, size / jnp.where(usable, length, 1.0), 1.0)
        return scaled
    return optax.stateless(update)


def stacked_dims(logical_axes: tuple[str | None, ...]) -> int:
    """How many leading dims enumerate layers or experts. A lone ("expert",) is a vector."""
    count = 0
    while count < len(logical_axes) and logical_axes[count] in STACK_AXES:
        count += 1
    return count - (0 < count == len(logical_axes) and logical_axes[-1] == "expert")
