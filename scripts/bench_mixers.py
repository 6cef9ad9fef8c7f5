"""Time and memory of token mixers from 1k to 64k tokens, against attention, measured in one run.

    python scripts/bench_mixers.py --lengths=1024,4096,16384,65536

One layer's mixer of width 256 (heads of 64, a state of 64) on one row of float32 tokens: a forward and a
backward pass, jitted. Prints CPU seconds of all cores (the least of --repeats, after one that is not timed; a
busy machine changes them little), the temporaries that XLA allocates for it (memory_analysis of the compiled pass),
what the process's resident memory rises by while it runs, results included, and each relative to attention by chunks
at the same length. A line says the machine. A first pass of more than LONG seconds is timed, and the only one.
Attention over more tokens than --most_attention is compiled, for its memory, and not run. "attention, plain" keeps
its L * L logits and ends at 4,096 tokens; gMLP has a matrix of L * L numbers and ends at 16,384.
"""

import ctypes
import pathlib
import platform
import time

import cpu_environment  # noqa: F401  first of all: it may start the script again
from absl import flags

from t5x_lite import cli

_LENGTHS = flags.DEFINE_list("lengths", ["1024", "4096", "16384", "65536"], "Tokens of the row.")
_KINDS = flags.DEFINE_list("kinds", [], "Rows of mixers.MIXERS, or kinds of attention; all where empty.")
_REPEATS = flags.DEFINE_integer("repeats", 2, "Passes timed.")
_MOST = flags.DEFINE_integer("most_attention", 16384, "Tokens up to which attention over all pairs is run.")
WIDTH, HEAD = 256, 64
# Tokens up to which L * L numbers fit: logits of 4 heads, kept for the backward pass; gMLP's matrix.
UP_TO = {"attention, plain": 4096, "gmlp": 16384}
LONG = 20.0   # CPU seconds
MIB = 2**20


def machine() -> str:
    """The processor's name, as Linux says it."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at its highest since `forget_highest`."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def forget_highest() -> int:
    """Has the allocator give back what is free, and the kernel count anew from here; the bytes now."""
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def attentions() -> dict:
    """{name: AttentionConfig} of the kinds of attention."""
    from t5x_lite.layers.config import AttentionConfig, SparseConfig
    heads = WIDTH // HEAD
    return {
        "attention": AttentionConfig(heads, HEAD, implementation="chunked"),
        "attention, plain": AttentionConfig(heads, HEAD, implementation="plain"),
        "longformer": AttentionConfig(heads, HEAD, kind="longformer", window=256),
        "bigbird": AttentionConfig(heads, HEAD, kind="bigbird", sparse=SparseConfig(
            block=64, global_tokens=128, random_blocks=3))}


def compiled(name: str, length: int) -> tuple:
    """(the pass, its arguments)."""
    import jax
    import jax.numpy as jnp

    from t5x_lite.layers.config import AttentionConfig, InitConfig, MixerConfig, PositionConfig
    from t5x_lite.layers.masks import Masking
    from t5x_lite.models.blocks import MIXERS
    from t5x_lite.models.config import BlockConfig, StackConfig
    attention = attentions().get(name)
    mixer = MixerConfig("attention" if attention else name, head_dim=HEAD, max_length=length, expand=1.0)
    block = BlockConfig(attention or AttentionConfig(WIDTH // HEAD, HEAD), mixer=mixer)
    stack = StackConfig(causal=name not in ("longformer", "bigbird"), position=PositionConfig("none"))
    module = MIXERS[mixer.kind].module(jax.random.key(0), WIDTH, block, stack, InitConfig(), jnp.float32)
    index = jnp.arange(length)[None]
    masking = Masking(index, index, causal=stack.causal)
    x = jax.random.normal(jax.random.key(1), (1, length, WIDTH))

    def loss(module, x):
        return jnp.sum(jnp.sin(module(x, None, masking, None)[0]))
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(module, x).compile(), (module, x)


def timed(run, args) -> tuple[float, float]:
    """(CPU seconds of a pass, MiB that the process rises by)."""
    import jax
    before, taken = forget_highest(), []
    while len(taken) <= _REPEATS.value and max(taken, default=0.0) < LONG:
        begin = time.process_time()
        jax.block_until_ready(run(*args))
        taken.append(time.process_time() - begin)
    return min(taken[1:] or taken), (resident("VmHWM") - before) / MIB


def main() -> None:
    from t5x_lite.models.blocks import MIXERS
    print(f"{machine()}; width {WIDTH}, heads of {HEAD}, float32, forward and backward")
    print(f"{'tokens':>7}  {'mixer':<17}" + "".join(
        f" {name:>16} {'/ attention':>12}" for name in ("CPU s", "temporaries MiB", "resident MiB")), flush=True)
    names = _KINDS.value or [*attentions(), *(name for name in MIXERS if name != "attention")]
    for length in map(int, _LENGTHS.value):
        base = None
        for name in names:
            if length > UP_TO.get(name, length):
                continue
            run, args = compiled(name, length)
            is_run = name != "attention" or length <= _MOST.value
            seconds, risen = timed(run, args) if is_run else (float("nan"), float("nan"))
            found = (seconds, run.memory_analysis().temp_size_in_bytes / MIB, risen)
            base = base or found
            print(f"{length:>7}  {name:<17}" + "".join(
                f" {value:>16.{digits}f} {value / of:>12.3f}" for value, of, digits in zip(
                    found, base, (3, 1, 1), strict=True)), flush=True)


if __name__ == "__main__":
    cli.run(main)
