"""Longformer's and BigBird's attention: masks drawn by hand, against attention over all pairs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.build import build
from t5x_lite.config import RunConfig
from t5x_lite.cost import flops
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.layers import sparse_attention
from t5x_lite.layers.attention import SparseAttention
from t5x_lite.layers.config import AttentionConfig, InitConfig, PositionConfig, SparseConfig
from t5x_lite.layers.masks import Masking
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model
from t5x_lite.parallel import sharding
from t5x_lite.training.objectives import ObjectiveConfig

LONGFORMER = AttentionConfig(2, 4, kind="longformer", window=2, sparse=SparseConfig(global_tokens=1))
BIGBIRD = AttentionConfig(2, 4, kind="bigbird", sparse=SparseConfig(2, global_tokens=2, random_blocks=1))

# Queries down, keys across: nine tokens, a window of 2, the first is global.
DRAWN_LONGFORMER = """
*********
***......
****.....
*.***....
*..***...
*...***..
*....***.
*.....***
*......**
"""
# Ten tokens in five blocks of two, the first block is global; ? is the random block that the table has.
DRAWN_BIGBIRD = """
**********
**********
******....
******....
********..
********..
**..******
**..******
**....****
**....****
"""


def drawn(text):
    return np.array([[c == "*" for c in line] for line in text.split()])


def with_random(mask, config):
    """The mask and each block's random blocks."""
    block = config.sparse.block
    table = sparse_attention.block_table(len(mask) // block, config.sparse.random_blocks, 0)
    mask = mask.copy()
    for i, others in enumerate(table[:, 3:]):
        for j in others[others >= 0]:
            mask[i * block:(i + 1) * block, j * block:(j + 1) * block] = True
    return mask


def by_all_pairs(q, k, v, mask):
    logits = jnp.where(mask, jnp.einsum("BNLH,BNSH->BNLS", q, k), -1e10)
    return jnp.einsum("BNLS,BNSH->BNLH", jax.nn.softmax(logits), v)


CASES = {"longformer": (LONGFORMER, drawn(DRAWN_LONGFORMER)),
         "bigbird": (BIGBIRD, with_random(drawn(DRAWN_BIGBIRD), BIGBIRD))}


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_drawn_mask(name):
    """Outputs and gradients; two packed examples and padding in the second row."""
    config, mask = CASES[name]
    length = len(mask)
    rng = np.random.default_rng(0)
    q, k, v, dy = (jnp.asarray(rng.normal(size=(2, 2, length, 4)), jnp.float32) for _ in range(4))
    segments = np.ones((2, length), np.int32)
    segments[1, 4:], segments[1, 7:] = 2, 0
    same = segments[:, :, None] == segments[:, None, :]

    def both(fn):
        y, pull = jax.vjp(fn, q, k, v)
        return y, *pull(dy)

    found = jax.jit(lambda: both(lambda q, k, v: sparse_attention.attend(
        q, k, v, jnp.asarray(segments), config)))()
    expected = jax.jit(lambda: both(lambda q, k, v: by_all_pairs(q, k, v, (mask & same)[:, None])))()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_random_blocks_are_others_and_the_same_every_time():
    table = sparse_attention.block_table(8, 2, 5)
    assert table.shape == (8, 5) and np.array_equal(table, sparse_attention.block_table(8, 2, 5))
    for block, row in enumerate(table):
        near = {n for n in (block - 1, block, block + 1) if 0 <= n < 8}
        assert {*row[:3]} - {-1} == near and not near & {*row[3:]} and len({*row[3:]}) == 2
    assert sparse_attention.block_table(3, 2, 0)[1].tolist() == [0, 1, 2, -1, -1]


def encoder(attention, position="learned", causal=False):
    stack = StackConfig((SegmentConfig((BlockConfig(attention),), 1),), causal=causal,
                        position=PositionConfig(position))
    sides = {"encoder": None, "decoder": stack} if causal else {"encoder": stack, "decoder": None}
    return ModelConfig("decoder_only" if causal else "encoder_only", vocab_size=32, embed_dim=8, **sides)


def test_a_mesh_of_8_equals_one_device():
    module = SparseAttention(jax.random.key(0), 8, LONGFORMER, PositionConfig("none"), InitConfig())
    x = np.random.default_rng(0).normal(size=(8, 9, 8)).astype(np.float32)
    segments = np.tile([1, 1, 1, 1, 2, 2, 2, 0, 0], (8, 1)).astype(np.int32)
    index = jnp.arange(9)[None]

    def run(x, segments):
        masking = Masking(index, index, segments, segments)
        return jax.grad(lambda x: jnp.sum(jnp.sin(module(x, None, masking, None)[0])))(x)
    expected = jax.jit(run)(x, segments)
    mesh, rules = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2)), sharding.Rules()
    place = functools.partial(sharding.named_sharding, mesh, rules)
    with sharding.activate(mesh, rules):
        found = jax.jit(run)(jax.device_put(x, place(("act_batch", None, None))),
                             jax.device_put(segments, place(("act_batch", None))))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.all(np.abs(found) > 0)


def test_a_split_length_is_refused_by_name():
    index = jnp.arange(8)[None]
    for config in (LONGFORMER, BIGBIRD):
        module = SparseAttention(jax.random.key(0), 8, config, PositionConfig("none"), InitConfig())
        with sharding.activate(sharding.make_mesh(sharding.MeshConfig(data=4, sequence=2)), sharding.Rules()):
            with pytest.raises(UserError, match=f"mesh.sequence splits rows, and kind='{config.kind}' .* mesh.sequence=1"):
                jax.eval_shape(lambda x, module=module: module(x, None, Masking(index, index), None),
                               jax.ShapeDtypeStruct((4, 8, 8), jnp.float32))


def test_flops_are_linear_in_the_length():
    for config, seen in ((LONGFORMER, 5), (BIGBIRD, 12)):
        for length in (64, 128):
            counted = flops.forward_flops(encoder(config), 3, length, 0)
            assert counted.attention == 4 * 3 * 2 * length * 4 * seen
    assert flops.forward_flops(encoder(BIGBIRD), 1, 8, 0).attention == 4 * 2 * 8 * 4 * 8


@pytest.mark.parametrize("config,message", [
    (encoder(LONGFORMER, causal=True), "kind='longformer' sees both ways, and is for encoders"),
    (encoder(BIGBIRD, "t5_bias"), "position.kind='t5_bias' acts on the logits .* Use one of none, rotary"),
    (encoder(dataclasses.replace(LONGFORMER, window=0)), "self_attention.window=0: must be at least 1"),
    (encoder(dataclasses.replace(BIGBIRD, window=3)), "window=3: of bigbird the window is three blocks"),
    (encoder(dataclasses.replace(LONGFORMER, sparse=SparseConfig(random_blocks=2))), "longformer has none"),
    (encoder(dataclasses.replace(BIGBIRD, implementation="chunked")), "implementation='chunked': .*Use 'auto'")])
def test_what_cannot_be_is_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        Model(config)


@pytest.mark.parametrize("config", [LONGFORMER, BIGBIRD], ids=lambda config: config.kind)
def test_packed_rows_are_refused_by_name(config):
    """The second example's global tokens and blocks would be those of the row."""
    run = RunConfig(model=encoder(config), objective=ObjectiveConfig("mlm"), data=DataConfig(packing=True))
    with pytest.raises(UserError, match=f"layers of self_attention.kind='{config.kind}', whose global tokens .*packing=False"):
        build(run, jax.devices()[:1])
    build(dataclasses.replace(run, data=DataConfig()), jax.devices()[:1])
