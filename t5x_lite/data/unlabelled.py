"""Texts without labels: files of them as tasks, and the step that makes views of a text (views.py).

Files are .jsonl or .json objects with "inputs", "question" or "text", the first column of a .tsv, the lines of
a .txt (data.text_document). Of registered tasks the inputs alone are kept.
"""

import functools
import re
from collections.abc import Iterator, Sequence

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data import (
    paths,
    readers,
    records,
    span_corruption,
    text_files,
    text_to_text,
    views,
    vocabularies,
)
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError

_plain = tf.autograph.experimental.do_not_convert
_FIELDS = ("inputs", "question", "text")   # of an object, the first that it has
_TEXT = (".txt", ".txt.gz")


# --- files ----------------------------------------------------------------------------------------

def is_path(name: str) -> bool:
    """Whether `of_files` takes the name: a .jsonl, .json, .tsv or .txt path, also .gz."""
    return name.endswith(_TEXT) or bool(paths.EXAMPLES.fullmatch(name))


def of_files(path: str, field: str, config: DataConfig, vocabulary: seqio.Vocabulary, filled: bool
             ) -> seqio.Task:
    """The task of a file's texts (or a glob's, or of a slice of its lines), "inputs" alone.

    filled: whether each line's "filled" is read, too: an example for each text in it.
    """
    match = paths.EXAMPLES.fullmatch(path)
    pattern, start, stop = match.groups() if match else (path, None, None)
    start, stop = int(start or 0), int(stop or 100)
    files = text_files.find_files([pattern], field)
    names = ("inputs", "filled") if filled else ("inputs",)
    read = functools.partial(_read_part, start=start, stop=stop, document=config.text_document, filled=filled)
    feature = seqio.Feature(vocabulary, add_eos=True)
    return seqio.Task(
        re.sub(r"[^\w.]", ":", path),
        source=records.RecordSource("texts", {"train": files}, read,
                                    version=f"{start}:{stop}:{config.text_document}:{filled}"),
        preprocessors=text_to_text.preprocessors(records.unpack(names)),
        output_features=dict.fromkeys((*names, "targets"), feature))


def _read_part(path: str, start: int, stop: int, document: str, filled: bool) -> Iterator[records.Record]:
    """The file's texts from start to stop per cent, each as (text,) or (text, filled text)."""
    found = list(_read_filled(path) if filled else ((text,) for text in _texts(path, document)))
    if not found:
        raise UserError(f"data.unlabelled: {path} holds no text")
    yield from found[len(found) * start // 100:len(found) * stop // 100]


def _texts(path: str, document: str) -> Iterator[str]:
    """The texts of a file, in order; blank lines hold none."""
    name = path.removesuffix(".gz")
    if name.endswith(".txt"):
        yield from text_files.read_documents([path], document)
    elif name.endswith(".tsv"):
        yield from (row[0] for _, row in readers.table(path, "\t") if row)
    else:
        objects = records.json_list(path) if name.endswith(".json") else readers.json_lines(path)
        for number, record in objects:
            yield _text(record, f"{path}, line {number}")


def _text(record: dict, where: str) -> str:
    name = next((name for name in _FIELDS if name in record), _FIELDS[0])
    text = readers.field(record, name, where)
    readers.check_text([text], where)
    return text


def _read_filled(path: str) -> Iterator[records.Record]:
    """(text, filled text) of each line's "filled", a string or a list of them."""
    if not path.removesuffix(".gz").endswith(".jsonl"):
        raise UserError(f"data.views=filled reads the field \"filled\" of .jsonl files, not {path}: "
                        "python -m t5x_lite.refill writes one")
    for number, record in readers.json_lines(path):
        where, made = f"{path}, line {number}", record.get("filled")
        made = [made] if isinstance(made, str) else made
        if not isinstance(made, list) or not made or not all(isinstance(text, str) for text in made):
            raise UserError(f"{where} has no \"filled\", a text or a list of texts, which data.views=filled "
                            "reads: python -m t5x_lite.refill writes them")
        text = _text(record, where)
        readers.check_text(made, where)
        yield from ((text, version) for version in made)


# --- classes --------------------------------------------------------------------------------------

def tokens_of(classes: Sequence[str], vocabulary: seqio.Vocabulary) -> list[list[int]]:
    """The tokens of each class, EOS included. Raises UserError for a class that the vocabulary cannot write."""
    found = [[*map(int, vocabulary.encode(name)), vocabulary.eos_id] for name in classes]
    for name, tokens in zip(classes, found, strict=True):
        written = vocabulary.decode(tokens[:-1])
        if written.strip() != name or len(tokens) < 2:
            raise UserError(f"data.classes: the vocabulary writes {name!r} as {written!r}, and no model "
                            "could answer with it; choose other names for the labels")
    return found


# --- views ----------------------------------------------------------------------------------------

def with_views(task: seqio.Task, names: Sequence[str], classes: Sequence[str], graded: bool,
               inputs_length: int) -> seqio.Task:
    """The task with a last step that makes a text for each view and puts all classes in the targets' place.

    graded: with "right", the number of the class that the targets were, else they are not looked at.
    Raises UserError where the task lacks a text, or a view hides more spans than there are sentinels.
    """
    features = task.output_features
    for name in names:
        _check_view(task, name, inputs_length)
    made = {views.feature_of(prefix): features[views.VIEWS[name].feature]
            for name, prefix in zip(names, views.PREFIXES, strict=False)}
    if graded:
        made["right"] = seqio.Feature(features["targets"].vocabulary, add_eos=False)
    step = functools.partial(see, names=",".join(names), classes=",".join(classes), graded=graded)
    return task.replace(name=f"{task.name}_unlabelled", preprocessors=[*task.preprocessors, step],
                        output_features={**features, **made})


def _check_view(task: seqio.Task, name: str, inputs_length: int) -> None:
    view = views.VIEWS[name]
    if view.feature not in task.output_features:
        raise UserError(f"data.views={name}: {task.name!r} has no text {view.feature!r}, but "
                        f"{', '.join(task.output_features)}; take a .jsonl file that has it "
                        "(python -m t5x_lite.refill writes \"filled\") or another view")
    vocabulary = task.output_features[view.feature].vocabulary
    spans = view.most_spans(inputs_length)
    if spans and spans > (held := vocabularies.num_sentinels(vocabulary)):
        raise UserError(f"data.views={name} hides up to {spans} spans of data.inputs_length={inputs_length} "
                        f"tokens, and the vocabulary has {held} sentinels; take another view or shorter inputs")


def see(dataset: tf.data.Dataset, output_features, names: str, classes: str, graded: bool) -> tf.data.Dataset:
    """{"inputs", …: tokens} -> {"weak", "strong": tokens, "targets": all classes, each with EOS}, the texts kept,
    and graded {"right": int32 [1], "label": text}: see `with_views`."""
    vocabulary = output_features["targets"].vocabulary
    tokens = tokens_of(classes.split(","), vocabulary)
    chosen = [views.VIEWS[name] for name in names.split(",")]
    ends = {view.feature: output_features[view.feature].add_eos for view in chosen}

    @seqio.map_over_dataset(num_seeds=2 * len(chosen))
    @_plain
    def example(x, seeds):
        made = {feature: x[feature] for feature in ends}
        for number, (view, prefix) in enumerate(zip(chosen, views.PREFIXES, strict=False)):
            text = tf.cast(x[view.feature], tf.int32)
            made[views.feature_of(prefix)] = _changed(
                view, text, ends[view.feature], seeds[2 * number:2 * number + 2], vocabulary)
        made["targets"] = tf.constant(sum(tokens, []), tf.int32)
        if graded:
            made["right"] = _number_of(tf.cast(x["targets"], tf.int32), tokens, vocabulary.eos_id)[None]
            made["label"] = x.get("targets_pretokenized", "")
        return made

    return example(dataset)


def _changed(view: views.View, tokens, has_eos: bool, seeds, vocabulary: seqio.Vocabulary):
    """The text as the view shows it; its EOS stays where it is."""
    if not view.hidden:
        return tokens
    text, end = tokens[:tf.size(tokens) - int(has_eos)], tokens[tf.size(tokens) - int(has_eos):]
    mask = span_corruption.random_spans_noise_mask(tf.size(text), view.hidden, view.span_length, seeds)
    first_sentinel = vocabulary.vocab_size - 1
    return tf.concat([span_corruption.spans_to_sentinels(text, mask, first_sentinel), end], 0)


def _number_of(targets, tokens: Sequence[Sequence[int]], eos_id: int):
    """int32 scalar: which class the targets up to their first EOS are, -1 for none."""
    longest = 1 + max(map(len, tokens))
    ended = tf.concat([targets, [eos_id]], 0)
    own = ended[:1 + tf.cast(tf.where(ended == eos_id)[0, 0], tf.int32)][:longest]
    padded = tf.pad(own, [[0, longest - tf.size(own)]], constant_values=-1)
    table = np.full((len(tokens), longest), -1, np.int32)
    for row, ids in zip(table, tokens, strict=True):
        row[:len(ids)] = ids
    same = tf.reduce_all(padded == table, axis=1)
    return tf.where(tf.reduce_any(same), tf.argmax(tf.cast(same, tf.int32), output_type=tf.int32), -1)
