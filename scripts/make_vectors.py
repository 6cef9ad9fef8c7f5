"""Makes tests/vectors/*.json: what the references' published formulas give on small inputs.

    python scripts/make_vectors.py

Each function is the formula as its paper, or T5X's documentation, states it: loops over Python and
numpy float64 numbers, without JAX and without a line of t5x_lite. tests/parity/test_vectors.py
compares; everybody can run it, while comparisons with the references' own outputs need files that
are not part of the repository. Inputs are stored beside the results.
"""

import fractions
import json
import math
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "tests" / "vectors"


def cross_entropy() -> dict:
    """T5X's loss: smoothed targets, less their own entropy, plus z_loss * (log Z)^2."""
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(size=(2, 5, 11)) * 3, 3)
    targets = rng.integers(0, 11, (2, 5))
    weights = rng.integers(0, 2, (2, 5))
    cases = []
    for z_loss, smoothing in ((0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-4, 0.3)):
        right, wrong = 1 - smoothing, smoothing / 10
        loss = z_part = 0.0
        for row, column in zip(*np.nonzero(weights), strict=True):
            x, target = logits[row, column], targets[row, column]
            log_z = math.log(sum(math.exp(v) for v in x))
            for token in range(11):
                q = right if token == target else wrong
                loss += -q * (x[token] - log_z) + (q * math.log(q) if q else 0.0)
            z_part += z_loss * log_z**2
        cases.append({"z_loss": z_loss, "label_smoothing": smoothing, "loss_sum": loss + z_part,
                      "z_loss_sum": z_part})
    return {"logits": logits.tolist(), "targets": targets.tolist(), "weights": weights.tolist(),
            "cases": cases}


def schedules() -> dict:
    """Factors of T5X's learning rates, multiplied: warm-up and decays of the square root, by steps."""
    steps = [0, 1, 5, 99, 100, 101, 250, 1000, 9999, 100_000]
    warmup, rate = 100, 0.5
    rising = [min(1.0, s / warmup) for s in steps]
    rsqrt = [1 / math.sqrt(max(s, warmup)) for s in steps]
    cases = {
        "constant * rsqrt_decay": [rate * r for r in rsqrt],
        "constant * linear_warmup * rsqrt_decay":
            [rate * w * r for w, r in zip(rising, rsqrt, strict=True)],
        "constant * rsqrt_normalized_decay": [rate * r * math.sqrt(warmup) for r in rsqrt],
        "constant * decay_every": [rate * 0.5 ** (s // 250) for s in steps],
    }
    return {"steps": steps, "warmup_steps": warmup, "base_learning_rate": rate,
            "decay_factor": 0.5, "steps_per_decay": 250, "cases": cases}


def buckets() -> dict:
    """T5's relative position buckets by exact arithmetic: half of them are distances themselves, the
    others grow geometrically up to the largest distance."""
    distances = sorted({*range(-40, 41), *(s * d for s in (-1, 1) for d in (
        48, 63, 64, 65, 90, 91, 127, 128, 129, 500))})
    cases = []
    for bidirectional, num_buckets, max_distance in ((True, 32, 128), (False, 32, 128),
                                                     (True, 16, 64), (False, 8, 20)):
        found = []
        for distance in distances:   # of the key from the query
            size = num_buckets // 2 if bidirectional else num_buckets
            start = size if bidirectional and distance > 0 else 0
            n = abs(distance) if bidirectional else max(-distance, 0)
            exact = size // 2
            if n >= exact:
                step = 0   # the largest with (max_distance / exact)**(step / others) <= n / exact
                ratio, whole = fractions.Fraction(n, exact), fractions.Fraction(max_distance, exact)
                while step < size - exact - 1 and whole ** (step + 1) <= ratio ** (size - exact):
                    step += 1
                n = exact + step
            found.append(start + n)
        cases.append({"bidirectional": bidirectional, "num_buckets": num_buckets,
                      "max_distance": max_distance, "buckets": found})
    return {"distances": distances, "cases": cases}


def router() -> dict:
    """Switch (top 1) and top 2 without renormalised gates, tokens served in order, first choices
    before second ones; Switch's balance loss and ST-MoE's z-loss."""
    rng = np.random.default_rng(1)
    num_experts, capacity = 4, 5
    logits = np.round(rng.normal(size=(2, 12, num_experts)) * 2, 3)
    cases = []
    for choices in (1, 2):
        placed, balance, z_loss = [], [], []
        for group in logits:
            p = [[math.exp(v) / sum(map(math.exp, x)) for v in x] for x in group]
            order = [sorted(range(num_experts), key=lambda e, x=x: -x[e])[:choices] for x in p]
            used, served = [0] * num_experts, []
            for choice in range(choices):
                for token, experts in enumerate(order):
                    expert = experts[choice]
                    if used[expert] < capacity:
                        served.append([token, expert, used[expert], p[token][expert]])
                    used[expert] += 1
            placed.append(served)
            first = [sum(e[0] == expert for e in order) / len(group) for expert in range(num_experts)]
            mean = [sum(x[expert] for x in p) / len(group) for expert in range(num_experts)]
            if choices == 1:
                balance.append(num_experts * sum(a * b for a, b in zip(first, mean, strict=True)))
            z_loss.append(sum(math.log(sum(map(math.exp, x))) ** 2 for x in group) / len(group))
        cases.append({"choices": choices, "served": placed, "balance": balance, "z_loss": z_loss})
    return {"logits": logits.tolist(), "capacity": capacity, "cases": cases}


def decoding() -> dict:
    """Greedy and beam search (Wu et al. 2016: log p / ((5 + length) / 6)^alpha) over the logits of a
    Markov chain; token 1 ends, and counts, and 0 begins."""
    rng = np.random.default_rng(200)   # whose greedy path ends, and is not the best
    vocab, length = 7, 8
    table = np.round(rng.normal(size=(vocab, vocab)) * 2, 2)
    log_p = [[v - math.log(sum(map(math.exp, row))) for v in row] for row in table]
    tokens, token = [], 0
    while len(tokens) < length and token != 1:
        token = max(range(vocab), key=lambda t: log_p[token][t])
        tokens.append(token)
    beams = []
    for size, alpha in ((2, 0.6), (4, 0.6), (4, 0.0)):
        live, done = [(0.0, ())], []
        for n in range(1, length + 1):
            longer = [(score + log_p[path[-1] if path else 0][t], (*path, t))
                      for score, path in live for t in range(vocab)]
            longer = sorted(longer, reverse=True)[:2 * size]
            done += [(s / ((5 + n) / 6) ** alpha, path) for s, path in longer if path[-1] == 1]
            done = sorted(done, reverse=True)[:size]
            live = [(s, path) for s, path in longer if path[-1] != 1][:size]
        beams.append({"beam_size": size, "alpha": alpha, "tokens": [p for _, p in done],
                      "scores": [s for s, _ in done]})
    return {"table": table.tolist(), "max_length": length, "greedy": tokens, "beams": beams}


def adafactor() -> dict:
    """20 updates of Shazeer and Stern 2018: factored second moments, clipping by the root mean
    square, steps relative to the parameter, decay 1 - t^-0.8."""
    rng = np.random.default_rng(3)
    rate, steps = 0.01, 20
    start = {"matrix": np.round(rng.normal(size=(6, 8)), 3), "vector": np.round(
        rng.normal(size=5) * 0.1, 3)}
    grads = [{name: np.round(rng.normal(size=x.shape), 2) for name, x in start.items()}
             for _ in range(steps)]
    rms = lambda x: math.sqrt(float(np.mean(x**2)))
    final = {}
    for name, x in start.items():
        x, row, column, v = x.copy(), np.zeros(x.shape[0]), np.zeros(x.shape[-1]), np.zeros(x.shape)
        for t, given in enumerate(grads, 1):
            g, decay = given[name], 1 - t**-0.8
            square = g**2 + 1e-30
            if x.ndim == 2:
                row = decay * row + (1 - decay) * square.mean(axis=1)
                column = decay * column + (1 - decay) * square.mean(axis=0)
                v = np.outer(row, column) / row.mean()
            else:
                v = decay * v + (1 - decay) * square
            update = g / np.sqrt(v)
            x = x - rate * max(1e-3, rms(x)) * update / max(1.0, rms(update))
        final[name] = x.tolist()
    return {"learning_rate": rate, "start": {n: x.tolist() for n, x in start.items()},
            "grads": [{n: g.tolist() for n, g in step.items()} for step in grads], "final": final}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for make in (cross_entropy, schedules, buckets, router, decoding, adafactor):
        text = json.dumps(make(), separators=(",", ":"))
        (FOLDER / f"{make.__name__}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
