"""Whatever bytes stand in a checkpoint of others, its reader answers with tensors or a UserError.

Each case begins with a whole checkpoint and damages one of its files: bytes changed, cut, doubled,
or for JSON a value at a random place replaced by an awkward one. Seeds are fixed.
"""

import json
import pathlib
import random
import tempfile

import msgpack
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.formats import hf, hf_lora, t5x
from tests import tiny
from tests.formats import folders
from tests.formats.test_hf_lora import CASES, draw

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

AWKWARD = (None, True, False, 0, -1, 1, 3, 2 ** 31, 2 ** 63, 10 ** 400, 0.5, -0.0, float("nan"),
           float("inf"), "", "x", "..", "/etc/passwd", "\x00", "ü" * 300, [], {}, [[]], [1, -1],
           {"a": 1}, {"rope_type": "yarn", "factor": 1e300}, [None], "gated-", "9" * 5000)
SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(hypothesis.HealthCheck))


def damaged_bytes(data: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(max(len(out), 1))
        kind = rng.randrange(5)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            out[at:at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.choice((1, 8, 64)))
        elif kind == 3:
            del out[at:at + rng.choice((1, 8, 100))]
        else:
            out[at:at] = out[:at]
    return bytes(out)


def damaged_value(value, seed: int):
    """A nested value with one or two of its parts replaced, removed or added."""
    rng = random.Random(seed)
    value = {"": json.loads(json.dumps(value))}
    for _ in range(rng.choice((1, 1, 2))):
        node, key = value, ""
        while isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.9:
            node = node[key]
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        kind = rng.randrange(4)
        if kind == 0 and key != "":
            del node[key]
        elif kind == 1 and isinstance(node, dict) and key != "":
            node[rng.choice(("new_field", "quantization_config", "rope_scaling", "layer_types"))] \
                = rng.choice(AWKWARD)
        else:
            node[key] = rng.choice(AWKWARD)
    return value[""]


def damage(folder: pathlib.Path, name: str, whole: bytes, seed: int) -> None:
    """Writes a damaged version of the file."""
    data = damaged_bytes(whole, seed)
    if name.endswith(".json") and seed % 4:
        data = json.dumps(damaged_value(json.loads(whole), seed)).encode()
    elif name == "model.safetensors" and seed % 2:
        length = int.from_bytes(whole[:8], "little")
        header = json.dumps(damaged_value(json.loads(whole[8:8 + length]), seed)).encode()
        data = len(header).to_bytes(8, "little") + header + whole[8 + length:]
    elif name == "checkpoint" and seed % 2:
        index = damaged_value(json.loads(json.dumps(msgpack.unpackb(whole))), seed)
        try:
            data = msgpack.packb(index)
        except (OverflowError, ValueError):   # msgpack has no such integer
            return
    (folder / name).write_bytes(data)


def attempt(read, *args):
    """Reads all that can be read; UserError is an answer, anything else a failure."""
    try:
        model = read(*args)
        for path in getattr(model, "table", ()):
            model.read(path)
    except UserError as error:
        assert len(str(error)) < 10_000, "a screen"


def fuzz(folder: pathlib.Path, name: str, read, seed: int) -> None:
    file = folder / name
    whole = file.read_bytes()
    try:
        damage(folder, name, whole, seed)
        attempt(read, str(folder))
    finally:
        file.write_bytes(whole)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{name: folder} of whole checkpoints."""
    root = tmp_path_factory.mktemp("fuzz")
    folders.write_hf(root / "t5", tiny.seq2seq().model)
    llama = {"model_type": "llama", "vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2,
             "num_hidden_layers": 2, "intermediate_size": 12, "tie_word_embeddings": False,
             "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}
    folders.write_hf(root / "llama", hf.model_config(llama))
    tensors = hf.read_model(str(root / "llama")).tensors
    half = list(tensors.shapes)[::2]
    (root / "sharded").mkdir()
    (root / "sharded/config.json").write_bytes((root / "llama/config.json").read_bytes())
    from t5x_lite.formats.safetensors import INDEX, Writer
    weight_map = {}
    for i, names in enumerate((half, [n for n in tensors.shapes if n not in half])):
        writer = Writer(root / "sharded", {n: tensors.shapes[n] for n in names},
                        {n: tensors.dtypes[n] for n in names}, 2 ** 40)
        for n in names:
            writer.tensor(n)[...] = tensors.read(n)
        writer.close()
        (root / "sharded/model.safetensors").rename(root / f"sharded/m{i}.safetensors")
        weight_map |= dict.fromkeys(names, f"m{i}.safetensors")
    (root / "sharded" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    config, tuning = CASES["t5"]
    (root / "peft").mkdir()
    hf_lora.write(root / "peft", config, tuning, draw(config, tuning), "base")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("place,name", [
    ("llama", "config.json"), ("llama", "model.safetensors"), ("t5", "config.json"),
    ("t5", "model.safetensors"), ("sharded", "model.safetensors.index.json"),
    ("sharded", "m0.safetensors")])
def test_hugging_face(places, place, name):
    @SETTINGS
    @given(st.integers(0, 2 ** 32 - 1))
    def run(seed):
        fuzz(places / place, name, hf.read_model, seed)
    run()


@pytest.mark.slow
@pytest.mark.parametrize("kind", hf.FAMILIES)
def test_configs(kind):
    transformers = pytest.importorskip("transformers")
    fields = transformers.AutoConfig.for_model(kind).to_dict()

    @settings(SETTINGS, max_examples=300)
    @given(st.integers(0, 2 ** 32 - 1))
    def run(seed):
        value = damaged_value(fields, seed)
        attempt(hf.model_config, value if isinstance(value, dict) else {})
    run()


@pytest.mark.slow
def test_torch(places):
    torch = pytest.importorskip("torch")
    llama = hf.read_model(str(places / "llama")).tensors
    folder = places / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((places / "llama/config.json").read_bytes())

    @settings(SETTINGS, max_examples=300)
    @given(st.integers(0, 2 ** 32 - 1), st.booleans())
    def run(seed, zipped):
        torch.save({n: torch.tensor(np.array(llama.read(n))) for n in llama.shapes},
                   folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        fuzz(folder, "pytorch_model.bin", hf.read_model, seed)
    run()


@pytest.mark.slow
@pytest.mark.parametrize("name", [hf_lora.CONFIG, hf_lora.WEIGHTS])
def test_adapters(places, name, monkeypatch):
    monkeypatch.setattr(hf_lora, "_SECONDS", 0.5)
    config, _ = CASES["t5"]

    @SETTINGS
    @given(st.integers(0, 2 ** 32 - 1))
    def run(seed):
        fuzz(places / "peft", name, lambda f: hf_lora.read(pathlib.Path(f), config, "t5"), seed)
    run()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint", "target.encoder.encoder_norm.scale/.zarray",
                                  "target.encoder.encoder_norm.scale/0"])
def test_t5x(name):
    arrays = folders.golden_arrays()

    @SETTINGS
    @given(st.integers(0, 2 ** 32 - 1))
    def run(seed):
        fuzz(folder, name, t5x.read_model, seed)

    with tempfile.TemporaryDirectory() as root:
        folder = folders.write_t5x(pathlib.Path(root) / "x", arrays)
        run()
