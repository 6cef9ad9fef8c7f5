"""Tiny models of Hugging Face transformers with random weights, and what they compute.

Sizes are odd on purpose: heads * head_dim is not the width where the family allows it,
encoder and decoder differ in depth, and every parameter (norms and biases too) is random.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with Hugging Face needs torch")
transformers = pytest.importorskip(
    "transformers", reason="parity with Hugging Face needs transformers")
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

VOCAB = 61

_T5 = {"vocab_size": VOCAB, "d_model": 20, "d_kv": 6, "d_ff": 28, "num_layers": 3,
       "num_decoder_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
       "relative_attention_max_distance": 12, "dropout_rate": 0.0}
_LLAMA = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
_NEOX = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2,
         "num_attention_heads": 3, "rotary_pct": 0.5}
_BERT = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2,
         "num_attention_heads": 3, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}
_GPT2 = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 24, "n_layer": 3, "n_head": 3,
         "n_inner": 28, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
         "bos_token_id": None, "eos_token_id": None}
_GEMMA = {**_LLAMA, "num_hidden_layers": 4, "query_pre_attn_scalar": 7, "sliding_window": 3,
          "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "initializer_range": 0.02}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_DEEPSEEK = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 28, "kv_lora_rank": 10,
             "num_hidden_layers": 3, "num_attention_heads": 4, "q_lora_rank": None,
             "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 4,
             "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
             "first_k_dense_replace": 1}
_NO_IDS = {"bos_token_id": None, "eos_token_id": None}
_NO_PAD = {**_NO_IDS, "pad_token_id": None}   # whose row of the embedding has no gradient in torch
_SWITCH = {**_T5, "num_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2,
           "num_experts": 4, "router_jitter_noise": 0.0, "router_aux_loss_coef": 0.0,
           "router_z_loss_coef": 0.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of one family."""

    model_class: str
    config_class: str
    fields: dict[str, Any]
    untied: bool = False   # T5 families: a head of its own, though transformers 5 always ties


CASES = {
    "t5": Case("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "relu"}),
    "t5_1_1": Case("T5ForConditionalGeneration", "T5Config",
                   {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, True),
    "t5_silu": Case("T5ForConditionalGeneration", "T5Config",
                    {**_T5, "feed_forward_proj": "gated-silu"}, True),
    "byt5": Case("T5ForConditionalGeneration", "T5Config", {
        **_T5, "vocab_size": 384, "num_layers": 6, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "tokenizer_class": "ByT5Tokenizer"}, True),
    "mt5": Case("MT5ForConditionalGeneration", "MT5Config", _T5, True),
    "umt5": Case("UMT5ForConditionalGeneration", "UMT5Config", _T5),
    "umt5_untied": Case("UMT5ForConditionalGeneration", "UMT5Config", _T5, True),
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2_by_layer": Case("GPT2LMHeadModel", "GPT2Config", {
        **_GPT2, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
    "gpt_neox": Case("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_NEOX, **_NO_IDS}),
    "gpt_neox_serial": Case("GPTNeoXForCausalLM", "GPTNeoXConfig", {
        **_NEOX, **_NO_IDS, "use_parallel_residual": False, "attention_bias": False}),
    "llama": Case("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, **_NO_IDS}),
    "llama_3": Case("LlamaForCausalLM", "LlamaConfig", {
        **_LLAMA, **_NO_IDS, "tie_word_embeddings": True, "attention_bias": True,
        "mlp_bias": True, "max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    "llama_yarn": Case("LlamaForCausalLM", "LlamaConfig", {
        **_LLAMA, **_NO_IDS, "max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
            "original_max_position_embeddings": 16}}),
    "bert": Case("BertForMaskedLM", "BertConfig", _BERT),
    "switch": Case("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
                   {**_SWITCH, "expert_capacity": 64}),
    "switch_overflow": Case("SwitchTransformersForConditionalGeneration",
                            "SwitchTransformersConfig", {**_SWITCH, "expert_capacity": 2}),
    "mixtral": Case("MixtralForCausalLM", "MixtralConfig", {
        **_LLAMA, **_NO_IDS, "num_local_experts": 4, "sliding_window": 4,
        "router_aux_loss_coef": 0.0}),
    # Windows of 3 and 4 over rows of 9; layers that alternate, and a pattern cut short.
    "gemma2": Case("Gemma2ForCausalLM", "Gemma2Config", {**_GEMMA, **_NO_PAD}),
    "gemma2_untied": Case("Gemma2ForCausalLM", "Gemma2Config", {
        **_GEMMA, **_NO_PAD, "tie_word_embeddings": False, "attention_bias": True,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": [
            "full_attention", "full_attention", "sliding_attention", "full_attention"]}),
    "gemma3": Case("Gemma3ForCausalLM", "Gemma3TextConfig", {
        **_LLAMA, **_NO_PAD, "num_hidden_layers": 8, "query_pre_attn_scalar": 7,
        "sliding_window": 3, "sliding_window_pattern": 3, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0}}}),
    "qwen3": Case("Qwen3ForCausalLM", "Qwen3Config", {
        **_LLAMA, **_NO_PAD, "rms_norm_eps": 1e-3, "attention_bias": True}),
    "qwen3_window": Case("Qwen3ForCausalLM", "Qwen3Config", {
        **_LLAMA, **_NO_PAD, "num_hidden_layers": 3, "tie_word_embeddings": True,
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3_moe": Case("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        **_LLAMA, **_NO_PAD, **_MOE, "num_hidden_layers": 3, "mlp_only_layers": [1],
        "norm_topk_prob": True, "router_aux_loss_coef": 0.0}),
    "olmo2": Case("Olmo2ForCausalLM", "Olmo2Config", {
        **{k: v for k, v in _LLAMA.items() if k != "head_dim"}, **_NO_PAD, "rms_norm_eps": 1e-3}),
    "deepseek_v2": Case("DeepseekV2ForCausalLM", "DeepseekV2Config", {**_DEEPSEEK, **_NO_IDS}),
    "deepseek_v2_yarn": Case("DeepseekV2ForCausalLM", "DeepseekV2Config", {
        **_DEEPSEEK, **_NO_IDS, "q_lora_rank": 8, "topk_method": "group_limited_greedy",
        "n_group": 2, "topk_group": 1, "routed_scaling_factor": 3.0, "attention_bias": True,
        "max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "mscale": 0.5,
            "mscale_all_dim": 0.8, "original_max_position_embeddings": 16}}),
}


def make(case: Case, seed: int = 0):
    """The torch model of a case, every parameter drawn at random."""
    config = getattr(transformers, case.config_class)(**case.fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, case.model_class)(config).eval()
    if case.untied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(config.vocab_size, config.d_model))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.lower() or ".ln_" in name
            mean = 1.0 if is_norm and name.endswith("weight") else 0.0
            std = 0.3 if "bias" in name or is_norm or parameter.ndim == 1 else 0.25
            parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))
    return model


def without_forced_scale(model, case: Case):
    """UMT5 as it was trained: transformers 5 scales the logits of untied ones too."""
    if case.untied and case.config_class == "UMT5Config":
        model.config.tie_word_embeddings = False
    return model


def batch(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch by our names; inputs end in padding, and padded targets carry no weight."""
    rng = np.random.default_rng(seed)
    rows, source, target = 3, 11, 9
    vocab = case.fields["vocab_size"]
    targets = rng.integers(2, vocab, (rows, target))
    weights = np.ones((rows, target), np.float32)
    weights[1, 6:] = 0.0
    result = {"decoder_target_tokens": targets, "decoder_loss_weights": weights}
    inputs = rng.integers(2, vocab, (rows, source))
    inputs[2, 8:] = 0
    if case.model_class == "BertForMaskedLM":
        inputs = inputs[:, :target]
        result["encoder_token_types"] = (np.arange(target) > 3) * np.ones((rows, 1), np.int32)
        result["decoder_loss_weights"] = weights * (inputs != 0)
    if "d_model" in case.fields or case.model_class == "BertForMaskedLM":
        result["encoder_input_tokens"] = inputs
    if case.model_class != "BertForMaskedLM":
        result["decoder_input_tokens"] = np.concatenate(
            [np.zeros((rows, 1), int), targets[:, :-1]], axis=1)
    return {name: x if x.dtype == np.float32 else x.astype(np.int32) for name, x in result.items()}


def run_logits(model, data: dict[str, np.ndarray]):
    """The logits of the torch model."""
    tensors = {name: torch.from_numpy(x).long() for name, x in data.items()}
    decoder = tensors.get("decoder_input_tokens")
    if "encoder_input_tokens" not in tensors:
        return model(input_ids=decoder, use_cache=False).logits
    arguments = {"input_ids": tensors["encoder_input_tokens"],
                 "attention_mask": tensors["encoder_input_tokens"] != 0}
    if decoder is None:
        return model(**arguments, token_type_ids=tensors["encoder_token_types"]).logits
    return model(**arguments, decoder_input_ids=decoder, use_cache=False).logits


def run(model, data: dict[str, np.ndarray]):
    """(logits, mean loss, {parameter name: gradient}) of the torch model, as numpy."""
    logits = run_logits(model, data)
    weights = torch.from_numpy(data["decoder_loss_weights"]).flatten()
    targets = torch.from_numpy(data["decoder_target_tokens"]).long().flatten()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    loss = torch.sum(nats * weights) / weights.sum()
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().numpy(), loss.item(), grads
