"""How initialisation, learning rates and scales follow a model's width: standard, or mup.

Under maximal-update parametrisation (Yang et al. 2022, arXiv:2203.03466) every layer's activations
change by as much at any width, so that the learning rate that is best for a narrow model is best for
a wide one. With m = embed_dim / base_width (MLPs and heads are taken to grow alike), table 3 there
asks of a model that equals the standard one at m = 1:

    role (ParamInfo.role)       deviation of the draw    learning rate under Adam
    vector  tables, biases      as at the base           1
    hidden  wide to wide        fan_in^-1/2              1/m
    head    wide to vocabulary  m^-1 of the base's       1/m
    narrow  routers             m^-1 of the base's       1/m

    branches of residuals       x base_depth / layers (CompleteP, Dey et al. 2025, arXiv:2505.01618)
    attention logits            x base_head_dim / head_dim, where heads become wider, not more
    logits by a tied table      x 1/m

Powers for other optimizers stand in training/methods.py, a row each. Decoupled weight decay does not
follow the multiplier, so that its rate is that of the base. What changes the function (attention and
tied logits) becomes plain scales of a standard config: `resolved`. That config is what runs and what
other formats are written from.
"""

import dataclasses
import math
from collections.abc import Callable

from t5x_lite.errors import UserError, at_least, one_of
from t5x_lite.layers.config import AttentionConfig, InitConfig, MLPConfig
from t5x_lite.layers.linear import kernel_std
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig


def width_ratio(config: ModelConfig) -> float:
    """m, by whose powers learning rates follow the width; 1.0 under the standard."""
    return config.embed_dim / config.base_width if config.base_width else 1.0


def resolved(config: ModelConfig) -> ModelConfig:
    """The standard config that initialises and computes what this one asks for."""
    return PARAMETRIZATIONS[config.parametrization](config)


def _mup(config: ModelConfig) -> ModelConfig:
    ratio = width_ratio(config)
    base = config.base_width
    scale = config.logits_scale
    if config.tie_logits:
        # A scale that follows the width by itself, T5's, has half of what mup asks for.
        scale *= ratio ** (-0.5 if _follows(scale, config.embed_dim, -0.5) else -1)
    init = _init(config.init, ratio)
    logits_std = config.init.logits_std or kernel_std(config.init, base, config.vocab_size)
    stacks = {side: _stack(getattr(config, side), config, ratio)
              for side in ("encoder", "decoder") if getattr(config, side) is not None}
    return dataclasses.replace(
        config, **stacks, init=dataclasses.replace(init, logits_std=logits_std / ratio),
        logits_scale=scale, parametrization="standard", base_width=0, base_head_dim=0,
        base_depth=0)


def _init(init: InitConfig, ratio: float) -> InitConfig:
    """kernel="fixed" states a deviation, which the width's root divides; others follow fan_in."""
    if init.kernel != "fixed":
        return init
    return dataclasses.replace(init, kernel_std=init.kernel_std * ratio ** -0.5)


def _stack(stack: StackConfig, model: ModelConfig, ratio: float) -> StackConfig:
    base_head_dim, depth = model.base_head_dim, stack.num_layers

    def block(b: BlockConfig) -> BlockConfig:
        cross, moe = b.cross_attention, b.moe
        return dataclasses.replace(
            b, self_attention=_attention(b.self_attention, base_head_dim),
            cross_attention=None if cross is None else _attention(cross, base_head_dim),
            moe=None if moe is None else dataclasses.replace(
                moe, router_std=moe.router_std / ratio))

    segments = tuple(SegmentConfig(tuple(map(block, s.blocks)), s.repeats) for s in stack.segments)
    init = None if stack.init is None else _init(stack.init, ratio)
    scale = stack.branch_scale * (model.base_depth or depth) / depth
    return dataclasses.replace(stack, segments=segments, init=init, branch_scale=scale)


def _attention(config: AttentionConfig, base_head_dim: int) -> AttentionConfig:
    if not base_head_dim:
        return config
    scale = config.scale or base_head_dim ** -0.5
    return dataclasses.replace(config, scale=scale * base_head_dim / config.head_dim)


def _follows(value: float, width: int, power: float) -> bool:
    return math.isclose(value, width ** power, rel_tol=1e-6)


# Add a row to add a parametrization: ModelConfig -> the standard one that it stands for.
PARAMETRIZATIONS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "standard": lambda config: config, "mup": _mup}


def validate(config: ModelConfig) -> None:
    """Raises UserError for bases that are missing or mean nothing, naming the field."""
    name = one_of("model.parametrization", config.parametrization, PARAMETRIZATIONS)
    for field in ("base_width", "base_head_dim", "base_depth"):
        value = at_least(f"model.{field}", getattr(config, field), 0)
        if value and name == "standard":
            raise UserError(f"model.{field}={value} is of model.parametrization=mup, not "
                            f"{name}: set that, or leave the base at 0.")
    if name == "standard":
        return
    if not config.base_width:
        raise UserError("model.parametrization=mup needs model.base_width, the embed_dim of the "
                        "model whose learning rate was tuned, such as 256.")
    if config.head_transform:
        raise UserError(f"model.head_transform={config.head_transform!r} has no maximal-update "
                        f"parametrisation here: use model.parametrization=standard.")
    if config.embedding_scale != 1 and _follows(config.embedding_scale, config.embed_dim, 0.5):
        raise UserError(f"model.embedding_scale={config.embedding_scale:g} is the root of embed_dim, "
                        f"and would make updates of the embedding grow with the width: under "
                        f"model.parametrization=mup give the base's, {config.base_width ** 0.5:g}.")


def grown(model: ModelConfig, width: int) -> ModelConfig:
    """The model of another width: MLPs and numbers of heads grow as embed_dim does, heads keep
    their size.

    Raises:
        UserError: a width at which one of them is no whole number.
    """
    at_least("width", width, 1)

    def scaled(field: str, value: int) -> int:
        whole, rest = divmod(value * width, model.embed_dim)
        if rest or not whole:
            unit = model.embed_dim // math.gcd(model.embed_dim, value)
            raise UserError(f"width {width}: {field}={value} of embed_dim={model.embed_dim} cannot "
                            f"grow alike; take multiples of {unit}.")
        return whole

    def attention(config: AttentionConfig | None) -> AttentionConfig | None:
        if config is None:
            return None
        kv = config.num_kv_heads
        return dataclasses.replace(
            config, num_heads=scaled("num_heads", config.num_heads),
            num_kv_heads=scaled("num_kv_heads", kv) if kv > 1 else kv)

    def mlp(config: MLPConfig) -> MLPConfig:
        return dataclasses.replace(config, mlp_dim=scaled("mlp_dim", config.mlp_dim))

    def block(b: BlockConfig) -> BlockConfig:
        moe = None if b.moe is None else dataclasses.replace(b.moe, mlp=mlp(b.moe.mlp))
        return dataclasses.replace(b, self_attention=attention(b.self_attention),
                                   cross_attention=attention(b.cross_attention), mlp=mlp(b.mlp),
                                   moe=moe)

    def stack(config: StackConfig | None) -> StackConfig | None:
        if config is None:
            return None
        segments = tuple(SegmentConfig(tuple(map(block, s.blocks)), s.repeats)
                         for s in config.segments)
        return dataclasses.replace(config, segments=segments)

    return dataclasses.replace(model, embed_dim=width, encoder=stack(model.encoder),
                               decoder=stack(model.decoder))
