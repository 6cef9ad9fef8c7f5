"""BERT with its masked-LM head (BertForMaskedLM).

The pooler and the next-sentence head have no counterpart here and are skipped. Trap: the
first releases call a LayerNorm's scale and bias gamma and beta.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from t5x_lite.formats.hf_family import (
    Family,
    activation,
    equal_layers,
    first_block,
    given,
    normal_init,
    their_activation,
)
from t5x_lite.formats.mapping import TRANSPOSED, Rule
from t5x_lite.layers.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig

_BERT = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12,
         "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu",
         "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
         "max_position_embeddings": 512, "type_vocab_size": 2, "initializer_range": 0.02,
         "layer_norm_eps": 1e-12, "tie_word_embeddings": True}


def _from_bert(hf: Mapping, tied: bool) -> ModelConfig:
    width, heads, act = hf["hidden_size"], hf["num_attention_heads"], activation(hf["hidden_act"])
    block = BlockConfig(
        AttentionConfig(heads, width // heads, use_bias=True, use_out_bias=True,
                        dropout_rate=float(hf["attention_probs_dropout_prob"])),
        mlp=MLPConfig(hf["intermediate_size"], act, gated=False, use_bias=True))
    encoder = StackConfig(
        equal_layers(block, hf["num_hidden_layers"]), residual="post", embedding_norm=True,
        final_norm=False, dropout_rate=float(hf["hidden_dropout_prob"]),
        position=PositionConfig("learned", max_length=hf["max_position_embeddings"]),
        norm=NormConfig("layer", float(hf["layer_norm_eps"]), use_bias=True))
    return ModelConfig("encoder_only", vocab_size=hf["vocab_size"], embed_dim=width,
                       encoder=encoder, decoder=None, tie_logits=tied, logits_bias=True,
                       head_transform=act, token_types=hf["type_vocab_size"],
                       init=normal_init(float(hf["initializer_range"])))


def _to_bert(config: ModelConfig) -> dict[str, Any]:
    stack = given(config.encoder)
    block = first_block(stack)
    return {"vocab_size": config.vocab_size, "hidden_size": config.embed_dim,
            "num_hidden_layers": stack.num_layers,
            "num_attention_heads": block.self_attention.num_heads,
            "intermediate_size": block.mlp.mlp_dim,
            "hidden_act": their_activation(block.mlp.activation),
            "hidden_dropout_prob": stack.dropout_rate,
            "attention_probs_dropout_prob": block.self_attention.dropout_rate,
            "max_position_embeddings": stack.position.max_length,
            "type_vocab_size": config.token_types, "layer_norm_eps": stack.norm.epsilon,
            "tie_word_embeddings": config.tie_logits}


def _rules(config: ModelConfig) -> Iterable[Rule]:
    rules = [Rule("token_embedding/embedding", "bert.embeddings.word_embeddings.weight"),
             Rule("token_types/embedding", "bert.embeddings.token_type_embeddings.weight"),
             Rule("encoder/learned_positions/embedding",
                  "bert.embeddings.position_embeddings.weight"),
             Rule("logits/kernel", "cls.predictions.decoder.weight", TRANSPOSED),
             Rule("logits/bias", "cls.predictions.bias")]
    layer, head = "bert.encoder.layer.{n}", "cls.predictions.transform"
    for ours, theirs in (("encoder/embedding_norm", "bert.embeddings"),
                         ("encoder/*/post_self_attention_norm", f"{layer}.attention.output"),
                         ("encoder/*/post_mlp_norm", f"{layer}.output"),
                         ("head_transform/norm", head)):
        rules += [Rule(f"{ours}/scale", f"{theirs}.LayerNorm.weight"),
                  Rule(f"{ours}/bias", f"{theirs}.LayerNorm.bias")]
    attention = "encoder/*/self_attention"
    for ours, theirs in (*((f"{attention}/{name}", f"{layer}.attention.self.{name}")
                           for name in ("query", "key", "value")),
                         (f"{attention}/out", f"{layer}.attention.output.dense"),
                         ("encoder/*/mlp/wi", f"{layer}.intermediate.dense"),
                         ("encoder/*/mlp/wo", f"{layer}.output.dense"),
                         ("head_transform/dense", f"{head}.dense")):
        rules += [Rule(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED),
                  Rule(f"{ours}/bias", f"{theirs}.bias")]
    return rules


FAMILIES = (
    Family("bert", "BertForMaskedLM", "encoder_only", _BERT, _from_bert, _to_bert, _rules,
           embedding="bert.embeddings.word_embeddings.weight",
           head="cls.predictions.decoder.weight", specials={"pad_token_id": 0},
           fixed={"is_decoder": (False,), "position_embedding_type": ("absolute",)},
           sizes=("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                  "type_vocab_size", "max_position_embeddings"), may_be_zero=("type_vocab_size",),
           renames=((r"(.*LayerNorm)\.gamma", r"\1.weight"), (r"(.*LayerNorm)\.beta", r"\1.bias"),
                    (r"((?:embeddings|encoder)\..*)", r"bert.\1"),
                    (r"cls\.predictions\.decoder\.bias", "cls.predictions.bias")),
           unused=(r"bert\.pooler\..*", r"cls\.seq_relationship\..*", r".*\.position_ids")),
)
