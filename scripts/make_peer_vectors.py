"""Makes tests/vectors/peers/*.json: what Hugging Face's transformers and trl give on small inputs.

    python scripts/make_peer_vectors.py chat    with transformers 5
    USE_TF=0 python scripts/make_peer_vectors.py dpo     with trl 0.24.0, of the last releases whose
        DPO has label smoothing and reference_free, and transformers 4

Inputs, and the programs' versions, are stored beside the results; no line of t5x_lite runs here.
tests/parity/test_peer_vectors.py compares.
"""

import json
import pathlib
import sys

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "tests" / "vectors" / "peers"

# --- conversations ------------------------------------------------------------------------------

# Templates in the four common formats. {B} and {E} stand where {% generation %} may: around what the
# assistant writes, its end of turn included.
CHATML = ("{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{B}"
          "{{ m.content + '<|im_end|>' }}{E}{{ '\\n' }}{% else %}"
          "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endif %}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
LLAMA3 = ("{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
          "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
          "{% if m.role == 'assistant' %}{B}{{ m.content | trim + '<|eot_id|>' }}{E}{% else %}"
          "{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'assistant' %}
{{ '<|assistant|>\\n' }}{B}{{ m['content'] + eos_token }}{E}{{ '\\n' }}
{% else %}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
GEMMA = ("{{ bos_token }}{% if messages[0].role == 'system' %}"
         "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
         "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
         "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
         "{% if m.role == 'assistant' %}{{ '<start_of_turn>model\\n' }}{B}"
         "{{ m.content | trim + '<end_of_turn>' }}{E}{{ '\\n' }}{% else %}"
         "{{ '<start_of_turn>' + m.role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endif %}"
         "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}")
# name -> (template, tokenizer_config's special tokens)
TEMPLATES = {"chatml": (CHATML, {"eos_token": "<|im_end|>"}),
             "llama3": (LLAMA3, {"bos_token": "<s>", "eos_token": "<|eot_id|>"}),
             "zephyr": (ZEPHYR, {"bos_token": "<s>", "eos_token": "</s>"}),
             "gemma": (GEMMA, {"bos_token": "<s>", "eos_token": "</s>"})}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
TURNS = [
    [("user", "2 + 2?"), ("assistant", "4.")],
    [("user", "yes"), ("assistant", "yes"), ("user", "yes"), ("assistant", "yes")],
    [("user", "Größe, Ελληνικά, Русский, 日本語, हिन्दी"), ("assistant", "العربية עברית ไทย 한국어 ½ 👩‍👩‍👧"),
     ("user", "{{ messages }} {% if %} \\ \"q\""), ("assistant", "two\n\nlines, 'user' and <model>"),
     ("user", "done?")],
    [("user", "  spaces "), ("assistant", " around \n"), ("user", "a"), ("assistant", "a b")]]
SYSTEM = ("system", "Be brief.\nAnswer.")


def _tokenizer():
    """Byte-level BPE with some merges, and the special tokens of all templates."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = [text for turns in TURNS for _, text in turns] * 3
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


def chat() -> dict:
    """Renderings, tokens and assistant masks of transformers' apply_chat_template."""
    import transformers
    made, cases = _tokenizer(), []
    for name, (source, special) in TEMPLATES.items():
        plain = source.replace("{B}", "").replace("{E}", "")
        marked = source.replace("{B}", "{% generation %}").replace("{E}", "{% endgeneration %}")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
        for turns in TURNS:
            for front in ([], [SYSTEM]) if name != "gemma" else ([],):
                messages = [{"role": role, "content": text} for role, text in (*front, *turns)]
                found = tokenizer.apply_chat_template(
                    messages, chat_template=marked, return_dict=True,
                    return_assistant_tokens_mask=True)
                cases.append({
                    "template": name, "messages": messages, "ids": found["input_ids"],
                    "mask": found["assistant_masks"],
                    "text": tokenizer.apply_chat_template(messages, chat_template=plain, tokenize=False),
                    "prompt": tokenizer.apply_chat_template(
                        messages[:-1], chat_template=plain, tokenize=False,
                        add_generation_prompt=True)})
    return {"transformers": transformers.__version__, "tokenizer": json.loads(made.to_str()),
            "templates": TEMPLATES, "cases": cases}


# --- preferences --------------------------------------------------------------------------------

# What the trainer is told, by case; beta is far from 0 so that the losses differ.
DPO = {"sigmoid": {}, "smoothed": {"label_smoothing": 0.2}, "ipo": {"loss_type": ["ipo"]},
       "reference_free": {"reference_free": True}}
BETA = 0.7
PAIRS = [("a b c", "d", "e f"), ("b", "c d e f", "a"), ("f e", "a b", "b a"), ("d d d d", "f", "c")]
WORDS = ["<s>", "</s>", *"abcdef"]
LLAMA = {"vocab_size": len(WORDS), "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False}


def _llama(seed: int):
    """A tiny model with weights of three decimals."""
    import numpy as np
    import torch
    import transformers
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        value = np.round(rng.normal(size=parameter.shape) * 0.6 + (parameter.ndim == 1), 3)
        parameter.data = torch.tensor(value, dtype=torch.float32)
    return model


def _words():
    import tokenizers
    import transformers
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(WORDS, range(8), strict=True)), "<s>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def dpo() -> dict:
    """trl's DPO on a batch: the loss, its gradient, and the reference's log-probabilities."""
    import tempfile

    import datasets
    import torch
    import transformers
    import trl
    cases = {}
    for name, told in DPO.items():
        model, reference, words = _llama(0), _llama(1), _words()
        rows = [dict(zip(("prompt", "chosen", "rejected"), (f"<s> {q} ", a, b), strict=True))
                for q, a, b in PAIRS]
        with tempfile.TemporaryDirectory() as folder:
            args = trl.DPOConfig(folder, beta=BETA, use_cpu=True, bf16=False, report_to=[], max_length=None,
                                 max_prompt_length=None, disable_dropout=True,
                                 per_device_train_batch_size=len(PAIRS), **told)
            trainer = trl.DPOTrainer(model, None if args.reference_free else reference, args=args,
                                     train_dataset=datasets.Dataset.from_list(rows), processing_class=words)
            batch = trainer.data_collator(list(trainer.train_dataset))
            loss = trainer.compute_loss(model, batch)
            loss.backward()
            if name == "sigmoid":   # for ipo trl divides them by the numbers of tokens
                scores = [side.tolist() for side in trainer.compute_ref_log_probs(batch)]
        cases[name] = {
            "loss": loss.item(),
            "gradients": {n: [float(f"{x:.6g}") for x in p.grad.flatten().tolist()]
                          for n, p in model.named_parameters()}}
    weights = {n: [round(x, 3) for x in p.flatten().tolist()] for n, p in _llama(0).named_parameters()}
    shapes = {n: list(p.shape) for n, p in model.named_parameters()}
    return {"trl": trl.__version__, "transformers": transformers.__version__,
            "torch": torch.__version__, "beta": BETA, "pairs": PAIRS, "words": WORDS, "config": LLAMA,
            "weights": weights, "shapes": shapes, "reference": scores, "cases": cases}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or MAKERS:
        text = json.dumps(MAKERS[name](), separators=(",", ":"), ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(text + "\n")


MAKERS = {"chat": chat, "dpo": dpo}

if __name__ == "__main__":
    main()
