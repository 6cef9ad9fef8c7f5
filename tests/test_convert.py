"""The command: round trips bit for bit, what it keeps, and what it refuses."""

import dataclasses
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from t5x_lite import convert, init_from
from t5x_lite.errors import UserError
from t5x_lite.formats import hf
from t5x_lite.formats.functions import differences
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from tests import tiny
from tests.formats import folders

MODEL = tiny.seq2seq().model   # T5 1.1 in miniature, 64 tokens


def decoder(**changes) -> ModelConfig:
    """A LLaMA of two layers, or something that no family has."""
    attention = AttentionConfig(2, 6, num_kv_heads=1, **changes)
    block = BlockConfig(attention, mlp=MLPConfig(12, "silu"))
    return ModelConfig("decoder_only", 32, 8, None, StackConfig(
        (SegmentConfig((block,), 2),), causal=True, position=PositionConfig("rotary")))


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_there_and_back_is_bit_exact_and_keeps_what_is_not_ours(tmp_path, capsys):
    params = folders.write_hf(tmp_path / "in", MODEL)
    edit(tmp_path / "in", eos_token_id=42, n_positions=512)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    convert.run(f"hf:{tmp_path / 'in'}", str(tmp_path / "workdir"))
    out = capsys.readouterr().out
    assert "decoder/segment_0/block_0/mlp/wo/kernel 2x32x16" in out
    convert.run(str(tmp_path / "workdir"), f"hf:{tmp_path / 'out'}",
                convert.Options(max_file_gb=4e-6))
    found = hf.read_model(str(tmp_path / "out"))
    for path, value in params.items():
        np.testing.assert_array_equal(found.read(path), value, err_msg=path)
    assert differences(MODEL, found.config) == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["n_positions"]) == (42, 512)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert json.loads((tmp_path / "workdir" / "config.json").read_text())["objective"]["name"] \
        == "seq2seq"


def test_formats_and_rows_of_the_vocabulary(tmp_path):
    params = folders.write_hf(tmp_path / "in", MODEL)
    convert.run(f"hf:{tmp_path / 'in'}", f"hf:{tmp_path / 'out'}",
                convert.Options(dtype="bfloat16", vocab_size=61))
    found = hf.read_model(str(tmp_path / "out"))
    assert found.config.vocab_size == 61
    assert found.dtype("logits/kernel") == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.read("logits/kernel"),
                                  params["logits/kernel"][:, :61].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(found.read("token_embedding/embedding", np.float32),
                                  params["token_embedding/embedding"][:61].astype(
                                      ml_dtypes.bfloat16).astype(np.float32))


def test_t5x_goes_straight_to_hugging_face(tmp_path):
    source = folders.golden_t5x(tmp_path)
    convert.run(f"t5x:{source}", f"hf:{tmp_path / 'out'}")
    arrays = folders.golden_arrays()
    found = hf.read_model(str(tmp_path / "out"))
    np.testing.assert_array_equal(
        found.tensors.read("decoder.block.1.layer.2.DenseReluDense.wi_1.weight"),
        arrays["decoder/layers_1/mlp/wi_1/kernel"].T)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "t5"


@pytest.mark.parametrize("config,family,message", [
    (decoder(), None, "llama"),
    (decoder(window=4), None, r"mixtral:\n.*llama:|llama:\n    decoder.layers\[0\].self_attention"
                              r".window: 4, there 0"),
    (decoder(), "gpt2", r"gpt2:\n    decoder.layers\[0\].mlp.gated: True, there False"),
    (decoder(), "t5", "architecture: decoder_only, there encoder_decoder"),
    (decoder(qk_norm=True), "llama", r"self_attention.qk_norm: True, there False"),
])
def test_a_family_that_cannot_say_it_is_refused_by_field(config, family, message):
    if message == "llama":
        assert hf.hf_config(config, family)["model_type"] == "llama"
    else:
        with pytest.raises(UserError, match=message):
            hf.hf_config(config, family)


def test_configs_with_scaled_rotary_positions_and_old_fields():
    base = {"model_type": "llama", "vocab_size": 32, "hidden_size": 8, "num_attention_heads": 2,
            "num_hidden_layers": 1, "intermediate_size": 12, "pad_token_id": None}
    plain = hf.model_config({**base, "rope_theta": 5e5})
    assert plain.decoder.position.rotary_base == 5e5
    old = hf.model_config({**base, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (old.decoder.position.rotary_scaling.kind,
            old.decoder.position.rotary_scaling.factor) == ("linear", 2.0)
    with pytest.raises(UserError, match="rope scaling 'dynamic'"):
        hf.model_config({**base, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    with pytest.raises(UserError, match="no activation is called 'gelu_nwe'.*did you mean 'gelu_new'"):
        hf.model_config({**base, "hidden_act": "gelu_nwe"})
    with pytest.raises(UserError, match="no model_type is called 'lama'.*did you mean 'llama'"):
        hf.model_config({**base, "model_type": "lama"})


def test_published_spellings_copies_and_leftovers(tmp_path):
    folder = tmp_path / "bert"
    config = {"model_type": "bert", "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 6}
    params = folders.write_hf(folder, hf.model_config(config))
    tensors = hf.read_model(str(folder)).tensors
    arrays = {n: np.array(tensors.read(n)) for n in tensors.shapes}
    spelled = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"): a for n, a in arrays.items()}
    word = arrays["bert.embeddings.word_embeddings.weight"]
    spelled |= {"cls.predictions.decoder.weight": word,
                "bert.pooler.dense.weight": np.ones((8, 8), np.float32)}
    rewrite(folder, spelled)
    found = hf.read_model(str(folder))
    assert found.unused == ("bert.pooler.dense.weight",)
    assert found.config.tie_logits
    np.testing.assert_array_equal(found.read("encoder/embedding_norm/bias"),
                                  params["encoder/embedding_norm/bias"])
    # A decoder of its own, whatever the flag says; two spellings of one tensor that differ.
    rewrite(folder, {**spelled, "cls.predictions.decoder.weight": word + 1})
    assert not hf.read_model(str(folder)).config.tie_logits
    rewrite(folder, {**spelled, "bert.embeddings.LayerNorm.bias": np.ones(8, np.float32)})
    with pytest.raises(UserError, match="LayerNorm.beta and bert.embeddings.LayerNorm.bias"):
        hf.read_model(str(folder))


def rewrite(folder, arrays):
    from t5x_lite.formats.safetensors import Writer
    writer = Writer(folder, {n: a.shape for n, a in arrays.items()},
                    {n: a.dtype for n, a in arrays.items()}, 10 ** 9)
    for name, value in arrays.items():
        writer.tensor(name)[...] = value
    writer.close()


def test_what_is_refused(tmp_path):
    folders.write_hf(tmp_path / "in", MODEL)
    source = f"hf:{tmp_path / 'in'}"
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.run(source, source)
    with pytest.raises(UserError, match="--dtype=float23.*did you mean 'float32'"):
        convert.run(source, f"hf:{tmp_path / 'x'}", convert.Options(dtype="float23"))
    with pytest.raises(UserError, match="--vocab_size=65: the source has 64 rows"):
        convert.run(source, f"hf:{tmp_path / 'x'}", convert.Options(vocab_size=65))
    with pytest.raises(UserError, match="t5: is none. did you mean 't5x'"):
        convert.run("t5:somewhere", f"hf:{tmp_path / 'x'}")
    with pytest.raises(UserError, match="s3:// is not supported yet"):
        convert.run("s3://some/where", f"hf:{tmp_path / 'x'}")
    with pytest.raises(UserError, match="--to=t5x:out: a target is hf:DIR, peft:DIR or the folder of"):
        convert.run(source, "t5x:out")
    with pytest.raises(UserError, match="gpt2:"):
        convert.run(source, f"hf:{tmp_path / 'x'}", convert.Options(family="gpt2"))
    (tmp_path / "in" / "config.json").write_text('{"model_type": "t5"')
    with pytest.raises(UserError, match="config.json is no JSON .*Download it again"):
        convert.run(source, f"hf:{tmp_path / 'x'}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]   # nothing half-written stays


def test_the_command_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "t5x_lite.convert", f"--from=hf:{tmp_path}", "--to=hf:x"],
        capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "config.json does not exist" in result.stderr


def test_a_workdirs_layers_can_be_regrouped(tmp_path):
    folders.write_hf(tmp_path / "in", MODEL)
    convert.run(f"hf:{tmp_path / 'in'}", str(tmp_path / "workdir"))
    block = MODEL.encoder.segments[0].blocks[0]
    like = dataclasses.replace(MODEL, encoder=dataclasses.replace(
        MODEL.encoder, segments=(SegmentConfig((block, block), 1),)))
    plain = init_from.read_workdir(str(tmp_path / "workdir"))
    found = init_from.read_workdir(str(tmp_path / "workdir"), like)
    stacked = plain.read("encoder/segment_0/block_0/mlp/wo/kernel")
    for i in range(2):
        np.testing.assert_array_equal(found.read(f"encoder/segment_0/block_{i}/mlp/wo/kernel"),
                                      stacked[i:i + 1])
