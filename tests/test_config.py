"""Configs: dataclasses to ConfigDict and back, and errors that name the field."""

import dataclasses
import json
import math
import re

import jax
import pytest

from configs import quickstart
from t5x_lite import config as configs
from t5x_lite.build import build
from t5x_lite.config import RunConfig, from_mapping, to_config_dict, to_json
from t5x_lite.errors import UserError
from t5x_lite.layers.config import MoEConfig
from t5x_lite.training.batch_ramp import BatchRampConfig
from t5x_lite.training.methods import GroupConfig
from t5x_lite.training.schedules import ScheduleConfig
from tests import tiny


def test_round_trips_through_config_dict_and_json():
    run = quickstart.run()
    assert from_mapping(RunConfig, to_config_dict(run)) == run
    assert from_mapping(RunConfig, json.loads(to_json(run))) == run


def test_the_config_dict_is_locked_and_typed():
    config = quickstart.get_config()
    with pytest.raises(AttributeError):
        config.model.embed_dimension = 3
    with pytest.raises(TypeError):
        config.train.num_steps = "many"
    config.train.num_steps = 7
    assert from_mapping(RunConfig, config).train.num_steps == 7


@pytest.mark.parametrize(("mapping", "message"), [
    ({"modle": {}}, "config: no field is called 'modle'. did you mean 'model'?"),
    ({"train": {"sed": 1}}, "config.train: no field is called 'sed'. did you mean 'seed'?"),
    ({"train": {"num_steps": 1.5}}, "config.train.num_steps=1.5: must be int, not float"),
    ({"train": {"num_steps": None}}, "config.train.num_steps=None: must be int, not NoneType"),
    ({"train": {"num_steps": True}}, "config.train.num_steps=True: must be int, not bool"),
    ({"model": {"encoder": {"segments": 3}}}, "config.model.encoder.segments=3: must be a tuple"),
    ({"model": {"encoder": {"segments": [{"repeats": "2"}]}}},
     "config.model.encoder.segments[0].repeats='2': must be int, not str"),
    ({"optimizer": 3}, "config.optimizer=3: must be a section with the fields name"),
    ({"sharding": {"rules": [1]}}, "config.sharding.rules=[1]: must be a section of names"),
    ({"optimizer": {"groups": [{"frozen": True}]}},
     "config.optimizer.groups[0]={'frozen': True}: must be a section with pattern, which it lacks"),
])
def test_what_does_not_fit_is_named(mapping, message):
    with pytest.raises(UserError) as error:
        from_mapping(RunConfig, mapping)
    assert message in str(error.value)


def test_numbers_and_optional_sections():
    run = from_mapping(RunConfig, {"objective": {"z_loss": 1}, "model": {"encoder": None}})
    assert run.objective.z_loss == 1.0 and isinstance(run.objective.z_loss, float)
    assert run.model.encoder is None
    rules = from_mapping(RunConfig, {"sharding": {"rules": {"mlp": "data,tensor", "vocab": ""}}})
    assert rules.sharding.rules == {"mlp": ("data", "tensor"), "vocab": ()}


def test_replace_follows_a_dotted_path():
    run = configs.replace(quickstart.run(), "train.seed", 3)
    assert run == dataclasses.replace(
        quickstart.run(), train=dataclasses.replace(quickstart.run().train, seed=3))


def everything() -> RunConfig:
    """A run whose optional sections are all there."""
    run = tiny.seq2seq()
    segment, = run.model.decoder.segments
    block, = segment.blocks
    block = dataclasses.replace(block, moe=MoEConfig())
    decoder = dataclasses.replace(run.model.decoder, segments=(
        dataclasses.replace(segment, blocks=(block,)),))
    group = GroupConfig(".*", schedule=ScheduleConfig(), weight_decay=0.1)
    return dataclasses.replace(
        run, model=dataclasses.replace(run.model, decoder=decoder),
        optimizer=dataclasses.replace(run.optimizer, groups=(group,)),
        data=dataclasses.replace(run.data, seed=1),
        checkpoint=dataclasses.replace(run.checkpoint, keep_every=2),
        eval=dataclasses.replace(run.eval, decode=dataclasses.replace(
            run.eval.decode, stop_ids=(1, 2))),
        train=dataclasses.replace(run.train, batch_ramp=BatchRampConfig(((8, 3),))))


def numbers(section, path=()):
    """(path, value) of every number of a config as JSON."""
    items = section.items() if isinstance(section, dict) else enumerate(section)
    for name, value in items:
        if isinstance(value, (dict, list)):
            yield from numbers(value, (*path, name))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield (*path, name), value


PATHS = [path for path, _ in numbers(json.loads(to_json(everything())))]
MAY_BE_NEGATIVE = {"mesh", "eos_id", "pad_id", "stop_ids"}


def with_value(path, value) -> dict:
    mapping = json.loads(to_json(everything()))
    section = mapping
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    return mapping


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_no_number_out_of_range_comes_through_the_door(path):
    """Refused by its name and value, or a number that such a field may hold."""
    dotted = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, path)))
    for value in (math.nan, math.inf, -math.inf, -1, -1.5, -32, 2**70, -2**70, 1e300, 10**400):
        try:
            run = from_mapping(RunConfig, with_value(path, value))
        except UserError as error:
            assert dotted in str(error) or str(path[-1]) in str(error), str(error)
            shown = {str(value)[:20], str(float(value) if abs(value) < 2**99 else value)}
            assert any(text in str(error) for text in shown), str(error)
            continue
        held = dict(numbers(json.loads(to_json(run))))[path]
        assert math.isfinite(held)
        assert held >= 0 or MAY_BE_NEGATIVE & set(path), held
        assert abs(held) < (2.0**128 if isinstance(held, float) else 2**31)


@pytest.mark.parametrize(("path", "value", "message"), [
    ("model.embed_dim", -32, "model.embed_dim=-32: must be at least 1"),
    ("eval.batch_size", -8, "eval.batch_size=-8: must be at least 0"),
    ("train.seed", 2**70, f"train.seed={2**70}: must be at most 2,147,483,647"),
    ("optimizer.schedule.base_learning_rate", math.nan,
     "optimizer.schedule.base_learning_rate=nan: must be a finite number at least 0"),
    ("optimizer.schedule.base_learning_rate", -0.1,
     "optimizer.schedule.base_learning_rate=-0.1: must be at least 0"),
    ("optimizer.beta1", 1.0, r"optimizer.beta1=1.0: must be in \[0, 1\)"),
    ("sharding.zero", 4, r"sharding.zero=4: must be in \[1, 3\]"),
])
def test_bounds_hold_for_configs_made_in_python_too(path, value, message):
    with pytest.raises(UserError, match=message):
        build(configs.replace(everything(), path, value), jax.devices()[:1])


@pytest.mark.parametrize("content", [b"null", b"[]", b"{", b"", b"\xff", b"[" * 100_000, b"9" * 6000])
def test_a_damaged_config_file_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json is damaged .*checkpoints/STEP/record"):
        configs.load(tmp_path / "config.json")


def test_what_an_earlier_version_wrote_is_read(tmp_path):
    """Its retired fields are left out, and others that are unknown refused as ever."""
    mapping = json.loads(to_json(everything()))
    mapping["sharding"]["rules"] |= {"act_expert": ["expert"], "act_head_dim": []}
    (tmp_path / "config.json").write_text(json.dumps(mapping))
    assert configs.load(tmp_path / "config.json") == everything()
    mapping["sharding"]["zeros"] = 1
    (tmp_path / "config.json").write_text(json.dumps(mapping))
    with pytest.raises(UserError, match="sharding: no field is called 'zeros'"):
        configs.load(tmp_path / "config.json")


def test_overrides_take_what_flags_take():
    run = configs.override(RunConfig(), [
        "model.decoder.scan=False", "train.seed=3", "name=(mine", "data.seed=None", "eval.metrics=true",
        "train.batch_ramp.stages=()", 'init_map=((".*", ""),)'])
    assert (run.model.decoder.scan, run.train.seed, run.name, run.data.seed, run.eval.metrics) == (
        False, 3, "(mine", None, True)
    assert (run.train.batch_ramp.stages, run.init_map) == ((), ((".*", ""),))
    with pytest.raises(UserError, match="train.seed='False'|train.seed=False"):
        configs.override(run, ["train.seed=False"])


@pytest.mark.parametrize(("text", "path", "value"), [
    ("model.decoder.segments[0].repeats=4", ("model", "decoder", "segments", 0, "repeats"), 4),
    ("model.decoder.segments[0].blocks[0].mlp.mlp_dim=48",
     ("model", "decoder", "segments", 0, "blocks", 0, "mlp", "mlp_dim"), 48),
    ("checkpoint.keep_every=100", ("checkpoint", "keep_every"), 100),
    ("checkpoint.keep_every=None", ("checkpoint", "keep_every"), None),
    ("model.encoder=None", ("model", "encoder"), None),
    ("init_map=(('a','b'),)", ("init_map",), (("a", "b"),)),
    ("sharding.rules.mlp=data,tensor", ("sharding", "rules", "mlp"), ("data", "tensor")),
    ("sharding.rules.mlp=('data','tensor')", ("sharding", "rules", "mlp"), ("data", "tensor")),
    ("name=7", ("name",), "7"),
    ("train.bad_steps=skip", ("train", "bad_steps"), "skip"),
    ("eval.metrics=False", ("eval", "metrics"), False),
])
def test_an_override_reaches_items_none_and_tuples(text, path, value):
    found = configs.override(tiny.seq2seq(), [text])
    for step in path:
        found = found[step] if isinstance(step, int) or isinstance(found, dict) else getattr(
            found, step)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("text", "message"), [
    ("model.decoder.segments[1].repeats=4", "model.decoder.segments has 1 items, counted from 0"),
    ("model.decoder.segments.repeats=4", "is a list: take an item, model.decoder.segments[0]"),
    ("model.decoder[0].causal=True", "model.decoder is no list"),
    ("model.decoder.segments[0].blocks[0].moe.num_experts=4",
     "model.decoder.segments[0].blocks[0].moe is None here; give the whole section"),
    ("train.sed=1", "did you mean 'seed'?"), ("train.num_steps", "Write section.field=value"),
    ("train.num_steps=None", "config.train.num_steps=None: must be int"),
])
def test_an_override_that_reaches_nothing_says_why(text, message):
    with pytest.raises(UserError) as error:
        configs.override(tiny.seq2seq(), [text])
    assert message in str(error.value)


def test_a_whole_section_is_given_in_json():
    run = configs.override(tiny.seq2seq(), [
        'model.decoder.segments[0].blocks[0].moe={"num_experts": 4}'])
    assert run.model.decoder.segments[0].blocks[0].moe == MoEConfig(num_experts=4)
    names = configs.field_names(run)
    assert "model.decoder.segments[0].blocks[0].moe.num_experts" in names and "train" not in names
