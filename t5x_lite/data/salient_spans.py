"""Salient span masking: a sentence, one of its names or dates hidden, to be filled in.

    data.denoising=salient          every name and date of a sentence, the text's subject too
    data.denoising=salient_kept     only of sentences that hold the name of the text's subject, which
                                    is never hidden: what is learned hangs on the name alone
    data.denoising=salient_asked    the same, and behind each document the questions that it answers, worded as
                                    those of data.salient_like are (asked.py)

With data.rewriting (rewriting.py) a row is a unit of the rewritten text. With data.salient_like only
spans are hidden that look like the answers of some questions (salient_choice.py).
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import seqio
import tensorflow as tf

from t5x_lite.data import names, records, rewriting, salient_choice, text_files, text_to_text
from t5x_lite.data.config import DataConfig

PREFIX, MASK = "nem: ", "_X_"
_VERSION = 1   # raise it whenever the detector finds other spans
_ASKED_VERSION = 2   # … or other questions are asked

Spans = Sequence[tuple[int, int]]   # (start, limit) in characters


def mask_salient_spans(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """{"text", "spans": {"start", "limit"} in bytes} -> inputs and targets, a span an example."""
    plain = tf.autograph.experimental.do_not_convert

    def one(text, start, limit):
        hidden = [PREFIX, tf.strings.substr(text, 0, start), MASK,
                  tf.strings.substr(text, limit, -1)]
        return {"inputs": tf.strings.join(hidden),
                "targets": tf.strings.substr(text, start, limit - start)}

    def spans(example):
        starts, limits = (tf.cast(example["spans"][k], tf.int32) for k in ("start", "limit"))
        return tf.data.Dataset.from_tensor_slices((starts, limits)).map(
            plain(lambda start, limit: one(example["text"], start, limit)))

    return dataset.flat_map(plain(spans))


def masked(unit: str, start: int, limit: int) -> tuple[str, str]:
    """(inputs, targets) of a unit of text with one span hidden."""
    return f"{PREFIX}{unit[:start]}{MASK}{unit[limit:]}", unit[start:limit]


def all_spans(unit: str, subject: str, spans: Spans) -> Spans:
    """Every one."""
    return spans


def spans_beside_the_name(unit: str, subject: str, spans: Spans) -> Spans:
    """The spans that do not touch the subject's name; none where the unit does not hold the name."""
    named = names.places(unit, subject)
    if not named:
        return []
    return [(s, e) for s, e in spans if all(e <= start or limit <= s for start, limit in named)]


class Asker(Protocol):
    """What asks a document the questions that it answers: asked.Asker."""

    def answers(self, document: rewriting.Document) -> Sequence: ...

    def questions(self, document: rewriting.Document, answers: Sequence, number: int) -> list[tuple[str, str]]: ...


class Kind(NamedTuple):
    """Which spans are hidden, (unit, subject, spans) -> spans, and whether the text's own questions are asked."""

    chosen: Callable[[str, str, Spans], Spans]
    asks: bool = False


KINDS = {
    "salient": Kind(all_spans),
    "salient_kept": Kind(spans_beside_the_name),
    "salient_asked": Kind(spans_beside_the_name, asks=True),
}


class Settings(NamedTuple):
    """What becomes of documents."""

    kind: str = "salient"
    rewrite: rewriting.Rewriting = rewriting.NONE
    like: str = ""       # questions, see salient_choice.py


PLAIN = Settings()


def settings_of(config: DataConfig, kind: str) -> Settings:
    """The fields of a config, with the denoiser's name."""
    return Settings(kind, rewriting.of(config), config.salient_like)


def examples(texts: Iterable[str], settings: Settings = PLAIN, finder: salient_choice.Finder = salient_choice.ALL,
             asker: Asker | None = None) -> Iterator[tuple[str, str]]:
    """(inputs, targets) of the salient spans of every sentence of some texts, and the questions that they answer.

    With rewriting, of every unit that has spans, all texts in one version after another; these units are kept in
    memory. Spans are found in a text as it was: a rewritten one may put two names side by side.
    """
    rewrite = settings.rewrite
    documents = (rewriting.cut(text, rewrite.steps) for text in texts)
    if not rewrite.steps:
        for document in documents:
            yield from _rows(document, settings.kind, finder.spans)
            yield from asker.questions(document, asker.answers(document), 0) if asker else ()
        return
    prepared = [(document, *salient_choice.chosen(document, finder), asker.answers(document) if asker else ())
                for document in documents]
    rest = rewrite._replace(steps=tuple(step for step in rewrite.steps if step not in rewriting.CUTS))
    for number in range(rewrite.rewrites):
        for document, with_spans, chosen, answers in prepared:
            version = rewriting.version(with_spans, rest, number)
            yield from _rows(version, settings.kind, functools.partial(_places, chosen=chosen))
            yield from asker.questions(document, answers, number) if asker else ()


def _rows(document: rewriting.Document, kind: str, spans_of: Callable[[str, str], Spans]) -> Iterator[tuple[str, str]]:
    for unit in document.units:
        for span in KINDS[kind].chosen(unit, document.subject, spans_of(unit, document.subject)):
            yield masked(unit, *span)


def _places(unit: str, subject: str, chosen: Sequence[str]) -> Spans:
    """Where the texts stand in a unit as whole words, in order; of two that overlap, the longer."""
    found: list[tuple[int, int]] = []
    for text in chosen:   # the longest first
        found += [(s, e) for s, e in names.places(unit, text)
                  if all(e <= start or limit <= s for start, limit in found)]
    return sorted(found)


def task(name: str, files: Sequence[str], split: str, document: str,
         vocabulary: seqio.Vocabulary, settings: Settings = PLAIN,
         learn_asker: Callable[..., Asker] | None = None) -> seqio.Task:
    """A task over the salient spans of text files; it is not registered.

    document: what a document of a plain text file is, as in text_files.read_documents.
    learn_asker: asked.learned, for the kind that asks.
    """
    def spans(path: str) -> Iterator[tuple[str, str]]:
        how = (tuple(files), document, settings.rewrite.steps, settings.like)
        asker = learn_asker(*how) if learn_asker else None
        yield from examples(text_files.read_documents([path], document), settings, salient_choice.learned(*how), asker)

    how = (settings, rewriting.VERSION, salient_choice.digest(settings.like),
           *([_ASKED_VERSION] if learn_asker else []))
    source = records.RecordSource(f"salient_spans-{document}-v{_VERSION}", {split: files}, spans,
                                  version="" if settings == PLAIN else repr(how))
    return seqio.Task(
        name, source=source,
        preprocessors=text_to_text.preprocessors(records.unpack(("inputs", "targets"))),
        output_features={f: seqio.Feature(vocabulary, add_eos=True)
                         for f in ("inputs", "targets")})
