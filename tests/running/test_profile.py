"""Traces of steps: which, where, and of what is refused."""

import jax.numpy as jnp
import pytest

from t5x_lite.errors import UserError
from t5x_lite.running.profile import Profile, parse


def test_both_ends_are_included():
    assert list(parse("10:13")) == [10, 11, 12, 13] and list(parse("")) == []


@pytest.mark.parametrize("text", ["10", "0:3", "5:4", "a:b", "1:2:3", "-1:4"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UserError, match="train.profile_steps"):
        parse(text)


def test_a_trace_is_written_once_and_also_where_the_run_ends_within(tmp_path):
    for text, folder in (("2:3", "within"), ("3:99", "beyond")):
        with Profile(text, tmp_path / folder) as profile:
            for step in range(1, 6):
                profile.before(step, jnp.ones(3) * step)
        assert len(list((tmp_path / folder / "profile").rglob("*.xplane.pb"))) == 1
    with Profile("", tmp_path / "none") as profile:
        profile.before(1, None)
    assert not (tmp_path / "none").exists()
