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
    left = dict.fromkeys(values, 0.0)
    for part, field in MEMORY.items():
        widths = [(value[field] or 0) / 2**30 for value in values.values()]
        memory.barh(list(values), widths, left=list(left.values()), label=part, height=0.6)
        left = {name: left[name] + width for name, width in zip(left, widths, strict=True)}
    known = [(row, value["hbm_bytes"]) for row, value in enumerate(values.values()) if value["hbm_bytes"]]
    memory.vlines([size / 2**30 for _, size in known], [row - 0.4 for row, _ in known],
                  [row + 0.4 for row, _ in known], color="black", label="what a device has")
    memory.set_xlabel("GiB a device")
    parts = list(dict.fromkeys(part for value in values.values() for part in value["seconds"]))
    for number, part in enumerate(parts):
        height = 0.7 / len(parts)
        places = [row - 0.35 + height * (number + 0.5) for row in range(len(values))]
        seconds.barh(places, [value["seconds"].get(part) or 0 for value in values.values()],
                     height=height, label=part, color=f"C{number + 4}")
    seconds.set_xlabel("seconds a step, at best")
    memory.invert_yaxis()
    for axes in (memory, seconds):
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    return figure
