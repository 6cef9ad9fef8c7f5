"""Decoding throughput against transformers' generate, on the same parameters.

    python scripts/bench_decode.py --config=configs/t5_1_1.py:small --batch=32 --lengths=128,64

A model with fresh parameters is converted into a temporary folder, which transformers loads.
Both decode the same random inputs greedily, float32, to the full length, in turns. Prints each
one's tokens/s (median over the rounds), how many of the tokens are equal, and the ratio; also
of CPU seconds. On a machine that does other work PyTorch's threads wait for one another, spinning,
and the ratio flatters us: `taskset -c 0 python scripts/bench_decode.py …` compares one core with
one core. Needs torch and transformers.
"""

import cpu_environment  # noqa: F401  first of all: it may start the script again

import os
import pathlib
import statistics
import tempfile
import time

from absl import flags

from t5x_lite import cli

_CONFIG = cli.define_config()
_BATCH = flags.DEFINE_integer("batch", 32, "Sequences decoded at once.")
_LENGTHS = flags.DEFINE_string("lengths", "128,64", "Input and output tokens.")
_SCAN = flags.DEFINE_bool("scan", False, "Scan the decoder's layers instead of unrolling them.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed runs of each, in turns, after one that is not.")


def main() -> None:
    import dataclasses

    import jax
    import numpy as np
    import torch
    import transformers

    from t5x_lite import steps, tree
    from t5x_lite.convert import hf
    from t5x_lite.decoding import DecodeConfig
    from t5x_lite.models import Model

    inputs_length, length = map(int, _LENGTHS.value.split(","))
    config = cli.run_config(_CONFIG).model
    config = dataclasses.replace(config, decoder=dataclasses.replace(
        config.decoder, scan=_SCAN.value))
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    # No token ends a sequence, so that both do all of the work.
    decode = jax.jit(steps.make_decode_step(model, DecodeConfig(max_length=length, eos_id=-1)))
    tokens = np.random.default_rng(0).integers(
        2, config.vocab_size, (_BATCH.value, inputs_length)).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        arrays = tree.flatten(params)
        hf.write_model(pathlib.Path(folder), config, {p: np.float32 for p in arrays},
                       lambda path: np.asarray(arrays[path]))
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id = None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tensor = torch.from_numpy(tokens).long()

    def run_ours():
        return np.asarray(decode(params, {"encoder_input_tokens": tokens}).tokens)[:, 0]

    @torch.no_grad()
    def run_theirs():
        return theirs.generate(tensor, attention_mask=torch.ones_like(tensor), do_sample=False,
                               num_beams=1, max_new_tokens=length).numpy()[:, 1:]

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


if __name__ == "__main__":
    cli.run(main)
