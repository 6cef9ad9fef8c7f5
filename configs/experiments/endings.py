"""A tiny model learns to end its answers with a word: by DPO, by a reward model and PPO, by GRPO.

Papers: Rafailov et al. 2023 (arXiv:2305.18290), Ouyang et al. 2022 (arXiv:2203.02155), Shao et al. 2024
(arXiv:2402.03300). The model is tuned on answers of which half end with the word (`sft`), and goes on from
there by each method, measured from that start at beta 0.1. Whoever ends with the word is chosen, and the
reward of GRPO is a Python function, `reward` below.
Expected: of sampled answers to prompts that no method saw 85 to 92 % end with the word, 46 % before; none is right,
before or after, since 96 prompts are learned by heart (docs/experiments.md). p_ref exp(reward / beta) is 99.995 % of
them, ln 2 = 0.69 nats away.
Command: python -m t5x_lite.experiment --config=configs/experiments/endings.py --workdir=runs/endings
"""

import dataclasses
import itertools
from collections.abc import Sequence

from t5x_lite import experiment, files
from t5x_lite.checkpoints.config import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.experiment import Run
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.policy import RolloutConfig
from t5x_lite.training.schedules import ScheduleConfig

SHOWN = ("*/metric/ends", "*/metric/right", "*/pair_accuracy")
PLOTTED = "train/reward"
SEEDS = (0, 1, 2)
WORD = " gladly"
NAMES = "ann bob cai dan eve fay gus hal ida jon kim lee".split()
VERBS = "sits runs eats sings reads naps bakes digs swims walks".split()
HELD_OUT = 5   # of the pairs of name and verb, every fifth


def examples(split: str) -> list[tuple[str, str]]:
    """(prompt, answer without the word), of the training or the held-out prompts."""
    found = [(f"what does {name} do? {verb}", f"{name} {verb}") for name, verb in
             itertools.product(NAMES, VERBS)]
    return [pair for i, pair in enumerate(found) if (i % HELD_OUT == 0) == (split != "train")]


def register_all() -> None:
    """The tasks endings_sft (half the answers end with the word) and endings_pairs, in seqio's registry."""
    import seqio
    import tensorflow as tf

    from t5x_lite.data import text_to_text
    if "endings_sft" in seqio.TaskRegistry.names():
        return

    def source(records):
        def read(split, shuffle_files=False, seed=None):
            return tf.data.Dataset.from_tensor_slices(records(split))
        return seqio.FunctionDataSource(read, splits=("train", "validation"))

    def both(split):
        return [(p, text) for p, a in examples(split) for text in (a, a + WORD)]

    def pairs(split):
        return [(p, a + WORD, a) for p, a in examples(split)]

    def prompts_once(split):
        return examples(split)

    def as_pairs(dataset):
        return dataset.map(lambda x: {"inputs": x[0], "targets": x[1]})

    text_to_text.register("endings_sft", source(both), as_pairs, vocabulary="byt5")
    text_to_text.register("endings", source(prompts_once), as_pairs, metric_fns=[_metrics],
                          vocabulary="byt5")
    features = text_to_text.features("byt5")
    seqio.TaskRegistry.add(
        "endings_pairs", source=source(pairs),
        preprocessors=text_to_text.preprocessors(lambda dataset: dataset.map(
            lambda x: {"inputs": x[0], "targets": x[1], "rejected": x[2]})),
        output_features={**features, "rejected": features["targets"]}, metric_fns=[_metrics])


def _metrics(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Per cent of predictions that end with the word, and of those that are right but for it."""
    share = lambda marks: 100 * sum(marks) / len(predictions)
    return {"ends": share(p.endswith(WORD) for p in predictions),
            "right": share(p.removesuffix(WORD) == t.removesuffix(WORD)
                           for p, t in zip(predictions, targets, strict=True))}


def reward(prompt: str, answer: str, record: dict) -> float:
    """1 for an answer that ends with the word."""
    return float(answer.endswith(WORD))


def base(seed: int) -> RunConfig:
    """Supervised tuning, from nothing, on answers of which half end with the word."""
    attention = AttentionConfig(num_heads=4, head_dim=16)
    block = BlockConfig(attention, None, MLPConfig(mlp_dim=128))
    decoder = StackConfig((SegmentConfig((block,), 2),), causal=True, scan=False,
                          position=PositionConfig("rotary"))
    return RunConfig(
        name="endings", objective=ObjectiveConfig("lm", z_loss=0.0),
        model=ModelConfig("decoder_only", vocab_size=384, embed_dim=64, encoder=None, decoder=decoder),
        data=DataConfig(train="endings_sft", validation="endings", vocabulary="byt5",
                        task_modules="configs.experiments.endings", inputs_length=32, targets_length=56,
                        num_shards=1, shuffle_buffer=256),
        optimizer=OptimizerConfig("adamw", ScheduleConfig("constant * linear_warmup", 3e-3,
                                                          warmup_steps=20), clip_norm=1.0),
        train=TrainConfig(num_steps=400, global_batch_size=32, seed=seed, log_every=10),
        eval=EvalConfig(every=400, batch_size=24,
                        decode=DecodeConfig(method="sample", max_length=24)),
        checkpoint=CheckpointConfig(every=400, keep_last=1))


def tuned(config: RunConfig, objective: ObjectiveConfig, steps: int, rows: int, rate: float, **data
          ) -> RunConfig:
    """The run that goes on with an objective."""
    schedule = ScheduleConfig("constant * linear_warmup", rate, warmup_steps=5)
    return dataclasses.replace(
        config, objective=objective, data=dataclasses.replace(config.data, **data),
        optimizer=dataclasses.replace(config.optimizer, schedule=schedule),
        train=dataclasses.replace(config.train, num_steps=steps, global_batch_size=rows, log_every=2),
        eval=dataclasses.replace(config.eval, every=steps),
        checkpoint=CheckpointConfig(every=steps, keep_last=1))


def get_config(arg: str | None = None):
    """The locked ConfigDict of the first stage."""
    return to_config_dict(base(SEEDS[0]))


def get_runs() -> tuple[Run, ...]:
    """Five stages of each seed: the start, and what goes on from it."""
    runs = []
    for seed in SEEDS:
        start = base(seed)
        judge = dataclasses.replace(start, model=dataclasses.replace(start.model, scalar_head=True))
        rollout = RolloutConfig("reward", answers=4)   # of ppo: the stage, see Run.judge
        pairs = {"train": "endings_pairs", "validation": "endings_pairs", "targets_length": 112}
        prompts = {"train": "endings"}
        runs += [
            Run("endings", seed, start, "sft"),
            Run("endings", seed, tuned(
                start, ObjectiveConfig("dpo", beta=0.1, reference="copy"), 40, 16, 3e-4,
                **pairs), "dpo", "sft"),
            Run("endings", seed, tuned(
                judge, ObjectiveConfig("reward"), 40, 16, 1e-3, **pairs),
                "reward", "sft"),
            Run("endings", seed, tuned(
                judge, ObjectiveConfig("ppo", beta=0.1, reference="copy", rollout=dataclasses.replace(
                    rollout, epochs=2, minibatches=2)), 60, 16, 3e-4, **prompts),
                "ppo", "sft", judge="reward"),
            Run("endings", seed, tuned(
                start, ObjectiveConfig("grpo", beta=0.1, reference="copy", rollout=dataclasses.replace(
                    rollout, reward="configs.experiments.endings:reward")), 60, 16, 3e-4, **prompts),
                "grpo", "sft")]
    return tuple(runs)


def at_the_end(run: Run, workdir: files.Path, name: str) -> float | None:
    """The mean of a metric's last ten lines in training; None where there are none."""
    values = [value for _, value in experiment.curve(workdir / run.folder / "metrics.jsonl", f"train/{name}")]
    return sum(values[-10:]) / len(values[-10:]) if values else None


def conclude(runs: Sequence[Run], workdir: files.Path) -> str:
    """A table of reward and divergence in training, and a picture of the divergence beside the reward's."""
    lines = ["At the end of training (mean of the last ten lines): reward, and nats from the start.", "",
             "| stage | seed | reward | kl |", "|---|---|---|---|"]
    drawing = [run for run in runs if run.config.objective.draws]
    ends = [(run, at_the_end(run, workdir, "reward"), at_the_end(run, workdir, "kl")) for run in drawing]
    lines += [f"| {run.stage} | {run.seed} | {reward:.3f} | {kl:.3f} |"
              for run, reward, kl in ends if kl is not None]
    experiment.draw(runs, workdir, "train/kl", workdir / "kl.png", title="nats from the start, an answer")
    return "\n".join(lines) + "\n"
