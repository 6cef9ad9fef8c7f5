"""FLAN-style instruction tuning: data sets in natural words, with their options (Wei et al. 2021,
arXiv:2109.01652).

    flan_{rte,mnli,cb,sst2,cola,mrpc,qqp,qnli,boolq,copa}    one example a record
    flan                                                     all of them, as FLAN mixes its own

Every record is put into one of its data set's templates, which one its number says; after it stand
the options. The templates are worded here: FLAN's own, ten a data set, are in
https://github.com/google-research/FLAN and not needed for the method. Evaluation is by text; of the
templates that ask for something else than the label (FLAN's "turned around" ones) there are none.
"""

from collections.abc import Mapping
from typing import NamedTuple

import tensorflow as tf

from t5x_lite.data import prompts, task_metrics, text_to_text
from t5x_lite.data.preprocessors import Format
from t5x_lite.data.text_to_text import TfdsSource

_plain = tf.autograph.experimental.do_not_convert


class DataSet(NamedTuple):
    """Where records come from, and how they are told."""
    tfds: str
    size: int                      # training examples
    options: tuple[str, ...]       # by label; "{field}" stands for a field of the record
    templates: tuple[str, ...]


_NLI = ('{premise}\nDoes it follow that "{hypothesis}"?',
        'Read this: {premise}\nIs it then true that "{hypothesis}"?',
        'Premise: {premise}\nHypothesis: {hypothesis}\nDoes the premise entail the hypothesis?',
        'Suppose that {premise} Can we conclude that {hypothesis}')
_SAME = ('First: {sentence1}\nSecond: {sentence2}\nDo both say the same?',
         '"{sentence1}"\n"{sentence2}"\nDo these two sentences mean the same thing?',
         'Is "{sentence2}" another way to say "{sentence1}"?')
_THREE = ("yes", "it is not possible to tell", "no")

DATASETS = {
    "rte": DataSet("super_glue/rte:1.0.2", 2_490, ("yes", "no"), _NLI),
    "mnli": DataSet("glue/mnli:2.0.0", 392_702, _THREE, _NLI),
    "cb": DataSet("super_glue/cb:1.0.2", 250, (_THREE[0], _THREE[2], _THREE[1]), _NLI),
    "sst2": DataSet("glue/sst2:2.0.0", 67_349, ("negative", "positive"), (
        'Review: {sentence}\nIs this review positive or negative?',
        'How does the writer of this sentence feel about the film? {sentence}',
        'Name the sentiment of: "{sentence}"')),
    "cola": DataSet("glue/cola:2.0.0", 8_551, ("unacceptable", "acceptable"), (
        '{sentence}\nWould a linguist call this sentence acceptable or unacceptable?',
        'Is "{sentence}" acceptable English?', 'Judge the grammar of: {sentence}')),
    "mrpc": DataSet("glue/mrpc:2.0.0", 3_668, ("no", "yes"), _SAME),
    "qqp": DataSet("glue/qqp:2.0.0", 363_849, ("no", "yes"), (
        '{question1}\n{question2}\nDo these questions ask for the same thing?',
        'Would one answer do for "{question1}" and "{question2}"?',
        'First question: {question1}\nSecond question: {question2}\nAre they duplicates?')),
    "qnli": DataSet("glue/qnli:2.0.0", 104_743, ("yes", "no"), (
        '{question}\n{sentence}\nDoes the sentence answer the question?',
        'Can "{question}" be answered from "{sentence}"?',
        'Sentence: {sentence}\nQuestion: {question}\nIs the answer in the sentence?')),
    "boolq": DataSet("super_glue/boolq:1.0.2", 9_427, ("no", "yes"), (
        '{passage}\n\n{question}?', 'Text: {passage}\n\nQuestion: {question}?\nAnswer yes or no.',
        'According to the passage, {question}?\n\n{passage}')),
    "copa": DataSet("super_glue/copa:1.0.2", 400, ("{choice1}", "{choice2}"), (
        '{premise} What is the {question}?', 'Here is a premise: {premise}\nWhich is its {question}?',
        '{premise}\nChoose the most likely {question}.')),
}


def _filled(template: str, record: Mapping) -> tf.Tensor:
    """The template with the record's fields in place of {field}."""
    pieces = template.replace("}", "{").split("{")   # text, field, text, field, …, text
    return tf.strings.join([record[p] if i % 2 else p for i, p in enumerate(pieces)])


def instructed(dataset: DataSet) -> Format:
    """A format: records -> instruction with options, and the option that is right."""
    def format_fn(records: tf.data.Dataset) -> tf.data.Dataset:
        def example(number, record):
            texts = tf.stack([_filled(t, record) for t in dataset.templates])
            options = tf.stack([_filled(o, record) for o in dataset.options])
            listed = tf.strings.reduce_join(tf.strings.join(["\n- ", options]))
            return {"inputs": tf.strings.join([texts[number % len(dataset.templates)],
                                               "\nOPTIONS:", listed]),
                    "targets": options[tf.cast(record["label"], tf.int32)]}
        labelled = records.filter(_plain(lambda record: record["label"] >= 0))
        return labelled.enumerate().map(_plain(example))
    return format_fn


def _register() -> None:
    for name, dataset in DATASETS.items():
        splits = {"train": "train", "validation": (
            "validation_matched" if name == "mnli" else "validation")}
        text_to_text.register(f"flan_{name}", TfdsSource(dataset.tfds, splits),
                              instructed(dataset), metric_fns=[task_metrics.accuracy])
    prompts.flan_mixture("flan", {f"flan_{n}": d.size for n, d in DATASETS.items()})


_register()
