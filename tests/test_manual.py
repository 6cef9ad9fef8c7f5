"""What --help prints, how fast, and which field a mistyped flag may have meant."""

import subprocess
import sys

import pytest

from t5x_lite import manual
from t5x_lite.errors import UserError
from t5x_lite.scaling import __main__ as scaling
from tests.test_imports import ROOT

DOORS = ("train", "eval", "infer", "plan", "convert", "experiment", "report", "inspect_task", "audit", "bias",
         "score_preferences", "refill")


@pytest.mark.parametrize("door", DOORS)
def test_help_shows_every_flag_of_a_door(door, capsys):
    file = ROOT / "t5x_lite" / f"{door}.py"
    with pytest.raises(SystemExit) as ended:
        manual.answer(str(file), ["door", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    own = manual.flags_of(file.read_text())
    assert own and all(f"--{flag.name}=" in shown and flag.text for flag in own)
    if "define_config(" in file.read_text():
        assert "configs/t5_1_1.py:base" in shown and "t5_1_1" in shown
        assert "--config.train.num_steps" in shown and "int, default 1000" in shown
        assert "docs/config_reference.md" in shown and "--help=SECTION" in shown


@pytest.mark.parametrize("door", DOORS)
def test_help_comes_before_what_is_slow_to_import(door):
    """The door's own file, run as `python -m` does, imports neither TensorFlow nor Orbax."""
    code = ("import runpy, sys\nsys.argv = ['x', '--help']\n"
            f"try: runpy.run_module('t5x_lite.{door}', run_name='__main__', alter_sys=True)\n"
            "except SystemExit as end: assert not end.code\n"
            "slow = {'tensorflow', 'seqio', 'orbax.checkpoint', 'flax.nnx'} & set(sys.modules)\n"
            "assert not slow, slow")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["fit", "compare", "laws", "ladder", "page", "coordinate_check"])
def test_the_help_of_scaling_looks_as_that_of_the_doors(command, capsys):
    with pytest.raises(SystemExit) as ended:
        scaling.main(["--help"])
    screen = capsys.readouterr().out
    assert ended.value.code == 0 and f"    {command} " in screen and "usage:" not in screen
    with pytest.raises(SystemExit) as ended:
        scaling.main([command, "--help"])
    screen = capsys.readouterr().out
    assert ended.value.code == 0 and screen.startswith(f"python -m t5x_lite.scaling {command}: ")
    head, _, flags = screen.partition("\nFlags\n")
    assert flags and len(head.strip().rpartition(": ")[2]) > 10
    lines = flags.splitlines()
    names = [i for i, line in enumerate(lines) if line.startswith("  --")]
    assert lines[names[-1]].startswith("  --json ")
    for i in names:   # a text beside each name, or below a long one
        assert len(lines[i].split(None, 1)) == 2 or lines[i + 1].startswith(" " * 42), lines[i]


def test_no_help_is_no_exit():
    assert manual.answer("train.py", ["train", "--config=x", "--helping=3"]) is None


@pytest.mark.parametrize(("where", "shown"), [
    ("model.decoder", "--config.model.decoder.dropout_rate"),
    ("--config.model.decoder", "--config.model.decoder.dropout_rate"),
    ("model.decoder.segments", "--config.model.decoder.segments[0].repeats"),
    ("model.decoder.segments[0].blocks[0].mlp", "--config.model.decoder.segments[0].blocks[0].mlp.mlp_dim"),
    ("eval.decode", "--config.eval.decode.top_p"),
    ("train.num_steps", "int, default 1000"),
    ("data.inputs_length", "tokens of the encoder's row"),
])
def test_help_of_a_section_or_a_field(where, shown):
    assert shown in " ".join(manual.section_text(where).split())   # whatever the screen's width


@pytest.mark.parametrize(("where", "hint"), [
    ("modle", "did you mean 'model'?"), ("model.decodr", "Sections: model, objective"),
    ("num_steps", "did you mean --config.train.num_steps?"),
])
def test_an_unknown_section_names_the_nearest(where, hint, capsys):
    with pytest.raises(UserError, match="no such section or field") as error:
        manual.section_text(where)
    assert hint in str(error.value)
    with pytest.raises(SystemExit) as ended:
        manual.answer(str(ROOT / "t5x_lite" / "train.py"), ["train", f"--help={where}"])
    assert ended.value.code == 2 and hint in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "field"), [
    ("num_steps", "train.num_steps"), ("train.num_steps", "train.num_steps"),
    ("learning_rate", "optimizer.schedule.base_learning_rate"), ("num_step", "train.num_steps"),
    ("lr", "optimizer.schedule.base_learning_rate"), ("batch_size", "train.global_batch_size"),
    ("embed_dim", "model.embed_dim"), ("fsdp", "mesh.fsdp"), ("precision", "precision"),
    ("max_grad_norm", "optimizer.clip_norm"), ("qqqqq", ""), ("learning-rate", "optimizer.schedule.base_learning_rate"),
    ("batch-size", "train.global_batch_size"), ("seed", "train.seed"), ("lora_rank", "peft.rank"),
    ("num_epochs", "train.num_steps"), ("grad_clip", "optimizer.clip_norm"), ("logging_steps", "train.log_every"),
    ("d_model", "model.embed_dim"),
])
def test_a_flag_that_means_a_field(flag, field):
    assert manual.suggestion(flag) == (f"did you mean --config.{field}?" if field else "")


def test_all_that_is_suggested_or_shown_is_there():
    known = dict(manual.all_fields())
    assert set(manual.MOST_USED) | set(manual.ELSEWHERE.values()) <= set(known)
    assert "model.decoder.segments[0].blocks[0].mlp.mlp_dim" in known
    loose = manual.loose_fields()
    assert {"checkpoint.keep_every", "model.encoder", "data.seed", "init_map", "sharding.rules",
            "model.decoder.segments"} <= loose
    assert "train.num_steps" not in loose


def test_flags_are_read_from_source():
    source = ('import absl\nA = flags.DEFINE_string("one", "x", "First.")\n'
              'flags.DEFINE_float("two", other.VALUE, f"Of {names}.")\n'
              'flags.DEFINE_enum("three", None, list(x), "Third.")\nother.DEFINE_string("four", "", "")')
    assert manual.flags_of(source) == [
        manual.Flag("one", "string", "x", "First."), manual.Flag("two", "float", "", "Of …."),
        manual.Flag("three", "enum", "", "Third.")]
