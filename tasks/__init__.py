"""seqio tasks, mixtures, preprocessors and vocabularies that ship with t5x_lite.

Importing a module of this package registers its tasks; `register_all` imports them all.
Your own tasks live in any importable module, named in `data.task_modules`.

    denoising         what is hidden of a text: causal and prefix LM, BERT, BART, UL2, and
    span_corruption   … T5's
    preprocessors     tokens to fixed windows, causal LM
    vocabularies      names of vocabularies: a shipped one, bytes, T5's, any SentencePiece file
    tokenizer_json    … and Hugging Face's tokenizer.json
    tokenized         … whose Python runs ahead of tf.data
    cached            tasks that seqio and Beam tokenised ahead (data.cached_tasks)
    document_cache    text gathered ahead of tf.data, kept as TFRecord files
    python_text       docs and source code of the running Python: real text without a download
    text_files        text, JSONL and gzip files given on the command line
    c4                C4 through TFDS
    wikipedia         English Wikipedia through TFDS
    text_to_text      what a task with inputs and targets is made of
    records           records read from files by Python, ahead of tf.data
    metrics           metric functions: answers, classes, BLEU, ROUGE, rank classification
    closed_book_qa    Natural Questions, WebQuestions, TriviaQA without a context
    facts_qa          passages and questions rendered from the shipped tables of facts
    glue              GLUE, SuperGLUE, Winograd schemas, and their mixtures
    t5_benchmarks     SQuAD, XQuAD, CNN/DailyMail, XSum, SciTLDR, WMT with T5's prefixes
    rank_classification   multiple choice by log-probability: PIQA, HellaSwag, ARC, MMLU …
    choice_files      the files of those that TFDS has not
    lm_evaluation     WikiText-103, PG-19, the Pile, LAMBADA
    flan              instructions with options for ten data sets, and their mixture
    p3                P3's mixture of what is at hand (not registered unless asked for)
    prompts           k-shot prompts, P3's templates, FLAN's mixtures, for your own tasks
    demonstrations    … and what stands before the inputs of a k-shot prompt (data.shots)
    published_mixtures    sampling proportions of Gopher, Chinchilla, GPT-3 and MT-NLG
    seq2seq_files     your own JSONL and TSV examples, SCAN
    big_bench         BIG-bench and BIG-Bench Hard, and your own task.json
    salient_spans     dates and names hidden one by one, in Wikipedia or in your own text

This package imports TensorFlow; t5x_lite imports it only inside functions.
"""

import importlib

_MODULES = ("tasks.python_text", "tasks.c4", "tasks.wikipedia", "tasks.closed_book_qa",
            "tasks.facts_qa", "tasks.salient_spans",
            "tasks.seq2seq_files", "tasks.big_bench", "tasks.glue", "tasks.t5_benchmarks",
            "tasks.rank_classification", "tasks.lm_evaluation", "tasks.flan")


def register_all(extra_modules=()) -> None:
    """Registers the shipped tasks and those of `extra_modules` (dotted module names)."""
    for name in (*_MODULES, *extra_modules):
        importlib.import_module(name)
