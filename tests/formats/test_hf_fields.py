"""Fields of config.json: each that transformers' classes have is honoured, fixed or harmless."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from t5x_lite import tree
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.errors import UserError
from t5x_lite.evaluation import predictor
from t5x_lite.formats import hf, hf_fields, hf_lora
from t5x_lite.models.language_model import Model
from t5x_lite.training import steps
from tests import tiny
from tests.formats import folders

LLAMA = {"model_type": "llama", "vocab_size": 32, "hidden_size": 8, "num_attention_heads": 2,
         "num_hidden_layers": 1, "intermediate_size": 12}
T5 = {"model_type": "t5", "vocab_size": 32, "d_model": 8, "d_kv": 4, "num_heads": 2,
      "num_layers": 1, "d_ff": 12}


GEMMA = {"model_type": "gemma3_text", "num_hidden_layers": 2, "hidden_size": 8}
QWEN = {**LLAMA, "model_type": "qwen3"}
DEEPSEEK = {**LLAMA, "model_type": "deepseek_v2", "num_experts_per_tok": 2}
# What no model can do without, though the config class has no default for it.
NEEDED = {"deepseek_v2": {"num_experts_per_tok": 2}}


class Recorded(dict):
    """A dict that knows which of its keys were read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.read.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("kind", hf.FAMILIES.values(), ids=hf.FAMILIES)
def test_every_field_of_the_config_class_has_its_place(kind):
    """A field that a later transformers adds, or changes the default of, is named here."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(kind.model_type, **NEEDED.get(kind.model_type, {}))
    fields = theirs.to_dict()
    known = {*kind.honoured, *kind.fixed, *kind.harmless, *hf_fields._FIXED}
    strange = {name for name in fields
               if name not in known and not hf_fields._HARMLESS.fullmatch(name)}
    assert not strange, f"{kind.model_type}: decide what {sorted(strange)} do to the function"
    for name, default in kind.defaults.items():
        if name in fields and name not in ("model_type", *kind.own_defaults):
            assert fields[name] in (default, default or None), name
    # Its own default config is one that we read, and what from_hf reads is in the table.
    given = Recorded(hf_fields.checked(kind, fields))
    kind.from_hf(given, True)
    assert given.read <= {*kind.honoured, "model_type"}, given.read - {*kind.honoured}


@pytest.mark.parametrize("base,changes,message", [
    (LLAMA, {"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantization_config \(awq\)"),
    (LLAMA, {"new_gate": 2.0}, "new_gate=2.0: not known for llama"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: must be 1"),
    (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    (LLAMA, {"sliding_window": 4}, "sliding_window=4: not known for llama"),
    (LLAMA, {"hidden_size": -8}, "hidden_size=-8: must be between 1"),
    (LLAMA, {"num_hidden_layers": 10 ** 9}, "num_hidden_layers=1000000000: must be between 1 and"),
    (LLAMA, {"num_hidden_layers": 1e9}, "num_hidden_layers=1000000000.0: must be a whole number"),
    (LLAMA, {"num_attention_heads": 0}, "num_attention_heads=0"),
    (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: must be a finite number"),
    (LLAMA, {"attention_bias": "yes"}, "attention_bias='yes': must be true or false"),
    (LLAMA, {"rope_theta": 0.0}, "rope_theta=0.0"),
    (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "factor=inf"),
    (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "has no factor"),
    (LLAMA, {"vocab_size": 10 ** 5000}, "vocab_size=an integer of 16610 bits"),
    (T5, {"is_encoder_decoder": False}, "is_encoder_decoder=False: must be True"),
    (T5, {"num_decoder_layers": 2.5}, "num_decoder_layers=2.5"),
    ({**T5, "model_type": "switch_transformers"}, {"num_layers": 4, "num_decoder_layers": 4,
     "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "encoder_sparse_step": 3},
     "encoder_sparse_step=3 of config.json contradicts"),
    (GEMMA, {"layer_types": ["full_attention"]}, "has 1 entries for num_hidden_layers=2"),
    (GEMMA, {"layer_types": ["full_attention", "chunked"]}, "holds 'chunked'"),
    (GEMMA, {"sliding_window": None}, "there is no sliding_window"),
    (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    (GEMMA, {"rope_parameters": {"rope_theta": 5.0}}, "must have a section for each"),
    (GEMMA, {"rope_parameters": {"full_attention": {"rope_type": "ntk"}}}, "rope scaling 'ntk'"),
    ({**GEMMA, "model_type": "gemma3"}, {}, "has no text_config"),
    (QWEN, {"layer_types": ["sliding_attention"]}, "use_sliding_window is false"),
    (QWEN, {"model_type": "qwen3_moe", "num_experts": 6, "num_local_experts": 4},
     "num_experts=6 and num_local_experts=4"),
    (DEEPSEEK, {"num_experts_per_tok": None}, "has no num_experts_per_tok"),
    (DEEPSEEK, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
    (DEEPSEEK, {"topk_method": "group_limited_greedy"}, "needs n_group"),
    (DEEPSEEK, {"norm_topk_prob": True}, "norm_topk_prob=True: must be False"),
    (DEEPSEEK, {"num_key_value_heads": 1}, "num_key_value_heads=1"),
    ({**T5, "model_type": "bert"}, {"position_embedding_type": "relative_key"}, "relative_key"),
])
def test_what_cannot_be_honoured_is_refused_by_name(base, changes, message):
    with pytest.raises(UserError, match=message):
        hf.model_config({**base, **changes})


def test_what_changes_nothing_passes():
    plain = hf.model_config(LLAMA)
    for more in ({"unsloth_fixed": True, "_name_or_path": "x", "torch_dtype": "bfloat16"},
                 {"pretraining_tp": 2, "bos_token_id": 1, "pad_token_id": 7, "use_cache": True},
                 {"some_future_switch": False, "another": None, "third": []},
                 {"layer_types": ["full_attention"], "transformers_version": "9.1"}):
        assert hf.model_config({**LLAMA, **more}) == plain


def test_null_is_not_the_default_where_it_means_none():
    gemma = {"model_type": "gemma2", "num_hidden_layers": 2}
    for config, cap in ((gemma, 30.0), ({**gemma, "final_logit_softcapping": None}, 0.0)):
        model = hf.model_config(config)
        assert model.logits_softcap == cap
        assert hf.hf_config(model, "gemma2")["final_logit_softcapping"] == (cap or None)


def test_the_text_part_of_a_model_that_reads_images(tmp_path):
    """Its tensors have another prefix, in two spellings; those of images are not needed."""
    text = hf.model_config({"model_type": "gemma3_text", "num_hidden_layers": 2, "hidden_size": 8,
                            "intermediate_size": 12, "vocab_size": 32, "head_dim": 4,
                            "num_attention_heads": 2, "num_key_value_heads": 1})
    folders.write_hf(tmp_path / "text", text)
    given = json.loads((tmp_path / "text" / "config.json").read_text())
    plain = hf.read_model(str(tmp_path / "text"))
    from tests.test_convert import rewrite
    for prefix in ("language_model.", "model.language_model."):
        arrays = {name.replace("model.", f"{prefix}model." if prefix[0] == "l" else prefix, 1):
                  np.array(plain.tensors.read(name)) for name in plain.tensors.shapes}
        arrays["vision_tower.embeddings.weight"] = np.zeros((2, 2), np.float32)
        folder = tmp_path / prefix
        folders.write_hf(folder, text)
        rewrite(folder, arrays)
        (folder / "config.json").write_text(json.dumps(
            {"model_type": "gemma3", "vision_config": {}, "text_config": given}))
        found = hf.read_model(str(folder))
        assert found.config == plain.config
        assert found.unused == ("vision_tower.embeddings.weight",)
        for path in plain.table:
            np.testing.assert_array_equal(found.read(path), plain.read(path))


def write(folder, config, **changes):
    folders.write_hf(folder, config)
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**given, **changes}))


@pytest.mark.parametrize("changes,message", [
    ({"num_layers": 5000}, r"num_layers=5,000, but the files hold \d+ tensors"),
    ({"d_model": 2 ** 30}, r"d_model=1,073,741,824, but the largest tensor"),
    ({"num_layers": 3}, "missing   encoder.block.2")])
def test_sizes_are_held_against_the_files(tmp_path, changes, message):
    write(tmp_path / "t5", tiny.seq2seq().model, **changes)
    with pytest.raises(UserError, match=message):
        hf.read_model(str(tmp_path / "t5"))


def test_a_head_that_was_lost_is_missing_and_a_tied_one_is_not(tmp_path):
    model = tiny.seq2seq().model
    assert not model.tie_logits
    write(tmp_path / "t5", model)
    tensors = hf.read_model(str(tmp_path / "t5")).tensors
    arrays = {n: tensors.read(n).copy() for n in tensors.shapes if n != "lm_head.weight"}
    from tests.test_convert import rewrite
    rewrite(tmp_path / "t5", arrays)
    with pytest.raises(UserError, match="missing   lm_head.weight"):
        hf.read_model(str(tmp_path / "t5"))
    # transformers 5 writes T5 1.1 with tied logits so; it cannot have had a head.
    given = json.loads((tmp_path / "t5" / "config.json").read_text())
    (tmp_path / "t5" / "config.json").write_text(json.dumps(
        {**given, "scale_decoder_outputs": False}))
    found = hf.read_model(str(tmp_path / "t5")).config
    assert found.tie_logits and found.logits_scale == 1.0
    written = hf.hf_config(found, "t5")
    assert (written["tie_word_embeddings"], written["scale_decoder_outputs"]) == (False, False)


def say(folder, name, **fields):
    """Writes a JSON file of these fields, over those that it has."""
    file = folder / name
    old = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**old, **fields}))


def test_where_the_start_of_decoders_is_read_from(tmp_path):
    write(tmp_path / "t5", tiny.seq2seq().model)
    generation = "generation_config.json"
    say(tmp_path / "t5", "config.json", decoder_start_token_id=None)
    for said in (5, 0):
        say(tmp_path / "t5", generation, decoder_start_token_id=said)
        assert hf.read_model(str(tmp_path / "t5")).config.decoder_start_id == said
    say(tmp_path / "t5", "config.json", decoder_start_token_id=5)
    with pytest.raises(UserError, match="says decoder_start_token_id=5 and generation_config.json "
                                        "says 0"):
        hf.read_model(str(tmp_path / "t5"))
    for wrong, message in ((64, "must be below vocab_size=64"), (-1, "decoder_start_token_id=-1"),
                           (True, "decoder_start_token_id=True"), (1.5, "must be a whole number")):
        say(tmp_path / "t5", "config.json", decoder_start_token_id=wrong)
        say(tmp_path / "t5", generation, decoder_start_token_id=wrong)
        with pytest.raises(UserError, match=message):
            hf.read_model(str(tmp_path / "t5"))


def test_decoders_that_begin_with_another_token_compute_what_transformers_does(tmp_path):
    """The loss of targets and what greedy decoding writes; and it is kept on the way back."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    plain = dataclasses.replace(tiny.seq2seq().model, decoder_start_id=5)
    write(tmp_path / "t5", plain)
    source = hf.read_model(str(tmp_path / "t5"))
    assert source.config.decoder_start_id == 5
    assert hf.hf_config(source.config, "t5")["decoder_start_token_id"] == 5
    params = tree.unflatten({path: source.read(path) for path in source.table})
    model, batch = Model(source.config), tiny.batch(4)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5").eval()
    inputs = torch.tensor(np.array(batch["encoder_input_tokens"]), dtype=torch.long)
    labels = torch.tensor(np.array(batch["decoder_target_tokens"]), dtype=torch.long)
    labels = torch.where(labels == 0, -100, labels)
    score = jax.jit(predictor.make_score_step(model))
    found = float(np.sum(score(params, batch)))
    with torch.no_grad():
        loss = theirs(input_ids=inputs, attention_mask=inputs != 0, labels=labels).loss
        wanted = theirs.generate(inputs, attention_mask=(inputs != 0).long(), do_sample=False,
                                 max_new_tokens=6, eos_token_id=1)[:, 1:]
    assert -found / int((labels >= 0).sum()) == pytest.approx(float(loss), rel=1e-5)
    decoded = jax.jit(steps.make_decode_step(model, DecodeConfig(max_length=6)))(
        params, {"encoder_input_tokens": batch["encoder_input_tokens"]})
    np.testing.assert_array_equal(np.asarray(decoded.tokens)[:, 0], np.pad(
        wanted.numpy(), ((0, 0), (0, 6 - wanted.shape[1]))))
    other = Model(dataclasses.replace(source.config, decoder_start_id=0))
    again = float(np.sum(jax.jit(predictor.make_score_step(other))(params, batch)))
    assert abs(again - found) > 1e-3


def test_the_start_of_each_packed_target(tmp_path):
    from t5x_lite.models import language_model
    batch = {"decoder_input_tokens": np.array([[0, 7, 8, 0, 9, 0]]),
             "decoder_positions": np.array([[0, 1, 2, 0, 1, 0]])}
    assert language_model._with_start(batch, 3).tolist() == [[3, 7, 8, 3, 9, 3]]
    del batch["decoder_positions"]
    assert language_model._with_start(batch, 3).tolist() == [[3, 7, 8, 0, 9, 0]]


def test_every_field_of_pefts_lora_config_has_its_place():
    peft = pytest.importorskip("peft")
    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    strange = fields - hf_lora._HARMLESS - hf_lora._PLAIN.keys()
    assert not strange, f"decide what {sorted(strange)} do to an adapter"


@pytest.mark.parametrize("changes,message", [
    ({"lora_alpha": float("nan")}, "lora_alpha=nan: must be a number above 0"),
    ({"lora_alpha": "16"}, "lora_alpha='16': must be a number"),
    ({"lora_alpha": 0}, "lora_alpha=0: must be"),
    ({"alpha_pattern": {"q": float("inf")}}, r"alpha_pattern\['q'\]=inf"),
    ({"alpha_pattern": {"(": 2}}, r"'\(' is no regex"),
    ({"alpha_pattern": {r"(\w|\w\w|\W|..)*(?<!q|o|k|v|wi_0|wi_1)": 2}}, "takes longer than"),
    ({"alpha_pattern": {"x" * 2000: 2}}, "2,000 characters"),
    ({"alpha_pattern": [1]}, "alpha_pattern=.*: must be a section"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
    ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
])
def test_what_an_adapter_may_say(tmp_path, monkeypatch, changes, message):
    from tests.formats.test_hf_lora import CASES, draw
    monkeypatch.setattr(hf_lora, "_SECONDS", 0.3)
    config, tuning = CASES["t5"]
    hf_lora.write(tmp_path, config, tuning, draw(config, tuning), "base")
    given = json.loads((tmp_path / hf_lora.CONFIG).read_text())
    (tmp_path / hf_lora.CONFIG).write_text(json.dumps({**given, **changes}))
    with pytest.raises(UserError, match=message):
        hf_lora.read(tmp_path, config, "t5")
