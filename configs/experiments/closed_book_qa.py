"""Closed-book question answering: which pre-training puts facts into the parameters?

Papers: Roberts, Raffel & Shazeer 2020 (arXiv:2002.08910), closed-book QA with T5; Guu et al.
2020 (arXiv:2002.08909), salient span masking.
Arms, three seeds each; every arm is fine-tuned on questions about half of the entities and
scored by exact match on questions about the other half, whose facts stood in passages only:

    span       pre-trained with span corruption on passages about all entities
    salient    pre-trained with a name or date of a sentence of the same passages hidden
    none       not pre-trained
    permuted   as span, but the passages' answers are permuted among the entities

Expected: span beats the majority answer of each relation by 15 points on every seed,
permuted does not; under 40 minutes on 2 CPU cores.
Command: python -m t5x_lite.experiment --config=configs/experiments/closed_book_qa.py \\
    --workdir=runs/closed_book_qa

`…closed_book_qa.py:dev` scores on a part of the first half instead, to choose settings on.
Other text and questions by name=value pairs behind the colon, commas between:

    passages    text files, or a task that makes inputs and targets of text
    salient     a task that hides names and dates of the same text, where passages is a task
                (of text files the names and dates are found here)
    questions   a task, or a .jsonl, .json or .tsv file; a slice as in qa.jsonl[:50%]
    held_out    the same, to score on (default: the task's own validation split)
    document    what a document of the passages is: line, paragraph or file
    vocabulary  python, facts, byt5, t5 or a file, whose size the model takes (default: the
                shipped facts' for text files, T5's for tasks of other passages)

    …closed_book_qa.py:passages=factbook.txt,questions=factbook_qa.jsonl[:50%],held_out=factbook_qa.jsonl[50%:]
    …closed_book_qa.py:passages=span_corrupted_wikipedia,salient=salient_span_masked_wikipedia,questions=natural_questions_open,vocabulary=t5
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from t5x_lite import experiment
from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig
from t5x_lite.data import tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.data.vocabulary import rows_for_file
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.errors import UserError, nearest
from t5x_lite.experiment import Run
from t5x_lite.layers.config import AttentionConfig, MLPConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.reporting import runs as reporting_runs
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.schedules import ScheduleConfig

SEEDS = (0, 1, 2)
SHOWN = ("*/metric/em", "*/metric/f1")
_TEXT, _QUESTIONS = (".txt", ".jsonl", ".gz"), (".jsonl", ".json", ".tsv", ".gz")
_ROWS = {"": 3072, "facts": 3072, "python": 4096, "byt5": 384, "t5": 32128}
_PRETRAIN_STEPS, _FINETUNE_STEPS = 1000, 150


@dataclasses.dataclass(frozen=True)
class Options:
    """What stands behind the colon; the defaults are the shipped facts."""

    passages: str = ""
    salient: str = ""
    questions: str = "closed_book_qa"
    held_out: str = ""
    document: str = "paragraph"
    vocabulary: str = ""


def options(arg: str | None) -> Options:
    """`name=value,…`, or "dev"; UserError for unknown names."""
    if arg in (None, "", "dev"):
        return Options(questions=f"closed_book_qa_{arg}" if arg else "closed_book_qa")
    names = [f.name for f in dataclasses.fields(Options)]
    given = dict(part.partition("=")[::2] for part in arg.split(","))
    for name in given:
        if name not in names:
            raise UserError(f"closed_book_qa.py:{name}=…: one of {', '.join(names)}, or dev;"
                            f"{nearest(name, names)}")
    if not given.get("passages") or not given.get("questions"):
        raise UserError(f"closed_book_qa.py:{arg}: give both passages=… and questions=…")
    chosen = Options(**given)
    if chosen.questions.endswith(_QUESTIONS) and chosen.held_out in ("", chosen.questions):
        raise UserError(f"closed_book_qa.py:{arg}: every line of {chosen.questions} would be "
                        f"trained on and scored; give slices, questions={chosen.questions}[:50%],"
                        f"held_out={chosen.questions}[50%:], or another file to held_out.")
    if chosen.salient and chosen.passages.endswith(_TEXT):
        raise UserError(f"closed_book_qa.py:{arg}: names and dates of text files are found here; "
                        f"salient=… goes with a task as passages.")
    if not chosen.vocabulary:
        own = "facts" if chosen.passages.endswith(_TEXT) else "t5"
        chosen = dataclasses.replace(chosen, vocabulary=own)
    return chosen


def _model(vocabulary: str) -> ModelConfig:
    attention, mlp, layers = AttentionConfig(num_heads=4, head_dim=32, scale=1.0), MLPConfig(512), 2
    return ModelConfig(
        vocab_size=_ROWS.get(vocabulary) or rows_for_file(vocabulary) or 32128, embed_dim=128,
        encoder=StackConfig((SegmentConfig((BlockConfig(attention, None, mlp),), layers),),
                            scan=False),
        decoder=StackConfig((SegmentConfig((BlockConfig(attention, attention, mlp),), layers),),
                            causal=True, scan=False))


def stage(name: str, data: DataConfig, seed: int, steps: int, batch: int, rate: float,
          evaluation: EvalConfig) -> RunConfig:
    """One stage of training: this model, Adafactor, warm-up and a linear decay."""
    schedule = ScheduleConfig("constant * linear_warmup * linear_to_floor", rate,
                              warmup_steps=steps // 20, floor_fraction=0.05)
    return RunConfig(
        name=name, model=_model(data.vocabulary), data=dataclasses.replace(data, num_shards=4),
        optimizer=OptimizerConfig("adafactor", schedule),
        train=TrainConfig(num_steps=steps, global_batch_size=batch, seed=seed, log_every=50),
        eval=evaluation, checkpoint=CheckpointConfig(every=500, keep_last=1))


def _pretrain(chosen: Options, arm: str, seed: int) -> RunConfig:
    lengths = dict(inputs_length=128, targets_length=40)
    if not chosen.passages:
        task = {"span": "fact_passages", "salient": "fact_passages_salient",
                "permuted": "fact_passages_permuted"}[arm]
        # Short rows with few spans: which sentinel hides what is learned at once.
        lengths = (dict(inputs_length=28, targets_length=10) if arm == "salient" else
                   dict(inputs_length=24, targets_length=14))
        data = DataConfig(train=task, validation=task, **lengths)
    elif chosen.passages.endswith(_TEXT):
        data = DataConfig(train_files=chosen.passages, text_document=chosen.document,
                          denoising="salient" if arm == "salient" else "", **lengths)
    else:
        data = DataConfig(train=chosen.salient if arm == "salient" else chosen.passages, **lengths)
    data = dataclasses.replace(data, vocabulary=chosen.vocabulary)
    return stage(f"pretrain_{arm}", data, seed, _PRETRAIN_STEPS, 128, 0.03,
                  EvalConfig(every=_PRETRAIN_STEPS, num_batches=8))


def _finetune(chosen: Options, seed: int) -> RunConfig:
    data = DataConfig(train=chosen.questions, validation=chosen.held_out or chosen.questions,
                      inputs_length=30, targets_length=14, vocabulary=chosen.vocabulary)
    if chosen.passages:
        data = dataclasses.replace(data, inputs_length=64, targets_length=24)
    return stage("finetune", data, seed, _FINETUNE_STEPS, 128, 0.003,
                  EvalConfig(every=50, at_start=True, decode=DecodeConfig(max_length=data.targets_length)))


def get_runs(arg: str | None = None) -> tuple[Run, ...]:
    """All arms, seeds and stages; text of your own has no permuted arm."""
    chosen, runs = options(arg), []
    arms = ["span", "salient", "none", "permuted"]
    if chosen.passages:
        arms.remove("permuted")   # only a table of facts tells which words are answers
    if chosen.passages and not chosen.passages.endswith(_TEXT) and not chosen.salient:
        arms.remove("salient")
    for seed in SEEDS:
        for arm in arms:
            if arm != "none":
                runs.append(Run(arm, seed, _pretrain(chosen, arm, seed), "pretrain"))
            runs.append(Run(arm, seed, _finetune(chosen, seed), "finetune",
                            after="" if arm == "none" else "pretrain"))
    return tuple(runs)


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """Exact match of every seed, against the majority answer of each relation."""
    values = experiment.final_values(runs, workdir)
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        if run.stage == "finetune" and run.folder in values:
            score = reporting_runs.value(values[run.folder], SHOWN[0])
            if score is not None:
                found.setdefault(run.arm, {})[run.seed] = score
    lines = [f"Exact match on {runs[-1].config.data.validation}, per cent:", "",
             "| arm | " + " | ".join(f"seed {s}" for s in SEEDS) + " |",
             "|---" * (len(SEEDS) + 1) + "|"]
    for arm, by_seed in found.items():
        lines.append(f"| {arm} | " + " | ".join(
            f"{by_seed[s]:.1f}" if s in by_seed else "–" for s in SEEDS) + " |")
    if any("closed_book_qa" in r.config.data.train for r in runs):
        data_tasks.tensorflow_side()
        from tasks import facts_qa
        majority = facts_qa.majority_exact_match()
        lines += ["", f"The majority answer of each relation: {majority:.1f}."]
        for arm, by_seed in found.items():
            ahead = [score - majority for score in by_seed.values()]
            lines.append(f"- {arm}: {min(ahead):+.1f} to {max(ahead):+.1f} points against it")
    return "\n".join(lines) + "\n"
