"""GLUE and SuperGLUE as text (Raffel et al. 2020, arXiv:1910.10683, appendix D).

    glue_{cola,sst2,mrpc,qqp,stsb,mnli,mnli_matched,mnli_mismatched,qnli,rte,wnli,ax}
    super_glue_{boolq,cb,copa,multirc,record,rte,wic,axb,axg}
    super_glue_wsc_train, super_glue_wsc_eval, dpr      Winograd schemas as generation
    glue_proportional, super_glue_proportional          mixtures by numbers of examples

Inputs are the benchmark's name and "feature: text" for each feature, sorted by name where the
paper's order is not another: "mnli hypothesis: … premise: …". Targets are the labels' names. An
answer that is no label is wrong. Test splits carry no labels: their targets are "<unk>".
"""

from collections.abc import Callable, Sequence

import seqio
import tensorflow as tf

from t5x_lite.data import task_metrics, text_to_text
from t5x_lite.data.preprocessors import Format, each
from t5x_lite.data.text_to_text import TfdsSource

_UNLABELLED = "<unk>"
_BOOLEAN = ("False", "True")
_ENTAILED = ("entailment", "not_entailment")

# name: (label names, metrics, training examples), in the order of TFDS's classes
GLUE = {
    "cola": (("unacceptable", "acceptable"), [task_metrics.matthews], 8_551),
    "sst2": (("negative", "positive"), [task_metrics.accuracy], 67_349),
    "mrpc": (("not_equivalent", "equivalent"), [task_metrics.f1, task_metrics.accuracy], 3_668),
    "qqp": (("not_duplicate", "duplicate"), [task_metrics.f1, task_metrics.accuracy], 363_849),
    "mnli": (("entailment", "neutral", "contradiction"), [task_metrics.accuracy], 392_702),
    "mnli_matched": (("entailment", "neutral", "contradiction"), [task_metrics.accuracy], 0),
    "mnli_mismatched": (("entailment", "neutral", "contradiction"), [task_metrics.accuracy], 0),
    "qnli": (_ENTAILED, [task_metrics.accuracy], 104_743),
    "rte": (_ENTAILED, [task_metrics.accuracy], 2_490),
    "wnli": (("not_entailment", "entailment"), [task_metrics.accuracy], 0),
    "ax": (("entailment", "neutral", "contradiction"), [], 0),
}
SUPER_GLUE = {
    "boolq": (_BOOLEAN, [task_metrics.accuracy], 9_427),
    "cb": (("entailment", "contradiction", "neutral"),
           [task_metrics.mean_class_f1(3), task_metrics.accuracy], 250),
    "copa": (("choice1", "choice2"), [task_metrics.accuracy], 400),
    "rte": (_ENTAILED, [task_metrics.accuracy], 2_490),
    "wic": (_BOOLEAN, [task_metrics.accuracy], 5_428),
    "axb": (_ENTAILED, [], 0),
    "axg": (_ENTAILED, [], 0),
}
_STSB_EXAMPLES, _MULTIRC_EXAMPLES, _RECORD_EXAMPLES = 5_749, 27_243, 138_854
_WSC_EXAMPLES, _DPR_EXAMPLES = 259, 1_322
_LABELLED = ("train", "validation", "test")
_SPLITS = {
    "mnli": ("train", "validation_matched", "validation_mismatched", "test_matched",
             "test_mismatched"),
    "mnli_matched": ("validation", "test"), "mnli_mismatched": ("validation", "test"),
    "ax": ("test",), "axb": ("test",), "axg": ("test",),
}
# MNLI's validation is its matched half, as in the benchmark's tables.
_MNLI_SPLITS = {"train": "train", "validation": "validation_matched", "test": "test_matched"}


def classification(benchmark: str, label_names: Sequence[str], names: Sequence[str] = (),
                   renamed: tuple[tuple[str, str], ...] = ()) -> Format:
    """A format: "benchmark name: text name: text …" -> the label's name.

    names: the features in order; default: all but idx and label, sorted.
    renamed: (feature, name it gets) pairs.
    """
    @each
    def format_fn(example):
        called = {new: example[old] for old, new in renamed} or {
            n: t for n, t in example.items() if n not in ("idx", "label")}
        parts = [benchmark]
        for name in names or sorted(called):
            parts += [f"{name}:", called[name]]
        return {"inputs": tf.strings.join(parts, separator=" "),
                "targets": _label(example["label"], label_names), "idx": example["idx"]}
    return format_fn


def _label(label, label_names: Sequence[str]):
    """The name of a class; "<unk>" for -1, which unlabelled test sets hold."""
    return tf.gather(tf.constant([_UNLABELLED, *label_names]), label + 1)


@each
def stsb(example):
    """STS-B: similarity 0 … 5 rounded to fifths, written with one decimal."""
    return {"inputs": tf.strings.join(
                ["stsb sentence1:", example["sentence1"], "sentence2:", example["sentence2"]],
                separator=" "),
            "targets": tf.strings.as_string(tf.round(example["label"] * 5) / 5, precision=1),
            "idx": example["idx"]}


@each
def multirc(example):
    """MultiRC: one answer a line, markup removed; group: the question it belongs to."""
    text = tf.strings.join(
        ["multirc question:", example["question"], "answer:", example["answer"], "paragraph:",
         example["paragraph"]], separator=" ")
    text = tf.strings.regex_replace(text, "<br>", " ")
    return {"inputs": tf.strings.regex_replace(text, "</?b>", ""),
            "targets": _label(example["label"], _BOOLEAN),
            "group": tf.stack([example["idx"]["paragraph"], example["idx"]["question"]])}


def record(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """ReCoRD: one example for each right entity; "@highlight" lines become sentences."""
    plain = tf.autograph.experimental.do_not_convert

    def texts(example):
        passage = tf.strings.regex_replace(
            example["passage"], r"(\.|\?|\!|\"|\')\n@highlight\n", r"\1 ")
        passage = tf.strings.regex_replace(passage, r"\n@highlight\n", ". ")
        inputs = tf.strings.join(
            ["record query:", example["query"], "entities:",
             tf.strings.reduce_join(example["entities"], separator=", "), "passage:", passage],
            separator=" ")
        answers = example["answers"]
        targets = tf.cond(tf.size(answers) > 0, lambda: answers,
                          lambda: tf.constant([_UNLABELLED]))
        group = tf.stack([example["idx"]["passage"], example["idx"]["query"]])
        return tf.data.Dataset.from_tensor_slices(targets).map(plain(
            lambda t: {"inputs": inputs, "targets": t, "answers": answers, "group": group}))

    return dataset.flat_map(plain(texts))


# --- Winograd schemas: which noun does the marked pronoun stand for? --------------------------

def wsc(dataset: tf.data.Dataset, right_only: bool) -> tf.data.Dataset:
    """SuperGLUE's WSC: "wsc: … *it* …" -> the candidate noun, right or not (then label is 0).

    right_only: leaves out the wrong candidates, which nothing can be learned from.
    """
    plain = tf.autograph.experimental.do_not_convert

    def example_of(example):
        words = tf.strings.split(example["text"], " ")
        at = example["span2_index"]
        # Two texts are split into words otherwise than their index was counted: look around it.
        is_pronoun = tf.strings.regex_replace(words, r"[^_\p{N}\p{L}\p{M}]+$", "") == example["span2_text"]
        distance = tf.abs(tf.range(tf.size(words)) - at)
        at = tf.argmin(tf.where(is_pronoun, distance, tf.int32.max), output_type=tf.int32)
        tail = tf.strings.substr(words[at], tf.strings.length(example["span2_text"]), -1)
        marked = tf.strings.join(["*", example["span2_text"], "*", tail])
        inputs = tf.strings.reduce_join(
            tf.concat([["wsc:"], words[:at], [marked], words[at + 1:]], 0), separator=" ")
        return {"inputs": inputs, "targets": example["span1_text"], "label": example["label"],
                "idx": example["idx"]}

    if right_only:
        dataset = dataset.filter(plain(lambda example: example["label"] == 1))
    return dataset.map(plain(example_of))


@each
def definite_pronoun(example):
    """Definite Pronoun Resolution: "wsc: Bob asked Tom if *he* …" -> "Tom"."""
    pattern = tf.strings.join([r" (\Q", example["pronoun"], r"\E)( |\.|,)"])
    marked = tf.strings.regex_replace(example["sentence"], pattern, r" *\1*\2",
                                      replace_global=False)
    return {"inputs": tf.strings.join(["wsc:", marked], separator=" "),
            "targets": example["candidates"][example["label"]]}


_DETERMINERS = frozenset("a an few her his each every many much my our some that the their these "
                         "this those which whose your".split())


def wsc_answer(text: str, example=None, is_target: bool = False) -> int:
    """The label for a target; for a prediction whether it names the candidate noun.

    One must contain the other's words, determiners aside; "Bob" is not "Bob's hat". A prediction
    of no other words is -1, wrong whatever the label.
    """
    if is_target:
        return int(example["label"])
    candidate = text_to_text.example_text(example, "targets_pretokenized")
    words = [{w for w in t.strip().lower().split() if w not in _DETERMINERS}
             for t in (text, candidate)]
    if not words[0]:
        return -1
    possessive = ["'" in " ".join(w) for w in words]
    return int(possessive[0] == possessive[1]
               and (words[0] <= words[1] or words[1] <= words[0]))


# --- postprocessors of groups ---------------------------------------------------------------

def grouped(value: Callable) -> Callable[..., dict]:
    """A postprocessor: {"value": value(text, …)}, with the target's "group"."""
    def postprocess(text: str, example=None, is_target: bool = False) -> dict:
        made = {"value": value(text, example=example, is_target=is_target)}
        return {**made, "group": example["group"]} if is_target else made
    return postprocess


def _format_of(name: str, label_names: Sequence[str]) -> Format:
    if name == "axb":   # the diagnostic sets are read as MNLI and RTE
        return classification("rte", label_names, renamed=(("sentence1", "premise"),
                                                           ("sentence2", "hypothesis")))
    benchmark = ("mnli" if name.startswith("mnli") or name == "ax" else
                 "rte" if name == "axg" else name)
    names = ("sentence1", "sentence2", "word") if name == "wic" else (
        ("hypothesis", "premise") if name == "axg" else ())
    return classification(benchmark, label_names, names)


def _register() -> None:
    rates = {"glue": [("glue_stsb", _STSB_EXAMPLES)], "super_glue": []}
    for suite, version, table in (("glue", "2.0.0", GLUE), ("super_glue", "1.0.2", SUPER_GLUE)):
        for name, (label_names, metric_fns, size) in table.items():
            splits = _MNLI_SPLITS if name == "mnli" else _SPLITS.get(name, _LABELLED)
            text_to_text.register(
                f"{suite}_{name}", TfdsSource(f"{suite}/{name}:{version}", splits),
                _format_of(name, label_names), metric_fns=metric_fns,
                postprocess_fn=text_to_text.class_number(label_names))
            if size:
                rates[suite].append((f"{suite}_{name}", size))
    text_to_text.register(
        "glue_stsb", TfdsSource("glue/stsb:2.0.0", _LABELLED), stsb,
        metric_fns=[task_metrics.pearson, task_metrics.spearman], postprocess_fn=text_to_text.number)
    text_to_text.register(
        "super_glue_multirc", TfdsSource("super_glue/multirc:1.0.2", _LABELLED), multirc,
        metric_fns=[task_metrics.multirc_f1, task_metrics.group_exact_match],
        postprocess_fn=grouped(text_to_text.class_number(_BOOLEAN)))
    text_to_text.register(
        "super_glue_record", TfdsSource("super_glue/record:1.0.2", _LABELLED), record,
        metric_fns=[task_metrics.first_of_group(task_metrics.squad)],
        postprocess_fn=grouped(text_to_text.answers))
    wsc_source = lambda *splits: TfdsSource("super_glue/wsc.fixed:1.0.2", splits)
    text_to_text.register("super_glue_wsc_train", wsc_source("train"),
                          lambda dataset: wsc(dataset, right_only=True))
    text_to_text.register("super_glue_wsc_eval", wsc_source("validation", "test"),
                          lambda dataset: wsc(dataset, right_only=False),
                          metric_fns=[task_metrics.accuracy], postprocess_fn=wsc_answer)
    text_to_text.register(
        "dpr", TfdsSource("definite_pronoun_resolution:1.1.0", ("train", "test")),
        definite_pronoun, metric_fns=[task_metrics.accuracy])
    rates["super_glue"] += [
        ("super_glue_multirc", _MULTIRC_EXAMPLES), ("super_glue_record", _RECORD_EXAMPLES),
        ("super_glue_wsc_train", _WSC_EXAMPLES), ("dpr", _DPR_EXAMPLES)]
    for suite, tasks in rates.items():
        seqio.MixtureRegistry.add(f"{suite}_proportional", [(n, float(r)) for n, r in tasks])


_register()
