"""The presets compute what published config.json files say: their checkpoints fit init_from."""

import importlib
import json

import pytest

from t5x_lite.formats import hf
from t5x_lite.formats.functions import differences

_T5_1_1 = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_LLAMA_3_1 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# What the files say that decides the function, defaults of transformers left out as there.
PUBLISHED = {
    "t5_1_0:small": ("google-t5/t5-small", {
        "model_type": "t5", "d_ff": 2048, "d_kv": 64, "d_model": 512, "num_heads": 8,
        "num_layers": 6, "relative_attention_num_buckets": 32, "vocab_size": 32128}),
    "t5_1_1:small": ("google/t5-v1_1-small", {
        **_T5_1_1, "d_ff": 1024, "d_kv": 64, "d_model": 512, "num_decoder_layers": 8,
        "num_heads": 6, "num_layers": 8, "vocab_size": 32128}),
    "mt5:small": ("google/mt5-small", {
        **_T5_1_1, "model_type": "mt5", "d_ff": 1024, "d_kv": 64, "d_model": 512,
        "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8, "vocab_size": 250112}),
    "byt5:small": ("google/byt5-small", {
        **_T5_1_1, "d_ff": 3584, "d_kv": 64, "d_model": 1472, "num_decoder_layers": 4,
        "num_heads": 6, "num_layers": 12, "vocab_size": 384}),
    "umt5:small": ("google/umt5-small", {
        **_T5_1_1, "model_type": "umt5", "d_ff": 1024, "d_kv": 64, "d_model": 512,
        "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8, "vocab_size": 256384}),
    "gpt2:small": ("openai-community/gpt2", {
        "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}),
    "gpt_neox:20b": ("EleutherAI/gpt-neox-20b", {
        "model_type": "gpt_neox", "hidden_act": "gelu_fast", "hidden_size": 6144,
        "intermediate_size": 24576, "layer_norm_eps": 1e-5, "num_attention_heads": 64,
        "num_hidden_layers": 44, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50432}),
    "llama:2_7b": ("meta-llama/Llama-2-7b-hf", {
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "tie_word_embeddings": False, "vocab_size": 32000}),
    "llama:3_1_8b": ("meta-llama/Llama-3.1-8B", {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_scaling": _LLAMA_3_1,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256}),
    "llama:3_2_1b": ("meta-llama/Llama-3.2-1B", {
        "model_type": "llama", "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_scaling": {**_LLAMA_3_1, "factor": 32.0}, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "vocab_size": 128256}),
    "pythia:160m": ("EleutherAI/pythia-160m", {
        "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 768,
        "intermediate_size": 3072, "layer_norm_eps": 1e-5, "max_position_embeddings": 2048,
        "num_attention_heads": 12, "num_hidden_layers": 12, "rotary_emb_base": 10000,
        "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True,
        "vocab_size": 50304}),
    "flan_t5:small": ("google/flan-t5-small", {
        **_T5_1_1, "d_ff": 1024, "d_kv": 64, "d_model": 512, "num_decoder_layers": 8,
        "num_heads": 6, "num_layers": 8, "n_positions": 512, "output_past": True,
        "dense_act_fn": "gelu_new", "is_gated_act": True, "vocab_size": 32128}),
    "mixtral:8x7b": ("mistralai/Mixtral-8x7B-v0.1", {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32000}),
    "gemma:2_2b": ("google/gemma-2-2b", {
        "model_type": "gemma2", "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "sliding_window": 4096, "vocab_size": 256000}),
    "gemma:2_27b": ("google/gemma-2-27b", {
        "model_type": "gemma2", "head_dim": 128, "hidden_size": 4608, "intermediate_size": 36864,
        "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144, "sliding_window_size": 4096}),
    "gemma:3_1b": ("google/gemma-3-1b-pt", {
        "model_type": "gemma3_text", "attn_logit_softcapping": None, "head_dim": 256,
        "final_logit_softcapping": None, "hidden_size": 1152, "intermediate_size": 6912,
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "vocab_size": 262144}),
    "gemma:3_4b": ("google/gemma-3-4b-pt", {
        "model_type": "gemma3", "mm_tokens_per_image": 256, "vision_config": {"hidden_size": 1152},
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560,
                        "intermediate_size": 10240, "num_hidden_layers": 34,
                        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 1024}}),
    "qwen:0_6b": ("Qwen/Qwen3-0.6B", {
        "model_type": "qwen3", "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936}),
    "qwen:30b_a3b": ("Qwen/Qwen3-30B-A3B", {
        "model_type": "qwen3_moe", "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048,
        "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rope_theta": 1000000.0, "sliding_window": None,
        "use_sliding_window": False, "vocab_size": 151936}),
    "olmo:7b": ("allenai/OLMo-2-1124-7B", {
        "model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 500000,
        "tie_word_embeddings": False, "vocab_size": 100352}),
    "deepseek:v2_lite": ("deepseek-ai/DeepSeek-V2-Lite", {
        "model_type": "deepseek_v2", "aux_loss_alpha": 0.001, "ep_size": 1,
        "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408,
        "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
            "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
        "seq_aux": True, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128,
        "vocab_size": 102400}),
    "bert:base": ("google-bert/bert-base-uncased", {
        "model_type": "bert", "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 12,
        "num_hidden_layers": 12, "type_vocab_size": 2, "vocab_size": 30522}),
}

# Pythia's other sizes (EleutherAI/pythia, models/*.yml: the rows are padded by the size of its model
# parallelism), T5 1.1's as LM-adapted and as Flan (their config.json differ from the small ones in these).
_PYTHIA = {"14m": (128, 4, 6, 50304), "31m": (256, 8, 6, 50304), "70m": (512, 8, 6, 50304),
           "410m": (1024, 16, 24, 50304), "1b": (2048, 8, 16, 50304), "1_4b": (2048, 16, 24, 50304),
           "2_8b": (2560, 32, 32, 50304), "6_9b": (4096, 32, 32, 50432), "12b": (5120, 40, 36, 50688)}
for _size, (_width, _heads, _layers, _rows) in _PYTHIA.items():
    PUBLISHED[f"pythia:{_size}"] = (f"EleutherAI/pythia-{_size.replace('_', '.')}", {
        **PUBLISHED["pythia:160m"][1], "hidden_size": _width, "intermediate_size": 4 * _width,
        "num_attention_heads": _heads, "num_hidden_layers": _layers, "vocab_size": _rows})
_T5 = {"small": (512, 1024, 6, 8), "base": (768, 2048, 12, 12), "large": (1024, 2816, 16, 24),
       "xl": (2048, 5120, 32, 24), "xxl": (4096, 10240, 64, 24)}
for _size, (_width, _mlp, _heads, _layers) in _T5.items():
    for _family, _name in (("flan_t5", "google/flan-t5-{}"), ("t5_lm_adapted", "google/t5-{}-lm-adapt")):
        PUBLISHED[f"{_family}:{_size}"] = (_name.format(_size), {
            **PUBLISHED["t5_1_1:small"][1], "d_model": _width, "d_ff": _mlp, "num_heads": _heads,
            "num_layers": _layers, "num_decoder_layers": _layers})
PUBLISHED["llama:3_2_3b"] = ("meta-llama/Llama-3.2-3B", {
    **PUBLISHED["llama:3_2_1b"][1], "head_dim": 128, "hidden_size": 3072, "num_attention_heads": 24,
    "num_hidden_layers": 28})


@pytest.mark.parametrize("preset", PUBLISHED)
def test_preset_is_the_published_model(preset, tmp_path):
    family, size = preset.split(":")
    model = importlib.import_module(f"configs.{family}").run(size).model
    _, config = PUBLISHED[preset]
    assert differences(model, hf.model_config(config)) == []
    # --config=hf:DIR has the same shapes by config.json alone.
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert differences(model, importlib.import_module("configs.hf").run(str(tmp_path)).model) == []
    # And back: what we would write for it describes the same model.
    assert hf.hf_config(model, config["model_type"])["vocab_size"] == model.vocab_size
