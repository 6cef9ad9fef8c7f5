"""What mT5 is fine-tuned on (Xue et al. 2021, arXiv:2010.11934, section 4), a task a language.

    xnli_train, xnli_ar …     MultiNLI's English pairs; XNLI's own, "xnli: premise: … hypothesis: …"
                              -> "0" (entailment), "1" (neutral), "2" (contradiction)
    wikiann_en …              names in XTREME's 40 languages: "tag: rick and morty" ->
                              "PER: rick $$ PER: morty"; F1 of the names
    mlqa_ar …                 "question: … context: …" -> the first answer; F1 after MLQA's normalisation
    tydiqa, tydiqa_ar …       TyDi QA's gold passages, all languages to train on and each to score

XQuAD is in t5_benchmarks.py. To read them with mT5's vocabulary set data.vocabulary to its file. For
zero-shot transfer train on the English data and name the languages in data.validation.
"""

import functools

import tensorflow as tf

from t5x_lite.data import task_metrics, text_to_text
from t5x_lite.data.preprocessors import Format, each
from t5x_lite.data.text_to_text import TfdsSource
from tasks import t5_benchmarks

XNLI_LANGUAGES = tuple("ar bg de el en es fr hi ru sw th tr ur vi zh".split())
WIKIANN_LANGUAGES = tuple(
    "af ar bg bn de el en es et eu fa fi fr he hi hu id it ja jv ka kk ko ml mr ms my nl pt ru sw ta te "
    "th tl tr ur vi yo zh".split())
MLQA_LANGUAGES = tuple(task_metrics.MLQA_ARTICLES)
TYDIQA_LANGUAGES = tuple("ar bn en fi id ko ru sw te".split())
_NLI_LABELS = ("0", "1", "2")


def _entails(premise: tf.Tensor, hypothesis: tf.Tensor, label: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"inputs": tf.strings.join(["xnli: premise: ", premise, " hypothesis: ", hypothesis]),
            "targets": tf.strings.as_string(label)}


@each
def multi_nli(example):
    """MultiNLI -> XNLI's form."""
    return _entails(example["premise"], example["hypothesis"], example["label"])


def xnli(language: str) -> Format:
    """A format: the pair of one language out of a record that holds all of them."""
    @each
    def format_fn(example):
        hypothesis = example["hypothesis"]
        ours = hypothesis["translation"][hypothesis["language"] == language]
        return _entails(example["premise"][language], ours[0], example["label"])
    return format_fn


@each
def wikiann(example):
    """WikiANN -> its words, and its names with their kinds between " $$ "."""
    words = tf.strings.reduce_join(example["tokens"], separator=" ")
    return {"inputs": tf.strings.join(["tag: ", words]),
            "targets": tf.strings.reduce_join(example["spans"], separator=" $$ ")}


def _register() -> None:
    nli = dict(metric_fns=[task_metrics.accuracy],
               postprocess_fn=text_to_text.class_number(_NLI_LABELS))
    text_to_text.register("xnli_train", TfdsSource("multi_nli:1.1.0", ("train",)), multi_nli, **nli)
    for language in XNLI_LANGUAGES:
        text_to_text.register(f"xnli_{language}", TfdsSource("xnli:1.1.0", ("validation", "test")),
                              xnli(language), **nli)
    for language in WIKIANN_LANGUAGES:
        text_to_text.register(
            f"wikiann_{language}", TfdsSource(f"wikiann/{language}:1.0.0", (
                "train", "validation", "test")), wikiann, metric_fns=[task_metrics.span_f1])
    answered = functools.partial(text_to_text.register, format_fn=t5_benchmarks.xquad,
                                 postprocess_fn=text_to_text.answers)
    for language in MLQA_LANGUAGES:
        answered(f"mlqa_{language}", TfdsSource(f"mlqa/{language}:1.0.0", ("validation", "test")),
                 metric_fns=[task_metrics.mlqa(language)])
    tydiqa = "tydi_qa/goldp:3.0.0"
    answered("tydiqa", TfdsSource(tydiqa, ("train", "validation")), metric_fns=[task_metrics.squad])
    for language in TYDIQA_LANGUAGES:
        answered(f"tydiqa_{language}", TfdsSource(tydiqa, {"validation": f"validation-{language}"}),
                 metric_fns=[task_metrics.squad])


_register()
