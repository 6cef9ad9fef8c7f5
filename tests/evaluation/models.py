"""Tiny runs whose exports other programs load: a LLaMA over a byte-level BPE, a T5 over bytes; and tasks
of lm-evaluation-harness.

    python -m tests.evaluation.models DIR    writes DIR/{causal,seq2seq}, their exports DIR/*_hf, DIR/tasks
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

from t5x_lite import convert, tree
from t5x_lite.checkpoints.manager import CheckpointConfig, Checkpointer
from t5x_lite.config import RunConfig, to_json
from t5x_lite.data.config import DataConfig
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model
from t5x_lite.training.objectives import ObjectiveConfig
from tests import tiny
from tests.formats import folders

MAX_LENGTH = 48
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
# Of examples.jsonl: a task for each kind of request that the harness has.
TASKS = {
    "tiny_choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_answer": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["a"], max_gen_toks: 8}
metric_list: [{metric: exact_match}, {metric: chrf}]
""",
    "tiny_pages": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""}


def tokenizer_file(folder) -> str:
    """A byte-level BPE of some words, as GPT-2's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([" ".join(WORDS)] * 3, trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.add_special_tokens(["<|endoftext|>"])
    path = folder / "tokenizer.json"
    made.save(str(path))
    return str(path)


def causal(vocabulary: str) -> RunConfig:
    """A LLaMA of two layers."""
    block = BlockConfig(AttentionConfig(2, 6, num_kv_heads=1), mlp=MLPConfig(12, "silu", gated=True))
    model = ModelConfig("decoder_only", 304, 12, None, StackConfig(
        (SegmentConfig((block,), 2),), causal=True, position=PositionConfig("rotary")))
    return dataclasses.replace(
        tiny.seq2seq(), name="causal", model=model, objective=ObjectiveConfig("lm"),
        data=DataConfig(vocabulary=vocabulary, targets_length=MAX_LENGTH, inputs_length=16))


def seq2seq() -> RunConfig:
    """A T5 1.0: its logits are tied, as the harness's hf model ties those of every T5."""
    base = tiny.seq2seq()
    model = dataclasses.replace(base.model, vocab_size=384, tie_logits=True,
                                logits_scale=base.model.embed_dim ** -0.5)
    return dataclasses.replace(
        base, name="seq2seq", model=model,
        data=DataConfig(vocabulary="byt5", inputs_length=MAX_LENGTH, targets_length=MAX_LENGTH))


def write_tasks(folder: pathlib.Path) -> None:
    """TASKS as YAML files, and their eleven examples."""
    rng = np.random.default_rng(0)
    with open(folder / "examples.jsonl", "w") as file:
        for i in range(11):
            words = list(rng.choice(WORDS, 8))
            file.write(json.dumps({
                "question": " ".join(words[:i % 5 + 1]) + ("  " if i == 3 else ""),
                "choices": [" " + words[5], " " + words[6] + " " + words[0], " é!"],
                "answer": i % 3, "page": " ".join(words * (i % 4 + 1))}) + "\n")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\n{text}dataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/examples.jsonl}}}}\n")


def write_workdir(folder: pathlib.Path, run: RunConfig) -> None:
    """A workdir whose checkpoint has random parameters, of a size that prefers some tokens."""
    table = Model(run.model).table
    params = {path: np.float32(0.3) * x + np.float32("norm" in path and x.ndim < 3)
              for path, x in folders.random_params(run.model).items() if path in table}
    with Checkpointer(folder, CheckpointConfig(async_save=False)) as checkpointer:
        checkpointer.save(3, {"params": tree.unflatten(
            {path: jax.numpy.asarray(x) for path, x in params.items()})}, {}, to_json(run))
    (folder / "config.json").write_text(to_json(run) + "\n")


if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1]).absolute()
    (root / "tasks").mkdir(parents=True)
    write_tasks(root / "tasks")
    for chosen in (causal(tokenizer_file(root)), seq2seq()):
        write_workdir(root / chosen.name, chosen)
        convert.run(str(root / chosen.name), f"hf:{root / chosen.name}_hf")
