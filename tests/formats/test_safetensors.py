"""Files equal to the safetensors library's, sharded folders, and damage."""

import json

import ml_dtypes
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.formats.safetensors import INDEX, Writer, read_folder

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.array(2.5, np.float16),
          "empty": np.zeros((0, 3), np.float32), "ids": np.arange(5)}


def write(folder, arrays, max_bytes=10 ** 9):
    writer = Writer(folder, {n: a.shape for n, a in arrays.items()},
                    {n: a.dtype for n, a in arrays.items()}, max_bytes)
    for name in reversed(arrays):
        writer.tensor(name)[...] = arrays[name]
    writer.close()


def assert_same(folder, arrays):
    found = read_folder(folder)
    assert found.shapes == {n: a.shape for n, a in arrays.items()}
    assert found.dtypes == {n: a.dtype for n, a in arrays.items()}
    for name, value in arrays.items():
        np.testing.assert_array_equal(found.read(name), value)


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    write(tmp_path, ARRAYS)
    found = library.load_file(tmp_path / "model.safetensors")
    assert found.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype
    (tmp_path / "theirs").mkdir()
    library.save_file(ARRAYS, tmp_path / "theirs" / "model.safetensors")
    assert_same(tmp_path / "theirs", ARRAYS)


def test_several_files_and_bfloat16(tmp_path):
    arrays = {f"t{i}": np.full((4, 2), i, ml_dtypes.bfloat16) for i in range(5)}
    write(tmp_path, arrays, max_bytes=32)   # 16 bytes each
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 80
    assert index["weight_map"]["t2"] == "model-00002-of-00003.safetensors"
    assert_same(tmp_path, arrays)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="not there: model-00003-of-00003.safetensors"):
        read_folder(tmp_path)


def test_pytorch_files(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)},
               tmp_path / "pytorch_model.bin")
    assert_same(tmp_path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3),
                           "b": np.ones(3, ml_dtypes.bfloat16)})


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data[:5], lambda data: b"", lambda data: b"<html>" + data,
    lambda data: data.replace(b'"F32"', b'"X32"')])
def test_damage_is_named(tmp_path, damage):
    write(tmp_path, ARRAYS)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match="model.safetensors is cut off or no safetensors file"):
        read_folder(tmp_path)


def test_an_empty_folder_says_what_was_sought(tmp_path):
    with pytest.raises(UserError, match="holds no model.safetensors"):
        read_folder(tmp_path)


def raw(folder, header, data=bytes(32)):
    """A file with a header of our own; text or what JSON makes of it."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(first, last, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize("header,message", [
    ({"a": entry(-16, 16, [8]), "b": entry(16, 32, [4])}, "shape"),
    ({"a": entry(0, 16, [4]), "b": entry(12, 32, [5])}, "b begins at byte 12, not at 16"),
    ({"a": entry(0, 16, [4]), "b": entry(0, 32, [8])}, "b begins at byte 0"),
    ({"a": entry(0, 12, [3]), "b": entry(16, 32, [4])}, "begins at byte 16, not at 12"),
    ({"a": entry(0, 28, [7])}, "tensors end at byte"),
    ({"a": entry(4, 32, [7])}, "a begins at byte 4"),
    ({"a": entry(0, 1, [1], "U8"), "b": entry(1, 29, [7]), "c": entry(29, 32, [3], "U8")},
     "no multiple of its 4 bytes"),
    ({"a": entry(0, 32, [2 ** 62, 2])}, "shape"),
    ({"a": entry(0, 32, [-2, -4])}, "shape"),
    ({"a": entry(0, 32, [8.0])}, "shape"),
    ({"a": entry(0, 32, [True, 8])}, "shape"),
    ({"a": {"dtype": "F32", "shape": [8]}}, "no dtype, shape and data_offsets"),
    ({"a": [1]}, "no dtype, shape and data_offsets"),
    ('{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}, "a": null}', "stands twice"),
    ("[" * 100_000, "no safetensors file"), ("[]", "no JSON object"), ("null", "no JSON object"),
])
def test_headers_that_lie_are_refused(tmp_path, header, message):
    raw(tmp_path, header)
    with pytest.raises(UserError, match=message):
        read_folder(tmp_path)


def test_a_header_that_is_longer_than_the_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")
    with pytest.raises(UserError, match="a header of 9223372036854775807 bytes in a file of 10"):
        read_folder(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "", ".", 7,
                                  None, "a\x00b", "..\\b"])
def test_an_index_that_leaves_its_folder_is_refused_unopened(tmp_path, name, monkeypatch):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    monkeypatch.setattr(np, "memmap", None)
    with pytest.raises(UserError, match="no name of a file in that folder. Nothing was opened"):
        read_folder(tmp_path)


def test_a_whole_file_beside_an_index_of_what_was_not_downloaded(tmp_path):
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(UserError, match="files that are not there: pytorch_model-00001"):
        read_folder(tmp_path)
    write(tmp_path, ARRAYS)
    assert_same(tmp_path, ARRAYS)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert_same(tmp_path, ARRAYS)


def test_an_index_and_files_of_different_models(tmp_path):
    write(tmp_path, {"a": np.ones(3, np.float32)})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b": "model-1.safetensors"}}))
    with pytest.raises(UserError, match="holds no b, which the index says it does"):
        read_folder(tmp_path)


def test_pytorch_files_that_are_not_a_dict_of_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / "pytorch_model.bin"
    weights = {"a": torch.nn.Parameter(torch.arange(6.0))}
    torch.save(weights, file)
    assert_same(tmp_path, {"a": np.arange(6, dtype=np.float32)})
    whole = file.read_bytes()
    for content, message in (
            ({"state_dict": weights, "epoch": 3}, "'state_dict' is a dict of 1 entries; 'epoch'"),
            ([weights], "holds a list"),
            ({"a": torch.zeros(1).expand(10 ** 12)}, "1,000,000,000,000 elements, of which few"),
            ({"a": torch.zeros(3, dtype=torch.complex64)}, "dtype torch.complex64")):
        torch.save(content, file)
        with pytest.raises(UserError, match=message):
            read_folder(tmp_path)
    for data in (whole[:-40], whole[:100], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(data)
        with pytest.raises(UserError, match="cut off or no file of PyTorch's") as error:
            read_folder(tmp_path)
        assert "weights_only" not in str(error.value)
    assert "git lfs pull" in str(error.value)
