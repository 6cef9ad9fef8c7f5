"""One HTML page of runs: curves to zoom into, final values, settings, cost. It needs no network."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from t5x_lite import files
from t5x_lite.errors import UserError
from t5x_lite.reporting import figure, runs as reporting_runs, tables
from t5x_lite.reporting.runs import AXES, Run

_TEMPLATE = pathlib.Path(__file__).parent / "page.html.j2"


def render(runs: Sequence[Run], title: str, empty: Sequence[files.Path] = ()) -> str:
    """The page as text: about 1 MB, nearly all of it the drawing library.

    empty: folders of runs that wrote no metrics, which the page names.

    Raises:
        UserError: what draws the curves is not installed.
    """
    metrics = reporting_runs.metrics_of(runs)
    if not metrics:
        raise UserError(_why_no_metric(runs))
    arms = reporting_runs.by_arm(runs)
    lead = f"{len(runs)} run{'s' * (len(runs) > 1)}, {len(arms)} arm{'s' * (len(arms) > 1)}"
    return rendered(
        _TEMPLATE, title=title, lead=lead, runs=runs, metrics=metrics, axes=list(AXES),
        final=tables.final(runs, metrics), differing=tables.differing(runs),
        cost=tables.cost(runs), load=tables.expert_load(runs), settings=tables.settings,
        remarks=_remarks(runs, empty), points=script(tables.points(runs, metrics)),
        words=script({metric: figure.in_words(metric) for metric in metrics}),
        units=script({axis: unit for axis, (_, unit) in AXES.items()}))


def rendered(template: pathlib.Path, **values: Any) -> str:
    """A template of ours with these values and, as "library", what draws its charts.

    Raises:
        UserError: what draws is not installed.
    """
    try:
        import jinja2
        import vl_convert
    except ImportError as error:
        raise UserError(f"a report needs {error.name}: pip install 't5x_lite[report]'.") from error
    environment = jinja2.Environment(autoescape=True, trim_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    library = _markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        library=library, **values)


def _why_no_metric(runs: Sequence[Run]) -> str:
    lost = [(run, name) for run in runs for line in run.lines for name in sorted(line)
            if name.endswith("/loss")]
    if not lost:
        return f"{runs[0].folder}: the lines of metrics.jsonl hold no metric yet."
    run, name = lost[0]
    return (f"{run.folder}: every {name} is NaN or infinite since step {run.not_finite_since(name)}: "
            "the run diverged, and there is nothing to draw.")


def _remarks(runs: Sequence[Run], empty: Sequence[files.Path]) -> list[str]:
    remarks = [f"{folder}: no line of metrics; this run is on no curve and in no table."
               for folder in empty]
    remarks += [f"{run.folder}: {metric} is NaN or infinite from step {step} to the end."
                for run in runs for metric in reporting_runs.metrics_of([run])
                if metric.endswith("/loss") and (step := run.not_finite_since(metric)) is not None]
    remarks += [f"{run.folder}: {run.unreadable} lines of metrics.jsonl could not be read and are "
               "left out." for run in runs if run.unreadable]
    remarks += [f"{run.folder}: {skipped} of {len(run.lines)} lines tell of steps that were left out "
                "because they were not finite (train.bad_steps)." for run in runs
                if (skipped := sum(bool(line.get("train/skipped")) for line in run.lines))]
    return remarks + [f"{run.folder}: config.json could not be read." for run in runs
                      if not run.settings]


def script(value: Any):
    """JSON as it may stand inside <script>: "</script>" in a text must not end it."""
    return _markup(json.dumps(value).replace("<", "\\u003c"))


def _markup(text: str):
    import markupsafe
    return markupsafe.Markup(text.replace("</script", "<\\/script"))


def write(paths: Sequence[str], output: str, title: str = "") -> files.Path:
    """Writes the page of the runs in these folders; returns its path."""
    if not paths:
        raise UserError("which runs? python -m t5x_lite.report WORKDIR… [--output=report.html]")
    runs, empty = reporting_runs.find_with_empty(paths)
    name = title or ", ".join(files.path(files.absolute(path)).name for path in paths)
    return saved(render(runs, name, empty), output)


def saved(text: str, output: str) -> files.Path:
    """Writes a page; returns its path. Raises UserError where it cannot be written."""
    file = files.path(output)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(file, text)
    except files.failures() as error:
        why = getattr(error, "strerror", None) or files.explain(error, output)
        raise UserError(f"--output={output} cannot be written ({why}).") from error
    return file
