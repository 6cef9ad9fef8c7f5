"""Handwritten digits as pixels, as codes of k-means, and as codes with words in one row.

Papers: Chen et al. 2020 (Image GPT: pixels, and codes by k-means); van den Oord et al. 2017
(arXiv:1711.00937: a prior over codes); text and image tokens in one row as Ramesh et al. 2021 (arXiv:2102.12092).
Arms: pixels and codes, whose held-out bits stand beside those of the best n-gram; words, which learns to draw
(words -> codes) and to read (codes -> words) at once, scored by accuracy in reading.
Command: python -m t5x_lite.experiment --config=configs/experiments/digits.py --workdir=runs/digits
"""

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from t5x_lite import experiment
from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.experiment import Run
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig

SHOWN = ("*/loss", "*/accuracy")
SEEDS = (0, 1, 2)
STEPS = 400
ORDERS = (0, 1, 2, 3)   # of n-grams: tokens that are looked back on
# arm -> (data.train, data.validation, inputs, targets, rows of the embedding)
ARMS = {"pixels": ("digit_pixels", "digit_pixels", 1, 64, 128),
        "codes": ("digit_codes", "digit_codes", 1, 16, 128),
        "words": ("digit_drawing=1,digit_reading=1", "digit_reading", 20, 40, 384)}


def run(arm: str, seed: int = 0) -> RunConfig:
    """A decoder of 0.1 million parameters."""
    train, validation, inputs, targets, rows = ARMS[arm]
    block = BlockConfig(AttentionConfig(num_heads=4, head_dim=16), None, MLPConfig(mlp_dim=256, gated=False))
    decoder = StackConfig((SegmentConfig((block,), 2),), causal=True, position=PositionConfig("rotary"),
                          dropout_rate=0.1, scan=False)
    return RunConfig(
        name=f"digits_{arm}", model=ModelConfig("decoder_only", vocab_size=rows, embed_dim=64, encoder=None,
                                                decoder=decoder),
        objective=ObjectiveConfig("lm", z_loss=0.0),
        data=DataConfig(train=train, validation=validation, inputs_length=inputs, targets_length=targets,
                        num_shards=1, shuffle_buffer=1500),
        optimizer=OptimizerConfig("adamw", ScheduleConfig(
            "constant * linear_warmup * linear_to_floor", 3e-3, warmup_steps=30, floor_fraction=0.02),
            weight_decay=0.1),
        train=TrainConfig(num_steps=STEPS, global_batch_size=64, seed=seed, log_every=50),
        eval=EvalConfig(every=STEPS // 4, batch_size=120, decode=DecodeConfig(max_length=8)),
        checkpoint=CheckpointConfig(every=STEPS, keep_last=1))


def get_config(arg: str | None = None):
    """The locked ConfigDict of an arm."""
    return to_config_dict(run(arg or "pixels"))


def get_runs() -> tuple[Run, ...]:
    """All arms, three seeds each."""
    return tuple(Run(arm, seed, run(arm, seed)) for seed in SEEDS for arm in ARMS)


def ngram_bits(train: np.ndarray, held_out: np.ndarray, order: int, size: int) -> float:
    """Bits a token of held-out rows [n, L] under an n-gram that looks back on `order` tokens of the row.

    An order's counts are mixed with the order below by Witten and Bell's weight (1991): contexts with many
    different continuations trust theirs less; below order 0 all `size` tokens are as likely. A row begins
    with tokens of its own, `size`.
    """
    rows = [np.pad(x, ((0, 0), (order, 0)), constant_values=size) for x in (train, held_out)]
    probability = np.full(held_out.shape, 1 / size)
    for back in range(order + 1):
        counts: dict[tuple, dict[int, int]] = {}
        for row in rows[0].tolist():
            for place in range(order, len(row)):
                seen = counts.setdefault(tuple(row[place - back:place]), {})
                seen[row[place]] = seen.get(row[place], 0) + 1
        for number, row in enumerate(rows[1].tolist()):
            for place in range(order, len(row)):
                seen = counts.get(tuple(row[place - back:place]))
                if seen:
                    kinds, total = len(seen), sum(seen.values())
                    at = number, place - order
                    probability[at] = (seen.get(row[place], 0) + kinds * probability[at]) / (total + kinds)
    return float(-np.log2(probability).mean())


def place_bits(train: np.ndarray, held_out: np.ndarray, size: int) -> float:
    """Bits a token of held-out rows where each place has a distribution of its own, with 1 added to its
    counts."""
    counts = np.ones((train.shape[1], size))
    np.add.at(counts, (np.arange(train.shape[1]), train), 1)
    probability = counts / counts.sum(1, keepdims=True)
    return float(-np.log2(probability[np.arange(train.shape[1]), held_out]).mean())


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """A table: the held-out bits a token of pixels and codes, beside those of n-grams."""
    from tasks import digits
    held = digits.images()
    as_tokens = {"pixels": (lambda x: x.reshape(len(x), -1), digits.GREYS),
                 "codes": (digits.codes, digits.CODES)}
    lines = ["Held-out bits a token; the n-gram is the best of those that look back on 0 to 3 tokens:", "",
             "| arm | model, mean (range) | n-gram | looks back on | each place by itself |",
             "|---|---|---|---|---|"]
    for arm, (tokens, size) in as_tokens.items():
        bits = [value / math.log(2) for run in runs if run.arm == arm for _, value in experiment.curve(
            workdir / run.folder / "metrics.jsonl", "eval/*/loss")[-1:]]
        train, held_out = (tokens(held[split][0]) for split in ("train", "validation"))
        best, order = min((ngram_bits(train, held_out, n, size), n) for n in ORDERS)
        shown = f"{np.mean(bits):.3f} ({min(bits):.3f} … {max(bits):.3f})" if bits else "–"
        lines.append(f"| {arm} | {shown} | {best:.3f} | {order} | "
                     f"{place_bits(train, held_out, size):.3f} |")
    return "\n".join(lines) + "\n"
