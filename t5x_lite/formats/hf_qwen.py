"""Qwen 3, dense and with experts: LLaMA with a norm over each head's queries and keys.

Traps of the format: windows act only with use_sliding_window, in the dense models from the layer
max_window_layers on; of a mixture, intermediate_size is that of the layers without experts.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.formats.hf_decoders import LLAMA, SIZES, SPECIALS, from_llama, llama_rules, to_llama
from t5x_lite.formats.hf_family import (
    ROTARY_FIELDS,
    Family,
    first_block,
    given,
    windows,
    written_windows,
)
from t5x_lite.formats.mapping import TRANSPOSED, Rule
from t5x_lite.layers.config import MLPConfig, MoEConfig
from t5x_lite.layers.routing import ROUTERS
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig, segments_of

_QWEN3 = {**{name: value for name, value in LLAMA.items() if name != "mlp_bias"},
          "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
          "head_dim": 128, "max_position_embeddings": 32768, "use_sliding_window": False,
          "sliding_window": 4096, "max_window_layers": 28}
_QWEN3_MOE = {**{name: value for name, value in _QWEN3.items() if name != "max_window_layers"},
              "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
              "num_key_value_heads": 4, "decoder_sparse_step": 1, "moe_intermediate_size": 768,
              "num_experts_per_tok": 8, "num_experts": 128, "norm_topk_prob": False,
              "router_aux_loss_coef": 0.001}


def _from_qwen3(hf: Mapping, tied: bool) -> ModelConfig:
    found = _windows(hf)
    plain = {name: value for name, value in hf.items() if name != "num_local_experts"}
    model = from_llama({**plain, "mlp_bias": False, "sliding_window": 0}, tied)
    stack = given(model.decoder)
    block = first_block(stack)
    attention = dataclasses.replace(block.self_attention, qk_norm=True, qk_norm_config=stack.norm)
    mixture = _mixture(hf, block.mlp)
    blocks = [dataclasses.replace(
        block, self_attention=dataclasses.replace(attention, window=window),
        moe=mixture if _is_sparse(hf, layer) else None) for layer, window in enumerate(found)]
    return dataclasses.replace(model, decoder=dataclasses.replace(stack, segments=segments_of(blocks)))


def _windows(hf: Mapping) -> list[int]:
    """The window of each layer, 0 for none; of a mixture all have it or none."""
    window = (hf["sliding_window"] or 0) if hf["use_sliding_window"] else 0
    if "num_experts" in hf:
        return [window] * hf["num_hidden_layers"]
    found = windows(hf, lambda layer: window > 0 and layer >= hf["max_window_layers"])
    if any(found) and not hf["use_sliding_window"]:
        raise UserError("layer_types of config.json holds 'sliding_attention', but "
                        "use_sliding_window is false. Make it true, or those layers "
                        "'full_attention'.")
    return found


def _mixture(hf: Mapping, mlp: MLPConfig) -> MoEConfig | None:
    if "num_experts" not in hf:
        return None
    # transformers 5 writes another name than the published files have.
    here, default = hf["num_experts"], _QWEN3_MOE["num_experts"]
    number = hf.get("num_local_experts", here)
    if here not in (number, default):
        raise UserError(f"config.json says num_experts={here} and num_local_experts={number}. "
                        "Correct the one that is wrong.")
    expert = dataclasses.replace(mlp, mlp_dim=hf["moe_intermediate_size"])
    return MoEConfig(num_experts=number, mlp=expert, router="top_k",
                     top_k=hf["num_experts_per_tok"], renormalize=hf["norm_topk_prob"],
                     dropless=True, balance_weight=float(hf["router_aux_loss_coef"]))


def _is_sparse(hf: Mapping, layer: int) -> bool:
    """Whether a layer has experts."""
    if "num_experts" not in hf or layer in (hf.get("mlp_only_layers") or ()):
        return False
    return (layer + 1) % hf["decoder_sparse_step"] == 0


def _layers(stack: StackConfig) -> list[BlockConfig]:
    return [block for s in stack.segments for block in s.blocks * s.repeats]


def _to_qwen3(config: ModelConfig) -> dict[str, Any]:
    written = {name: value for name, value in to_llama(config).items() if name != "mlp_bias"}
    window = written_windows(given(config.decoder))
    return {**written, **window, "use_sliding_window": bool(window["sliding_window"])}


def _to_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    layers = _layers(given(config.decoder))
    moe = next((block.moe for block in layers if block.moe), MoEConfig())
    written = {name: value for name, value in _to_qwen3(config).items() if name != "layer_types"}
    return {**written, "num_experts": moe.num_experts, "norm_topk_prob": moe.renormalize,
            "num_experts_per_tok": ROUTERS[moe.router].choices(moe),
            "intermediate_size": next((b.mlp for b in layers if not b.moe), moe.mlp).mlp_dim,
            "moe_intermediate_size": moe.mlp.mlp_dim, "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, block in enumerate(layers) if not block.moe],
            "router_aux_loss_coef": moe.balance_weight}


def _rules(config: ModelConfig) -> Iterable[Rule]:
    layer, ours = "model.layers.{n}", "decoder/*"
    experts = [Rule(f"{ours}/mlp/router/kernel", f"{layer}.mlp.gate.weight", TRANSPOSED)]
    for mine, theirs in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
        experts.append(Rule(f"{ours}/mlp/experts/{mine}/kernel",
                            f"{layer}.mlp.experts.{{e}}.{theirs}_proj.weight", TRANSPOSED))
    return [*llama_rules(config), *experts]   # of two rules for a path the later one counts


FAMILIES = tuple(
    Family(kind, name, "decoder_only", {"model_type": kind, **defaults}, _from_qwen3, to_hf, _rules,
           embedding="model.embed_tokens.weight", head="lm_head.weight", specials=SPECIALS,
           sizes=(*SIZES, "moe_intermediate_size", "num_experts"), optional=optional,
           nullable=("sliding_window",), own_defaults=("sliding_window",), harmless=harmless,
           renames=((r"((?:embed_tokens|layers|norm)\..*)", r"model.\1"),),
           unused=(r".*\.rotary_emb\.inv_freq",))
    for kind, name, defaults, to_hf, optional, harmless in (
        ("qwen3", "Qwen3ForCausalLM", _QWEN3, _to_qwen3,
         {"layer_types": list, **ROTARY_FIELDS}, ()),
        ("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE, _to_qwen3_moe,
         {"mlp_only_layers": list, "num_local_experts": int, **ROTARY_FIELDS}, ("max_window_layers",))))
