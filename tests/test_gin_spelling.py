"""T5X's names set our fields, as docs/from_t5x.md says, and what cannot be is refused by name."""

import re
import shlex

import pytest

from configs import switch
from t5x_lite import config as configs, gin_spelling
from t5x_lite.errors import UserError
from t5x_lite.layers.config import MoEConfig
from tests import tiny
from tests.test_imports import ROOT

PAGE = (ROOT / "docs" / "from_t5x.md").read_text()
ROWS = re.findall(r"^\| `--gin\.(.+?)` \| (.+) \|$", PAGE, flags=re.M)


def bound(*arguments: str) -> configs.RunConfig:
    """A tiny run with what a command line says."""
    words = [gin_spelling.rewritten(a) for a in arguments]
    assert all(word.startswith("--gin=") for word in words)
    return gin_spelling.apply(tiny.seq2seq(), [word.removeprefix("--gin=") for word in words])


@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=[name.partition("=")[0] for name, _ in ROWS])
def test_every_row_of_the_page_sets_what_it_says(theirs, ours):
    fields = re.findall(r"`--config\.([^`]+)`", ours)
    if not fields:
        assert gin_spelling.rewritten(f"--gin.{theirs}") == "--workdir=DIR"
        return
    expected = configs.override(tiny.seq2seq(), [shlex.split(field)[0] for field in fields])
    found = bound(f"--gin.{theirs}")
    if "and so on" in ours:
        found_at = configs.field_names(found)
        [path], value = [field.partition("=")[0] for field in fields], float(fields[0].partition("=")[2])
        field = path.rpartition(".")[2]
        places = [name for name in found_at if re.fullmatch(rf"model\..*\.{field}", name)]
        assert path in places and len(places) >= {"dropout_rate": 5, "mlp_dim": 2}.get(field, 3)
        assert found == configs.override(tiny.seq2seq(), [f"{name}={value:g}" for name in places])
        assert found != tiny.seq2seq()
        return
    assert found == expected and found != tiny.seq2seq()


def test_the_page_has_a_row_for_each_name():
    shown = {name.partition("=")[0].rpartition("/")[2] for name, _ in ROWS}
    shorts = {".".join(name.split(".")[-2:]) for name in shown}
    refused = {"LOSS_NORMALIZING_FACTOR", "USE_CACHED_TASKS", "DatasetConfig.use_cached"}
    assert {*gin_spelling.BINDINGS, *gin_spelling.FLAGS} == shorts | refused | {
        "train.random_seed"} - refused | refused


def test_our_own_fields_and_several_at_once():
    run = bound("--gin.train.num_steps=10", "--gin.model.decoder.segments[0].blocks[0].mlp.mlp_dim=48",
                "--gin.TRAIN_STEPS=20")
    assert run.train.num_steps == 20
    assert run.model.decoder.segments[0].blocks[0].mlp.mlp_dim == 48


@pytest.mark.parametrize(("argument", "message"), [
    ("--gin.TRAIN_STEP=3", "did you mean 'TRAIN_STEPS'"),
    ("--gin.utils.SaveCheckpointConfig.periods=3", "did you mean 'SaveCheckpointConfig.period'"),
    ("--gin.NUM_ENCODER_LAYERS='two'", "segments[0].repeats='two': must be int"),
    ("--gin.ACTIVATION_DTYPE='int8'", "one of bfloat16"),
    ("--gin.nonsense=3", "docs/from_t5x.md"),
    ("--gin.TRAIN_STEPS=%OTHER", "references of gin"),
    ("--gin.BATCH_SIZE='many'", "config.train.global_batch_size='many': must be int, not str"),
    ("--gin.BATCH_SIZE=0", "at least 1"),
    ("--gin.TASK_FEATURE_LENGTHS=512", "must be {'inputs'"),
    ("--gin.LOSS_NORMALIZING_FACTOR=1", "means over the tokens"),
    ("--gin.USE_CACHED_TASKS=True", "data.cached_tasks"),
    ("--gin.network.T5Config.dtype='int8'", "one of bfloat16"),
    ("--gin.train_eval/utils.DatasetConfig.pack=True", "without the scope it would change training"),
    ("--gin.train_eval/utils.DatasetConfig.task_feature_lengths={'inputs': 7}", "are as long as training's"),
    ("--gin.mine/utils.DatasetConfig.batch_size=8", "the scope mine/ means nothing here"),
    ("--gin.utils.RestoreCheckpointConfig.path=['a', 'b']", "must be one folder"),
    ("--gin.infer_eval/utils.DatasetConfig.use_cached=True", "data.cached_tasks"),
])
def test_what_does_not_fit_is_named(argument, message):
    with pytest.raises(UserError, match=re.escape(message)):
        bound(argument)


def test_what_a_scope_of_evaluation_binds_leaves_training_alone():
    run = tiny.seq2seq()
    lengths = {"inputs": run.data.inputs_length, "targets": run.data.targets_length}
    found = bound("--gin.train_eval/utils.DatasetConfig.mixture_or_task_name='held_out'",
                  "--gin.train_eval/utils.DatasetConfig.batch_size=7",
                  f"--gin.train_eval/utils.DatasetConfig.task_feature_lengths={lengths}",
                  "--gin.train_eval/utils.DatasetConfig.use_cached=False")
    assert found == configs.override(run, ["data.validation=held_out", "eval.batch_size=7"])


@pytest.mark.parametrize("argument", [
    "--gin.USE_CACHED_TASKS=False", "--gin.LOSS_NORMALIZING_FACTOR=None", "--gin.INITIAL_CHECKPOINT_PATH=None",
    "--gin.INITIAL_CHECKPOINT_PATH=''", "--gin.utils.RestoreCheckpointConfig.path=[]"])
def test_what_is_so_anyhow_changes_nothing(argument):
    assert bound(argument) == tiny.seq2seq()


def test_a_list_of_one_checkpoint_is_that_one():
    assert bound("--gin.utils.RestoreCheckpointConfig.path=['gs://t5/base']").init_from == "t5x:gs://t5/base"


def test_what_t5x_says_by_none_and_by_stacks():
    assert bound("--gin.trainer.Trainer.num_microbatches=None").train.accumulation == 1
    sparse = switch.sparsify(tiny.seq2seq().model.encoder, MoEConfig(num_experts=2), 2)
    run = configs.replace(tiny.seq2seq(), "model.encoder", sparse)
    with pytest.raises(UserError, match=r"model.encoder is not one block repeated"):
        gin_spelling.apply(run, ["NUM_ENCODER_LAYERS=3"])


@pytest.mark.parametrize("argument", ["--gin_file=base.gin", "--gin_bindings=A=3",
                                      "--gin_search_paths=."])
def test_gin_files_are_refused_with_what_to_do(argument):
    with pytest.raises(UserError, match="write a Python file with get_config"):
        gin_spelling.rewritten(argument)
    assert gin_spelling.rewritten("--ginger=3") == "--ginger=3"
    assert gin_spelling.rewritten("plain") == "plain"
    with pytest.raises(UserError, match="write --gin.NAME=VALUE"):
        gin_spelling.rewritten("--gin.TRAIN_STEPS")
