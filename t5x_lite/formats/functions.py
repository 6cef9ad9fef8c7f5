"""What of a model's config decides the function that its parameters compute.

Two configs with the same shapes may still disagree: GELU or SiLU, another rotary base. An
export that its format cannot state is refused, and init_from says what differs.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from t5x_lite.layers.attention import ATTENTIONS
from t5x_lite.layers.config import AttentionConfig, MixerConfig, MoEConfig, PositionConfig
from t5x_lite.layers.position import POSITIONS
from t5x_lite.layers.routing import ROUTERS
from t5x_lite.models import parametrization
from t5x_lite.models.blocks import MIXERS
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig

# How a model is initialised, regularised and run, rather than what it computes.
_SETTINGS = {"init", "scan", "remat", "pipeline", "dropout_rate", "segments", "implementation",
             "chunk"}
_TRAINING_OF_EXPERTS = {"second_policy", "capacity_factor", "jitter", "balance_weight",
                        "balance_choices", "loss_mean", "z_weight", "router_std", "second_threshold"}


def facts(config: ModelConfig) -> dict[str, Any]:
    """{dotted field: value} of all that matters, with defaults spelled out, layer by layer."""
    return _facts(parametrization.resolved(config), "")


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """"field: ours, there theirs" for every fact on which two configs differ."""
    a, b = facts(ours), facts(theirs)
    return [f"{name}: {a.get(name, 'absent')}, there {b.get(name, 'absent')}"
            for name in sorted({*a, *b}) if not _same(a.get(name), b.get(name))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _facts(config: Any, prefix: str) -> dict[str, Any]:
    """facts of a part of a model's config, whose dotted name is `prefix`."""
    values: dict[str, Any] = {}
    for name, item in _settings_that_matter(config).items():
        if dataclasses.is_dataclass(item):
            values |= _facts(item, f"{prefix}{name}.")
        else:
            values[prefix + name] = item
    if isinstance(config, AttentionConfig):
        values[f"{prefix}scale"] = config.scale or config.head_dim ** -0.5
        values[f"{prefix}num_kv_heads"] = config.kv_heads
    if isinstance(config, StackConfig):
        for layer, block in enumerate(_blocks(config)):
            if block.position == config.position:
                block = dataclasses.replace(block, position=None)
            values |= _facts(block, f"{prefix}layers[{layer}].")
    return values


def _settings_that_matter(config: Any) -> dict[str, Any]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items()
            if value is not None and name not in _SETTINGS and _matters(config, name)}


def _blocks(stack: StackConfig) -> Iterator[BlockConfig]:
    """The layers of a stack, from the first."""
    for segment in stack.segments:
        yield from segment.blocks * segment.repeats


def _matters(config: Any, field: str) -> bool:
    if isinstance(config, PositionConfig):
        return field == "kind" or field in POSITIONS[config.kind].settings
    if isinstance(config, StackConfig):
        return field != "residual_alpha" or config.residual == "deepnorm"
    if isinstance(config, AttentionConfig):
        if any(field == row.section for row in ATTENTIONS.values()):
            return field == ATTENTIONS[config.kind].section
        return config.qk_norm or not field.startswith("qk_norm_")
    if isinstance(config, MixerConfig):
        return field == "kind" or field in MIXERS[config.kind].settings
    if isinstance(config, BlockConfig):
        unused = {"mlp": config.moe is not None,
                  "self_attention": not MIXERS[config.mixer.kind].attends}
        return not unused.get(field, False)
    if isinstance(config, MoEConfig):
        if field in ("group_size", "overflow", "mask_padding", "prioritized", "expert_capacity",
                     "eval_capacity_factor"):
            return not config.dropless and (
                field != "eval_capacity_factor" or not config.expert_capacity)
        if any(field in router.settings for router in ROUTERS.values()):
            return field in ROUTERS[config.router].settings
        return field not in _TRAINING_OF_EXPERTS
    return True
