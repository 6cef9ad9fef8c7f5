"""Every Hugging Face family against transformers: logits, loss and gradients of one batch, the
round trip bit for bit, and the exported folder back in transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import tree
from t5x_lite.formats import hf
from t5x_lite.formats.functions import differences
from t5x_lite.formats.mapping import read_parameter
from t5x_lite.formats.safetensors import INDEX
from t5x_lite.models.language_model import Model
from t5x_lite.training.objectives import ObjectiveConfig, loss, totals
from tests.parity import hf_cases
from tests.parity.hf_cases import CASES, torch, transformers

TOLERANCE = 1e-4


def ours(config, params, data):
    """(logits, mean loss, gradients) of our model."""
    model = Model(config)
    data = {name: jnp.asarray(x) for name, x in data.items()}

    def run(params):
        module = model.bind(params)
        value, _ = loss(module, data, None, ObjectiveConfig(z_loss=0.0),
                        totals(ObjectiveConfig(z_loss=0.0), data))
        return value, module.head(module.head_params(), module(data)[0])

    (value, logits), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    return np.asarray(logits), float(value), jax.tree.map(np.asarray, grads)


def canonical(folder):
    """{name of the mapping: array} of a folder, copies of tied tensors apart."""
    found = hf.read_model(str(folder))
    return {slot.name: np.array(found.tensors.read(slot.name))
            for p in found.placed.values() for slot in p.slots}


# Second configurations of a family; a few seconds each.
SLOW = {"gemma2_untied", "qwen3_window", "qwen3_moe", "deepseek_v2"}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_family(name, tmp_path):
    case = CASES[name]
    model = hf_cases.make(case)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")   # several files, an index
    hf_cases.without_forced_scale(model, case)
    if case.untied and case.config_class != "T5Config":
        # As the published files say; transformers 5 writes true whatever the model is.
        edit_config(tmp_path / "theirs", tie_word_embeddings=False)
    source = hf.read_model(str(tmp_path / "theirs"))
    params = tree.unflatten({path: source.read(path) for path in source.table})
    assert source.unused == ()

    data = hf_cases.batch(case)
    expected_logits, expected_loss, expected_grads = hf_cases.run(model, data)
    logits, value, grads = ours(source.config, params, data)
    real = data["decoder_loss_weights"] > 0
    worst = {"logits": np.max(np.abs(logits - expected_logits)[real]),
             "loss": abs(value - expected_loss)}
    found = tree.flatten(grads)
    names = {slot.name for p in source.placed.values() for slot in p.slots}
    theirs = in_files_names(expected_grads, name, names)
    for path, placed in source.placed.items():
        want = read_parameter(placed, theirs.__getitem__)
        worst[f"gradient of {path}"] = np.max(np.abs(found[path] - want)) / max(
            1.0, np.max(np.abs(want)))
    gradient = max(v for k, v in worst.items() if k.startswith("gradient"))
    print(f"{name}: logits {worst['logits']:.1e} (of {np.max(np.abs(expected_logits)):.1f}), "
          f"loss {worst['loss']:.1e}, gradient {gradient:.1e}")
    assert max(worst.values()) < TOLERANCE, {k: v for k, v in worst.items() if v >= TOLERANCE}

    # Out again: the same bits, the same config, and transformers computes the same from them.
    out = tmp_path / "ours"
    out.mkdir()
    base = json.loads((tmp_path / "theirs" / "config.json").read_text())
    hf.write_model(out, source.config, dict.fromkeys(source.table, np.float32), source.read,
                   model_type=base["model_type"], max_bytes=20_000)
    assert (out / INDEX).exists()
    before, after = canonical(tmp_path / "theirs"), canonical(out)
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        np.testing.assert_array_equal(value, after[tensor], err_msg=tensor)
    assert differences(source.config, hf.read_model(str(out)).config) == []
    again, info = getattr(transformers, case.model_class).from_pretrained(
        out, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    hf_cases.without_forced_scale(again, case)
    with torch.no_grad():
        np.testing.assert_allclose(hf_cases.run_logits(again.eval(), data)[real],
                                   expected_logits[real], atol=1e-5)


def edit_config(folder, **changes):
    """Rewrites fields of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def in_files_names(grads, name, names):
    """Gradients by the names that files use, where the torch module has others."""
    grads = dict(grads)
    if name.startswith("gpt_neox"):
        grads["embed_out.weight"] = grads.pop("lm_head.weight")
    # transformers 5 holds all experts of a layer in one parameter
    for fused in [n for n in grads if n.endswith("experts.gate_up_proj")]:
        theirs = fused.removesuffix(".experts.gate_up_proj")
        is_mixtral = name == "mixtral"
        ours_ = theirs.replace(".mlp", ".block_sparse_moe") if is_mixtral else theirs
        parts = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        grads[f"{ours_}.gate.weight"] = grads[f"{theirs}.gate.weight"]
        for e, both in enumerate(grads[fused]):
            values = (*np.split(both, 2), grads[f"{theirs}.experts.down_proj"][e])
            for part, value in zip(parts, values, strict=True):
                grads[f"{ours_}.experts.{e}.{part}.weight"] = value
    # An expert that no token chose has no gradient in torch.
    if name.startswith("switch"):
        for tensor in names - grads.keys():
            like = next(n for n in grads if tensor.split(".")[-2] == n.split(".")[-2])
            grads[tensor] = np.zeros_like(grads[like])
    return grads
