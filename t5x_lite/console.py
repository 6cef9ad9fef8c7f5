"""The console scripts: `t5x-lite-train …` is `python -m t5x_lite.train …`, from any folder."""

import functools
import os
import runpy
import sys


def _run(name: str) -> None:
    """Runs a door as `python -m` does. The working folder is searched last, so that a folder named
    tasks or configs there does not stand in for ours, while a user's own modules are found."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    runpy.run_module(f"t5x_lite.{name}", run_name="__main__", alter_sys=True)


train = functools.partial(_run, "train")
evaluate = functools.partial(_run, "eval")
infer = functools.partial(_run, "infer")
plan = functools.partial(_run, "plan")
convert = functools.partial(_run, "convert")
experiment = functools.partial(_run, "experiment")
report = functools.partial(_run, "report")
inspect_task = functools.partial(_run, "inspect_task")
audit = functools.partial(_run, "audit")
bias = functools.partial(_run, "bias")
