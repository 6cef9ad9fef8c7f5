"""OLMo 2: LLaMA with norms behind the sub-layers, and over all queries and all keys."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from t5x_lite.formats.hf_decoders import LLAMA, SIZES, SPECIALS, from_llama, llama_rules, to_llama
from t5x_lite.formats.hf_family import ROTARY_FIELDS, Family, equal_layers, first_block, given
from t5x_lite.formats.mapping import Rule
from t5x_lite.models.config import ModelConfig

_OLMO2 = {**{name: value for name, value in LLAMA.items() if name != "mlp_bias"},
          "vocab_size": 50304, "rms_norm_eps": 1e-5}


def _from_olmo2(hf: Mapping, tied: bool) -> ModelConfig:
    model = from_llama({**hf, "mlp_bias": False}, tied)
    stack = given(model.decoder)
    block = first_block(stack)
    attention = dataclasses.replace(block.self_attention, qk_norm=True, qk_norm_over="all",
                                    qk_norm_config=stack.norm)
    segments = equal_layers(dataclasses.replace(block, self_attention=attention), stack.num_layers)
    return dataclasses.replace(model, decoder=dataclasses.replace(
        stack, segments=segments, residual="post_inside"))


def _to_olmo2(config: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in to_llama(config).items() if name != "mlp_bias"}


def _rules(config: ModelConfig) -> Iterable[Rule]:
    layer, ours = "model.layers.{n}", "decoder/*"
    return [*(rule for rule in llama_rules(config) if rule.ours != f"{ours}/pre_mlp_norm/scale"),
            Rule(f"{ours}/post_self_attention_norm/scale",
                 f"{layer}.post_attention_layernorm.weight"),
            Rule(f"{ours}/post_mlp_norm/scale", f"{layer}.post_feedforward_layernorm.weight")]


FAMILIES = (
    Family("olmo2", "Olmo2ForCausalLM", "decoder_only", {"model_type": "olmo2", **_OLMO2},
           _from_olmo2, _to_olmo2, _rules, embedding="model.embed_tokens.weight",
           head="lm_head.weight", specials=SPECIALS, sizes=SIZES,
           optional={"head_dim": int, "num_key_value_heads": int, **ROTARY_FIELDS},
           renames=((r"((?:embed_tokens|layers|norm)\..*)", r"model.\1"),),
           unused=(r".*\.rotary_emb\.inv_freq",)),
)
