"""Train: `python -m t5x_lite.train --config=configs/quickstart.py --workdir=DIR`.

The whole story of a run stands in `run`. Started again with the same command, it goes on
from the newest checkpoint of the workdir and ends as if it had never stopped.

    WORKDIR/config.json        the resolved config
            parameters.txt     every parameter with shape, logical axes and sharding
            metrics.jsonl      one line every train.log_every steps and every evaluation
            tensorboard/       the same for TensorBoard
            checkpoints/       see checkpoints/manager.py
"""

import dataclasses
import functools
import math
import pathlib
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import

# isort: split

import jax
from absl import flags
from jax.experimental import multihost_utils

from t5x_lite import init_from, log, report
from t5x_lite.build import Program, build, param_report
from t5x_lite.checkpoints.manager import Checkpointer, restore_or_init
from t5x_lite.config import RunConfig, to_json
from t5x_lite.cost import hardware, usage
from t5x_lite.data import (
    batches as data_batches,
    tasks as data_tasks,
    vocabulary as data_vocabulary,
)
from t5x_lite.errors import UserError
from t5x_lite.evaluation.evaluator import Evaluator
from t5x_lite.models.blocks import LOAD_ENTROPY
from t5x_lite.training import batch_ramp, metrics

# Load entropy of a mixture, as a share of a uniform load's, below which a run warns: 8 experts
# of which two share everything have a third.
COLLAPSED = 0.5


@dataclasses.dataclass
class _Stop:
    """Whether a SIGTERM asks the run to save and leave."""

    asked: bool = False
    previous: Any = None

    def __enter__(self) -> "_Stop":
        # With several processes JAX's coordination service owns SIGTERM, so that all of them
        # stop at the same step; a lone process must catch it itself.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)

    def _ask(self, *_) -> None:
        self.asked = True

    def now(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer in every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.asked


def run(config: RunConfig, workdir: str | pathlib.Path) -> dict[str, dict[str, float]]:
    """Trains until train.num_steps and returns the last held-out metrics.

    Raises:
        UserError: a config that cannot be, a workdir of another model, data that is missing
            or empty, a loss that is not finite.
    """
    workdir = pathlib.Path(workdir)
    program = build(config)
    train_data = data_batches.TrainIterator(
        config.data, objective=config.objective.rows,
        global_batch_size=config.train.global_batch_size,
        sharding=program.batch_sharding, seed=config.train.seed)
    data_vocabulary.check_vocabulary(data_tasks.vocabulary_of(config.data), config.model.vocab_size,
                          data_tasks.uses_sentinels(config.data, config.objective.rows))
    with Checkpointer(workdir, config.checkpoint) as checkpointer:
        start = functools.partial(init_from.start, program) if config.init_from else None
        state, iterator_states, _ = restore_or_init(
            checkpointer, program.abstract_state, program.init_state, start,
            functools.partial(init_from.frozen, program))
        if iterator_states is not None:
            train_data.restore(iterator_states)
        log.say(report.header(program))
        if log.is_main():
            rows = batch_ramp.sequences_before(config.train.batch_ramp,
                                              config.train.global_batch_size,
                                              config.train.num_steps)
            for line in data_tasks.describe_training(config.data, config.objective.rows, rows):
                log.say(f"data        {line}")
        _write_description(program, workdir)
        with program.activate(), _Stop() as stop:
            return _loop(program, workdir, checkpointer, train_data, state, stop)


def _write_description(program: Program, workdir: pathlib.Path) -> None:
    if log.is_main():
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(to_json(program.config) + "\n")
        (workdir / "parameters.txt").write_text(param_report(program))


def _loop(program: Program, workdir: pathlib.Path, checkpointer: Checkpointer,
          train_data: data_batches.TrainIterator, state: Mapping, stop: _Stop) -> dict[str, dict[str, float]]:
    """Steps, evaluations and checkpoints from the state's step to the last."""
    config = program.config
    first, last = int(state["step"]), config.train.num_steps
    config_json = to_json(config)
    evaluator = Evaluator(program)
    train_step = program.jit_train_step()
    held_out: dict[str, dict[str, float]] = {}
    with metrics.MetricsWriter(workdir, resume_step=first) as writer:
        before = metrics.read_metrics(workdir / "metrics.jsonl") if log.is_main() else []
        meter = _Log(program, writer, checkpointer, first, before)
        for step in range(first + 1, last + 1):
            rows = batch_ramp.batch_size_at(config.train.batch_ramp,
                                           config.train.global_batch_size, step - 1)
            state, sums = train_step(state, train_data.take(rows))
            # The device works on this step while the one before it is read and shown.
            meter.read_pending()
            meter.pending = (step, sums)
            stopping = step < last and stop.now(step)
            evaluating = step % config.eval.every == 0 or step == last
            saving = step % config.checkpoint.every == 0 or step == last or stopping
            if evaluating or saving:
                meter.read_pending()   # nothing is saved before its own loss was read as finite
            # Evaluated before it is saved: a kill in between repeats the evaluation, where the
            # other order would leave it out. A SIGTERM leaves no time for it.
            if evaluating and evaluator.has_data and not stopping:
                held_out = evaluator.evaluate(program.whole_params(state))
                for task, values in held_out.items():
                    log.say(report.evaluation_line(step, task, values))
                    writer.write(meter.stamp(step), values, prefix=f"eval/{task}/")
                meter.progress.restart_clock(step)
            if saving:
                checkpointer.save(step, state, train_data.state(), config_json)
            if stopping:
                checkpointer.wait()
                log.say(f"stopped by SIGTERM after step {step}, which is saved; the same "
                           f"command goes on from there")
                meter.close()
                return held_out
        meter.close()
    checkpointer.wait()
    if config.eval.samples and evaluator.has_data:
        log.say(report.samples(evaluator.samples(program.whole_params(state),
                                                    config.eval.samples)))
    return held_out


class _Log:
    """Reads metrics one step late, refuses a loss that is not finite, writes and shows."""

    def __init__(self, program: Program, writer: metrics.MetricsWriter,
                 checkpointer: Checkpointer, first: int, before: Sequence[Mapping]):
        """before: the lines of metrics.jsonl so far."""
        self.pending: tuple[int, Mapping] | None = None
        self._program = program
        self._writer = writer
        self._checkpointer = checkpointer
        train = program.config.train
        self._every = train.log_every
        self._sums: dict = {}
        self.progress = report.Progress(first, train.num_steps, self._tokens_seen)
        devices = list(program.mesh.devices.flat)
        used = next((line for line in reversed(before) if "chip_hours" in line), None)
        self._usage = usage.UsageMeter(
            devices[0].device_kind, num_chips=hardware.count_chips(devices),
            dtype=program.policy.matmul_dtype, num_processes=jax.process_count(), before=used)
        self._usage_step = first
        self._fresh = True
        self._warned: set[str] = set()

    def _rows_seen(self, step: int) -> int:
        train = self._program.config.train
        return batch_ramp.sequences_before(train.batch_ramp, train.global_batch_size, step)

    def _tokens_seen(self, step: int) -> int:
        return self._rows_seen(step) * self._program.tokens_per_sequence

    def stamp(self, step: int) -> dict[str, float]:
        """What every line of metrics.jsonl carries."""
        return {"step": step, "tokens_seen": self._tokens_seen(step),
                "flops": self._rows_seen(step) * self._program.flops_per_sequence,
                "non_embedding_params": self._program.num_non_embedding_params}

    def _used(self, step: int) -> dict[str, float | str]:
        """Chip-hours, energy, carbon and MFU, as usage.UsageMeter gives them."""
        rows = self._rows_seen(step) - self._rows_seen(self._usage_step)
        self._usage_step = step
        return self._usage.read(rows * self._program.flops_per_sequence)

    def read_pending(self) -> None:
        """Waits for the pending step's metrics and handles them."""
        if self.pending is None:
            return
        step, sums = self.pending
        self.pending = None
        sums = jax.device_get(sums)
        loss = float(sums["loss"][0]) / float(sums["loss"][1])
        if not math.isfinite(loss):
            self.progress.close()
            self._checkpointer.wait()
            good = self._checkpointer.latest()
            kept = f"the last good checkpoint is of step {good}" if good is not None else \
                "no checkpoint was saved yet"
            raise UserError(
                f"the loss of step {step} is {loss}; {kept}, and nothing was saved after it. "
                f"Lower optimizer.schedule.base_learning_rate (or lengthen its warm-up), set "
                f"optimizer.clip_norm=1.0, or use precision=float32, and run the same command.")
        self._sums = metrics.add(self._sums, sums)
        due = step % self._every == 0
        if due:
            means = metrics.divide(self._sums)
            self._writer.write({**self.stamp(step), **self._used(step)}, means, prefix="train/")
            self._sums = {}
            self._warn_of_collapse(step, means)
        if self._fresh:   # the first step's time is compilation
            self.progress.restart_clock(step)
            self._fresh = False
        self.progress.update(step, loss, due)

    def _warn_of_collapse(self, step: int, means: Mapping[str, float]) -> None:
        """Once for every layer whose experts have collapsed."""
        layers = {name.removeprefix(f"{LOAD_ENTROPY}/").replace("_", " layer "): mean
                  for name, mean in means.items() if name.startswith(f"{LOAD_ENTROPY}/")}
        fresh = {layer: mean for layer, mean in layers.items()
                 if mean < COLLAPSED and layer not in self._warned}
        if fresh:
            self._warned |= fresh.keys()
            listed = ", ".join(f"{layer} {mean:.2f}" for layer, mean in fresh.items())
            log.say(f"warning: at step {step} few experts get nearly all tokens (load entropy, "
                       f"1 where even: {listed}); raise moe.balance_weight or moe.jitter, or lower "
                       f"the learning rate")

    def close(self) -> None:
        """Reads what is left and ends the progress line."""
        self.read_pending()
        self.progress.close()
        if not self._fresh:
            log.say(f"used {usage.describe(self._used(self._usage_step))}")


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where the run writes, and resumes from.")

    def main() -> None:
        run(cli.run_config(_CONFIG), cli.workdir(_WORKDIR.value))

    cli.run(main)
