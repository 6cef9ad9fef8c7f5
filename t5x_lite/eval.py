"""Evaluate checkpoints: `python -m t5x_lite.eval --workdir=DIR --step=all|last|best|N`.

The config is the one that the workdir holds; `--override=a.b=c` changes a field of it
(data.validation, eval.num_batches, mesh.fsdp, …). Prints one line a task and step and
appends them to WORKDIR/eval.jsonl. Only parameters are read, on any mesh.

Without a workdir, a config's own init_from is evaluated (see init_from.py) and printed:
`python -m t5x_lite.eval --config=configs/t5_1_1.py:small --config.init_from=hf:DIR`.

`--harness=TASK,TASK` evaluates on tasks of lm-evaluation-harness instead (extra [lm_eval]),
`--harness_tasks=FOLDER` adds your own, one YAML file each; see evaluation/harness.py.
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import dataclasses
import json
import math
from collections.abc import Sequence

from absl import flags

from t5x_lite import cli, files, init_from, log, report
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.checkpoints.best import BEST
from t5x_lite.config import RunConfig, to_json
from t5x_lite.errors import UserError
from t5x_lite.evaluation.evaluator import Evaluator
from t5x_lite.parallel import processes


def steps_to_evaluate(workdir: files.Path, step: str) -> list[int | str]:
    """The committed steps that "all" or a number names, rising; "last" stays a word, because it
    falls back to the step before where the newest cannot be read, and "best" for the manager to
    find."""
    steps = manager.all_steps(workdir)
    if not steps:
        raise UserError(f"--workdir={workdir} holds no checkpoint.")
    if step == "all":
        return steps
    if step in ("last", BEST):
        return [step]
    if not step.isdigit() or int(step) not in steps:
        raise UserError(f"--step={step}: must be all, last, best or one of {steps}.")
    return [int(step)]


def run(config: RunConfig, workdir: files.Path | None, steps: Sequence[int | str]
        ) -> dict[int, dict[str, dict[str, float]]]:
    """{step: {task: metrics}} of checkpoints of a workdir; None: of init_from, as each step.

    Raises:
        UserError: nothing to evaluate, or processes that were started differently.
    """
    processes.check_agree({"--workdir": str(workdir), "--step": list(steps),
                           "config": json.loads(to_json(config))})
    program = build(config)
    results = {}
    with program.activate():
        evaluator = Evaluator(program)
        if not evaluator.has_data:
            raise UserError("nothing to evaluate on: set data.validation to a task, or "
                            "data.validation_files to text files.")
        for step in steps:
            params, read_step = init_from.restore(program, workdir, step)
            results[read_step] = evaluator.evaluate(params)
            for task, values in results[read_step].items():
                log.say(report.evaluation_line(read_step, task, values))
    return results


@dataclasses.dataclass(frozen=True)
class Harness:
    """What the --harness flags ask for."""

    tasks: Sequence[str]
    folder: str = ""                # of further tasks as YAML
    arguments: str = ""             # of the model, "max_length=512,start=True"
    limit: int = 0                  # examples a task; 0: all
    num_fewshot: int | None = None   # None: as the tasks say


def run_harness(config: RunConfig, workdir: files.Path | None, steps: Sequence[int | str],
                asked: Harness) -> dict[int, dict[str, dict[str, float]]]:
    """As `run`, on tasks of lm-evaluation-harness; says its table of each step."""
    from t5x_lite.evaluation import harness  # an extra
    program = build(config)
    results = {}
    for step in steps:
        with program.activate():
            params, found = init_from.restore(program, workdir, step)
        model = harness.model_of(program, params, asked.arguments)
        results[found], table = harness.evaluate(model, asked.tasks, asked.folder, asked.limit,
                                                 asked.num_fewshot)
        log.say(f"step {found}, max_length={model.max_length}\n{table}")
    return results


def write(workdir: files.Path, results: dict[int, dict[str, dict[str, float]]]) -> None:
    """Appends one JSON line a step and task to WORKDIR/eval.jsonl."""
    if not log.is_main():
        return
    lines = []
    for step, tasks in results.items():
        for task, values in tasks.items():
            finite = {n: v if math.isfinite(v) else None for n, v in values.items()}
            lines.append(json.dumps({"step": step, "task": task, **finite}) + "\n")
    files.append(workdir / "eval.jsonl", "".join(lines))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run to evaluate.")
    _STEP = flags.DEFINE_string("step", "last", "all, last, best or the number of a step.")
    _HARNESS = flags.DEFINE_list("harness", [], "Tasks of lm-evaluation-harness, by commas.")
    _TASKS = flags.DEFINE_string("harness_tasks", "", "A folder of further ones as YAML files.")
    _ARGUMENTS = flags.DEFINE_string("harness_args", "", "max_length=N,max_gen_toks=N,start=True,…")
    _LIMIT = flags.DEFINE_integer("harness_limit", 0, "Examples a task of it; 0: all.")
    _FEWSHOT = flags.DEFINE_integer("harness_fewshot", None, "Solved examples before each.")
    _CONFIG = cli.define_config()

    def main() -> None:
        config, workdir = cli.saved_or_given(_WORKDIR.value, _CONFIG)
        steps = [0] if workdir is None else steps_to_evaluate(workdir, _STEP.value)
        if _HARNESS.value:
            results = run_harness(config, workdir, steps, Harness(
                _HARNESS.value, _TASKS.value, _ARGUMENTS.value, _LIMIT.value, _FEWSHOT.value))
        else:
            results = run(config, workdir, steps)
        if workdir is not None:
            write(workdir, results)

    cli.run(main)
