"""Maximal-update parametrisation: equal at the base, scales and rates by role, exports, refusals."""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_lite import tree
from t5x_lite.build import build
from t5x_lite.errors import UserError
from t5x_lite.formats import hf
from t5x_lite.layers.config import AttentionConfig, InitConfig, MLPConfig, MoEConfig
from t5x_lite.models import parametrization
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model
from t5x_lite.scaling import coordinates
from t5x_lite.training.methods import METHODS, AdafactorConfig, MuonConfig, OptimizerConfig
from t5x_lite.training.optimizers import make_optimizer
from t5x_lite.training.schedules import ScheduleConfig
from tests import tiny


def _mup(model: ModelConfig, base: int, **fields) -> ModelConfig:
    return dataclasses.replace(model, parametrization="mup", base_width=base, **fields)


def _moe_model(**fields) -> ModelConfig:
    block = BlockConfig(AttentionConfig(4, 4), moe=MoEConfig(4, MLPConfig(32)))
    decoder = StackConfig((SegmentConfig((block,), 1),), causal=True)
    return ModelConfig("decoder_only", 64, 16, None, decoder, **fields)


def test_at_its_base_it_is_the_standard_model():
    """Equal draws, equal function, equal rates: then every step is equal to the bit."""
    model = tiny.seq2seq().model
    base = _mup(model, model.embed_dim)
    found = parametrization.resolved(base)
    assert found.init.logits_std == model.embed_dim ** -0.5    # what 0 stands for
    assert dataclasses.replace(found, init=model.init) == model
    jax.tree.map(np.testing.assert_array_equal, *(
        jax.jit(Model(config).init)(jax.random.key(0)) for config in (model, base)))
    for name in METHODS:
        program = build(dataclasses.replace(tiny.seq2seq(), model=base, optimizer=OptimizerConfig(
            name, ScheduleConfig("constant", 0.01), weight_decay=0.1)), jax.devices()[:1])
        assert not program.optimizer.width_rates
        assert set(program.optimizer.weight_decay.values()) == {0.0, 0.1}


def test_roles_follow_from_logical_axes():
    roles = {path: info.role for path, info in Model(_moe_model()).table.items()}
    assert roles["token_embedding/embedding"] == roles["decoder/final_norm/scale"] == "vector"
    assert roles["decoder/relative_position/embedding"] == "vector"
    assert roles["logits/kernel"] == "head"
    block = "decoder/segment_0/block_0"
    assert roles[f"{block}/mlp/router/kernel"] == "narrow"
    assert {roles[f"{block}/mlp/experts/{w}/kernel"] for w in ("wi_0", "wo")} == {"hidden"}
    assert {roles[f"{block}/self_attention/{w}/kernel"] for w in ("query", "key", "out")} == {
        "hidden"}


def test_draws_of_a_model_four_times_its_base():
    fixed = InitConfig(kernel="fixed", kernel_std=0.02, embedding_std=0.5)
    for init, hidden, head in ((InitConfig(), 1 / 4, 4**-0.5 / 4), (fixed, 0.01, 0.005)):
        table = Model(_mup(_moe_model(init=init), 4)).table
        block = "decoder/segment_0/block_0"
        assert table[f"{block}/self_attention/key/kernel"].init == f"truncated_normal({hidden:.4g})"
        assert table["logits/kernel"].init == f"truncated_normal({head:.4g})"
        assert table[f"{block}/mlp/router/kernel"].init == "truncated_normal(0.005)"
        assert table["token_embedding/embedding"].init == \
            f"truncated_normal({init.embedding_std:.4g})"


# Powers of m = 4 that the learning rates of (a hidden kernel, the head, the router, a norm) have.
POWERS = {
    "adamw": ({}, (-1, -1, -1, 0)), "lion": ({}, (-1, -1, -1, 0)),
    "adafactor": ({}, (-0.5, 0, 0, 0)), "sgd": ({}, (0, -1, -1, 1)),
    "muon": ({}, (0, -1, -0.5, 0)), "lamb": ({}, (-0.5, 0, 0, 0)),
}


@pytest.mark.parametrize(("name", "fields", "powers"), [
    *((name, *row) for name, row in POWERS.items()),
    ("adafactor", {"adafactor": AdafactorConfig(multiply_by_parameter_scale=False)},
     (-1, -1, -1, 0)),
    ("muon", {"muon": MuonConfig(consistent_rms=0.2)}, (-0.5, -1, -1, 0))], ids=str)
def test_learning_rates_by_role(name, fields, powers):
    config = OptimizerConfig(name, ScheduleConfig("constant", 1.0), weight_decay=0.1, **fields)
    optimizer = make_optimizer(config, Model(_moe_model()).table, width=4.0)
    rates = optimizer._learning_rates(0)
    block = "decoder/segment_0/block_0"
    paths = (f"{block}/mlp/experts/wi_0/kernel", "logits/kernel", f"{block}/mlp/router/kernel",
             "decoder/final_norm/scale")
    assert [float(rates[path]) for path in paths] == pytest.approx([4.0**p for p in powers])
    if METHODS[name].decay == "change":   # rate times decay is that of the base
        decays = [float(rates[path]) * optimizer.weight_decay[path] for path in paths[:3]]
        assert decays == pytest.approx([0.1] * 3)
    assert not make_optimizer(config, Model(_moe_model()).table).width_rates


def test_attention_and_tied_logits_become_plain_scales():
    model = _mup(_moe_model(tie_logits=True, logits_scale=0.5), 4, base_head_dim=1)
    found = parametrization.resolved(model)
    assert found.logits_scale == 0.5 / 4
    assert found.decoder.segments[0].blocks[0].self_attention.scale == 1 / 4
    assert (found.parametrization, found.base_width, found.base_head_dim) == ("standard", 0, 0)
    follows = parametrization.resolved(dataclasses.replace(model, logits_scale=16**-0.5))
    assert follows.logits_scale == pytest.approx(4**-0.5 / 4)   # the base's, over m


@pytest.mark.parametrize("residual", ["pre", "parallel"])
def test_branches_of_a_deeper_model_are_those_of_smaller_output_kernels(residual):
    model = tiny.seq2seq(scan=False).model
    stacks = {side: dataclasses.replace(getattr(model, side), residual=residual) for side in (
        ("encoder",) if residual == "parallel" else ("encoder", "decoder"))}
    model = dataclasses.replace(model, **stacks)
    layers = model.encoder.num_layers
    deep = _mup(model, model.embed_dim, base_depth=3)
    assert parametrization.resolved(deep).encoder.branch_scale == 3 / layers
    assert parametrization.resolved(_mup(model, 4, base_depth=layers)).encoder.branch_scale == 1
    params = jax.jit(Model(model).init)(jax.random.key(0))
    flat = tree.flatten(params)
    scaled = tree.unflatten({path: value * 3 / layers if path.endswith(("out/kernel", "wo/kernel"))
                             else value for path, value in flat.items()})
    batch = coordinates.random_batch(build(dataclasses.replace(tiny.seq2seq(), model=model),
                                           jax.devices()[:1]), 0)
    found, wanted = (Model(config).bind(values)(batch)[0] for config, values in (
        (deep, params), (model, scaled)))
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-5)
    assert not np.allclose(found, Model(model).bind(params)(batch)[0], atol=1e-2)


def test_exports_state_the_folded_model_or_are_refused_by_name():
    model = tiny.seq2seq().model
    written = hf.hf_config(_mup(model, 4), "t5")
    assert written == hf.hf_config(model, "t5")     # more heads, not wider ones: nothing to fold
    with pytest.raises(UserError, match="decoder.branch_scale: 1.5, there 1.0"):
        hf.hf_config(_mup(model, 4, base_depth=3), "t5")
    with pytest.raises(UserError, match="self_attention.scale: 0.5, there 1.0"):
        hf.hf_config(_mup(model, 4, base_head_dim=2), "t5")
    tied = dataclasses.replace(model, tie_logits=True, logits_scale=16**-0.5)
    with pytest.raises(UserError, match="logits_scale: 0.125, there 0.25"):
        hf.hf_config(_mup(tied, 4), "t5")


@pytest.mark.parametrize(("fields", "message"), [
    ({"parametrization": "mup"}, "needs model.base_width"),
    ({"base_width": 8}, "is of model.parametrization=mup"),
    ({"parametrization": "mu"}, "did you mean 'mup'"),
    ({"parametrization": "mup", "base_width": -1}, "at least 0"),
    ({"parametrization": "mup", "base_width": 4, "embedding_scale": 4.0}, "give the base's, 2"),
    ({"parametrization": "mup", "base_width": 4, "head_transform": "gelu"}, "head_transform"),
    ({"base_depth": 2}, "is of model.parametrization=mup"),
    ({"parametrization": "mup", "base_width": 4, "base_depth": 2, "encoder": dataclasses.replace(
        tiny.seq2seq().model.encoder, residual="sandwich")}, "base_depth=2 scales.*encoder.residual"),
    ({"encoder": dataclasses.replace(tiny.seq2seq().model.encoder, residual="post",
                                     branch_scale=0.5)}, "encoder.branch_scale=0.5 scales"),
])
def test_what_cannot_be_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        Model(dataclasses.replace(tiny.seq2seq().model, **fields))


def test_old_configs_are_standard_and_layers_apart_keep_the_scales():
    model = tiny.seq2seq().model
    assert parametrization.resolved(model) is model and model.parametrization == "standard"
    wide = Model(_mup(dataclasses.replace(model, tie_logits=True), 4))
    params = jax.jit(wide.init)(jax.random.key(0))
    apart, cut = wide.with_layers_apart(params)
    assert apart.config.logits_scale == wide.config.logits_scale == 0.25
    assert tree.flatten(cut).keys() == apart.table.keys()
