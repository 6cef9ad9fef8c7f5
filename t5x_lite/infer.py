"""Predict or score: `python -m t5x_lite.infer --workdir=DIR --input=FILE --output=OUT.jsonl`.

    --input=FILE        .jsonl ({"inputs" or "question": …, "targets" or "answer": …}), .json (a
                        list of such objects), .tsv (inputs, tab, targets) or text (an input a
                        line), also .gz, or conversations, .jsonl of {"messages"} (data/chats.py);
                        - is standard input, which as any pipe needs
                        --format=jsonl|json|tsv|text|chats
    --task=NAME         instead: the --split of a seqio task
    --mode=predict      or score: the log-probability of each of the targets
    --step=last         best or a number: which checkpoint of the workdir
    --config=…          instead of a workdir: a config with --config.init_from=hf:DIR, t5x:DIR
                        or a workdir (see init_from.py)
    --decode.method=beam --decode.beam_size=4 …    over the config's eval.decode, whose fields
                        --help=eval.decode lists
    --on_error=refuse   or skip: what to do with a malformed line, which is reported either way

Writes one JSON object a line, in the order of the input: {"line", "inputs", "predictions",
"scores" (null where one is not a number), "targets"}, and of a choice of a rank classification task "question" and "is_correct".
Started again with the same command it goes on behind the last complete line of the output;
OUT.jsonl.run says what the output belongs to. With several processes the mesh splits each batch,
all processes read the same input, process 0 writes and tells the others where the output ends.
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NoReturn

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import

# isort: split

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import config_flags

from t5x_lite import config as configs, files, init_from, log
from t5x_lite.build import Program, build
from t5x_lite.config import RunConfig
from t5x_lite.data import readers, tasks as data_tasks, vocabulary as data_vocabulary
from t5x_lite.data.chat_prompts import ChatPrompts, is_chats
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.errors import UserError, nearest
from t5x_lite.evaluation.predictor import Predictor, Text
from t5x_lite.parallel import processes
from t5x_lite.training import state

FORMATS = ("jsonl", "json", "tsv", "text", "chats")
MODES = ("predict", "score")
_FINGERPRINT = 1 << 16   # bytes of the input's beginning that tell it from another
_SECONDS_BETWEEN_REPORTS = 10.0
_WINDOW = 8   # batches that are read at once


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to predict or score."""

    line: int                       # in the input, from 1
    text: str                       # the inputs, as they are written out
    inputs: Text                    # the same, or a task's tokens
    targets: tuple[str, ...] = ()
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)   # written out as well


# --- reading --------------------------------------------------------------------------------

def format_of(path: str, given: str) -> str:
    """The format by name, or by the file's ending. Raises UserError for an unknown one."""
    if given and given not in FORMATS:
        raise UserError(f"--format={given}: must be one of {', '.join(FORMATS)}."
                        f"{nearest(given, FORMATS)}")
    if not given and (path == "-" or _is_pipe(path)):
        raise UserError(f"--input={path} has no ending: it needs --format="
                        f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
    ending = pathlib.PurePath(path.removesuffix(".gz")).suffix.removeprefix(".")
    return given or (ending if ending in FORMATS else "text")


def _is_pipe(path: str) -> bool:
    return not files.is_url(path) and os.path.exists(path) and pathlib.Path(path).is_fifo()


def open_input(path: str) -> tuple[BinaryIO, str]:
    """(its bytes, what messages call it); "-" is standard input. Raises UserError for no file."""
    if path == "-":
        return sys.stdin.buffer, "standard input"
    if not files.exists(path):
        raise UserError(f"--input={path} does not exist.")
    if files.is_dir(path):
        raise UserError(f"--input={path} is a folder.")
    return readers.open_binary(path), path


def source_of(path: str, kind: str) -> str:
    """What the output's record calls the input: of a file also its size and beginning."""
    if path == "-" or not files.is_file(path):
        return f"{'standard input' if path == '-' else 'a pipe'} as {kind}"
    with files.open_binary(path) as content:
        digest = zlib.crc32(content.read(_FINGERPRINT))
    _, size, _ = files.state_of(path)
    return f"{path} as {kind}, {size:,} bytes, crc32 {digest:08x} at the beginning"


def _records(file: Iterable[bytes], kind: str, name: str, on_error: readers.OnError
             ) -> Iterator[tuple[int, str, str | Mapping]]:
    """(number from 1, what errors call it, line) of what may hold something, or of a .json list
    (…, object). Blank lines hold nothing, as in training, unless every line is an input."""
    if kind == "json":
        content = readers.json_value(readers.whole_of(file, name), name)
        for number, record in readers.objects_of(content, name):
            yield number, f"{name}, object {number}", record
        return
    for number, line in readers.lines_of(file, name, on_error):
        if line.strip() or kind == "text":
            yield number, f"{name}, line {number}", line


def parse(entry: str | Mapping, kind: str, where: str) -> tuple[str, tuple[str, ...]]:
    """(inputs, targets) of a line or an object. Raises UserError, `where` in front, for one that
    is malformed."""
    if kind == "jsonl":
        entry = readers.json_object(entry, where)
    if kind in ("json", "jsonl"):
        return _parse_object(entry, where)
    if not entry.strip():
        raise UserError(f"{where} is empty")
    if kind == "text":
        return entry, ()
    inputs, *targets = entry.split("\t")
    if not inputs.strip():
        raise UserError(f"{where} has no inputs before the tab")
    return inputs, tuple(targets)


def _parse_object(record: Mapping, where: str) -> tuple[str, tuple[str, ...]]:
    inputs = next((record[k] for k in (*readers.QUESTIONS, "text") if k in record), None)
    if not isinstance(inputs, str):
        raise UserError(f'{where} has no string "inputs", "question" or "text" '
                        f"(found {readers.shown(record)})")
    targets = readers.answers_of(record, where) or ()
    readers.check_text([inputs, *targets], where)
    return inputs, tuple(targets)


def _item(number: int, entry: str | Mapping, kind: str, where: str,
          chats: ChatPrompts | None) -> Item:
    """The item of a line or an object. Raises UserError, `where` in front, for a malformed one."""
    if kind == "chats":
        text, ids, targets = chats.prompt(readers.json_object(entry, where), where)
        return Item(number, text, ids, targets)
    inputs, targets = parse(entry, kind, where)
    return Item(number, inputs, inputs, targets)


def _check_targets(targets: Sequence[str], where: str) -> None:
    """Raises UserError where there is nothing to score, or an empty text among it."""
    if not any(target.strip() for target in targets):
        raise UserError(f"{where} has no targets to score")
    if not all(target.strip() for target in targets):
        raise UserError(f"{where} has an empty target to score")


def _skip(error: UserError) -> None:
    log.say(f"skipped: {error}")


def _refuse(error: UserError) -> NoReturn:
    raise UserError(f"{error}; --on_error=skip leaves such lines out") from error


def read_lines(file: Iterable[bytes], kind: str, *, on_error: str, needs_targets: bool,
               name: str = "input", chats: ChatPrompts | None = None) -> Iterator[Item]:
    """The items of a file; a malformed line is said and skipped, or raised with its number.

    Args:
        file: a binary file, a pipe, or lines as bytes.
        kind: one of FORMATS.
        on_error: skip or refuse. A compressed file that is cut off ends where it is cut.
        needs_targets: whether a line without targets is malformed.
        chats: what writes prompts; needed of the kind "chats" alone.
    """
    treat = {"skip": _skip, "refuse": _refuse}[on_error]
    for number, where, entry in _records(file, kind, name, treat):
        try:
            item = _item(number, entry, kind, where, chats)
            if needs_targets:
                _check_targets(item.targets, where)
        except UserError as error:
            treat(error)
            continue
        yield item


def read_task(config: RunConfig, name: str, split: str) -> Iterator[Item]:
    """The examples of a seqio task; its inputs are the tokens that evaluation sees."""
    task, examples = data_tasks.eval_examples(config.data, name, objective=config.objective.rows,
                                        split=split, field="--task")
    vocabulary = task.output_features["targets"].vocabulary

    def text(example, feature) -> str:
        kept = example.get(f"{feature}_pretokenized")
        if kept is None:
            return data_vocabulary.text_of(vocabulary, example.get(feature, ()))
        return kept.decode()

    for number, example in enumerate(examples, 1):
        answers = [a.decode() for a in example.get("answers", ())]
        about = {name: example[name].item() for name in ("question", "is_correct")
                 if isinstance(example.get(name), (np.generic, np.ndarray))}
        yield Item(number, text(example, "inputs"), example.get("inputs", ()),
                   tuple(answers) or (text(example, "targets"),), about)


# --- writing --------------------------------------------------------------------------------

class Output:
    """A JSONL file that is gone on with where it ends.

    In a bucket its lines appear every half a minute or more (files.Growing).

    belongs_to: what the lines are a function of; kept beside the file and compared.
    """

    def __init__(self, path: files.Path, belongs_to: dict[str, Any]):
        self._path = path
        self._file = self._folder = None
        self.last_line = self._agree(belongs_to)     # of the input, already written

    def _agree(self, belongs_to: dict[str, Any]) -> int:
        """Process 0 opens the file; the others hear where it ends and need not see it."""
        last, problem = -1, None
        if log.is_main():
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
        if path.exists() and not run.exists():
            raise UserError(f"--output={path} exists and is not an output of infer; name another "
                            "file or remove it")
        self._folder = files.Growing(path.parent, self._not_copied)
        file = self._folder.bring(path.name)
        if file.exists():
            if file.stat().st_size:   # else a run that was refused before its first line
                _check_same(path, _object_of(run.read_bytes()), belongs_to)
            last = _cut_off_damaged_lines(file)
        files.write_whole(run, json.dumps(belongs_to, indent=1, sort_keys=True) + "\n")
        self._file = open(file, "a")
        return last

    def _not_copied(self, error: BaseException) -> None:
        log.say(f"warning: --output={self._path} cannot be written now ("
                f"{files.explain(error, self._path)}); the lines are kept in {self._folder.folder}")

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends the rows; they are on disk when this returns (in a bucket, soon)."""
        if self._file is not None:
            self._file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._folder.close()


def _cut_off_damaged_lines(file: pathlib.Path) -> int:
    """The input line of the last whole line. A kill may have left a part of one behind it, a power
    loss NULs: these are made anew."""
    content = file.read_bytes()
    end, last = content.rfind(b"\n") + 1, 0
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        last = _object_of(content[start:end]).get("line")
        if type(last) is int:
            break
        log.say(f"warning: the end of {file} is damaged and is made anew")
        end, last = start, 0
    if end < len(content):
        os.truncate(file, end)
    return last


def _object_of(content: bytes) -> dict[str, Any]:
    """The object of JSON that the bytes are; {} where they are none."""
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _check_same(path: files.Path, before: dict, now: dict) -> None:
    now = json.loads(json.dumps(now))   # tuples become lists
    changed = [f"{k}: {before.get(k)!r} before, {now.get(k)!r} now"
               for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    if changed:
        raise UserError(f"--output={path} belongs to another run:\n  " + "\n  ".join(changed)
                        + "\nName another file, or remove it to start anew.")


# --- the run --------------------------------------------------------------------------------

def run(predictor: Predictor, params, items: Iterable[Item], output: Output, mode: str) -> int:
    """Predicts or scores what the output does not hold yet; returns how many lines it wrote.

    What stands before a malformed line is written before its UserError is raised.
    """
    fresh = itertools.dropwhile(lambda item: item.line <= output.last_line, items)
    began = shown = time.monotonic()
    count = 0
    results = _scored if mode == "score" else _predicted
    # Several batches at a time, so that rows of one width find one another.
    window = predictor.batch_size * (_WINDOW if len(predictor.widths) > 1 else 1)
    for batch in _batches(fresh, window):
        output.write([{"line": item.line, "inputs": item.text, **result,
                       "targets": list(item.targets), **item.about}
                      for item, result in zip(batch, results(predictor, params, batch), strict=True)])
        count += len(batch)
        if time.monotonic() - shown > _SECONDS_BETWEEN_REPORTS:
            shown = time.monotonic()
            log.say(f"line {batch[-1].line:,}: {count / (shown - began):.3g} lines/s")
    seconds = time.monotonic() - began
    before = f", behind {output.last_line:,} of before" if output.last_line else ""
    log.say(f"{count:,} lines in {seconds:.1f} s{before}")
    predictor.say_misfits()
    return count


def _predicted(predictor: Predictor, params, batch: Sequence[Item]) -> list[dict[str, Any]]:
    """{"predictions", "scores"} of each item."""
    predictions = predictor.predict(params, [item.inputs for item in batch],
                                    [item.line for item in batch])
    return [{"predictions": list(p.texts), "scores": _written(p.scores)} for p in predictions]


def _scored(predictor: Predictor, params, batch: Sequence[Item]) -> list[dict[str, Any]]:
    """{"scores": of each target} of each item."""
    inputs, targets, lines = [], [], []
    for item in batch:
        inputs += [item.inputs] * len(item.targets)
        targets += item.targets
        lines += [item.line] * len(item.targets)
    scores = iter(predictor.score(params, inputs, targets, row_ids=lines))
    return [{"scores": _written(itertools.islice(scores, len(item.targets)))} for item in batch]


def _written(scores: Iterable[float]) -> list[float | None]:
    """Scores as JSON has them: null for what is no finite number (say_rows tells of it)."""
    return [score if math.isfinite(score) else None for score in scores]


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    batch = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except UserError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _what_decides(config: RunConfig) -> dict[str, Any]:
    """The fields of the config that the lines are a function of, besides the parameters."""
    fields = ("data.inputs_length", "data.targets_length", "data.vocabulary", "data.train",
              "data.task_modules", "data.shots", "data.shots_seed", "objective.name", "precision")
    values = {name: functools.reduce(getattr, name.split("."), config) for name in fields}
    values |= {"eval.ema": config.eval.ema} if config.train.ema_decay else {}
    model = configs.to_json(config.model) + configs.to_json(config.peft)
    return {**values, "model and peft": f"crc32 {zlib.crc32(model.encode()):08x}"}


def infer(config: RunConfig, workdir: files.Path | None, step: str, decode: DecodeConfig,
          items: Iterable[Item], output: files.Path, *, mode: str, source: str) -> int:
    """Restores the parameters (without a workdir: of init_from) and runs.

    source: what the items are read from, for the record.

    Raises:
        UserError: what the items raise, an output of something else, or processes that were
            started differently.
    """
    processes.check_agree({   # the output is process 0's alone
        "--workdir": str(workdir), "--step": step, "--mode": mode,
        "--input": source, "config": json.loads(configs.to_json(config)),
        "--decode": json.loads(configs.to_json(decode))})
    program = build(config)
    vocabulary = data_tasks.vocabulary_of(config.data)
    data_vocabulary.check_vocabulary(vocabulary, config.model.vocab_size, sentinels=False)
    with program.activate():
        params, step = init_from.restore(program, workdir,
                                         int(step) if step.isdigit() else step)
        predictor = Predictor(program, vocabulary, decode)
        params = _gathered(program, params)
        file = Output(output, {"workdir": str(workdir or config.init_from), "step": step,
                               "mode": mode, "source": source, **_what_decides(config),
                               "decode": dataclasses.asdict(decode)})
        count = run(predictor, params, items, file, mode)
    file.close()
    return count


def _gathered(program: Program, params: dict) -> dict:
    """The parameters as decoding wants them; says what that costs."""
    ways = program.mesh.shape["fsdp"]
    if ways == 1 or not program.config.eval.gather_params:
        return params
    before = state.num_bytes_per_device(params)
    params = program.gathered(params)
    log.say(f"parameters gathered over mesh.fsdp={ways} once: "
               f"{log.si(state.num_bytes_per_device(params), 'B')} a device, before "
               f"{log.si(before, 'B')} (eval.gather_params=false leaves them split)")
    return params


def _items(config: RunConfig, values: Any, decode: DecodeConfig
           ) -> tuple[Iterator[Item], str, DecodeConfig]:
    """What the flags say to read, its name, and how it is decoded: an answer in a conversation ends
    with its turn."""
    for name, allowed in (("mode", MODES), ("on_error", ("refuse", "skip"))):
        if getattr(values, name) not in allowed:
            raise UserError(f"--{name}={getattr(values, name)}: must be {' or '.join(allowed)}.")
    if bool(values.input) == bool(values.task):
        raise UserError("give either --input=FILE or --task=NAME.")
    if values.task:
        return read_task(config, values.task, values.split), f"{values.task}/{values.split}", decode
    kind = format_of(values.input, values.format)
    lines, name = open_input(values.input)
    if jax.process_count() > 1 and not files.is_file(values.input):
        raise UserError(f"--input={values.input}: {jax.process_count()} processes cannot share one "
                        f"{'pipe' if name == values.input else name}; write it to a file that all "
                        "of them see.")
    chats = None
    if kind == "chats" or kind == "jsonl" and is_chats(values.input):
        kind, chats = "chats", ChatPrompts(config.data)
        decode = chats.ending(decode)
    log.say(f"reading {name} as {kind}")
    return read_lines(lines, kind, on_error=values.on_error, name=name, chats=chats,
                      needs_targets=values.mode == "score"), source_of(values.input, kind), decode


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The folder of the run whose model predicts.")
    flags.DEFINE_string("step", "last", "last, best or the number of a step.")
    flags.DEFINE_string("input", "", "A .jsonl, .json, .tsv or text file; - for standard input.")
    flags.DEFINE_string("format", "", f"One of {', '.join(FORMATS)}; default: by the file.")
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
        config, workdir = cli.saved_or_given(values.workdir, given_config)
        given = config_flags.get_override_values(values["decode"])
        decode = dataclasses.replace(config.eval.decode, **given)
        items, source, decode = _items(config, values, decode)
        infer(config, workdir, values.step, decode, items, files.path(values.output),
              mode=values.mode, source=source)

    cli.run(main)
