"""Which section of the World Factbook a sentence or list stands in: text classification with few labels.

    factbook_sections            texts of 169 countries, their sections as labels
    factbook_sections_dev        the same, with the countries of "dev" in the place of "validation"
    factbook_sections_20_N       20 of them, five a section, drawn with seed N = 0 … 4
    factbook_span_corruption     all texts of the same countries, whatever their section, with hidden spans

Inputs are what fields of at least 60 characters say, without the field's name; targets are geography, people,
government or economy. Of each country at most three texts a section are taken, so that no section has most.
Countries are drawn for the splits by a hash of their names, two thirds for "train", a sixth for "validation"
and a sixth for "dev", to choose settings on. The file is factbook.txt, one heading "= Country =" a document and
"== Section ==" inside, below T5X_LITE_FILES.
"""

import functools
import hashlib
import random
import re
import zlib
from collections.abc import Callable, Iterator

import seqio

from t5x_lite import files
from t5x_lite.data import denoising, readers, records, task_metrics, text_to_text
from t5x_lite.data.document_cache import DocumentSource

SECTIONS = {"Geography": "geography", "People and Society": "people", "Government": "government",
            "Economy": "economy"}
SEEDS = range(5)
_ORIGIN = "https://www.cia.gov/the-world-factbook (public domain)"
_COUNTRY, _SECTION = re.compile(r"= ([^=]+) ="), re.compile(r"== ([^=]+) ==")
_SHORTEST, _MOST, _LABELS = 60, 3, 5   # characters; texts a country and section; labels a section
_SPLITS = {"train": (0, 1, 2, 3), "dev": (4,), "validation": (5,)}   # sixths of the countries


def texts(path: str) -> Iterator[tuple[str, str, str]]:
    """(country, text, label) of the file, in its order, all texts that are long enough; "": no label."""
    country = label = ""
    for _, line in readers.lines(path):
        if found := _SECTION.fullmatch(line):
            label = SECTIONS.get(found[1], "")
        elif found := _COUNTRY.fullmatch(line):
            country = found[1]
        else:
            text = line.partition(". ")[2].strip()
            if len(text) >= _SHORTEST:
                yield country, text, label


@functools.cache
def examples(path: str, split: str) -> tuple[tuple[str, str], ...]:
    """(text, label) of a split, at most three of a country and section, drawn by its name."""
    held: dict[tuple[str, str], list[str]] = {}
    for country, text, label in texts(path):
        if label and zlib.crc32(country.encode()) % 6 in _SPLITS[split]:
            held.setdefault((country, label), []).append(text)
    return tuple((text, label) for (country, label), found in held.items()
                 for text in random.Random(country + label).sample(found, min(_MOST, len(found))))


def few(path: str, seed: int) -> list[tuple[str, str]]:
    """Five training examples of each section."""
    rng, found = random.Random(seed), examples(path, "train")
    return [pair for label in SECTIONS.values()
            for pair in rng.sample([pair for pair in found if pair[1] == label], _LABELS)]


def _file() -> str:
    return records.published("factbook.txt", _ORIGIN)


def _key(name: str) -> Callable[[], str]:
    """The name of a cache folder, with the file's state."""
    return lambda: f"{name}-{hashlib.sha256(repr((1, files.state_of(_file()))).encode()).hexdigest()[:16]}"


def _texts() -> Iterator[tuple[str, str]]:
    """(split, text) of every text but those of "dev", labels aside."""
    for country, text, _ in texts(_file()):
        split = next(name for name, sixths in _SPLITS.items() if zlib.crc32(country.encode()) % 6 in sixths)
        if split != "dev":
            yield split, text


def _source(name: str, held_out: str = "validation", seed: int | None = None) -> DocumentSource:
    """All training examples or the few of a seed, and the countries of `held_out` as "validation"."""
    def documents() -> Iterator[tuple[str, str]]:
        train = examples(_file(), "train") if seed is None else few(_file(), seed)
        for split, pairs in (("train", train), ("validation", examples(_file(), held_out))):
            for pair in pairs:
                yield split, records.pack(pair)

    return DocumentSource(_key(name), ("train", "validation"), documents)


def _register() -> None:
    seqio.TaskRegistry.add(
        "factbook_span_corruption",
        source=DocumentSource(_key("factbook_texts"), ("train", "validation"), _texts),
        preprocessors=denoising.steps("span_corruption"),
        output_features=text_to_text.features("facts"))
    sources = {"factbook_sections": {}, "factbook_sections_dev": {"held_out": "dev"}} | {
        f"factbook_sections_20_{seed}": {"seed": seed} for seed in SEEDS}
    for name, drawn in sources.items():
        text_to_text.register(name, _source(name, **drawn), records.unpack(("inputs", "targets")),
                              metric_fns=[task_metrics.accuracy], vocabulary="facts")


_register()
