"""What a user gets wrong: one screen that names the value and the fix, nothing lost."""

import dataclasses
import re
import subprocess

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from configs import quickstart
from t5x_lite import build as build_lib, cli, config as configs, errors, train
from t5x_lite.checkpoints import manager
from t5x_lite.errors import UserError
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import precision
from tests import tiny_config
from tests.test_train import ROOT, command


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = tiny_config.write_text(tmp_path_factory.mktemp("text") / "words.txt")
    return dataclasses.replace(tiny_config.run(text), mesh=MeshConfig(data=8))


def refused(config, tmp_path, *fragments):
    with pytest.raises(UserError) as error:
        train.run(config, tmp_path)
    message = str(error.value)
    assert len(message) < 2500 and len(message.splitlines()) < 25, message
    for fragment in fragments:
        assert fragment in message, message


@pytest.mark.parametrize(("path", "value", "fragments"), [
    ("mesh", MeshConfig(data=3), ["needs 3 devices, but there are 8", "1, 2, 4, 8"]),
    ("mesh", MeshConfig(data=-1, fsdp=3), ["a multiple of 3"]),
    ("mesh", MeshConfig(data=-1, fsdp=-1), ["only one axis may be -1", "data and fsdp"]),
    ("mesh", MeshConfig(data=1, tensor=8), ["4 heads cannot be split 8 ways"]),
    ("train.global_batch_size", 12, ["train.global_batch_size=12", "multiple of 8", "8 or 16"]),
    ("train.accumulation", 3, ["multiple of 24", "3 micro-batches"]),
    ("train.num_steps", 0, ["train.num_steps=0: must be at least 1"]),
    ("data.num_shards", 3, ["data.num_shards=3", "train.global_batch_size=8"]),
    ("data.train_files", "/no/such/file.txt", ["/no/such/file.txt"]),
    ("data.vocabulary", "byt6", ["byt6", "byt5"]),
    ("model.vocab_size", 100, ["model.vocab_size=100", "384"]),
    ("precision", "bf15", ["bf15", "did you mean 'bf16'"]),
    ("optimizer.name", "adafactr", ["did you mean 'adafactor'"]),
    ("objective.name", "lm", ["does not fit", "seq2seq"]),
    ("model.architecture", "decoder", ["decoder_only"]),
])
def test_refused_before_anything_is_compiled(config, tmp_path, path, value, fragments):
    refused(configs.replace(config, path, value), tmp_path / "run", *fragments)


def test_empty_data(config, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(configs.replace(config, "data.train_files", str(empty)), tmp_path / "run",
            str(empty))


def test_unknown_task_names_the_nearest(config, tmp_path):
    config = configs.replace(config, "data.train_files", "")
    refused(configs.replace(config, "data.train", "python_span_corruptoin"), tmp_path / "run",
            "did you mean 'python_span_corruption'")


def test_another_model_or_a_nan_loss_is_refused_and_the_last_good_checkpoint_kept(config,
                                                                                  tmp_path):
    train.run(configs.replace(config, "train.num_steps", 2), tmp_path)
    other = configs.replace(config, "model.embed_dim", 24)
    refused(other, tmp_path, "holds another model", "params/decoder/final_norm/scale",
            "expected float32[24], found float32[16]", "Use a new --workdir")
    assert manager.all_steps(tmp_path) == [2]
    # A learning rate of 1e30 makes the parameters of step 3, and so the loss of step 4, overflow.
    broken = configs.replace(config, "optimizer.schedule.base_learning_rate", 1e30)
    refused(broken, tmp_path, "the loss of step", "last good checkpoint is of step 2",
            "learning_rate")
    assert manager.all_steps(tmp_path) == [2]
    train.run(configs.replace(config, "train.num_steps", 4), tmp_path)
    assert manager.all_steps(tmp_path)[-1] == 4


def test_heads_are_checked_in_units(config):
    config = configs.replace(config, "mesh", MeshConfig(data=1, tensor=8))
    with pytest.raises(UserError, match="heads"):   # 4 heads of 4: 16 would divide by 8
        build_lib.build(config, jax.devices())


@pytest.mark.parametrize(("override", "message"), [
    ("--config.train.num_step=3", "num_steps"),
    ("--config.train.num_steps=many", "num_steps"),
    ("--confg=x", "config"),
    ("--config.mesh.data=5", "mesh"),
    ("--num_steps=5", "unknown flag --num_steps. did you mean --config.train.num_steps?"),
])
def test_the_command_line_exits_with_one_screen(tmp_path, override, message):
    text = tiny_config.write_text(tmp_path / "words.txt")
    args, environment = command(text, tmp_path / "run", override)
    done = subprocess.run(args, env=environment, cwd=ROOT, text=True, capture_output=True,
                          timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 15


@pytest.mark.parametrize(("given", "flag"), [
    ("--config.checkpoint.keep_every=5", "--override=checkpoint.keep_every=5"),
    ("--config.model.encoder=None", "--override=model.encoder=None"),
    ("--config.model.decoder.segments[0].repeats=4", "--override=model.decoder.segments[0].repeats=4"),
    ("--config.train.num_steps=None", "--override=train.num_steps=None"),
    ("--config.init_map=(('a','b'),)", "--override=init_map=(('a','b'),)"),
    ("--config.train.num_steps=4", "--config.train.num_steps=4"),
    ("--config=configs/t5_1_1.py:base", "--config=configs/t5_1_1.py:base"),
    ("--workdir=x=None", "--workdir=x=None"),
])
def test_what_ml_collections_cannot_say_is_an_override(given, flag):
    assert cli._edit(given) == flag


@pytest.mark.parametrize(("flag", "hint"), [
    ("workdr", "did you mean 'workdir'?"), ("num_steps", "did you mean --config.train.num_steps?"),
    ("train.num_steps", "did you mean --config.train.num_steps?"),
    ("lr", "did you mean --config.optimizer.schedule.base_learning_rate?"),
    ("batch_size", "did you mean --config.train.global_batch_size?"),
    ("qqq", "--help lists the flags"), ("output_dir", "did you mean 'workdir'?"),
])
def test_an_unknown_flag_names_the_field_that_it_means(flag, hint):
    own = ["config", "override", "workdir"]
    assert hint in cli.meant(flag, own, given=True)
    assert cli.meant("num_steps", own, given=False) == " did you mean --override=train.num_steps?"
    assert cli.meant("num_steps", ["workdir", "only"], given=True) == ""


@pytest.mark.parametrize(("name", "ours"), [("bfloat16", "bf16"), ("float16", "fp16"), ("fp32", "float32"),
                                            ("flaot32", "float32"), ("BF16", "bf16"),
                                            ("bf-16", "bf16"), ("tf32", "float32"), ("fp8_e4m3", "fp8")])
def test_another_programs_name_of_a_precision_names_ours(name, ours):
    with pytest.raises(UserError, match=f"did you mean '{ours}'"):
        precision.policy(name)
    assert set(precision.ELSEWHERE.values()) <= set(precision.POLICIES)


@pytest.mark.parametrize("field", ["nm_steps", "eval_every"])
def test_a_mistyped_field_is_named_in_plain_words(field):
    with pytest.raises(KeyError) as caught:
        quickstart.get_config().train[field]
    override = f"--config.train.{field}=3"
    for error in (caught.value, KeyError(caught.value)):
        message = cli._describe(["train", override], error)
        assert message.startswith(f"the config has no field '{field}'.")
        assert message.endswith(f"(among {override})") and "\\n" not in message
        assert ("num_steps" in message) == (field == "nm_steps")


@pytest.mark.parametrize(("value", "end"), [("1e4", "not float: write 10000."), ("1.5", "not float."),
                                            ("1e999", "not float."), ("1_000", "not str.")])
def test_a_whole_number_with_a_point_is_told_how_to_be_written(value, end):
    with pytest.raises(UserError, match=re.escape(end) + "$"):
        configs.override(quickstart.run(), [f"train.num_steps={value}"])


def test_a_config_file_that_is_not_there():
    with pytest.raises(UserError, match=r"--config=configs/t5_1.py does not exist. did you mean "
                                        r"'t5_1_1'\?.* llama,"):
        cli._find_config("--config=configs/t5_1.py:base")
    assert cli._find_config("--config.name=x") == "--config.name=x"
    assert cli._joined(["train", "--config", "a.py:b", "--seed=1"]) == [
        "train", "--config=a.py:b", "--seed=1"]


def test_a_configs_own_complaint_is_shown_without_its_traceback():
    holder = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=holder)
    with pytest.raises(flags.Error) as wrapped:
        holder(["train", f"--config={ROOT}/configs/t5_1_1.py:basee"])
    message = str(cli._user_error(wrapped.value))
    assert message.startswith("configs/t5_1_1.py:basee: no such size. did you mean 'base'?")
    assert cli._user_error(ValueError("another")) is None


@pytest.mark.parametrize(("name", "names", "hint"), [
    ("LoRA", ("none", "lora", "ia3"), "lora"), ("ADAMW", ("adamw", "sgd"), "adamw"),
    ("Embed_Dim", ("embed_dim",), "embed_dim"), ("train_steps", ("TRAIN_STEPS", "BATCH_SIZE"), "TRAIN_STEPS"),
    ("Ab", ("ab", "AB"), None), ("zzz", ("lora",), None), (3, (2, 30), "30")])
def test_capitals_hide_no_name_that_is_meant(name, names, hint):
    assert errors.nearest(name, names) == (f" did you mean {hint!r}?" if hint else "")
