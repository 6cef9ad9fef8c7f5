"""PEFT's LoRA: there and back, fused tensors and odd ranks, and the peft library's logits."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from t5x_lite import build, convert, init_from, tree
from t5x_lite.checkpoints import manager
from t5x_lite.config import RunConfig, from_mapping
from t5x_lite.errors import UserError
from t5x_lite.formats import hf_lora, safetensors
from t5x_lite.layers.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model
from t5x_lite.models.peft import PeftConfig, Tuning
from tests import tiny
from tests.formats import folders

T5 = tiny.seq2seq().model
GPT2 = ModelConfig("decoder_only", 64, 16, None, StackConfig(
    (SegmentConfig((BlockConfig(
        AttentionConfig(2, 8, use_bias=True, use_out_bias=True),
        mlp=MLPConfig(64, "gelu_tanh", gated=False, use_bias=True)),), 2),),
    causal=True, position=PositionConfig("learned", max_length=32),
    norm=NormConfig("layer", 1e-5, use_bias=True)), tie_logits=True)
CASES = {"t5": (T5, PeftConfig("lora", rank=2, alpha=6.0)),
         "t5 all": (T5, PeftConfig("lora", rank=3, targets=(".*/(query|wo|wi_.)/kernel",),
                                   rank_stabilized=True)),
         "gpt2": (GPT2, PeftConfig("lora", rank=2, targets=(
             ".*/(query|value)/kernel", ".*/wo/kernel")))}


def draw(config, tuning, seed=0):
    rng = np.random.default_rng(seed)
    return {p: rng.normal(size=i.shape).astype(np.float32) * 0.3
            for p, i in Tuning(Model(config).table, tuning).trainable.items()}


def merged(config, tuning, trained, base):
    return Tuning(Model(config).table, tuning).combine(trained, base)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(tmp_path, name):
    config, tuning = CASES[name]
    trained = draw(config, tuning)
    hf_lora.write(tmp_path, config, tuning, trained, "base")
    found, again = hf_lora.read(tmp_path, config, name.split()[0])
    base = {p: np.zeros(i.shape, np.float32) for p, i in Model(config).table.items()}
    expected, got = merged(config, tuning, trained, base), merged(config, found, again, base)
    for path, value in expected.items():
        np.testing.assert_allclose(got[path], value, rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_fused_tensor_has_the_ranks_of_its_kernels_by_hand(tmp_path):
    config, tuning = CASES["gpt2"]
    trained = draw(config, tuning)
    hf_lora.write(tmp_path, config, tuning, trained, "base")
    given = json.loads((tmp_path / hf_lora.CONFIG).read_text())
    assert given["rank_pattern"] == {f"transformer.h.{n}.attn.c_attn": 4 for n in range(2)}
    assert given["fan_in_fan_out"] and given["r"] == 2 and given["task_type"] == "CAUSAL_LM"
    tensors = safetensors.read_file(tmp_path / hf_lora.WEIGHTS)
    a, b = (tensors.read(f"base_model.model.transformer.h.1.attn.c_attn.lora_{x}.weight")
            for x in "AB")
    assert a.shape == (4, 16) and b.shape == (48, 4)
    delta = given["lora_alpha"] / 4 * (b @ a)   # [3 x 16, 16], as PEFT scales it
    for rows, part in ((slice(16), "query"), (slice(32, 48), "value")):
        path = f"decoder/segment_0/block_0/self_attention/{part}"
        own = tuning.lora_scale * trained[f"{path}/lora_a"][1] @ trained[f"{path}/lora_b"][1]
        np.testing.assert_allclose(delta[rows].T, own, rtol=1e-5, atol=1e-6)
    assert not delta[16:32].any()


def test_what_peft_cannot_hold_or_this_cannot_read_is_named(tmp_path):
    config, tuning = CASES["t5"]
    with pytest.raises(UserError, match="merge it instead with --to=hf:DIR"):
        hf_lora.write(tmp_path, config, PeftConfig("ia3"), {}, "base")
    with pytest.raises(UserError, match="adapter_config.json does not exist"):
        hf_lora.read(tmp_path, config, "t5")
    hf_lora.write(tmp_path, config, tuning, draw(config, tuning), "base")
    given = json.loads((tmp_path / hf_lora.CONFIG).read_text())
    (tmp_path / hf_lora.CONFIG).write_text(json.dumps({**given, "use_dora": True}))
    with pytest.raises(UserError, match="has use_dora=True, which this does not read"):
        hf_lora.read(tmp_path, config, "t5")
    (tmp_path / hf_lora.CONFIG).write_text(json.dumps(given))
    with pytest.raises(UserError, match="SelfAttention.q, .* is no LoRA of a kernel of the model"):
        hf_lora.read(tmp_path, GPT2, "gpt2")


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_the_command_and_the_peft_library(tmp_path, name):
    """Our workdir -> PEFT -> our workdir: the library's logits are ours, both times."""
    library = pytest.importorskip("peft", reason="pip install peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, tuning = CASES[name]
    folders.write_hf(tmp_path / "base", config)
    objective = "seq2seq" if name == "t5" else "lm"
    run = RunConfig(model=config, peft=tuning, init_from=f"hf:{tmp_path / 'base'}")
    run = dataclasses.replace(run, objective=dataclasses.replace(run.objective, name=objective))
    program = init_from.alone(run)
    trained = draw(config, tuning)
    state = program.start(init_from.parameters(program), tree.unflatten(trained))
    workdir = tmp_path / "lora"
    with manager.Checkpointer(workdir, manager.CheckpointConfig(async_save=False)) as saver:
        saver.save(5, state, {}, convert.to_json(run))
    convert.run(str(workdir), f"peft:{tmp_path / 'adapter'}")
    convert.run(f"peft:{tmp_path / 'adapter'}", str(tmp_path / "again"))

    kind = {"t5": transformers.AutoModelForSeq2SeqLM, "gpt2": transformers.AutoModelForCausalLM}
    theirs = library.PeftModel.from_pretrained(
        kind[name].from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    tokens = np.random.default_rng(1).integers(2, 64, (2, 7))
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(tokens)}
        if name == "t5":
            inputs["decoder_input_ids"] = torch.tensor(tokens[:, :5])
        expected = theirs(**inputs).logits.numpy()
    batch = {"encoder_input_tokens": tokens, "decoder_input_tokens":
             tokens[:, :5] if name == "t5" else tokens}

    @jax.jit
    def logits(params, batch):
        module = Model(config).bind(params)
        return module.head(module.head_params(), module(batch)[0])

    for folder in (workdir, tmp_path / "again"):
        saved = dataclasses.replace(
            program.config, **{f: getattr(from_mapping(
                RunConfig, manager.read_record(folder).config), f)
                for f in ("peft", "init_from")})
        params, _ = init_from.restore(build.build(saved, [*program.mesh.devices.flat]), folder)
        found = np.asarray(logits(params, {n: x.astype(np.int32) for n, x in batch.items()}))
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
