"""Reading, summarisation and translation as T5 does them (Raffel et al. 2020, arXiv:1910.10683).

    squad, squad_context_free, xquad_en…    "question: … context: …" -> the first answer
    cnn_dailymail, xsum, scitldr            "summarize: …"
    wmt14_ende, wmt14_enfr, wmt15_enfr, wmt16_enro, wmt_t2t_ende    "translate English to German: …"
"""

from collections.abc import Iterator

import tensorflow as tf

from t5x_lite.data import readers, records, task_metrics, text_to_text
from t5x_lite.data.preprocessors import Format, each
from t5x_lite.data.text_to_text import TfdsSource

XQUAD_LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ru", "th", "tr", "vi", "zh")
_LANGUAGES = {"de": "German", "en": "English", "fr": "French", "ro": "Romanian"}
_SPLITS = ("train", "validation", "test")


# What gets spaces around it. RE2, which TensorFlow's patterns are for, knows ASCII alone in \w and
# \W: every letter of Chinese or Russian would be set apart by the latter, and the ç of François.
ASCII_PUNCTUATION = r"([[:punct:]])"             # T5's squad today; that of 2019 had \W
ALL_PUNCTUATION = r"([^_\s\p{N}\p{L}\p{M}])"    # mT5's xquad, of any script


def pad_punctuation(text: tf.Tensor, pattern: str = ASCII_PUNCTUATION) -> tf.Tensor:
    """The text with spaces around what the pattern's first group matches, and no two in a row."""
    padded = tf.strings.regex_replace(text, pattern, r" \1 ")
    return tf.strings.regex_replace(padded, r"\s+", " ")


@each
def squad(example):
    """SQuAD -> "question: … context: …", ASCII's punctuation set apart, the first answer."""
    return _with_context(example, ASCII_PUNCTUATION)


@each
def xquad(example):
    """XQuAD, MLQA, TyDi QA -> "question: … context: …" as mT5 has it: any script's punctuation
    set apart, the first answer."""
    return _with_context(example, ALL_PUNCTUATION)


def _with_context(example, pattern: str):
    return _squad(example, ["question:", pad_punctuation(example["question"], pattern), "context:",
                            pad_punctuation(example["context"], pattern)], pattern)


@each
def squad_context_free(example):
    """SQuAD without its passage: "squad trivia question: …"."""
    return _squad(example, ["squad trivia question:", pad_punctuation(example["question"])])


def _squad(example, parts, pattern: str = ASCII_PUNCTUATION):
    answers = pad_punctuation(example["answers"]["text"], pattern)
    inputs = tf.strings.regex_replace(tf.strings.join(parts, separator=" "), r"\s+", " ")
    return {"inputs": inputs, "targets": answers[0], "answers": answers, "id": example["id"]}


def summarize(article: str, summary: str) -> Format:
    """A format: "summarize: article" -> summary, from the features of those names."""
    @each
    def format_fn(example):
        return {"inputs": tf.strings.join(["summarize:", example[article]], separator=" "),
                "targets": example[summary]}
    return format_fn


def translate(source: str, target: str) -> Format:
    """A format: "translate English to German: …", from the features named by language codes."""
    prefix = f"translate {_LANGUAGES[source]} to {_LANGUAGES[target]}: "

    @each
    def format_fn(example):
        return {"inputs": tf.strings.join([prefix, example[source]]), "targets": example[target]}
    return format_fn


def read_scitldr(path: str) -> Iterator[tuple[str, list[str]]]:
    """(abstract, summaries) of SciTLDR's files: sentences in "source", summaries in "target"."""
    for number, record in readers.json_lines(path):
        where = f"{path}, line {number}"
        source = readers.strings(record, "source", where)
        yield " ".join(source), readers.strings(record, "target", where)


def _scitldr_files() -> dict[str, list[str]]:
    origin = "https://github.com/allenai/scitldr/tree/master/SciTLDR-Data/SciTLDR-A"
    return {"validation": [records.published("scitldr.dev.jsonl", origin)]}


def _scitldr(dataset: tf.data.Dataset) -> tf.data.Dataset:
    unpacked = records.unpack(("article", "answers"), lists=("answers",))(dataset)
    return each(lambda x: {"inputs": tf.strings.join(["summarize:", x["article"]], separator=" "),
                           "targets": x["answers"][0]})(unpacked)


def read_squad(path: str) -> Iterator[tuple[str, str, str, list[str]]]:
    """(id, question, context, answers) of a file in SQuAD's JSON format (v1.1, XQuAD)."""
    articles = readers.field(readers.json_file(path), "data", path, list)
    for number, article in enumerate(articles, 1):
        where = f"{path}, article {number}"
        for paragraph in readers.field(article, "paragraphs", where, list):
            context = readers.field(paragraph, "context", where)
            for question in readers.field(paragraph, "qas", where, list):
                answers = readers.field(question, "answers", where, list)
                yield (readers.field(question, "id", where),
                       readers.field(question, "question", where), context,
                       [readers.field(answer, "text", where) for answer in answers])


def _register() -> None:
    answered = dict(metric_fns=[task_metrics.squad], postprocess_fn=text_to_text.answers)
    source = TfdsSource("squad/v1.1:3.0.0", ("train", "validation"))
    text_to_text.register("squad", source, squad, **answered)
    text_to_text.register("squad_context_free", source, squad_context_free, **answered)
    for language in XQUAD_LANGUAGES:
        text_to_text.register(f"xquad_{language}", TfdsSource(
            f"xquad/{language}:3.0.0", {"validation": "test"}), xquad, **answered)
    text_to_text.register("cnn_dailymail", TfdsSource("cnn_dailymail:3.4.0", _SPLITS),
                          summarize("article", "highlights"), metric_fns=[task_metrics.rouge])
    text_to_text.register("xsum", TfdsSource("xsum:1.1.0", _SPLITS),
                          summarize("document", "summary"), metric_fns=[task_metrics.rouge])
    text_to_text.register(
        "scitldr", records.RecordSource("scitldr", _scitldr_files, read_scitldr,
                                        splits=("validation",)),
        _scitldr, metric_fns=[task_metrics.rouge])
    for name, other, tfds_name in (
            ("wmt14_ende", "de", "wmt14_translate/de-en:1.0.0"),
            ("wmt14_enfr", "fr", "wmt14_translate/fr-en:1.0.0"),
            ("wmt15_enfr", "fr", "wmt15_translate/fr-en:1.0.0"),
            ("wmt16_enro", "ro", "wmt16_translate/ro-en:1.0.0"),
            ("wmt_t2t_ende", "de", "wmt_t2t_translate/de-en:1.0.0")):
        text_to_text.register(name, TfdsSource(tfds_name, _SPLITS), translate("en", other),
                              metric_fns=[task_metrics.bleu])


_register()
