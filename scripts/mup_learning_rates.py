"""Where the best learning rate lies at two widths, standard against maximal-update parametrisation.

    python scripts/mup_learning_rates.py --optimizer=adamw --widths=64,512

A language model of two layers on the bytes of Python's own library, a few dozen steps at each of a
row of learning rates, each from the same parameters over the same rows. Prints the mean loss of the
last ten steps by rate, the best rate (of a parabola through the lowest three, in logarithms) and by
what factor it moves from the first width to the last.

One compilation serves all rates of a model: the schedule is a warm-up of a million steps to a rate
of 1, so that a run that begins at step 1,000 has a rate of 0.001.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import numpy as np

from t5x_lite.build import Program, build
from t5x_lite.config import RunConfig, TrainConfig
from t5x_lite.data.config import DataConfig
from t5x_lite.layers.config import AttentionConfig, MLPConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig

_MILLION = 1_000_000
_LAST = 10          # steps whose losses are averaged
_DIVERGED = 6.0     # a loss above this, or none, counts as this; ln 256 is 5.55
RATES = {"adamw": range(4, 11), "muon": range(2, 10), "adafactor": range(1, 9)}   # 2^-k


def run_config(optimizer: str, width: int, base: int, rows: int, length: int) -> RunConfig:
    """base: of mup; 0: the standard parametrisation."""
    block = BlockConfig(AttentionConfig(num_heads=width // 32, head_dim=32),
                        mlp=MLPConfig(mlp_dim=2 * width))
    decoder = StackConfig((SegmentConfig((block,), 2),), causal=True)
    model = ModelConfig("decoder_only", 256, width, None, decoder, base_width=base,
                        parametrization="mup" if base else "standard")
    schedule = ScheduleConfig("constant * linear_warmup", 1.0, warmup_steps=_MILLION)
    return RunConfig(model=model, objective=ObjectiveConfig(name="lm"),
                     data=DataConfig(targets_length=length),
                     optimizer=OptimizerConfig(optimizer, schedule),
                     train=TrainConfig(num_steps=_MILLION, global_batch_size=rows))


def bytes_of_python() -> np.ndarray:
    """int32: the bytes of the first modules of the standard library."""
    files = sorted(pathlib.Path(dataclasses.__file__).parent.glob("*.py"))[:60]
    return np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8).astype(np.int32)


def rows_of(text: np.ndarray, rng: np.random.Generator, rows: int, length: int) -> dict:
    """A batch of rows that begin anywhere."""
    starts = rng.integers(0, len(text) - length, rows)
    targets = np.stack([text[start:start + length] for start in starts])
    shifted = np.concatenate([np.zeros((rows, 1), np.int32), targets[:, :-1]], axis=1)
    return {"decoder_input_tokens": shifted, "decoder_target_tokens": targets,
            "decoder_loss_weights": np.ones(targets.shape, np.float32)}


def losses_by_rate(program: Program, rates: list[float], steps: int, seed: int
                   ) -> dict[float, float]:
    """{learning rate: mean loss of the last steps}."""
    text, train, found = bytes_of_python(), program.config.train, {}
    with program.activate():
        step = program.jit_train_step()
        for rate in rates:
            state = program.init_state()
            state["step"] = state["step"] + round(rate * _MILLION)
            rng, losses = np.random.default_rng(seed), []
            for _ in range(steps):
                state, sums = step(state, rows_of(text, rng, train.global_batch_size,
                                                  program.config.data.targets_length))
                losses.append(float(sums["loss"][0] / sums["loss"][1]))
            mean = float(np.mean(losses[-_LAST:]))
            found[rate] = mean if mean < _DIVERGED else _DIVERGED
    return found


def best_rate(found: dict[float, float]) -> float:
    """The lowest point of a parabola through the best rate and its neighbours; at an end, that."""
    logs = np.log2(sorted(found))
    losses = np.array([found[rate] for rate in sorted(found)])
    place = int(np.argmin(losses))
    if not 0 < place < len(losses) - 1:
        return float(2 ** logs[place])
    curve = np.polyfit(logs[place - 1:place + 2], losses[place - 1:place + 2], 2)
    return float(2 ** (-curve[1] / (2 * curve[0])))


def main() -> None:
    """Prints a line a model and rate, and the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", default="adamw", choices=RATES)
    parser.add_argument("--widths", default="64,512")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    widths = [int(width) for width in options.widths.split(",")]
    rates = [2.0 ** -power for power in RATES[options.optimizer]]
    best: dict[str, dict[int, float]] = {"standard": {}, "mup": {}}
    for width in widths:
        for kind in ("standard", "mup") if width != widths[0] else ("standard",):
            config = run_config(options.optimizer, width, widths[0] if kind == "mup" else 0,
                                options.rows, options.length)
            found = losses_by_rate(build(config, jax.devices()[:1]), rates, options.steps,
                                   options.seed)
            best[kind][width] = best_rate(found)
            print(f"{kind:<9} {width:>5}  best {best[kind][width]:.4g}  " + "  ".join(
                f"{rate:.4g}: {loss:.3f}" for rate, loss in found.items()), flush=True)
    best["mup"][widths[0]] = best["standard"][widths[0]]    # they are one model there
    moves = {kind: by[widths[0]] / by[widths[-1]] for kind, by in best.items()}
    print(json.dumps({"optimizer": options.optimizer, "best": best, "falls_by": moves}))


if __name__ == "__main__":
    main()
