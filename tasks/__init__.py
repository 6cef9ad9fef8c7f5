"""The zoo: seqio tasks and mixtures that ship with t5x_lite.

Each module imports the library as your own module of tasks does (data.task_modules), and importing
it registers its tasks; `register_all` imports them all.

    python_text       docs and source code of the running Python: real text without a download
    python_parts      parts of that source code, of 8 kB to 2 MB
    c4                C4 through TFDS
    wikipedia         English Wikipedia through TFDS
    closed_book_qa    Natural Questions, WebQuestions, TriviaQA without a context
    facts_qa          passages and questions rendered from the shipped tables of facts
    factbook          sections of the World Factbook: text classification with 20 labels
    salient_spans     Wikipedia sentences with names and dates hidden (Guu et al. 2020)
    glue              GLUE, SuperGLUE, Winograd schemas, and their mixtures
    t5_benchmarks     SQuAD, XQuAD, CNN/DailyMail, XSum, SciTLDR, WMT with T5's prefixes
    multilingual      XNLI, WikiANN, MLQA, TyDi QA as mT5 has them
    rank_classification   multiple choice by log-probability: PIQA, HellaSwag, ARC, MMLU …
    big_bench         BIG-bench and BIG-Bench Hard
    lm_evaluation     WikiText-103, PG-19, the Pile, LAMBADA
    flan              instructions with options for ten data sets, and their mixture
    integers          small problems of integers: modular addition, classes with noisy labels
    chat_sums         conversations about sums, for configs/chat.py
    digits            handwritten digits as pixels, as codes, and with words
    gridworld         walks with their return in front, and the best policy
    scan              SCAN's simple split
    p3                P3's mixture of what is at hand (only with data.task_modules=tasks.p3)
"""

import importlib

_MODULES = ("tasks.python_text", "tasks.python_parts", "tasks.c4", "tasks.wikipedia", "tasks.closed_book_qa",
            "tasks.facts_qa", "tasks.factbook", "tasks.salient_spans", "tasks.scan", "tasks.integers", "tasks.chat_sums",
            "tasks.digits", "tasks.gridworld", "tasks.big_bench", "tasks.glue", "tasks.t5_benchmarks", "tasks.multilingual", "tasks.rank_classification",
            "tasks.lm_evaluation", "tasks.flan")


def register_all() -> None:
    """Registers the shipped tasks, all but P3's."""
    for name in _MODULES:
        importlib.import_module(name)
