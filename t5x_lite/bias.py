"""Stereotypes and toxicity by scale:
`python -m t5x_lite.bias --kind=crows_pairs --data=FILE --checkpoints=W1,W2,hf:DIR --output=DIR`.

    --kind=KIND         crows_pairs, winobias, winogender, stereoset, bbq or toxicity
    --data=FILE         the set as its authors publish it (evaluation/bias_files.py says which files)
    --checkpoints=…     workdirs, hf:DIR or hf:ORG/NAME, by commas
    --step=last         best or a number: which checkpoint of the workdirs
    --output=DIR        bias.md, bias.json and bias.png, the first metric over parameters with its intervals
    --scorer=words      toxicity: detoxify, words:FILE or MODULE:FUNCTION (evaluation/toxicity.py)
    --samples=25        toxicity: continuations a prompt; --max_length=20 tokens each, nucleus 0.9
    --override=a.b=c    changes a field of every checkpoint's config, such as data.targets_length

Intervals are 95 % of a bootstrap over the items; between checkpoints they do not see that the items are the
same. Scores are in nats of whole texts or a byte, never a token, so that vocabularies may differ.
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import dataclasses
import importlib
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import

# isort: split

from absl import flags

from t5x_lite import config as configs, files, init_from, log, packages
from t5x_lite.config import RunConfig
from t5x_lite.data import rows as data_rows, tasks, vocabulary as data_vocabulary
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.errors import UserError, known
from t5x_lite.evaluation import bias, toxicity
from t5x_lite.evaluation.predictor import Predictor


class Result(NamedTuple):
    """What one checkpoint got."""

    name: str
    parameters: int
    vocabulary: str
    metrics: dict[str, bias.Value]


def config_of(checkpoint: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a workdir, or of hf:X. Raises UserError where there is none."""
    if not checkpoint.startswith("hf:"):
        return configs.load(files.path(checkpoint) / "config.json", overrides)
    packages.join("configs")
    return configs.override(importlib.import_module("configs.hf").run(checkpoint.removeprefix("hf:")), overrides)


def run(kind: str, data: str, checkpoints: Sequence[str], *, step: int | str = "last",
        overrides: Sequence[str] = (), writing: bias.Writing | None = None, mixed: bool = False) -> list[Result]:
    """Every checkpoint on the items of a file.

    mixed: whether the checkpoints may have several vocabularies.

    Raises:
        UserError: an unknown kind, a file without items, a checkpoint without a decoder or whose vocabulary cannot
            spell a text, checkpoints of several vocabularies where these are not to be mixed.
    """
    known("--kind", "kind of set", kind, bias.KINDS)
    if not checkpoints:
        raise UserError("--checkpoints is empty: workdirs or hf:DIR, by commas")
    if (kind == "toxicity") != (writing is not None):
        raise UserError("--kind=toxicity writes texts and the other kinds choose: give `writing` for it alone")
    items = bias.read(kind, data)
    configs_of = {name: config_of(name, overrides) for name in checkpoints}
    _check_vocabularies({name: data_vocabulary.vocabulary_identity(tasks.vocabulary_of(config.data))
                         for name, config in configs_of.items()}, mixed)
    return [_of(kind, items, name, config, step, writing) for name, config in configs_of.items()]


def _check_vocabularies(found: Mapping[str, str], mixed: bool) -> None:
    """{checkpoint: its vocabulary}. Raises UserError for several, unless they may be mixed, which is then said."""
    kinds = sorted(set(found.values()))
    if len(kinds) < 2:
        return
    listed = "; ".join(f"{kind}: {', '.join(name for name, own in found.items() if own == kind)}" for kind in kinds)
    if not mixed:
        raise UserError(f"--checkpoints have {len(kinds)} vocabularies ({listed}). Give checkpoints of one, or "
                        "--mixed_vocabularies: what is compared is whole texts, in nats or nats a byte")
    log.say(f"the checkpoints have {len(kinds)} vocabularies ({listed}): scores are of whole texts, in nats or nats a "
            "byte, and can be compared; nothing here is a token's")


def _of(kind: str, items: Sequence[bias.Item], name: str, config: RunConfig, step: int | str,
        writing: bias.Writing | None) -> Result:
    vocabulary = tasks.vocabulary_of(config.data)
    rows = data_rows.of(config.objective.rows)
    room = config.data.targets_length - 1
    bias.check_spelt(items, vocabulary, name, (config.data.inputs_length - 1, room))
    if rows.shares_row:
        longest = max(len(vocabulary.encode(i.inputs + max(i.choices, key=len, default=""))) for i in items)
        if longest > room:
            raise UserError(f"{name}: {longest} tokens of inputs and choice do not fit a row of data.targets_length="
                            f"{room + 1}: --override=data.targets_length=N")
    program = init_from.alone(config)
    decode = writing.decode if writing else DecodeConfig(max_length=2)
    with program.activate():
        params, _ = init_from.restore(program, None if name.startswith("hf:") else files.path(name), step)
        predictor = Predictor(program, vocabulary, decode, config.eval.batch_size or 32)
        table = bias.measure(kind, items, predictor, params, writing)
    count = sum(math.prod(info.shape) for info in program.model.table.values())
    log.say(f"{name}: {count:,} parameters, {len(items):,} items")
    return Result(name, count, data_vocabulary.vocabulary_identity(vocabulary), bias.summarise(kind, table))


# --- what came out --------------------------------------------------------------------------

def table_of(results: Sequence[Result]) -> str:
    """Markdown: a checkpoint a row, rising in parameters; metric (95 % interval)."""
    names = list(dict.fromkeys(name for r in results for name in r.metrics))
    lines = ["| checkpoint | parameters | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for r in sorted(results, key=lambda r: r.parameters):
        cells = (_cell(r.metrics[name]) if name in r.metrics else "–" for name in names)
        lines.append(f"| {r.name} | {r.parameters:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: bias.Value) -> str:
    if not math.isfinite(value.value):
        return "–"
    return f"{value.value:.3g} ({value.low:.3g} … {value.high:.3g})"


def to_json(kind: str, data: str, results: Sequence[Result]) -> dict[str, Any]:
    """The results of one kind of measurement as one JSON object; what is no number is null."""
    def plain(value: bias.Value) -> dict[str, float | None]:
        return {n: v if math.isfinite(v) else None for n, v in value._asdict().items()}
    return {"kind": kind, "data": data, "bootstrap": bias.SAMPLES, "checkpoints": [
        {**r._asdict(), "metrics": {name: plain(value) for name, value in r.metrics.items()}} for r in results]}


def drawn(kind: str, results: Sequence[Result]) -> bytes:
    """A PNG: the first metric over parameters, its interval as a bar, and where no bias would be."""
    figure = packages.needed("matplotlib.figure", "plots", "--output").Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    metric = next(iter(bias.KINDS[kind].metrics))
    shown = [r for r in sorted(results, key=lambda r: r.parameters) if math.isfinite(r.metrics[metric].value)]
    values = [r.metrics[metric] for r in shown]
    bars = [[max(0.0, v.value - v.low) for v in values], [max(0.0, v.high - v.value) for v in values]]
    axes.errorbar([r.parameters for r in shown], [v.value for v in values], bars, marker="o", capsize=3)
    if bias.KINDS[kind].unbiased is not None:
        axes.axhline(bias.KINDS[kind].unbiased, color="grey", linestyle=":", label="no preference")
        axes.legend()
    axes.set(xscale="log", xlabel="parameters", ylabel=metric, title=f"{kind}: 95 % of a bootstrap over items")
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    return image.getvalue()


def write(folder: pathlib.Path, kind: str, data: str, results: Sequence[Result]) -> str:
    """bias.md, bias.json and bias.png in the folder; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = table_of(results)
    files.write_whole(folder / "bias.md", f"{kind}, {data}\n\n{text}")
    files.write_whole(folder / "bias.json", json.dumps(to_json(kind, data, results), indent=1) + "\n")
    files.write_bytes(folder / "bias.png", drawn(kind, results))
    return text


if __name__ == "__main__":
    flags.DEFINE_string("kind", "", f"One of {', '.join(bias.KINDS)}.")
    flags.DEFINE_string("data", "", "The file of the set.")
    flags.DEFINE_list("checkpoints", [], "Workdirs and hf:DIR, by commas.")
    flags.DEFINE_string("step", "last", "last, best or the number of a step.")
    flags.DEFINE_string("output", None, "The folder for bias.md, bias.json and bias.png.")
    flags.DEFINE_multi_string("override", [], "field=value of every checkpoint's config.")
    flags.DEFINE_string("scorer", "words", "Of toxicity: words, words:FILE, detoxify or MODULE:FUNCTION.")
    flags.DEFINE_bool("mixed_vocabularies", False, "Checkpoints of several vocabularies in one table.")
    flags.DEFINE_integer("samples", 25, "Continuations a prompt.", lower_bound=1)
    flags.DEFINE_integer("max_length", 20, "Tokens of a continuation.", lower_bound=1)

    def main() -> None:
        values = flags.FLAGS
        if not values.data or not values.output:
            raise UserError("usage: python -m t5x_lite.bias --kind=KIND --data=FILE --checkpoints=W1,W2 --output=DIR")
        writing = None
        if values.kind == "toxicity":
            decode = dataclasses.replace(bias.Writing.decode, num_samples=values.samples, max_length=values.max_length)
            writing = bias.Writing(toxicity.scorer(values.scorer), decode)
        results = run(values.kind, values.data, values.checkpoints, writing=writing, overrides=values.override,
                      mixed=values.mixed_vocabularies,
                      step=int(values.step) if values.step.isdigit() else values.step)
        log.say(write(files.local(values.output, "--output"), values.kind, values.data, results))

    cli.run(main)
