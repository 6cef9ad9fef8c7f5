"""Curves for a notebook: a figure of any runs, and one that grows while a run trains."""

import contextlib
import pathlib
import statistics
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence

from t5x_lite.errors import UserError, one_of
from t5x_lite.reporting import runs as reporting_runs
from t5x_lite.reporting.runs import AXES, Run, by_arm


def curves(paths: Sequence[str | pathlib.Path], metric: str = "eval/all/loss", axis: str = "step",
           *, logx: bool = False, logy: bool = False):
    """A matplotlib figure of one metric of the runs in these folders, a colour an arm.

    metric: as metrics.jsonl calls it, "*" for anything. axis: a key of runs.AXES.

    Raises:
        UserError: no runs there, an unknown axis, or no run has the metric.
    """
    one_of("axis", axis, AXES)
    runs = reporting_runs.find([str(path) for path in paths])
    if not any(reporting_runs.curve(run, metric, axis) for run in runs):
        one_of("metric", metric, reporting_runs.metrics_of(runs))
    return drawn(runs, metric, axis, logx=logx, logy=logy)


def drawn(runs: Sequence[Run], metric: str, axis: str = "step", *, logx: bool = False,
          logy: bool = False):
    """The figure of `curves` for runs that have been read: an arm's mean as a line and its seeds'
    range shaded; where its seeds share no place on the axis, as with hours, a line a seed."""
    from matplotlib.figure import Figure  # not pyplot: a notebook's own figures stay as they are
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for number, (arm, members) in enumerate(by_arm(runs).items()):
        points = [reporting_runs.curve(run, metric, axis) for run in members]
        _draw_arm(axes, arm, [curve for curve in points if curve], f"C{number % 10}")
    unit = AXES[axis][1]
    axes.set_xlabel(f"{axis} ({unit})" if unit else axis)
    axes.set_ylabel(f"{metric} (nats a token)" if metric.endswith("loss") else metric)
    axes.set_xscale("log" if logx else "linear")
    axes.set_yscale("log" if logy else "linear")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure


def _draw_arm(axes, arm: str, curves: Sequence[Mapping[float, float]], color: str) -> None:
    """One arm's lines on matplotlib's axes; curves: {place: value} of each of its seeds."""
    if not curves:
        return
    label = f"{arm} ({len(curves)} seeds)" if len(curves) > 1 else arm
    shared = sorted(set.intersection(*map(set, curves)))
    if not shared:
        for number, curve in enumerate(curves):
            axes.plot(list(curve), list(curve.values()), color=color,
                      label=None if number else label)
        return
    means = [statistics.fmean(curve[place] for curve in curves) for place in shared]
    axes.plot(shared, means, color=color, label=label, marker="." if len(shared) < 40 else "")
    if len(curves) > 1:
        axes.fill_between(shared, [min(curve[place] for curve in curves) for place in shared],
                          [max(curve[place] for curve in curves) for place in shared],
                          color=color, alpha=0.2, linewidth=0)


@contextlib.contextmanager
def watching(workdir: str | pathlib.Path, metric: str = "train/loss", seconds: float = 2.0
             ) -> Iterator[None]:
    """While the block runs, a notebook shows the run's curve and draws it anew every few seconds.

        with watching("runs/quickstart"):
            train.run(config, "runs/quickstart")

    Outside a notebook it does nothing. The metrics are read from the run's own file.
    """
    if "ipykernel" not in sys.modules:
        yield
        return
    from IPython.display import display
    shown = display(_Picture(workdir, metric), display_id=True)
    ended = threading.Event()

    def redraw() -> None:
        while not ended.wait(seconds):
            shown.update(_Picture(workdir, metric))
    thread = threading.Thread(target=redraw, name="watching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        shown.update(_Picture(workdir, metric))


class _Picture:
    """What a notebook shows of a run now: its curve as PNG, or a line of text before there is one."""

    def __init__(self, workdir: str | pathlib.Path, metric: str):
        self._workdir, self._metric = workdir, metric

    def _repr_mimebundle_(self, **_) -> dict[str, str]:
        import base64
        import io
        try:
            figure = curves([self._workdir], self._metric)
        except UserError:   # nothing written yet
            return {"text/plain": f"{self._workdir}: waiting for the first {self._metric}"}
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        return {"image/png": base64.b64encode(file.getvalue()).decode(),
                "text/plain": f"{self._metric} of {self._workdir}"}
