"""LoRA in the format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

PEFT has a lora_A [R, I] and a lora_B [O, R] for each tensor that it adapts; ours have an A [I, R]
and a B [R, O] for each kernel, stacked over layers. Where several kernels of ours share one
tensor (GPT-2's fused query, key and value), theirs has the ranks of all of them together, and in
lora_B each kernel's rows are 0 but for its own ranks; "rank_pattern" says so.

Shape letters: I and O a kernel's input and output dims, R rank.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.formats import hf, safetensors
from t5x_lite.formats.mapping import Placed, Slot, Tensors, place
from t5x_lite.models.language_model import Model, ModelConfig
from t5x_lite.models.peft import PeftConfig, trainable_table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TASKS = {"encoder_decoder": "SEQ_2_SEQ_LM", "decoder_only": "CAUSAL_LM"}
_PREFIX = "base_model.model."


# --- writing --------------------------------------------------------------------------------------

def write(folder: pathlib.Path, config: ModelConfig, tuning: PeftConfig,
          trained: Mapping[str, np.ndarray], base: str, model_type: str | None = None) -> None:
    """Writes what `PeftModel.from_pretrained(model, folder)` loads.

    Args:
        trained: {path: A or B} of a LoRA run.
        base: the folder or name of the base model, for the record.
        model_type: the base's family; None: the first that can express the model.

    Raises:
        UserError: a method other than LoRA, or parameters that PEFT's format has no place for.
    """
    if tuning.method != "lora" or tuning.also:
        raise UserError("PEFT's format takes LoRA alone, but this run has "
                        f"peft.method={tuning.method!r} and peft.also={tuning.also!r}: merge it "
                        "instead with --to=hf:DIR.")
    by_tensor = _by_tensor(_places(config, trained, model_type))
    tensors, ranks = {}, {}
    for name, parts in by_tensor.items():
        module, count = _module(name), len(parts)
        # One alpha for all: the scale is alpha / R (or its root), so more ranks want a larger B.
        factor = math.sqrt(count) if tuning.rank_stabilized else count
        a, b = [], []
        for path, at, slot in parts:
            own = _layer(trained[f"{path}/lora_b"], at)
            whole = np.zeros(slot.layout.shape(own.shape), np.float32)
            view = slot.layout.view(whole)
            view[...] = (own * factor).reshape(view.shape)
            a.append(_layer(trained[f"{path}/lora_a"], at).T)
            b.append(whole.T if _is_input_first(slot) else whole)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.concatenate(a)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.concatenate(b, axis=1)
        ranks[module] = count * tuning.rank
    writer = safetensors.Writer(folder, {n: x.shape for n, x in tensors.items()},
                                {n: x.dtype for n, x in tensors.items()}, 2**62)
    for name, x in tensors.items():
        writer.tensor(name)[...] = x
    writer.close()
    (folder / "model.safetensors").rename(folder / WEIGHTS)
    slots = [slot for parts in by_tensor.values() for _, _, slot in parts]
    (folder / CONFIG).write_text(json.dumps({
        "peft_type": "LORA", "task_type": _TASKS.get(config.architecture),
        "base_model_name_or_path": base, "r": tuning.rank, "lora_alpha": tuning.alpha,
        "use_rslora": tuning.rank_stabilized, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": any(map(_is_input_first, slots)), "inference_mode": True,
        "target_modules": sorted(ranks),
        "rank_pattern": {m: r for m, r in ranks.items() if r != tuning.rank}}, indent=1) + "\n")


# --- reading --------------------------------------------------------------------------------------

def read(folder: pathlib.Path, config: ModelConfig, model_type: str
         ) -> tuple[PeftConfig, dict[str, np.ndarray]]:
    """What a PEFT folder holds, for a model of this family.

    Returns:
        (the peft section of a run, {path: A or B} of all it trains). Layers that the adapter
        leaves out have zeros, ranks are padded with zeros to the largest.

    Raises:
        UserError: no such folder, another method, or tensors that are no kernels of the model.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"peft:{folder}: {folder / name} does not exist.")
    given = json.loads((folder / CONFIG).read_text())
    _check(given, folder)
    tensors = safetensors.read_file(folder / WEIGHTS)
    kernels = {p for p in Model(config).table if p.endswith("/kernel")}
    placed = _places(config, kernels, model_type)
    placed = {path: where for path, where in placed.items() if len(where.lead) < 2}   # no experts
    by_module = {_module(name): parts for name, parts in _by_tensor(placed).items()}
    rows = _modules_of(tensors, by_module, folder)
    rank = max(a.shape[0] for a, _ in rows.values())
    stable = bool(given.get("use_rslora"))
    scale = given["lora_alpha"] / (math.sqrt(rank) if stable else rank)
    found: dict[str, np.ndarray] = {}
    for module, (a, b) in rows.items():
        own_scale = _scale(given, module, a.shape[0]) / scale
        a, b = _padded(a, 0, rank), _padded(b, 1, rank) * own_scale
        for path, at, slot in by_module[module]:
            lead, (into, out) = placed[path].lead, placed[path].inner
            block = slot.layout.view(b.T if _is_input_first(slot) else b).reshape(rank, out)
            if len(by_module[module]) > 1 and not block.any() and b.any():
                continue   # of a fused tensor, a part that was no target
            for name, value, shape in (("lora_a", a.T, (into, rank)),
                                       ("lora_b", block, (rank, out))):
                whole = found.setdefault(f"{path}/{name}", np.zeros((*lead, *shape), np.float32))
                whole.reshape(-1, *shape)[at] = value
    targets = sorted({p.rpartition("/")[0] for p in found})
    tuning = PeftConfig("lora", targets=tuple(f"{re.escape(p)}/kernel" for p in targets), rank=rank,
                        alpha=float(given["lora_alpha"]), rank_stabilized=stable)
    assert found.keys() == trainable_table(Model(config).table, tuning).keys()
    return tuning, found


def base_of(folder: pathlib.Path) -> str:
    """What an adapter says its base model is."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"peft:{folder}: {folder / CONFIG} does not exist.")
    return json.loads((folder / CONFIG).read_text()).get("base_model_name_or_path") or ""


def _check(given: Mapping[str, Any], folder: pathlib.Path) -> None:
    problems = [f"{name}={given[name]!r}" for name, plain in (
        ("peft_type", "LORA"), ("bias", "none"), ("use_dora", False), ("modules_to_save", None),
        ("lora_bias", False)) if given.get(name, plain) not in (plain, [], None)]
    if problems:
        raise UserError(f"peft:{folder} has {', '.join(problems)}, which this does not read: merge "
                        "it with PEFT (merge_and_unload) and convert the model.")


def _modules_of(tensors: Tensors, known: Mapping[str, Any], folder: pathlib.Path
                ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{module: (lora_A, lora_B)}, float32."""
    names = {n.removeprefix(_PREFIX): n for n in tensors.shapes}
    modules = {n.removesuffix(".lora_A.weight") for n in names if n.endswith(".lora_A.weight")}
    wanted = {f"{m}.lora_{x}.weight" for m in modules for x in "AB"}
    strange = sorted((names.keys() ^ wanted) | (modules - known.keys()))
    if strange or not modules:
        raise UserError(f"peft:{folder}: {', '.join(strange[:4]) or 'nothing'} is no LoRA of a "
                        f"kernel of the model; its modules are {', '.join(sorted(known)[:3])}, …")
    read = lambda name: np.asarray(tensors.read(names[name]), np.float32)
    return {m: (read(f"{m}.lora_A.weight"), read(f"{m}.lora_B.weight")) for m in sorted(modules)}


def _scale(given: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's scaling of a module; patterns match the end of its name."""
    alpha = next((value for pattern, value in (given.get("alpha_pattern") or {}).items()
                  if re.fullmatch(rf"(.*\.)?({pattern})", module)), given["lora_alpha"])
    return alpha / (math.sqrt(rank) if given.get("use_rslora") else rank)


# --- both -----------------------------------------------------------------------------------------

def _places(config: ModelConfig, paths, model_type: str | None) -> dict[str, Placed]:
    """{path without its last name: where the kernel there stands in the family}."""
    table = Model(config).table
    kind = hf.family(hf.hf_config(config, model_type)["model_type"])
    placed = place(kind.rules(config), config, table, kind.model_type)
    owners = sorted({path.rpartition("/")[0] for path in paths})
    return {owner: placed[f"{owner}/kernel"] for owner in owners}


def _by_tensor(placed: Mapping[str, Placed]) -> dict[str, list[tuple[str, int, Slot]]]:
    """{their tensor: [(our path, number of its layer in the stack, slot)]}."""
    found: dict[str, list[tuple[str, int, Slot]]] = {}
    for path, where in placed.items():
        if len(where.lead) > 1:
            raise UserError(f"{path}: PEFT's format has no place for LoRA on experts; merge it "
                            "instead with --to=hf:DIR.")
        for at, slot in enumerate(where.slots):
            found.setdefault(slot.name, []).append((path, at, slot))
    return dict(sorted(found.items()))


def _layer(x: np.ndarray, at: int) -> np.ndarray:
    return np.asarray(x if x.ndim == 2 else x[at], np.float32)


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _is_input_first(slot: Slot) -> bool:
    """Whether their tensor is [I, O], as GPT-2's Conv1D is, and not [O, I]."""
    return slot.layout.shape((1, 2))[0] == 1


def _padded(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    return np.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])
