"""What of a model's config decides the function that its parameters compute.

Two configs with the same shapes may still disagree: GELU or SiLU, another rotary base. An
export that its format cannot state is refused, and init_from says what differs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
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
    return _READ.get(type(config), lambda config, field: True)(config, field)


def _attention_reads(config: AttentionConfig, field: str) -> bool:
    if any(field == row.section for row in ATTENTIONS.values()):
        return field == ATTENTIONS[config.kind].section
    return config.qk_norm or not field.startswith("qk_norm_")


def _block_reads(config: BlockConfig, field: str) -> bool:
    unused = {"mlp": config.moe is not None,
              "self_attention": not MIXERS[config.mixer.kind].attends}
    return not unused.get(field, False)


def _mixture_reads(config: MoEConfig, field: str) -> bool:
    if field == "eval_capacity_factor":
        return not (config.dropless or config.expert_capacity)
    if field in ("group_size", "overflow", "mask_padding", "prioritized", "expert_capacity"):
        return not config.dropless
    if any(field in router.settings for router in ROUTERS.values()):
        return field in ROUTERS[config.router].settings
    return field not in _TRAINING_OF_EXPERTS


# Sections of which not every field has a say: (section, field) -> whether its function reads it.
_READ: dict[type, Callable[[Any, str], bool]] = {
    PositionConfig: lambda c, field: field == "kind" or field in POSITIONS[c.kind].settings,
    StackConfig: lambda c, field: field != "residual_alpha" or c.residual == "deepnorm",
    MixerConfig: lambda c, field: field == "kind" or field in MIXERS[c.kind].settings,
    AttentionConfig: _attention_reads, BlockConfig: _block_reads, MoEConfig: _mixture_reads}
