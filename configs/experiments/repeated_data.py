"""One epoch against many: what is a repeated token worth, and does dropout help?

Papers: Muennighoff et al. 2023 (arXiv:2305.16264), whose R_D* is the number of repetitions after which
further ones are worth little (15.4 there; about 4 epochs are as good as new text); Komatsuzaki 2019
(arXiv:1906.06669): one epoch of more text, without dropout. Causal LMs of two sizes on parts of your own
Python installation's source (tasks/python_parts.py), 0.13 to 2.1 million tokens in all, dropout 0 and 0.1.
Expected: not run yet; one seed.
Command: python -m t5x_lite.experiment --config=configs/experiments/repeated_data.py \\
    --workdir=runs/repeated_data
and then: python -m t5x_lite.scaling fit --law=muennighoff --table=runs/repeated_data/runs.csv --bootstrap=200
"""

import csv
import dataclasses
import pathlib
from collections.abc import Sequence

from configs.experiments import ladder
from t5x_lite import config as configs, experiment
from t5x_lite.experiment import Run
from t5x_lite.scaling import ladders
from tasks import python_parts

SHOWN = ("*/loss",)
OVER, LOG_AXES = "tokens", "x"
SIZES = ((32, 1), (64, 2))                # (width, layers)
ROWS, LENGTH = 16, 64
TOTALS = {"128k": 2**17, "512k": 2**19, "2m": 2**21}      # tokens in all: 128, 512 and 2,048 steps
TEXTS = {"32k": tuple(TOTALS), "128k": tuple(TOTALS), "512k": ("512k", "2m"), "all": tuple(TOTALS)}
DROPOUT, WITH_DROPOUT = 0.1, ("32k", "128k", "all")       # texts that the larger model also reads so
_ALL = 9e6    # bytes, about: more than any run reads


def get_runs() -> tuple[Run, ...]:
    """Arm "WIDTH_TEXT_TOTAL", with "_dropout"."""
    runs = [_run(shape, text, total, 0.0)
            for shape in SIZES for text, totals in TEXTS.items() for total in totals]
    return tuple(runs + [_run(SIZES[-1], text, "2m", DROPOUT) for text in WITH_DROPOUT])


def _run(shape: tuple[int, int], text: str, total: str, dropout: float) -> Run:
    task = "python_source_causal_lm" if text == "all" else f"source_{text}_causal_lm"
    config = ladder.small(*shape, steps=TOTALS[total] // (ROWS * LENGTH), rows=ROWS, task=task)
    config = configs.replace(config, "model.decoder", dataclasses.replace(
        config.model.decoder, dropout_rate=dropout))
    return Run(f"{shape[0]}_{text}_{total}" + "_dropout" * bool(dropout), 0, config)


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """Losses by text and tokens in all; writes runs.csv, of those without dropout, for the fit."""
    ends = {run.arm: experiment.curve(workdir / run.folder / "metrics.jsonl", "eval/*/loss")
            for run in runs}
    lines = ["Last held-out loss (the lowest of the run):", "",
             "| width | text | " + " | ".join(f"{n} tokens" for n in TOTALS) + " | 2m, dropout |",
             "|---" * (len(TOTALS) + 3) + "|"]
    for width, _ in SIZES:
        for text in TEXTS:
            cells = [_cell(ends.get(f"{width}_{text}_{name}"))
                     for name in (*TOTALS, "2m_dropout")]
            lines.append(f"| {width} | {text} | " + " | ".join(cells) + " |")
    rows = [(ladders.kernels(run.config.model), run.config.train.num_steps * ROWS * LENGTH,
             python_parts.PARTS.get(run.arm.split("_")[1], _ALL), ends[run.arm][-1][1])
            for run in runs if ends[run.arm] and not run.arm.endswith("dropout")]
    with open(workdir / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("params", "tokens", "unique_tokens", "loss"))
        writer.writerows(rows)
    return "\n".join(lines) + "\n"


def _cell(curve: Sequence[tuple[int, float]] | None) -> str:
    if not curve:
        return "–"
    return f"{curve[-1][1]:.3f} ({min(loss for _, loss in curve):.3f})"
