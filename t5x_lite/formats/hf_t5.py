"""T5, mT5, UMT5 (and with them T5 1.1, Flan-T5, ByT5) and Switch Transformers.

Traps of the format: the relative bias of a whole stack stands in its layer 0 (UMT5 has one a
layer); tied logits are scaled by d_model**-0.5 and untied ones are not; attention is not
scaled. transformers 5 ties whatever "tie_word_embeddings" says unless both tensors are there
and differ, and reads the flag as "scale the logits" (mT5: never scaled). It forces the flag on
for UMT5, so that it scales untied UMT5 checkpoints too, which transformers 4 and T5X do not;
here they are read as they were trained. A head that is missing though the flag is off was lost,
unless the file has scale_decoder_outputs, which transformers 5 writes and which says the same of
the scale: then nothing but a tied model can have been meant.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.formats.hf_family import (
    Family,
    activation,
    equal_layers,
    first_block,
    given,
    their_activation,
)
from t5x_lite.formats.mapping import TRANSPOSED, Rule
from t5x_lite.layers.config import AttentionConfig, MLPConfig, MoEConfig, NormConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig

_SHARED = {"d_kv": 64, "relative_attention_num_buckets": 32,
           "relative_attention_max_distance": 128, "dropout_rate": 0.1,
           "layer_norm_epsilon": 1e-6}
_T5 = {**_SHARED, "vocab_size": 32128, "d_model": 512, "d_ff": 2048, "num_layers": 6,
       "num_heads": 8, "feed_forward_proj": "relu"}
_MT5 = {**_SHARED, "vocab_size": 250112, "d_model": 512, "d_ff": 1024, "num_layers": 8,
        "num_heads": 6, "feed_forward_proj": "gated-gelu"}
_SWITCH = {**_SHARED, "vocab_size": 32128, "d_model": 768, "d_ff": 2048, "num_layers": 12,
           "num_decoder_layers": 12, "num_heads": 12, "dense_act_fn": "relu",
           "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3, "num_experts": 8,
           "expert_capacity": 64, "router_bias": False, "router_jitter_noise": 0.01,
           "router_ignore_padding_tokens": False, "router_z_loss_coef": 0.001,
           "router_aux_loss_coef": 0.001}
_SPECIALS = {"pad_token_id": 0, "eos_token_id": 1}


# --- configs --------------------------------------------------------------------------------------

def _stacks(hf: Mapping, mlp: MLPConfig, segments, *, per_layer: bool, logits_scale: float,
            tied: bool) -> ModelConfig:
    """An encoder-decoder; segments(side, BlockConfig, num_layers) groups the layers."""
    rate = float(hf["dropout_rate"])
    attention = AttentionConfig(num_heads=hf["num_heads"], head_dim=hf["d_kv"], scale=1.0,
                                dropout_rate=rate)
    position = PositionConfig("t5_bias", num_buckets=hf["relative_attention_num_buckets"],
                              max_distance=hf["relative_attention_max_distance"],
                              per_layer=per_layer)

    def stack(side: str, num_layers: int) -> StackConfig:
        cross = attention if side == "decoder" else None
        return StackConfig(
            segments(side, BlockConfig(attention, cross, mlp), num_layers),
            causal=side == "decoder", position=position, dropout_rate=rate,
            norm=NormConfig("rms", float(hf["layer_norm_epsilon"])))

    depth = hf["num_layers"]
    return ModelConfig(
        vocab_size=hf["vocab_size"], embed_dim=hf["d_model"], encoder=stack("encoder", depth),
        decoder=stack("decoder", hf.get("num_decoder_layers", depth)), tie_logits=tied,
        logits_scale=logits_scale, decoder_start_id=_start(hf))


def _start(hf: Mapping) -> int:
    """The token that a decoder begins with."""
    start = hf.get("decoder_start_token_id", 0)
    if start >= hf["vocab_size"]:
        raise UserError(f"decoder_start_token_id={start} of config.json: must be below vocab_size="
                        f"{hf['vocab_size']}.")
    return start


def _from_t5(hf: Mapping, tied: bool) -> ModelConfig:
    kind = hf["model_type"]
    gate, _, act = hf["feed_forward_proj"].rpartition("-")
    # "gated-gelu" has always meant the tanh approximation.
    act = "gelu_new" if (gate, act) == ("gated", "gelu") else act
    mlp = MLPConfig(hf["d_ff"], activation(act), gate == "gated",
                    dropout_rate=float(hf["dropout_rate"]))
    scaled = {"t5": hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True)),
              "mt5": False, "umt5": tied}[kind]
    return _stacks(hf, mlp, lambda _, block, depth: equal_layers(block, depth),
                   per_layer=kind == "umt5", tied=tied,
                   logits_scale=hf["d_model"] ** -0.5 if scaled else 1.0)


def _from_switch(hf: Mapping, tied: bool) -> ModelConfig:
    mlp = MLPConfig(hf["d_ff"], activation(hf["dense_act_fn"]), gated=False,
                    dropout_rate=float(hf["dropout_rate"]))
    moe = MoEConfig(
        num_experts=hf["num_experts"], mlp=mlp, router="switch", overflow="zero",
        expert_capacity=hf["expert_capacity"], mask_padding=hf["router_ignore_padding_tokens"],
        jitter=float(hf["router_jitter_noise"]), router_bias=hf["router_bias"],
        balance_weight=float(hf["router_aux_loss_coef"]), z_weight=float(hf["router_z_loss_coef"]))

    def segments(side: str, block: BlockConfig, depth: int) -> tuple[SegmentConfig, ...]:
        sparse = hf[f"num_sparse_{side}_layers"]
        if sparse > depth:
            raise UserError(f"num_sparse_{side}_layers={sparse} of config.json: must be at most "
                            f"the {depth} layers there are.")
        period = depth // sparse if sparse else depth
        step = hf.get(f"{side}_sparse_step", period)
        if sparse and step != period:   # releases of transformers differ in which they follow
            raise UserError(f"{side}_sparse_step={step} of config.json contradicts "
                            f"num_sparse_{side}_layers={sparse} of {depth} layers, which makes "
                            f"every {period}th layer sparse. Correct one of them.")
        blocks = tuple(dataclasses.replace(block, moe=moe) if i % period == 1 or period == 1
                       else block for i in range(depth))
        whole = depth // period
        rest = blocks[whole * period:]
        return (SegmentConfig(blocks[:period], whole),
                *((SegmentConfig(rest),) if rest else ()))

    return _stacks(hf, mlp, segments, per_layer=False, tied=tied,
                   logits_scale=hf["d_model"] ** -0.5 if tied else 1.0)


def _sizes(config: ModelConfig) -> dict[str, Any]:
    encoder, decoder = given(config.encoder), given(config.decoder)
    block = encoder.segments[0].blocks[0]
    return {
        "vocab_size": config.vocab_size, "d_model": config.embed_dim,
        "d_kv": block.self_attention.head_dim, "num_heads": block.self_attention.num_heads,
        "num_layers": encoder.num_layers, "num_decoder_layers": decoder.num_layers,
        "relative_attention_num_buckets": encoder.position.num_buckets,
        "relative_attention_max_distance": encoder.position.max_distance,
        "layer_norm_epsilon": encoder.norm.epsilon, "dropout_rate": encoder.dropout_rate,
        "is_encoder_decoder": True, "decoder_start_token_id": config.decoder_start_id,
    }


def _to_t5(config: ModelConfig) -> dict[str, Any]:
    mlp = first_block(config.encoder).mlp
    act = their_activation(mlp.activation)
    if mlp.gated:
        act = "gated-gelu" if act == "gelu_new" else f"gated-{act}"
    return {**_sizes(config), "d_ff": mlp.mlp_dim, "feed_forward_proj": act,
            # T5's flag says whether logits are scaled; see the top of this file.
            "tie_word_embeddings": config.logits_scale != 1.0,
            **({"scale_decoder_outputs": False}
               if config.tie_logits and config.logits_scale == 1.0 else {})}


def _to_mt5(config: ModelConfig) -> dict[str, Any]:
    fields = {**_to_t5(config), "tie_word_embeddings": config.tie_logits}
    fields.pop("scale_decoder_outputs", None)
    return fields


def _to_switch(config: ModelConfig) -> dict[str, Any]:
    moe = next((b.moe for b in _blocks(config.encoder) + _blocks(config.decoder) if b.moe),
               MoEConfig())
    sparse = {f"num_sparse_{side}_layers": sum(b.moe is not None for b in _blocks(stack))
              for side, stack in (("encoder", config.encoder), ("decoder", config.decoder))}
    return {**_sizes(config), **sparse, "d_ff": moe.mlp.mlp_dim,
            "dense_act_fn": their_activation(moe.mlp.activation), "num_experts": moe.num_experts,
            "expert_capacity": moe.expert_capacity, "router_bias": moe.router_bias,
            "router_jitter_noise": moe.jitter, "router_ignore_padding_tokens": moe.mask_padding,
            "router_z_loss_coef": moe.z_weight, "router_aux_loss_coef": moe.balance_weight,
            "tie_word_embeddings": config.tie_logits}


def _blocks(stack: StackConfig | None) -> list[BlockConfig]:
    return [b for s in given(stack).segments for b in s.blocks * s.repeats]


# --- tensors --------------------------------------------------------------------------------------

def _rules(dense: str) -> list[Rule]:
    """The table; `dense` is the name of a dense MLP."""
    rules = [Rule("token_embedding/embedding", "shared.weight"),
             Rule("logits/kernel", "lm_head.weight", TRANSPOSED)]
    for side, attentions in (("encoder", ("self",)), ("decoder", ("self", "cross"))):
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        rules += [
            Rule(f"{side}/final_norm/scale", f"{side}.final_layer_norm.weight"),
            Rule(f"{side}/relative_position/embedding", f"{side}.block.0.{bias}"),
            Rule(f"{side}/*/relative_position/embedding", f"{side}.block.{{n}}.{bias}")]
        for i, kind in enumerate(attentions):
            layer = f"{side}.block.{{n}}.layer.{i}"
            theirs = {"self": "SelfAttention", "cross": "EncDecAttention"}[kind]
            rules.append(Rule(f"{side}/*/pre_{kind}_attention_norm/scale",
                              f"{layer}.layer_norm.weight"))
            rules += [Rule(f"{side}/*/{kind}_attention/{name}/kernel",
                           f"{layer}.{theirs}.{name[0]}.weight", TRANSPOSED)
                      for name in ("query", "key", "value", "out")]
        layer = f"{side}.block.{{n}}.layer.{len(attentions)}"
        rules.append(Rule(f"{side}/*/pre_mlp_norm/scale", f"{layer}.layer_norm.weight"))
        rules += [Rule(f"{side}/*/mlp/{name}/kernel", f"{layer}.{dense}.{name}.weight", TRANSPOSED)
                  for name in ("wi", "wi_0", "wi_1", "wo")]
        rules += [Rule(f"{side}/*/mlp/experts/{name}/kernel",
                       f"{layer}.mlp.experts.expert_{{e}}.{name}.weight", TRANSPOSED)
                  for name in ("wi", "wo")]
        rules += [Rule(f"{side}/*/mlp/router/kernel", f"{layer}.mlp.router.classifier.weight",
                       TRANSPOSED),
                  Rule(f"{side}/*/mlp/router/bias", f"{layer}.mlp.router.classifier.bias")]
    return rules


def _t5_rules(config: ModelConfig) -> Iterable[Rule]:
    return _rules("DenseReluDense")


def _switch_rules(config: ModelConfig) -> Iterable[Rule]:
    return _rules("mlp")


_OPTIONAL = {"num_decoder_layers": int, "scale_decoder_outputs": bool,
             "decoder_start_token_id": int}
_SPARSE = ("num_sparse_encoder_layers", "num_sparse_decoder_layers", "encoder_sparse_step",
           "decoder_sparse_step")
_FIXED = {"is_decoder": (False,), "router_type": ("tokens_masked",),
          "num_selected_experts": (1,), "scalable_attention": (True,)}
# Derived from feed_forward_proj (T5) or said again by it (Switch), or settings of training.
_HARMLESS = ("is_gated_act", "dense_act_fn", "feed_forward_proj", "n_positions", "router_dtype",
             "add_router_probs", "output_past")


def _family(model_type: str, model_class: str, defaults: Mapping, from_hf, to_hf, rules) -> Family:
    sparse = model_type == "switch_transformers"
    return Family(
        model_type, model_class, "encoder_decoder", {"model_type": model_type, **defaults},
        from_hf, to_hf, rules, embedding="shared.weight", head="lm_head.weight",
        specials=_SPECIALS, fixed=_FIXED, harmless=_HARMLESS,
        optional={**_OPTIONAL, **(dict.fromkeys(_SPARSE[2:], int) if sparse else {})},
        layer_counts=("num_layers", "num_decoder_layers", *_SPARSE[:2]),
        sizes=("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_experts"),
        may_be_zero=(*_SPARSE, "decoder_start_token_id"), tied_by="scale_decoder_outputs" if model_type == "t5" else "",
        renames=((r"(encoder|decoder)\.embed_tokens\.weight", "shared.weight"),),
        # A table that the first releases held and never used.
        unused=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",))


FAMILIES = (
    _family("t5", "T5ForConditionalGeneration", _T5, _from_t5, _to_t5, _t5_rules),
    _family("mt5", "MT5ForConditionalGeneration", _MT5, _from_t5, _to_mt5, _t5_rules),
    _family("umt5", "UMT5ForConditionalGeneration", _MT5, _from_t5, _to_mt5, _t5_rules),
    _family("switch_transformers", "SwitchTransformersForConditionalGeneration", _SWITCH,
            _from_switch, _to_switch, _switch_rules),
)
