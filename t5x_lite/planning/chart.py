"""A chart of plans side by side: what each device holds, and where a step's time goes at best."""

from collections.abc import Mapping

from t5x_lite import packages
from t5x_lite.planning import show
from t5x_lite.planning.make import Plan

MEMORY = {"parameters": "params_bytes", "optimizer": "optimizer_bytes", "batch": "batch_bytes",
          "temporaries": "temp_bytes"}   # part -> field of show.to_json


def drawn(plans: Mapping[str, Plan]):
    """A matplotlib figure: left, GiB of one device by what holds them, with a line at what it has (no
    temporaries where nothing was compiled); right, seconds of a step's bound by part, the longest of
    which is the bound."""
    Figure = packages.needed("matplotlib.figure", "plots", "charts").Figure
    values = {name: show.to_json(plan) for name, plan in plans.items()}
    figure = Figure(figsize=(11, 1.6 + 0.55 * len(values)), layout="constrained")
    memory, seconds = figure.subplots(1, 2, sharey=True)
    _draw_memory(memory, values)
    _draw_seconds(seconds, values)
    memory.invert_yaxis()
    for axes in (memory, seconds):
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    return figure


def _draw_memory(axes, values: Mapping[str, dict]) -> None:
    """A bar a plan, of parts side by side, and a line at what its device has where that is known."""
    names = list(values)
    starts = [0.0] * len(names)
    for part, field in MEMORY.items():
        widths = [(values[name][field] or 0) / 2**30 for name in names]
        axes.barh(names, widths, left=starts, label=part, height=0.6)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    known = [row for row, name in enumerate(names) if values[name]["hbm_bytes"]]
    axes.vlines([values[names[row]]["hbm_bytes"] / 2**30 for row in known],
                [row - 0.4 for row in known], [row + 0.4 for row in known],
                color="black", label="what a device has")
    axes.set_xlabel("GiB a device")


def _draw_seconds(axes, values: Mapping[str, dict]) -> None:
    """A group of thin bars a plan, one for each part of the bound that any plan has."""
    found = [value["seconds"] for value in values.values()]
    parts = list(dict.fromkeys(part for of_plan in found for part in of_plan))
    height = 0.7 / max(1, len(parts))
    for number, part in enumerate(parts):
        places = [row - 0.35 + height * (number + 0.5) for row in range(len(found))]
        axes.barh(places, [of_plan.get(part) or 0 for of_plan in found],
                  height=height, label=part, color=f"C{number + 4}")
    axes.set_xlabel("seconds a step, at best")
