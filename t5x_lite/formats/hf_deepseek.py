"""DeepSeek-V2: latent attention, and mixtures with shared experts behind dense first layers.

Traps of the format: kv_b_proj holds, head by head, the keys' rows and then the values'; rotary pairs
are (2i, 2i+1); YaRN's mscale_all_dim acts on attention's scale, and is squared there; gates are not
renormalised but scaled.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.formats.hf_decoders import LLAMA, SPECIALS, decoder_only, llama_rules
from t5x_lite.formats.hf_family import (
    ROTARY_FIELDS,
    Family,
    activation,
    first_block,
    given,
    max_positions,
    rope_scaling,
    rotary,
    their_activation,
    yarn_factor,
)
from t5x_lite.formats.mapping import TRANSPOSED, Layout, Rule
from t5x_lite.layers.config import AttentionConfig, LatentConfig, MLPConfig, MoEConfig, NormConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig, segments_of

_DEEPSEEK2 = {**LLAMA, "vocab_size": 102400, "kv_lora_rank": 512, "q_lora_rank": 1536,
              "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
              "first_k_dense_replace": 0, "n_routed_experts": 64, "n_shared_experts": 2,
              "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0, "topk_method": "greedy"}
_METHODS = ("greedy", "group_limited_greedy")


def _from_deepseek(hf: Mapping, tied: bool) -> ModelConfig:
    mlp = MLPConfig(hf["intermediate_size"], activation(hf["hidden_act"]), gated=True,
                    use_bias=hf["mlp_bias"])
    head_dim = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
    heads = hf["num_attention_heads"]
    if hf.get("num_key_value_heads", heads) != heads:
        raise UserError(f"num_key_value_heads={hf['num_key_value_heads']} of config.json: must be "
                        f"num_attention_heads={heads}; every head has keys of its own.")
    attention = AttentionConfig(
        heads, head_dim, kind="latent", use_bias=hf["attention_bias"],
        use_out_bias=hf["attention_bias"], dropout_rate=float(hf["attention_dropout"]),
        scale=head_dim ** -0.5 * _scale_factor(hf) ** 2,
        latent=LatentConfig(hf["kv_lora_rank"], hf["q_lora_rank"] or 0, hf["qk_rope_head_dim"],
                            hf["v_head_dim"], 1e-6))
    dense = BlockConfig(attention, mlp=mlp)
    sparse = dataclasses.replace(dense, moe=_mixture(hf, mlp))
    depth, first = hf["num_hidden_layers"], min(hf["first_k_dense_replace"], hf["num_hidden_layers"])
    position = dataclasses.replace(rotary(hf, hf["rope_theta"]), rotary_interleaved=True)
    stack = StackConfig(
        segments_of([dense] * first + [sparse] * (depth - first)), causal=True, position=position,
        norm=NormConfig("rms", float(hf["rms_norm_eps"])))
    return decoder_only(hf, stack, hf["hidden_size"], tied)


def _mixture(hf: Mapping, mlp: MLPConfig) -> MoEConfig:
    if "num_experts_per_tok" not in hf:
        raise UserError("config.json of this deepseek_v2 model has no num_experts_per_tok.")
    grouped = hf["topk_method"] == _METHODS[1]
    if hf["topk_method"] not in _METHODS:
        raise UserError(f"topk_method={hf['topk_method']!r} of config.json: must be "
                        f"{' or '.join(_METHODS)}.")
    if grouped and not (hf.get("n_group") and hf.get("topk_group")):
        raise UserError("topk_method='group_limited_greedy' of config.json needs n_group and "
                        "topk_group.")
    return MoEConfig(
        num_experts=hf["n_routed_experts"], router="top_k", top_k=hf["num_experts_per_tok"],
        mlp=dataclasses.replace(mlp, mlp_dim=hf["moe_intermediate_size"]), dropless=True,
        renormalize=False, gate_scale=float(hf["routed_scaling_factor"]),
        expert_groups=hf["n_group"] if grouped else 1, max_groups=hf["topk_group"] if grouped else 1,
        shared_experts=hf["n_shared_experts"], balance_weight=float(hf.get("aux_loss_alpha", 0.001)))


def _scale_factor(hf: Mapping) -> float:
    """What mscale_all_dim makes of attention's scale, before it is squared."""
    section = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = section.get("rope_type", section.get("type", "default"))
    wanted = section.get("mscale_all_dim")
    if kind == "default" or not wanted or "factor" not in section:
        return 1.0
    return yarn_factor(section["factor"], wanted)


def _to_deepseek(config: ModelConfig) -> dict[str, Any]:
    stack = given(config.decoder)
    first = first_block(stack)
    layers = [block for s in stack.segments for block in s.blocks * s.repeats]
    attention, latent = first.self_attention, first.self_attention.latent
    moe = next((block.moe for block in layers if block.moe), MoEConfig(top_k=1))
    mlp = next((block.mlp for block in layers if not block.moe), moe.mlp)
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.embed_dim,
        "intermediate_size": mlp.mlp_dim, "num_hidden_layers": stack.num_layers,
        "num_attention_heads": attention.num_heads, "num_key_value_heads": attention.num_heads,
        "hidden_act": their_activation(mlp.activation), "rms_norm_eps": stack.norm.epsilon,
        "attention_bias": attention.use_bias, "mlp_bias": mlp.use_bias,
        "attention_dropout": attention.dropout_rate, "rope_theta": stack.position.rotary_base,
        "rope_scaling": _written_scaling(stack, attention),
        "max_position_embeddings": max_positions(stack.position),
        "kv_lora_rank": latent.rank, "q_lora_rank": latent.query_rank or None,
        "qk_nope_head_dim": attention.head_dim - latent.rotary_dim,
        "qk_rope_head_dim": latent.rotary_dim, "v_head_dim": latent.value_dim,
        "first_k_dense_replace": sum(block.moe is None for block in layers),
        "n_routed_experts": moe.num_experts, "n_shared_experts": moe.shared_experts,
        "moe_intermediate_size": moe.mlp.mlp_dim, "num_experts_per_tok": moe.top_k,
        "routed_scaling_factor": moe.gate_scale, "aux_loss_alpha": moe.balance_weight,
        "topk_method": _METHODS[moe.expert_groups > 1], "norm_topk_prob": False,
        "n_group": moe.expert_groups, "topk_group": moe.max_groups,
        "tie_word_embeddings": config.tie_logits}


def _written_scaling(stack: StackConfig, attention: AttentionConfig) -> dict[str, Any] | None:
    written = rope_scaling(stack.position)
    factor = math.sqrt((attention.scale or attention.head_dim ** -0.5) * attention.head_dim ** 0.5)
    if written is None or math.isclose(factor, 1.0, rel_tol=1e-9) or written["factor"] == 1.0:
        return written
    per_unit = yarn_factor(written["factor"], 1.0) - 1.0
    return {**written, "mscale_all_dim": (factor - 1.0) / per_unit,
            "attention_factor": stack.position.rotary_scaling.feature_factor or (1.0 + per_unit)}


def _part(first: bool, heads: int, keys: int, values: int) -> Layout:
    """Transposed, and of each head's rows the keys' or the values'."""
    start, stop = (0, keys) if first else (keys, keys + values)

    def view(tensor: np.ndarray) -> np.ndarray:
        rows = tensor.reshape(heads, keys + values, -1)[:, start:stop]
        return np.moveaxis(rows, -1, 0)
    return Layout(lambda shape: (heads * (keys + values), shape[0]), view)


def _rules(config: ModelConfig) -> Iterable[Rule]:
    layer = "model.layers.{n}"
    own, attention = f"{layer}.self_attn", "decoder/*/self_attention"
    config_ = first_block(config.decoder).self_attention
    latent = config_.latent
    sizes = (config_.num_heads, config_.head_dim - latent.rotary_dim, latent.value_dim)
    query = "q_b_proj" if latent.query_rank else "q_proj"
    rules = [Rule(f"{attention}/query/kernel", f"{own}.{query}.weight", TRANSPOSED),
             Rule(f"{attention}/query_latent/kernel", f"{own}.q_a_proj.weight", TRANSPOSED),
             Rule(f"{attention}/query_latent/bias", f"{own}.q_a_proj.bias"),
             Rule(f"{attention}/query_latent_norm/scale", f"{own}.q_a_layernorm.weight"),
             Rule(f"{attention}/latent/kernel", f"{own}.kv_a_proj_with_mqa.weight", TRANSPOSED),
             Rule(f"{attention}/latent/bias", f"{own}.kv_a_proj_with_mqa.bias"),
             Rule(f"{attention}/latent_norm/scale", f"{own}.kv_a_layernorm.weight"),
             Rule(f"{attention}/key/kernel", f"{own}.kv_b_proj.weight", _part(True, *sizes)),
             Rule(f"{attention}/value/kernel", f"{own}.kv_b_proj.weight", _part(False, *sizes)),
             Rule("decoder/*/mlp/router/kernel", f"{layer}.mlp.gate.weight", TRANSPOSED)]
    for ours, theirs in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
        rules += [Rule(f"decoder/*/mlp/{place}/{ours}/{kind}",
                       f"{layer}.mlp.{there}.{theirs}_proj.{tensor}", *layout)
                  for place, there in (("experts", "experts.{e}"), ("shared", "shared_experts"))
                  for kind, tensor, *layout in (("kernel", "weight", TRANSPOSED), ("bias", "bias"))]
    return [*llama_rules(config), *rules]   # of two rules for a path the later one counts


FAMILIES = (
    Family("deepseek_v2", "DeepseekV2ForCausalLM", "decoder_only",
           {"model_type": "deepseek_v2", **_DEEPSEEK2}, _from_deepseek, _to_deepseek, _rules,
           embedding="model.embed_tokens.weight", head="lm_head.weight", specials=SPECIALS,
           sizes=("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                  "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
                  "v_head_dim", "n_routed_experts", "moe_intermediate_size"),
           optional={"num_key_value_heads": int, "num_experts_per_tok": int, "n_group": int,
                     "topk_group": int, "aux_loss_alpha": float, **ROTARY_FIELDS},
           may_be_zero=("first_k_dense_replace",), nullable=("q_lora_rank",),
           fixed={"norm_topk_prob": (False,), "scoring_func": ("softmax",), "moe_layer_freq": (1,),
                  "ep_size": (1,)},
           harmless=("head_dim", "qk_head_dim", "seq_aux", "pretraining_tp"),
           renames=((r"((?:embed_tokens|layers|norm)\..*)", r"model.\1"),),
           unused=(r".*\.rotary_emb\.inv_freq",)),
)
