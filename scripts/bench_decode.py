"""Decoding throughput against transformers' generate, on the same parameters.

    python scripts/bench_decode.py --config=configs/t5_1_1.py:small --batch=32 --lengths=128,64

A model with fresh parameters is converted into a temporary folder, which transformers loads.
Both decode the same random inputs greedily, or with `--beams=4` by beam search, in float32 or with
`--dtype=bfloat16` in that, to the full length, in turns. Prints each one's tokens/s (median over the
rounds), how many of the tokens are equal, and the ratio; also of CPU seconds. Then how long nothing
but the products with weights takes either library, one after the other: a decoder that did all else
in no time would have the ratio named last.
On a machine that does other work PyTorch's threads wait for one another, spinning,
and the ratio flatters us: `taskset -c 0 python scripts/bench_decode.py …` compares one core with
one core. Needs torch and transformers.
"""

import os
import pathlib
import statistics
import tempfile
import time

import cpu_environment  # noqa: F401  first of all: it may start the script again
from absl import flags

from t5x_lite import cli

_CONFIG = cli.define_config()
_BATCH = flags.DEFINE_integer("batch", 32, "Sequences decoded at once.")
_LENGTHS = flags.DEFINE_string("lengths", "128,64", "Input and output tokens.")
_SCAN = flags.DEFINE_bool("scan", False, "Scan the decoder's layers instead of unrolling them.")
_BEAMS = flags.DEFINE_integer("beams", 1, "Beams of beam search; 1 decodes greedily.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What both compute in.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed runs of each, in turns, after one that is not.")


def seconds_of_products(model, rows: int, beams: int, inputs_length: int, length: int) -> dict[str, float]:
    """Seconds in each library for the products of a transformers T5 with its weights."""
    import jax
    import jax.numpy as jnp
    import torch

    once, each = [], []     # over all input tokens, and at every output token
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            over_inputs = name.startswith("encoder") or "EncDecAttention.k" in name \
                or "EncDecAttention.v" in name
            (once if over_inputs else each).append(module.weight)

    def fastest(fn):
        seconds = []
        for _ in range(10):
            begin = time.perf_counter()
            fn()
            seconds.append(time.perf_counter() - begin)
        return min(seconds[1:])

    totals = dict.fromkeys(("XLA", "PyTorch"), 0.0)
    dtype = {torch.bfloat16: jnp.bfloat16}.get(each[0].dtype, jnp.float32)
    products = jax.jit(lambda xs, weights: [
        jnp.einsum("AD,FD->AF", xs[w.shape[1]], w, preferred_element_type=jnp.float32)
        for w in weights])
    for weights, tokens, times in ((once, rows * inputs_length, 1), (each, rows * beams, length)):
        xs = {w.shape[1]: torch.full((tokens, w.shape[1]), 0.01, dtype=w.dtype) for w in weights}
        arrays = ({n: jnp.asarray(x.float().numpy(), dtype) for n, x in xs.items()},
                  [jnp.asarray(w.detach().float().numpy(), dtype) for w in weights])
        with torch.no_grad():
            totals["PyTorch"] += times * fastest(
                lambda xs=xs, weights=weights: [xs[w.shape[1]] @ w.T for w in weights])
        totals["XLA"] += times * fastest(
            lambda arrays=arrays: jax.block_until_ready(products(*arrays)))
    return totals


def main() -> None:
    import dataclasses

    import jax
    import numpy as np
    import torch
    import transformers

    from t5x_lite import tree
    from t5x_lite.decoding.decode import DecodeConfig
    from t5x_lite.formats import hf
    from t5x_lite.models.language_model import Model
    from t5x_lite.training import steps

    inputs_length, length = map(int, _LENGTHS.value.split(","))
    config = cli.run_config(_CONFIG).model
    config = dataclasses.replace(config, decoder=dataclasses.replace(
        config.decoder, scan=_SCAN.value))
    model = Model(config, jax.numpy.dtype(_DTYPE.value))
    params = jax.jit(model.init)(jax.random.key(0))
    # No token ends a sequence, so that both do all of the work.
    decode = jax.jit(steps.make_decode_step(model, DecodeConfig(
        max_length=length, eos_id=-1, method="beam" if _BEAMS.value > 1 else "greedy",
        beam_size=_BEAMS.value, beam_rule="transformers", length_penalty=1.0)))
    tokens = np.random.default_rng(0).integers(
        2, config.vocab_size, (_BATCH.value, inputs_length)).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        arrays = tree.flatten(params)
        hf.write_model(pathlib.Path(folder), config, {p: np.float32 for p in arrays},
                       lambda path: np.asarray(arrays[path]))
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id = None
    theirs = theirs.to(getattr(torch, _DTYPE.value))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tensor = torch.from_numpy(tokens).long()

    def run_ours():
        return np.asarray(decode(params, {"encoder_input_tokens": tokens}).tokens)[:, 0]

    @torch.no_grad()
    def run_theirs():
        return theirs.generate(tensor, attention_mask=torch.ones_like(tensor), do_sample=False,
                               num_beams=_BEAMS.value, max_new_tokens=length).numpy()[:, 1:]

    runs = {"t5x_lite": run_ours, "transformers": run_theirs}
    outputs = {name: run() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS.value):
        for name, run in runs.items():
            begin, cpu_begin = time.perf_counter(), time.process_time()
            run()
            seconds[name].append(time.perf_counter() - begin)
            cpu_seconds[name].append(time.process_time() - cpu_begin)
    for name, times in seconds.items():
        print(f"{name:<13} {_BATCH.value * length / statistics.median(times):8.0f} tokens/s  "
              f"({min(times):.2f} to {max(times):.2f} s, {min(cpu_seconds[name]):.2f} CPU s)")
    equal = np.mean(outputs["t5x_lite"] == outputs["transformers"])
    ratio, cpu_ratio = (statistics.median(x["transformers"]) / statistics.median(x["t5x_lite"])
                        for x in (seconds, cpu_seconds))
    print(f"tokens equal  {equal:.1%}\nratio         {ratio:.2f} ({cpu_ratio:.2f} in CPU time)")
    alone = seconds_of_products(theirs, _BATCH.value, _BEAMS.value, inputs_length, length)
    shown = ", ".join(f"{seconds:.2f} s in {name}" for name, seconds in alone.items())
    best = statistics.median(seconds["transformers"]) / min(alone.values())
    print(f"products      {shown}: with all else free the ratio would be {best:.2f}")


if __name__ == "__main__":
    cli.run(main)
