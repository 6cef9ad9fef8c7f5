"""What objectives that draw answers ask of a run, and how what they drew is judged: nothing is drawn here."""

import dataclasses
import fractions
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import build as build_module, tree
from t5x_lite.build import build
from t5x_lite.config import replace
from t5x_lite.errors import UserError
from t5x_lite.layers.config import MixerConfig, PositionConfig
from t5x_lite.models.peft import SCALAR_HEAD
from t5x_lite.parallel import sharding
from t5x_lite.parallel.pipeline import PipelineConfig
from t5x_lite.rollouts import rewards, sampler
from t5x_lite.training import objectives
from t5x_lite.training.objectives import ObjectiveConfig
from tests.training.test_rollouts import run_of

PATH = pathlib.Path("/no/prompts.jsonl")   # a program is built without its data


def with_decoder(run, repeats=1, block=(), **stack):
    old = run.model.decoder
    segment = old.segments[0]
    blocks = (dataclasses.replace(segment.blocks[0], **dict(block)),)
    return replace(run, "model.decoder", dataclasses.replace(
        old, segments=(dataclasses.replace(segment, blocks=blocks, repeats=repeats),), **stack))


def gmlp(length):
    return {"block": {"mixer": MixerConfig("gmlp", max_length=length)}, "position": PositionConfig("none")}


@pytest.mark.parametrize("run, message", [
    (run_of("grpo", PATH, data={"unlabelled": "x.txt"}),
     "data.unlabelled='x.txt' are learned from beside .*objective.name='grpo' draws its own"),
    (replace(run_of("grpo", PATH, epochs=2), "optimizer.delay_after", 3),
     "delay_after=3 puts an update off by a step, .*epochs=2 x minibatches=1. Set optimizer.delay_after=None"),
    (with_decoder(run_of("ppo", PATH), **gmlp(16)),
     r"model.decoder.segments\[0\].blocks\[0\].mixer.max_length=16: must be at least 17. objective.name='ppo' draws"),
    (with_decoder(run_of("grpo", PATH), position=PositionConfig("learned", max_length=15)),
     "model.decoder.position.max_length=15: must be at least 16")])
def test_what_cannot_be_is_refused_before_a_model_is_made(run, message):
    with pytest.raises(UserError, match=message):
        build(run, jax.devices()[:1])


@pytest.mark.parametrize("run", [
    replace(run_of("grpo", PATH), "optimizer.delay_after", 3),
    with_decoder(run_of("grpo", PATH), **gmlp(17)),
    with_decoder(run_of("grpo", PATH), position=PositionConfig("learned", max_length=16))])
def test_what_just_fits_is_built(run):
    build(run, jax.devices()[:1])


@pytest.mark.parametrize("size, change, rows", [
    (2, {"answers": 8}, None), (8, {"answers": 2, "minibatches": 8}, 2), (8, {"answers": 2}, None)])
def test_a_pipeline_is_checked_for_the_rows_of_an_update(size, change, rows):
    """Of 2 prompts x 8 answers 16, of 8 x 2 in 8 minibatches 2: four micro-batches want a multiple of 4."""
    run = with_decoder(run_of("grpo", PATH, train={"global_batch_size": size}, **change), repeats=2,
                       pipeline=PipelineConfig(num_microbatches=4))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, stage=2), jax.devices()[:2])
    check = lambda: build_module._check_pipelines(run, mesh, sharding.Rules(sharding.DEFAULT_RULES))
    if rows is None:
        return check()
    with pytest.raises(UserError, match=f"num_microbatches=4: {rows} rows cannot be split"):
        check()


# --- rewards --------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [2, 2.0, np.float64(2), np.int8(2), np.array(2.0), jnp.float32(2),
                                   fractions.Fraction(4, 2)])
def test_numbers_of_every_kind_are_rewards(value):
    assert rewards.as_number(value) == np.float32(2) and rewards.as_number(np.bool_(True)) == 1


@pytest.mark.parametrize("value, said", [
    (1e39, "1e.39 .*type float"), (10**5000, "an integer of 16610 bits .*type int"), (float("nan"), "nan"),
    ("2", "'2' .*type str"), (None, "None .*type NoneType"), (np.ones(1), r"array\(\[1.\]\) .*type ndarray"),
    (2j, "2j .*type complex")], ids=[*"abcdefg"])
def test_what_is_no_finite_number_of_float32_is_named_with_its_type(value, said):
    assert rewards.as_number(value) is None
    error = rewards.Drawn("p", "a", {}).refuse("m:f", value)
    with pytest.raises(UserError, match=f"m:f' gives {said}"):
        raise error


def failing(prompt, answer, record):
    return record["no such field"]


def test_a_function_that_fails_ends_all_processes_and_says_of_what(monkeypatch):
    reward = rewards.FunctionReward(build(run_of("grpo", PATH), jax.devices()[:1]), None, failing)
    reward._reader = types.SimpleNamespace(read=lambda *_: {0: [rewards.Drawn("why?", "so", {})]})
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(rewards.multihost_utils, "process_allgather", lambda x: told.append(bool(x)) or x)
    with pytest.raises(UserError, match="small_letters' fails for the answer 'so' to the prompt 'why.': KeyError: "
                                        "'no such field' .*test_draw_checks.py, line"):
        reward(None, {})
    reward._reader = types.SimpleNamespace(read=lambda *_: json.loads("{"))   # what is our own bug, too
    with pytest.raises(json.JSONDecodeError):
        reward(None, {})
    assert told == [True, True]


@pytest.fixture(scope="module")
def judge():
    """(the program of an encoder-decoder that judges, parameters with a head that says something)."""
    run = replace(run_of("seq2seq_ppo", PATH), "objective", ObjectiveConfig("seq2seq_reward"))
    program = build(run, jax.devices()[:1])
    with program.activate():
        params = tree.flatten(program.init_params())
    head = jax.random.normal(jax.random.key(1), params[SCALAR_HEAD].shape)
    return program, tree.unflatten(params | {SCALAR_HEAD: head})


def test_an_encoder_decoder_judges_as_on_the_rows_that_it_learned_from(judge):
    """Their decoder begins with 0, whatever the vocabulary begins a text of a decoder alone with."""
    program, params = judge
    encoder = {"encoder_input_tokens": jnp.array([[5, 6, 1]]), "encoder_mask": jnp.ones([1, 3], int)}
    rows = {**encoder, "decoder_target_tokens": jnp.array([[7, 8, 1, 0]]),
            "decoder_loss_weights": jnp.array([[1.0, 1, 1, 0]])}
    row = {**encoder, "decoder_input_tokens": jnp.array([[0, 7, 8, 1]]),   # as data/rows.py has it
           "decoder_loss_weights": jnp.array([[1.0, 1, 1, 1]]), "decoder_answer": jnp.array([[0, 0, 0, 1]])}
    vocabulary = types.SimpleNamespace(start_id=9)
    with program.activate():
        found = jax.jit(rewards.make_scores(program, vocabulary))(params, rows)
        expected = jax.jit(lambda p: objectives.answer_score(program.model.bind(p), row))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(found[0]) > 1e-3


def test_a_resumed_run_keeps_the_step_of_its_judge(judge):
    """The reward run has gone on to step 7 since."""
    def restore(program, workdir, step):
        if step == 5:
            raise UserError("no checkpoint of step 5")
        return {"of": step}, 7 if step == "last" else step

    run = run_of("grpo", PATH, reward="runs/judge")
    made = lambda: rewards.ModelReward(build(run, jax.devices()[:1]), None, judge[0], restore)
    reward = made()
    assert reward.memory() == {"reward": "runs/judge", "step": 7}
    for memory in ({}, {"reward": "runs/other", "step": 3}):
        reward.resume(memory)
        assert reward._step == 7
    reward.resume(json.loads(json.dumps({"reward": "runs/judge", "step": 3})))
    assert reward.memory()["step"] == 3 and reward._params == {"of": 3}
    with pytest.raises(UserError, match="runs/judge': this run began with step 5 of it, .*no checkpoint of step 5"):
        made().resume({"reward": "runs/judge", "step": 5})


def test_answers_end_with_the_turn_where_prompts_are_conversations(tmp_path):
    from tests.data.test_chats import chat, write
    from tests.parity.test_peer_vectors import vocabulary_of
    vocabulary = vocabulary_of(tmp_path, "gemma", False, in_config=True)
    end = vocabulary.tokenizer.token_to_id("<end_of_turn>")
    chats = write(tmp_path / "c.jsonl", chat([("user", "a"), ("assistant", "b")]))
    plain = write(tmp_path / "p.jsonl", {"prompt": "a"})
    for path, stops in ((chats, (end,)), (plain, ()), (f"{chats}=1,{plain}=1", (end,))):
        run = replace(run_of("grpo", tmp_path / "x", data={"inputs_length": 8}), "data.train", path)
        run = replace(run, "data.vocabulary", vocabulary.path)
        drawing = sampler._drawing(build(run, jax.devices()[:1]), vocabulary)
        assert drawing.decode.stop_ids == stops and drawing.decode.eos_id == vocabulary.eos_id
