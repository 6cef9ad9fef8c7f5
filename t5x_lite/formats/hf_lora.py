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
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import regex

from t5x_lite.errors import UserError, refuse
from t5x_lite.formats import hf, safetensors
from t5x_lite.formats.mapping import Placed, Slot, Tensors, place
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.language_model import Model
from t5x_lite.models.peft import PeftConfig, Tuning

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
    given = _checked(folder)
    tensors = safetensors.read_file(folder / WEIGHTS)
    kernels = {p for p in Model(config).table if p.endswith("/kernel")}
    placed = _places(config, kernels, model_type)
    placed = {path: where for path, where in placed.items() if len(where.lead) < 2}   # no experts
    by_module = {_module(name): parts for name, parts in _by_tensor(placed).items()}
    rows = _modules_of(tensors, by_module, folder)
    rank = max(a.shape[0] for a, _ in rows.values())
    stable = bool(given.get("use_rslora"))
    scale = _scaling(given["lora_alpha"], rank, stable)
    alphas = _alphas(given, rows, folder)
    trained: dict[str, np.ndarray] = {}
    for module, (a, b) in rows.items():
        own_scale = _scaling(alphas[module], a.shape[0], stable) / scale
        a, b = _padded(a, 0, rank), _padded(b, 1, rank) * own_scale
        _spread(trained, placed, by_module[module], a, b)
    targets = sorted({p.rpartition("/")[0] for p in trained})
    tuning = PeftConfig("lora", targets=tuple(f"{re.escape(p)}/kernel" for p in targets), rank=rank,
                        alpha=float(given["lora_alpha"]), rank_stabilized=stable)
    assert trained.keys() == Tuning(Model(config).table, tuning).trainable.keys()
    return tuning, trained


def _spread(trained: dict[str, np.ndarray], placed: Mapping[str, Placed],
            parts: Sequence[tuple[str, int, Slot]], a: np.ndarray, b: np.ndarray) -> None:
    """Writes lora_A [R, I] and lora_B [O, R] of one of their modules into ours, by layer.

    Args:
        trained: {path: A or B}; what is not there yet is added, with zeros for other layers.
        parts: our kernels that share the module's tensor, see _by_tensor.
    """
    rank = a.shape[0]
    for path, at, slot in parts:
        lead, (into, out) = placed[path].lead, placed[path].inner
        block = slot.layout.view(b.T if _is_input_first(slot) else b).reshape(rank, out)
        if len(parts) > 1 and not block.any() and b.any():
            continue   # of a fused tensor, a part that was no target
        for name, value, shape in (("lora_a", a.T, (into, rank)), ("lora_b", block, (rank, out))):
            whole = trained.setdefault(f"{path}/{name}", np.zeros((*lead, *shape), np.float32))
            whole.reshape(-1, *shape)[at] = value


def base_of(folder: pathlib.Path) -> str:
    """What an adapter says its base model is, "" where it does not say."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"peft:{folder}: {folder / CONFIG} does not exist.")
    base = safetensors.read_json(folder / CONFIG).get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise UserError(f"{folder / CONFIG}: base_model_name_or_path={base!r} is no name.")
    return base


# Fields of adapter_config.json that change what an adapter computes -> what is read here.
_PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "modules_to_save": None,
          "lora_bias": False, "use_qalora": False, "use_bdlora": None, "alora_invocation_tokens": None,
          "trainable_token_indices": None, "target_parameters": None, "layer_replication": None,
          "arrow_config": None, "kasa_config": None, "monteclora_config": None,
          "velora_config": None, "lora_ga_config": None}
# Those that change nothing, or are read from the tensors themselves, or matter in training only.
_HARMLESS = {
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "r", "lora_alpha", "use_rslora", "lora_dropout", "fan_in_fan_out",
    "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
_MAX_PATTERN, _SECONDS = 1000, 5.0   # of one pattern, and for all of them together


def _checked(folder: pathlib.Path) -> dict[str, Any]:
    """The adapter_config.json of a folder. Raises UserError for what is not read here."""
    given = safetensors.read_json(folder / CONFIG)
    problems = [f"{name}={repr(value)[:60]}" for name, value in given.items()
                if name not in _HARMLESS and value not in (_PLAIN.get(name), [], {}, None, False)]
    if given.get("peft_type") != "LORA" or problems:
        problems = problems or [f"peft_type={given.get('peft_type')!r}"]
        raise UserError(f"peft:{folder} has {', '.join(problems)}, which this does not read: merge "
                        "it with PEFT (merge_and_unload) and convert the model.")
    start = given.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in ("gaussian", "orthogonal", "eva", None):
        raise UserError(f"{folder / CONFIG}: init_lora_weights={str(start)[:40]!r} changes the base "
                        "model's own weights too: convert the adapter to a plain one with PEFT's "
                        "path_initial_model_for_weight_conversion.")
    _check_alpha(given.get("lora_alpha"), "lora_alpha", folder)
    if not isinstance(given.get("use_rslora", False), (bool, type(None))):
        raise refuse(f"{folder / CONFIG}: use_rslora", given["use_rslora"], "true or false")
    patterns = given.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise refuse(f"{folder / CONFIG}: alpha_pattern", patterns, "a section")
    for pattern, alpha in patterns.items():
        _check_alpha(alpha, f"alpha_pattern[{pattern[:60]!r}]", folder)
    return given


def _check_alpha(alpha: Any, name: str, folder: pathlib.Path) -> None:
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < 1e30:
        raise refuse(f"{folder / CONFIG}: {name}", alpha, "a number above 0: what the adapter adds is "
                     "scaled by it")


def _modules_of(tensors: Tensors, known: Mapping[str, Sequence[tuple[str, int, Slot]]],
                folder: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{module: (lora_A [R, I], lora_B [O, R])}, float32.

    Raises:
        UserError: a tensor that is no LoRA of one of the `known` modules, or does not fit it.
    """
    names = {n.removeprefix(_PREFIX): n for n in tensors.shapes}
    modules = {n.removesuffix(".lora_A.weight") for n in names if n.endswith(".lora_A.weight")}
    wanted = {f"{m}.lora_{x}.weight" for m in modules for x in "AB"}
    strange = sorted((names.keys() ^ wanted) | (modules - known.keys()))
    if strange or not modules:
        raise UserError(f"peft:{folder}: {', '.join(strange[:4]) or 'nothing'} is no LoRA of a "
                        f"kernel of the model; its modules are {', '.join(sorted(known)[:3])}, …")
    rows = {}
    for module in sorted(modules):
        slot = known[module][0][2]
        into, out = slot.shape if _is_input_first(slot) else slot.shape[::-1]
        a, b = (names[f"{module}.lora_{x}.weight"] for x in "AB")
        shapes = tensors.shapes[a], tensors.shapes[b]
        rank = shapes[0][0] if len(shapes[0]) == 2 else 0
        if rank < 1 or shapes != ((rank, into), (out, rank)):
            raise UserError(f"peft:{folder}: {module} has lora_A {shapes[0]} and lora_B "
                            f"{shapes[1]}, where the model's kernel wants (R, {into}) and "
                            f"({out}, R): an adapter of another model?")
        rows[module] = (np.asarray(tensors.read(a), np.float32),
                        np.asarray(tensors.read(b), np.float32))
    return rows


def _alphas(given: Mapping[str, Any], modules: Iterable[str], folder: pathlib.Path
            ) -> dict[str, float]:
    """{module: its alpha}. Patterns match the end of a module's name, the first that does.

    Raises:
        UserError: a pattern that is no regex, or whose matching takes too long.
    """
    patterns = given.get("alpha_pattern") or {}
    compiled = [(_compiled(pattern, folder), alpha) for pattern, alpha in patterns.items()]
    deadline = time.monotonic() + _SECONDS
    alphas = {}
    for module in modules:
        alphas[module] = given["lora_alpha"]
        for pattern, alpha in compiled:
            if _matches(pattern, module, deadline, folder):
                alphas[module] = alpha
                break
    return alphas


def _compiled(pattern: str, folder: pathlib.Path) -> regex.Pattern:
    """A pattern that somebody else wrote."""
    if len(pattern) > _MAX_PATTERN:
        raise UserError(f"{folder / CONFIG}: a pattern of {len(pattern):,} characters; at most "
                        f"{_MAX_PATTERN} are read.")
    try:
        return regex.compile(rf"(.*\.)?({pattern})")
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise UserError(f"{folder / CONFIG}: {pattern[:80]!r} is no regex ({error}).") from error


def _matches(pattern: regex.Pattern, module: str, deadline: float, folder: pathlib.Path) -> bool:
    left = deadline - time.monotonic()
    try:
        if left > 0:
            return pattern.fullmatch(module, timeout=left) is not None
    except TimeoutError:
        pass   # told below, as for those that there was no time for
    raise UserError(f"{folder / CONFIG}: matching {pattern.pattern[:80]!r} and what stands before "
                    f"it takes longer than {_SECONDS:g} s. Write module names instead of regexes.")


def _scaling(alpha: float, rank: int, is_stabilized: bool) -> float:
    """What PEFT multiplies B A by."""
    return alpha / (math.sqrt(rank) if is_stabilized else rank)


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
    by_tensor: dict[str, list[tuple[str, int, Slot]]] = {}
    for path, where in placed.items():
        if len(where.lead) > 1:
            raise UserError(f"{path}: PEFT's format has no place for LoRA on experts; merge it "
                            "instead with --to=hf:DIR.")
        for at, slot in enumerate(where.slots):
            by_tensor.setdefault(slot.name, []).append((path, at, slot))
    return dict(sorted(by_tensor.items()))


def _layer(x: np.ndarray, at: int) -> np.ndarray:
    return np.asarray(x if x.ndim == 2 else x[at], np.float32)


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _is_input_first(slot: Slot) -> bool:
    """Whether their tensor is [I, O], as GPT-2's Conv1D is, and not [O, I]."""
    return slot.layout.shape((1, 2))[0] == 1


def _padded(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    return np.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])
