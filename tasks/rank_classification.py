"""Multiple choice by log-probability: the model scores each choice, the highest one counts.

    piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa, race_middle, race_high
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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import seqio
import tensorflow as tf

from t5x_lite.errors import UserError
from tasks import choice_files, metrics, preprocessors, records, text_to_text
from tasks.text_to_text import TfdsSource

_plain = tf.autograph.experimental.do_not_convert

# question, choices [n], label: the strings that a record becomes, and the number of the right one
# (or numbers [m] of those that are right)
Question = tuple[tf.Tensor, tf.Tensor, tf.Tensor]

Read = Callable[[dict], Question]


def choices(read: Read) -> text_to_text.Format:
    """A format: each record, as `read` takes it apart, becomes one example a choice."""
    def format_fn(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def of_question(number, record):
            question, texts, label = read(record)
            count = tf.size(texts)
            is_correct = _right(count, label)
            return tf.data.Dataset.from_tensor_slices((texts, is_correct)).map(_plain(
                lambda text, right: {"inputs": question, "targets": text, "question": number,
                                     "is_correct": right,
                                     "length": tf.strings.length(text)}))
        return dataset.enumerate().flat_map(_plain(of_question))
    return format_fn


def _right(count: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """bool [count]: which choices are right."""
    return tf.reduce_any(tf.range(count)[:, None] == tf.reshape(tf.cast(label, tf.int32), [1, -1]),
                         axis=1)


def together(read: Read) -> text_to_text.Format:
    """A format: each record becomes one example, whose "targets" [n] are its choices, the right one
    first. Of several right ones it keeps the first."""
    def example(record):
        question, texts, label = read(record)
        right = _right(tf.size(texts), label)
        kept = [texts[right][:1], texts[~right]]
        return {"inputs": question, "targets": tf.concat(kept, 0)}
    return text_to_text.each(example)


def choice(text: str, example=None, is_target: bool = False):
    """The postprocessor: what metrics.rank_classification compares."""
    if not is_target:
        return text
    return {name: example[name] for name in ("question", "is_correct", "length")}


def register(name: str, source: seqio.DataSource, read: Read,
             before: text_to_text.Format = lambda dataset: dataset) -> seqio.Task:
    """Adds a task that is scored by metrics.rank_classification, and NAME_choices to train on.

    before: applied to the records first.
    """
    seqio.TaskRegistry.add(
        f"{name}_choices", source=source,
        preprocessors=[lambda dataset: together(read)(before(dataset)),
                       preprocessors.tokenize_choices, seqio.preprocessors.append_eos_after_trim],
        output_features=text_to_text.features())
    return text_to_text.register(
        name, source, lambda dataset: choices(read)(before(dataset)), postprocess_fn=choice,
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


def framed(path: str) -> Iterator[tuple[str, list[str], str]]:
    """read_questions with each question in GPT-3's frame."""
    for question, texts, label in read_questions(path):
        yield choice_files.prompt(question), texts, label


def _from_record(record) -> Question:
    return record["question"], record["choices"], tf.strings.to_number(
        tf.strings.split(record["label"], ","), tf.int32)


_unpacked = records.unpack(("question", "choices", "label"), lists=("choices",))


def of_records(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """A format: packed (inputs, choices, "number" or "number,number" of the right ones) -> an
    example a choice."""
    return choices(_from_record)(_unpacked(dataset))


def register_files(name: str, files: Mapping[str, Sequence[str]] | Callable[[], Mapping],
                   read: Callable[[str], Iterable] = framed, splits: Iterable[str] = (),
                   keep: Callable[[str, int], bool] | None = None) -> seqio.Task:
    """Adds the tasks of some files, as `read` gives their (inputs, choices, number of the right).

    By default a line is {"question": …, "choices": […], "label": 0}. files, keep: see
    RecordSource.
    """
    source = records.RecordSource(name, files, read, splits, "keep" if keep else "", keep)
    return register(name, source, _from_record, _unpacked)


def _register() -> None:
    splits = ("train", "validation")
    register("hellaswag", TfdsSource("hellaswag:1.1.0", splits), _hellaswag)
    register("winogrande", TfdsSource("winogrande:1.2.0", {
        "train": "train_xl", "validation": "validation"}), _winogrande)
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
