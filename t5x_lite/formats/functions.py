"""What of a model's config decides the function that its parameters compute.

Two configs with the same shapes may still disagree: GELU or SiLU, another rotary base. An
export that its format cannot state is refused, and init_from says what differs.
"""

import dataclasses
import math
from typing import Any

from t5x_lite.layers.config import AttentionConfig, MoEConfig, PositionConfig
from t5x_lite.layers.position import POSITIONS
from t5x_lite.layers.routing import ROUTERS
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig

# How a model is initialised, regularised and run, rather than what it computes.
_SETTINGS = {"init", "scan", "remat", "pipeline", "dropout_rate", "segments", "implementation",
             "chunk"}
_TRAINING_OF_EXPERTS = {"second_policy", "capacity_factor", "jitter", "balance_weight",
                        "balance_choices", "loss_mean", "z_weight", "router_std", "second_threshold"}


def facts(config: ModelConfig) -> dict[str, Any]:
    """{dotted field: value} of all that matters, with defaults spelled out, layer by layer."""
    found: dict[str, Any] = {}
    _collect(found, "", config)
    return found


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """"field: ours, there theirs" for every fact on which two configs differ."""
    a, b = facts(ours), facts(theirs)
    return [f"{name}: {a.get(name, 'absent')}, there {b.get(name, 'absent')}"
            for name in sorted({*a, *b}) if not _same(a.get(name), b.get(name))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _collect(found: dict[str, Any], prefix: str, value: Any) -> None:
    for field in dataclasses.fields(value):
        if field.name not in _SETTINGS and _matters(value, field.name):
            item = getattr(value, field.name)
            if dataclasses.is_dataclass(item):
                _collect(found, f"{prefix}{field.name}.", item)
            elif item is not None:
                found[prefix + field.name] = item
    if isinstance(value, AttentionConfig):
        found[f"{prefix}scale"] = value.scale or value.head_dim ** -0.5
        found[f"{prefix}num_kv_heads"] = value.kv_heads
    if isinstance(value, StackConfig):
        layer = 0
        for segment in value.segments:
            for block in segment.blocks * segment.repeats:
                _collect(found, f"{prefix}layers[{layer}].", block)
                layer += 1


def _matters(config: Any, field: str) -> bool:
    if isinstance(config, PositionConfig):
        return field == "kind" or field in POSITIONS[config.kind].settings
    if isinstance(config, StackConfig):
        return field != "residual_alpha" or config.residual == "deepnorm"
    if isinstance(config, BlockConfig):
        return field != "mlp" or config.moe is None
    if isinstance(config, MoEConfig):
        if field in ("group_size", "overflow", "mask_padding", "prioritized", "expert_capacity",
                     "eval_capacity_factor"):
            return not config.dropless and (
                field != "eval_capacity_factor" or not config.expert_capacity)
        if any(field in router.settings for router in ROUTERS.values()):
            return field in ROUTERS[config.router].settings
        return field not in _TRAINING_OF_EXPERTS
    return True
