"""Checkpoints of other libraries, written by hand for tests."""

import pathlib
import tarfile

import jax
import numpy as np
import tensorstore
from flax import serialization

from t5x_lite import tree
from t5x_lite.formats import hf
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.language_model import Model
from tests.helpers import golden


def golden_t5x(folder: pathlib.Path) -> pathlib.Path:
    """The T5X checkpoint among the reference outputs, unpacked."""
    with tarfile.open(golden("t5x_checkpoint_1234.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "checkpoint_1234"


def golden_arrays() -> dict[str, np.ndarray]:
    """{T5X's name: array} of its parameters."""
    data = np.load(golden("encdec_t5_1_1.npz"))
    return {n.removeprefix("params/"): data[n] for n in data if n.startswith("params/")}


def write_t5x(folder: pathlib.Path, arrays: dict[str, np.ndarray], placeholders: bool = False
              ) -> pathlib.Path:
    """A T5X checkpoint of these arrays; uint16 ones stand for the bits of bfloat16.

    Args:
        placeholders: the index names the arrays as orbax does, else as T5X does.
    """
    folder.mkdir(parents=True)
    index = {}
    for name, value in arrays.items():
        stored = f"target.{name.replace('/', '.')}"
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/{stored}/"}}
        store = tensorstore.open(spec, create=True, open=True, dtype=value.dtype,
                                 shape=value.shape).result()
        store.write(value).result()
        index[name] = f"PLACEHOLDER://{stored}" if placeholders else {
            "driver": "zarr", "kvstore": {"driver": "file", "path": f"{stored}/"},
            "metadata": {"shape": list(value.shape)}}
    root = {"target": tree.unflatten(index), "state": {"step": 7}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(
        root if placeholders else {"version": 3, "optimizer": root}))
    return folder


def scanned(arrays: dict[str, np.ndarray], axis: int, container: str) -> dict[str, np.ndarray]:
    """T5X's arrays as its scalable example stores them: layers stacked along `axis`.

    Args:
        container: "layers", or "side" for encoder/encoder and decoder/decoder.
    """
    found: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        side, _, rest = name.partition("/layers_0/")
        if rest:
            depth = sum(n.startswith(f"{side}/layers_") and n.endswith(f"/{rest}") for n in arrays)
            inside = container if container == "layers" else side
            found[f"{side}/{inside}/{rest}"] = np.stack(
                [arrays[f"{side}/layers_{i}/{rest}"] for i in range(depth)], axis)
        elif "/layers_" not in name:
            found[name] = value
    return found


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """{path: array} of random numbers in the shapes of a model."""
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=info.shape).astype(np.float32)
            for path, info in Model(config).table.items()}


def write_hf(folder: pathlib.Path, config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A Hugging Face folder of a model with random parameters, which are returned."""
    params = random_params(config, seed)
    folder.mkdir(parents=True)
    hf.write_model(folder, config, dict.fromkeys(params, np.float32), params.__getitem__)
    return params


def flat(params) -> dict[str, np.ndarray]:
    """{path: numpy array} of a nested dict of arrays."""
    return {path: np.asarray(x) for path, x in tree.flatten(jax.device_get(params)).items()}
