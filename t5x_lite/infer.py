"""Predict or score: `python -m t5x_lite.infer --workdir=DIR --input=FILE --output=OUT.jsonl`.

    --input=FILE        .jsonl ({"inputs" or "question": …, "targets" or "answer": …}), .tsv
                        (inputs, tab, targets) or text (an input a line); - is standard input,
                        with --format=jsonl|tsv|text
    --task=NAME         instead: the --split of a seqio task
    --mode=predict      or score: the log-probability of the targets
    --step=last         or a number: which checkpoint of the workdir
    --config=…          instead of a workdir: a config with --config.init_from=hf:DIR, t5x:DIR
                        or a workdir (see init_from.py)
    --decode.method=beam --decode.beam_size=4 …    over the config's eval.decode
    --on_error=refuse   or skip: what to do with a malformed line, which is reported either way

Writes one JSON object a line, in the order of the input: {"line", "inputs", "predictions",
"scores", "targets"}. Started again with the same command it goes on behind the last complete
line of the output; OUT.jsonl.run says what the output belongs to. With several processes the
mesh splits each batch, all processes read the same input, process 0 writes and tells the others
where the output ends.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import

from absl import flags
import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import config_flags

from t5x_lite import data, init_from, report, state
from t5x_lite import config as configs
from t5x_lite.build import Experiment, build
from t5x_lite.config import RunConfig
from t5x_lite.decoding import DecodeConfig
from t5x_lite.errors import UserError, nearest
from t5x_lite.predictor import Predictor, Text

FORMATS = ("jsonl", "tsv", "text")
MODES = ("predict", "score")
_SECONDS_BETWEEN_REPORTS = 10.0


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to predict or score."""

    line: int                       # in the input, from 1
    text: str                       # the inputs, as they are written out
    inputs: Text                    # the same, or a task's tokens
    targets: tuple[str, ...] = ()   # the first one is scored


# --- reading --------------------------------------------------------------------------------

def format_of(path: str, given: str) -> str:
    """The format by name, or by the file's ending. Raises UserError for an unknown one."""
    if given and given not in FORMATS:
        raise UserError(f"--format={given}: must be one of {', '.join(FORMATS)}."
                        f"{nearest(given, FORMATS)}")
    if path == "-" and not given:
        raise UserError("--input=- needs --format=jsonl, tsv or text.")
    ending = pathlib.Path(path).suffix.removeprefix(".")
    return given or (ending if ending in FORMATS else "text")


def parse(line: str, kind: str) -> tuple[str, tuple[str, ...]]:
    """(inputs, targets) of a line without its end. Raises UserError where it is malformed."""
    if not line.strip():
        raise UserError("is empty")
    if kind == "text":
        return line, ()
    if kind == "tsv":
        inputs, *targets = line.split("\t")
        if not inputs.strip():
            raise UserError("has no inputs before the tab")
        return inputs, tuple(targets)
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON ({error.msg})") from error
    if not isinstance(record, dict):
        raise UserError(f"is not an object but a {type(record).__name__}")
    inputs = next((record[k] for k in ("inputs", "question", "text") if k in record), None)
    targets = next((record[k] for k in ("targets", "answer", "answers") if k in record), [])
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(inputs, str):
        raise UserError(f'has no string "inputs", "question" or "text" (found {sorted(record)})')
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise UserError('has "targets" that are neither a string nor a list of strings')
    return inputs, tuple(targets)


def read_lines(lines: Iterable[bytes], kind: str, *, on_error: str, needs_targets: bool,
               name: str = "input") -> Iterator[Item]:
    """The items of a file; a malformed line is said and skipped, or raised with its number."""
    for number, raw in enumerate(lines, 1):
        try:
            try:
                line = raw.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError("is not UTF-8") from error
            inputs, targets = parse(line, kind)
            if needs_targets and not (targets and targets[0].strip()):
                raise UserError("has no targets to score")
        except UserError as error:
            message = f"{name}, line {number} {error}"
            if on_error == "refuse":
                raise UserError(f"{message}; --on_error=skip leaves such lines out") from error
            report.say(f"skipped: {message}")
            continue
        yield Item(number, inputs, inputs, targets)


def read_task(config: RunConfig, name: str, split: str) -> Iterator[Item]:
    """The examples of a seqio task; its inputs are the tokens that evaluation sees."""
    task, examples = data.eval_examples(config.data, name, objective=config.objective.name,
                                        split=split, field="--task")
    vocabulary = task.output_features["targets"].vocabulary

    def text(example, feature) -> str:
        kept = example.get(f"{feature}_pretokenized")
        if kept is None:
            return data.text_of(vocabulary, example.get(feature, ()))
        return kept.decode()

    for number, example in enumerate(examples, 1):
        answers = [a.decode() for a in example.get("answers", ())]
        yield Item(number, text(example, "inputs"), example.get("inputs", ()),
                   tuple(answers) or (text(example, "targets"),))


# --- writing --------------------------------------------------------------------------------

class Output:
    """A JSONL file that is gone on with where it ends.

    belongs_to: what the lines are a function of; kept beside the file and compared.
    """

    def __init__(self, path: pathlib.Path, belongs_to: dict[str, Any]):
        self._path = path
        self._file = None
        self.last_line = self._agree(belongs_to)     # of the input, already written

    def _agree(self, belongs_to: dict[str, Any]) -> int:
        """Process 0 opens the file; the others hear where it ends and need not see it."""
        last, problem = -1, None
        if report.is_main():
            try:
                last = self._open(belongs_to)
            except UserError as error:
                problem = error
        if jax.process_count() > 1:
            last = int(multihost_utils.broadcast_one_to_all(np.int32(last)))
        if last < 0:
            raise problem or UserError(f"process 0 refuses --output={self._path} and says why")
        return last

    def _open(self, belongs_to: dict[str, Any]) -> int:
        path, run = self._path, self._path.with_name(self._path.name + ".run")
        last = 0
        if path.exists() and run.exists():
            if path.stat().st_size:   # else a run that was refused before its first line
                _check_same(path, json.loads(run.read_text()), belongs_to)
            last = self._cut_off_partial_line()
        elif path.exists():
            raise UserError(f"--output={path} exists and is not an output of infer; name another "
                            "file or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        run.write_text(json.dumps(belongs_to, indent=1, sort_keys=True) + "\n")
        self._file = open(path, "a")
        return last

    def _cut_off_partial_line(self) -> int:
        """The input line of the last complete line; a killed run may have left half of one."""
        content = self._path.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))
        lines = whole.splitlines()
        return json.loads(lines[-1])["line"] if lines else 0

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends the rows; they are on disk when this returns."""
        if self._file is not None:
            self._file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _check_same(path: pathlib.Path, before: dict, now: dict) -> None:
    now = json.loads(json.dumps(now))   # tuples become lists
    changed = [f"{k}: {before.get(k)!r} before, {now.get(k)!r} now"
               for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    if changed:
        raise UserError(f"--output={path} belongs to another run:\n  " + "\n  ".join(changed)
                        + "\nName another file, or remove it to start anew.")


# --- the run --------------------------------------------------------------------------------

def run(predictor: Predictor, params, items: Iterable[Item], output: Output, mode: str) -> int:
    """Predicts or scores what the output does not hold yet; returns how many lines it wrote."""
    fresh = itertools.dropwhile(lambda item: item.line <= output.last_line, items)
    began = shown = time.monotonic()
    count = 0
    while batch := list(itertools.islice(fresh, predictor.batch_size)):
        inputs = [item.inputs for item in batch]
        if mode == "score":
            scores = predictor.score(params, inputs, [item.targets[0] for item in batch])
            found = [{"scores": [s]} for s in scores]
        else:
            found = [{"predictions": list(p.texts), "scores": list(p.scores)}
                     for p in predictor.predict(params, inputs, [i.line for i in batch])]
        output.write([{"line": item.line, "inputs": item.text, **result,
                       "targets": list(item.targets)}
                      for item, result in zip(batch, found, strict=True)])
        count += len(batch)
        if time.monotonic() - shown > _SECONDS_BETWEEN_REPORTS:
            shown = time.monotonic()
            report.say(f"line {batch[-1].line:,}: {count / (shown - began):.3g} lines/s")
    seconds = time.monotonic() - began
    report.say(f"{count:,} lines in {seconds:.1f} s"
               + (f", behind {output.last_line:,} of before" if output.last_line else ""))
    predictor.say_misfits()
    return count


def infer(config: RunConfig, workdir: pathlib.Path | None, step: str, decode: DecodeConfig,
          items: Iterable[Item], output: pathlib.Path, *, mode: str, source: str) -> int:
    """Restores the parameters (without a workdir: of init_from) and runs.

    source: what the items are read from, for the record.
    """
    experiment = build(config)
    vocabulary = data.vocabulary_of(config.data)
    data.check_vocabulary(vocabulary, config.model.vocab_size, sentinels=False)
    with experiment.activate():
        params, step = init_from.restore(experiment, workdir,
                                         int(step) if step.isdigit() else step)
        predictor = Predictor(experiment, vocabulary, decode)
        params = _gathered(experiment, params)
        file = Output(output, {"workdir": str(workdir or config.init_from), "step": step,
                               "mode": mode, "source": source,
                               "decode": dataclasses.asdict(decode)})
        count = run(predictor, params, items, file, mode)
    file.close()
    return count


def _gathered(experiment: Experiment, params: dict) -> dict:
    """The parameters as decoding wants them; says what that costs."""
    ways = experiment.mesh.shape["fsdp"]
    if ways == 1 or not experiment.config.eval.gather_params:
        return params
    before = state.num_bytes_per_device(params)
    params = experiment.gathered(params)
    report.say(f"parameters gathered over mesh.fsdp={ways} once: "
               f"{report.si(state.num_bytes_per_device(params), 'B')} a device, before "
               f"{report.si(before, 'B')} (eval.gather_params=false leaves them split)")
    return params


def _items(config: RunConfig, values: Any) -> tuple[Iterator[Item], str]:
    """What the flags say to read, and its name."""
    for name, allowed in (("mode", MODES), ("on_error", ("refuse", "skip"))):
        if getattr(values, name) not in allowed:
            raise UserError(f"--{name}={getattr(values, name)}: must be {' or '.join(allowed)}.")
    if bool(values.input) == bool(values.task):
        raise UserError("give either --input=FILE or --task=NAME.")
    if values.task:
        return read_task(config, values.task, values.split), f"{values.task}/{values.split}"
    kind = format_of(values.input, values.format)
    if values.input == "-" and jax.process_count() > 1:
        raise UserError(f"--input=-: {jax.process_count()} processes cannot share one standard "
                        "input; write it to a file that all of them see.")
    if values.input != "-" and not pathlib.Path(values.input).is_file():
        raise UserError(f"--input={values.input} does not exist.")
    lines = sys.stdin.buffer if values.input == "-" else open(values.input, "rb")
    return read_lines(lines, kind, on_error=values.on_error, name=values.input,
                      needs_targets=values.mode == "score"), f"{values.input} as {kind}"


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The folder of the run whose model predicts.")
    flags.DEFINE_string("step", "last", "last or the number of a step.")
    flags.DEFINE_multi_string("override", [], "field=value of the run's config.")
    flags.DEFINE_string("input", "", "A .jsonl, .tsv or text file; - for standard input.")
    flags.DEFINE_string("format", "", "jsonl, tsv or text; default: by the file's ending.")
    flags.DEFINE_string("task", "", "A seqio task to read instead of a file.")
    flags.DEFINE_string("split", "validation", "The task's split.")
    flags.DEFINE_string("output", None, "The .jsonl file to write or go on with.")
    flags.DEFINE_string("mode", "predict", "predict or score.")
    flags.DEFINE_string("on_error", "refuse", "refuse or skip malformed lines.")
    given_config = cli.define_config()
    config_flags.DEFINE_config_dict("decode", configs.to_config_dict(DecodeConfig()))

    def main() -> None:
        values = flags.FLAGS
        if not values.output:
            raise UserError("--output is missing: the .jsonl file to write.")
        config, workdir = cli.saved_or_given(values.workdir, values.override, given_config)
        given = config_flags.get_override_values(values["decode"])
        decode = dataclasses.replace(config.eval.decode, **given)
        items, source = _items(config, values)
        infer(config, workdir, values.step, decode, items, pathlib.Path(values.output),
              mode=values.mode, source=source)

    cli.run(main)
