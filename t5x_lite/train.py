"""Train: `python -m t5x_lite.train --config=configs/quickstart.py --workdir=DIR`.

The whole story of a run stands in `run`. Started again with the same command, it goes on
from the newest checkpoint of the workdir and ends as if it had never stopped.

    WORKDIR/config.json        the resolved config
            configs/STEP.json  the one that held from that step on, where it changed on a resume
            parameters.txt     every parameter with shape, logical axes and sharding
            metrics.jsonl      one line every train.log_every steps and every evaluation
            tensorboard/       the same for TensorBoard
            data.txt           what is read: shares, epochs, what is cut
            samples.txt        held-out inputs that the finished model completed
            checkpoints/       see checkpoints/manager.py
            run.lock           one writer a workdir, see checkpoints/lock.py

What happens to a run from outside stands in running/: signals, steps that are not finite, a hang.
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import

# isort: split

import jax
from absl import flags

from t5x_lite import files, init_from, log, report
from t5x_lite.build import Program, build
from t5x_lite.checkpoints.best import BEST, Best
from t5x_lite.checkpoints.format import Record
from t5x_lite.checkpoints.manager import Checkpointer, Start, read_record, restore_or_init
from t5x_lite.config import RunConfig, from_mapping, saved as saved_config, to_json
from t5x_lite.cost import hardware, usage
from t5x_lite.data import (
    batches as data_batches,
    described,
    tasks as data_tasks,
    vocabulary as data_vocabulary,
)
from t5x_lite.errors import UserError
from t5x_lite.evaluation.evaluator import Evaluator
from t5x_lite.parallel import processes
from t5x_lite.rollouts import sampler
from t5x_lite.rollouts.sampler import Rollouts
from t5x_lite.running import changes
from t5x_lite.running.ahead import Ahead
from t5x_lite.running.clock import LOST, Clock, Watchdog, Where, lost_seconds
from t5x_lite.running.counts import Counts
from t5x_lite.running.health import Experts, Fault, Health, Step
from t5x_lite.running.profile import Profile
from t5x_lite.running.signals import Stop, stopped_status
from t5x_lite.training import batch_ramp, metrics, schedules, trackers
from t5x_lite.training.steps import FILLED, FINITE

JUDGE = "judge"   # in a checkpoint's progress: what rollouts judge by


@dataclasses.dataclass
class _Session:
    """What one life of a run works with."""

    program: Program
    workdir: files.Path
    clock: Clock
    stop: Stop
    checkpointer: Checkpointer
    train_data: data_batches.TrainIterator
    evaluator: Evaluator
    rollouts: Rollouts | None   # makes batches of what the data give; None: they are batches


def run(config: RunConfig, workdir: str | os.PathLike, clock: Clock | None = None
        ) -> dict[str, dict[str, float]]:
    """Trains until train.num_steps and returns the last held-out metrics.

    Args:
        clock: counts from the start of the process; None: from here.
    Raises:
        UserError: a config that cannot be, a workdir of another model or in use, processes that
            disagree, data that are missing or empty, a step that is not finite, a bucket that cannot
            be reached or written to.
        Stopped: a signal asked for the end, and the run is saved.
    """
    workdir, clock, where = files.path(workdir), clock or Clock(), Where()
    stopped_status(os.environ)   # refused at the start, not at the end
    processes.check_agree({"--workdir": str(workdir), "config": json.loads(to_json(config)),
                           "bytes of": functools.partial(data_tasks.file_sizes, config.data)})
    with (Stop() as stop,
          Watchdog(config.train.watchdog, clock, workdir, where=where,
                   process=jax.process_index()) as watchdog):
        data_vocabulary.check_there(config.data.vocabulary)
        program = build(config)
        with Checkpointer(workdir, config.checkpoint) as checkpointer:
            watchdog.saving_since = checkpointer.saving_since
            # Beside the data, which take TensorFlow's import and Python: XLA works outside both.
            state = Ahead(lambda: _state(program, checkpointer), "state and train step")
            train_data = data_batches.TrainIterator(
                config.data, objective=config.objective.given,
                global_batch_size=config.train.global_batch_size,
                sharding=program.batch_sharding, seed=config.train.seed)
            data_vocabulary.check_vocabulary(
                data_tasks.vocabulary_of(config.data), config.model.vocab_size,
                data_tasks.uses_sentinels(config.data, config.objective.given))
            # Else they begin where a checkpoint says.
            if checkpointer.latest() is None and not config.branch_from:
                train_data.read_ahead(_rows(config, step=1))
            with program.activate():
                evaluator = Evaluator(program)
                session = _Session(program, workdir, clock, stop, checkpointer, train_data,
                                   evaluator, sampler.make(program, init_from.restore))
                start, train_step = _resume(session, state)
                if session.rollouts is not None and start.record is not None:
                    session.rollouts.resume(start.record.progress.get(JUDGE, {}))
                _introduce(session, start.record)
                return _loop(session, start, train_step, where)


def _state(program: Program, checkpointer: Checkpointer) -> tuple[Start, Callable | None]:
    """The state that the run begins with, and the compiled step after it; None: there is none."""
    init_from_fn = functools.partial(init_from.start, program)
    start = restore_or_init(
        checkpointer, program.abstract_state, program.init_state,
        init_from_fn if program.config.init_from else None,
        functools.partial(init_from.frozen, program), program.config.branch_from)
    step = int(start.state["step"]) + 1
    return start, program.compile_train_step(_rows(program.config, step)) \
        if step <= program.config.train.num_steps else None


def _rows(config: RunConfig, step: int) -> int:
    """Sequences in the batch of a step, counted from 1."""
    return batch_ramp.batch_size_at(config.train.batch_ramp, config.train.global_batch_size, step - 1)


def _resume(session: _Session, state: Ahead) -> tuple[Start, Callable | None]:
    """What `_state` found, and the data at their place."""
    program, checkpointer = session.program, session.checkpointer
    try:
        with session.clock.during("compile"):   # what of it takes longer than the data
            start, train_step = state.result()
        if start.iterator_states is not None:
            session.train_data.restore(start.iterator_states)
        if start.branched and log.is_main():
            metrics.inherit(program.config.branch_from, session.workdir)
    except UserError as error:
        steps = checkpointer.all_steps()
        changed = _changed(read_record(checkpointer.directory, steps[-1]), program.config) \
            if steps else []
        listed = "".join(f"\n  {line}" for line in changed)
        raise UserError(f"{error}" + (f"\nChanged since that checkpoint:{listed}" if listed else "")
                        ) from error
    return start, train_step


def _introduce(session: _Session, record: Record | None) -> None:
    """Says what is about to run and what changed, and writes what describes the run."""
    program, workdir, config = session.program, session.workdir, session.program.config
    if not log.is_main():
        return
    log.say(f"{report.header(program)}\nfolder      {workdir}: metrics.jsonl, tensorboard, checkpoints")
    rows = batch_ramp.sequences_before(config.train.batch_ramp, config.train.global_batch_size,
                                       config.train.num_steps)
    mixture = described.describe_training(config.data, config.objective.given, rows)
    for line in mixture:
        log.say(f"data        {line}")
    changed = _changed(record, config) if record is not None else []
    for line in changed:
        log.say(f"changed     {line} (since step {record.step})")
    history = workdir / "configs"
    history.mkdir(parents=True, exist_ok=True)
    if record is not None and not files.names(history):   # a workdir of before the history
        files.write_whole(history / "0.json", json.dumps(record.config, indent=1) + "\n")
    text = to_json(config) + "\n"
    if record is None or changed:
        files.write_whole(history / f"{record.step if record else 0}.json", text)
    files.write_whole(workdir / "config.json", text)
    files.write_whole(workdir / "parameters.txt", report.param_report(program))
    files.write_whole(workdir / "data.txt", "\n".join(mixture) + "\n")


def _changed(record: Record, config: RunConfig) -> list[str]:
    """"field: old -> new" lines of what the config says otherwise than the checkpoint's."""
    old = record.config
    try:   # fields that the config did not have yet have their defaults
        old = json.loads(to_json(saved_config(old)))
    except UserError as error:   # of another version of this program
        log.say(f"the checkpoint's config is of another version: {error}")
    return changes.describe(old, json.loads(to_json(config)))


def _loop(session: _Session, start: Start, compiled: Callable | None, where: Where
          ) -> dict[str, dict[str, float]]:
    """Steps, evaluations and checkpoints from the state's step to the last."""
    program, config, state = session.program, session.program.config, start.state
    first, last = int(state["step"]), config.train.num_steps
    evaluator, ramp, compiled_rows = session.evaluator, program.jit_train_step(), _rows(config, first + 1)
    held_out, stopping, best, patience = {}, False, _best(session, start.record), config.eval.stop_after
    tracked = trackers.Trackers(config.track, session.workdir, json.loads(to_json(config)))
    with (metrics.MetricsWriter(session.workdir, first, tracked) as writer,
          Profile(config.train.profile_steps, session.workdir) as profile):
        meter = _Meter(session, writer, first, start.record)
        if first == 0:
            held_out = _evaluate_at_start(session, meter, best, state)
        for step in range(first + 1, last + 1):
            if best.is_over(patience):
                log.say(best.why_over(step - 1, patience))
                break
            where.step, where.rows = step, meter.counts.rows
            profile.before(step, state)
            train_step = compiled if _rows(config, step) == compiled_rows else ramp
            state = _step(session, meter, train_step, state, step)
            stopping = step < last and session.stop.now(step)
            evaluating = evaluator.has_data and not stopping and _due(config.eval.every, step, last)
            saving = stopping or _due(config.checkpoint.every, step, last)
            if evaluating or saving:
                meter.read_pending()   # nothing is saved before it is known to be finite
            # Evaluated before it is saved: a kill in between repeats the evaluation, where the
            # other order would leave it out. A signal leaves no time for it.
            if evaluating:
                held_out = _evaluate(session, evaluator, meter, state, step)
                saving |= best.calls_for_a_save(step, held_out, config.checkpoint.best != "", patience)
            if saving:
                _save(session, meter, best, state, step)
            if stopping:
                break
        with session.clock.during("save"):
            session.checkpointer.wait()
        meter.close()
    if stopping:
        raise session.stop.end(step)
    _finish(session, meter, best, state, held_out)
    return held_out


def _finish(session: _Session, meter: "_Meter", best: Best, state: Mapping,
            held_out: Mapping[str, Mapping[str, float]]) -> None:
    """What a run that is done says."""
    meter.refuse_a_run_without_updates()
    if best.metric:
        log.say(best.line())
    if session.program.config.eval.samples and session.evaluator.has_data:
        _show_samples(session, session.evaluator, state, held_out)


def _evaluate_at_start(session: _Session, meter: "_Meter", best: Best, state: Mapping
                       ) -> dict[str, dict[str, float]]:
    """Held-out metrics of before the first step, where they are asked for. What follows a metric needs
    them: a name that they do not have is refused now."""
    if not session.evaluator.has_data or not (session.program.config.eval.at_start or best.metric):
        return {}
    return best.check(_evaluate(session, session.evaluator, meter, state, 0))


def _best(session: _Session, record: Record | None) -> Best:
    """The best evaluation before this life of the run."""
    config = session.program.config
    metric = config.checkpoint.best or ("loss" if config.eval.stop_after else "")
    if metric and not session.evaluator.has_data:
        raise UserError("checkpoint.best and eval.stop_after follow a metric of held-out data, and there "
                        "are none: set data.validation or data.validation_files.")
    return Best.resumed(metric, record and record.progress.get(BEST),
                        session.checkpointer.all_steps() if config.checkpoint.best else None)


def _save(session: _Session, meter: "_Meter", best: Best, state: Mapping, step: int) -> None:
    meter.writer.sync()   # what the checkpoint comes after is there before it
    config, followed = session.program.config, {BEST: best.memory()} if best.metric else {}
    if session.rollouts is not None:
        followed |= {JUDGE: session.rollouts.memory()}
    session.checkpointer.keep_best(best.step if config.checkpoint.best else None)
    with session.clock.during("save"):
        session.checkpointer.save(step, state, session.train_data.state(), to_json(config),
                                  meter.memory() | followed)


def _due(every: int, step: int, last: int) -> bool:
    """Whether what happens every so many steps, and after the last one, happens now."""
    return step % every == 0 or step == last


def _show_samples(session: _Session, evaluator: Evaluator, state: Mapping,
                  held_out: Mapping[str, Mapping[str, float]]) -> None:
    """Prints what the model makes of a few held-out examples, and writes it to samples.txt."""
    program = session.program
    examples = evaluator.samples(program.evaluated_params(state), program.config.eval.samples)
    samples = "\n\n".join(filter(None, (report.samples(examples), report.filled(held_out))))
    log.say(samples)
    if log.is_main():
        files.write_whole(session.workdir / "samples.txt", samples + "\n")


def _step(session: _Session, meter: "_Meter", train_step: Callable, state: Mapping, step: int
          ) -> Mapping:
    """Dispatches a step, and reads the one before it while the device works."""
    train, clock = session.program.config.train, session.clock
    rows = _rows(session.program.config, step)
    with clock.during("data"):
        batch = session.train_data.take(rows)
        if session.rollouts is not None:
            batch = session.rollouts(state, batch)
    bound = meter.health.bound(step)
    # Without skipping the bound is no argument: the program is the one that plan rehearses.
    guard = (jax.numpy.float32(bound),) if train.bad_steps == "skip" else ()
    clock.enter("step" if session.stop.begun else "compile")
    state, sums = train_step(state, batch, *guard)
    session.stop.begun = True
    clock.enter("step")
    meter.read_pending()
    meter.pending = _Pending(step, rows * session.program.config.objective.learned_per_row, bound, sums)
    return state


def _evaluate(session: _Session, evaluator: Evaluator, meter: "_Meter", state: Mapping, step: int
              ) -> dict[str, dict[str, float]]:
    """Held-out metrics of the state, shown and written."""
    with session.clock.during("evaluation"):
        held_out = evaluator.evaluate(session.program.evaluated_params(state))
    for task, values in held_out.items():
        log.say(report.evaluation_line(step, task, values))
        meter.writer.write(meter.stamp(step), values, prefix=f"eval/{task}/")
    meter.progress.restart_clock(step)
    return held_out


class _Pending(NamedTuple):
    """A step that the device works on while the one before it is read."""

    step: int
    rows: int
    bound: float   # what its loss may be
    sums: Mapping


class _Meter:
    """Reads metrics one step late, judges each step, counts, writes and shows."""

    def __init__(self, session: _Session, writer: metrics.MetricsWriter, first: int,
                 record: Record | None):
        """record: of the checkpoint that the run resumes from."""
        self.pending: _Pending | None = None
        self.writer = writer
        self._session, self._program = session, session.program
        program, train = session.program, session.program.config.train
        memory = record.progress if record is not None else {}
        spent = memory.get("spent") or _spent_until(record, program)
        self.counts = Counts.resumed(spent, program.row_cost, memory.get("tokens"))
        self._parameters = program.parameter_counts
        self._batch, self._rate = 0, None   # of the last step that was read; none before the first
        self.health = Health(train, program.config.loss_scale.minimum, memory.get("health"))
        self._sums: dict = {name: tuple(pair) for name, pair in memory.get("sums", {}).items()}
        self._skipped_in_line = memory.get("skipped_in_line", 0)
        self.progress = report.Progress(first, train.num_steps, lambda: self.counts.tokens)
        lost = lost_seconds(session.checkpointer.before, memory)
        session.clock.add({**memory.get("seconds", {}), LOST: memory.get(
            "seconds", {}).get(LOST, 0.0) + lost})
        devices = list(program.mesh.devices.flat)
        self._usage = usage.UsageMeter(
            devices[0].device_kind, num_chips=hardware.count_chips(devices),
            dtype=program.policy.matmul_dtype, num_processes=jax.process_count(),
            before=memory.get("usage") or metrics.last_usage(session.workdir), lost_seconds=lost)
        self._flops_then, self._tokens_then = self.counts.flops, self.counts.tokens
        self._fresh = True
        self._experts = Experts()

    def memory(self) -> dict[str, Any]:
        """What the next life of the run goes on from, as JSON values; stands in the checkpoint."""
        return {"spent": self.counts.spent, "tokens": self.counts.token_counts,
                "sums": self._sums, "health": self.health.memory(),
                "skipped_in_line": self._skipped_in_line,
                "usage": self._usage.so_far(), "seconds": self._session.clock.seconds(),
                "saved_at": time.time()}

    def stamp(self, step: int) -> dict[str, float]:
        """What every line of metrics.jsonl carries, as running/counts.py says."""
        schedule = self._program.optimizer.config.schedule
        return {"step": step, **self.counts.stamp(), **self._parameters, "batch": self._batch,
                "lr": self._rate, "phase": schedules.phase(schedule, step - 1)}

    def _used(self) -> dict[str, float | str]:
        """Chip-hours, energy, carbon, MFU and tokens a second, as usage.UsageMeter gives them."""
        flops, self._flops_then = self.counts.flops - self._flops_then, self.counts.flops
        tokens, self._tokens_then = self.counts.tokens - self._tokens_then, self.counts.tokens
        return self._usage.read(flops, tokens)

    def read_pending(self) -> None:
        """Waits for the pending step's metrics and handles them.

        Raises:
            UserError: a bad step where the run must stop.
        """
        if self.pending is None:
            return
        (number, rows, bound, sums), self.pending = self.pending, None
        sums = dict(jax.device_get(sums))
        step = Step.read(number, sums, bound)
        del sums[FINITE]
        self.counts.add(rows, float(sums["loss"][1]), int(sums.pop(FILLED)[0]))
        self._batch = rows * self._program.tokens_per_sequence
        self._rate = float(sums["learning_rate"][0])
        fault = self.health.judge(step)
        if fault is not None and fault.stops:
            raise self._stopped_by(step, fault)
        if fault is None:
            self._session.checkpointer.verify(number - 1)
            self._sums = metrics.add(self._sums, sums)
        else:
            log.say(f"warning: {fault.what}; the step is skipped ({self.health.skipped:,} of "
                    f"{self.health.seen:,} so far)")
            # Only that it was skipped: what a bad step says of the model is in no mean.
            self._sums = metrics.add(self._sums, {"skipped": sums["skipped"]})
        self._skipped_in_line += step.skipped
        due = number % self._program.config.train.log_every == 0
        if due:
            self._write_line(number)
        if self._fresh:   # the first step's time is compilation
            self.progress.restart_clock(number)
            self._fresh = False
        self.progress.update(number, step.loss, due)

    def _write_line(self, step: int) -> None:
        means = metrics.divide(self._sums)
        self.writer.write({**self.stamp(step), **self._used(), **self._session.clock.metrics()},
                          means, prefix="train/")
        if warning := self._experts.warning(step, means):
            log.say(warning)
        every = self._program.config.train.log_every
        if self._skipped_in_line >= every and "loss_scale" in means:
            log.say(f"warning: all of the last {every} steps were skipped, because gradients "
                    f"overflow float16 (loss scale {means['loss_scale']:g} and falling)")
        self._sums, self._skipped_in_line = {}, 0

    def _stopped_by(self, step: Step, fault: Fault) -> UserError:
        """The error of a bad step, once what is on the disk is in order."""
        self.progress.close()
        checkpointer = self._session.checkpointer
        checkpointer.wait()
        aside = ""
        if step.speaks_against_the_state_before:
            # Skipped steps left the state as it was: all of their checkpoints hold the same.
            suspects = checkpointer.suspect(step.number - self.health.in_a_row)
            names = ", ".join(f"checkpoints/{n}.suspect" for n in suspects)
            aside = f" What was saved of the parameters that gave this is now {names}." \
                if suspects else ""
        good = checkpointer.latest()
        kept = f"the last good checkpoint is of step {good}, and nothing was saved after it" \
            if good is not None else "there is no good checkpoint, and a new start is from " \
            "the beginning"
        return UserError(f"{fault.what}; {kept}.{aside} {step.remedy}")

    def refuse_a_run_without_updates(self) -> None:
        """Raises UserError where every step of the run was skipped."""
        seen = self.health.seen
        if seen and self.health.skipped == seen:
            raise UserError(
                f"all {seen:,} steps were skipped, and nothing was learned. With precision=fp16 "
                "gradients overflowed at every loss scale tried: set loss_scale.initial and "
                "loss_scale.minimum lower, train longer, or use precision=bf16 or float32.")

    def close(self) -> None:
        """Reads what is left, ends the progress line and says what the run has used."""
        self.read_pending()
        self.progress.close()
        if not self._fresh:
            log.say(f"used {usage.describe(self._used())}; {self._session.clock.line()}")
            if self.health.skipped:
                log.say(f"{self.health.skipped:,} of {self.health.seen:,} steps were skipped")


def _spent_until(record: Record | None, program: Program) -> list[list[float]]:
    """The rows up to a checkpoint of before they were kept: by its own config."""
    if record is None:
        return []
    train = record.config["train"]
    ramp = from_mapping(batch_ramp.BatchRampConfig, train.get("batch_ramp", {}))
    rows = batch_ramp.sequences_before(ramp, train["global_batch_size"], record.step)
    return [[rows, program.tokens_per_sequence, program.flops_per_sequence]]


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where the run writes, and resumes from.")

    def main() -> None:
        run(cli.run_config(_CONFIG), cli.workdir(_WORKDIR.value), Clock(cli.process_start()))

    cli.run(main)
