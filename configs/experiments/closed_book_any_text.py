"""Closed-book questions on text that nobody prepared: are the facts stored, and do questions reach them?

Papers: Allen-Zhu & Li 2023 (arXiv:2309.14316), storage and extraction of knowledge; Ye et al. 2021
(arXiv:2012.15856), which spans to hide; Roberts et al. 2020 (arXiv:2002.08910), closed-book QA with T5.
Each arm reads the same text for as many steps (long: four times as many), is fine-tuned on the questions,
unless they were mixed in, and scored by exact match on the held-out ones. While it reads, two things are scored:

    storage      the text's own sentence that answers a held-out question, its answer hidden, with the name where the
                 arm puts it there
    extraction   the question itself

Arms (ARMS, a table; arms=a+b takes some):

    none     not pre-trained
    salient  names and dates of the text as it is hidden, one a sentence: the control
    long     the same for four times as many steps
    mixed    the control with the training questions in every fourth row (Allen-Zhu & Li)
    named    the name for pronouns and surnames and in front of sentences without it; never hidden
    like     named, and only spans hidden that look like answers of the training questions
    cured    like, words left out in twenty versions of each sentence, training questions mixed in
    asked    cured, and every document is asked the questions that it answers, in the training questions' wording
             (Lewis et al. 2021, arXiv:2102.07033; data/asked.py). Of the held-out questions nothing is read

Without `arms`: none, the control and the best arm (none+salient+asked; cured for asked, where no wording recurs), three
seeds. On 18,847 names and dates of 1,170 persons an arm and seed took 6 to 8 CPU-minutes on a loaded 2-core x86 machine,
none 1, so that the whole costs some 45; all arms would cost twice as much and more.
Expected: salient stores more than it extracts; asked is the best arm on every seed.
Command: python -m t5x_lite.experiment --config=configs/experiments/closed_book_any_text.py \\
    --workdir=runs/any_text        (300 biographies made up by tasks/biographies.py)

Your own text and questions by name=value pairs behind the colon, commas between:

    passages    text files                        document   line, paragraph or file
    questions   to train on: a .jsonl, .json or .tsv file with or without a slice, qa.jsonl[:50%]
    held_out    the same, to score on             unit       sentences, or lines: of one statement each
    dev=1       score on the last fifth of `questions` instead, to choose settings on
    arms        which, joined by "+" (see above)  seeds      how many (3)
    steps       of pre-training (400)             vocabulary facts, byt5, t5 or a file

    …:passages=factbook.txt,document=paragraph,unit=lines,questions=qa.jsonl[:50%],held_out=qa.jsonl[50%:]
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

from configs.experiments import closed_book_qa
from t5x_lite import experiment, files
from t5x_lite.config import EvalConfig, RunConfig
from t5x_lite.data import tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.data.paths import EXAMPLES
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.errors import UserError, known, one_of
from t5x_lite.experiment import Run

SHOWN = ("*/metric/em", "*/metric/f1")
_FINETUNE_STEPS = 100
_STORAGE = "storage_of_"                   # begins the name of the probe's file
_ROWS, _INPUTS, _TARGETS = 32, 128, 40   # packed: some five sentences a row
_SCORED = 512                            # questions at most while pre-training
_FAR_APART = 3.0                         # storage over extraction that is called a gap, at least …
_STORED = 10.0                           # … where so many per cent are stored


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is read before the questions; steps: times the option's, 0 for nothing."""

    kind: str = "salient"
    rewriting: tuple[str, ...] = ()      # behind the step that cuts the text
    rewrites: int = 1
    like: bool = False
    mixed: bool = False
    steps: float = 1.0


_NAMED = ("named", "headed")
ARMS = {
    "none": Arm(steps=0),
    "salient": Arm(),
    "long": Arm(steps=4),
    "mixed": Arm(mixed=True),
    "named": Arm("salient_kept", _NAMED),
    "like": Arm("salient_kept", _NAMED, like=True),
    "cured": Arm("salient_kept", (*_NAMED, "thinned"), 20, like=True, mixed=True),
    "asked": Arm("salient_asked", (*_NAMED, "thinned"), 20, like=True, mixed=True),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What stands behind the colon; without passages, made-up biographies."""

    passages: str = ""
    questions: str = ""
    held_out: str = ""
    document: str = "line"
    unit: str = "sentences"
    vocabulary: str = "facts"
    arms: str = ""
    seeds: str = "3"
    steps: str = "400"
    dev: str = ""


def options(arg: str | None) -> Options:
    """`name=value,…`. Raises UserError for what is missing, unknown or no number."""
    names = [f.name for f in dataclasses.fields(Options)]
    given = dict(part.partition("=")[::2] for part in (arg or "").split(",") if part)
    for name in given:
        known("closed_book_any_text.py", "option", name, names)
    chosen = Options(**given)
    for arm in chosen.arms.split("+") if chosen.arms else ():
        known("closed_book_any_text.py:arms", "arm", arm, ARMS)
    one_of("closed_book_any_text.py:unit", chosen.unit, ("sentences", "lines"))
    for name in ("seeds", "steps"):
        if not getattr(chosen, name).isdecimal() or not int(getattr(chosen, name)):
            raise UserError(f"closed_book_any_text.py:{name}={getattr(chosen, name)}: a number from 1 on")
    if not chosen.passages:
        return _made_up(chosen)
    missing = [name for name in ("questions", "held_out") if not getattr(chosen, name)]
    if missing:
        raise UserError(f"closed_book_any_text.py:{arg}: {' and '.join(missing)} missing, "
                        "as in questions=qa.jsonl[:50%],held_out=qa.jsonl[50%:]")
    if chosen.questions == chosen.held_out:
        raise UserError(f"closed_book_any_text.py: questions and held_out are both {chosen.held_out}: what is "
                        "trained on would be scored; give slices, [:50%] and [50%:]")
    return chosen


def _made_up(chosen: Options) -> Options:
    """The options with files of biographies in the cache."""
    from tasks import biographies
    passages, questions = (_kept(name, text) for name, text in biographies.files())
    return dataclasses.replace(chosen, passages=passages, questions=f"{questions}[:50%]",
                               held_out=f"{questions}[50%:]")


def _kept(name: str, text: str) -> str:
    """The path of a file in the cache that holds the text; one that does already keeps its date."""
    path = files.cache_root() / "closed_book" / name
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, text)
    return str(path)


def split_for_dev(chosen: Options) -> Options:
    """With dev, four fifths of the training questions to train on, and the last fifth held out."""
    if not chosen.dev:
        return chosen
    path, start, stop = EXAMPLES.fullmatch(chosen.questions).groups()
    low, high = int(start or 0), int(stop or 100)
    middle = low + (high - low) * 4 // 5
    return dataclasses.replace(chosen, questions=f"{path}[{low}%:{middle}%]", held_out=f"{path}[{middle}%:{high}%]")


@functools.lru_cache(maxsize=2)
def _documents(passages: str, document: str, unit: str) -> tuple:
    """The text as rewriting.Document, cut. Raises UserError for files without documents."""
    data_tasks.tensorflow_side()
    from t5x_lite.data import rewriting, text_files
    paths = text_files.find_files(passages, "passages")
    documents = tuple(rewriting.cut(text, (unit,)) for text in text_files.read_documents(paths, document))
    if not documents:
        raise UserError(f"passages={passages!r} hold no document: all their lines are blank")
    return documents


def _evidence(chosen: Options, field: str) -> list:
    """What the text says to each question of `questions` or `held_out`. Raises UserError for files without any."""
    documents = _documents(chosen.passages, chosen.document, chosen.unit)
    from t5x_lite.data import evidence, salient_choice
    return evidence.find(documents, salient_choice.questions_of(getattr(chosen, field), field))


def _with_arms(chosen: Options) -> Options:
    """The options with arms: those given, or none, the control and the best that can be had.

    Raises UserError where a given arm asks the text's own questions and no wording recurs.
    """
    from t5x_lite.data import asked, salient_spans
    found = _evidence(chosen, "questions")
    recurs = bool(asked.by_wording(found))
    if not chosen.arms:
        return dataclasses.replace(chosen, arms=f"none+salient+{'asked' if recurs else 'cured'}")
    asking = [arm for arm in chosen.arms.split("+") if salient_spans.KINDS[ARMS[arm].kind].asks]
    if asking and not recurs:
        others = "+".join(arm for arm in chosen.arms.split("+") if arm not in asking) or "none+salient+cured"
        raise UserError(f"closed_book_any_text.py:arms={chosen.arms}: no wording stands {asked.LEAST} times among the "
                        f"{len(found)} training questions, once their names are taken away, so that arm "
                        f"{', '.join(asking)} has nothing to ask; take arms={others}")
    return chosen


def _storage_probes(chosen: Options) -> dict[str, str]:
    """{arm: the path of a file in the cache}: the sentences of the held-out questions, their answers hidden."""
    found = [e for e in _evidence(chosen, "held_out") if e.unit]
    if not found:
        raise UserError(f"passages={chosen.passages!r} answer none of the questions of {chosen.held_out!r}: no "
                        "document's subject stands in a question and has its answer")
    return {name: _probe(found, ARMS[name]) for name in chosen.arms.split("+") if ARMS[name].steps}


def _probe(found: Sequence, arm: Arm) -> str:
    """The path of an arm's probe: sentences by the steps of its rewriting that draw nothing."""
    from t5x_lite.data import evidence, rewriting, salient_spans
    steps = tuple(s for s in arm.rewriting if not rewriting.STEPS[s].draws)
    lines = []
    for e in found:
        unit, span = evidence.rewritten(e, rewriting.Rewriting(steps))
        inputs, targets = salient_spans.masked(unit, *span)
        lines.append(json.dumps({"inputs": inputs, "targets": targets}) + "\n")
    text = "".join(lines)
    return _kept(f"{_STORAGE}{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl", text)


def _pretrain(chosen: Options, name: str, seed: int, storage: str) -> RunConfig:
    arm = ARMS[name]
    steps = int(int(chosen.steps) * arm.steps)
    data = DataConfig(
        train=f"train_files=3,{chosen.questions}=1" if arm.mixed else "", train_files=chosen.passages,
        text_document=chosen.document, denoising=arm.kind, rewriting=(",".join((chosen.unit, *arm.rewriting))),
        rewrites=arm.rewrites, salient_like=chosen.questions if arm.like else "",
        validation=f"{chosen.held_out},{storage}", vocabulary=chosen.vocabulary, inputs_length=_INPUTS,
        targets_length=_TARGETS, packing=True)
    evaluation = EvalConfig(every=-(-steps // 2), num_examples=_SCORED, decode=DecodeConfig(max_length=24))
    return closed_book_qa.stage(f"pretrain_{name}", data, seed, steps, _ROWS, 0.03, evaluation)


def _finetune(chosen: Options, seed: int) -> RunConfig:
    data = DataConfig(train=chosen.questions, validation=chosen.held_out, vocabulary=chosen.vocabulary,
                      inputs_length=_INPUTS, targets_length=_TARGETS, packing=True)
    evaluation = EvalConfig(every=_FINETUNE_STEPS, at_start=True, decode=DecodeConfig(max_length=24))
    return closed_book_qa.stage("finetune", data, seed, _FINETUNE_STEPS, _ROWS // 2, 0.003, evaluation)


def get_runs(arg: str | None = None) -> tuple[Run, ...]:
    """All arms, seeds and stages."""
    chosen = _with_arms(split_for_dev(options(arg)))
    storage, runs = _storage_probes(chosen), []
    for seed in range(int(chosen.seeds)):
        for name in chosen.arms.split("+"):
            if ARMS[name].steps:
                runs.append(Run(name, seed, _pretrain(chosen, name, seed, storage[name]), "pretrain"))
            if not ARMS[name].mixed:   # the others have learned to answer already
                runs.append(Run(name, seed, _finetune(chosen, seed), "finetune",
                                after="pretrain" if ARMS[name].steps else ""))
    return tuple(runs)


# --- what came out --------------------------------------------------------------------------

def _scores(runs: Sequence[Run], workdir: pathlib.Path) -> dict[str, dict[str, list[float]]]:
    """{arm: {"storage", "extraction" at the end of pre-training, "final": exact match by seed}}."""
    values = experiment.final_values(runs, workdir)
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for name, value in values.get(run.folder, {}).items():
            if name.endswith("/metric/em"):
                what = "final" if run.stage == "finetune" else (
                    "storage" if _STORAGE in name else "extraction")
                found.setdefault(run.arm, {}).setdefault(what, []).append(value)
    for arm, of_arm in found.items():
        if ARMS[arm].mixed:
            of_arm["final"] = of_arm.get("extraction", [])
    return found


def _held_out(runs: Sequence[Run]) -> str:
    """The questions that all arms are scored on: what the pre-training's validation lists before the probe."""
    data = runs[-1].config.data
    return data.validation.rpartition(",")[0] or data.validation


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = f" ({min(values):.1f} … {max(values):.1f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.1f}{spread}"


def verdict(arm: str, scores: dict[str, dict[str, list[float]]]) -> str:
    """What is wrong with an arm, "" where nothing is: stored and not extractable, or no use at all."""
    mean = {what: sum(v) / len(v) for what, v in scores[arm].items()}
    storage, extraction = mean.get("storage", 0.0), mean.get("extraction", 0.0)
    said = []
    if storage >= _STORED and storage > _FAR_APART * max(extraction, mean.get("final", 0.0)):
        said.append(f"{storage:.0f} % of the facts are filled into their own sentence, {extraction:.1f} % are found "
                    "for the question: stored, not extractable. More steps of the same will not help; put the "
                    "name into every sentence, reword, mix questions in (arm cured)")
    elif "storage" in mean and storage < _STORED:
        said.append(f"{storage:.1f} % are filled into their own sentence: hardly stored. More steps, a larger "
                    "model, or fewer facts (arm like)")
    base = scores.get("none", {}).get("final")
    if arm != "none" and base and mean.get("final", 0.0) <= sum(base) / len(base):
        said.append("the text did not help: no better than without pre-training")
    return "; ".join(said)


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """Storage beside extraction by arm, what is wrong, and what of the questions the text tells."""
    scores = _scores(runs, workdir)
    columns = ("storage", "extraction", "final")
    lines = [f"Exact match, per cent, {_held_out(runs)}: storage (the sentence, its answer hidden) "
             "and extraction (the question) at the end of pre-training; final after fine-tuning, where questions "
             "were not mixed in.", "",
             "| arm | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for arm, of_arm in scores.items():
        seeds = max(map(len, of_arm.values()))
        lines.append(f"| {arm} | {seeds} | " + " | ".join(_cell(of_arm.get(c, [])) for c in columns) + " |")
    lines += ["", *(f"- {arm}: {said}." for arm in scores if (said := verdict(arm, scores)))]
    return "\n".join(lines + ["", *_covered(runs)]) + "\n"


def _covered(runs: Sequence[Run]) -> list[str]:
    """How many held-out answers the text has in a form to learn from."""
    data = next((r.config.data for r in runs if r.config.data.train_files), None)
    if data is None:
        return []
    from t5x_lite.data import evidence
    held_out = _held_out(runs)
    chosen = Options(data.train_files, held_out, held_out, data.text_document, data.rewriting.partition(",")[0])
    return [f"- {count} {what}" for what, count in evidence.coverage(_evidence(chosen, "held_out")).items()]
