"""Multiple choice by log-probability: the model scores each choice, the highest one counts.

    piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa, race_middle, race_high
    mmlu, siqa, truthfulqa, fever, multifc, raft         from files below T5X_LITE_FILES
    rank_classification.register(name, source, format_fn)                 your own

A question makes one example a choice: "inputs" the question, "targets" the choice, and for the
metric "question" (which one), "is_correct", "length" (UTF-8 bytes). Prompts are those of Brown et
al. 2020 (arXiv:2005.14165, appendix G), where it has them. Files hold one JSON object a line,
{"question": …, "choices": […], "label": 0}; `piqa` reads the data set's own two files.
"""

import functools
from collections.abc import Callable, Iterator

import seqio
import tensorflow as tf

from t5x_lite.errors import UserError
from tasks import metrics, records, text_to_text
from tasks.text_to_text import TfdsSource

_plain = tf.autograph.experimental.do_not_convert

# question, choices [n], label: the strings and the number that a record becomes
Question = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


def choices(read: Callable[[dict], Question]) -> text_to_text.Format:
    """A format: each record, as `read` takes it apart, becomes one example a choice."""
    def format_fn(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def of_question(number, record):
            question, texts, label = read(record)
            count = tf.size(texts)
            is_correct = tf.range(count) == tf.cast(label, tf.int32)
            return tf.data.Dataset.from_tensor_slices((texts, is_correct)).map(_plain(
                lambda text, right: {"inputs": question, "targets": text, "question": number,
                                     "is_correct": right,
                                     "length": tf.strings.length(text)}))
        return dataset.enumerate().flat_map(_plain(of_question))
    return format_fn


def choice(text: str, example=None, is_target: bool = False):
    """The postprocessor: what metrics.rank_classification compares."""
    if not is_target:
        return text
    return {name: example[name] for name in ("question", "is_correct", "length")}


def register(name: str, source: seqio.DataSource, format_fn: text_to_text.Format) -> seqio.Task:
    """Adds a task that is scored by metrics.rank_classification."""
    return text_to_text.register(name, source, format_fn, postprocess_fn=choice,
                                 metric_fns=[metrics.rank_classification])


def prompt(question: tf.Tensor) -> tf.Tensor:
    """"Question: … Answer:", the frame of most of GPT-3's prompts."""
    return tf.strings.join(["Question: ", question, "\nAnswer:"])


# --- TFDS ------------------------------------------------------------------------------------

def _hellaswag(record) -> Question:
    return record["context"], record["endings"], record["label"]


def _winogrande(record) -> Question:
    """Partial evaluation: the choices are the sentence's beginning with an option in its gap,
    and what follows the gap; here the whole sentence is the target (Trinh & Le 2018)."""
    parts = tf.strings.split(record["sentence"], "_")
    fill = lambda option: tf.strings.join([parts[0], option, parts[1]])
    return tf.constant(""), tf.stack([fill(record["option1"]), fill(record["option2"])]), record[
        "label"]


def _arc(record) -> Question:
    # TFDS numbers the labels A … E and 1 … 4 together; the right choice has the answer's label.
    right = tf.argmax(tf.cast(record["choices"]["label"] == record["answerKey"], tf.int32))
    return prompt(record["question"]), record["choices"]["text"], right


def _openbookqa(record) -> Question:
    question = record["question"]
    return question["stem"], tf.stack([question[f"choice_{c}"] for c in "ABCD"]), record[
        "answerKey"]


def _race(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """RACE holds several questions an article: taken apart first."""
    def questions(record):
        return tf.data.Dataset.range(tf.cast(tf.size(record["questions"]), tf.int64)).map(_plain(
            lambda i: {"article": record["article"], "question": record["questions"][i],
                       "options": record["options"][i],
                       "label": tf.strings.unicode_decode(record["answers"][i], "UTF-8")[0] - 65}))

    def read(record) -> Question:
        inputs = tf.strings.join(["Article: ", record["article"], "\n\nQ: ", record["question"],
                                  "\n\nA:"])
        return inputs, record["options"], record["label"]

    return choices(read)(dataset.flat_map(_plain(questions)))


# --- files -----------------------------------------------------------------------------------

FROM_FILES = {   # name: where its questions come from, in {"question", "choices", "label"} lines
    "mmlu": "https://github.com/hendrycks/test",
    "siqa": "https://leaderboard.allenai.org/socialiqa",
    "truthfulqa": "https://github.com/sylinrl/TruthfulQA",
    "fever": "https://fever.ai (choices SUPPORTS, REFUTES, NOT ENOUGH INFO)",
    "multifc": "https://copenlu.github.io/publication/2019_emnlp_augenstein",
    "raft": "https://huggingface.co/datasets/ought/raft",
}
_PIQA_ORIGIN = "https://yonatanbisk.com/piqa"


def read_questions(path: str) -> Iterator[tuple[str, list[str], str]]:
    """(question, choices, label) of a .jsonl file; UserError names the line that is malformed."""
    for number, record in records.json_lines(path):
        where = f"{path}, line {number}"
        question, texts, label = (record.get(k) for k in ("question", "choices", "label"))
        if not isinstance(question, str) or not isinstance(texts, list) or not texts or not all(
                isinstance(t, str) and t for t in texts):
            raise UserError(f'{where} must hold a string "question" and a list of strings "choices"')
        if not isinstance(label, int) or not 0 <= label < len(texts):
            raise UserError(f'{where} has "label" {label!r}; it must number one of its '
                            f"{len(texts)} choices from 0")
        yield question, texts, str(label)


def read_piqa(path: str) -> Iterator[tuple[str, list[str], str]]:
    """(goal, solutions, label) of piqa.valid.jsonl with piqa.valid-labels.lst beside it."""
    with open(path.removesuffix(".jsonl") + "-labels.lst", encoding="utf-8") as file:
        labels = file.read().split()
    goals = [record for _, record in records.json_lines(path)]
    if len(goals) != len(labels):
        raise UserError(f"{path} has {len(goals)} questions, but there are {len(labels)} labels")
    for record, label in zip(goals, labels):
        yield record["goal"], [record["sol1"], record["sol2"]], label


def _from_records(dataset: tf.data.Dataset) -> tf.data.Dataset:
    unpacked = records.unpack(("question", "choices", "label"), lists=("choices",))(dataset)
    return choices(lambda r: (prompt(r["question"]), r["choices"],
                              tf.strings.to_number(r["label"], tf.int32)))(unpacked)


def _files(name: str, origin: str) -> dict[str, list[str]]:
    return {"validation": [records.published(name, origin)]}


def _register() -> None:
    splits = ("train", "validation")
    register("hellaswag", TfdsSource("hellaswag:1.1.0", splits), choices(_hellaswag))
    register("winogrande", TfdsSource("winogrande:1.2.0", {
        "train": "train_xl", "validation": "validation"}), choices(_winogrande))
    for name, config in (("easy", "ARC-Easy"), ("challenge", "ARC-Challenge")):
        register(f"arc_{name}", TfdsSource(f"ai2_arc/{config}:1.0.0", (*splits, "test")),
                 choices(_arc))
    register("openbookqa", TfdsSource("openbookqa:0.1.0", (*splits, "test")), choices(_openbookqa))
    for name in ("middle", "high"):
        register(f"race_{name}", TfdsSource(f"race/{name}:2.0.0", {
            "train": "train", "validation": "dev", "test": "test"}), _race)
    register("piqa", records.RecordSource(
        "piqa", functools.partial(_files, "piqa.valid.jsonl", _PIQA_ORIGIN), read_piqa,
        splits=("validation",)), _from_records)
    for name, origin in FROM_FILES.items():
        register(name, records.RecordSource(
            name, functools.partial(_files, f"{name}.jsonl", origin), read_questions,
            splits=("validation",)), _from_records)


_register()
