"""How well hidden spans are filled in: the metric, and what counting would reach.

Inputs and targets are texts with sentinels, as seqio's vocabularies write them:

    inputs   The capital of <extra_id_0> is <extra_id_1>.
    targets  <extra_id_0> Norway <extra_id_1> Oslo

Imports seqio inside functions only, as tasks.py.
"""

import collections
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

from t5x_lite.data import vocabulary as data_vocabulary

_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_TRAIN_ROWS = 5000                            # that the frequencies are counted on
_LENGTHS = {"inputs": 64, "targets": 64}      # of those rows
Neighbours = tuple[str, str]                  # the word before a span and the word behind it


def fillings(text: str) -> dict[str, str]:
    """{number of a sentinel: what follows it}, the first where one comes twice."""
    parts = _SENTINEL.split(text)
    found: dict[str, str] = {}
    for number, filling in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(number, " ".join(filling.split()))
    return found


def neighbours(inputs: str) -> dict[str, Neighbours]:
    """{number of a sentinel: the words beside it}; "" at an edge, a sentinel counts as a word."""
    words = _SENTINEL.sub(r" \g<0> ", inputs).split()
    padded = ["", *words, ""]
    return {match.group(1): (before, behind)
            for before, word, behind in zip(padded, words, padded[2:], strict=False)
            if (match := _SENTINEL.fullmatch(word))}


def hidden(inputs: str) -> bool:
    """Whether spans are hidden in a text."""
    return bool(_SENTINEL.search(inputs))


def read(inputs: str, filled: str, truth: str) -> str:
    """The inputs with each span as [what it was filled with], or [wrong, not: truth]."""
    given, right = fillings(filled), fillings(truth)

    def shown(match: re.Match) -> str:
        mine, true = given.get(match.group(1), ""), right.get(match.group(1), "")
        return f" [{mine}]" if mine == true else f" [{mine or '…'}, not: {true}]"

    return re.sub(r"\] ([.,;:!?])", r"]\1", " ".join(_SENTINEL.sub(shown, inputs).split()))


def texts(text: str, example: Mapping, is_target: bool = False):
    """The postprocessor: (inputs, targets) of a target, a prediction as it is."""
    return (str(example["inputs_pretokenized"]), text) if is_target else text


class Filled:
    """The metric function of a task of hidden words: (targets, predictions) -> per cent of the spans.

        spans_exact                 filled with the very words
        spans_of_words              filled with anything that has a letter or a digit
        spans_most_frequent         right if all were filled with the training text's commonest filling
        spans_between_same_words    … with the commonest one between the same two words
    """

    def __init__(self, task: str):
        """task: the seqio task whose training split is counted."""
        self.__name__, self._task = "spans_filled", task

    def __call__(self, targets: Sequence[tuple[str, str]], predictions: Sequence[str]
                 ) -> dict[str, float]:
        commonest, by_neighbours = _counted(self._task)
        hits: collections.Counter = collections.Counter()
        for (inputs, target), prediction in zip(targets, predictions, strict=True):
            given, right = fillings(prediction), fillings(target)
            for number, beside in neighbours(inputs).items():
                mine, truth = given.get(number, ""), right.get(number, "")
                counted = by_neighbours.get(beside, commonest)
                hits.update(spans=1, exact=mine == truth, of_words=any(map(str.isalnum, mine)),
                            most_frequent=commonest == truth, between_same_words=counted == truth)
        names = ("exact", "of_words", "most_frequent", "between_same_words")
        return {f"spans_{name}": 100 * hits[name] / max(1, hits["spans"]) for name in names}


@functools.cache
def _counted(task: str) -> tuple[str, dict[Neighbours, str]]:
    """The commonest filling of a task's training rows, and that between each two words."""
    import seqio
    found = seqio.get_mixture_or_task(task)
    vocabulary = found.output_features["targets"].vocabulary
    rows = found.get_dataset(_LENGTHS, "train", shuffle=False, seed=0).take(_TRAIN_ROWS)
    return count((data_vocabulary.text_of(vocabulary, row["inputs"]),
                  data_vocabulary.text_of(vocabulary, row["targets"])) for row in
                 rows.as_numpy_iterator())


def count(rows: Iterable[tuple[str, str]]) -> tuple[str, dict[Neighbours, str]]:
    """(the most frequent filling, {its neighbours: the most frequent filling there}) of rows of
    (inputs, targets) texts."""
    overall: collections.Counter = collections.Counter()
    beside: dict[Neighbours, collections.Counter] = collections.defaultdict(collections.Counter)
    for inputs, targets in rows:
        right = fillings(targets)
        for number, place in neighbours(inputs).items():
            overall[right.get(number, "")] += 1
            beside[place][right.get(number, "")] += 1
    most = overall.most_common(1)[0][0] if overall else ""
    return most, {key: counter.most_common(1)[0][0] for key, counter in beside.items()}
