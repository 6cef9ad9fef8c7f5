"""Gemma 2, and Gemma 3's model of texts.

Traps of the format: a norm's scale is 1 + its weight; logits are capped by default, and null says
that they are not; local layers alternate with global ones, in Gemma 3 with a rotary base of their
own; a model that reads images holds the same tensors below `language_model`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.formats.hf_decoders import SIZES, SPECIALS, decoder_only, llama_rules
from t5x_lite.formats.hf_family import (
    LAYER_TYPES,
    ROTARY_FIELDS,
    Family,
    activation,
    first_block,
    given,
    max_positions,
    rope_scaling,
    rotary,
    their_activation,
    windows,
    written_windows,
)
from t5x_lite.formats.mapping import Rule
from t5x_lite.layers.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig, segments_of

_GEMMA2 = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
           "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
           "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
           "max_position_embeddings": 8192, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
           "tie_word_embeddings": True, "attention_bias": False, "attention_dropout": 0.0,
           "query_pre_attn_scalar": 256.0, "sliding_window": 4096,
           "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "rope_theta": 10000.0}
_GEMMA3 = {**_GEMMA2, "vocab_size": 262208, "max_position_embeddings": 131072,
           "final_logit_softcapping": 0.0, "attn_logit_softcapping": 0.0, "rope_theta": 1e6,
           "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}


def _from_gemma(hf: Mapping, tied: bool) -> ModelConfig:
    is_third = "rope_local_base_freq" in hf
    norm = NormConfig("rms", float(hf["rms_norm_eps"]), scale_offset=1.0)
    full, local = _rotary_by_type(hf) if is_third else (rotary(hf, hf["rope_theta"]),) * 2
    # The last layer of a pattern is global.
    pattern = hf["sliding_window_pattern"] if is_third else 2
    attention = AttentionConfig(
        hf["num_attention_heads"], hf["head_dim"], num_kv_heads=hf["num_key_value_heads"],
        scale=float(hf["query_pre_attn_scalar"]) ** -0.5, use_bias=hf["attention_bias"],
        use_out_bias=hf["attention_bias"], qk_norm=is_third, qk_norm_config=norm,
        logit_softcap=float(hf["attn_logit_softcapping"] or 0.0),
        dropout_rate=float(hf["attention_dropout"]))
    mlp = MLPConfig(hf["intermediate_size"], activation(hf["hidden_activation"]), gated=True)
    blocks = [BlockConfig(dataclasses.replace(attention, window=window), mlp=mlp,
                          position=local if window and local != full else None)
              for window in windows(hf, lambda layer: (layer + 1) % pattern > 0)]
    stack = StackConfig(segments_of(blocks), causal=True, position=full, norm=norm,
                        residual="sandwich")
    model = decoder_only(hf, stack, hf["hidden_size"], tied)
    return dataclasses.replace(model, embedding_scale=math.sqrt(hf["hidden_size"]),
                               logits_softcap=float(hf["final_logit_softcapping"] or 0.0))


def _rotary_by_type(hf: Mapping) -> tuple[PositionConfig, PositionConfig]:
    """(global layers' positions, local layers'); scaling in the older fields is the former's."""
    base, local = hf["rope_theta"], hf["rope_local_base_freq"]
    by_type = hf.get("rope_parameters")
    if by_type is None:
        return rotary(hf, base), rotary({}, local)
    strange = by_type.keys() - set(LAYER_TYPES)
    if strange or not all(isinstance(v, (dict, type(None))) for v in by_type.values()):
        raise UserError(f"rope_parameters={by_type!r} of config.json: must have a section for each "
                        f"of {', '.join(LAYER_TYPES)}, and nothing else.")
    lengths = {"max_position_embeddings": hf["max_position_embeddings"]}
    full, sliding = (rotary({**lengths, "rope_parameters": by_type.get(name)}, default)
                     for name, default in zip(LAYER_TYPES, (base, local), strict=True))
    return full, sliding


def _to_gemma2(config: ModelConfig) -> dict[str, Any]:
    stack = given(config.decoder)
    block = first_block(stack)
    attention = block.self_attention
    scalar = (attention.scale or attention.head_dim ** -0.5) ** -2
    return {"vocab_size": config.vocab_size, "hidden_size": config.embed_dim,
            "intermediate_size": block.mlp.mlp_dim, "num_hidden_layers": stack.num_layers,
            "num_attention_heads": attention.num_heads, "head_dim": attention.head_dim,
            "num_key_value_heads": attention.kv_heads,
            "hidden_activation": their_activation(block.mlp.activation),
            "rms_norm_eps": stack.norm.epsilon, "attention_bias": attention.use_bias,
            "attention_dropout": attention.dropout_rate,
            "query_pre_attn_scalar": round(scalar),   # theirs is a whole number
            "final_logit_softcapping": config.logits_softcap or None,
            "attn_logit_softcapping": attention.logit_softcap or None,
            "rope_theta": stack.position.rotary_base,
            "rope_scaling": rope_scaling(stack.position),
            "max_position_embeddings": max_positions(stack.position),
            "tie_word_embeddings": config.tie_logits, **written_windows(stack)}


def _to_gemma3(config: ModelConfig) -> dict[str, Any]:
    stack = given(config.decoder)
    local = next((block.position for s in stack.segments for block in s.blocks
                  if block.self_attention.window), None) or stack.position
    return {**_to_gemma2(config), "rope_local_base_freq": local.rotary_base}


def _rules(config: ModelConfig) -> Iterable[Rule]:
    layer, ours = "model.layers.{n}", "decoder/*"
    renamed = {
        f"{ours}/post_self_attention_norm/scale": f"{layer}.post_attention_layernorm.weight",
        f"{ours}/pre_mlp_norm/scale": f"{layer}.pre_feedforward_layernorm.weight",
        f"{ours}/post_mlp_norm/scale": f"{layer}.post_feedforward_layernorm.weight"}
    return [*(rule for rule in llama_rules(config) if rule.ours not in renamed),
            *(Rule(mine, theirs) for mine, theirs in renamed.items())]


FAMILIES = tuple(
    Family(kind, name, "decoder_only", {"model_type": kind, **defaults}, _from_gemma, to_hf, _rules,
           embedding="model.embed_tokens.weight", head="lm_head.weight",
           specials={**SPECIALS, "bos_token_id": 2}, sizes=SIZES,
           optional={"layer_types": list, **ROTARY_FIELDS},
           nullable=("final_logit_softcapping", "attn_logit_softcapping", "sliding_window"),
           fixed={"use_bidirectional_attention": (False,)},
           harmless=("hidden_act", "sliding_window_size"),
           renames=((r"language_model\.(.*)", r"\1"),
                    (r"model\.language_model\.(.*)", r"model.\1"),
                    (r"((?:embed_tokens|layers|norm)\..*)", r"model.\1")),
           unused=(r".*\.rotary_emb\.inv_freq", r"(model\.)?(vision_tower|multi_modal_projector)\..*"))
    for kind, name, defaults, to_hf in (
        ("gemma2", "Gemma2ForCausalLM", _GEMMA2, _to_gemma2),
        ("gemma3_text", "Gemma3ForCausalLM", _GEMMA3, _to_gemma3)))
