"""Folders of Hugging Face transformers: config.json, safetensors, tokenizer files."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_lite import files
from t5x_lite.errors import UserError, known
from t5x_lite.formats import (
    hf_bert,
    hf_decoders,
    hf_deepseek,
    hf_fields,
    hf_gemma,
    hf_olmo,
    hf_qwen,
    hf_t5,
    hub,
    safetensors,
)
from t5x_lite.formats.functions import differences
from t5x_lite.formats.hf_family import Family
from t5x_lite.formats.mapping import (
    ForeignModel,
    Tensors,
    foreign_model,
    like_segments,
    place,
    write_parameter,
)
from t5x_lite.models import parametrization
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.language_model import Model

FAMILIES: dict[str, Family] = {
    f.model_type: f for module in (hf_t5, hf_decoders, hf_gemma, hf_qwen, hf_olmo, hf_deepseek, hf_bert)
    for f in module.FAMILIES}
# Models of texts and images -> the family of the texts' part, which alone is read.
TEXT_PARTS = {"gemma3": "gemma3_text"}


# --- configs --------------------------------------------------------------------------------------

def family(model_type: str, where: str = "the model") -> Family:
    """The family of this name. Raises UserError listing the known ones."""
    model_type = TEXT_PARTS.get(model_type, model_type)
    return FAMILIES[known(where, "model_type", model_type, FAMILIES)]


def text_part(given: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json, or what it says of the texts' part where images are read too.

    Raises:
        UserError: a config of both without its text_config.
    """
    kind = TEXT_PARTS.get(given.get("model_type", ""))
    if kind is None:
        return dict(given)
    inner = given.get("text_config")
    if not isinstance(inner, Mapping):
        raise UserError(f"config.json of this {given['model_type']} model has no text_config, which "
                        "says what the model of texts is.")
    outer = ("tie_word_embeddings", "quantization_config", "compression_config")
    return {**{name: given[name] for name in outer if name in given}, **inner, "model_type": kind}


def model_config(hf: Mapping[str, Any], tied: bool | None = None) -> ModelConfig:
    """The ModelConfig of a config.json.

    Args:
        tied: whether logits go through the embedding table; None: as config.json says.

    Raises:
        UserError: a model_type, activation or rope scaling that is not known here, or a field
            that cannot be honoured; see hf_fields.
    """
    hf = text_part(hf)
    kind = family(hf.get("model_type", "none"), "config.json")
    given = hf_fields.checked(kind, hf)
    if tied is None:
        tied = given.get("tie_word_embeddings", True)
    return kind.from_hf(given, tied)


def hf_config(config: ModelConfig, model_type: str | None = None,
              base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        model_type: its family; None: that of `base`, else the first that can express it.
        base: the config.json it once came from, whose other entries are kept.

    Raises:
        UserError: the family cannot express the model; names every field.
    """
    config = parametrization.resolved(config)   # its multipliers become plain scales
    base = text_part(base or {})
    wanted = model_type or base.get("model_type")
    candidates = [family(wanted)] if wanted else [
        f for f in FAMILIES.values() if f.architecture == config.architecture]
    reasons = []
    for kind in candidates:
        written, lost = _written(config, kind)
        if not lost:
            return _over_base(kind, written, base)
        reasons.append(_listed(kind, lost))
    raise UserError("no Hugging Face family can express this model "
                    "(field: the model's value, what a config.json would say):\n"
                    + "\n".join(reasons))


def _written(config: ModelConfig, kind: Family) -> tuple[dict[str, Any], list[str]]:
    """A model's config.json in a family, and which of its facts are lost in it."""
    if kind.architecture != config.architecture:
        return {}, [f"architecture: {config.architecture}, there {kind.architecture}"]
    try:
        written = {"model_type": kind.model_type, **kind.to_hf(config)}
        return written, differences(config, model_config(written, config.tie_logits))
    except UserError as error:
        return {}, [str(error)]


def _over_base(kind: Family, written: Mapping[str, Any], base: Mapping[str, Any]
               ) -> dict[str, Any]:
    """The written fields over those of the config.json that the model once came from."""
    kept = dict(base if base.get("model_type") == kind.model_type else kind.specials)
    for stale in ("rope_parameters", "scale_decoder_outputs"):   # transformers 5's
        kept.pop(stale, None)
    return {**kept, "architectures": [kind.model_class], **written}


def _listed(kind: Family, lost: Sequence[str]) -> str:
    more = [f"    … {len(lost) - 8} more"] if len(lost) > 8 else []
    return "\n".join([f"  {kind.model_type}:", *(f"    {line}" for line in lost[:8]), *more])


# --- reading --------------------------------------------------------------------------------------

def read_model(folder: str, like: ModelConfig | None = None, partial: bool = False
               ) -> ForeignModel:
    """The model in a folder of transformers, or of that name in the hub; reads no tensor yet.

    Args:
        like: a config whose grouping of layers into segments to follow.
        partial: see mapping.foreign_model.

    Raises:
        UserError: no such folder, an unknown family, or tensors that do not fit config.json.
    """
    where, path = f"hf:{folder}", hub.local_folder(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{where}: {path / 'config.json'} does not exist. `hf download NAME "
                        f"--local-dir {folder}` fetches a published model.")
    given = text_part(safetensors.read_json(path / "config.json"))
    kind = family(given.get("model_type", "none"), where)
    given |= _start_of_generation(path, given, kind, where)
    fields = hf_fields.checked(kind, given)
    tensors = _renamed(safetensors.read_folder(path), kind.renames, where)
    hf_fields.check_against_files(kind, fields, tensors, where)
    tied = _is_tied(kind, fields, tensors)
    if tied:
        tensors = _without(tensors, kind.head)
    config = like_segments(model_config(given, tied), like)
    return foreign_model(where, config, Model(config).table, kind.rules(config), tensors, family=kind.model_type,
                         unused=kind.unused, partial=partial)


def _start_of_generation(path: pathlib.Path, given: Mapping[str, Any], kind: Family, where: str
                         ) -> dict[str, Any]:
    """What generation_config.json says of the token that decoders begin with, where config.json
    does not. Raises UserError where they disagree: transformers trains with the one and generates
    with the other."""
    name, file = "decoder_start_token_id", path / "generation_config.json"
    start = safetensors.read_json(file).get(name) if file.is_file() else None
    if start is None or name not in kind.honoured:
        return {}
    said = given.get(name)
    if said is None:
        return {name: start}
    if said != start or isinstance(start, bool):
        raise UserError(f"{where}: config.json says {name}={said} and generation_config.json says "
                        f"{start}. Correct the one that is wrong.")
    return {}


def _is_tied(kind: Family, fields: Mapping[str, Any], tensors: Tensors) -> bool:
    """Whether logits go through the embedding table.

    A head that is not in the files was lost unless config.json says that it is the table.
    """
    says = fields.get("tie_word_embeddings", True)
    if kind.head not in tensors.shapes:
        return bool(says or (kind.tied_by and kind.tied_by in fields))
    return says and _equal(tensors, kind.head, kind.embedding)


def _equal(tensors: Tensors, a: str, b: str) -> bool:
    return (tensors.shapes.get(a) == tensors.shapes.get(b)
            and np.array_equal(tensors.read(a), tensors.read(b)))


def _without(tensors: Tensors, name: str) -> Tensors:
    shapes = {n: s for n, s in tensors.shapes.items() if n != name}
    return dataclasses.replace(tensors, shapes=shapes)


def _renamed(tensors: Tensors, renames: Iterable[tuple[str, str]], where: str) -> Tensors:
    """The tensors by the names of the tables. Raises UserError where two that become one differ."""
    names: dict[str, str] = {}
    for stored in tensors.shapes:
        name = stored
        for pattern, replacement in renames:
            match = re.fullmatch(pattern, name)
            name = match.expand(replacement) if match else name
        if name not in names:
            names[name] = stored
        elif not _equal(tensors, names[name], stored):
            raise UserError(f"{where} holds both {names[name]} and {stored}, which should be the "
                            "same and differ.")
    return Tensors({n: tensors.shapes[s] for n, s in names.items()},
                   {n: tensors.dtypes[s] for n, s in names.items()},
                   lambda name: tensors.read(names[name]))


# --- writing --------------------------------------------------------------------------------------

def write_model(folder: pathlib.Path, config: ModelConfig, dtypes: Mapping[str, Any],
                read: Callable[[str], np.ndarray], *, model_type: str | None = None,
                base: Mapping[str, Any] | None = None, max_bytes: int = 5_000_000_000,
                progress: Callable[[str], None] = lambda path: None) -> None:
    """Writes a folder that transformers loads, one of our parameters at a time.

    Args:
        folder: exists and is empty.
        dtypes: {our path: dtype to store}.
        read: the parameter at a path, stacked over layers as the table says.
        model_type, base: see hf_config.
        max_bytes: of one safetensors file.
        progress: called with each path.

    Raises:
        UserError: see hf_config.
    """
    written = hf_config(config, model_type, base)
    kind, table = family(written["model_type"]), Model(config).table
    placed = place(kind.rules(config), config, table, kind.model_type)
    slots = {slot.name: (slot.shape, dtypes[path])
             for path, p in placed.items() for slot in p.slots}
    written["dtype"] = written["torch_dtype"] = str(np.dtype(dtypes["token_embedding/embedding"]))
    writer = safetensors.Writer(folder, {n: shape for n, (shape, _) in slots.items()},
                                {n: dtype for n, (_, dtype) in slots.items()}, max_bytes)
    for path, p in placed.items():
        write_parameter(p, read(path), writer.tensor)
        progress(path)
    writer.close()
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


# The files of a folder that are neither tensors nor its config: the tokenizer, mostly.
_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".pt", ".pth", ".onnx", ".ot", ".index.json")


def copy_other_files(source: files.Path, target: pathlib.Path) -> None:
    """Copies tokenizer and other small files, and config.json, from one folder to another."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            files.copy(file, target / file.name)
