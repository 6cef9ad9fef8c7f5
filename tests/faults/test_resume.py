"""A resumed run is the uninterrupted one, line by line; what changed is said."""

import dataclasses
import json
import os
import shutil

import pytest

from t5x_lite import cli, config as configs, eval as eval_main, train
from t5x_lite.checkpoints import manager
from t5x_lite.errors import UserError
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import metrics
from t5x_lite.training.batch_ramp import BatchRampConfig
from tests import tiny_config
from tests.faults import mini


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = tiny_config.write_text(tmp_path_factory.mktemp("text") / "words.txt")
    run = dataclasses.replace(mini.run(text), mesh=MeshConfig(data=8))
    run = configs.replace(run, "eval.every", 5)
    return configs.replace(run, "checkpoint.keep_last", 3)


def replaced(config, fields):
    for path, value in fields.items():
        config = configs.replace(config, path, value)
    return config


class Killed(BaseException):
    pass


def killed_after(monkeypatch, step):
    """Training ends without a word once `step` is dispatched, as by SIGKILL."""
    original = train._step

    def dying(session, meter, train_step, state, number):
        if number > step:
            session.checkpointer.wait()
            raise Killed
        return original(session, meter, train_step, state, number)

    monkeypatch.setattr(train, "_step", dying)


@pytest.mark.parametrize(("log_every", "save_every", "kills"), [(4, 3, (5, 7)), (5, 2, (3, 9))])
def test_metrics_are_those_of_the_uninterrupted_run_byte_for_byte(
        config, tmp_path, monkeypatch, log_every, save_every, kills):
    run = replaced(config, {"train.num_steps": 10, "train.log_every": log_every,
                            "checkpoint.every": save_every})
    train.run(run, tmp_path / "whole")
    for step in kills:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_after(patch, step)
            train.run(run, tmp_path / "cut")
    train.run(run, tmp_path / "cut")
    assert mini.without_timings(tmp_path / "cut") == mini.without_timings(tmp_path / "whole")


def test_rewritten_text_and_its_questions_go_on_where_they_were(tmp_path, monkeypatch):
    """Sentences by their versions, the text's own questions among them and training questions mixed in; the cache
    of the text is made anew behind the kill, as on another machine."""
    text, questions = tmp_path / "persons.txt", tmp_path / "q.jsonl"
    cities = "Rome Bonn Oslo Pisa Kiel Graz Linz Bern Lyon Riga".split()
    text.write_text("".join(f"Ada {c}i was a cook. She was born in {c} in 1900.\n" for c in cities))
    questions.write_text("".join(f'{{"question": "where was Ada {c}i born", "answer": "{c}"}}\n' for c in cities[:6]))
    base = dataclasses.replace(tiny_config.run(str(text)), mesh=MeshConfig(data=8))
    run = replaced(base, {
        "train.num_steps": 6, "train.log_every": 1, "checkpoint.every": 2, "data.train": f"train_files=3,{questions}=1",
        "data.train_files": str(text), "data.validation_files": "", "data.validation": str(questions),
        "data.denoising": "salient_asked", "data.rewriting": "sentences,named,thinned", "data.rewrites": 3,
        "data.salient_like": str(questions), "data.inputs_length": 64, "data.targets_length": 32, "data.cache_dir": str(tmp_path / "first")})
    train.run(run, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 3)
        train.run(run, tmp_path / "cut")
    train.run(replaced(run, {"data.cache_dir": str(tmp_path / "second")}), tmp_path / "cut")
    assert mini.without_timings(tmp_path / "cut") == mini.without_timings(tmp_path / "whole")


def test_the_past_keeps_its_counts_when_the_batch_changes(config, tmp_path, capsys):
    run = replaced(config, {"train.num_steps": 4})
    train.run(run, tmp_path)
    ramp = BatchRampConfig(((8, 5),))   # one step of 8, then 16
    train.run(replaced(run, {"train.num_steps": 7, "train.global_batch_size": 16,
                             "train.batch_ramp": ramp}), tmp_path)
    lines = [x for x in metrics.read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in x]
    assert [x["tokens_seen"] // 24 for x in lines] == [8, 16, 24, 32, 40, 56, 72]
    assert lines[-1]["flops"] / lines[3]["flops"] == pytest.approx(72 / 32)
    out = capsys.readouterr().out
    assert "changed     train.global_batch_size: 8 -> 16 (since step 4)" in out
    assert "train.num_steps: 4 -> 7" in out and "seed" not in out


def test_a_checkpoint_of_before_the_counts_is_counted_by_its_own_config(config, tmp_path,
                                                                       monkeypatch):
    run = replaced(config, {"train.num_steps": 4})
    with monkeypatch.context() as patch:
        patch.setattr(train._Meter, "memory", lambda self: {})
        train.run(run, tmp_path)
    shutil.rmtree(tmp_path / "configs")
    train.run(replaced(run, {"train.num_steps": 5, "train.global_batch_size": 16}), tmp_path)
    last = metrics.read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["tokens_seen"] == (4 * 8 + 16) * 24
    assert {p.name for p in (tmp_path / "configs").iterdir()} == {"0.json", "4.json"}


def test_what_cannot_change_is_refused_by_name(config, tmp_path):
    run = replaced(config, {"train.num_steps": 2})
    train.run(run, tmp_path)
    for path, value in (("model.embed_dim", 16), ("data.targets_length", 16), ("data.seed", 4)):
        with pytest.raises(UserError) as error:
            train.run(configs.replace(run, path, value), tmp_path)
        assert f"{path}: " in str(error.value) and f"-> {value}" in str(error.value)
    assert manager.all_steps(tmp_path) == [2]


def test_eval_falls_back_as_train_does_and_survives_a_torn_config(config, tmp_path, capsys):
    run = replaced(config, {"train.num_steps": 4})
    train.run(run, tmp_path)
    for file in (tmp_path / "checkpoints/4/state/ocdbt.process_0/d").iterdir():
        os.truncate(file, 0)
    os.truncate(tmp_path / "config.json", 200)
    loaded = cli.saved_config(tmp_path)
    assert loaded == run and "config.json is damaged" in capsys.readouterr().err
    found = eval_main.run(loaded, tmp_path, eval_main.steps_to_evaluate(tmp_path, "last"))
    assert list(found) == [2]
    with pytest.raises(UserError, match="no checkpoint at .* can be read"):
        eval_main.run(loaded, tmp_path, [4])


def test_rules_that_an_earlier_version_had_are_no_change(config, tmp_path, monkeypatch, capsys):
    run = replaced(config, {"train.num_steps": 2})

    def earlier(value):
        fields = json.loads(configs.to_json(value))
        fields["sharding"]["rules"] |= {"act_head_dim": [], "act_expert": ["expert"]}
        return json.dumps(fields)

    with monkeypatch.context() as patch:
        patch.setattr(train, "to_json", earlier)
        train.run(run, tmp_path)
    assert "act_head_dim" in (tmp_path / "config.json").read_text()
    capsys.readouterr()
    train.run(replaced(run, {"train.num_steps": 3}), tmp_path)
    changed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("changed")]
    assert changed == ["changed     train.num_steps: 2 -> 3 (since step 2)"]


def test_a_finished_run_says_nothing_new_and_writes_no_history(config, tmp_path, capsys):
    run = replaced(config, {"train.num_steps": 2})
    train.run(run, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    train.run(run, tmp_path)
    assert "changed" not in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "configs").iterdir()] == ["0.json"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_line_counts_by_every_way_and_hand(config, tmp_path):
    run = replaced(config, {"train.num_steps": 2, "data.packing": False})
    train.run(run, tmp_path)
    last = metrics.read_metrics(tmp_path / "metrics.jsonl")[-1]
    width, heads, dim, hidden, vocab, length, rows = 8, 2, 4, 16, 384, 24, 16
    kernels = 4 * width * heads * dim + 2 * width * hidden
    norms_and_bias = last["params_no_embed"] - kernels
    assert 0 < norms_and_bias < 200
    assert last["params"] == last["params_active"] == last["params_no_embed"] + vocab * width
    head = vocab * width   # tied: the same numbers, whose products are counted all the same
    assert last["params_no_embed_head"] == last["params_no_embed"] + head
    assert last["tokens_seen"] == rows * length
    attention = 4 * length * length * heads * dim
    per_row = 3 * (2 * length * (kernels + head) + attention)
    assert last["flops"] == rows * per_row
    assert last["flops_no_head"] == rows * (per_row - 6 * length * head)
    hidden_pairs = length * (length - 1) / 2 * 4 * heads * dim
    assert last["flops_causal_half"] == rows * (per_row - 3 * hidden_pairs)
    assert last["flops_6nd"] == 6 * last["params_no_embed_head"] * rows * length
    assert (last["batch"], last["phase"]) == (8 * length, "stable")
    assert last["lr"] == pytest.approx(run.optimizer.schedule.base_learning_rate)
    assert last["tokens_loss"] == last["tokens_filled"] <= last["tokens_seen"]
