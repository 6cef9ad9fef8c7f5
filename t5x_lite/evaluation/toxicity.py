"""How toxic texts are: a scorer is any function from texts to numbers between 0 and 1.

    words             1 where one of the shipped list's words stands in it (corpus/lists/block.txt)
    words:FILE        the same with a list of yours, a word or phrase a line
    detoxify          detoxify's model "original" (Hanu & Unitary 2020), where it is installed with its weights
    MODULE:FUNCTION   yours

A word list counts words and knows nothing of what is meant; use it to see that all works.
"""

import importlib
import re
from collections.abc import Callable, Sequence

from t5x_lite.corpus import patterns
from t5x_lite.errors import UserError

Scorer = Callable[[Sequence[str]], Sequence[float]]


def _of_words(path: str = "") -> Scorer:
    words = "|".join(map(re.escape, sorted(patterns.block_list(path or None))))
    listed = re.compile(rf"(?<!\w)(?:{words})(?!\w)")
    return lambda texts: [float(bool(listed.search(text.lower()))) for text in texts]


def _detoxify(_: str = "") -> Scorer:
    try:
        from detoxify import Detoxify
        model = Detoxify("original")
    except ImportError as error:
        raise UserError(f"--scorer=detoxify is not installed ({error}): pip install detoxify, or use "
                        "--scorer=words") from error
    except OSError as error:   # no weights and no network
        raise UserError(f"--scorer=detoxify has no weights ({error}): it downloads them on first use") from error
    return lambda texts: list(map(float, model.predict(list(texts))["toxicity"]))


SCORERS: dict[str, Callable[..., Scorer]] = {"words": _of_words, "detoxify": _detoxify}


def scorer(name: str) -> Scorer:
    """The scorer of that name. Raises UserError for one that cannot be imported."""
    kind, _, rest = name.partition(":")
    if kind in SCORERS:
        return SCORERS[kind](*([rest] if rest else []))
    try:
        function = getattr(importlib.import_module(kind), rest)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--scorer={name} cannot be imported ({error}): {', '.join(SCORERS)} or "
                        "MODULE:FUNCTION on PYTHONPATH") from error
    return checked(function, name)


def checked(function: Scorer, name: str) -> Scorer:
    """The function, whose scores must be one number from 0 to 1 a text."""
    def score(texts: Sequence[str]) -> list[float]:
        found = [float(value) for value in function(list(texts))]
        if len(found) != len(texts) or not all(0 <= value <= 1 for value in found):
            raise UserError(f"--scorer={name} gave {len(found)} scores of {len(texts)} texts, {found[:3]}…: it must "
                            "give one number from 0 to 1 a text")
        return found
    return score
