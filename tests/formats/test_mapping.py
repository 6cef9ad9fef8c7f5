"""Layouts drawn by hand, layer numbers, slices, and errors that list everything."""

import dataclasses

import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.formats.functions import differences
from t5x_lite.formats.mapping import (
    SAME,
    TRANSPOSED,
    Rule,
    Tensors,
    column_block,
    foreign_model,
    head_block,
    like_segments,
    place,
    read_parameter,
    write_parameter,
)
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model


def test_column_block_is_gpt2s_fused_qkv():
    fused = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    key = column_block(1, 3)
    np.testing.assert_array_equal(key.view(fused), [[3, 4], [9, 10]])
    np.testing.assert_array_equal(key.view(np.arange(6)), [2, 3])
    assert key.shape((2, 2)) == (2, 6) and key.shape((2,)) == (6,)


def test_head_block_is_neoxs_interleaved_qkv():
    # Two heads of two features over a width of 1: rows q q k k v v of head 0, then of head 1.
    fused = np.arange(12)[:, None]
    key = head_block(1, 3, num_heads=2)
    np.testing.assert_array_equal(key.view(fused).reshape(1, 4), [[2, 3, 8, 9]])
    np.testing.assert_array_equal(key.view(np.arange(12)).reshape(4), [2, 3, 8, 9])
    assert key.shape((1, 4)) == (12, 1) and key.shape((4,)) == (12,)


@pytest.mark.parametrize("layout,shape", [
    (SAME, (3, 4)), (TRANSPOSED, (3, 4)), (column_block(2, 3), (3, 4)), (column_block(0, 3), (4,)),
    (head_block(2, 3, 2), (3, 4)), (head_block(0, 3, 2), (4,))])
def test_what_is_written_through_a_layout_is_read_back(layout, shape):
    value = np.random.default_rng(0).normal(size=shape)
    tensor = np.zeros(layout.shape(shape))
    view = layout.view(tensor)
    view[...] = value.reshape(view.shape)
    np.testing.assert_array_equal(layout.view(tensor).reshape(shape), value)
    assert np.count_nonzero(tensor) == value.size


def decoder(*segments: SegmentConfig) -> ModelConfig:
    return ModelConfig("decoder_only", 8, 4, None, StackConfig(
        segments, causal=True, position=PositionConfig("rotary")), tie_logits=True)


BLOCK = BlockConfig(AttentionConfig(1, 4), mlp=MLPConfig(6, gated=False))
LOCAL = dataclasses.replace(BLOCK, self_attention=AttentionConfig(1, 4, window=2))
RULES = [Rule("token_embedding/embedding", "embed"), Rule("decoder/final_norm/scale", "norm"),
         Rule("decoder/*/pre_self_attention_norm/scale", "{n}.norm_1"),
         Rule("decoder/*/pre_mlp_norm/scale", "{n}.norm_2"),
         *(Rule(f"decoder/*/self_attention/{n}/kernel", f"{{n}}.{n}", TRANSPOSED)
           for n in ("query", "key", "value", "out")),
         *(Rule(f"decoder/*/mlp/{n}/kernel", f"{{n}}.{n}", TRANSPOSED) for n in ("wi", "wo"))]
ALTERNATING = decoder(SegmentConfig((BLOCK,), 1), SegmentConfig((LOCAL, BLOCK), 2))


def tensors_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """Zeros in the shapes of all foreign tensors of a model."""
    placed = place(RULES, config, Model(config).table, "toy")
    return {s.name: np.zeros(s.shape) for p in placed.values() for s in p.slots}


def as_tensors(arrays: dict[str, np.ndarray]) -> Tensors:
    return Tensors({n: a.shape for n, a in arrays.items()}, {n: a.dtype for n, a in arrays.items()},
                   arrays.__getitem__)


def test_layers_are_numbered_through_segments_and_repeats():
    placed = place(RULES, ALTERNATING, Model(ALTERNATING).table, "toy")
    numbers = {path: [slot.name for slot in p.slots] for path, p in placed.items()
               if path.endswith("wi/kernel")}
    assert numbers == {"decoder/segment_0/block_0/mlp/wi/kernel": ["0.wi"],
                       "decoder/segment_1/block_0/mlp/wi/kernel": ["1.wi", "3.wi"],
                       "decoder/segment_1/block_1/mlp/wi/kernel": ["2.wi", "4.wi"]}


def test_a_part_is_the_slice_of_the_whole_and_writing_undoes_reading():
    placed = place(RULES, ALTERNATING, Model(ALTERNATING).table, "toy")[
        "decoder/segment_1/block_1/mlp/wi/kernel"]
    arrays = {n: np.random.default_rng(int(n[0])).normal(size=(6, 4)) for n in ("2.wi", "4.wi")}
    whole = read_parameter(placed, arrays.__getitem__)
    np.testing.assert_array_equal(whole, [arrays["2.wi"].T, arrays["4.wi"].T])
    index = (slice(1, 2), slice(None), slice(2, 5))
    np.testing.assert_array_equal(
        read_parameter(placed, arrays.__getitem__, np.float32, index),
        whole[index].astype(np.float32))
    out = {n: np.zeros_like(a) for n, a in arrays.items()}
    write_parameter(placed, whole, out.__getitem__)
    assert all(np.array_equal(out[n], a) for n, a in arrays.items())


def test_all_tensors_that_do_not_fit_are_listed():
    arrays = tensors_of(ALTERNATING)
    arrays["3.quary"] = arrays.pop("3.query")
    arrays["0.wi"] = np.zeros((5, 4))
    with pytest.raises(UserError) as error:
        foreign_model("toy:x", ALTERNATING, Model(ALTERNATING).table, RULES, as_tensors(arrays), family="toy")
    text = str(error.value)
    assert "missing   3.query did you mean '3.quary'?" in text
    assert "extra     3.quary" in text
    assert "mismatch  0.wi: expected (6, 4), found (5, 4)" in text
    partial = foreign_model("toy:x", ALTERNATING, Model(ALTERNATING).table, RULES, as_tensors(arrays), family="toy",
                            partial=True)
    lost = Model(ALTERNATING).table.keys() - partial.table.keys()
    assert lost == {"decoder/segment_0/block_0/mlp/wi/kernel",
                    "decoder/segment_1/block_0/self_attention/query/kernel"}
    assert partial.unused == ("3.quary",)


def test_a_parameter_without_a_place_is_named():
    config = dataclasses.replace(ALTERNATING, tie_logits=False)
    with pytest.raises(UserError, match=r"toy has no place for .*\n  logits/kernel"):
        place(RULES, config, Model(config).table, "toy")


def test_equal_layers_follow_anothers_grouping():
    plain = decoder(SegmentConfig((BLOCK,), 5))
    grouped = like_segments(plain, ALTERNATING)
    assert [(len(s.blocks), s.repeats) for s in grouped.decoder.segments] == [(1, 1), (2, 2)]
    assert differences(plain, grouped) == []
    assert like_segments(ALTERNATING, plain) == ALTERNATING   # layers that differ stay
    assert differences(plain, ALTERNATING) == [
        "decoder.layers[1].self_attention.window: 0, there 2",
        "decoder.layers[3].self_attention.window: 0, there 2"]


def test_spelled_out_defaults_and_unused_fields_are_no_difference():
    spelled = dataclasses.replace(BLOCK, self_attention=AttentionConfig(1, 4, 1, scale=0.5))
    other = decoder(SegmentConfig((spelled,), 1))
    other = dataclasses.replace(other, decoder=dataclasses.replace(
        other.decoder, position=PositionConfig("rotary", num_buckets=7), scan=False,
        dropout_rate=0.1))
    assert differences(decoder(SegmentConfig((BLOCK,), 1)), other) == []
