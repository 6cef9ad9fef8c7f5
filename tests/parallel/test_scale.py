"""One training step is the same however it is spread over devices, memory and time.

Each line of COMBINATIONS is a model class with a mesh, a stage of ZeRO, a rematerialisation
policy, a number of accumulated micro-batches and a pipeline schedule. Its loss, gradients and
updated parameters are compared with those of one device that takes the whole batch at once.
The lines without `slow` contain every pair of values that matters but a mixture's with a pipeline;
`make test-all` runs all.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from t5x_lite import build as build_lib, config as config_lib, tree
from t5x_lite.errors import UserError
from t5x_lite.layers.config import AttentionConfig, MLPConfig, MoEConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.parallel.pipeline_schedules import PipelineConfig
from t5x_lite.parallel.sharding import DEFAULT_RULES, MeshConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig
from tests import tiny

LAYERS = 4
# An epsilon that keeps Adam's first update continuous where gradients are rounding errors.
OPTIMIZER = OptimizerConfig(name="adamw", eps=1e-3, weight_decay=0.1, clip_norm=1.0,
                            schedule=ScheduleConfig("constant", base_learning_rate=0.01))


def _stack(causal: bool, cross: bool, position: str, dropout: float = 0.1, kv_heads: int = 0,
           **kwargs) -> StackConfig:
    attention = AttentionConfig(num_heads=4, head_dim=4, num_kv_heads=kv_heads,
                                dropout_rate=dropout)
    block = BlockConfig(attention, attention if cross else None,
                        MLPConfig(mlp_dim=32, dropout_rate=dropout))
    return StackConfig((SegmentConfig((block,), LAYERS),), causal=causal, dropout_rate=dropout,
                       position=PositionConfig(position), **kwargs)


def _mixtures(stack: StackConfig) -> StackConfig:
    """Mixtures of experts for MLPs: dropless ones and Switch's, which drop, in turn."""
    dense = stack.segments[0].blocks[0]
    switch = MoEConfig(num_experts=4, mlp=MLPConfig(mlp_dim=32))
    free = dataclasses.replace(switch, router="top_2", dropless=True)
    blocks = tuple(dataclasses.replace(dense, moe=moe) for moe in (free, switch))
    return dataclasses.replace(stack, segments=(SegmentConfig(blocks, LAYERS // 2),))


MODELS = {
    "seq2seq": (tiny.seq2seq().model.architecture, "seq2seq",
                _stack(False, False, "t5_bias"), _stack(True, True, "t5_bias")),
    "lm": ("decoder_only", "lm", None, _stack(True, False, "rotary", kv_heads=2)),
    "moe": ("decoder_only", "lm", None, _mixtures(_stack(True, False, "rotary"))),
    "mlm": ("encoder_only", "mlm", _stack(False, False, "learned", residual="post"), None),
}


def run_config(name: str, *, mesh=None, zero=3, remat="none", accumulation=1, pipeline=None,
               scan=True, sequence_parallel=False, offload=False, rules=None, logits_chunk=0):
    """The run of one line of COMBINATIONS."""
    architecture, objective, *stacks = MODELS[name]
    changes = {"remat": remat, "scan": scan, "pipeline": pipeline or PipelineConfig()}
    encoder, decoder = (s and dataclasses.replace(s, **changes) for s in stacks)
    model = ModelConfig(architecture, vocab_size=tiny.VOCAB, embed_dim=16, encoder=encoder,
                        decoder=decoder)
    return dataclasses.replace(
        tiny.seq2seq(), model=model, optimizer=OPTIMIZER,
        objective=ObjectiveConfig(objective, logits_chunk=logits_chunk),
        train=config_lib.TrainConfig(global_batch_size=tiny.ROWS, accumulation=accumulation),
        mesh=MeshConfig(**{"data": 1, **(mesh or {})}),
        sharding=config_lib.ShardingConfig(zero=zero, sequence_parallel=sequence_parallel,
                                           offload_optimizer=offload,
                                           rules={**DEFAULT_RULES, **(rules or {})}))


def batch(name: str) -> dict:
    """Rows of the model's features; those of an encoder-only model are of one length."""
    features = tiny.batch()
    if name == "mlm":
        inputs = features["encoder_input_tokens"]
        return {"encoder_input_tokens": inputs, "decoder_target_tokens": inputs,
                "decoder_loss_weights": (inputs % 3 == 2).astype(np.float32)}
    if name in ("lm", "moe"):
        return {k: v for k, v in features.items() if not k.startswith("encoder")}
    return features


def one_step(config, name: str, devices):
    """Metrics, Adam's first moment (a tenth of the clipped gradient) and new parameters."""
    program = build_lib.build(config, devices)
    start = tiny.place(tiny.params(config), program)
    rows = {k: jax.device_put(v, program.batch_sharding) for k, v in batch(name).items()}
    with program.activate():
        new, sums = program.jit_train_step()(start, rows)
    assert jax.tree.map(lambda x: x.sharding, new) == jax.tree.map(
        lambda x: x.sharding, program.abstract_state)
    return jax.tree.map(np.asarray, (sums, new["opt_state"]["mu"], new["params"]))


@functools.cache
def reference(name: str):
    """The step on one device."""
    return one_step(run_config(name), name, jax.devices()[:1])


GPIPE, CIRCULAR, ONE_F_ONE_B = (PipelineConfig("gpipe", 4), PipelineConfig("circular", 2, 2),
                                PipelineConfig("1f1b", 4))
SLOW = pytest.mark.slow
COMBINATIONS = [
    # model, mesh, and what differs from ZeRO-3 without the rest
    pytest.param("seq2seq", {"stage": 2, "fsdp": 2, "tensor": 2},
                 {"pipeline": GPIPE, "zero": 1, "remat": "full", "sequence_parallel": True}),
    pytest.param("lm", {"stage": 4, "fsdp": 2},
                 {"pipeline": dataclasses.replace(ONE_F_ONE_B), "zero": 2, "accumulation": 2}),
    pytest.param("mlm", {"data": 2, "fsdp": 2, "tensor": 2},
                 {"zero": 2, "accumulation": 4, "remat": "dots", "offload": True,
                  "rules": {"norm": ("fsdp",)}}),
    pytest.param("lm", {"sequence": 2, "fsdp": 2, "tensor": 2},
                 {"zero": 3, "remat": "full", "sequence_parallel": True, "accumulation": 2}),
    pytest.param("seq2seq", {"slice": 2, "fsdp": 2, "tensor": 2},
                 {"zero": 2, "accumulation": 2, "remat": "recompute:mlp_hidden,query"}),
    pytest.param("mlm", {"stage": 2, "data": 2, "tensor": 2},
                 {"pipeline": CIRCULAR, "zero": 3, "scan": False,
                  "remat": "save:context;offload:mlp_hidden"}),
    pytest.param("lm", {"slice": 2, "stage": 2, "fsdp": 2},
                 {"pipeline": GPIPE, "zero": 3, "remat": "dots"}),
    pytest.param("lm", {"stage": 2, "data": 2, "fsdp": 2},
                 {"pipeline": ONE_F_ONE_B, "zero": 1, "logits_chunk": 4}),
    pytest.param("moe", {"fsdp": 2, "expert": 2, "tensor": 2}, {"zero": 2, "accumulation": 2}),
    # the rest
    pytest.param("seq2seq", {"data": 8}, {"zero": 1}, marks=SLOW),
    pytest.param("seq2seq", {"fsdp": 8}, {"zero": 1, "accumulation": 2}, marks=SLOW),
    pytest.param("seq2seq", {"fsdp": 8}, {"zero": 2, "remat": "full"}, marks=SLOW),
    pytest.param("seq2seq", {"fsdp": 4, "tensor": 2}, {"remat": "dots", "scan": False},
                 marks=SLOW),
    pytest.param("seq2seq", {"data": 2, "tensor": 4}, {"sequence_parallel": True}, marks=SLOW),
    pytest.param("seq2seq", {"sequence": 4, "fsdp": 2}, {"remat": "full"}, marks=SLOW),
    pytest.param("seq2seq", {"stage": 2, "data": 4}, {"pipeline": ONE_F_ONE_B}, marks=SLOW),
    pytest.param("seq2seq", {"stage": 2, "fsdp": 2, "tensor": 2},
                 {"pipeline": ONE_F_ONE_B, "zero": 1, "accumulation": 2}, marks=SLOW),
    pytest.param("seq2seq", {"stage": 2, "fsdp": 4}, {"pipeline": CIRCULAR, "zero": 2}, marks=SLOW),
    pytest.param("seq2seq", {"slice": 2, "stage": 2, "tensor": 2},
                 {"pipeline": ONE_F_ONE_B, "accumulation": 2}, marks=SLOW),
    pytest.param("lm", {"fsdp": 8},
                 {"accumulation": 2, "remat": "full", "rules": {"norm": ("fsdp",)}}, marks=SLOW),
    pytest.param("lm", {"data": 4, "expert": 2}, {"zero": 1}, marks=SLOW),
    pytest.param("lm", {"sequence": 8}, {}, marks=SLOW),
    pytest.param("lm", {"stage": 2, "fsdp": 4}, {"pipeline": CIRCULAR, "offload": True},
                 marks=SLOW),
    pytest.param("lm", {"stage": 2, "sequence": 2, "tensor": 2},
                 {"pipeline": GPIPE, "sequence_parallel": True}, marks=SLOW),
    pytest.param("lm", {"stage": 2, "data": 2, "tensor": 2},
                 {"pipeline": ONE_F_ONE_B, "remat": "full", "zero": 1}, marks=SLOW),
    pytest.param("lm", {"slice": 2, "data": 2, "fsdp": 2}, {"zero": 1, "accumulation": 2},
                 marks=SLOW),
    pytest.param("lm", {"slice": 2, "stage": 2, "fsdp": 2},
                 {"pipeline": PipelineConfig("1f1b", 2), "zero": 1, "accumulation": 2}, marks=SLOW),
    pytest.param("moe", {"stage": 2, "fsdp": 2, "expert": 2}, {"pipeline": GPIPE, "zero": 1},
                 marks=SLOW),
    pytest.param("moe", {"data": 2, "expert": 4}, {"zero": 1, "remat": "full"}, marks=SLOW),
    pytest.param("moe", {"stage": 2, "expert": 2, "tensor": 2},
                 {"pipeline": GPIPE, "accumulation": 2}, marks=SLOW),
    pytest.param("moe", {"stage": 2, "expert": 2, "tensor": 2},
                 {"pipeline": ONE_F_ONE_B, "accumulation": 2}, marks=SLOW),
    pytest.param("moe", {"stage": 2, "expert": 2, "fsdp": 2}, {"pipeline": GPIPE}, marks=SLOW),
    pytest.param("moe", {"slice": 2, "expert": 2, "fsdp": 2}, {"accumulation": 2}, marks=SLOW),
    pytest.param("mlm", {"fsdp": 2, "tensor": 4}, {"zero": 1, "sequence_parallel": True},
                 marks=SLOW),
    pytest.param("mlm", {"stage": 4, "tensor": 2}, {"pipeline": GPIPE, "remat": "full"},
                 marks=SLOW),
    pytest.param("mlm", {"stage": 2, "sequence": 2, "fsdp": 2},
                 {"pipeline": ONE_F_ONE_B, "zero": 2}, marks=SLOW),
]


@pytest.mark.parametrize("name, mesh, options", COMBINATIONS, ids=str)
def test_a_step_equals_that_of_one_device(name, mesh, options):
    sums, moment, params = one_step(run_config(name, mesh=mesh, **options), name, jax.devices())
    want_sums, want_moment, want_params = reference(name)
    for metric in ("loss", "z_loss", "accuracy", "grad_norm", *(("aux_loss",) * (name == "moe"))):
        np.testing.assert_allclose(sums[metric][0] / sums[metric][1],
                                   want_sums[metric][0] / want_sums[metric][1], rtol=1e-5)
    by_layer = {metric for metric in want_sums if metric.startswith("moe/load_entropy/")}
    assert by_layer == {metric for metric in sums if metric.startswith("moe/load_entropy/")}
    if by_layer:   # of micro-batches, so not equal to those of the whole batch
        np.testing.assert_allclose(sum(sums[metric][0] for metric in by_layer),
                                   sums["moe/load_entropy"][0], rtol=1e-5)
    tiny.assert_close(moment, want_moment)
    tiny.assert_close(params, want_params)
    assert ("pipeline_bubble" in sums) == (mesh.get("stage", 1) > 1)


def test_the_combinations_are_many_and_different():
    lines = [str(line.values) for line in COMBINATIONS]
    assert len(set(lines)) == len(lines) >= 20


@pytest.mark.parametrize("changes, message", [
    ({"mesh": {"stage": 8}}, r"model.decoder.segments\[0\].repeats=4 cannot be divided among"),
    ({"mesh": {"data": 4, "tensor": 2}, "zero": 4}, r"sharding.zero=4: must be in \[1, 3\]"),
    ({"mesh": {"data": 5}}, "needs 5 devices, but there are 8"),
    ({"mesh": {"sequence": 8, "data": 1}, "sequence_parallel": True}, None),
    ({"mesh": {"stage": 2, "fsdp": 4}, "pipeline": PipelineConfig("gpipe", 16)},
     "16 rows cannot be split"),
    ({"mesh": {"data": 1, "tensor": 8}}, "cannot be split 8 ways"),
    ({"mesh": {"data": 8}, "remat": "save:mpl_hidden"}, "model.decoder.remat.*'mlp_hidden'"),
])
def test_impossible_runs_are_refused_before_compiling(changes, message):
    if message is None:
        build_lib.build(run_config("lm", **changes), jax.devices())
        return
    with pytest.raises(UserError, match=message):
        build_lib.build(run_config("lm", **changes), jax.devices())


def test_lengths_must_divide():
    config = run_config("lm", mesh={"sequence": 2, "tensor": 4}, sequence_parallel=True)
    config = config_lib.replace(config, "data.targets_length", 12)
    with pytest.raises(UserError, match="targets_length=12 must be a multiple of 8: act_norm"):
        build_lib.build(config, jax.devices())


def test_the_same_parameters_start_every_run():
    trees = [tree.flatten(tiny.params(run_config("lm", **changes)))
             for changes in ({}, {"remat": "full"}, {"pipeline": GPIPE})]
    assert all(t.keys() == trees[0].keys() for t in trees)
