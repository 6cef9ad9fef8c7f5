"""Metric functions of tasks: (targets, predictions) or (targets, scores) -> {name: value}.

These are what seqio calls predict_metric_fns and score_metric_fns; t5x_lite.evaluate runs them
in the training loop and alone. Values are percentages, as T5 and the leaderboards report them.
Targets and predictions are what the task's postprocessor made of the texts: strings, lists of
allowed answers, class numbers.

    accuracy, sequence_accuracy          equal or not
    squad, trivia_qa                     exact match and token F1, the best over all answers
    bleu, rouge                          sacrebleu and rouge-score, T5's settings
    f1, matthews, pearson, spearman …    scikit-learn and scipy, as GLUE and SuperGLUE ask
    mlqa, span_f1                        answers in seven languages; lists of names
    rank_classification                  the choice of the highest log-probability
    ranking_f1_and_auc                   the same of yes and no, and over all thresholds
    bits_per_byte, last_word_accuracy    language models (tasks/lm_evaluation.py)
"""

import collections
import math
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from t5x_lite.errors import UserError

Metrics = dict[str, float]

_BOOTSTRAP_SAMPLES = 1000   # rouge-score's own number


# --- classes and sequences ------------------------------------------------------------------

def accuracy(targets: Sequence, predictions: Sequence) -> Metrics:
    """Share of predictions equal to their targets, in per cent."""
    return {"accuracy": _percent(p == t for t, p in zip(targets, predictions, strict=True))}


def sequence_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """accuracy under the name that T5 gives it for sequences."""
    return {"sequence_accuracy": accuracy(targets, predictions)["accuracy"]}


def f1(targets: Sequence[int], predictions: Sequence[int]) -> Metrics:
    """F1 of class 1 among 0 and 1; a prediction that is neither counts as the wrong one."""
    from sklearn import metrics
    valid = [p if p in (0, 1) else 1 - t for t, p in zip(targets, predictions, strict=True)]
    return {"f1": 100 * float(metrics.f1_score(targets, valid, zero_division=0.0))}


def mean_class_f1(num_classes: int) -> Callable[..., Metrics]:
    """A metric: F1 of each class, averaged over the classes without weights (CB)."""
    def mean_f1(targets, predictions) -> Metrics:
        from sklearn import metrics
        value = metrics.f1_score(targets, predictions, labels=range(num_classes),
                                 average="macro", zero_division=0.0)
        return {f"mean_{num_classes}class_f1": 100 * float(value)}
    return mean_f1


def matthews(targets: Sequence[int], predictions: Sequence[int]) -> Metrics:
    """Matthews' correlation coefficient, times 100 (CoLA)."""
    from sklearn import metrics
    return {"matthews_corrcoef": 100 * float(metrics.matthews_corrcoef(targets, predictions))}


def pearson(targets: Sequence[float], predictions: Sequence[float]) -> Metrics:
    """Pearson's correlation, times 100; 0 where either side is constant."""
    return {"pearson_corrcoef": _correlation("pearsonr", targets, predictions)}


def spearman(targets: Sequence[float], predictions: Sequence[float]) -> Metrics:
    """Spearman's rank correlation, times 100; 0 where either side is constant."""
    return {"spearman_corrcoef": _correlation("spearmanr", targets, predictions)}


def _correlation(name: str, targets, predictions) -> float:
    import scipy.stats
    if len(set(targets)) < 2 or len(set(predictions)) < 2:
        return 0.0   # undefined; models start by answering the same to everything
    return 100 * float(getattr(scipy.stats, name)(targets, predictions)[0])


def _percent(hits) -> float:
    hits = list(hits)
    return 100 * sum(map(float, hits)) / len(hits) if hits else math.nan


# --- groups of examples (MultiRC, ReCoRD) ---------------------------------------------------

def multirc_f1(targets: Sequence[Mapping], predictions: Sequence[Mapping]) -> Metrics:
    """F1 over all answers of MultiRC; both sides hold the class under "value"."""
    return f1([t["value"] for t in targets], [p["value"] for p in predictions])


def group_exact_match(targets: Sequence[Mapping], predictions: Sequence[Mapping]) -> Metrics:
    """Share of groups (target["group"]) whose members are all right, in per cent."""
    right: dict = collections.defaultdict(lambda: True)
    for target, prediction in zip(targets, predictions, strict=True):
        group = _hashable(target["group"])
        right[group] = right[group] and target["value"] == prediction["value"]
    return {"exact_match": _percent(right.values())}


def first_of_group(metric: Callable[..., Metrics]) -> Callable[..., Metrics]:
    """`metric` over the first example of each group: ReCoRD repeats an input for each answer."""
    def deduplicated(targets, predictions) -> Metrics:
        chosen = {}
        for target, prediction in zip(targets, predictions, strict=True):
            chosen.setdefault(_hashable(target["group"]), (target["value"], prediction["value"]))
        return metric(*map(list, zip(*chosen.values(), strict=True)))
    return deduplicated


def _hashable(group):
    return tuple(np.asarray(group).ravel().tolist())


# --- answers --------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_TRIVIA_QA_PUNCTUATION = string.punctuation + "‘’´`_"


def normalize_squad(answer: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's and NQ-open's script)."""
    text = answer.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return " ".join(_ARTICLES.sub(" ", text).split())


def normalize_trivia_qa(answer: str) -> str:
    """An answer in lower case without articles and double spaces, its punctuation and curly quotes
    become spaces (TriviaQA's script; SQuAD's drops them)."""
    text = answer.lower().translate({ord(c): " " for c in _TRIVIA_QA_PUNCTUATION})
    return " ".join(_ARTICLES.sub(" ", text).split())


def token_f1(target: str, prediction: str) -> float:
    """F1 of the bags of words of two normalised texts, 0 … 1; 0 where one is empty."""
    expected, predicted = target.split(), prediction.split()
    same = sum((collections.Counter(expected) & collections.Counter(predicted)).values())
    return 2 * same / (len(expected) + len(predicted)) if same else 0.0


def _best_answers(targets, predictions, normalize) -> Metrics:
    matches, overlaps = [], []
    for answers, prediction in zip(targets, predictions, strict=True):
        # A numpy array of answers comes out of tf.data, a single string from a plain task.
        answers = [answers] if isinstance(answers, str) else answers
        allowed, answer = [normalize(a) for a in answers], normalize(prediction)
        matches.append(answer in allowed)
        overlaps.append(max((token_f1(a, answer) for a in allowed), default=0.0))
    return {"em": _percent(matches), "f1": _percent(overlaps)}


def exact_match(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Metrics:
    """Share of predictions that are one of their answers, letter for letter, in per cent."""
    return {"exact_match": _percent(p.strip() in (a.strip() for a in answers)
                                    for answers, p in zip(targets, predictions, strict=True))}


# Articles of MLQA's normalisation (Lewis et al. 2020, arXiv:1910.07475), patterns of whole words; ""
# where it takes none away.
MLQA_ARTICLES = {
    "ar": r"\bال", "de": r"\b(?:ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "en": r"\b(?:a|an|the)\b", "es": r"\b(?:un|una|unos|unas|el|la|los|las)\b", "hi": "",
    "vi": r"\b(?:của|là|cái|chiếc|những)\b", "zh": ""}


def mlqa(language: str) -> Callable[..., Metrics]:
    """A metric: exact match and F1 over all answers after MLQA's normalisation of a language.

    Small letters, no punctuation of any script, no articles; in Chinese each character is a word.
    """
    def normalize(answer: str) -> str:
        text = "".join(c for c in answer.lower() if c not in string.punctuation
                       and not unicodedata.category(c).startswith("P"))
        if MLQA_ARTICLES[language]:
            text = re.sub(MLQA_ARTICLES[language], " ", text)
        if language == "zh":
            text = re.sub(r"([\u4e00-\u9fff])", r" \1 ", text)
        return " ".join(text.split())

    def metric(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Metrics:
        return _best_answers(targets, predictions, normalize)

    metric.__name__ = f"mlqa_{language}"
    return metric


def span_f1(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """F1 of names as "PER: rick $$ LOC: york" lists them, over all examples, in per cent.

    A name is right where its text and kind stand among the target's; one written twice counts
    twice.
    """
    hits = wanted = given = 0
    for target, prediction in zip(targets, predictions, strict=True):
        expected, written = (collections.Counter(
            " ".join(span.split()) for span in text.split("$$") if span.strip())
            for text in (target, prediction))
        hits += (expected & written).total()
        wanted += expected.total()
        given += written.total()
    return {"span_f1": 200.0 * hits / (wanted + given) if wanted + given else 100.0}


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Metrics:
    """Exact match and F1 after SQuAD's normalisation, each the best over the answers."""
    return _best_answers(targets, predictions, normalize_squad)


def trivia_qa(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Metrics:
    """Exact match and F1 after TriviaQA's normalisation, each the best over the answers."""
    return _best_answers(targets, predictions, normalize_trivia_qa)


# --- generated text -------------------------------------------------------------------------

def bleu(targets: Sequence[str | Sequence[str]], predictions: Sequence[str]) -> Metrics:
    """Corpus BLEU by sacrebleu with its "intl" tokenizer, as T5 reports it.

    targets: one reference a prediction, or the same number of references for each.
    """
    import sacrebleu
    references = [[t] if isinstance(t, str) else list(t) for t in targets]
    by_reference = [list(r) for r in zip(*references, strict=True)]
    score = sacrebleu.corpus_bleu(list(predictions), by_reference, smooth_method="exp",
                                  smooth_value=0.0, force=False, lowercase=False,
                                  tokenize="intl", use_effective_order=False)
    return {"bleu": float(score.score)}


def rouge(targets: Sequence[str], predictions: Sequence[str],
          kinds: Sequence[str] = ("rouge1", "rouge2", "rougeLsum"), seed: int = 0) -> Metrics:
    """F-measures of rouge-score: the median of bootstrapped means, times 100, as in T5.

    " . " ends a line, so that rougeLsum sees sentences. The resampling has a seed of its own:
    the same texts give the same numbers (rouge-score's aggregator draws from numpy's global).
    """
    from rouge_score import rouge_scorer
    scorer = rouge_scorer.RougeScorer(kinds)
    lines = lambda text: text.replace(" . ", " .\n")
    scores = [scorer.score(lines(t), lines(p))
              for t, p in zip(targets, predictions, strict=True)]
    table = np.array([[s[kind].fmeasure for kind in kinds] for s in scores])
    generator = np.random.default_rng(seed)
    means = [table[generator.integers(len(table), size=len(table))].mean(axis=0)
             for _ in range(_BOOTSTRAP_SAMPLES)]
    medians = np.median(means, axis=0)
    return {kind: 100 * float(value) for kind, value in zip(kinds, medians, strict=True)}


# --- scores: (targets, scores) --------------------------------------------------------------

def rank_classification(targets: Sequence[Mapping], scores: Sequence[float]) -> Metrics:
    """Accuracy of the choice of the highest score, plain and by length.

    targets: one a choice, {"question": number, "is_correct": bool, "length": UTF-8 bytes of the
    choice} (tasks/rank_classification.py). scores: log-probabilities of the choices.
    accuracy_by_length divides them by the bytes first (Brown et al. 2020 use tokens; bytes do
    not depend on the vocabulary). A question with several correct choices takes any of them.
    """
    questions: dict = collections.defaultdict(list)
    for target, score in zip(targets, scores, strict=True):
        questions[_hashable(target["question"])].append((target, float(score)))
    plain, by_length = [], []
    for choices in questions.values():
        best = max(choices, key=lambda c: c[1])
        plain.append(best[0]["is_correct"])
        best = max(choices, key=lambda c: c[1] / max(c[0]["length"], 1))
        by_length.append(best[0]["is_correct"])
    return {"accuracy": _percent(plain), "accuracy_by_length": _percent(by_length)}


def ranking_f1_and_auc(targets: Sequence[Mapping], scores: Sequence[float]) -> Metrics:
    """Of questions with two choices, the second being "yes": F1 of the higher score, and the areas
    under the ROC and the precision-recall curve (average precision) of the second's log-odds.

    targets, scores: as rank_classification takes them. Raises UserError for other questions.
    """
    questions: dict = collections.defaultdict(list)
    for target, score in zip(targets, scores, strict=True):
        questions[_hashable(target["question"])].append((bool(target["is_correct"]), float(score)))
    if any(len(choices) != 2 for choices in questions.values()):
        raise UserError("F1 and AUC by ranking are of questions with two choices: no and yes")
    from sklearn import metrics
    labels = np.array([yes[0] for _, yes in questions.values()])
    odds = np.array([yes[1] - no[1] for no, yes in questions.values()])
    values = {"f1_by_ranking": f1(labels, odds > 0)["f1"]}
    if 0 < labels.sum() < len(labels):   # areas are defined where both answers are right somewhere
        values["auc_roc"] = 100 * float(metrics.roc_auc_score(labels, odds))
        values["auc_pr"] = 100 * float(metrics.average_precision_score(labels, odds))
    return values


def bits_per_byte(targets: Sequence[str], scores: Sequence[float]) -> Metrics:
    """Negative log-probability of all targets in bits, over their UTF-8 bytes."""
    num_bytes = sum(len(t.encode()) for t in targets)
    return {"bits_per_byte": -float(sum(scores)) / math.log(2.0) / num_bytes}


def last_word_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> Metrics:
    """LAMBADA: whether the first word that is written is the passage's last word, in per cent."""
    first = [(p.split() or [""])[0].strip(string.punctuation) for p in predictions]
    return {"last_word_accuracy": _percent(
        f == t.strip().strip(string.punctuation) for t, f in zip(targets, first, strict=True))}
