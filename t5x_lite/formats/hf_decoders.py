"""GPT-2, GPT-NeoX, LLaMA and Mixtral.

Traps of the formats: GPT-2's Conv1D kernels are (in, out) as ours are, not transposed, with
query, key and value side by side; NeoX interleaves the three within each head; LLaMA's rotary
pairs are (i, i + dim/2), which is our default; Mixtral has one set of matrices an expert.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from t5x_lite.formats.hf_family import (
    ROTARY_FIELDS,
    Family,
    activation,
    equal_layers,
    first_block,
    given,
    max_positions,
    normal_init,
    rope_scaling,
    rotary,
    their_activation,
)
from t5x_lite.formats.mapping import SAME, TRANSPOSED, Rule, column_block, head_block
from t5x_lite.layers.config import AttentionConfig, MLPConfig, MoEConfig, NormConfig, PositionConfig
from t5x_lite.layers.routing import ROUTERS
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig

SPECIALS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def decoder_only(hf: Mapping, stack: StackConfig, embed_dim: int, tied: bool) -> ModelConfig:
    return ModelConfig("decoder_only", vocab_size=hf["vocab_size"], embed_dim=embed_dim,
                       encoder=None, decoder=stack, tie_logits=tied,
                       init=normal_init(float(hf["initializer_range"])))


def with_bias(ours: str, theirs: str, layout=SAME, bias_layout=SAME) -> list[Rule]:
    """The kernel of a dense layer, and its bias where it has one."""
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", layout),
            Rule(f"{ours}/bias", f"{theirs}.bias", bias_layout)]


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")]


# --- GPT-2 ----------------------------------------------------------------------------------------

_GPT2 = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
         "activation_function": "gelu_new", "resid_pdrop": 0.1, "attn_pdrop": 0.1,
         "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}


def _from_gpt2(hf: Mapping, tied: bool) -> ModelConfig:
    width, rate = hf["n_embd"], float(hf["resid_pdrop"])
    head_dim = width // hf["n_head"]
    scale = head_dim ** -0.5 if hf["scale_attn_weights"] else 1.0

    def block(layer: int) -> BlockConfig:
        by_layer = 1.0 / (layer + 1) if hf["scale_attn_by_inverse_layer_idx"] else 1.0
        return BlockConfig(
            AttentionConfig(hf["n_head"], head_dim, scale=scale * by_layer, use_bias=True,
                            use_out_bias=True, dropout_rate=float(hf["attn_pdrop"])),
            mlp=MLPConfig(hf.get("n_inner", 4 * width), activation(hf["activation_function"]),
                          gated=False, use_bias=True))

    depth = hf["n_layer"]
    segments = (tuple(equal_layers(block(i), 1)[0] for i in range(depth))
                if hf["scale_attn_by_inverse_layer_idx"] else equal_layers(block(0), depth))
    return decoder_only(hf, StackConfig(
        segments, causal=True, position=PositionConfig("learned", max_length=hf["n_positions"]),
        norm=NormConfig("layer", float(hf["layer_norm_epsilon"]), use_bias=True),
        dropout_rate=rate), width, tied)


def _to_gpt2(config: ModelConfig) -> dict[str, Any]:
    stack = given(config.decoder)
    block = first_block(stack)
    heads = block.self_attention.num_heads
    later = stack.segments[-1].blocks[-1].self_attention.scale
    return {"vocab_size": config.vocab_size, "n_positions": stack.position.max_length,
            "n_embd": config.embed_dim, "n_layer": stack.num_layers, "n_head": heads,
            "n_inner": block.mlp.mlp_dim,
            "activation_function": their_activation(block.mlp.activation),
            "layer_norm_epsilon": stack.norm.epsilon, "tie_word_embeddings": config.tie_logits,
            "scale_attn_weights": block.self_attention.scale != 1.0,
            "scale_attn_by_inverse_layer_idx": later != block.self_attention.scale,
            "resid_pdrop": stack.dropout_rate, "embd_pdrop": stack.dropout_rate,
            "attn_pdrop": block.self_attention.dropout_rate}


def _gpt2_rules(config: ModelConfig) -> Iterable[Rule]:
    layer = "transformer.h.{n}"
    rules = [Rule("token_embedding/embedding", "transformer.wte.weight"),
             Rule("decoder/learned_positions/embedding", "transformer.wpe.weight"),
             Rule("logits/kernel", "lm_head.weight", TRANSPOSED),
             *_norm("decoder/final_norm", "transformer.ln_f"),
             *_norm("decoder/*/pre_self_attention_norm", f"{layer}.ln_1"),
             *_norm("decoder/*/pre_mlp_norm", f"{layer}.ln_2"),
             *with_bias("decoder/*/self_attention/out", f"{layer}.attn.c_proj"),
             *with_bias("decoder/*/mlp/wi", f"{layer}.mlp.c_fc"),
             *with_bias("decoder/*/mlp/wo", f"{layer}.mlp.c_proj")]
    for i, name in enumerate(("query", "key", "value")):
        block = column_block(i, 3)
        rules += with_bias(f"decoder/*/self_attention/{name}", f"{layer}.attn.c_attn", block,
                            block)
    return rules


# --- GPT-NeoX -------------------------------------------------------------------------------------

_NEOX = {"vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44,
         "num_attention_heads": 64, "intermediate_size": 24576, "hidden_act": "gelu",
         "attention_dropout": 0.0, "hidden_dropout": 0.0, "max_position_embeddings": 2048,
         "initializer_range": 0.02, "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
         "use_parallel_residual": True, "attention_bias": True, "rotary_pct": 0.25,
         "rotary_emb_base": 10000.0}


def _from_neox(hf: Mapping, tied: bool) -> ModelConfig:
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    block = BlockConfig(
        AttentionConfig(heads, width // heads, use_bias=hf["attention_bias"],
                        use_out_bias=hf["attention_bias"],
                        dropout_rate=float(hf["attention_dropout"])),
        mlp=MLPConfig(hf["intermediate_size"], activation(hf["hidden_act"]), gated=False,
                      use_bias=True))
    return decoder_only(hf, StackConfig(
        equal_layers(block, hf["num_hidden_layers"]), causal=True,
        position=rotary(hf, hf.get("rope_theta", hf["rotary_emb_base"]), hf["rotary_pct"]),
        norm=NormConfig("layer", float(hf["layer_norm_eps"]), use_bias=True),
        residual="parallel_two_norms" if hf["use_parallel_residual"] else "pre",
        dropout_rate=float(hf["hidden_dropout"])), width, tied)


def _to_neox(config: ModelConfig) -> dict[str, Any]:
    stack = given(config.decoder)
    block = first_block(stack)
    return {"vocab_size": config.vocab_size, "hidden_size": config.embed_dim,
            "num_hidden_layers": stack.num_layers,
            "num_attention_heads": block.self_attention.num_heads,
            "intermediate_size": block.mlp.mlp_dim,
            "hidden_act": their_activation(block.mlp.activation),
            "attention_dropout": block.self_attention.dropout_rate,
            "hidden_dropout": stack.dropout_rate, "layer_norm_eps": stack.norm.epsilon,
            "attention_bias": block.self_attention.use_bias,
            "use_parallel_residual": stack.residual == "parallel_two_norms",
            "rotary_pct": stack.position.rotary_fraction,
            "rotary_emb_base": stack.position.rotary_base,
            "rope_scaling": rope_scaling(stack.position),
            "max_position_embeddings": max_positions(stack.position),
            "tie_word_embeddings": config.tie_logits}


def _neox_rules(config: ModelConfig) -> Iterable[Rule]:
    layer, heads = "gpt_neox.layers.{n}", first_block(config.decoder).self_attention.num_heads
    rules = [Rule("token_embedding/embedding", "gpt_neox.embed_in.weight"),
             Rule("logits/kernel", "embed_out.weight", TRANSPOSED),
             *_norm("decoder/final_norm", "gpt_neox.final_layer_norm"),
             *_norm("decoder/*/pre_self_attention_norm", f"{layer}.input_layernorm"),
             *_norm("decoder/*/pre_mlp_norm", f"{layer}.post_attention_layernorm"),
             *with_bias("decoder/*/self_attention/out", f"{layer}.attention.dense", TRANSPOSED),
             *with_bias("decoder/*/mlp/wi", f"{layer}.mlp.dense_h_to_4h", TRANSPOSED),
             *with_bias("decoder/*/mlp/wo", f"{layer}.mlp.dense_4h_to_h", TRANSPOSED)]
    for i, name in enumerate(("query", "key", "value")):
        block = head_block(i, 3, heads)
        rules += with_bias(f"decoder/*/self_attention/{name}",
                            f"{layer}.attention.query_key_value", block, block)
    return rules


# --- LLaMA and Mixtral ----------------------------------------------------------------------------

LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
          "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
          "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
          "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
          "attention_dropout": 0.0, "rope_theta": 10000.0}
_MIXTRAL = {**LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072, "num_experts_per_tok": 2, "num_local_experts": 8,
            "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "rope_theta": 1e6,
            "sliding_window": 0}


def from_llama(hf: Mapping, tied: bool) -> ModelConfig:
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    mlp = MLPConfig(hf["intermediate_size"], activation(hf["hidden_act"]), gated=True,
                    use_bias=hf["mlp_bias"])
    window = hf["sliding_window"] if "sliding_window" in hf else 0
    moe = None
    if "num_local_experts" in hf:
        moe = MoEConfig(num_experts=hf["num_local_experts"], mlp=mlp, router="top_k",
                        top_k=hf["num_experts_per_tok"], renormalize=True, dropless=True,
                        balance_weight=float(hf["router_aux_loss_coef"]),
                        jitter=float(hf["router_jitter_noise"]))
    attention = AttentionConfig(
        heads, hf.get("head_dim", width // heads),
        num_kv_heads=hf.get("num_key_value_heads", heads), use_bias=hf["attention_bias"],
        use_out_bias=hf["attention_bias"], window=window,
        dropout_rate=float(hf["attention_dropout"]))
    return decoder_only(hf, StackConfig(
        equal_layers(BlockConfig(attention, mlp=mlp, moe=moe), hf["num_hidden_layers"]),
        causal=True, position=rotary(hf, hf["rope_theta"]),
        norm=NormConfig("rms", float(hf["rms_norm_eps"]))), width, tied)


def to_llama(config: ModelConfig) -> dict[str, Any]:
    stack = given(config.decoder)
    block = first_block(stack)
    attention = block.self_attention
    mlp = block.mlp if block.moe is None else block.moe.mlp
    return {"vocab_size": config.vocab_size, "hidden_size": config.embed_dim,
            "intermediate_size": mlp.mlp_dim, "num_hidden_layers": stack.num_layers,
            "num_attention_heads": attention.num_heads, "head_dim": attention.head_dim,
            "num_key_value_heads": attention.kv_heads,
            "hidden_act": their_activation(mlp.activation), "rms_norm_eps": stack.norm.epsilon,
            "attention_bias": attention.use_bias, "mlp_bias": mlp.use_bias,
            "attention_dropout": attention.dropout_rate, "rope_theta": stack.position.rotary_base,
            "rope_scaling": rope_scaling(stack.position),
            "max_position_embeddings": max_positions(stack.position),
            "tie_word_embeddings": config.tie_logits}


def _to_mixtral(config: ModelConfig) -> dict[str, Any]:
    block = first_block(config.decoder)
    moe = block.moe or MoEConfig()
    return {**to_llama(config), "num_local_experts": moe.num_experts,
            "num_experts_per_tok": ROUTERS[moe.router].choices(moe),
            "router_aux_loss_coef": moe.balance_weight,
            "router_jitter_noise": moe.jitter,
            "sliding_window": block.self_attention.window or None}


def llama_rules(config: ModelConfig) -> Iterable[Rule]:
    layer = "model.layers.{n}"
    rules = [Rule("token_embedding/embedding", "model.embed_tokens.weight"),
             Rule("logits/kernel", "lm_head.weight", TRANSPOSED),
             Rule("decoder/final_norm/scale", "model.norm.weight"),
             Rule("decoder/*/pre_self_attention_norm/scale", f"{layer}.input_layernorm.weight"),
             Rule("decoder/*/pre_mlp_norm/scale", f"{layer}.post_attention_layernorm.weight"),
             Rule("decoder/*/mlp/router/kernel", f"{layer}.block_sparse_moe.gate.weight",
                  TRANSPOSED)]
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        rules += with_bias(f"decoder/*/self_attention/{ours}", f"{layer}.self_attn.{theirs}_proj",
                            TRANSPOSED)
    rules += [Rule(f"decoder/*/self_attention/{ours}_norm/scale",
                   f"{layer}.self_attn.{theirs}_norm.weight")
              for ours, theirs in (("query", "q"), ("key", "k"))]
    for ours, theirs, expert in (("wi_0", "gate", "w1"), ("wi_1", "up", "w3"),
                                 ("wo", "down", "w2")):
        rules += with_bias(f"decoder/*/mlp/{ours}", f"{layer}.mlp.{theirs}_proj", TRANSPOSED)
        rules.append(Rule(f"decoder/*/mlp/experts/{ours}/kernel",
                          f"{layer}.block_sparse_moe.experts.{{e}}.{expert}.weight", TRANSPOSED))
    return rules


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
          "num_key_value_heads", "head_dim", "num_local_experts")

FAMILIES = (
    Family("gpt2", "GPT2LMHeadModel", "decoder_only", _GPT2, _from_gpt2, _to_gpt2, _gpt2_rules,
           embedding="transformer.wte.weight", head="lm_head.weight", specials=SPECIALS,
           optional={"n_inner": int}, harmless=("reorder_and_upcast_attn",),
           layer_counts=("n_layer",), sizes=("vocab_size", "n_embd", "n_head", "n_inner"),
           renames=((r"((?:wte|wpe|h|ln_f)\..*)", r"transformer.\1"),),
           unused=(r".*\.attn\.(masked_)?bias",)),
    Family("gpt_neox", "GPTNeoXForCausalLM", "decoder_only", _NEOX, _from_neox, _to_neox,
           _neox_rules, embedding="gpt_neox.embed_in.weight", head="embed_out.weight",
           specials=SPECIALS, sizes=SIZES, optional=ROTARY_FIELDS,
           fixed={"partial_rotary_factor": (), "position_embedding_type": ("rotary",)},
           harmless=("attention_probs_dropout_prob", "hidden_dropout_prob"),
           renames=((r"((?:embed_in|layers|final_layer_norm)\..*)", r"gpt_neox.\1"),
                    (r"lm_head\.weight", "embed_out.weight")),
           unused=(r".*\.attention\.(masked_)?bias", r".*\.rotary_emb\.inv_freq")),
    *(Family(kind, name, "decoder_only", {"model_type": kind, **defaults}, from_llama, to_hf,
             llama_rules, embedding="model.embed_tokens.weight", head="lm_head.weight",
             specials=SPECIALS, sizes=SIZES, may_be_zero=("sliding_window",),
             optional={"head_dim": int, "num_key_value_heads": int, **ROTARY_FIELDS},
             fixed={"partial_rotary_factor": (1, 1.0), "layer_types": ("full_attention",),
                    "num_experts": ()},
             renames=((r"((?:embed_tokens|layers|norm)\..*)", r"model.\1"),),
             unused=(r".*\.rotary_emb\.inv_freq",))
      for kind, name, defaults, to_hf in (
          ("llama", "LlamaForCausalLM", LLAMA, to_llama),
          ("mixtral", "MixtralForCausalLM", _MIXTRAL, _to_mixtral))),
)
