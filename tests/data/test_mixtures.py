"""Runs with mixtures of experts: what is refused before compiling, shown, and fine-tuned."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import switch
from t5x_lite import build as build_lib, train, tree
from t5x_lite.errors import UserError
from t5x_lite.evaluation import evaluator
from t5x_lite.layers.config import MoEConfig
from t5x_lite.models.blocks import mixture_metrics
from t5x_lite.models.config import SegmentConfig
from t5x_lite.models.language_model import Model
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import metrics
from tests import tiny, tiny_config

MOE = MoEConfig(num_experts=4)


def sparse(run, moe=MOE, stacks=("encoder", "decoder")):
    """The run with every other MLP of these stacks a mixture."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **{
        side: switch.sparsify(getattr(run.model, side), moe, 2) for side in stacks}))


# --- refused ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("moe,mesh,accumulation,message", [
    ({"router": "top_k", "top_k": 5}, {"data": 8}, 1,
     r"encoder.segments\[0\].blocks\[1\].moe.top_k=5 uses 5 experts a token, but num_experts=4"),
    ({"num_experts": 6}, {"data": 2, "expert": 4}, 1,
     "moe.num_experts=6 cannot be split 4 ways over the mesh axis 'expert'"),
    ({"capacity_factor": 0.25}, {"data": 8}, 1,
     "encoder.*capacity_factor=0.25: 0.25 . 12 tokens of a group / 4 experts"),
    ({"eval_capacity_factor": 0.4}, {"data": 8}, 1,
     "decoder.*eval_capacity_factor=0.4: 0.4 . 8 tokens of a group"),
    ({"router": "expert_choice"}, {"data": 8}, 1,
     r"decoder.segments\[0\].blocks\[1\].moe: router='expert_choice' is not possible in a causal"),
    ({"group_size": 48}, {"data": 2, "tensor": 4}, 2,
     "group_size=48 makes groups of 4 sequences, but micro-batches"),
])
def test_refused_before_anything_is_compiled(moe, mesh, accumulation, message):
    run = sparse(tiny.seq2seq(), dataclasses.replace(MOE, **moe))
    run = dataclasses.replace(
        run, mesh=MeshConfig(**{"data": 1, **mesh}),
        train=dataclasses.replace(run.train, accumulation=accumulation))
    with pytest.raises(UserError, match=message):
        build_lib.build(run)


# --- shown ------------------------------------------------------------------------------------------

def test_collapsed_experts_are_warned_of_and_every_step_is_measured(tmp_path, capsys):
    """A router of zeros sends every token to the first expert; the other stack's does not."""
    text = tiny_config.write_text(tmp_path / "words.txt")
    run = sparse(tiny_config.run(text), dataclasses.replace(MOE, router_std=0.0), ("encoder",))
    run = sparse(run, dataclasses.replace(MOE, router="hash"), ("decoder",))
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, num_steps=2),
                              mesh=MeshConfig(data=8))
    train.run(run, tmp_path / "run")
    shown = capsys.readouterr().out
    assert shown.count("few experts get nearly all tokens") == 1
    assert ("warning: at step 1 few experts get nearly all tokens (load entropy, 1 where even: "
            "encoder layer 1 0.00); raise moe.balance_weight") in shown
    lines = [line for line in metrics.read_metrics(tmp_path / "run" / "metrics.jsonl")
             if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    by_layer = [lines[0][f"train/moe/load_entropy/{name}"] for name in ("encoder_1", "decoder_1")]
    assert by_layer[0] == 0.0 and by_layer[1] > 0.7
    assert lines[0]["train/moe/load_entropy"] == pytest.approx(sum(by_layer) / 2)
    assert lines[0]["train/moe/router_confidence"] == 0.25
    assert lines[0]["train/aux_loss"] == pytest.approx(0.01)   # balance_weight * E * 1 * 1/E
    for line in lines:
        assert {name.removeprefix("train/moe/") for name in line if "/moe/" in name} == {
            "dead_experts", "dropped_fraction", "load_balancing_loss", "load_entropy",
            "load_entropy/decoder_1", "load_entropy/encoder_1", "load_max_over_mean",
            "router_confidence", "router_z_loss"}


@pytest.mark.parametrize("scan", [True, False])
def test_the_load_of_each_layer_is_told_apart(scan):
    """Of four mixtures in a row, the router of layer 2 sends every token to the first expert."""
    run = tiny.seq2seq(scan=scan)
    mixture = dataclasses.replace(run.model.encoder.segments[0].blocks[0], moe=MOE)
    encoder = dataclasses.replace(run.model.encoder, segments=(SegmentConfig((mixture,), 4),))
    model = Model(dataclasses.replace(run.model, encoder=encoder))
    params = tree.flatten(tiny.params(dataclasses.replace(run, model=model.config)))
    (router,) = (path for path in params if "/router/" in path)
    params[router] = params[router] * np.asarray([50.0, 50.0, 0.0, 50.0])[:, None, None]
    _, aux = jax.jit(lambda params: model.bind(params)(tiny.batch()))(tree.unflatten(params))
    aux = mixture_metrics(jax.device_get(aux))
    loads = [float(aux[f"moe/load_entropy/encoder_{i}"][0]) for i in range(4)]
    assert loads[2] == 0.0 and min(loads[:2] + loads[3:]) > 0.5
    assert {float(aux[f"moe/load_entropy/encoder_{i}"][1]) for i in range(4)} == {1.0}
    assert float(aux["moe/load_entropy"][0]) == pytest.approx(sum(loads))
    assert sum(name.startswith("moe/load_entropy/") for name in aux) == 4


@pytest.mark.parametrize("moe", [
    {}, {"mask_padding": False}, {"router": "top_2", "z_weight": 0.1, "dropless": True},
    {"router": "hash"}])
def test_what_evaluation_says_does_not_depend_on_its_batch_size(tmp_path, moe):
    """Ten examples of unequal length, the last batch filled up; layers of 4 and of 6 experts."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"inputs": "ab " * (1 + i % 7), "targets": "cd" * (1 + i % 4)})
                             + "\n" for i in range(10)))
    mixture = dataclasses.replace(MOE, **moe)
    run = sparse(tiny_config.run(str(pairs)), mixture, ("encoder",))
    run = sparse(run, dataclasses.replace(mixture, num_experts=6), ("decoder",))
    run = dataclasses.replace(
        run, mesh=MeshConfig(data=1), data=dataclasses.replace(
            run.data, train_files="", validation_files="", train=str(pairs), validation=str(pairs)))
    params = build_lib.build(run, jax.devices()[:1]).init_state()["params"]
    found = []
    for size in (1, 4, 7, 16):
        sized = dataclasses.replace(run, eval=dataclasses.replace(
            run.eval, batch_size=size, num_batches=0, metrics=False))
        program = build_lib.build(sized, jax.devices()[:1])
        with program.activate():
            (values,) = evaluator.Evaluator(program).evaluate(params).values()
        found.append(values)
    assert {"moe/dead_experts", "moe/load_entropy", "moe/load_entropy/encoder_1", "aux_loss",
            "moe/load_max_over_mean", "moe/dropped_fraction"} <= found[0].keys()
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=1e-5)


# --- fine-tuned -------------------------------------------------------------------------------------

@pytest.mark.slow
def test_fine_tuning_freezes_routers_drops_in_experts_and_has_no_auxiliary_losses():
    base = sparse(tiny.seq2seq(), dataclasses.replace(MOE, z_weight=0.1, jitter=0.1))
    run = switch.finetuning(base)
    for stack in (run.model.encoder, run.model.decoder):
        dense, mixture = stack.segments[0].blocks
        assert (stack.dropout_rate, dense.mlp.dropout_rate) == (0.1, 0.1)
        assert (mixture.moe.mlp.dropout_rate, mixture.moe.jitter) == (0.4, 0.0)
        assert dense.self_attention.dropout_rate == 0.1
    run = dataclasses.replace(run, train=base.train)
    start = tiny.params(run)
    program = build_lib.build(run, jax.devices()[:1])
    routers = {p for p in program.table if "/router/" in p}
    assert len(routers) == 2
    assert not [p for p in tree.flatten(program.abstract_state["opt_state"]) if "router" in p]
    rows = {k: jax.device_put(v, program.batch_sharding) for k, v in tiny.batch().items()}
    with program.activate():
        new, sums = program.jit_train_step()(tiny.place(start, program), rows)
    assert float(sums["aux_loss"][0]) == 0.0 and float(sums["moe/router_z_loss"][0]) > 0
    before, after = tree.flatten(start), tree.flatten(new["params"])
    assert {p for p in before if np.array_equal(before[p], after[p])} == routers


def test_what_fine_tuning_does_is_asked_for_one_by_one():
    base = sparse(tiny.seq2seq(), dataclasses.replace(MOE, z_weight=0.1))
    kept = switch.finetuning(base, frozen_routers=False, auxiliary_losses=True, expert_dropout=0.2)
    moe = kept.model.decoder.segments[0].blocks[1].moe
    assert (moe.balance_weight, moe.z_weight, moe.mlp.dropout_rate) == (0.01, 0.1, 0.2)
    assert kept.optimizer.groups == ()
    preset = switch.run("base_8_finetune")
    assert preset.name == "switch_base_8_finetune" and preset.optimizer.groups[0].frozen
