"""Run a comparison: `python -m t5x_lite.experiment --config=configs/experiments/X.py --workdir=DIR`.

A config of configs/experiments/ has `get_runs(arg) -> tuple[Run, …]`: its arms, seeds and
stages. They run one after another through train's own `run`, each in a folder of its own;
the same command started again skips what is finished and resumes what is not. Then the
metrics.jsonl of all runs become a table and a plot:

    DIR/ARM/SEED[/STAGE]/   a run's workdir
    DIR/results.md          final metrics by arm: mean and range over the seeds
    DIR/results.json        the same, and every run's own, for programs
    DIR/curves.png          the metric over the steps, a line an arm, the seeds' range shaded

`--override=train.num_steps=50` changes a field of every run, `--only=REGEX` runs the
folders that match, `--config=FILE:ARG` hands ARG to get_runs, `--over=FLOPs --log=xy` chooses the
plot's axes (step, tokens, FLOPs, parameters or hours).

`--launcher=local:2` runs two at a time on this machine, `--launcher=slurm` gives every run a job of a
Slurm cluster (running/launchers.py): the same folders, failures listed at the end, exit status 1 if
there were any. `--shard=2/4` runs the second of four parts, each of whole arms and seeds, for machines
that share a disk and no scheduler; the last of them, or --launcher=local afterwards, has the whole table.
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import dataclasses
import functools
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import

# isort: split

import jax
from absl import flags

from t5x_lite import config as configs, files, log, train
from t5x_lite.checkpoints import best, manager
from t5x_lite.config import RunConfig
from t5x_lite.errors import UserError, one_of
from t5x_lite.reporting import figure, runs as reporting_runs
from t5x_lite.running import launchers
from t5x_lite.training import metrics

MOST_SHOWN = 8   # columns of a table that nobody chose


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of an experiment."""

    arm: str
    seed: int
    config: RunConfig
    stage: str = ""             # where an arm has several: pretrain, finetune, …
    after: str = ""             # the stage of the same arm and seed whose last parameters start it
    at: int = 0                 # of `after`: the step whose whole state it goes on from instead, as
                                # a branch; 0: its last parameters alone
    judge: str = ""             # the stage whose reward model judges its answers (rollout.reward)

    @property
    def folder(self) -> str:
        """The run's workdir, relative to the experiment's: "arm/seed_0/stage"."""
        return "/".join(filter(None, (self.arm, f"seed_{self.seed}", self.stage)))


def load(path: str) -> tuple[ModuleType, str | None]:
    """The module of a config file, and the argument behind its colon.

    Raises:
        UserError: no such file, or one without get_runs.
    """
    return configs.module_of(path, "get_runs", "train it with t5x_lite.train")


def is_finished(workdir: files.Path, config: RunConfig) -> bool:
    """Whether the workdir holds the last step's checkpoint, which is written after all else: that of
    train.num_steps, or where eval.stop_after ended the run."""
    steps = manager.all_steps(workdir)
    if not steps or config.train.num_steps in steps:
        return bool(steps)
    stop_after = config.eval.stop_after
    return stop_after > 0 and best.is_over(manager.read_record(workdir).progress, stop_after)


def execute(runs: Sequence[Run], workdir: files.Path) -> None:
    """Trains the runs that are not finished, in order."""
    for number, run in enumerate(runs, 1):
        folder = workdir / run.folder
        config = run.config
        if run.after:
            source = workdir / dataclasses.replace(run, stage=run.after).folder
            begin = {"branch_from": f"{source}/checkpoints/{run.at}"} if run.at else {
                "init_from": str(source)}
            config = dataclasses.replace(config, **begin)
        if run.judge:
            judge = workdir / dataclasses.replace(run, stage=run.judge).folder
            config = configs.replace(config, "objective.rollout.reward", str(judge))
        if is_finished(folder, config):
            log.say(f"[{number}/{len(runs)}] {run.folder}: finished before")
            continue
        log.say(f"[{number}/{len(runs)}] {run.folder}")
        train.run(config, folder)


def launched(runs: Sequence[Run], workdir: files.Path, where: str, arguments: Sequence[str],
             options: Mapping[str, Any]) -> dict[str, str]:
    """As `execute`, by a launcher; {folder: why it failed}.

    Args:
        where: "local:2" or "slurm", see running/launchers.py.
        arguments: of this command, that every run is started with.
        options: of the cluster.
    """
    tasks = [launchers.Task(
        run.folder, (*arguments, f"--only=^{re.escape(run.folder)}$", "--nogather"),
        functools.partial(is_finished, workdir / run.folder, run.config),
        _last_needed(run)) for run in runs]
    return launchers.run_all(tasks, launchers.make(where, workdir, options), workdir)


def _last_needed(run: Run) -> str:
    """The folder of the stage that must have finished before this one; "" of a first stage. A stage that is
    judged comes after its judge, which comes after what both start from."""
    stage = run.judge or run.after
    return stage and dataclasses.replace(run, stage=stage).folder


def shard_of(runs: Sequence[Run], text: str) -> list[Run]:
    """The runs of part i of n, "i/n"; an arm's stages of one seed stay together.

    Raises:
        UserError: not two numbers with 1 <= i <= n.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--shard={text}: must be i/n, the part and how many there are: 1/4 … 4/4.")
    chains = list(dict.fromkeys((run.arm, run.seed) for run in runs))
    ours = set(chains[part - 1::parts])
    return [run for run in runs if (run.arm, run.seed) in ours]


def final_values(runs: Sequence[Run], workdir: files.Path) -> dict[str, dict[str, float]]:
    """{folder: the held-out metrics of its last evaluation, "TASK/METRIC": value}."""
    results = {}
    for run in runs:
        path = workdir / run.folder / "metrics.jsonl"
        lines = metrics.read_metrics(path) if path.is_file() else []
        last: dict[str, float] = {}
        for line in lines:
            held_out = {n.removeprefix("eval/"): v for n, v in line.items()
                        if n.startswith("eval/") and v is not None}
            if held_out:
                last = {**(last if last.get("step") == line["step"] else {}),
                        **held_out, "step": line["step"]}
        if last:
            results[run.folder] = last
    return results


def curve(path: files.Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of one metric of a metrics.jsonl."""
    if not path.is_file():
        return []
    values = [(line["step"], reporting_runs.value(line, metric))
              for line in metrics.read_metrics(path)]
    return [(step, number) for step, number in values if number is not None]


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """{arm, or arm/stage: its runs over the seeds}."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault("/".join(filter(None, (run.arm, run.stage))), []).append(run)
    return arms


def summary(runs: Sequence[Run], workdir: files.Path, shown: Sequence[str]) -> str:
    """A Markdown table: an arm a row, mean (lowest … highest over n seeds) of each metric."""
    values = final_values(runs, workdir)
    lines = ["| arm | seeds | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for arm, members in by_arm(runs).items():
        ends = [values[r.folder] for r in members if r.folder in values]
        cells = []
        for metric in shown:
            numbers = [n for v in ends if (n := reporting_runs.value(v, metric)) is not None]
            cells.append(f"{sum(numbers) / len(numbers):.4g} ({min(numbers):.4g} … "
                         f"{max(numbers):.4g})" if numbers else "–")
        lines.append(f"| {arm} | {len(ends)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], workdir: files.Path, metric: str, path: files.Path,
         over: str = "step", log_axes: str = "", title: str = "") -> None:
    """Plots `metric`: an arm's mean as a line, its seeds' range shaded. Says so where no run has the
    metric, instead of drawing nothing.

    over: a key of reporting/runs.AXES. log_axes: "x", "y" or "xy" have logarithmic scales.
    """
    folders = {workdir / run.folder for run in runs}
    if not any((folder / "metrics.jsonl").is_file() for folder in folders):
        log.say(f"{path.name} is not drawn: no run has taken a step")
        return
    read = [run for run in reporting_runs.find([str(workdir)]) if run.folder in folders]
    if not any(reporting_runs.curve(run, metric, over) for run in read):
        known = ", ".join(reporting_runs.metrics_of(read)) or "none"
        log.say(f"{path.name} is not drawn over {over}: no run has PLOTTED={metric!r}; there are "
                f"{known}")
        return
    image = io.BytesIO()
    figure.drawn(read, metric, over, logx="x" in log_axes, logy="y" in log_axes,
                 title=title).savefig(image, dpi=120)
    files.write_bytes(path, image.getvalue())


def default_metrics(values: Iterable[Mapping[str, float]]) -> tuple[str, ...]:
    """What a table shows of runs' held-out metrics ("TASK/METRIC") if nobody says: the loss over all
    tasks, or else each one's, and what their own metric functions give; at most MOST_SHOWN."""
    names = list(dict.fromkeys(name for one in values for name in one))
    losses = ["all/loss"] if "all/loss" in names else [n for n in names if n.endswith("/loss")]
    own = [n for n in names if "/metric/" in n]
    return tuple((losses + own)[:MOST_SHOWN]) or ("all/loss",)


def _first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def run(path: str, workdir: str | os.PathLike, *, overrides: Sequence[str] = (), only: str = "",
        over: str = "", log_axes: str | None = None, shard: str = "1/1", launcher: str = "local",
        options: Mapping[str, Any] | None = None, gather: bool = True) -> str:
    """Runs an experiment and returns its table, "" without `gather`; the config may define

        SLURM       options of the cluster for --launcher=slurm; `options` stand over them
        SHOWN       the metrics of the table, "TASK/METRIC", or "*/METRIC" where the task is an
                    argument (default: all/loss where there are several tasks, else the task's, and
                    what its own metric functions give)
        PLOTTED     the metric of the plot (default: eval/ and the first of SHOWN)
        TITLE       of the plot (default: the first line of the config's docstring)
        OVER        its x axis: step (default), tokens, FLOPs, parameters or hours
        LOG_AXES    "x", "y" or "xy": what is logarithmic (default: nothing)
        conclude    (runs, workdir) -> Markdown that is added below the table
    """
    workdir = files.path(workdir)
    module, argument = load(path)
    over = one_of("--over", over or getattr(module, "OVER", "step"), reporting_runs.AXES)
    log_axes = one_of("--log", getattr(module, "LOG_AXES", "") if log_axes is None else log_axes,
                      ("", "x", "y", "xy"))
    runs = [dataclasses.replace(r, config=configs.override(r.config, overrides))
            for r in (module.get_runs(argument) if argument else module.get_runs())]
    chosen = [r for r in shard_of(runs, shard) if re.search(only, r.folder)]
    if not chosen:
        raise UserError(f"--only={only!r} of --shard={shard} matches none of "
                        f"{[r.folder for r in runs]}.")
    failures: dict[str, str] = {}
    if launchers.is_here(launcher):
        execute(chosen, workdir)
    else:
        arguments = (f"--config={path}", f"--workdir={workdir}",
                     *(f"--override={text}" for text in overrides))
        of_config = getattr(module, launchers.kind_of(launcher).options or "", {})
        failures = launched(chosen, workdir, launcher, arguments, {**of_config, **(options or {})})
    text = _gathered(module, runs, workdir, over, log_axes) if gather else ""
    if failures:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        log.say(f"{len(failures)} of {len(chosen)} runs failed:\n{listed}\nThe same command runs them "
                "again and goes on from what they saved.")
        raise SystemExit(1)
    return text


def _gathered(module: ModuleType, runs: Sequence[Run], workdir: files.Path, over: str,
              log_axes: str) -> str:
    """Writes results.md, results.json and curves.png of what there is; returns the table."""
    shown = getattr(module, "SHOWN", ()) or default_metrics(final_values(runs, workdir).values())
    text = summary(runs, workdir, shown)
    if hasattr(module, "conclude"):
        text += "\n" + module.conclude(runs, workdir)
    if log.is_main():
        files.write_whole(workdir / "results.md", text)
        files.write_whole(workdir / "results.json",
                          json.dumps(final_values(runs, workdir), indent=1) + "\n")
        draw(runs, workdir, getattr(module, "PLOTTED", f"eval/{shown[0]}"),
             workdir / "curves.png", over, log_axes, getattr(module, "TITLE", _first_line(module)))
    log.say(text)
    return text


if __name__ == "__main__":
    _CONFIG = flags.DEFINE_string("config", None, "A file of configs/experiments/.")
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs and results go.")
    _OVERRIDE = flags.DEFINE_multi_string("override", [], "field=value for every run's config.")
    _ONLY = flags.DEFINE_string("only", "", "Regex: only the runs whose folder it finds.")
    _OVER = flags.DEFINE_string("over", "", "The plot's x axis: step, tokens, FLOPs, parameters …")
    _LOG = flags.DEFINE_string("log", None, "Logarithmic axes of the plot: x, y or xy.")
    _SHARD = flags.DEFINE_string("shard", "1/1", "i/n: only part i of n of the arms and seeds.")
    _LAUNCHER = flags.DEFINE_string("launcher", "local", "local, local:N (N at a time) or slurm.")
    _OPTION = flags.DEFINE_multi_string("slurm", [], "option=value of the cluster: timeout_min=600.")
    _GATHER = flags.DEFINE_bool("gather", True, "Write the table and plot of all runs at the end.")

    def main() -> None:
        if not _CONFIG.value:
            raise UserError("--config is missing: a file of configs/experiments/.")
        if not launchers.is_here(_LAUNCHER.value):
            jax.config.update("jax_platforms", "cpu")   # whatever JAX_PLATFORMS says to the runs
        run(_CONFIG.value, cli.workdir(_WORKDIR.value), overrides=_OVERRIDE.value,
            only=_ONLY.value, over=_OVER.value, log_axes=_LOG.value, shard=_SHARD.value,
            launcher=_LAUNCHER.value, options=launchers.options_of(_OPTION.value),
            gather=_GATHER.value)

    # What only starts others is no process of a run, and takes no device from them.
    cli.run(main, alone=lambda: not launchers.is_here(_LAUNCHER.value))
