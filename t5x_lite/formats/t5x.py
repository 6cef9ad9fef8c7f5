"""Native T5X checkpoints: the public T5 1.1, LM-adapted, mT5, ByT5, Flan-T5, UMT5 and UL2, and
those of its decoder-only example.

A checkpoint is a folder (local or gs://) with a msgpack index, `checkpoint`, of the train
state and one Zarr array a parameter. T5X may have scanned the layers: then a side's arrays
hold all layers along one dim (usually 1). Attention kernels may be 3-D (embed, heads, head_dim).

The folder says nothing of the function its parameters compute (T5X keeps that in gin files):
sizes are read off the shapes, a gated MLP is taken for T5 1.1's GELU and another for T5 1.0's
ReLU, and tied logits for scaled ones. UL2's gate is SiLU: give its config.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from t5x_lite import log
from t5x_lite.errors import UserError
from t5x_lite.formats import safetensors
from t5x_lite.formats.mapping import (
    TRANSPOSED,
    ForeignModel,
    Rule,
    Shape,
    Tensors,
    foreign_model,
    like_segments,
)
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model

# --- the folder -----------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class _Array:
    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


# A bucket that cannot be reached is told after half a minute; tensorstore would take a quarter of
# an hour.
_RETRIES = {"gcs_request_retries": {
    "max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}}


def _kvstore(folder: str) -> dict[str, str]:
    """tensorstore's name for a folder."""
    scheme, separator, rest = folder.partition("://")
    if not separator:
        return {"driver": "file", "path": folder.rstrip("/") + "/"}
    if scheme != "gs":
        raise UserError(f"t5x:{folder}: give a local folder or gs://BUCKET/PATH.")
    bucket, _, path = rest.partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": path.rstrip("/") + "/"}


def read_folder(folder: str) -> tuple[Tensors, int]:
    """The parameters of a checkpoint by T5X's unscanned names, and its step.

    Raises:
        UserError: no such checkpoint, or one that is damaged.
    """
    import tensorstore
    from flax import serialization

    base, context = _kvstore(folder), tensorstore.Context(_RETRIES)
    try:
        index = tensorstore.KvStore.open(base, context=context).result().read(
            "checkpoint").result()
    except ValueError as error:   # tensorstore's only kind
        raise UserError(f"t5x:{folder} cannot be read: {_brief(error)}") from error
    if index.state != "value":
        raise UserError(f"t5x:{folder} holds no file named checkpoint, the index of a T5X "
                        "checkpoint: give a folder such as …/checkpoint_1000000.")
    try:
        target = _target(serialization.msgpack_restore(index.value))
    except Exception as error:   # msgpack and what it makes arrays with fail in many ways
        raise UserError(f"t5x:{folder}/checkpoint is no index of a T5X checkpoint: "
                        f"{type(error).__name__}: {str(error)[:200]}") from error
    where = f"t5x:{folder}/checkpoint"
    stored = {name: _stored_name(name, leaf, where) for name, leaf in _leaves(target)}
    arrays = {_usual(name): _open(tensorstore, context, base, leaf)
              for name, leaf in stored.items()}
    if len(arrays) != len(stored):
        raise UserError(f"{where} names a parameter twice, as T5X's two examples do.")
    arrays = dict(_unscanned(arrays))
    arrays = {name: _two_dims(name, array) for name, array in arrays.items()}
    step = re.search(r"(\d{1,18})/?$", folder)
    return as_tensors(arrays), int(step.group(1)) if step else 0


def _target(index: Any) -> Mapping[str, Any]:
    """The nested dict of parameters in an index. Raises ValueError where there is none."""
    if isinstance(index, Mapping):
        index = index.get("optimizer", index)   # T5X before it had a train state of its own
    target = index.get("target") if isinstance(index, Mapping) else None
    if not isinstance(target, Mapping) or not target:
        raise ValueError("it has no parameters under target")
    return target


def as_tensors(arrays: Mapping[str, _Array]) -> Tensors:
    """A dict of arrays as Tensors."""
    return Tensors({n: a.shape for n, a in arrays.items()}, {n: a.dtype for n, a in arrays.items()},
                   lambda name: arrays[name].read())


def _brief(error: Exception) -> str:
    return str(error).split(" [")[0]


def _leaves(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(slash path, leaf): a tensorstore spec, a placeholder's string or an array."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and "driver" not in value:
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _stored_name(name: str, leaf: Any, where: str) -> str | np.ndarray:
    """The folder in which a parameter of the index is stored, or the parameter itself.

    Args:
        leaf: an array, as small ones stand in the index itself; tensorstore's spec, as T5X
            writes; or "PLACEHOLDER://target.…", as orbax does.

    Raises:
        UserError: something else, or a folder that is not one of the checkpoint's own.
    """
    if isinstance(leaf, np.ndarray):
        return leaf
    folder = f"target.{name.replace('/', '.')}"
    if isinstance(leaf, Mapping):
        store = leaf.get("kvstore")
        path = (store.get("path") if isinstance(store, Mapping) else None) or leaf.get("path")
        folder = folder if path is None else str(path).rstrip("/").rsplit("/", 1)[-1]
    elif isinstance(leaf, str):
        folder = leaf.rsplit("://", 1)[-1]
    else:
        raise UserError(f"{where}: {name[:80]} is a {type(leaf).__name__}, not an array.")
    if not safetensors.is_inside(folder) or "/" in folder or folder == ".":
        raise UserError(f"{where}: {name[:80]} is said to be in {folder[:200]!r}, which is no "
                        "folder of the checkpoint. Nothing was opened.")
    return folder


def _open(tensorstore, context, base: Mapping[str, str], name: str | np.ndarray) -> _Array:
    """A parameter in its folder, see _stored_name; its numbers are read when asked for."""
    if isinstance(name, np.ndarray):
        return _Array(name.shape, name.dtype, lambda: name)
    store = {**base, "path": f"{base['path']}{name}/"}
    try:
        opened = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True,
                                  context=context).result()
    except ValueError as error:
        raise UserError(f"{store['path']} is missing or damaged: {_brief(error)}") from error
    # T5X's format 2 wrote bfloat16 as the integers of its bits.
    raw = opened.dtype.numpy_dtype
    dtype = np.dtype(ml_dtypes.bfloat16) if raw == np.uint16 else raw

    def read() -> np.ndarray:
        try:
            _check_chunks(tensorstore, store, opened)
            return opened.read().result().view(dtype)
        except ValueError as error:
            raise UserError(f"{store['path']} is damaged: {_brief(error)}") from error
    return _Array(tuple(opened.shape), np.dtype(dtype), read)


def _check_chunks(tensorstore, store: Mapping[str, str], opened) -> None:
    """Holds an array's shape against its files before it is read: a chunk that is not there would
    read as zeros, and a shape that is not true would take all memory.

    Local folders only, which copies may leave incomplete.
    """
    if store["driver"] != "file":
        return
    expected = math.prod(-(-n // c) for n, c in zip(
        opened.shape, opened.chunk_layout.read_chunk.shape, strict=True))
    folder = pathlib.Path(store["path"])
    sizes = [f.stat().st_size for f in folder.rglob("*")
             if f.is_file() and not f.name.startswith(".")]
    if len(sizes) < expected:
        raise UserError(f"{store['path']} has {len(sizes)} of {expected} chunks: copy the "
                        "checkpoint again.")
    numbers = math.prod(opened.shape) * opened.dtype.numpy_dtype.itemsize
    if numbers > max(_SMALL, sum(sizes) * _COMPRESSION):
        raise UserError(f"{store['path']} is said to hold {log.si(numbers, 'B')}, which its files "
                        f"of {log.si(sum(sizes), 'B')} cannot. Copy the checkpoint again.")


_SMALL = 2**28         # bytes that are read whatever the files' size
_COMPRESSION = 1100    # deflate's limit is 1,032 to 1


def _usual(name: str) -> str:
    """The name that T5X's minimal encoder-decoder has for a parameter of its other examples: the
    scalable one's biases, the decoder-only one's embedding."""
    if name == "decoder/token_embedder/embedding":
        return "token_embedder/embedding"
    return name.replace("/relative_posemb/", "/relpos_bias/")


_SCANNED = re.compile(r"(encoder|decoder)/(?:layers|\1)/(.+)")


def _unscanned(arrays: Mapping[str, _Array]) -> Iterator[tuple[str, _Array]]:
    """Arrays of all layers as one a layer, "encoder/layers_{n}/…"."""
    last: tuple[str, np.ndarray | None] = ("", None)   # consecutive layers are read at once

    def layer(name, array, axis, i):
        def read():
            nonlocal last
            if last[0] != name:
                last = (name, array.read())
            return last[1].take(i, axis)
        return _Array(array.shape[:axis] + array.shape[axis + 1:], array.dtype, read)

    # Norm scales are (embed, layers), or (layers, embed) where layers were scanned along dim 0.
    scales = [a.shape for n, a in arrays.items()
              if n.endswith("_layer_norm/scale") and len(a.shape) == 2]
    widths = [a.shape[1] for n, a in arrays.items() if n == "token_embedder/embedding"]
    axis = 0 if scales and widths and scales[0][0] != widths[0] else 1
    for name, array in arrays.items():
        match = _SCANNED.fullmatch(name)
        if match is None:
            yield name, array
            continue
        side, rest = match.groups()
        for i in range(array.shape[axis]):
            yield f"{side}/layers_{i}/{rest}", layer(name, array, axis, i)


def _two_dims(name: str, array: _Array) -> _Array:
    """Attention kernels with heads and head_dim merged."""
    match = re.search(r"attention/(query|key|value|out)/kernel$", name)
    if match is None or len(array.shape) != 3:
        return array
    a, b, c = array.shape
    shape = (a * b, c) if match.group(1) == "out" else (a, b * c)
    return _Array(shape, array.dtype, lambda: array.read().reshape(shape))


# --- the model ------------------------------------------------------------------------------------

def rules() -> list[Rule]:
    """The table, ours <-> T5X's minimal T5."""
    table = [Rule("token_embedding/embedding", "token_embedder/embedding"),
             Rule("logits/kernel", "decoder/logits_dense/kernel")]
    for side, attentions in (("encoder", {"self": "attention"}),
                             ("decoder", {"self": "self_attention",
                                          "cross": "encoder_decoder_attention"})):
        layer = f"{side}/layers_{{n}}"
        bias = "relpos_bias/rel_embedding"
        table += [Rule(f"{side}/final_norm/scale", f"{side}/{side}_norm/scale"),
                  Rule(f"{side}/relative_position/embedding", f"{side}/{bias}", TRANSPOSED),
                  Rule(f"{side}/*/relative_position/embedding", f"{layer}/{bias}", TRANSPOSED),
                  Rule(f"{side}/*/pre_mlp_norm/scale", f"{layer}/pre_mlp_layer_norm/scale")]
        for kind, theirs in attentions.items():
            norm = "attention" if side == "encoder" else f"{kind}_attention"
            table.append(Rule(f"{side}/*/pre_{kind}_attention_norm/scale",
                              f"{layer}/pre_{norm}_layer_norm/scale"))
            table += [Rule(f"{side}/*/{kind}_attention/{name}/kernel",
                           f"{layer}/{theirs}/{name}/kernel")
                      for name in ("query", "key", "value", "out")]
        table += [Rule(f"{side}/*/mlp/{name}/kernel", f"{layer}/mlp/{name}/kernel")
                  for name in ("wi", "wi_0", "wi_1", "wo")]
    return table


def infer_config(shapes: Mapping[str, Shape], where: str) -> ModelConfig:
    """The T5 that has tensors of these names and shapes; see the top of this file.

    Raises:
        UserError: tensors that this needs are missing, or have shapes that those of no T5 have.
    """
    vocab_size, embed_dim = _matrix(shapes, "token_embedder/embedding", where)
    encoder, decoder = (_infer_stack(shapes, side, where) for side in ("encoder", "decoder"))
    if decoder is None:
        raise UserError(f"{where} holds no decoder/layers_0, so that it is no T5 of T5X's.")
    tied = "decoder/logits_dense/kernel" not in shapes
    return ModelConfig(
        "decoder_only" if encoder is None else "encoder_decoder", vocab_size, embed_dim, encoder,
        decoder, tie_logits=tied, logits_scale=embed_dim ** -0.5 if tied else 1.0)


def _infer_stack(shapes: Mapping[str, Shape], side: str, where: str) -> StackConfig | None:
    """The encoder or decoder that has tensors of these shapes; None where there are none."""
    depth = _depth(shapes, side, where)
    if not depth:
        return None
    first = f"{side}/layers_0"
    own = "attention" if side == "encoder" else "self_attention"
    per_layer = f"{first}/relpos_bias/rel_embedding" in shapes
    bias = f"{first if per_layer else side}/relpos_bias/rel_embedding"
    heads, buckets = _matrix(shapes, bias, where)
    _, width = _matrix(shapes, f"{first}/{own}/query/kernel", where)
    if width % heads or buckets < 4:
        raise UserError(f"{where}: {bias} has {heads} heads and {buckets} buckets, which do not "
                        f"fit queries {width} wide.")
    gated = f"{first}/mlp/wi_0/kernel" in shapes
    mlp_dim, _ = _matrix(shapes, f"{first}/mlp/wo/kernel", where)
    attention = AttentionConfig(heads, width // heads, scale=1.0)
    crosses = f"{first}/encoder_decoder_attention/query/kernel" in shapes
    block = BlockConfig(attention, attention if crosses else None,
                        MLPConfig(mlp_dim, "gelu_tanh" if gated else "relu", gated))
    return StackConfig((SegmentConfig((block,), depth),), causal=side == "decoder",
                       position=PositionConfig(num_buckets=buckets, per_layer=per_layer))


def _depth(shapes: Mapping[str, Shape], side: str, where: str) -> int:
    """The number of layers of a side, which are all there from 0 on."""
    pattern = re.compile(rf"{side}/layers_(\d{{1,9}})/")
    layers = {int(match.group(1)) for name in shapes if (match := pattern.match(name))}
    if layers and max(layers) + 1 != len(layers):
        lost = next(n for n in range(max(layers)) if n not in layers)
        raise UserError(f"{where} holds {side}/layers_{max(layers)} and no {side}/layers_{lost}.")
    return len(layers)


def _matrix(shapes: Mapping[str, Shape], name: str, where: str) -> Shape:
    """The two dims of a tensor that must be there."""
    if name not in shapes:
        last = name.rsplit("/", 1)[-1]
        near = [n for n in shapes if n.rsplit("/", 1)[-1] == last]
        raise UserError(f"{where} holds no {name}, so that it is no T5 of T5X's "
                        f"(tensors of that kind: {', '.join(near[:5]) or 'none'}).")
    if len(shapes[name]) != 2 or not all(shapes[name]):
        raise UserError(f"{where}: {name} has the shape {shapes[name]}, not that of a matrix.")
    return shapes[name]


def model_of(where: str, tensors: Tensors, step: int, *, like: ModelConfig | None = None,
             config: ModelConfig | None = None, partial: bool = False) -> ForeignModel:
    """A model from tensors by T5X's names.

    Args:
        like: a config whose grouping of layers into segments to follow.
        config: what the model is; None: inferred.
        partial: see mapping.foreign_model.

    Raises:
        UserError: the tensors are not those of the config, or of any T5.
    """
    known = config or like_segments(infer_config(tensors.shapes, where), like)
    return foreign_model(where, known, Model(known).table, rules(), tensors, family="T5X", step=step,
                         knows_function=config is not None, partial=partial)


def read_model(folder: str, like: ModelConfig | None = None, config: ModelConfig | None = None,
               partial: bool = False) -> ForeignModel:
    """The model in a T5X checkpoint, local or gs://; see model_of."""
    tensors, step = read_folder(folder)
    return model_of(f"t5x:{folder}", tensors, step, like=like, config=config, partial=partial)
