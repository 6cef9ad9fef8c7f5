"""Coordinate checks: changes flat over the width under mup, growing under the standard."""

import dataclasses

import jax.numpy as jnp
import pytest

from t5x_lite.errors import UserError
from t5x_lite.layers.config import MoEConfig
from t5x_lite.models.config import SegmentConfig
from t5x_lite.scaling import __main__ as command, coordinates
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig
from tests import tiny

WIDTHS = (32, 128)
RATES = {"adamw": 0.003, "adafactor": 0.02, "muon": 0.01}


def _run(optimizer: str, mixture: bool = False):
    """A decoder of one layer, which compiles in seconds."""
    decoder = tiny.seq2seq(scan=False).model.encoder
    block = decoder.segments[0].blocks[0]
    if mixture:
        block = dataclasses.replace(block, moe=MoEConfig(4, block.mlp))
    decoder = dataclasses.replace(decoder, segments=(SegmentConfig((block,), 1),), causal=True)
    run = tiny.seq2seq()
    return dataclasses.replace(
        run, objective=ObjectiveConfig(name="lm"),
        model=dataclasses.replace(run.model, architecture="decoder_only", encoder=None,
                                  decoder=decoder),
        optimizer=OptimizerConfig(optimizer, ScheduleConfig("constant", RATES[optimizer])))


def _slopes(run, kind: str) -> dict[str, float]:
    return coordinates.check(run, WIDTHS, steps=3, seeds=1, kind=kind)["slopes"]


def _is_flat(slopes: dict[str, float]) -> bool:
    return max(slopes.values()) < 0.25 and min(slopes.values()) > -0.45


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", RATES)
def test_changes_are_flat_under_mup_and_grow_under_the_standard(optimizer):
    mup, standard = (_slopes(_run(optimizer), name) for name in ("mup", "standard"))
    assert _is_flat(mup), mup
    assert max(standard.values()) > max(mup.values()) + 0.2, standard   # Adafactor's grow least


@pytest.mark.slow
@pytest.mark.parametrize("run", [_run("adamw", mixture=True), dataclasses.replace(
    tiny.seq2seq(scan=False), optimizer=_run("adamw").optimizer)], ids=["mixture", "t5"])
def test_mixtures_and_encoder_decoders_are_flat_too(run):
    slopes = _slopes(run, "mup")
    assert _is_flat(slopes), slopes


def test_what_is_tagged_comes_by_name():
    from t5x_lite.parallel.remat import tag

    def function(x):
        y = tag(x + 1, "query")
        return {"sum": tag(y * 2, "query").sum()}
    found = coordinates.named(function, jnp.ones(2))
    assert [v.tolist() for v in found["query"]] == [[2, 2], [4, 4]]
    assert [float(v) for v in found["sum"]] == [8]


@pytest.mark.parametrize(("flags", "message"), [
    ([], "--config is missing"), (["--config=no.py"], "does not exist"),
    (["--config=configs/quickstart.py", "--widths=64"], "two or more"),
    (["--config=configs/quickstart.py", "--widths=a,b"], "must be widths"),
    (["--config=configs/quickstart.py", "--widths=256,300"], "num_heads=4 of embed_dim"),
    (["--config=configs/quickstart.py", "--parametrization=no"], "model.parametrization"),
    (["--config=configs/quickstart.py", "--steps=0"], "--steps"),
])
def test_wrong_input_is_named(capsys, flags, message):
    assert command.main(["coordinate_check", *flags]) == 2
    assert message in capsys.readouterr().err


def test_widths_change_no_head_and_keep_shared_keys():
    run = tiny.seq2seq()
    wide = coordinates.at_width(run, 64)
    attention = wide.model.encoder.segments[0].blocks[0].self_attention
    assert (attention.num_heads, attention.head_dim) == (16, 4)
    assert wide.model.encoder.segments[0].blocks[0].mlp.mlp_dim == 128
    with pytest.raises(UserError, match="cannot grow"):
        coordinates.at_width(run, 18)
