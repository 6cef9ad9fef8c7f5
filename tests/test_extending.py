"""docs/extending.md: every block is run, and what it adds trains, reads, converts or is refused."""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import seqio

from t5x_lite import build as build_lib, tree
from t5x_lite.config import RunConfig, TrainConfig
from t5x_lite.data import batches as data_batches, denoising, pipeline, rows as data_rows, tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError, check
from t5x_lite.formats import hf
from t5x_lite.layers import position, routing
from t5x_lite.layers.config import MixerConfig, MLPConfig, MoEConfig, PositionConfig
from t5x_lite.models import blocks
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.language_model import Model
from t5x_lite.training import methods, objectives
from t5x_lite.training.objectives import ObjectiveConfig
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs/extending.md").read_text()
SECTIONS = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", PAGE, flags=re.M)[1:]}
TABLES = (methods.METHODS, data_rows.ROWS, objectives.OBJECTIVES, routing.ROUTERS, position.POSITIONS,
          blocks.MIXERS, denoising.DENOISERS, hf.FAMILIES)


def block(title: str, language: str = "python") -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[title], re.S | re.M)
    assert len(found) == 1, title
    return found[0]


@pytest.fixture
def added(request, monkeypatch):
    """A function that runs a section's block and gives its names; the tables come back afterwards."""
    before = [dict(table) for table in TABLES]

    def run(title: str) -> dict:
        names: dict = {"__name__": "extension"}
        exec(compile(block(title), f"docs/extending.md, {title}", "exec"), names)
        return names

    yield run
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.update(rows)
    if "sums" in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove("sums")


def one_step(config: RunConfig, batch: dict, devices: int = 1):
    """(loss of the first step, its denominator, the state after it)."""
    program = build_lib.build(config, jax.devices()[:devices])
    with program.activate():
        state, sums = program.jit_train_step()(program.init_state(), batch)
    total, count = map(float, sums["loss"])
    assert np.isfinite(total)
    return total / count, count, state


def decoder_only() -> ModelConfig:
    model = tiny.seq2seq().model
    cross_free = dataclasses.replace(
        model.decoder.segments[0].blocks[0], cross_attention=None)
    segment = dataclasses.replace(model.decoder.segments[0], blocks=(cross_free,))
    return dataclasses.replace(model, architecture="decoder_only", encoder=None, vocab_size=384,
                               decoder=dataclasses.replace(model.decoder, segments=(segment,)))


def text_run(path: pathlib.Path, objective: str, **data) -> RunConfig:
    path.write_text("".join(f"Line number {i} of a text.\n" for i in range(200)))
    return RunConfig(
        model=decoder_only(), objective=ObjectiveConfig(name=objective),
        data=DataConfig(train_files=str(path), text_document="file", vocabulary="byt5",
                        targets_length=24, num_shards=1, **data),
        train=TrainConfig(global_batch_size=4))


def batch_of(config: RunConfig) -> dict:
    program = build_lib.build(config, jax.devices()[:1])
    return next(data_batches.TrainIterator(
        config.data, objective=config.objective.rows, global_batch_size=4, seed=0,
        sharding=program.batch_sharding))


def test_every_section_is_tested():
    tested = set(re.findall(r'(?:added|block)\("(An? [^"]+)"', pathlib.Path(__file__).read_text()))
    assert tested == set(SECTIONS)


def test_an_optimizer(added):
    added("An optimizer")
    config = tiny.seq2seq()
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="yogi"))
    _, _, state = one_step(config, tiny.batch())
    moments = tree.flatten(state["optimizer"]) if "optimizer" in state else tree.flatten(
        {k: v for k, v in state.items() if k != "params"})
    assert any("mu" in path.split("/") for path in moments), list(moments)[:9]


def test_an_objective(added, tmp_path):
    added("An objective")
    config = text_run(tmp_path / "text.txt", "early_lm")
    _, count, _ = one_step(config, batch_of(config))
    assert count == 4 * 9   # nine targets of each row


def test_a_router(added):
    added("A router")
    config = tiny.seq2seq()
    encoder = config.model.encoder
    moe = MoEConfig(num_experts=4, mlp=MLPConfig(mlp_dim=32), router="round_robin", dropless=True)
    blocks = (dataclasses.replace(encoder.segments[0].blocks[0], moe=moe),)
    encoder = dataclasses.replace(
        encoder, segments=(dataclasses.replace(encoder.segments[0], blocks=blocks),))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))
    _, _, state = one_step(config, tiny.batch())
    assert not any("router" in path for path in tree.flatten(state["params"]))


def test_a_kind_of_positions(added):
    added("A kind of positions")

    def loss(kind: str) -> float:
        config = tiny.seq2seq()
        sides = {side: dataclasses.replace(getattr(config.model, side), position=PositionConfig(kind))
                 for side in ("encoder", "decoder")}
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **sides))
        return one_step(config, tiny.batch())[0]
    assert loss("flip") != loss("none")


def test_a_token_mixer(added):
    """It trains in a decoder, and is what the cache says one token at a time."""
    added("A token mixer")
    config = tiny.seq2seq()
    decoder = config.model.decoder
    block = dataclasses.replace(decoder.segments[0].blocks[0], mixer=MixerConfig("mean", head_dim=4))
    decoder = dataclasses.replace(decoder, position=PositionConfig("none"), segments=(
        dataclasses.replace(decoder.segments[0], blocks=(block,)),))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
    loss, _, state = one_step(config, tiny.batch())
    assert any("/mixer/out/" in path for path in tree.flatten(state["params"])), loss
    model, batch = Model(config.model), tiny.batch(rows=2)

    def both(params):
        module = model.bind(params)
        hidden, _ = module(batch)
        cache, found = module.init_cache(batch, tiny.TARGETS), []
        for i in range(tiny.TARGETS):
            logits, cache = module.decode(batch["decoder_input_tokens"][:, i:i + 1], cache)
            found.append(logits)
        return module.head(module.head_params(), hidden), jax.numpy.concatenate(found, axis=1)
    whole, by_token = jax.jit(both)(tiny.params(config))
    np.testing.assert_allclose(by_token, whole, atol=1e-4)


def test_a_denoiser(added, tmp_path):
    added("A denoiser")
    config = text_run(tmp_path / "text.txt", "lm", denoising="backwards")
    tokens = np.asarray(batch_of(config)["decoder_target_tokens"])
    text = bytes(int(t) - 3 for t in tokens[0] if t >= 3).decode()
    assert text[::-1] in (tmp_path / "text.txt").read_text() or "\n" in text
    assert "txet a fo" in "".join(bytes(int(t) - 3 for t in row if t >= 3).decode() for row in tokens)


def test_a_data_set(added):
    added("A data set")
    config = DataConfig(train="sums", validation="sums", vocabulary="byt5", inputs_length=16,
                        targets_length=8)
    task, examples = tasks.eval_examples(config, "sums", objective="seq2seq")
    first = next(iter(examples))
    vocabulary = task.output_features["inputs"].vocabulary
    assert vocabulary.decode([int(i) for i in first["inputs"]]) == "0 + 0"
    assert pipeline is not None and task.metric_fns


def test_a_hugging_face_family(added):
    transformers = pytest.importorskip("transformers")
    added("A Hugging Face family")
    theirs = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=5)
    ours = hf.model_config(theirs.to_dict())
    attention = ours.decoder.segments[0].blocks[0].self_attention
    assert (attention.window, attention.kv_heads) == (5, 2)
    written = hf.hf_config(ours, "mistral")
    again = transformers.MistralConfig(**written)
    assert written["architectures"] == ["MistralForCausalLM"]
    assert (again.sliding_window, again.hidden_size, again.num_hidden_layers) == (5, 32, 2)
    assert hf.model_config(written) == ours


def applied(diff: str, text: str) -> str:
    """A text with the hunks of a diff; a hunk is found by its lines, not by their numbers."""
    for hunk in re.split(r"^@@\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -")
        new = "\n".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_a_mesh_axis(tmp_path):
    """A copy of the package with the diff trains over the new axis as over `data`."""
    shutil.copytree(ROOT / "t5x_lite", tmp_path / "t5x_lite",
                    ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "tasks", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    file = tmp_path / "t5x_lite/parallel/sharding.py"
    file.write_text(applied(block("A mesh axis", "diff"), file.read_text()))
    program = (
        "import dataclasses, jax\n"
        "from t5x_lite import build\n"
        "from t5x_lite.parallel.sharding import MeshConfig\n"
        "from tests import tiny\n"
        "for mesh in (MeshConfig(replica=4, data=1), MeshConfig(data=4)):\n"
        "    config = dataclasses.replace(tiny.seq2seq(), mesh=mesh)\n"
        "    program = build.build(config, jax.devices()[:4])\n"
        "    with program.activate():\n"
        "        state, sums = program.jit_train_step()(\n"
        "            tiny.place(tiny.params(config), program), tiny.batch())\n"
        "    print(repr(float(sums['loss'][0])), dict(program.mesh.shape).get('replica'))\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]
    (one, replicas), (other, none) = (line.split() for line in done.stdout.splitlines())
    assert (replicas, none) == ("4", "1") and one == other


def test_a_number_of_the_config(added):
    kind = added("A number of the config")["AverageConfig"]
    check(kind(), "average")
    with pytest.raises(UserError, match=r"average.decay=1.0: must be in \[0, 1\)"):
        check(kind(decay=1.0), "average")
    with pytest.raises(UserError, match="average.every=0"):
        check(kind(every=0), "average")
