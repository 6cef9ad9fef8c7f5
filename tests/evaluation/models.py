"""Tiny runs whose exports other programs load: a LLaMA over a byte-level BPE, a T5 over bytes."""

import dataclasses

from t5x_lite.config import RunConfig
from t5x_lite.data.config import DataConfig
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.training.objectives import ObjectiveConfig
from tests import tiny

MAX_LENGTH = 48
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()


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
