"""Multiple choice as examples: one a choice, or all choices of a question together."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import seqio
import tensorflow as tf

from t5x_lite.data import preprocessors, readers, records, task_metrics, text_to_text
from t5x_lite.errors import UserError

_plain = tf.autograph.experimental.do_not_convert
# question (or an input [n] for each choice), choices [n], label: the strings that a record becomes,
# and the number of the right one (or numbers [m] of those that are right)
Question = tuple[tf.Tensor, tf.Tensor, tf.Tensor]
Read = Callable[[dict], Question]


def choices(read: Read) -> preprocessors.Format:
    """A format: each record, as `read` takes it apart, becomes one example a choice."""
    def format_fn(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def of_question(number, record):
            question, texts, label = read(record)
            is_correct = _right(tf.size(texts), label)
            inputs = tf.broadcast_to(question, tf.shape(texts))   # one for all, or each its own
            return tf.data.Dataset.from_tensor_slices((inputs, texts, is_correct)).map(_plain(
                lambda inputs, text, right: {"inputs": inputs, "targets": text, "question": number,
                                             "is_correct": right,
                                             "length": tf.strings.length(text)}))
        return dataset.enumerate().flat_map(_plain(of_question))
    return format_fn


def _right(count: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """bool [count]: which choices are right."""
    return tf.reduce_any(tf.range(count)[:, None] == tf.reshape(tf.cast(label, tf.int32), [1, -1]),
                         axis=1)


def together(read: Read) -> preprocessors.Format:
    """A format: each record becomes one example, whose "targets" [n] are its choices, the right one
    first. Of several right ones it keeps the first."""
    def example(record):
        question, texts, label = read(record)
        right = _right(tf.size(texts), label)
        kept = [texts[right][:1], texts[~right]]
        return {"inputs": question, "targets": tf.concat(kept, 0)}
    return preprocessors.each(example)


def choice(text: str, example=None, is_target: bool = False):
    """The postprocessor: what metrics.rank_classification compares."""
    if not is_target:
        return text
    return {name: example[name] for name in ("question", "is_correct", "length")}


def register(name: str, source: seqio.DataSource, read: Read,
             before: preprocessors.Format = lambda dataset: dataset) -> seqio.Task:
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
        metric_fns=[task_metrics.rank_classification])


def register_partial(name: str, source: seqio.DataSource, read: Read) -> seqio.Task:
    """Adds a task whose choices stand in the inputs, and whose target is what follows them: partial
    evaluation (Trinh & Le 2018, arXiv:1806.02847). There is no NAME_choices, which would read one
    input for all choices."""
    return text_to_text.register(name, source, choices(read), postprocess_fn=choice,
                                 metric_fns=[task_metrics.rank_classification])


def _from_record(record) -> Question:
    return record["question"], record["choices"], tf.strings.to_number(
        tf.strings.split(record["label"], ","), tf.int32)


_unpacked = records.unpack(("question", "choices", "label"), lists=("choices",))


def of_records(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """A format: packed (inputs, choices, "number" or "number,number" of the right ones) -> an
    example a choice."""
    return choices(_from_record)(_unpacked(dataset))


def read_questions(path: str) -> Iterator[tuple[str, list[str], str]]:
    """(question, choices, label) of a .jsonl file; UserError names the line that is malformed."""
    for number, record in readers.json_lines(path):
        where = f"{path}, line {number}"
        question, texts, label = (record.get(k) for k in ("question", "choices", "label"))
        if not isinstance(question, str) or not isinstance(texts, list) or not texts or not all(
                isinstance(t, str) and t for t in texts):
            raise UserError(f'{where} must hold a string "question" and a list of strings "choices"')
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(texts):
            raise UserError(f'{where} has "label" {label!r}; it must number one of its '
                            f"{len(texts)} choices from 0")
        yield question, texts, str(label)


def framed(path: str) -> Iterator[tuple[str, list[str], str]]:
    """read_questions with each question in GPT-3's frame."""
    for question, texts, label in read_questions(path):
        yield records.prompt(question), texts, label


def register_files(name: str, files: Mapping[str, Sequence[str]] | Callable[[], Mapping],
                   read: Callable[[str], Iterable] = framed, splits: Iterable[str] = (),
                   keep: Callable[[str, int], bool] | None = None) -> seqio.Task:
    """Adds the tasks of some files, as `read` gives their (inputs, choices, number of the right).

    By default a line is {"question": …, "choices": […], "label": 0}. files, keep: see
    RecordSource.
    """
    source = records.RecordSource(name, files, read, splits, "keep" if keep else "", keep)
    return register(name, source, _from_record, _unpacked)
