"""What is read: the fields of a config's section `data`. Imports no TensorFlow."""

import dataclasses
from typing import TYPE_CHECKING

from t5x_lite.errors import Count, Rate, Seed

if TYPE_CHECKING:
    pass


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes rows. Lists are comma-separated strings, because a
    command line cannot give tuples safely; in Python, tuples are joined for you."""

    # What to train on: names of seqio tasks or mixtures, each with its share of the examples,
    # "a=1,b=3"; without shares, in proportion to their numbers of examples. With a published
    # mixture's shares: "gpt3(common_crawl=a,wikipedia=b)" (published_mixtures.py).
    # The path of a .jsonl, .json or .tsv file of examples is a task too (example_files.py).
    # "train_files=3,qa.jsonl=1" mixes the text files below with tasks.
    train: str = ""
    # Tasks or mixtures whose "validation" split is evaluated, each task on its own;
    # "validation_files,qa.jsonl" evaluates the text files below beside tasks.
    validation: str = ""
    # Solved examples before every input of them, k-shot (demonstrations.py): how many, of
    # "train" where a task has it, and which.
    shots: int = 0
    shots_seed: Seed = 0
    # Texts without labels beside the labelled rows, as objective.unlabelled learns from them: tasks, of
    # which the inputs alone are read, or .jsonl, .json, .tsv or .txt files (unlabelled.py) …
    unlabelled: str = ""
    unlabelled_ratio: Count = 1         # rows of them for each labelled row
    # The labels as they are written, "negative,positive": evaluation then grades whichever of them is
    # the likeliest answer, and unlabelled text is learned from by their probabilities.
    classes: str = ""
    # What the model sees of such a text: plain, dropout, spans or filled (views.py); for losses that
    # compare two views the weak and the strong one, "dropout,spans".
    views: str = "plain"
    # Text files instead of `train` / `validation`: paths or globs of .txt or .jsonl, also .gz.
    train_files: str = ""
    validation_files: str = ""
    text_document: str = "line"         # a document of a .txt file: line, paragraph or file
    # What is hidden of text files: causal_lm, prefix_lm, span_corruption, word_spans, bert, bart or
    # ul2 (denoising.py), or salient, salient_kept or salient_asked (dates and names, salient_spans.py);
    # "": the objective's usual one. Registered tasks are made for one each: c4_ul2, python_bart.
    denoising: str = ""
    noise_density: Rate = 0.0          # share of the tokens that it hides …
    mean_span_length: float = 0.0       # … in spans of so many; 0: its own figure
    # How text files are rewritten first: steps in order (rewriting.py) …
    rewriting: str = ""                 # sentences or lines, named, headed, reorder, thinned
    rewrites: Count = 1                 # versions of every document, each drawn anew
    rewriting_seed: Seed = 0
    # Of denoising=salient…: hide only what looks like the answers of these questions, a .jsonl, .json
    # or .tsv file with or without a slice (salient_choice.py). Give it training questions.
    salient_like: str = ""
    # Folders that seqio_cache_tasks wrote: tasks are read from there, tokenised (cached.py).
    cached_tasks: str = ""
    task_modules: str = ""              # your Python modules that register seqio tasks
    # "": the task's own. Else python, byt5, t5, or the path of a SentencePiece .model file or of
    # a tokenizer.json (tokenizer_json.py).
    vocabulary: str = ""
    inputs_length: Count = 512            # tokens of the encoder's row, EOS included
    targets_length: Count = 114           # tokens of the decoder's row, EOS included
    record_length: Count = 512            # ppo, grpo: bytes of what a reward function reads of a prompt
    # Learn to predict the inputs too, where they share the targets' row (lm, prefix_lm); a prefix LM
    # sees them both ways. Held-out losses then count them, scores do not. T5X: loss_on_targets_only.
    loss_on_inputs: bool = False
    packing: bool = False               # several examples in a row where they fit
    # Mixing: shares or numbers of examples n_i become min(n_i, rate_cap)^(1/temperature).
    temperature: float = 1.0
    rate_cap: float = 0.0               # K of T5's examples-proportional mixing; 0: none
    # The order of the data is a function of these two alone. num_shards divides
    # train.global_batch_size; take a multiple of the largest process count you may use.
    num_shards: Count = 8
    seed: Seed | None = None             # None: train.seed
    shuffle_buffer: int = 1000          # examples a shard holds to shuffle; saved in checkpoints
    cache_dir: str = ""                 # of gathered text; "": $T5X_LITE_CACHE or ~/.cache/t5x_lite

    def __post_init__(self):
        for name in ("train", "validation", "train_files", "validation_files", "task_modules",
                     "unlabelled", "classes", "views"):
            value = getattr(self, name)
            if not isinstance(value, str):
                parts = (v if isinstance(v, str) else f"{v[0]}={v[1]}" for v in value)
                object.__setattr__(self, name, ",".join(parts))
