"""Show what a task makes: `python -m t5x_lite.inspect_task NAME --split=validation`.

Prints the task's splits and metric functions, the features of a batch, the first rows with
tokens and text side by side, and over the first examples how long inputs and targets are, how
many do not fit, and how many targets are empty.

    --objective=seq2seq --inputs_length=512 --rows=2 --examples=200 --vocabulary=NAME
    --targets_length=512       by default as long as the inputs, for a decoder-only model, whose
                               row they share, twice as long
    --task_modules=my.module --packing --shots=4 --shots_seed=0
    --list                     instead of NAME: the names of all tasks and mixtures
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import

# isort: split

import jax
import numpy as np
from absl import flags

from t5x_lite.data import (
    batches as data_batches,
    rows as data_rows,
    tasks as data_tasks,
    vocabulary as data_vocabulary,
)
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError, one_of
from t5x_lite.training import objectives

_IDS_A_LINE = 8
_FLAGS = {"objective.name": "--objective", "data.validation": "--task"}   # other fields keep names


def _used(batch: Mapping, side: str, row: int) -> int:
    """The positions of a row that stand before its padding."""
    names = (f"{side}_segment_ids", f"{side}_mask", "decoder_loss_weights")
    marks = np.asarray(batch[next(n for n in names if n in batch)][row])
    return int(np.flatnonzero(marks).max(initial=-1)) + 1


def side_by_side(ids: Sequence[int], used: int, vocabulary) -> Iterator[str]:
    """Lines of token ids with the text they stand for; padding, behind `used`, is only counted."""
    ids = [int(i) for i in ids]
    for start in range(0, used, _IDS_A_LINE):
        part = ids[start:min(start + _IDS_A_LINE, used)]
        shown = " ".join(f"{i:>5}" for i in part)
        text = data_vocabulary.text_of(vocabulary, part)
        yield f"    {start:>5}  {shown:<{6 * _IDS_A_LINE}} {text!r}"
    if used < len(ids):
        yield f"    {used:>5}  {len(ids) - used} x padding"


def _spans(is_learned: np.ndarray) -> str:
    """": 3-5, 9-12", the places of targets that are learned, where others stand between them."""
    steps = np.diff(np.pad(is_learned.astype(np.int8), 1))
    firsts, lasts = np.flatnonzero(steps > 0), np.flatnonzero(steps < 0) - 1
    if len(firsts) < 2:
        return ""
    return ": " + ", ".join(f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


def describe(config: DataConfig, name: str, split: str, objective: str, rows: int,
             examples: int) -> str:
    """The whole report. Raises UserError for an unknown task, split or objective."""
    one_of("objective.name", objective, objectives.OBJECTIVES)
    kind = objectives.ObjectiveConfig(objective).given
    task, _ = data_tasks.eval_examples(config, name, objective=kind, split=split)
    features = task.output_features
    vocabulary = features["targets"].vocabulary
    lines = [f"task {task.name}",
             f"  splits      {', '.join(sorted(task.splits))}",
             f"  examples    {task.num_input_examples(split)} in {split}, before preprocessing",
             f"  vocabulary  {type(vocabulary).__name__}, {vocabulary.vocab_size} ids",
             f"  metrics     {', '.join(f.__name__ for f in task.metric_fns) or 'none'}"]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batch = next(data_batches.eval_batches(config, name, objective=kind, batch_size=rows,
                                   sharding=sharding, split=split, max_batches=1))
    lines.append(f"batch of {rows} rows, objective {objective}"
                 + (", packed" if config.packing else ""))
    lines += [f"  {n:<22} {x.dtype} {list(x.shape)}" for n, x in batch.items()]
    for row in range(rows):
        lines.append(f"row {row}")
        for feature in ("encoder_input_tokens", "prompt_tokens", "decoder_target_tokens"):
            if feature in batch:
                lines.append(f"  {feature}")
                used = _used(batch, feature.split("_")[0], row)
                lines += side_by_side(np.asarray(batch[feature][row]), used, vocabulary)
        if "decoder_loss_weights" not in batch:   # the model is to answer
            continue
        weights = np.asarray(batch["decoder_loss_weights"][row])
        first = int(np.argmax(weights > 0))
        lines.append(f"  loss on {int((weights > 0).sum())} of {len(weights)} targets, the first "
                     f"at {first}{_spans(weights > 0)}")
    return "\n".join([*lines, *_lengths(config, name, split, kind, examples)])


def _lengths(config: DataConfig, name: str, split: str, kind: str, examples: int
             ) -> Iterator[str]:
    """How long inputs and targets are before they are cut."""
    task, read = data_tasks.eval_examples(config, name, objective=kind, split=split)
    shown = list(itertools.islice(read, examples))
    if not shown or "targets_pretokenized" not in shown[0]:
        return   # no text-to-text task: it fills whatever lengths it is given
    rows = data_rows.of(kind)
    if rows.compares:
        yield from _lengths_of_answers(
            shown, rows.task_lengths(task, config.inputs_length, config.targets_length))
        return
    shares = rows.shares_row and "inputs" in shown[0]
    limits = rows.task_lengths(task, config.inputs_length, config.targets_length)
    # Conversations have all of their row (data/rows.py).
    whole = shares and limits["inputs"] == limits["row"]
    held = {"inputs": "targets_length" if whole else "inputs_length", "targets": "targets_length"}
    rooms = {"inputs": [getattr(config, held["inputs"])] * len(shown),
             "targets": [config.targets_length - shares * min(
                 len(e.get("inputs", ())), limits.get("inputs", 0)) for e in shown]}
    yield f"lengths of the first {len(shown)} examples, in tokens"
    read = rows.task_lengths(task, config.inputs_length, config.targets_length)
    for feature in sorted(rooms.keys() & shown[0].keys() & read.keys()):
        sizes = [len(example[feature]) for example in shown]
        cut = sum(size > room for size, room in zip(sizes, rooms[feature], strict=True))
        line = f"  {feature:<8} mean {np.mean(sizes):.1f}, longest {max(sizes)}; {cut} of "
        line += f"{len(sizes)} longer than "
        line += "what inputs leave of " if shares and feature == "targets" else ""
        line += f"{held[feature]}={getattr(config, held[feature])} and cut"
        empty = sum(n <= 1 for n in sizes)
        yield line + (f"; {empty} empty" if empty else "")


def _lengths_of_answers(shown: Sequence[Mapping], rooms: Mapping[str, int]) -> Iterator[str]:
    """How long questions, chosen and rejected answers are before they are cut."""
    for feature in ("inputs", "targets", "rejected"):
        sizes, room = [len(example[feature]) for example in shown], rooms[feature]
        yield (f"{feature} of the first {len(shown)} examples: mean {np.mean(sizes):.1f}, longest "
               f"{max(sizes)}; {sum(n > room for n in sizes)} longer than {room} tokens and cut")


def in_flags(message: str) -> str:
    """An error of the config in this command's flags: data.targets_length is --targets_length."""
    for field, flag in _FLAGS.items():
        message = message.replace(field, flag)
    return re.sub(r"\bdata\.(inputs_length|targets_length|vocabulary|task_modules|packing|shots|"
                  r"shots_seed)\b", r"--\1", message)


def default_targets_length(objective: str, inputs_length: int) -> int:
    """Tokens that hold the targets of any task with inputs of that length."""
    one_of("objective.name", objective, objectives.OBJECTIVES)
    kind = data_rows.of(objectives.OBJECTIVES[objective].rows)
    return (2 if kind.shares_row else 1) * inputs_length


if __name__ == "__main__":
    flags.DEFINE_string("task", "", "The task; may stand without --task=.")
    flags.DEFINE_string("split", "validation", "The split to read.")
    flags.DEFINE_string("objective", "seq2seq", ", ".join(objectives.OBJECTIVES) + ".")
    flags.DEFINE_integer("inputs_length", 512, "Tokens of the inputs.")
    flags.DEFINE_integer("targets_length", None, "Tokens of the targets; of a decoder-only "
                         "model's row.")
    flags.DEFINE_bool("list", False, "Print the names of all tasks and mixtures.")
    flags.DEFINE_integer("rows", 2, "Rows to show.")
    flags.DEFINE_integer("examples", 200, "Examples to measure.")
    flags.DEFINE_string("vocabulary", "", "Instead of the task's own.")
    flags.DEFINE_string("task_modules", "", "Your modules that register tasks.")
    flags.DEFINE_integer("shots", 0, "Solved examples before every input.")
    flags.DEFINE_integer("shots_seed", 0, "Which ones.")
    flags.DEFINE_bool("packing", False, "Several examples in a row.")

    def main() -> None:
        values = flags.FLAGS
        if values.list:
            print("\n".join(data_tasks.task_names(DataConfig(task_modules=values.task_modules))))
            return
        if not values.task:
            raise UserError("which task? python -m t5x_lite.inspect_task NAME; --list prints all.")
        targets_length = values.targets_length
        if targets_length is None:
            targets_length = default_targets_length(values.objective, values.inputs_length)
        config = DataConfig(
            validation=values.task, vocabulary=values.vocabulary, packing=values.packing,
            inputs_length=values.inputs_length, targets_length=targets_length,
            task_modules=values.task_modules, shots=values.shots, shots_seed=values.shots_seed)
        try:
            print(describe(config, values.task, values.split, values.objective, values.rows,
                           values.examples))
        except UserError as error:
            raise UserError(in_flags(str(error))) from error

    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--task={sys.argv[1]}"
    cli.run(main)
