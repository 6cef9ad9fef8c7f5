"""Times one train step of a config and compares it with what the machine can multiply.

    python scripts/bench_step.py --config=configs/t5_1_1.py:small --batch=8 \
        --lengths=512,114 --dtype=float32

Prints seconds a step (median and minimum), tokens/s, model FLOP/s and its share of the
matrix-multiplication peak measured in the same process between the steps, and what comes
before the first step: import, initialisation and compilation. `--scan` keeps the layer
scan; by default the layers are unrolled, which XLA's CPU backend runs faster. `--peer` takes turns with
a step of transformers' T5 of the same shapes in PyTorch, with its Adafactor; `--t5x=PYTHON` with one of
T5X in that interpreter (bench_t5x.py, whose environment bench_peers.py makes). A step of PyTorch that takes
longer than a minute, as bf16 does on chips without AVX-512, is taken once.
"""

import pathlib
import subprocess
import time

import cpu_environment  # noqa: F401  first of all: it may start the script again

START = time.perf_counter()

from absl import flags

from t5x_lite import cli

_CONFIG = cli.define_config()
_BATCH = flags.DEFINE_integer("batch", 8, "Sequences a step.")
_LENGTHS = flags.DEFINE_string("lengths", "512,114", "Encoder and decoder positions.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "A precision policy: float32, bf16, …")
_STEPS = flags.DEFINE_integer("steps", 5, "Steps timed, after one that is not.")
_PEER = flags.DEFINE_bool("peer", False, "Take turns with transformers' T5; needs both.")
_T5X = flags.DEFINE_string("t5x", "", "The Python of an environment with T5X: take turns with its step.")
_SCAN = flags.DEFINE_bool("scan", False, "Scan the layers instead of unrolling them.")


def measured_peak() -> float:
    """FLOP/s of the fastest of a few square float32 products."""
    import jax
    import jax.numpy as jnp
    n = 2048
    x = jnp.ones((n, n), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2.0 * n ** 3 / min(seconds)


def peers_step(config, inputs: int, targets: int):
    """A function that takes one step of transformers' T5 with the shapes of a T5 1.1 config."""
    import os

    import torch
    import transformers
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    block = config.encoder.segments[0].blocks[0]
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[_DTYPE.value]
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=config.vocab_size, d_model=config.embed_dim, d_ff=block.mlp.mlp_dim,
        d_kv=block.self_attention.head_dim, num_heads=block.self_attention.num_heads,
        num_layers=config.encoder.num_layers, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, dropout_rate=0.0, decoder_start_token_id=0,
        pad_token_id=0)).train()
    optimizer = transformers.Adafactor(model.parameters(), lr=1e-3, relative_step=False,
                                       scale_parameter=True)
    ids = torch.randint(2, config.vocab_size, (_BATCH.value, inputs))
    labels = torch.randint(2, config.vocab_size, (_BATCH.value, targets))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
    return step


def t5x_step():
    """A function that takes one step of T5X's trainer and returns its seconds, in a process of its own."""
    process = subprocess.Popen(
        [_T5X.value, pathlib.Path(__file__).with_name("bench_t5x.py"), "step", str(_BATCH.value),
         _LENGTHS.value, {"bf16": "bfloat16"}.get(_DTYPE.value, _DTYPE.value)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdin and process.stdout
    said = process.stdout.readline().strip()
    assert said == "ready", f"T5X's step does not begin in {_T5X.value}: it says {said!r}"

    def step() -> float:
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())
    return step


def main() -> None:
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from t5x_lite import config as configs
    from t5x_lite.build import build
    imported = time.perf_counter() - START

    jax.config.update("jax_enable_compilation_cache", False)   # what compiling takes is shown
    run = cli.run_config(_CONFIG)
    inputs, targets = map(int, _LENGTHS.value.split(","))
    run = configs.replace(run, "train.global_batch_size", _BATCH.value)
    run = configs.replace(run, "data.inputs_length", inputs)
    run = configs.replace(run, "data.targets_length", targets)
    run = configs.replace(run, "data.packing", False)
    run = configs.replace(run, "precision", _DTYPE.value)
    for side in ("encoder", "decoder"):
        if getattr(run.model, side) is not None:
            stack = dataclasses.replace(getattr(run.model, side), scan=_SCAN.value)
            run = configs.replace(run, f"model.{side}", stack)
    program = build(run)

    begin = time.perf_counter()
    state = jax.block_until_ready(program.init_state())
    initialised = time.perf_counter() - begin
    rng = np.random.default_rng(0)
    batch = {name: jax.device_put(
        jnp.ones(x.shape, x.dtype) if x.dtype == jnp.float32
        else jnp.asarray(rng.integers(2, run.model.vocab_size, x.shape), x.dtype), x.sharding)
        for name, x in program.abstract_batch().items()}
    with program.activate():
        begin = time.perf_counter()
        step = program.jit_train_step().lower(state, batch).compile()
        compiled = time.perf_counter() - begin
        peer = peers_step(run.model, inputs, targets) if _PEER.value else None
        t5x = t5x_step() if _T5X.value else None
        seconds, peaks, peers, t5xs = [], [], [], []
        for i in range(_STEPS.value + 1):
            if peer is not None and (not peers or peers[0] < 60):
                begin = time.perf_counter()
                peer()
                peers.append(time.perf_counter() - begin)
            if t5x is not None:
                t5xs.append(t5x())
            peaks.append(measured_peak())
            begin = time.perf_counter()
            state, sums = step(state, batch)
            jax.block_until_ready((state, sums))
            if i:
                seconds.append(time.perf_counter() - begin)
    median, best = float(np.median(seconds)), min(seconds)
    flops = program.flops_per_sequence * _BATCH.value
    tokens = program.tokens_per_sequence * _BATCH.value
    peak = max(peaks)
    print(f"{run.name}: {program.num_params:,} parameters, {_BATCH.value} x "
          f"{program.lengths}, {_DTYPE.value}, {jax.devices()[0].device_kind}")
    print(f"seconds a step   {median:.3f} (minimum {best:.3f} of {len(seconds)})")
    print(f"tokens/s         {tokens / median:,.0f}")
    print(f"model FLOP/s     {flops / median:.3g}, {flops / median / peak:.1%} of the "
          f"{peak:.3g} that a 2048^3 product reached in this run")
    if peers:
        theirs = float(np.median(peers[1:] or peers))
        print(f"transformers     {theirs:.3f} s a step in PyTorch, {theirs / median:.2f} times ours")
    if t5xs:
        theirs = float(np.median(t5xs[1:]))
        print(f"T5X              {theirs:.3f} s a step, {theirs / median:.2f} of ours")
    print(f"before step one  import {imported:.1f} s, init {initialised:.1f} s, "
          f"compile {compiled:.1f} s")


if __name__ == "__main__":
    cli.run(main)
