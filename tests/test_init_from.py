"""init_from: what is loaded from where, what is refused, and that train and eval take it."""

import dataclasses
import functools
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

from t5x_lite import (
    build,
    config as configs,
    eval as eval_main,
    init_from,
    interactive,
    same_vocabulary,
    train,
    tree,
)
from t5x_lite.config import RunConfig, from_mapping, to_json
from t5x_lite.errors import UserError
from t5x_lite.formats import assignment
from t5x_lite.layers.config import MoEConfig
from t5x_lite.models.config import SegmentConfig
from t5x_lite.models.language_model import Model
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import objectives
from tests import tiny, tiny_config
from tests.formats import folders

RUN = tiny.seq2seq()
TABLE = Model(RUN.model).table
SHAPES = {path: info.shape for path, info in TABLE.items()}
PYTHON_VOCABULARY = pathlib.Path(__file__).parents[1] / "t5x_lite" / "data" / "vocab" / "python.model"
MLP = "decoder/segment_0/block_0/mlp/wo/kernel"


# --- the map --------------------------------------------------------------------------------------

def test_without_a_map_both_sides_must_agree():
    plan = assignment.assign(TABLE, SHAPES, (), "x")
    assert plan == assignment.Assignment({p: p for p in TABLE}, (), ())
    found = {p: s for p, s in SHAPES.items() if p != MLP} | {"decoder/odd": (3,),
                                                             "encoder/final_norm/scale": (17,)}
    with pytest.raises(UserError) as error:
        assignment.assign(TABLE, found, (), "x")
    text = str(error.value)
    assert f"missing   {MLP}" in text and "extra     decoder/odd" in text
    assert "mismatch  encoder/final_norm/scale: expected (16,), found (17,)" in text


def test_first_match_decides_and_the_rest_of_the_source_is_skipped():
    plan = assignment.assign(TABLE, SHAPES, (
        ("logits/kernel", ""), (r"decoder/(.*self_attention/.*)", r"encoder/\1"),
        ("decoder/.*", "")), "x")
    assert plan.loaded["encoder/final_norm/scale"] == "encoder/final_norm/scale"
    own = "segment_0/block_0/self_attention/query/kernel"
    assert plan.loaded[f"decoder/{own}"] == f"encoder/{own}"
    assert MLP in plan.fresh and MLP in plan.skipped and "logits/kernel" in plan.fresh


@pytest.mark.parametrize("init_map,message", [
    ((("decodr/.*", ""),), r"init_map\[0\]: 'decodr/.\*' matches no parameter"),
    ((("(decoder", ""),), r"init_map\[0\]=.*missing \)"),
    (((r"decoder/.*", r"encoder/\1"),), r"init_map\[0\]=.*invalid group reference"),
    (((r"(.*)/cross_attention/(.*)", r"\1/crossed/\2"),), "missing .*crossed/key/kernel"),
])
def test_rules_that_cannot_be_are_named(init_map, message):
    with pytest.raises(UserError, match=message):
        assignment.assign(TABLE, SHAPES, init_map, "x")


# --- loading --------------------------------------------------------------------------------------

def load(config, fresh=None):
    """The parameters as numpy, and the program."""
    program = build.build(config)
    with program.activate():
        params = init_from.parameters(program, fresh and (lambda: fresh))
    for path, x in tree.flatten(params).items() if fresh is None else ():
        want = tree.flatten(program.abstract_state["params"])[path]
        assert (x.shape, x.dtype, x.sharding) == (want.shape, want.dtype, want.sharding), path
    return folders.flat(params)


def from_hf(folder, **changes):
    return dataclasses.replace(RUN, init_from=f"hf:{folder}", mesh=MeshConfig(fsdp=4, tensor=2),
                               **changes)


@pytest.mark.parametrize("precision", ["float32", "bf16_params"])
def test_hugging_face_onto_a_mesh(tmp_path, capsys, precision):
    expected = folders.write_hf(tmp_path / "hf", RUN.model)
    found = load(from_hf(tmp_path / "hf", precision=precision))
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value.astype(found[path].dtype), err_msg=path)
    assert f"{len(TABLE)} parameters loaded" in capsys.readouterr().out


def test_a_padded_vocabulary_takes_the_mean_row(tmp_path, capsys):
    small = dataclasses.replace(RUN.model, vocab_size=61)
    expected = folders.write_hf(tmp_path / "hf", small)
    found = load(from_hf(tmp_path / "hf"))
    rows = found["token_embedding/embedding"]
    np.testing.assert_array_equal(rows[:61], expected["token_embedding/embedding"])
    np.testing.assert_allclose(rows[61:], np.tile(rows[:61].mean(0), (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(found["logits/kernel"][:, 63],
                               expected["logits/kernel"].mean(1), rtol=1e-5)
    assert "fitted   token_embedding/embedding: padded, (61, 16) to (64, 16)" in \
        capsys.readouterr().out
    with pytest.raises(UserError, match=r"mismatch  logits/kernel: expected \(16, 64\)"):
        folders.write_hf(tmp_path / "more", dataclasses.replace(RUN.model, vocab_size=65))
        load(from_hf(tmp_path / "more"))


def test_part_of_a_model_the_rest_fresh(tmp_path, capsys):
    expected = folders.write_hf(tmp_path / "hf", RUN.model)
    config = from_hf(tmp_path / "hf", init_map=(("decoder/.*|logits/kernel", ""),))
    fresh = tree.unflatten({p: np.full(s, 7, np.float32) for p, s in SHAPES.items()})
    found = load(config, fresh)
    for path, value in found.items():
        expect = 7 if path.startswith(("decoder/", "logits/")) else expected[path]
        np.testing.assert_array_equal(value, np.broadcast_to(expect, value.shape), err_msg=path)
    out = capsys.readouterr().out
    assert "fresh    decoder/final_norm/scale" in out and "skipped  logits/kernel" in out
    with pytest.raises(UserError, match="leaves decoder/.* fresh, that is random"):
        load(config)


UPCYCLE = ((r"(.*)/mlp/experts/(.*)", r"\1/mlp/\2"), (".*/router/.*", ""))


def test_upcycling_gives_the_dense_models_loss(tmp_path):
    """Sparse upcycling, Komatsuzaki et al. 2022: every expert is a copy of the dense MLP."""
    expected = folders.write_hf(tmp_path / "hf", RUN.model)
    mlp = RUN.model.encoder.segments[0].blocks[0].mlp

    def sparse(stack, **router):   # every second layer, where the dense model repeats one block
        moe = MoEConfig(num_experts=4, mlp=mlp, **router)
        block = stack.segments[0].blocks[0]
        return dataclasses.replace(stack, segments=(
            SegmentConfig((block, dataclasses.replace(block, moe=moe)), 1),))

    dense = dataclasses.replace(RUN, init_from=f"hf:{tmp_path / 'hf'}")
    model = dataclasses.replace(
        dense.model, encoder=sparse(RUN.model.encoder, router="top_k", top_k=3, dropless=True),
        decoder=sparse(RUN.model.decoder, router="top_2", eval_capacity_factor=4.0))
    config = from_mapping(RunConfig, json.loads(to_json(   # as train and a workdir have it
        dataclasses.replace(dense, model=model, init_map=UPCYCLE))))
    losses, params = [], None
    for run in (dense, config):
        program = build.build(run, jax.devices()[:1])
        with program.activate():
            params = init_from.start(program)["params"]
            _, sums = jax.jit(functools.partial(
                objectives.loss, key=None, config=run.objective, divisors={"weight": 1.0}))(
                    program.model.bind(params), tiny.batch())
        losses.append(float(sums["loss"][0] / sums["loss"][1]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)

    found = folders.flat(params)
    wo = expected["encoder/segment_0/block_0/mlp/wo/kernel"]   # [2 layers, F, D]
    np.testing.assert_array_equal(found["encoder/segment_0/block_0/mlp/wo/kernel"], wo[:1])
    experts = found["encoder/segment_0/block_1/mlp/experts/wo/kernel"]
    np.testing.assert_array_equal(experts, np.stack([wo[1:]] * 4, axis=1))
    routers = found["encoder/segment_0/block_1/mlp/router/kernel"]
    assert np.std(routers) == pytest.approx(MoEConfig().router_std, rel=0.5)   # fresh


def test_another_vocabulary_is_refused_by_name(tmp_path, capsys, monkeypatch):
    model = dataclasses.replace(RUN.model, vocab_size=4096)
    folder = tmp_path / "hf"
    folders.write_hf(folder, model)
    config = from_hf(folder, model=model, data=dataclasses.replace(RUN.data, vocabulary="python"))
    load(config)
    assert "names no vocabulary that data.vocabulary=python could be" in capsys.readouterr().out
    shutil.copyfile(PYTHON_VOCABULARY, folder / "spiece.model")
    load(config)
    bytes_ = dataclasses.replace(RUN.data, vocabulary="byt5")
    with pytest.raises(UserError, match="data.vocabulary=byt5 is not the vocabulary that hf:.*"
                                        "id 3 is '<0x00>', there "):
        load(dataclasses.replace(config, data=bytes_))
    (folder / "spiece.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(
        {"model": {"vocab": {"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3}}}))
    with pytest.raises(UserError, match="id 3 is '<0x00>', there 'cat'"):
        load(dataclasses.replace(config, data=bytes_))
    # A rule for the embeddings says that this is meant.
    load(dataclasses.replace(config, data=bytes_, init_map=((r"(token_embedding/.*)", r"\1"),)))
    folders.write_hf(tmp_path / "small", RUN.model)
    small = dataclasses.replace(from_hf(tmp_path / "small", model=model), data=bytes_)
    with pytest.raises(UserError, match="byt5 has 259 ids and hf:.* 64 rows"):
        load(small)
    own = types.SimpleNamespace(vocab_size=164, required_size=64)   # sentinels added beyond it
    monkeypatch.setattr(same_vocabulary.data_tasks, "vocabulary_of", lambda config: own)
    load(small)


def test_another_function_of_the_same_shapes_is_told(tmp_path, capsys):
    folders.write_hf(tmp_path / "hf", RUN.model)
    encoder = RUN.model.encoder
    block = encoder.segments[0].blocks[0]
    silu = dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, activation="silu"))
    model = dataclasses.replace(RUN.model, encoder=dataclasses.replace(
        encoder, segments=(SegmentConfig((silu,), 2),)))
    load(from_hf(tmp_path / "hf", model=model))
    assert "differs  model.encoder.layers[0].mlp.activation: silu, there gelu_tanh" in \
        capsys.readouterr().out


def test_train_and_eval_start_from_it(tmp_path, capsys):
    config = tiny_config.run(tiny_config.write_text(tmp_path / "text.txt"))
    folders.write_hf(tmp_path / "hf", config.model)
    config = dataclasses.replace(
        config, init_from=f"hf:{tmp_path / 'hf'}", mesh=MeshConfig(data=1, fsdp=8),
        data=dataclasses.replace(config.data, num_shards=1),
        train=dataclasses.replace(config.train, num_steps=1))
    after = train.run(config, tmp_path / "run")
    before = eval_main.run(config, None, [0])[0]
    (task,) = before
    # One step does not undo random parameters of deviation 1.
    assert after[task]["loss"] == pytest.approx(before[task]["loss"], rel=0.3)
    assert after[task]["loss"] != before[task]["loss"]
    assert capsys.readouterr().out.count("parameters loaded") == 2

    # Its workdir is a source too.
    program = build.build(dataclasses.replace(config, init_from=str(tmp_path / "run")))
    found = folders.flat(init_from.restore(program, None)[0])
    for path, value in folders.flat(init_from.restore(program, tmp_path / "run")[0]).items():
        np.testing.assert_array_equal(found[path], value)
    session = interactive.start(dataclasses.replace(program.config, mesh=MeshConfig()))
    np.testing.assert_array_equal(folders.flat(session.state["params"])[path], value)
    other = dataclasses.replace(config, init_from=str(tmp_path / "run"), model=dataclasses.replace(
        config.model, vocab_size=4096), data=dataclasses.replace(config.data, vocabulary="python"))
    with pytest.raises(UserError, match="python has 4096 ids and .*run 384 rows"):
        init_from.restore(build.build(other), None)


def test_another_shape_says_which_fields_to_set():
    run = tiny.seq2seq()
    table = Model(run.model).table
    other = configs.override(run, [
        "model.embed_dim=24", "model.decoder.segments[0].blocks[0].mlp.mlp_dim=40",
        "model.decoder.segments[0].blocks[0].self_attention.num_heads=2",
        "model.encoder.segments[0].repeats=3"])
    held = {path: info.shape for path, info in Model(other.model).table.items()}
    with pytest.raises(UserError) as error:
        assignment.assign(table, held, (), "hf:x")
    message = str(error.value)
    for part in ("model.embed_dim to 24 (now 16)", "num_heads of attention in model.decoder to 2 (now 4)",
                 "mlp_dim of mlp or moe in model.decoder to 40 (now 32)",
                 "repeats of segments in model.encoder to 3 (now 2)"):
        assert part in message
    assert "model.vocab_size" not in message
    assert assignment.fields_to_set(()) == ""
