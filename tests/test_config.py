"""Configs: dataclasses to ConfigDict and back, and errors that name the field."""

import dataclasses
import json

import pytest

from configs import quickstart
from t5x_lite import config as configs
from t5x_lite.config import RunConfig, from_mapping, to_config_dict, to_json
from t5x_lite.errors import UserError


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
    ({"modle": {}}, "config.modle: no such field. did you mean 'model'?"),
    ({"train": {"sed": 1}}, "config.train.sed: no such field. did you mean 'seed'?"),
    ({"train": {"num_steps": 1.5}}, "config.train.num_steps=1.5: must be int, not float"),
    ({"train": {"num_steps": None}}, "config.train.num_steps=None: must be int, not NoneType"),
    ({"train": {"num_steps": True}}, "config.train.num_steps=True: must be int, not bool"),
    ({"model": {"encoder": {"segments": 3}}}, "config.model.encoder.segments=3: must be a tuple"),
    ({"model": {"encoder": {"segments": [{"repeats": "2"}]}}},
     "config.model.encoder.segments[0].repeats='2': must be int, not str"),
    ({"optimizer": 3}, "config.optimizer=3: must be a section with the fields name"),
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
