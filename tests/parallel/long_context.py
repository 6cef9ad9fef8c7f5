"""One training step of a small causal model over 32,768 tokens: its loss and the peak memory.

    python -m tests.parallel.long_context IMPLEMENTATION LENGTH

prints a line of JSON. A process of its own, because a peak is a process's.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from t5x_lite.layers.config import AttentionConfig, InitConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model


def measure(implementation: str, length: int) -> dict:
    """{"loss", "gradient" (its norm), "peak_bytes" (resident), "start_bytes"} of one step."""
    attention = AttentionConfig(num_heads=2, head_dim=16, implementation=implementation)
    decoder = StackConfig(
        segments=(SegmentConfig((BlockConfig(attention, mlp=MLPConfig(64)),), 1),), causal=True,
        position=PositionConfig("t5_bias"), remat="full")
    config = ModelConfig("decoder_only", vocab_size=64, embed_dim=32, encoder=None,
                         decoder=decoder, init=InitConfig(embedding_std=0.5))
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, length), 1, 64)

    def loss(params, tokens):
        module = model.bind(params)
        hidden, _ = module({"decoder_input_tokens": tokens})
        logits = module.head(module.head_params(), hidden)
        targets = jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), 64)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, axis=-1))

    start = _peak()
    value, grads = jax.jit(jax.value_and_grad(loss))(params, tokens)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    return {"loss": float(value), "gradient": float(norm), "peak_bytes": _peak(),
            "start_bytes": start}


def _peak() -> int:
    # Not ru_maxrss, which a process inherits from the one that started it.
    (line,) = (x for x in pathlib.Path("/proc/self/status").read_text().splitlines()
               if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
