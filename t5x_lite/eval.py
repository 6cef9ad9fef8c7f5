"""Evaluate checkpoints: `python -m t5x_lite.eval --workdir=DIR --step=all|last|N`.

The config is the one that the workdir holds; `--override=a.b=c` changes a field of it
(data.validation, eval.num_batches, mesh.fsdp, …). Prints one line a task and step and
appends them to WORKDIR/eval.jsonl. Only parameters are read, on any mesh.

Without a workdir, a config's own init_from is evaluated (see init_from.py) and printed:
`python -m t5x_lite.eval --config=configs/t5_1_1.py:small --config.init_from=hf:DIR`.
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import json
import math
from collections.abc import Sequence

from absl import flags

from t5x_lite import cli, files, init_from, log, report
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.config import RunConfig
from t5x_lite.errors import UserError
from t5x_lite.evaluation.evaluator import Evaluator


def steps_to_evaluate(workdir: files.Path, step: str) -> list[int | str]:
    """The committed steps that "all" or a number names, rising; "last" stays a word, because it
    falls back to the step before where the newest cannot be read."""
    steps = manager.all_steps(workdir)
    if not steps:
        raise UserError(f"--workdir={workdir} holds no checkpoint.")
    if step == "all":
        return steps
    if step == "last":
        return [step]
    if not step.isdigit() or int(step) not in steps:
        raise UserError(f"--step={step}: must be all, last or one of {steps}.")
    return [int(step)]


def run(config: RunConfig, workdir: files.Path | None, steps: Sequence[int | str]
        ) -> dict[int, dict[str, dict[str, float]]]:
    """{step: {task: metrics}} of checkpoints of a workdir; None: of init_from, as each step."""
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
    _STEP = flags.DEFINE_string("step", "last", "all, last or the number of a step.")
    _CONFIG = cli.define_config()

    def main() -> None:
        config, workdir = cli.saved_or_given(_WORKDIR.value, _CONFIG)
        if workdir is None:
            run(config, None, [0])
        else:
            write(workdir, run(config, workdir, steps_to_evaluate(workdir, _STEP.value)))

    cli.run(main)
