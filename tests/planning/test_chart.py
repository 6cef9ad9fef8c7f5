"""The chart of plans shows the bytes and seconds of their JSON."""

import pytest

from t5x_lite.planning import chart, show
from tests.planning.test_plan import planned


def test_bars_are_the_plans_figures():
    plans = {"eight": planned("h100:8"), "simulated": planned("cpu:8")}
    memory, seconds = chart.drawn(plans).axes
    names = [label.get_text() for label in memory.get_yticklabels()]
    assert names == ["eight", "simulated"]
    for row, plan in enumerate(plans.values()):
        value = show.to_json(plan)
        ends = [bars.patches[row].get_x() + bars.patches[row].get_width() for bars in memory.containers]
        held = sum(value[field] or 0 for field in chart.MEMORY.values())
        assert ends[-1] == pytest.approx(held / 2**30)
        shown = {bars.get_label(): bars.patches[row].get_width() for bars in seconds.containers}
        assert shown == {**dict.fromkeys(shown, 0), **value["seconds"]}
    lines = [path.vertices[0, 0] for path in memory.collections[0].get_paths()]
    assert lines == [plan.topology.hbm_bytes / 2**30 for plan in plans.values() if plan.topology.hbm_bytes]
    legend = {text.get_text() for axes in (memory, seconds) for text in axes.get_legend().get_texts()}
    assert {"parameters", "temporaries", "what a device has", "compute"} <= legend
