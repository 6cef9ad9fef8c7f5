"""Evaluation of language models on running text: bits per byte, and the last word of a passage.

    wikitext103, pile                from files below T5X_LITE_FILES, a document or page at a time
    pg19                             through TFDS
    lambada                          the passage but its last word -> that word

Running text is cut into windows of targets_length tokens, as in training; the loss and
bits_per_byte that t5x_lite.eval prints anyway are then the metric, comparable across
vocabularies. LAMBADA has inputs and targets: a prefix LM or an encoder-decoder writes the last
word, and metrics.last_word_accuracy compares it (Paperno et al. 2016, arXiv:1606.06031).
"""

import functools
import re
from collections.abc import Iterator

import seqio
import tensorflow as tf

from t5x_lite.data import (
    preprocessors,
    readers,
    records,
    task_metrics,
    text_files,
    text_to_text,
    vocabularies,
)
from t5x_lite.data.document_cache import DocumentSource
from t5x_lite.data.preprocessors import each
from t5x_lite.data.text_to_text import TfdsSource

_HEADING = re.compile(r" = [^=].*[^=] = $")
_WIKITEXT = "https://www.salesforce.com/products/einstein/ai-research/the-wikitext-dependency"


def wikitext_pages(path: str) -> Iterator[tuple[str]]:
    """The pages of WikiText's files; " = Title = " opens one."""
    page: list[str] = []
    for _, line in readers.lines(path):
        if _HEADING.match(line) and any(part.strip() for part in page):
            yield ("\n".join(page).strip(),)
            page = []
        page.append(line)
    if any(part.strip() for part in page):
        yield ("\n".join(page).strip(),)


def pile_documents(path: str) -> Iterator[tuple[str]]:
    """The documents of the Pile's .jsonl files: field "text"."""
    yield from ((text,) for text in text_files.read_documents([path], "file"))


@each
def last_word(example):
    """{"passage"} -> inputs without the last word, which is the target."""
    passage = tf.strings.strip(example["passage"])
    return {"inputs": tf.strings.regex_replace(passage, r"\s+\S+$", ""),
            "targets": tf.strings.regex_replace(passage, r"(?s)^.*\s", "")}


def _running_text(name: str, source: seqio.DataSource, key: str) -> None:
    seqio.TaskRegistry.add(
        name, source=source,
        preprocessors=[functools.partial(preprocessors.tokenize, key=key),
                       preprocessors.causal_lm],
        output_features={"targets": seqio.Feature(vocabularies.load("t5"), add_eos=True)})


def _source(name: str, file: str, origin: str, read) -> DocumentSource:
    files = lambda: {"validation": [records.published(file, origin)]}
    return records.RecordSource(name, files, read, splits=("validation",))


def _register() -> None:
    _running_text("wikitext103", _source("wikitext103", "wiki*.valid*", _WIKITEXT,
                                         wikitext_pages), "text")
    _running_text("pile", _source("pile", "pile*.jsonl*", "https://pile.eleuther.ai",
                                  pile_documents), "text")
    _running_text("pg19", TfdsSource("pg19:0.1.1", ("train", "validation", "test")), "book_text")
    text_to_text.register(
        "lambada", TfdsSource("lambada:1.0.0", {"train": "train", "validation": "test"}), last_word,
        metric_fns=[task_metrics.last_word_accuracy, task_metrics.bits_per_byte])


_register()
