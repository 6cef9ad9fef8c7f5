"""Time and memory of token mixers from 1k to 64k tokens, against attention, measured in one run.

    python scripts/bench_mixers.py --lengths=1024,4096,16384,65536

One layer's mixer of width 256 (heads of 64, a state of 64) on one row of float32 tokens: a forward and a
backward pass, jitted. Prints CPU seconds of all cores (the least of --repeats, after one that is not timed; a
busy machine changes them little), the temporaries that XLA allocates for it (memory_analysis of the compiled pass, no measurement) and both
relative to attention by chunks at the same length. A line says the machine. Attention over more tokens than
--most_attention is compiled, for its memory, and not run.
"""

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
PLAIN_UP_TO = 4096   # tokens whose L * L logits of 4 heads are kept for the backward pass


def machine() -> str:
    """The processor's name, as Linux says it."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def main() -> None:
    import jax
    import jax.numpy as jnp

    from t5x_lite.layers.config import (
        AttentionConfig,
        InitConfig,
        MixerConfig,
        PositionConfig,
        SparseConfig,
    )
    from t5x_lite.layers.masks import Masking
    from t5x_lite.models.blocks import MIXERS
    from t5x_lite.models.config import BlockConfig, StackConfig

    heads = WIDTH // HEAD
    attentions = {
        "attention": AttentionConfig(heads, HEAD, implementation="chunked"),
        "attention, plain": AttentionConfig(heads, HEAD, implementation="plain"),
        "longformer": AttentionConfig(heads, HEAD, kind="longformer", window=256),
        "bigbird": AttentionConfig(heads, HEAD, kind="bigbird", sparse=SparseConfig(
            block=64, global_tokens=128, random_blocks=3))}

    def compiled(name: str, length: int):
        """(the pass, its arguments)."""
        mixer = MixerConfig("attention" if name in attentions else name, head_dim=HEAD, max_length=length,
                            expand=1.0)
        block = BlockConfig(attentions.get(name, AttentionConfig(heads, HEAD)), mixer=mixer)
        stack = StackConfig(causal=name not in ("longformer", "bigbird"), position=PositionConfig("none"))
        module = MIXERS[mixer.kind].module(jax.random.key(0), WIDTH, block, stack, InitConfig(), jnp.float32)
        index = jnp.arange(length)[None]
        masking = Masking(index, index, causal=stack.causal)
        x = jax.random.normal(jax.random.key(1), (1, length, WIDTH))

        def loss(module, x):
            return jnp.sum(jnp.sin(module(x, None, masking, None)[0]))
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(module, x).compile(), (module, x)

    print(f"{machine()}; width {WIDTH}, heads of {HEAD}, float32, forward and backward")
    print(f"{'tokens':>7}  {'mixer':<17} {'CPU s':>9} {'/ attention':>12} {'temporaries MiB':>16} {'/ attention':>12}",
          flush=True)
    limits = {"attention, plain": PLAIN_UP_TO, "gmlp": _MOST.value}
    names = _KINDS.value or [*attentions, *(name for name in MIXERS if name != "attention")]
    for length in map(int, _LENGTHS.value):
        base = None
        for name in names:
            if length > limits.get(name, length):
                continue
            run, args = compiled(name, length)
            memory = run.memory_analysis().temp_size_in_bytes / 2**20
            taken = []
            for _ in range(_REPEATS.value + 1 if name != "attention" or length <= _MOST.value else 0):
                begin = time.process_time()
                jax.block_until_ready(run(*args))
                taken.append(time.process_time() - begin)
            seconds = min(taken[1:], default=float("nan"))
            base = base or (seconds, memory)
            print(f"{length:>7}  {name:<17} {seconds:>9.3f} {seconds / base[0]:>12.3f} {memory:>16.1f} "
                  f"{memory / base[1]:>12.3f}", flush=True)


if __name__ == "__main__":
    cli.run(main)
