"""Closed-book question answering (Roberts et al. 2020, arXiv:2002.08910), the paper's tasks.

    natural_questions_open, web_questions_open, trivia_qa_open    held out: a part of train
    …_open_test                                                   all of train; the public test
    natural_questions_open_randanswer, web_questions_open_randanswer    any answer is a target,
                                        another one each epoch, instead of the first
    open_domain_qa, open_domain_qa_test mixtures of the three, by numbers of examples

Formats are the authors': "nq question: …", "wq question: …", "trivia_qa question: …" and the
first answer. Splits follow ORQA: 79,168 of NQ's 87,925 questions, 3,417 of WebQuestions' 3,778
and 78,785 of TriviaQA's 87,622 are trained on. Scores are exact match and F1 over all answers
after SQuAD's normalisation, TriviaQA's for its own.

TriviaQA's public test set has no answers: its validation split is the test here, and
trivia_qa_open_test trains on train + validation as the paper does for the leaderboard.
"""

import seqio
import tensorflow as tf

from t5x_lite.data import task_metrics, text_to_text
from t5x_lite.data.preprocessors import each
from t5x_lite.data.text_to_text import TfdsSource


@each
def natural_questions(example):
    """NQ-open -> inputs, targets (the first answer), answers."""
    return _question("nq question: ", example["question"], example["answer"])


@each
def web_questions(example):
    """WebQuestions -> inputs, targets (the first answer), answers."""
    return _question("wq question: ", example["question"], example["answers"])


@each
def trivia_qa(example):
    """TriviaQA -> inputs, targets (the answer's usual form), answers (all aliases)."""
    made = _question("trivia_qa question: ", example["question"], example["answer"]["aliases"])
    return {**made, "targets": example["answer"]["value"]}


def _question(prefix: str, question, answers):
    return {"inputs": tf.strings.join([prefix, question]), "targets": answers[0],
            "answers": answers}


@seqio.map_over_dataset(num_seeds=1)
def sample_answer(example, seed):
    """One of the answers as the target, drawn anew each time the example comes up."""
    answers = example["answers"]
    chosen = tf.random.stateless_uniform([], seed, 0, tf.size(answers), tf.int32)
    return {**example, "targets": answers[chosen]}


_NQ, _WQ = "natural_questions_open:1.0.0", "web_questions:1.0.0"
_TRIVIA = "trivia_qa/unfiltered.nocontext:1.1.0"
_HELD_OUT = {   # task: (TFDS name, splits, format, metric)
    "natural_questions_open": (_NQ, {"train": "train[:79168]", "validation": "train[79168:]",
                                     "test": "validation"}, natural_questions, task_metrics.squad),
    "web_questions_open": (_WQ, {"train": "train[:3417]", "validation": "train[3417:]",
                                 "test": "test"}, web_questions, task_metrics.squad),
    "trivia_qa_open": (_TRIVIA, {"train": "train[:78785]", "validation": "train[78785:]",
                                 "test": "validation"}, trivia_qa, task_metrics.trivia_qa),
}
_TEST_SPLITS = {
    "natural_questions_open": {"train": "train", "validation": "validation"},
    "web_questions_open": {"train": "train", "validation": "test"},
    "trivia_qa_open": {"train": "train+validation", "test": "test"},
}
_SIZES = {   # training examples: (held out, all)
    "natural_questions_open": (79_168, 87_925),
    "web_questions_open": (3_417, 3_778),
    "trivia_qa_open": (78_785, 98_935),
}


def sampled(format_fn):
    """The format with sample_answer behind it."""
    def format_and_sample(dataset):
        return sample_answer(format_fn(dataset))
    return format_and_sample


def _register() -> None:
    for name, (tfds_name, splits, format_fn, metric) in _HELD_OUT.items():
        common = dict(metric_fns=[metric], postprocess_fn=text_to_text.answers)
        text_to_text.register(name, TfdsSource(tfds_name, splits), format_fn, **common)
        text_to_text.register(f"{name}_test", TfdsSource(tfds_name, _TEST_SPLITS[name]),
                              format_fn, **common)
        if name != "trivia_qa_open":   # its aliases are variants of one answer
            text_to_text.register(f"{name}_randanswer", TfdsSource(tfds_name, splits),
                                  sampled(format_fn), **common)
    for i, suffix in enumerate(("", "_test")):
        seqio.MixtureRegistry.add(f"open_domain_qa{suffix}", [
            (f"{name}{suffix}", float(sizes[i])) for name, sizes in _SIZES.items()])


_register()
