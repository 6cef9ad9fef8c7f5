"""Multiple choice by log-probability: the model scores each choice, the highest one counts.

    winogrande_partial, copa_partial    an input for each choice, the same target for all
    piqa, hellaswag, copa_ranked, winogrande, arc_easy, arc_challenge, openbookqa, race_middle, race_high
    mmlu, siqa, truthfulqa, fever, multifc, raft         from files below T5X_LITE_FILES, as their
                                                         authors give them (choice_files.py)
    NAME_choices                                         the same to train on, see below
    register_files(name, {"train": [path], …})           your own, both of them

A question makes one example a choice: "inputs" the question, "targets" the choice, and for the
metric "question" (which one), "is_correct", "length" (UTF-8 bytes). In NAME_choices it makes one
example: all choices one after another, the right one first, each with its EOS, which is what
objective.name=choices trains on (T-Few, Liu et al. 2022). Prompts are those of Brown et
al. 2020 (arXiv:2005.14165, appendix G), where it has them.
"""


import tensorflow as tf

from t5x_lite.data import choice_files
from t5x_lite.data.choices import Question, _plain, register, register_files, register_partial
from t5x_lite.data.text_to_text import TfdsSource


def prompt(question: tf.Tensor) -> tf.Tensor:
    """"Question: … Answer:", the frame of most of GPT-3's prompts."""
    return tf.strings.join(["Question: ", question, "\nAnswer:"])


# --- TFDS ------------------------------------------------------------------------------------

def _hellaswag(record) -> Question:
    return record["context"], record["endings"], record["label"]


def _winogrande(record) -> Question:
    """The whole sentence with either option in its gap is a choice; no input."""
    parts = tf.strings.split(record["sentence"], "_")
    fill = lambda option: tf.strings.join([parts[0], option, parts[1]])
    return tf.constant(""), tf.stack([fill(record["option1"]), fill(record["option2"])]), record[
        "label"]


def _winogrande_partial(record) -> Question:
    """The sentence's beginning with either option is the input, what follows the gap the target."""
    parts = tf.strings.split(record["sentence"], "_")
    fronts = tf.stack([parts[0] + record["option1"], parts[0] + record["option2"]])
    rest = tf.strings.strip(parts[1])
    return fronts, tf.stack([rest, rest]), record["label"]


def _copa(record) -> Question:
    """"The man broke his toe because" -> either choice, as Brown et al. 2020 ask."""
    premise = tf.strings.regex_replace(record["premise"], r"\.?\s*$", "")
    word = tf.where(record["question"] == "cause", " because", " so")
    return premise + word, tf.stack([_small(record["choice1"]), _small(record["choice2"])]), record[
        "label"]


def _copa_partial(record) -> Question:
    """Either choice as a cause or an effect is the input, the premise the target."""
    texts = [tf.strings.regex_replace(record[c], r"\.?\s*$", "") for c in ("choice1", "choice2")]
    word = tf.where(record["question"] == "cause", " so", " because")
    premise = tf.strings.strip(_small(record["premise"]))
    return tf.stack([text + word for text in texts]), tf.stack([premise, premise]), record["label"]


def _small(text: tf.Tensor) -> tf.Tensor:
    """The text with a small first letter, but for "I"."""
    first = tf.strings.lower(tf.strings.substr(text, 0, 1, unit="UTF8_CHAR"), encoding="utf-8")
    rest = tf.strings.substr(text, 1, tf.strings.length(text, unit="UTF8_CHAR"), unit="UTF8_CHAR")
    return tf.where(tf.strings.regex_full_match(text, r"(?s)I\b.*"), text, first + rest)


def _arc(record) -> Question:
    # TFDS numbers the labels A … E and 1 … 4 together; the right choice has the answer's label.
    right = tf.argmax(tf.cast(record["choices"]["label"] == record["answerKey"], tf.int32))
    return prompt(record["question"]), record["choices"]["text"], right


def _openbookqa(record) -> Question:
    question = record["question"]
    return question["stem"], tf.stack([question[f"choice_{c}"] for c in "ABCD"]), record[
        "answerKey"]


def _race(record) -> Question:
    inputs = tf.strings.join(["Article: ", record["article"], "\n\nQ: ", record["question"],
                              "\n\nA:"])
    return inputs, record["options"], record["label"]


def _each_question(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """RACE holds several questions an article: taken apart first."""
    def questions(record):
        return tf.data.Dataset.range(tf.cast(tf.size(record["questions"]), tf.int64)).map(_plain(
            lambda i: {"article": record["article"], "question": record["questions"][i],
                       "options": record["options"][i],
                       "label": tf.strings.unicode_decode(record["answers"][i], "UTF-8")[0] - 65}))
    return dataset.flat_map(_plain(questions))


# --- files -----------------------------------------------------------------------------------


def _register() -> None:
    splits = ("train", "validation")
    register("hellaswag", TfdsSource("hellaswag:1.1.0", splits), _hellaswag)
    register("winogrande", TfdsSource("winogrande:1.2.0", {
        "train": "train_xl", "validation": "validation"}), _winogrande)
    register_partial("winogrande_partial", TfdsSource(
        "winogrande:1.2.0", ("validation",)), _winogrande_partial)
    copa = TfdsSource("super_glue/copa:1.0.2", splits)
    register("copa_ranked", copa, _copa)
    register_partial("copa_partial", copa, _copa_partial)
    for name, config in (("easy", "ARC-Easy"), ("challenge", "ARC-Challenge")):
        register(f"arc_{name}", TfdsSource(f"ai2_arc/{config}:1.0.0", (*splits, "test")),
                 _arc)
    register("openbookqa", TfdsSource("openbookqa:0.1.0", (*splits, "test")), _openbookqa)
    for name in ("middle", "high"):
        register(f"race_{name}", TfdsSource(f"race/{name}:2.0.0", {
            "train": "train", "validation": "dev", "test": "test"}), _race, _each_question)
    for name, published in choice_files.PUBLISHED.items():
        register_files(name, published.files, published.read, published.globs, published.keep)


_register()
