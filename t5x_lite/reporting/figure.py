"""Curves for a notebook: a figure of any runs, and one that grows while a run trains."""

import contextlib
import pathlib
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from t5x_lite import packages
from t5x_lite.errors import UserError, one_of
from t5x_lite.reporting import runs as reporting_runs
from t5x_lite.reporting.runs import AXES, Run, by_arm


def curves(paths: Sequence[str | pathlib.Path], metric: str = "", axis: str = "step",
           *, logx: bool = False, logy: bool = False, title: str = ""):
    """A matplotlib figure of one metric of the runs in these folders, a colour an arm.

    metric: as metrics.jsonl calls it, "*" for anything; "": the first held-out loss that there is.
    axis: a key of runs.AXES.

    Raises:
        UserError: no runs there, an unknown axis, or no run has the metric.
    """
    one_of("axis", axis, AXES)
    runs = reporting_runs.find([str(path) for path in paths])
    metric = metric or next(iter(reporting_runs.metrics_of(runs)), "")
    if not any(reporting_runs.curve(run, metric, axis) for run in runs):
        one_of("metric", metric, reporting_runs.metrics_of(runs))
    return drawn(runs, metric, axis, logx=logx, logy=logy, title=title)


def drawn(runs: Sequence[Run], metric: str, axis: str = "step", *, logx: bool = False,
          logy: bool = False, title: str = ""):
    """The figure of `curves` for runs that have been read: an arm's mean as a line and its seeds'
    range shaded; where its seeds share no place on the axis, as with hours, a line a seed.

    From MANY shaded arms on, a panel each, with the other arms' means in grey behind it.
    """
    # Not pyplot: a notebook's own figures stay as they are.
    Figure = packages.needed("matplotlib.figure", "plots", "curves").Figure
    arms = _curves_by_arm(runs, metric, axis)
    panels = len(arms) >= MANY and any(len(found) > 1 for found in arms.values())
    columns = min(len(arms), COLUMNS) if panels else 1
    rows = -(-len(arms) // columns) if panels else 1
    size = (2.6 * columns + 0.4, 2.4 * rows + 0.8) if panels else (8, 4.2)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    (_draw_panels if panels else _draw_together)(grid, arms)
    for axes in grid:
        axes.set_xscale("log" if logx else "linear")
        axes.set_yscale("log" if logy else "linear")
        if logy:
            _plain_numbers(axes)
        axes.grid(alpha=0.3)
    if not logy:
        _look_below_the_first_point(grid[0], arms)
    (figure.supxlabel if panels else grid[0].set_xlabel)(_with_unit(axis, AXES[axis][1]))
    (figure.supylabel if panels else grid[0].set_ylabel)(in_words(metric))
    shade = "" if all(len(found) < 2 for found in arms.values()) else (
        "line: mean of the seeds, shade: their range")
    figure.suptitle("\n".join(filter(None, (title, shade))), fontsize=10)
    return figure


def _curves_by_arm(runs: Sequence[Run], metric: str, axis: str) -> dict[str, list]:
    """{arm: its seeds' curves}, without runs that have none."""
    arms = {arm: [reporting_runs.curve(run, metric, axis) for run in members]
            for arm, members in by_arm(runs).items()}
    drawable = {arm: list(filter(None, curves)) for arm, curves in arms.items()}
    return {arm: curves for arm, curves in drawable.items() if curves}


def _draw_together(grid, arms: Mapping[str, list]) -> None:
    for number, (arm, curves) in enumerate(arms.items()):
        _draw_arm(grid[0], arm, curves, f"C{number % 10}", _STYLES[number // 10 % len(_STYLES)])
    _legend(grid[0])


# Arms whose shades hide one another: from so many on they stand in panels of their own.
MANY = 6
COLUMNS = 4   # of panels
_STYLES = ("-", "--", ":")   # of the first ten arms, the next ten, and so on: there are ten colours

# The units of what metrics.jsonl holds, by a name's last part.
_UNITS = {"loss": "nats a token", "accuracy": "share of tokens", "unigram_entropy": "nats a token",
          "bits_per_byte": "bits a byte", "em": "%", "f1": "%", "learning_rate": ""}
_UNITS |= dict.fromkeys(("spans_exact", "spans_of_words", "spans_most_frequent",
                         "spans_between_same_words"), "%")
_WORDS = {"em": "exact match", "f1": "F1"}


def in_words(metric: str) -> str:
    """"eval/squad/metric/em" as "exact match of squad (%)", "train/loss" as "training loss (…)"."""
    side, *middle, last = metric.split("/")
    of = [part for part in middle if part not in ("metric", "all", "*")]
    name = _WORDS.get(last, last.replace("_", " "))
    kind = {"train": "training ", "eval": "" if "metric" in middle else "held-out "}.get(side, "")
    return _with_unit(f"{kind}{name}" + (f" of {'/'.join(of)}" if of else ""), _UNITS.get(last, ""))


def _with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def _draw_panels(grid, arms: Mapping[str, Sequence[Mapping[float, float]]]) -> None:
    """An arm a panel, the means of all others in grey behind it."""
    for number, (arm, found) in enumerate(arms.items()):
        for other, curves_of_other in arms.items():
            if other != arm:
                shared, means = _mean(curves_of_other)
                grid[number].plot(shared, means, color="0.75", linewidth=0.8, zorder=1)
        _draw_arm(grid[number], arm, found, f"C{number % 10}")
        grid[number].set_title(arm, fontsize=9, color=f"C{number % 10}")
    for axes in grid[len(arms):]:
        axes.set_axis_off()
    for axes in grid[max(0, len(arms) - COLUMNS):len(arms)]:   # the lowest of each column
        axes.tick_params(labelbottom=True)


def _look_below_the_first_point(axes, arms: Mapping[str, Sequence[Mapping[float, float]]]) -> None:
    """Lets curves come in from above where their first point, before any step, would flatten what
    follows to a line."""
    curves = [sorted(curve.items()) for found in arms.values() for curve in found]
    first = [curve[0][1] for curve in curves]
    rest = [value for curve in curves for _, value in curve[1:]]
    if len(set(rest)) < 2:
        return
    low, high = min(rest), max(rest)
    if min(first) - high > 1.5 * (high - low):
        axes.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))


def _plain_numbers(axes) -> None:
    """Labels a logarithmic y axis of less than a decade by 2.0, 2.5 and 3.0, and not by 2 x 10^0."""
    from matplotlib import ticker
    low, high = axes.get_ylim()
    if high < 10 * low:
        axes.yaxis.set_major_locator(ticker.AutoLocator())
        axes.yaxis.set_major_formatter(ticker.ScalarFormatter())
        axes.yaxis.set_minor_locator(ticker.NullLocator())


def _legend(axes) -> None:
    """Beside the curves, in the order in which they end."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(handles)), key=lambda i: -handles[i].get_ydata()[-1])
    if handles:
        axes.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False,
                    bbox_to_anchor=(1.02, 1), loc="upper left")


def _mean(curves: Sequence[Mapping[float, float]]) -> tuple[list[float], list[float]]:
    """(places that all seeds share, the mean there)."""
    shared = sorted(set.intersection(*map(set, curves)))
    return shared, [statistics.fmean(curve[place] for curve in curves) for place in shared]


def _draw_arm(axes, arm: str, curves: Sequence[Mapping[float, float]], color: str,
              style: str = "-") -> None:
    """One arm's lines on matplotlib's axes; curves: {place: value} of each of its seeds."""
    label = f"{arm} ({len(curves)} seeds)" if len(curves) > 1 else arm
    shared, means = _mean(curves)
    if not shared:
        for number, curve in enumerate(curves):
            axes.plot(list(curve), list(curve.values()), color=color, linestyle=style,
                      label=None if number else label)
        return
    axes.plot(shared, means, color=color, linestyle=style, label=label,
              marker="." if len(shared) < 40 else "")
    if len(curves) > 1:
        axes.fill_between(shared, [min(curve[place] for curve in curves) for place in shared],
                          [max(curve[place] for curve in curves) for place in shared],
                          color=color, alpha=0.2, linewidth=0)


@contextlib.contextmanager
def watching(workdir: str | pathlib.Path, metric: str = "train/loss", axis: str = "step",
             seconds: float = 2.0, **look) -> Iterator[None]:
    """While the block runs, a notebook shows the curves below a folder, drawn anew as they grow.

        with watching("runs/quickstart"):
            train.run(config, "runs/quickstart")

    Outside a notebook it does nothing. The metrics are read from the runs' own files.

    workdir: of a run, or a folder of many: an experiment's or a ladder's.
    axis, look: as `curves` takes them (logx, logy, title).
    seconds: between two drawings; more where a drawing takes longer than a tenth of that.

    Raises:
        UserError: an unknown axis.
    """
    one_of("axis", axis, AXES)
    if "ipykernel" not in sys.modules:
        yield
        return
    from IPython.display import display
    picture = _Picture(workdir, metric, axis, look)
    shown = display(picture, display_id=True)
    ended = threading.Event()

    def redraw() -> None:
        pause = seconds
        while not ended.wait(pause):
            began = time.monotonic()
            shown.update(picture)
            pause = max(seconds, 10 * (time.monotonic() - began))
    thread = threading.Thread(target=redraw, name="watching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        shown.update(picture)


class _Picture:
    """What a notebook shows of runs now: curves as PNG, or a line of text before there is one."""

    def __init__(self, workdir: str | pathlib.Path, metric: str, axis: str, look: Mapping):
        self._workdir, self._metric, self._axis, self._look = workdir, metric, axis, look

    def _repr_mimebundle_(self, **_) -> dict[str, str]:
        import base64
        import io
        try:
            figure = curves([self._workdir], self._metric, self._axis, **self._look)
        except UserError:   # nothing written yet
            return {"text/plain": f"{self._workdir}: waiting for the first {self._metric}"}
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        return {"image/png": base64.b64encode(file.getvalue()).decode(),
                "text/plain": f"{self._metric} of {self._workdir}"}
