"""k-shot prompts: solved examples before every input, of a task's own, by a fixed seed.

    with_shots(task, Shots(4))      data.shots=4; prompts.few_shot registers such a task by name

Demonstrations are drawn once, so that every run and step sees the same prompt (Brown et al. 2020,
arXiv:2005.14165), from the first 1,000 questions of "train". Where a task has no such split, they
are drawn from the split that is read. Whenever the split that is read holds the same data, the
questions drawn are left out of it, by their places. A multiple-choice question is shown with its
right choice alone.

A prompt that is longer than the inputs may be loses whole demonstrations from its front until the
question fits, and how often that was is logged, once a task and split.
"""

import functools
import logging
import random
from typing import NamedTuple

import seqio
import tensorflow as tf

from t5x_lite.data import tokenized
from t5x_lite.data.document_cache import DocumentSource
from t5x_lite.errors import UserError

POOL = 1_000       # questions that demonstrations are drawn from
_COUNTED = 10_000  # prompts that are looked at to say how many lose demonstrations

_plain = tf.autograph.experimental.do_not_convert
_log = logging.getLogger(f"t5x_lite.{__name__}")   # shown by commands, as its own lines are


class Shots(NamedTuple):
    """What stands before an input.

    count: demonstrations. seed: which. split: where they come from; "": see the module's head.
    between, before_answer: INPUTS before_answer TARGETS between … INPUTS before_answer.
    """
    count: int
    seed: int = 0
    split: str = ""
    between: str = "\n\n"
    before_answer: str = "\n"


class Solved(NamedTuple):
    """A demonstration: its place in its split, and its texts."""
    place: int
    inputs: str
    targets: str


def with_shots(task: seqio.Task, shots: Shots) -> seqio.Task:
    """The task NAME_4shot; its prompts are fitted to a length by `fitted`.

    Raises UserError where the task has no texts to be shown (that is found on first use, if its
    steps have to be asked), no such split, or too few examples.
    """
    if shots.count < 0:
        raise UserError(f"{shots.count} demonstrations for {task.name!r}: 0 or more (data.shots)")
    place = tokenized.tokenising_step(task)
    if place is None or "inputs" not in task.output_features:
        raise UserError(_no_texts(task, "no text, or tokens only"))
    if shots.split and shots.split not in task.splits:
        raise UserError(f"demonstrations from {shots.split!r}: {task.name!r} has the splits "
                        f"{', '.join(sorted(task.splits))}")
    return task.replace(name=f"{task.name}_{shots.count}shot",
                        source=PromptedSource(task, place, shots),
                        preprocessors=task.preprocessors[place:])


def fitted(task: seqio.Task, inputs_length: int) -> seqio.Task:
    """The task with its prompts of at most so many tokens of its vocabulary, EOS included; as it
    is, where it has no demonstrations."""
    if not isinstance(task.source, PromptedSource):
        return task
    feature = task.output_features["inputs"]
    return task.replace(source=task.source.fitted(feature.vocabulary,
                                                  inputs_length - feature.add_eos))


class PromptedSource(seqio.DataSource):
    """The texts {"inputs", "targets", …} that a task makes, each input behind demonstrations.

    They are read in the order of the task's source, also where they are to be shuffled.
    room: tokens of a prompt, 0: any.
    """

    def __init__(self, task: seqio.Task, place: int, shots: Shots,
                 vocabulary: seqio.Vocabulary | None = None, room: int = 0):
        self._task, self._place, self._shots = task, place, shots
        self._vocabulary, self._room = vocabulary, room
        super().__init__(splits=tuple(task.splits))

    def fitted(self, vocabulary: seqio.Vocabulary, room: int) -> "PromptedSource":
        """A source of the same examples whose prompts have at most `room` tokens."""
        return PromptedSource(self._task, self._place, self._shots, vocabulary, room)

    @property
    def identity(self) -> str:
        """Differs where the prompts do (tokenized.py)."""
        return repr((*self._shots, self._room))

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> list[str]:
        return self._task.source.list_shards(split)

    def num_input_examples(self, split: str) -> int | None:
        count = self._task.source.num_input_examples(split)
        held_out = self._shots.count if self._is_read_from(split) else 0
        return None if count is None else count - held_out

    def get_dataset(self, split: str = "validation", shuffle: bool = False, seed: int | None = None,
                    shard_info: seqio.ShardInfo | None = None, **unused) -> tf.data.Dataset:
        """The prompted examples of the split, those at index, index + num_shards, … of it."""
        dataset = _numbered(texts(self._task, self._place, split))
        solved = self.demonstrations(split)
        if self._is_read_from(split):
            places = tf.constant([s.place for s in solved], tf.int64)
            dataset = dataset.filter(_plain(lambda place, _: tf.reduce_all(place != places)))
        dataset = dataset.map(_plain(lambda _, example: example))
        if solved:
            dataset = self._prompted(dataset, solved, split)
        if shard_info and shard_info.num_shards > 1:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        return dataset

    def demonstrations(self, split: str) -> tuple[Solved, ...]:
        """What stands before the inputs of a split, in order."""
        shots, origin = self._shots, self._origin(split)
        if not shots.count:
            return ()
        left = 1 if self._is_read_from(split) else 0   # something must be left to ask
        files = tuple(map(str, self._task.source.list_shards(origin)))
        questions = _questions(self._task, self._place, origin, files)
        if len(questions) < shots.count + left:
            raise UserError(f"{self._task.name!r} has {len(questions)} questions in {origin!r}, "
                            f"too few for {shots.count} demonstrations" + " and one to ask" * left)
        return tuple(random.Random(shots.seed).sample(questions, shots.count))

    def _origin(self, split: str) -> str:
        return self._shots.split or ("train" if "train" in self._task.splits else split)

    def _is_read_from(self, split: str) -> bool:
        """Whether the split's own questions are demonstrated."""
        source, origin = self._task.source, self._origin(split)
        return bool(self._shots.count) and (split == origin or isinstance(source, DocumentSource)
                                            and source.digest(split) == source.digest(origin))

    def _prompted(self, dataset: tf.data.Dataset, solved: tuple[Solved, ...], split: str
                  ) -> tf.data.Dataset:
        shots = self._shots
        parts = [f"{s.inputs}{shots.before_answer}{s.targets}{shots.between}" for s in solved]
        # fronts[n]: the last n demonstrations
        fronts = tf.constant(["".join(parts[len(parts) - n:]) for n in range(len(parts) + 1)])

        def prompt(number, example):
            return tf.strings.join([fronts[number], example["inputs"], shots.before_answer])

        def is_long(number, example):
            return tf.size(self._vocabulary.encode_tf(prompt(number, example))) > self._room

        def number_of(example):
            if not self._room:
                return tf.constant(len(parts))
            [number] = tf.while_loop(
                _plain(lambda n: tf.logical_and(n > 0, is_long(n, example))),
                _plain(lambda n: (n - 1,)), (tf.constant(len(parts)),))
            return number

        if self._room:
            self._say(split, dataset.map(_plain(lambda e: (number_of(e), is_long(0, e))),
                                         num_parallel_calls=tf.data.AUTOTUNE))
        return dataset.map(_plain(lambda e: {**e, "inputs": prompt(number_of(e), e)}),
                           num_parallel_calls=tf.data.AUTOTUNE)

    def _say(self, split: str, numbers: tf.data.Dataset) -> None:
        """Logs how many prompts lose demonstrations, once a task, split and length."""
        vocabulary = f"{type(self._vocabulary).__name__} {self._vocabulary.vocab_size}"
        key = self._task.name, split, self.identity, vocabulary
        if key in _SAID:
            return
        _SAID.add(key)
        count = lost = long = 0
        for kept, is_long in numbers.take(_COUNTED).batch(512).as_numpy_iterator():
            count += len(kept)
            lost += int((kept < self._shots.count).sum())
            long += int(is_long.sum())
        held = " (left out of it)" * self._is_read_from(split)
        _log.info("%s, %s: %d demonstrations from %r%s before every input", self._task.name, split,
                  self._shots.count, self._origin(split), held)
        if lost:
            more = f"; {long} are too long without any and are cut at their end" if long else ""
            _log.warning("%s, %s: %d of %s%d prompts lose demonstrations to fit into the %d tokens "
                         "that data.inputs_length leaves%s", self._task.name, split, lost,
                         "the first " * (count == _COUNTED), count, self._room, more)


_SAID: set[tuple] = set()


def texts(task: seqio.Task, place: int, split: str) -> tf.data.Dataset:
    """What the steps before `place` make of a split, in order; UserError where it is no texts."""
    before = task.replace(preprocessors=[*task.preprocessors[:place],
                                         seqio.CacheDatasetPlaceholder()])
    dataset = before.preprocess_precache(
        task.source.get_dataset(split=split, shuffle=False), seed=0)
    spec = dataset.element_spec
    dtypes = [getattr(spec.get(name), "dtype", None) for name in ("inputs", "targets")]
    if dtypes != [tf.string, tf.string]:
        raise UserError(_no_texts(task, f"{', '.join(spec)} before its tokens"))
    return dataset


def _no_texts(task: seqio.Task, what: str) -> str:
    return (f"{task.name!r} gives {what}: demonstrations are made of tasks with the texts inputs "
            "and targets, such as text_to_text.py registers; set data.shots=0, or take "
            "another task")


def _numbered(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """(place of the question, example): the choices of a question share its place."""
    if "is_correct" in dataset.element_spec:
        return dataset.map(_plain(lambda e: (tf.cast(e["question"], tf.int64), e)))
    return dataset.enumerate()


@functools.lru_cache(maxsize=32)
def _questions(task: seqio.Task, place: int, split: str, files: tuple[str, ...]
               ) -> tuple[Solved, ...]:
    """The first questions of a split with their (first) right answers; files: the split's, whose
    names change with what they hold."""
    dataset = _numbered(texts(task, place, split))
    if "is_correct" in dataset.element_spec[1]:
        dataset = dataset.filter(_plain(lambda _, e: e["is_correct"]))
    first = lambda answers: tf.reshape(answers, [-1])[0]
    dataset = dataset.map(_plain(lambda i, e: (i, e["inputs"], first(e["targets"]))))
    solved: dict[int, Solved] = {}
    for number, inputs, targets in dataset.as_numpy_iterator():
        if len(solved) == POOL:
            break
        solved.setdefault(int(number), Solved(int(number), inputs.decode(), targets.decode()))
    return tuple(solved.values())
