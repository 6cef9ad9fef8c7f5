"""Parameter-efficient runs: any mesh, resumed, evaluated, merged; and what they cost."""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_lite import (
    build as build_lib,
    config as configs,
    eval as eval_main,
    init_from,
    interactive,
    train,
    tree,
)
from t5x_lite.checkpoints import manager
from t5x_lite.errors import UserError
from t5x_lite.layers.config import MoEConfig
from t5x_lite.models import peft
from t5x_lite.models.config import SegmentConfig
from t5x_lite.models.peft import PeftConfig
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import metrics, state
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.schedules import ScheduleConfig
from tests import tiny, tiny_config

LORA = PeftConfig("lora", rank=2)
ADAM = OptimizerConfig(name="adam", schedule=ScheduleConfig(
    factors="constant", base_learning_rate=0.01))


# --- one step, on every kind of mesh --------------------------------------------------------------

def everything() -> configs.RunConfig:
    """An encoder with experts, adapters and a prompt; what each method adds trains at once."""
    run = tiny.seq2seq()
    block = run.model.encoder.segments[0].blocks[0]
    moe = MoEConfig(num_experts=4, mlp=block.mlp, router="top_2", capacity_factor=4.0)
    sparse = SegmentConfig((block, dataclasses.replace(block, moe=moe)), 1)
    model = dataclasses.replace(
        run.model, prompt_length=4,
        encoder=dataclasses.replace(run.model.encoder, segments=(sparse,), adapter_dim=4),
        decoder=dataclasses.replace(run.model.decoder, adapter_dim=4))
    tuning = PeftConfig("lora", targets=(r".*attention/(query|value)/kernel", r".*/wo/kernel"),
                        rank=2, also=(".*_adapter/.*", "prompt/.*", ".*_norm/scale"))
    return dataclasses.replace(run, model=model, peft=tuning, optimizer=dataclasses.replace(
        ADAM, name="sgd"))


def one_step(config, devices):
    """What trains after a step from noisy parameters, as numpy."""
    program = build_lib.build(config, devices)
    rng = np.random.default_rng(0)
    noisy = tree.map_with_path(
        lambda path, x: np.asarray(x) + (rng.normal(size=x.shape) * 0.1).astype(x.dtype),
        tiny.params(config))
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), noisy,
                          program.abstract_params)
    batch = {k: jax.device_put(v, program.batch_sharding) for k, v in tiny.batch().items()}
    start = program.start(params)
    spread = lambda p, x: jax.device_put(
        np.asarray(x) + np.linspace(-0.1, 0.1, x.size, dtype=x.dtype).reshape(x.shape), x.sharding)
    start["params"] = tree.map_with_path(spread, start["params"])
    with program.activate():
        after, _ = jax.jit(program.train_step)(start, batch)
    assert tree.flatten(after["params"]).keys() == program.trainable.keys()
    return jax.tree.map(np.asarray, after["params"])


@pytest.fixture(scope="module")
def reference():
    return one_step(everything(), jax.devices()[:1])


@pytest.mark.parametrize("mesh, zero, accumulation", [
    ({"data": 2, "fsdp": 2, "tensor": 2}, 3, 1), ({"fsdp": 4, "expert": 2}, 2, 1),
    ({"slice": 2, "fsdp": 2, "data": 2}, 3, 2)], ids=str)
def test_every_mesh_trains_what_one_device_trains(reference, mesh, zero, accumulation):
    config = everything()
    config = dataclasses.replace(
        config, mesh=MeshConfig(**{"data": 1, **mesh}), sharding=configs.ShardingConfig(zero=zero),
        train=dataclasses.replace(config.train, accumulation=accumulation))
    tiny.assert_close(one_step(config, jax.devices()), reference, 2e-5)


# --- a whole run ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(config, workdir) of a pre-trained model."""
    text = tiny_config.write_text(tmp_path_factory.mktemp("text") / "words.txt")
    config = dataclasses.replace(
        tiny_config.run(text), mesh=MeshConfig(data=8), optimizer=ADAM)
    config = configs.replace(config, "train.num_steps", 2)
    workdir = tmp_path_factory.mktemp("base")
    train.run(config, workdir)
    return config, workdir


def tuned(base, **changes) -> configs.RunConfig:
    """A LoRA run of 4 steps over the base."""
    return dataclasses.replace(configs.replace(base[0], "train.num_steps", 4), peft=LORA,
                               init_from=str(base[1]), **changes)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """(config, workdir, metrics) of an uninterrupted LoRA run."""
    config, workdir = tuned(base), tmp_path_factory.mktemp("lora")
    return config, workdir, train.run(config, workdir)


def stored(workdir, step, config) -> dict:
    program = build_lib.build(config)
    params, _ = manager.restore_params(workdir, program.abstract_state["params"], step)
    return {p: np.asarray(x) for p, x in tree.flatten(params).items()}


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_resumed_equals_uninterrupted(base, whole, tmp_path):
    config, workdir, _ = whole
    alone = configs.replace(config, "data.validation_files", "")   # evaluation compiles too
    train.run(configs.replace(alone, "train.num_steps", 2), tmp_path)
    first = stored(tmp_path, 2, config)
    train.run(alone, tmp_path)
    same(stored(tmp_path, 4, config), stored(workdir, 4, config))
    assert any((first[p] != x).any() for p, x in stored(workdir, 4, config).items())


def test_only_what_trains_has_optimizer_state_and_checkpoints(base, whole):
    config, workdir, _ = whole
    size = lambda path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    small, big = (size(w / "checkpoints" / n / "state") for w, n in (
        (workdir, "4"), (base[1], "2")))
    program = build_lib.build(config)
    numbers = program.num_trainable
    # 6 attentions x (query, value) x rank 2 x (16 + 16), stacked over 2 layers: 1,536 of 20,000
    assert numbers == 3 * 2 * 2 * 2 * (16 + 16)
    moments = {n: x for n, x in program.abstract_state["opt_state"].items() if n != "count"}
    assert state.num_bytes_per_device(moments) == 2 * 4 * numbers
    record = manager.read_record(workdir)
    held = {p for p in record.arrays if not p.startswith(("opt_state", "frozen", "step"))}
    assert held == {f"params/{p}" for p in program.trainable}
    names = " ".join(p.name for p in (workdir / "checkpoints/4/state").iterdir())
    assert "frozen" not in names
    assert small < big / 3, (small, big)
    assert "no" in next(line for line in (workdir / "parameters.txt").read_text().splitlines()
                        if line.startswith("token_embedding")).split()


def test_step_0_is_the_base_and_training_lowers_the_loss(base, whole):
    config, workdir, held_out = whole
    before = eval_main.run(dataclasses.replace(base[0], init_from=str(base[1])), None, [0])[0]
    lines = [x["train/loss"] for x in metrics.read_metrics(workdir / "metrics.jsonl")
             if "train/loss" in x]
    (task,) = held_out
    assert len(lines) == 4 and held_out[task]["loss"] < before[task]["loss"]


def test_eval_and_interactive_load_it_merged(base, whole):
    config, workdir, held_out = whole
    alone = eval_main.run(configs.load(workdir / "config.json", ["mesh.data=2", "mesh.fsdp=4"]),
                          workdir, [4])[4]
    (task,) = alone
    assert alone[task]["loss"] == pytest.approx(held_out[task]["loss"], rel=1e-5)
    session = interactive.load(workdir)
    program = build_lib.build(config)
    trainable = stored(workdir, 4, config)
    frozen = stored(base[1], 2, base[0])
    expected = peft.Tuning(program.table, LORA).combine(trainable, frozen)
    for path, x in tree.flatten(session.params).items():
        np.testing.assert_allclose(x, expected[path], rtol=1e-6, atol=1e-7, err_msg=path)
    losses = session.train([("alpha", "beta")], 2)
    assert losses[1] < losses[0]


def test_a_tuned_workdir_is_a_source_of_merged_parameters(base, whole):
    config, workdir, _ = whole
    merged = init_from.restore(build_lib.build(config), workdir)[0]
    plain = dataclasses.replace(base[0], init_from=str(workdir))
    found = init_from.restore(build_lib.build(plain), None)[0]
    for path, x in tree.flatten(found).items():
        np.testing.assert_allclose(x, tree.flatten(merged)[path], rtol=1e-6, atol=1e-7)


def test_another_base_is_refused(whole):
    config, workdir, _ = whole
    moved = dataclasses.replace(config, init_from="")   # fresh parameters
    for attempt in (lambda: train.run(configs.replace(moved, "train.num_steps", 5), workdir),
                    lambda: init_from.restore(build_lib.build(moved), workdir)):
        with pytest.raises(UserError, match="frozen parameters that init_from no longer gives"):
            attempt()
    with pytest.raises(UserError, match="mismatch .*lora_a: expected .*,3.*found .*,2"):
        train.run(configs.replace(config, "peft.rank", 3), workdir)


def test_prompts_and_adapters_start_fresh_over_a_source_without_them(base):
    model = dataclasses.replace(base[0].model, prompt_length=4)
    config = dataclasses.replace(base[0], model=model, init_from=str(base[1]),
                                 peft=PeftConfig("prompt"))
    program = build_lib.build(config)
    start = init_from.start(program)
    assert tree.flatten(start["params"]).keys() == {"prompt/embedding"}
    tokens = np.asarray(start["frozen"]["token_embedding"]["embedding"])
    for row in np.asarray(start["params"]["prompt"]["embedding"]):
        assert (tokens == row).all(axis=1).any()
    with pytest.raises(UserError, match="leaves prompt/embedding fresh"):
        init_from.restore(program, None)


@pytest.mark.parametrize("field, value, message", [
    ("peft.method", "prompt", "this model has no prompt; set model.prompt_length"),
    ("peft.method", "adapter", "this model has no adapters; set model.encoder.adapter_dim"),
    ("model.prompt_length", -1, "model.prompt_length=-1: must be at least 0"),
    ("model.encoder.adapter_dim", -1, "model.encoder.adapter_dim=-1: must be at least 0")])
def test_what_a_model_lacks_is_named(base, field, value, message):
    with pytest.raises(UserError, match=message):
        build_lib.build(configs.replace(base[0], field, value))


def test_a_prompt_wants_rows_of_one_example(base):
    config = configs.replace(configs.replace(base[0], "model.prompt_length", 4),
                             "data.packing", True)
    with pytest.raises(UserError, match="set data.packing=False"):
        build_lib.build(config)
