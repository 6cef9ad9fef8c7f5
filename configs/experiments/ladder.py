"""A ladder of small models on your own Python installation's source, by bytes: IsoFLOP budgets.

Papers: Hoffmann et al. 2022 (arXiv:2203.15556), approaches 1 to 3; Porian et al. 2024
(arXiv:2406.19146): what is counted, warm-up in proportion; Bi et al. 2024 (arXiv:2401.02954): batch and
learning rate from the budget.
Expected: lm 9 CPU-minutes on 2 cores, N* ~ C^.43 (.22 to .60) by parabolas; t5 12 CPU-minutes, N* ~ C^.39
(.25 to .55). docs/experiments.md has the other approaches, and predictions that were written down before
their runs were trained.
Command: python -m t5x_lite.scaling ladder --config=configs/experiments/ladder.py:lm \\
    --budgets=4e9,1.86e10,8.6e10,4e11 --ratio=60 --unit=4 --predict=4 --max_hours=2 \\
    --workdir=runs/ladder

`…ladder.py:lm` is a causal LM of code, `…:text` of documentation, `…:digits` of handwritten digits' pixels
(tasks/digits.py), and `…ladder.py:t5` a T5 with span corruption; any other config's run may stand in their place. `python -m t5x_lite.experiment --config=configs/experiments/ladder.py:lm` trains the
same runs without the prediction, and `…ladder.py:RUNS/ladder.json` those that a ladder's folder holds.
"""

import dataclasses

from t5x_lite import files
from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.experiment import Run
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.scaling import ladders
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig

SHOWN = ("*/loss",)
OVER, LOG_AXES = "FLOPs", "xy"
LADDER = ladders.Ladder(budgets=(4e9, 1.86e10, 8.6e10, 4e11), ratio=60.0, unit=4)
_ATTENTION, _MLP = AttentionConfig(num_heads=4, head_dim=8), MLPConfig(mlp_dim=128, gated=False)
_WIDTH, _BYTES = 32, 384     # ByT5's ids, padded
# Rows of 64 tokens for a causal LM: code, text, and digits as pixels. (task, vocabulary)
_ROWS = {"lm": ("python_source_causal_lm", "byt5"), "text": ("python_docs_causal_lm", "byt5"),
         "digits": ("digit_pixels", "codes:17")}


def _stack(*, decoder: bool, cross: bool = False) -> StackConfig:
    block = BlockConfig(_ATTENTION, _ATTENTION if cross else None, _MLP)
    return StackConfig((SegmentConfig((block,), 1),), causal=decoder,
                       position=PositionConfig("rotary"), scan=False)


def run(arg: str | None = "lm") -> RunConfig:
    """The run that the ladder resizes."""
    if arg != "t5" and arg not in _ROWS:
        raise UserError(f"configs/experiments/ladder.py:{arg}: the argument may be {', '.join(_ROWS)} or t5, "
                        f"or the ladder.json of a ladder's folder.")
    if arg in _ROWS:
        task, vocabulary = _ROWS[arg]
        model = ModelConfig("decoder_only", vocab_size=_BYTES, embed_dim=_WIDTH, encoder=None,
                            decoder=_stack(decoder=True))
        data = DataConfig(train=task, validation=task, vocabulary=vocabulary, targets_length=64,
                          num_shards=1)
        objective = ObjectiveConfig("lm", z_loss=0.0)
    else:
        model = ModelConfig(vocab_size=_BYTES, embed_dim=_WIDTH, encoder=_stack(decoder=False),
                            decoder=_stack(decoder=True, cross=True))
        data = DataConfig(train="python_source_span_corruption_byt5",
                          validation="python_source_span_corruption_byt5", vocabulary="byt5",
                          inputs_length=64, targets_length=24, num_shards=1)
        objective = ObjectiveConfig("seq2seq", z_loss=0.0)
    return RunConfig(
        name=f"ladder_{arg}", model=model, data=data, objective=objective,
        optimizer=OptimizerConfig("adamw", beta2=0.95, weight_decay=0.1, clip_norm=1.0),
        train=TrainConfig(global_batch_size=16), eval=EvalConfig(num_examples=256, batch_size=64),
        checkpoint=CheckpointConfig(keep_last=1))


def small(width: int, layers: int, *, steps: int, seed: int = 0, rows: int = 16, rate: float = 0.01,
          task: str = "python_source_causal_lm", evaluations: int = 10) -> RunConfig:
    """A causal LM of another shape for the experiments beside this one: rows of 64 bytes, warm-up over
    a tenth of the steps, cosine to a tenth of the rate."""
    config = run("lm")
    return dataclasses.replace(
        config, name=f"w{width}_l{layers}", model=ladders.resized(config.model, width, width / layers),
        data=dataclasses.replace(config.data, train=task),
        optimizer=dataclasses.replace(config.optimizer, schedule=ScheduleConfig(
            "constant * linear_warmup * cosine_to_floor", rate, warmup_steps=max(1, steps // 10))),
        train=TrainConfig(num_steps=steps, global_batch_size=rows, seed=seed,
                          log_every=max(1, steps // 20)),
        eval=dataclasses.replace(config.eval, every=max(1, steps // evaluations)),
        checkpoint=CheckpointConfig(every=steps, keep_last=1))


def get_config(arg: str | None = None):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(arg or "lm"))


def get_runs(arg: str | None = None) -> tuple[Run, ...]:
    """The runs of LADDER for lm or t5, or those of a ladder's folder."""
    found = ladders.planned(files.path(arg)) if arg and arg.endswith(".json") else \
        ladders.rungs(run(arg or "lm"), LADDER)
    return tuple(Run(r.arm, r.seed, r.config, r.stage, r.after, r.at) for r in found)
