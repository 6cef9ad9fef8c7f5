"""Which rows a stack has no room for: too long ones, and packed ones."""

from typing import Any

from t5x_lite.errors import UserError, at_least
from t5x_lite.layers.attention import ATTENTIONS
from t5x_lite.layers.position import POSITIONS
from t5x_lite.models.blocks import MIXERS
from t5x_lite.models.config import StackConfig


def check_length(where: str, stack: StackConfig, length: int, why: str, positions: int | None = None) -> None:
    """Raises UserError where a stack has no room for rows of so many tokens.

    why: what makes them so long, a clause. positions: tokens that need a position; None: all.
    """
    limits = [(f"{where}.segments[{i}].blocks[{j}].mixer.max_length", block.mixer.max_length, length)
              for i, segment in enumerate(stack.segments) for j, block in enumerate(segment.blocks)
              if "max_length" in MIXERS[block.mixer.kind].settings]
    if "max_length" in POSITIONS[stack.position.kind].settings:
        limits.append((f"{where}.position.max_length", stack.position.max_length,
                       length if positions is None else positions))
    for field, longest, needed in limits:
        at_least(field, longest, needed, f"{why}.")


def check_packing(encoder: StackConfig | None) -> None:
    """Raises UserError where an encoder's layers attend by a pattern of the row, as no packed example would alone."""
    blocks = [block for segment in (encoder.segments if encoder else ()) for block in segment.blocks]
    patterns = [b.self_attention.kind for b in blocks
                if MIXERS[b.mixer.kind].attends and ATTENTIONS[b.self_attention.kind].visible]
    if patterns:
        raise UserError(f"model.encoder has layers of self_attention.kind={patterns[0]!r}, whose global tokens and "
                        "blocks are of the row: packed examples would not be computed as they are alone. "
                        "Set data.packing=False.")


def check(run: Any) -> None:
    """Raises UserError for what the data or drawn answers ask of the stacks.

    run: a config.RunConfig.
    """
    if run.data.packing:
        check_packing(run.model.encoder)
    if run.objective.draws:
        length = run.data.targets_length
        check_length("model.decoder", run.model.decoder, length + 1, f"objective.name={run.objective.name!r} draws "
                     f"into rows of data.targets_length={length} and a start token", positions=length)
