"""What a run says of the data that it reads: shares, epochs, and what of them is cut."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from t5x_lite.data import rows as data_rows, tasks as data_tasks
from t5x_lite.data.config import DataConfig

if TYPE_CHECKING:
    import seqio

_MEASURED = 200   # records of a task whose lengths are looked at when a run starts


def describe_training(config: DataConfig, objective: str, num_rows: int) -> list[str]:
    """A line a task, of at most twenty: its share; of a text-to-text task also how often `num_rows`
    rows see its examples (with packing, at least so often) and, where of the first 200 inputs or
    targets are cut or empty, another that counts them. Nothing else is read. Of a published
    mixture also a table: how often so many tokens would see the paper's own corpora. A line of each
    task of data.unlabelled follows.
    """
    mixture = data_tasks.train_mixture(config, objective)
    lines = []
    for task, share in mixture[:20]:
        lines.append(f"{task.name} {share:.1%}")
        counts = list(_cut(task, config, objective))
        if counts:   # of others, such as span corruption, a row is no example
            count = task.num_input_examples("train")
            if count:
                lines[-1] += f", {num_rows * share / count:.3g} epochs of {count:,} examples"
            lines += filter(None, counts)
    more = len(mixture) - 20
    lines += [f"… {more} more tasks"] if more > 0 else []
    if published := data_tasks.published_mixture(config):
        from t5x_lite.data import published_mixtures
        tokens = num_rows * sum(data_rows.of(objective).lengths(config).values())
        lines += [f"epochs that {tokens:.3g} tokens are of the corpora of {published[0]}:",
                  *published_mixtures.epochs(published[0], tokens, published[1]).splitlines()]
    return [*lines, *(_unlabelled(config, objective, num_rows) if config.unlabelled else ())]


def _unlabelled(config: DataConfig, objective: str, num_rows: int) -> Iterator[str]:
    """A line a task of data.unlabelled, of at most twenty: its share, and how often so many labelled rows
    see its texts."""
    mixture, _, _ = data_tasks.unlabelled(config, objective)
    num_rows *= config.unlabelled_ratio
    for task, share in mixture[:20]:
        count = task.num_input_examples("train")
        epochs = f", {num_rows * share / count:.3g} epochs of {count:,} texts" if count else ""
        yield f"{task.name} {share:.1%}{epochs}, seen as {config.views}"


def _cut(task: "seqio.Task", config: DataConfig, objective: str) -> Iterator[str]:
    """A line a feature, "" where nothing is cut or empty; none unless the task is text-to-text."""
    pipeline = data_tasks.tensorflow_side()
    limits = data_rows.of(objective).task_lengths(
        task, config.inputs_length, config.targets_length)
    given = pipeline.first_examples(task, "train", limits, _MEASURED)
    if "targets_pretokenized" not in given.element_spec:
        return   # it fills whatever lengths it is given, and may refuse longer ones
    uncut = dict.fromkeys(limits, pipeline.UNCUT)
    examples = list(pipeline.first_examples(task, "train", uncut, _MEASURED).as_numpy_iterator())
    for name in sorted(limits.keys() & task.output_features.keys()):
        sizes = [len(example[name]) for example in examples]
        rooms = [_room(name, example, limits) for example in examples]
        yield _misfits(name, sizes, rooms)


def _room(name: str, example: dict, limits: dict[str, int]) -> int:
    """Tokens that a feature of an example may have; targets have what inputs leave of a row."""
    if name == "targets" and "row" in limits:
        return limits["row"] - min(len(example["inputs"]), limits["inputs"])
    return limits[name]


def _misfits(name: str, sizes: Sequence[int], rooms: Sequence[int]) -> str:
    """What to say of a feature's lengths, "" where all fit and no target is EOS alone."""
    cut = sum(size > room for size, room in zip(sizes, rooms, strict=True))
    empty = sum(size <= 1 for size in sizes) if name == "targets" else 0
    counts = [f"{cut} are longer than {min(rooms)} tokens and cut"] if cut else []
    counts += [f"{empty} are empty"] if empty else []
    return f"  of the first {len(sizes)} {name}, {' and '.join(counts)}" if counts else ""
