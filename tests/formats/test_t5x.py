"""Native T5X checkpoints: T5X's own logits from one, scanned ones, damage; Mesh TensorFlow's."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from t5x_lite import tree
from t5x_lite.errors import UserError
from t5x_lite.formats import mesh_tf, t5x
from t5x_lite.formats.mapping import Tensors
from t5x_lite.models.language_model import Model
from tests.formats import folders
from tests.models.test_models import logits_of, t5x_case


def params_of(model) -> dict[str, np.ndarray]:
    return {path: model.read(path) for path in model.table}


def assert_equal(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_golden_checkpoint_gives_t5xs_logits(tmp_path):
    model = t5x.read_model(str(folders.golden_t5x(tmp_path)))
    assert model.step == 1234
    _, expected_params, cases = t5x_case()
    params = params_of(model)
    assert_equal(params, folders.flat(expected_params))
    batch, expected = cases["plain"]
    found = jax.jit(functools.partial(logits_of, Model(model.config)))(tree.unflatten(params), batch)
    real = np.asarray(batch["decoder_target_tokens"]) != 0
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("axis,container,placeholders", [
    (1, "layers", False), (0, "layers", False), (1, "side", True)])
def test_scanned_equals_unscanned(tmp_path, axis, container, placeholders):
    arrays = folders.golden_arrays()
    _, expected, _ = t5x_case()
    folder = folders.write_t5x(tmp_path / "checkpoint_9",
                               folders.scanned(arrays, axis, container), placeholders)
    model = t5x.read_model(str(folder))
    assert (model.step, model.config.encoder.num_layers, model.config.decoder.num_layers) == (
        9, 3, 2)
    assert_equal(params_of(model), folders.flat(expected))


def test_three_dims_and_the_bits_of_bfloat16(tmp_path):
    arrays = folders.golden_arrays()
    rounded = {n: a.astype(ml_dtypes.bfloat16) for n, a in arrays.items()}
    stored = {n: a.view(np.uint16) for n, a in rounded.items()}
    for name, value in stored.items():
        if name.endswith(("query/kernel", "key/kernel", "value/kernel")):
            stored[name] = value.reshape(24, 3, 8)
        elif name.endswith("out/kernel"):
            stored[name] = value.reshape(3, 8, 24)
    model = t5x.read_model(str(folders.write_t5x(tmp_path / "x", stored)))
    path = "decoder/segment_0/block_0/cross_attention/out/kernel"
    assert model.dtype(path) == ml_dtypes.bfloat16
    np.testing.assert_array_equal(model.read(path), np.stack(
        [rounded[f"decoder/layers_{i}/encoder_decoder_attention/out/kernel"] for i in range(2)]))


def test_a_bias_a_layer_and_tied_relu_are_inferred(tmp_path):
    arrays = folders.golden_arrays()
    for side, depth in (("encoder", 3), ("decoder", 2)):
        bias = arrays.pop(f"{side}/relpos_bias/rel_embedding")
        for i in range(depth):
            arrays[f"{side}/layers_{i}/relative_posemb/rel_embedding"] = bias + i
            arrays[f"{side}/layers_{i}/mlp/wi/kernel"] = arrays.pop(
                f"{side}/layers_{i}/mlp/wi_0/kernel")
            del arrays[f"{side}/layers_{i}/mlp/wi_1/kernel"]
    del arrays["decoder/logits_dense/kernel"]
    model = t5x.read_model(str(folders.write_t5x(tmp_path / "x", folders.scanned(
        arrays, 1, "layers"))))
    assert model.config.decoder.position.per_layer
    assert model.config.encoder.segments[0].blocks[0].mlp.activation == "relu"
    assert model.config.tie_logits and model.config.logits_scale == 24 ** -0.5
    bias = model.read("decoder/segment_0/block_0/relative_position/embedding")
    np.testing.assert_allclose(bias[1] - bias[0], 1.0, atol=1e-6)


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no file named checkpoint"):
        t5x.read_model(str(tmp_path))
    arrays = folders.golden_arrays()
    del arrays["decoder/layers_1/mlp/wo/kernel"]
    arrays["encoder/layers_0/adapter/kernel"] = np.ones((2, 2), np.float32)
    folder = folders.write_t5x(tmp_path / "x", arrays)
    with pytest.raises(UserError) as error:
        t5x.read_model(str(folder))
    assert "missing   decoder/layers_1/mlp/wo/kernel" in str(error.value)
    assert "extra     encoder/layers_0/adapter/kernel" in str(error.value)

    folder = folders.write_t5x(tmp_path / "y", folders.golden_arrays())
    norm = folder / "target.encoder.encoder_norm.scale"
    (norm / "0").unlink()
    with pytest.raises(UserError, match=r"encoder_norm.scale/ has 0 of 1 chunks"):
        t5x.read_model(str(folder)).read("encoder/final_norm/scale")
    (norm / ".zarray").unlink()
    with pytest.raises(UserError, match=r"encoder_norm.scale/ is missing or damaged"):
        t5x.read_model(str(folder))
    (folder / "checkpoint").write_bytes(b"\x93no")
    with pytest.raises(UserError, match="is no index of a T5X checkpoint"):
        t5x.read_model(str(folder))


@pytest.mark.parametrize("place", ["PLACEHOLDER://../../outside", "PLACEHOLDER:///etc/passwd", "..",
                                   "PLACEHOLDER://", {"driver": "zarr", "kvstore": {"path": "a/.."}},
                                   3, {"driver": "zarr", "kvstore": 4, "path": "x\x00"}])
def test_an_index_that_leaves_its_folder_is_refused_unopened(tmp_path, place):
    folder = folders.write_t5x(tmp_path / "x", {"token_embedder/embedding": np.ones((4, 2))})
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(
        {"target": {"token_embedder": {"embedding": place}}}))
    with pytest.raises(UserError, match="Nothing was opened|is a int, not an array"):
        t5x.read_model(str(folder))


def test_a_decoder_only_checkpoint(tmp_path):
    """T5X's decoder-only example: the embedding stands in the decoder, all else as in T5's."""
    arrays = {n: a for n, a in folders.golden_arrays().items()
              if n.startswith("decoder/") and "encoder_decoder" not in n
              and "pre_cross" not in n}
    arrays["decoder/token_embedder/embedding"] = folders.golden_arrays()["token_embedder/embedding"]
    model = t5x.read_model(str(folders.write_t5x(tmp_path / "x", arrays)))
    assert model.config.architecture == "decoder_only" and not model.config.tie_logits
    np.testing.assert_array_equal(model.read("token_embedding/embedding"),
                                  arrays["decoder/token_embedder/embedding"])
    assert len(params_of(model)) == 13


def test_shapes_that_the_files_cannot_hold(tmp_path):
    arrays = {"token_embedder/embedding": np.ones((4, 2), np.float32)}
    folder = folders.write_t5x(tmp_path / "x", arrays)
    file = folder / "target.token_embedder.embedding" / ".zarray"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({**meta, "shape": [10 ** 7, 10 ** 5], "chunks": [10 ** 7, 10 ** 5]}))
    tensors, _ = t5x.read_folder(str(folder))
    with pytest.raises(UserError, match=r"said to hold 4.* TB, which its files"):
        tensors.read("token_embedder/embedding")
    for names, message in ((("decoder/layers_999999999/mlp/wo/kernel",), "and no decoder/layers_0"),
                           (("encoder/layers_0/x",), "holds no encoder/relpos_bias")):
        with pytest.raises(UserError, match=message):
            t5x.infer_config({"token_embedder/embedding": (4, 2), **dict.fromkeys(names, (2, 2))},
                             "x")


def test_buckets_are_read_through_tensorstore():
    assert t5x._kvstore("gs://t5-data/t5x/t5_1_1_base/checkpoint_1000000") == {
        "driver": "gcs", "bucket": "t5-data", "path": "t5x/t5_1_1_base/checkpoint_1000000/"}
    with pytest.raises(UserError, match="gs://BUCKET/PATH"):
        t5x._kvstore("s3://bucket/x")


# --- Mesh TensorFlow ------------------------------------------------------------------------------

def mesh_name(name: str) -> str:
    """The Mesh TensorFlow name of a T5X parameter, spelled out from the published list."""
    fixed = {"token_embedder/embedding": "shared/embedding",
             "decoder/logits_dense/kernel": "decoder/logits/kernel",
             "encoder/encoder_norm/scale": "encoder/final_layer_norm/scale",
             "decoder/decoder_norm/scale": "decoder/rms_norm/scale",
             "encoder/relpos_bias/rel_embedding":
                 "encoder/block_000/layer_000/SelfAttention/relative_attention_bias",
             "decoder/relpos_bias/rel_embedding":
                 "decoder/block_000/layer_000/SelfAttention/relative_attention_bias"}
    if name in fixed:
        return fixed[name]
    side, layer, *rest = name.split("/")
    block = f"{side}/block_{int(layer.removeprefix('layers_')):03d}"
    mlp = "layer_001" if side == "encoder" else "layer_002"
    kinds = {"attention": "layer_000/SelfAttention", "self_attention": "layer_000/SelfAttention",
             "encoder_decoder_attention": "layer_001/EncDecAttention"}
    norms = {"pre_attention_layer_norm": "layer_000", "pre_self_attention_layer_norm": "layer_000",
             "pre_cross_attention_layer_norm": "layer_001", "pre_mlp_layer_norm": mlp}
    if rest[0] in kinds:
        return f"{block}/{kinds[rest[0]]}/{rest[1][0]}"
    if rest[0] in norms:
        return f"{block}/{norms[rest[0]]}/layer_norm/scale"
    return f"{block}/{mlp}/DenseReluDense/{rest[1]}/kernel"


def mesh_arrays() -> dict[str, np.ndarray]:
    arrays = {mesh_name(n): a for n, a in folders.golden_arrays().items()}
    assert "decoder/block_001/layer_001/EncDecAttention/o" in arrays
    return {**arrays, "shared/embedding_slot_vr": np.ones(24, np.float32),
            "global_step": np.array(999, np.int64)}


def test_mesh_tensorflows_names():
    arrays = mesh_arrays()
    tensors = mesh_tf.by_t5x_names(Tensors(
        {n: a.shape for n, a in arrays.items()}, {n: a.dtype for n, a in arrays.items()},
        arrays.__getitem__))
    model = t5x.model_of("mtf:x", tensors, 999)
    assert_equal(params_of(model), folders.flat(t5x_case()[1]))
    with pytest.raises(UserError, match="adapter"):
        mesh_tf.t5x_name("encoder/block_000/layer_000/adapter/w")


def test_mesh_tensorflow_checkpoint_through_the_command(tmp_path):
    tf = pytest.importorskip("tensorflow")
    from t5x_lite import convert, init_from
    arrays = mesh_arrays()
    tf.raw_ops.SaveV2(prefix=str(tmp_path / "model.ckpt-999"), tensor_names=list(arrays),
                      shape_and_slices=[""] * len(arrays), tensors=list(arrays.values()))
    convert.run(f"mtf:{tmp_path / 'model.ckpt-999'}", str(tmp_path / "workdir"))
    model = init_from.read_workdir(str(tmp_path / "workdir"))
    assert model.step == 999
    assert_equal(params_of(model), folders.flat(t5x_case()[1]))
    with pytest.raises(UserError, match="holds no TensorFlow checkpoint"):
        convert.run(f"mtf:{tmp_path / 'nothing'}", str(tmp_path / "other"))
