"""What a run shows: the header, the progress line, evaluation lines, completed samples.

As a command, `python -m t5x_lite.report WORKDIR… [--output=report.html]`, one page of any runs: curves
over steps, tokens, FLOPs or hours, final values with their ranges over seeds, settings that differ,
cost. It needs no network. A folder that holds runs, such as an experiment's, stands for all of them.
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from tqdm import tqdm

from t5x_lite import quiet, tree
from t5x_lite.build import Program
from t5x_lite.cost.flops import drawing_flops, rows_line
from t5x_lite.data import spans
from t5x_lite.log import is_main, say, si
from t5x_lite.training.metrics import METRIC


def header(program: Program) -> str:
    """What is about to run."""
    config = program.config
    mesh = ", ".join(f"{a}={n}" for a, n in program.mesh.shape.items() if n > 1) or "1 device"
    device = program.mesh.devices.flat[0]
    rows = config.train.global_batch_size
    learned, drawing = rows * config.objective.learned_per_row, drawing_flops(config, program.lengths, rows).total
    trains = [] if program.num_trainable == program.num_params else [
        ("trains", f"{program.num_trainable:,} by {config.peft.method}, "
                   f"{program.num_trainable / program.num_params:.2%} of the parameters")]
    averages = [] if not config.train.ema_decay else [
        ("average", f"of the parameters, decay {config.train.ema_decay:g} a step: evaluation and samples "
                    f"use {'it' if config.eval.ema else 'the last parameters, not it (eval.ema)'}")]
    after = config.optimizer.delay_after
    delays = [] if after is None else [
        ("delayed", f"from step {after + 2:,} on every update uses the gradients of the step before "
                    "(optimizer.delay_after)")]
    lines = [
        ("run", f"{config.name}: {config.model.architecture}, {config.objective.name}, "
                f"{config.optimizer.name}, {config.precision}"),
        ("parameters", f"{program.num_params:,} "
                       f"({program.num_non_embedding_params:,} non-embedding)"),
        *trains,
        ("devices", f"{program.mesh.size} x {_kind(device)}, mesh {mesh}, "
                    f"{jax.process_count()} process{'es' if jax.process_count() > 1 else ''}"),
        ("step", f"{rows_line(config, program.lengths, rows)} = "
                 f"{learned * program.tokens_per_sequence:,} tokens, "
                 f"{si(learned * program.flops_per_sequence, 'FLOP')}"
                 + (f", and {si(drawing, 'FLOP')} to draw and measure them" if drawing else "")),
        ("steps", f"{config.train.num_steps:,}"),
        *averages,
        *delays,
        *[("warning", text) for text in [unused_accelerator(device.platform)] if text],
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in lines)


def _kind(device: jax.Device) -> str:
    """"cpu", or "NVIDIA H100 (gpu)": what a device is, and JAX's platform that runs it."""
    kind, platform = device.device_kind, device.platform
    return kind if kind == platform else f"{kind} ({platform})"


# What an accelerator leaves on a Linux machine, and the extra of setup.py that uses it.
_TRACES = (("an NVIDIA GPU", quiet.NVIDIA, "cuda"),
           ("an AMD GPU", ("/dev/kfd",), ""),
           ("a TPU", ("/dev/accel0", "/dev/vfio/0"), "tpu"))


def unused_accelerator(platform: str, exists: Callable[[str], bool] = os.path.exists) -> str:
    """A sentence where a run on the CPU could use an accelerator that the machine seems to have.

    platform: of the run's devices, as jax.Device says. "" where there is nothing to say.
    """
    if platform != "cpu":
        return ""
    for name, files, extra in _TRACES:
        if any(map(exists, files)):
            chosen = os.environ.get("JAX_PLATFORMS")
            why = f"JAX_PLATFORMS={chosen} is set" if chosen else (
                f"install JAX for it{f' (pip install t5x_lite[{extra}])' if extra else ''}")
            return f"this machine seems to have {name}, but the run is on the CPU: {why}"
    return ""


def _terminal_width() -> int:
    """Columns of the terminal that standard error is, 0 where it is none (or hides them)."""
    return os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0


class Progress:
    """A live line on a terminal, else a plain line every log_every steps."""

    def __init__(self, start: int, total: int, tokens_seen: Callable[[], int]):
        """tokens_seen: how many the run has seen up to now."""
        self._bar = None
        self._tokens_seen = tokens_seen
        self._total = total
        self.restart_clock(start)
        if is_main() and _terminal_width():
            self._bar = tqdm(
                total=total, initial=start, dynamic_ncols=True, mininterval=0.2,
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}, {remaining} left")

    def update(self, step: int, loss: float, log: bool) -> None:
        """Shows that `step` steps are done."""
        seconds = time.perf_counter() - self._began
        tokens = self._tokens_seen() - self._tokens_before
        rate = tokens / max(seconds, 1e-9)
        shown = f"loss {loss:.3f}, {si(rate, 'tokens/s') if rate else 'compiled'}"
        if self._bar is not None:
            self._bar.set_description_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif log:
            left = seconds / max(step - self._first, 1) * (self._total - step)
            say(f"step {step}/{self._total}  {shown}, {tqdm.format_interval(left)} left")

    def restart_clock(self, step: int) -> None:
        """Leaves what has passed (compilation, evaluation) out of the rates."""
        self._first, self._began = step, time.perf_counter()
        self._tokens_before = self._tokens_seen()

    def close(self) -> None:
        """Ends the live line."""
        if self._bar is not None:
            self._bar.close()


def evaluation_line(step: int, task: str, metrics: Mapping[str, float]) -> str:
    """One task's held-out metrics in one line."""
    text = f"eval {task} at step {step}: loss {metrics['loss']:.4f} "
    if "perplexity" in metrics:
        text += f"nats/token, accuracy {metrics['accuracy']:.2%}, perplexity {metrics['perplexity']:.4g}"
    else:
        text += ", ".join(["of a pair", *(f"{n} {v:.4g}" for n, v in metrics.items() if n != "loss")])
    if math.isfinite(metrics.get("bits_per_byte", math.nan)):
        text += f", {metrics['bits_per_byte']:.3f} bits/byte"
    if "unigram_entropy" in metrics:
        text += f"; unigram entropy of the targets {metrics['unigram_entropy']:.4f}"
    own = [f"{n.removeprefix(METRIC)} {v:.4g}" for n, v in metrics.items() if n.startswith(METRIC)]
    return f"{text}; {', '.join(own)}" if own else text


def samples(rows: Sequence[tuple[str, str, str]]) -> str:
    """(input, prediction, target) texts, one below the other, line ends shown as ⏎. Where spans are
    hidden, the passage as it was filled in, each span in brackets and the right one beside a wrong one."""
    blocks = []
    for row in rows:
        named = [("passage", spans.read(*row))] if spans.hidden(row[0]) else list(
            zip(("input", "predicted", "target"), row, strict=True))
        for name, text in named:
            shown = re.sub(r"\s*\n\s*", " ⏎ ", text.strip())
            blocks.append(textwrap.fill(shown, width=100, initial_indent=f"  {name:<10} ",
                                        subsequent_indent=" " * 13))
        blocks.append("")
    return "\n".join(blocks).rstrip()


def filled(held_out: Mapping[str, Mapping[str, float]]) -> str:
    """What share of hidden spans was filled exactly, beside what counting would reach; "" for tasks
    that do not measure it (data/spans.py)."""
    lines = []
    for task, metrics in held_out.items():
        found = {name: metrics.get(f"{METRIC}spans_{name}") for name in (
            "exact", "of_words", "most_frequent", "between_same_words")}
        if None not in found.values():
            lines.append(
                "{task}: {exact:.1f} % of the hidden spans are filled with the very words, "
                "{of_words:.1f} % with words. The training text's most frequent filling would be right "
                "in {most_frequent:.1f} %, its most frequent one between the same two words in "
                "{between_same_words:.1f} %.".format(task=task, **found))
    return "\n".join(textwrap.fill(line, 100) for line in lines)


if __name__ == "__main__":
    import sys

    from absl import flags

    from t5x_lite import cli
    from t5x_lite.reporting import page

    _OUTPUT = flags.DEFINE_string("output", "report.html", "The page to write.")
    _TITLE = flags.DEFINE_string("title", "", "Its heading; without one the folders' names.")
    # Folders stand before or between the flags, as files do on other command lines.
    _FOLDERS, _rest = cli.words(sys.argv[1:], ("output", "title"))
    sys.argv = [sys.argv[0], *_rest]

    def main() -> None:
        print(f"written: {page.write(_FOLDERS, _OUTPUT.value, _TITLE.value)}")

    cli.run(main, alone=True)


def param_report(program: Program) -> str:
    """The table of parameters and shardings, one line each."""
    rows = [("path", "shape", "dtype", "logical axes", "sharding", "init", "trains")]
    shapes = tree.flatten(program.abstract_params) | tree.flatten(
        program.abstract_state["params"])
    frozen = program.optimizer.frozen | (program.table.keys() - program.trainable.keys())
    for path, info in sorted({**program.table, **program.trainable}.items()):
        spec = shapes[path].sharding.spec
        rows.append((path, "x".join(map(str, info.shape)), str(jnp.dtype(info.dtype)),
                     ",".join(str(a) for a in info.logical_axes),
                     ",".join("+".join(d) if isinstance(d, tuple) else d or "-" for d in spec)
                     or "-", info.init, "no" if path in frozen else "yes"))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    return "\n".join([*lines, f"total {program.num_params:,} parameters"]) + "\n"
