"""Tiny runs for tests: models of a few thousand parameters and batches drawn from a seed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import tree
from t5x_lite.build import Program
from t5x_lite.config import RunConfig, TrainConfig
from t5x_lite.data.config import DataConfig
from t5x_lite.layers.config import AttentionConfig, MLPConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.schedules import ScheduleConfig

ROWS, INPUTS, TARGETS, VOCAB = 16, 12, 8, 64


def seq2seq(*, dropout: float = 0.0, scan: bool = True, remat: str = "none") -> RunConfig:
    """An encoder-decoder run: 2 + 2 layers of 4 heads."""
    attention = AttentionConfig(num_heads=4, head_dim=4, scale=1.0, dropout_rate=dropout)
    mlp = MLPConfig(mlp_dim=32, dropout_rate=dropout)
    common = {"dropout_rate": dropout, "scan": scan, "remat": remat}
    encoder = StackConfig((SegmentConfig((BlockConfig(attention, None, mlp),), 2),), **common)
    decoder = StackConfig((SegmentConfig((BlockConfig(attention, attention, mlp),), 2),),
                          causal=True, **common)
    return RunConfig(
        name="tiny", model=ModelConfig(vocab_size=VOCAB, embed_dim=16, encoder=encoder,
                                       decoder=decoder),
        data=DataConfig(inputs_length=INPUTS, targets_length=TARGETS),
        optimizer=OptimizerConfig(name="adafactor", schedule=ScheduleConfig(
            factors="constant", base_learning_rate=0.01)),
        train=TrainConfig(num_steps=4, global_batch_size=ROWS))


@functools.lru_cache
def _params(model: ModelConfig) -> dict:
    return jax.tree.map(np.asarray, jax.jit(Model(model).init)(jax.random.key(0)))


def params(config: RunConfig) -> dict:
    """The parameters of seed 0 as numpy, the same for scanned and unrolled stacks."""
    plain = {side: dataclasses.replace(stack, scan=True, remat="none")
             for side in ("encoder", "decoder")
             if (stack := getattr(config.model, side)) is not None}
    return _params(dataclasses.replace(config.model, **plain))


def place(values: dict, program: Program) -> dict:
    """A state of zeros (as Adafactor's is at first) with these parameters, on the mesh."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.abstract_state)
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding),
                        {**zeros, "params": values}, program.abstract_state)


def batch(rows: int = ROWS, seed: int = 0) -> dict[str, jnp.ndarray]:
    """Random tokens whose rows end in different amounts of padding."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(2, VOCAB, (rows, INPUTS))
    targets = rng.integers(2, VOCAB, (rows, TARGETS))
    for i in range(rows):
        inputs[i, INPUTS - i % 4:] = 0
        targets[i, TARGETS - i % 3:] = 0
    shifted = np.concatenate([np.zeros((rows, 1), int), targets[:, :-1]], axis=1)
    return {"encoder_input_tokens": jnp.asarray(inputs, jnp.int32),
            "decoder_input_tokens": jnp.asarray(shifted, jnp.int32),
            "decoder_target_tokens": jnp.asarray(targets, jnp.int32),
            "decoder_loss_weights": jnp.asarray(targets > 0, jnp.float32)}


def assert_close(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """max|a-b| / max|b| <= tolerance for every leaf."""
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, want in expected.items():
        error = np.max(np.abs(np.asarray(found[path], np.float64) - want))
        assert error <= tolerance * max(np.max(np.abs(want)), 1e-30), (path, error)
