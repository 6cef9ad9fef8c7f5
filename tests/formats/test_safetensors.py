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
