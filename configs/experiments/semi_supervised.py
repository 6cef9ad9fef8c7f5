"""Twenty labels and two thousand texts: do semi-supervised losses help, or hurt?

Papers: Grandvalet & Bengio 2005 (entropy minimisation), Lee 2013 (pseudo-labels), Sohn et al. 2020
(FixMatch, arXiv:2001.07685), Xie et al. 2020 (UDA, arXiv:1904.12848); Wang et al. 2022 (USB, arXiv:2208.07204)
found that with 20 labels of IMDb pseudo-labels take BERT from 20.3 % error to 45.5 %, UDA to 50.0 %,
FixMatch to 7.7 %.
Here sections of the World Factbook (tasks/factbook.py): 2,018 texts of four sections, of which 20 are labelled;
473 texts of other countries are scored. A T5 of 0.7 million parameters is pre-trained once, by span corruption on
the texts of the training countries, as USB has one BERT; each arm goes on from it with the same labelled rows in
the same order, a seed being another draw of 20 labels, another order and other dropout:

    supervised     the labels alone
    entropy        and the entropy of the classes' probabilities
    pseudo_label   and the likeliest class as a label, from a probability of .95
    fixmatch       and that of a text under dropout as the label of the text with hidden spans, from .95
    uda            and the divergence between the two, sharpened (temperature .4), from .8
    none           the labels alone, not pre-trained

Weights are 1 as published and rise linearly over the first half; thresholds and temperatures are the papers'.
Nothing was tuned on the scored texts. `…semi_supervised.py:dev` scores other countries, to choose settings on;
`…semi_supervised.py:filled.jsonl` adds the arm uda_filled, whose strong view a denoiser wrote
(docs/objectives.md has the command).
Expected: of two seeds no arm, the control included, does better than a guess (docs/experiments.md).
Command: T5X_LITE_FILES=FOLDER python -m t5x_lite.experiment --config=configs/experiments/semi_supervised.py \\
    --workdir=runs/semi_supervised      # FOLDER holds factbook.txt
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from t5x_lite import experiment
from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig
from t5x_lite.data.config import DataConfig
from t5x_lite.experiment import Run
from t5x_lite.layers.config import AttentionConfig, MLPConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.reporting import runs as reporting_runs
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig
from t5x_lite.training.unlabelled_losses import UnlabelledConfig

SHOWN = ("*/class_accuracy", "*/pseudo_share", "*/pseudo_accuracy")
SEEDS = (0, 1, 2)
ARM, CONTROL = "factbook", "supervised"
CLASSES = "geography,people,government,economy"
PRETRAIN_STEPS, STEPS, ROWS, RATIO = 800, 60, 16, 2
_TWO = "dropout,spans"
# arm: (views, what is learned of them)
ARMS: dict[str, tuple[str, UnlabelledConfig]] = {
    "supervised": ("plain", UnlabelledConfig(threshold=0.95)),
    "entropy": ("plain", UnlabelledConfig("entropy", threshold=0.95)),
    "pseudo_label": ("plain", UnlabelledConfig("pseudo_label", threshold=0.95)),
    "fixmatch": (_TWO, UnlabelledConfig("fixmatch", threshold=0.95)),
    "uda": (_TWO, UnlabelledConfig("uda", threshold=0.8, temperature=0.4)),
    "none": ("plain", UnlabelledConfig(threshold=0.95)),
}


def _model() -> ModelConfig:
    attention = AttentionConfig(num_heads=4, head_dim=16, scale=1.0, dropout_rate=0.1)
    mlp = MLPConfig(256, dropout_rate=0.1)
    common = {"scan": False, "dropout_rate": 0.1}
    return ModelConfig(
        vocab_size=3072, embed_dim=64,
        encoder=StackConfig((SegmentConfig((BlockConfig(attention, None, mlp),), 2),), **common),
        decoder=StackConfig((SegmentConfig((BlockConfig(attention, attention, mlp),), 2),),
                            causal=True, **common))


def _run(name: str, data: DataConfig, seed: int, steps: int, rows: int, rate: float,
         objective: ObjectiveConfig) -> RunConfig:
    schedule = ScheduleConfig("constant * linear_warmup * linear_to_floor", rate,
                              warmup_steps=steps // 20, floor_fraction=0.05)
    return RunConfig(
        name=name, model=_model(), objective=objective,
        data=dataclasses.replace(data, num_shards=4, inputs_length=48),
        optimizer=OptimizerConfig("adafactor", schedule),
        train=TrainConfig(num_steps=steps, global_batch_size=rows, seed=seed, log_every=10),
        eval=EvalConfig(every=steps, batch_size=64, metrics=False),
        checkpoint=CheckpointConfig(every=500, keep_last=1))


def _pretrain() -> RunConfig:
    data = DataConfig(train="factbook_span_corruption", validation="factbook_span_corruption", targets_length=16)
    run = _run("pretrain", data, 0, PRETRAIN_STEPS, 64, 0.03, ObjectiveConfig())
    return dataclasses.replace(run, eval=dataclasses.replace(run.eval, num_batches=8))


def _finetune(arm: str, seed: int, held_out: str, views: str, term: UnlabelledConfig, texts: str
              ) -> RunConfig:
    if term.loss:
        term = dataclasses.replace(term, ramp="linear", ramp_to=STEPS // 2)
    data = DataConfig(train=f"factbook_sections_20_{seed}", validation=held_out, classes=CLASSES, views=views,
                      unlabelled=texts if term.loss else "", unlabelled_ratio=RATIO, targets_length=16)
    return _run(arm, data, seed, STEPS, ROWS, 0.003, ObjectiveConfig(unlabelled=term))


def get_runs(arg: str | None = None) -> tuple[Run, ...]:
    """A stage for each arm and seed, after the pre-training; the argument is dev or a file of filled texts."""
    held_out = "factbook_sections_dev" if arg == "dev" else "factbook_sections"
    arms = {arm: (*given, "factbook_sections") for arm, given in ARMS.items()}
    if arg not in (None, "", "dev"):
        arms["uda_filled"] = ("dropout,filled", ARMS["uda"][1], arg)
    runs = [Run(ARM, 0, _pretrain(), "pretrain")]
    for seed in SEEDS:
        for arm, (views, term, texts) in arms.items():
            config = _finetune(arm, seed, held_out, views, term, texts)
            runs.append(Run(ARM, 0, config, f"{arm}_{seed}", after="" if arm == "none" else "pretrain"))
    return tuple(runs)


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """Error in per cent of every arm and seed, and against the seed's own control."""
    values, error = experiment.final_values(runs, workdir), {}
    for run in runs:
        found = reporting_runs.value(values.get(run.folder, {}), SHOWN[0])
        if found is not None:
            error[run.config.name, run.config.train.seed] = 100 * (1 - found)
    lines = ["Error on texts of other countries after the last step, per cent; in brackets against the control",
             "of the same seed:", "", "| arm | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean |",
             "|---" * (len(SEEDS) + 2) + "|"]
    for arm in dict.fromkeys(name for name, _ in error):
        found = [error.get((arm, seed)) for seed in SEEDS]
        controls = [error.get((CONTROL, seed)) for seed in SEEDS]
        if None in found or None in controls:
            continue
        cells = [f"{own:.1f} ({own - control:+.1f})" for own, control in zip(found, controls, strict=True)]
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {sum(found) / len(found):.1f} |")
    return "\n".join(lines) + "\n"
