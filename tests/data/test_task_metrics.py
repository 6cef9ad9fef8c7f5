"""Metrics of tasks: values drawn by hand, and T5's own ROUGE test case."""

import json

import numpy as np
import pytest

from t5x_lite.data import task_metrics
from t5x_lite.errors import UserError
from tests.helpers import golden


def test_squad_takes_the_best_answer_after_normalisation():
    found = task_metrics.squad([["The Beatles", "Fab Four"], ["u.s. army", "army"], ["x"]],
                          ["fab  four!", "a US navy", ""])
    # "us navy" against "us army": 1 of 2 words both ways, F1 = 1/2; an empty answer scores 0
    assert found == {"em": pytest.approx(100 / 3), "f1": pytest.approx(100 * 1.5 / 3)}


def test_trivia_qa_puts_spaces_for_punctuation():
    assert task_metrics.normalize_trivia_qa("Jean‘s “the” Mary-Kate_Ashley") == "jean s “ ” mary kate ashley"
    assert task_metrics.normalize_squad("Mary-Kate, the  U.S.") == "marykate us"
    assert task_metrics.trivia_qa([["mary kate"]], ["Mary-Kate"])["em"] == 100
    assert task_metrics.squad([["mary kate"]], ["Mary-Kate"])["em"] == 0


def test_answers_may_be_an_array_or_one_string():
    assert task_metrics.squad([np.array(["a b", "c"], object)], ["c"]) == {"em": 100, "f1": 100}
    assert task_metrics.squad(["Paris"], ["paris"])["em"] == 100


def test_token_f1_counts_repeated_words():
    assert task_metrics.token_f1("a a b", "a b b") == pytest.approx(2 * 2 / 6)
    assert task_metrics.token_f1("a", "") == task_metrics.token_f1("a", "b") == 0


def test_accuracy_and_classes():
    assert task_metrics.accuracy([1, 2, 3, 0], [1, 2, 0, -1]) == {"accuracy": 50}
    assert task_metrics.sequence_accuracy(["a b"], ["a b"]) == {"sequence_accuracy": 100}
    # a prediction of -1 is wrong either way: precision 1/2, recall 1/2
    assert task_metrics.f1([1, 1, 0], [1, -1, -1])["f1"] == pytest.approx(50)
    # F1 of the classes: 1, 2/3, 0 (never predicted right)
    assert task_metrics.mean_class_f1(3)([0, 1, 2], [0, 1, 1]) == {
        "mean_3class_f1": pytest.approx(100 * (1 + 2 / 3) / 3)}


def test_correlations():
    # Matthews of 2 true positives, 1 true negative, 1 false positive: (2*1-0) / sqrt(3*2*2*1)
    assert task_metrics.matthews([1, 1, 0, 0], [1, 1, 0, 1])["matthews_corrcoef"] == pytest.approx(
        100 * 2 / 12 ** 0.5)
    assert task_metrics.pearson([1, 2, 3], [2, 4, 6])["pearson_corrcoef"] == pytest.approx(100)
    assert task_metrics.spearman([1, 2, 3], [1, 10, 100])["spearman_corrcoef"] == pytest.approx(100)
    assert task_metrics.spearman([1, 2, 3], [5, 5, 5]) == {"spearman_corrcoef": 0}


def test_groups():
    targets = [{"group": (0, 1), "value": 1}, {"group": (0, 1), "value": 0},
               {"group": (0, 2), "value": 1}]
    found = [{"value": 1}, {"value": 1}, {"value": 1}]
    assert task_metrics.group_exact_match(targets, found) == {"exact_match": 50}
    assert task_metrics.multirc_f1(targets, found)["f1"] == pytest.approx(100 * 4 / 5)
    first = task_metrics.first_of_group(task_metrics.accuracy)
    assert first(targets, [{"value": 1}, {"value": 0}, {"value": 0}]) == {"accuracy": 50}


def test_bleu():
    text = "the cat sat on the mat today"
    assert task_metrics.bleu([text], [text])["bleu"] == pytest.approx(100)
    assert task_metrics.bleu([["something else", text]], [text])["bleu"] == pytest.approx(100)
    # 4-gram precisions 6/7, 4/6, 2/5, 1/4 by hand; lengths are equal
    found = task_metrics.bleu([text], ["the cat sat on a mat today"])["bleu"]
    assert found == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)


def test_rouge_of_t5s_bootstrap_case():
    targets, predictions = (golden(f"{name}_large.txt").read_text().splitlines()
                            for name in ("target", "prediction"))
    expected = json.loads(golden("expected_bootstrap_results.json").read_text())
    found = task_metrics.rouge(targets, predictions)
    assert found.keys() == expected.keys()
    for kind, value in expected.items():   # medians of other resamplings
        assert found[kind] == pytest.approx(value, abs=0.1), kind


def test_rouge_by_hand_and_repeatable():
    found = task_metrics.rouge(["a b c d"], ["a b x d"])
    assert found["rouge1"] == pytest.approx(75) and found["rouge2"] == pytest.approx(100 / 3)
    many = (["a b c", "d e f", "g"], ["a b", "d x f", "h"])
    assert task_metrics.rouge(*many) == task_metrics.rouge(*many)


def test_rank_classification():
    choice = lambda q, correct, length: {"question": q, "is_correct": correct, "length": length}
    targets = [choice(0, True, 10), choice(0, False, 2), choice(1, False, 1), choice(1, True, 1)]
    # question 0: -4 loses to -2 outright, and wins by length (-0.4 to -1)
    assert task_metrics.rank_classification(targets, [-4.0, -2.0, -1.0, -0.5]) == {
        "accuracy": 50, "accuracy_by_length": 100}


def test_language_model_metrics():
    assert task_metrics.bits_per_byte(["ab", "é"], [-np.log(2) * 3, -np.log(2) * 5]) == {
        "bits_per_byte": pytest.approx(2.0)}
    assert task_metrics.last_word_accuracy(["door", "signs."], ["door.", "sign"]) == {
        "last_word_accuracy": 50}


def test_f1_and_areas_of_yes_and_no_by_hand():
    """Log-odds of yes 2, 1, 0 and -1, of which the first and third are right to be yes."""
    scores = [(-3, -1, True), (-2, -1, False), (-1, -1, True), (-1, -2, False)]
    targets = [{"question": n, "is_correct": yes == (place == 1), "length": 1}
               for n, (_, _, yes) in enumerate(scores) for place in (0, 1)]
    found = task_metrics.ranking_f1_and_auc(targets, [s for no, yes, _ in scores for s in (no, yes)])
    assert found["auc_roc"] == 75.0                       # 3 of 4 pairs are in order
    assert found["auc_pr"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert found["f1_by_ranking"] == pytest.approx(50.0)  # yes to the first two
    with pytest.raises(UserError, match="two choices"):
        task_metrics.ranking_f1_and_auc(targets[:3], [0.0] * 3)


def test_names_are_counted_over_all_examples():
    found = task_metrics.span_f1(["PER: a b $$ LOC: c", "", "PER: d"],
                                 ["LOC: c$$PER:  a  b", "ORG: x", "LOC: d"])
    assert found == {"span_f1": pytest.approx(200 * 2 / (3 + 4))}
    assert task_metrics.span_f1([""], [""]) == {"span_f1": 100.0}


@pytest.mark.parametrize("language, target, prediction, em, f1", [
    ("en", "the Eiffel Tower", "Eiffel tower!", 100, 100), ("de", "das Haus", "Haus", 100, 100),
    ("zh", "北京大学", "北京", 0, 100 * 2 / 3), ("zh", "北京，大学。", "北京大学", 100, 100),
    ("hi", "the a", "the", 0, 100 * 2 / 3), ("es", "¿la casa?", "casa", 100, 100),
    ("ar", "الكتاب", "كتاب", 100, 100)])
def test_answers_as_mlqa_normalises_them(language, target, prediction, em, f1):
    found = task_metrics.mlqa(language)([[target, "other"]], [prediction])
    assert (found["em"], found["f1"]) == (pytest.approx(em), pytest.approx(f1))
