"""Conversations from files: the assistant's answers are learned, all else is read.

    data.train=chats.jsonl      {"messages": [{"role": "user", "content": …}, …]} a line

Roles are system, user, assistant and tool. The text of a conversation is what the chat template of
data.vocabulary makes of it (chat_template.py), of a tokenizer.json with one beside it; other
vocabularies get a plain one, whose answers end in the end token.

An example has the features

    inputs           all that stands before the last answer
    targets          the last answer with the end of its turn; what stands behind it is left out
    inputs_weights   1 on the tokens of inputs that are earlier answers, else 0

so that objective.name=lm learns every answer of a conversation, and seq2seq and prefix_lm its last one
with the conversation before as inputs, of which they keep the end where it is too long. A row of lm
that is too long loses its end, as any text does.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data import (
    chat_template,
    readers,
    records,
    text_to_text,
    vocabularies,
    vocabulary as data_vocabulary,
)
from t5x_lite.data.chat_template import Chat, ChatTemplate
from t5x_lite.data.preprocessors import Format
from t5x_lite.data.rows import INPUTS_WEIGHTS as WEIGHTS
from t5x_lite.data.tokenizer_json import TokenizerJson
from t5x_lite.errors import UserError

_FIELDS = ("inputs_pretokenized", "targets_pretokenized", "inputs", "targets", WEIGHTS)

_log = logging.getLogger(f"t5x_lite.{__name__}")   # shown by commands, as its own lines are


def is_chats(path: str) -> bool:
    """Whether a file is a .jsonl whose first line has messages, however it spells them."""
    if not path.removesuffix(".gz").endswith(".jsonl"):
        return False
    first = next((record for _, record in readers.json_lines(path)), {})
    return bool(first.keys() & {"messages", "conversations"})


def read(path: str) -> Iterator[tuple[str, str]]:
    """(conversation in JSON, what errors call it) of each line; UserError for one that is malformed."""
    for number, record in readers.json_lines(path):
        where = f"{path}, line {number}"
        chat = chat_template.chat_of(record, where)
        yield json.dumps(chat, ensure_ascii=False), where


# --- tokens -------------------------------------------------------------------------------------

class Tokens(NamedTuple):
    """A conversation's tokens, and where its answers stand among them: [start, end)."""
    ids: list[int]
    answers: list[tuple[int, int]]


@functools.lru_cache(maxsize=8)
def _template_of(path: str) -> ChatTemplate | None:
    return chat_template.beside(path)


def template_of(vocabulary: seqio.Vocabulary) -> ChatTemplate:
    """The chat template of a vocabulary; the plain one, which is said once, where it has none."""
    if not isinstance(vocabulary, TokenizerJson):
        return _plain(vocabularies.name_of(vocabulary), "")
    return _template_of(vocabulary.path) or _plain(
        vocabulary.path, vocabulary.tokenizer.id_to_token(vocabulary.eos_id))


@functools.cache
def _plain(vocabulary: str, end_token: str) -> ChatTemplate:
    _log.info('data.vocabulary=%s has no chat template: messages are written below "System:", "User:" and '
              '"Assistant:", and answers end in the end token', vocabulary)
    return ChatTemplate(chat_template.PLAIN, (("eos_token", end_token),))


def prompt(vocabulary: seqio.Vocabulary, chat: Chat, where: str) -> tuple[str, list[int]]:
    """(text, its tokens) of a conversation that the assistant is to go on with."""
    text = template_of(vocabulary).prompt(chat, where)
    return text, tokens(vocabulary, text, (), where).ids


def turn_end(vocabulary: seqio.Vocabulary) -> int:
    """The token that ends an answer."""
    ending = template_of(vocabulary).turn_end().strip()
    return vocabulary.encode(ending)[0] if ending else vocabulary.eos_id


def tokens(vocabulary: seqio.Vocabulary, text: str, answers: Sequence[tuple[int, int]],
           where: str = "a conversation") -> Tokens:
    """The tokens of a conversation's text, without the start token, which every row reads first.

    answers: where they stand in the text. A tokenizer.json encodes the text as a whole, and a token
    that shares a character with an answer is of it. Other vocabularies encode an answer and what
    stands before it apart, and give each answer the end token, for which they have no text.

    Raises:
        UserError: `where` in front; an answer that has no token.
    """
    if not isinstance(vocabulary, TokenizerJson):
        return _apart(vocabulary, text, answers)
    encoded = vocabulary.tokenizer.encode(text, add_special_tokens=False)
    ids, cut = encoded.ids, 0
    if vocabulary.starts_texts and ids[:1] == [vocabulary.start_id]:
        ids, cut = ids[1:], 1
    begins, ends = np.array(encoded.offsets, np.int64).reshape(-1, 2).T
    spans = []
    for start, end in answers:
        inside = np.flatnonzero((begins < end) & (ends > start))
        if not len(inside):   # its characters are none to the vocabulary, such as U+200B
            raise UserError(f"{where}: the answer {text[start:end][:40]!r} has no token in data.vocabulary="
                            f"{vocabulary.path}; leave it out")
        spans.append((int(inside[0]) - cut, int(inside[-1]) + 1 - cut))
    return Tokens(ids, spans)


def _apart(vocabulary: seqio.Vocabulary, text: str, answers: Sequence[tuple[int, int]]) -> Tokens:
    ids, spans, read = [], [], 0
    for start, end in answers:
        ids += vocabulary.encode(text[read:start])
        first = len(ids)
        ids += [*vocabulary.encode(text[start:end]), vocabulary.eos_id]
        spans.append((first, len(ids)))
        read = end
    return Tokens([*ids, *vocabulary.encode(text[read:])], spans)


# --- the task -----------------------------------------------------------------------------------

def examples(vocabulary: seqio.Vocabulary, read: Callable[[str], Iterable[tuple[str, str]]], path: str
             ) -> Iterator[records.Record]:
    """The packed fields _FIELDS of each conversation of a file; tokens and weights as numbers in text.

    read: a path -> (conversation in JSON, what errors call it).
    """
    template = template_of(vocabulary)
    for content, where in read(path):
        rendered = template.rendered(json.loads(content), where)
        ids, answers = tokens(vocabulary, *rendered, where)
        weights = np.zeros(len(ids), np.int32)
        for first, end in answers:
            weights[first:end] = 1
        first, end = answers[-1]
        begin, stop = rendered.answers[-1]
        numbers = (ids[:first], ids[first:end], weights[:first])
        yield (rendered.text[:begin], rendered.text[begin:stop],
               *(" ".join(map(str, values)) for values in numbers))


class ChatSource(records.RecordSource):
    """The conversations of some files: as they are until a vocabulary is known, by which `of` makes
    their tokens."""

    def of(self, vocabulary: seqio.Vocabulary) -> records.RecordSource:
        """The source of `examples`; made anew when the vocabulary or its template changes."""
        identity = (data_vocabulary.vocabulary_identity(vocabulary), template_of(vocabulary))
        return records.RecordSource(
            "chats", self._files, functools.partial(examples, vocabulary, self._read), self.splits,
            version=f"{self._version}, {identity}", keep=self._keep)


def _numbers(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Tokens and weights as arrays, int32 and float32, of their numbers in text."""
    def parsed(example):
        made = {name: tf.strings.to_number(tf.strings.split(example[name]), dtype)
                for name, dtype in (("inputs", tf.int32), ("targets", tf.int32), (WEIGHTS, tf.float32))}
        return {**example, **made}
    return dataset.map(tf.autograph.experimental.do_not_convert(parsed))


def keep_latest(dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None,
                output_features: Mapping[str, seqio.Feature]) -> tf.data.Dataset:
    """Inputs that are too long, cut at their beginning; as they are in rows that learn from them."""
    if not sequence_length or WEIGHTS in sequence_length:
        return dataset
    room = sequence_length["inputs"] - output_features["inputs"].add_eos
    return dataset.map(tf.autograph.experimental.do_not_convert(
        lambda example: {**example, "inputs": example["inputs"][-room:]}))


def _preprocessors(format_fn: Format) -> list:
    return [format_fn, _numbers, seqio.CacheDatasetPlaceholder(), keep_latest,
            seqio.preprocessors.append_eos_after_trim]


def _features() -> dict[str, seqio.Feature]:
    features = text_to_text.features()
    vocabulary = features["targets"].vocabulary
    features["targets"] = seqio.Feature(vocabulary, add_eos=False)   # its turn's end is there
    features[WEIGHTS] = seqio.Feature(vocabulary, add_eos=False, dtype=tf.float32)
    return features


KIND = text_to_text.Kind(read, records.unpack(_FIELDS), None, (), _preprocessors, _features, ChatSource)


def register(name: str, files: Mapping[str, Sequence[str]],
             read: Callable[[str], Iterable[tuple[str, str]]] = read,
             keep: Callable[[str, int], bool] | None = None) -> seqio.Task:
    """Adds a task of conversations to seqio's registry; see records.RecordSource.

    read: a path -> (conversation in JSON, what errors call it).
    """
    return seqio.TaskRegistry.add(
        name, source=ChatSource(name, files, read, keep=keep), preprocessors=_preprocessors(KIND.format_fn),
        output_features=_features(), metric_fns=[])
