"""Traces of steps: which, where, and of what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import init_from
from t5x_lite.checkpoints import manager
from t5x_lite.errors import UserError
from t5x_lite.running.profile import Profile, parse
from tests import tiny_config
from tests.faults import mini


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
        first, last = text.split(":")
        (file,) = (tmp_path / folder / "profile").rglob("*.xplane.pb")
        assert file.parent == (
            tmp_path / folder / "profile/plugins/profile" / f"steps_{first}_{last}")
    with Profile("", tmp_path / "none") as profile:
        profile.before(1, None)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_xprof_opens_the_trace_of_two_processes(tmp_path):
    """A run of two processes that averages, keeps its best step and stops early is that of one."""
    raw_to_tool_data = pytest.importorskip("xprof.convert.raw_to_tool_data")
    text = tiny_config.write_text(tmp_path / "words.txt")
    flags = ("train.ema_decay=0.5", "checkpoint.best=accuracy", "eval.stop_after=4", "eval.every=1",
             "eval.num_batches=1", "train.num_steps=40", "checkpoint.keep_last=1", "mesh.data=-1",
             "checkpoint.every=100", "train.profile_steps=2:3",
             "optimizer.schedule.base_learning_rate=0.1")
    status, lines = mini.end(mini.begin(text, tmp_path / "one", *flags, devices=2))
    assert status == 0, lines
    for status, lines in mini.two(text, tmp_path / "two", *flags):
        assert status == 0, lines
    one, two = tmp_path / "one", tmp_path / "two"
    assert manager.all_steps(one) == manager.all_steps(two)
    best = [manager.read_record(folder, "best") for folder in (one, two)]
    assert 0 < best[0].step == best[1].step and manager.all_steps(one)[-1] < 40
    for step in ("best", "last"):   # the average is what is read
        found = [init_from.open_source(
            f"{folder}/checkpoints/best" if step == "best" else str(folder)) for folder in (one, two)]
        for path in found[0].shapes:
            np.testing.assert_allclose(*(source.read(path, jnp.float32) for source in found),
                                       rtol=1e-4, atol=1e-5, err_msg=f"{step}: {path}")
    traces = {folder: sorted(map(str, folder.rglob("*.xplane.pb"))) for folder in (one, two)}
    assert [len(files) for files in traces.values()] == [1, 2]
    for file in (*traces[one], *traces[two]):   # the viewer takes one host at a time
        content, kind = raw_to_tool_data.xspace_to_tool_data([file], "trace_viewer", {})
        assert kind == "application/json"
        assert json.loads(content)["traceEvents"], file
