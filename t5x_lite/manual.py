"""What --help prints, and which field of a config a mistyped flag may have meant.

A door calls `answer` before it imports anything that is slow: its flags are read from its source, the
fields of a config from their dataclasses (config_reference.py). Neither TensorFlow nor Orbax is imported.

    python -m t5x_lite.train --help                  the flags, and the fields most used
    python -m t5x_lite.train --help=model.decoder    any section, or one field
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import pathlib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

from t5x_lite import first  # noqa: F401

# isort: split

from t5x_lite import config_reference, packages
from t5x_lite.config import RunConfig
from t5x_lite.errors import UserError, nearest

_HERE = pathlib.Path(__file__).parent
REFERENCE = "docs/config_reference.md"
MOST_USED = (
    "data.train", "data.validation", "data.train_files", "data.inputs_length",
    "data.targets_length", "data.vocabulary", "data.task_modules", "train.num_steps",
    "train.global_batch_size", "train.accumulation", "train.seed", "optimizer.name",
    "optimizer.schedule.base_learning_rate", "optimizer.schedule.warmup_steps", "precision",
    "init_from", "peft.method", "mesh.fsdp", "mesh.tensor", "eval.every", "eval.num_examples",
    "checkpoint.every", "checkpoint.keep_last")
# What other programs call a field, {last part of a flag: field}.
ELSEWHERE = {
    "seed": "train.seed", "random_seed": "train.seed", "rank": "peft.rank", "lora_rank": "peft.rank",
    "lora_r": "peft.rank", "lora_alpha": "peft.alpha",
    "epochs": "train.num_steps", "num_epochs": "train.num_steps", "num_train_epochs": "train.num_steps",
    "grad_clip": "optimizer.clip_norm", "gradient_clip": "optimizer.clip_norm",
    "clip": "optimizer.clip_norm", "logging_steps": "train.log_every", "log_steps": "train.log_every",
    "d_model": "model.embed_dim", "hidden_size": "model.embed_dim", "emb_dim": "model.embed_dim",
    "lr": "optimizer.schedule.base_learning_rate",
    "learning_rate": "optimizer.schedule.base_learning_rate",
    "warmup": "optimizer.schedule.warmup_steps",
    "batch_size": "train.global_batch_size", "batch": "train.global_batch_size",
    "per_device_train_batch_size": "train.global_batch_size",
    "steps": "train.num_steps", "max_steps": "train.num_steps", "train_steps": "train.num_steps",
    "gradient_accumulation_steps": "train.accumulation",
    "num_microbatches": "train.accumulation",
    "dtype": "precision", "bf16": "precision", "fp16": "precision",
    "task": "data.train", "dataset": "data.train", "train_file": "data.train_files",
    "validation_file": "data.validation_files", "model_name_or_path": "init_from",
    "checkpoint_path": "init_from", "resume_from_checkpoint": "init_from",
    "weight_decay": "optimizer.weight_decay", "max_grad_norm": "optimizer.clip_norm",
    "eval_steps": "eval.every", "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last", "max_length": "data.inputs_length",
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a door, as its source defines it."""

    name: str
    kind: str      # string, integer, float, bool, list, enum, multi_string, config_file …
    default: str   # as in the source, "" for none
    text: str


# --- --help ---------------------------------------------------------------------------------

def answer(door: str, argv: Sequence[str]) -> None:
    """Prints the help of a door and exits, where its arguments ask for it; else does nothing.

    door: the file of its source.
    """
    asked = [a for a in argv[1:] if re.fullmatch(r"--?h(elp(full|short)?)?(=.*)?", a)]
    if not asked:
        return
    section = asked[0].partition("=")[2]
    try:
        text = section_text(section) if section else door_text(pathlib.Path(door))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(text)
    sys.exit(0)


def door_text(door: pathlib.Path) -> str:
    """The screen of --help: what the door does, its flags, and how its config is edited."""
    source = door.read_text(encoding="utf-8")
    own = flags_of(source)
    lines = [(ast.get_docstring(ast.parse(source)) or "").strip(), "", "Flags", ""]
    for flag in own:
        default = f" (default: {flag.default})" if flag.default else ""
        lines += _entry(f"--{flag.name}={_placeholder(flag)}", f"{flag.text}{default}")
    if "alone=True" not in source:
        several = flags_of((_HERE / "cli.py").read_text(encoding="utf-8"))
        names = ", ".join(f"--{flag.name}" for flag in several if flag.kind != "multi_string")
        lines += _entry("of several processes", f"{names}: {several[0].text} Slurm's and the TPU's own "
                        "environments need none of them.")
    if "define_config(" not in source:
        return "\n".join(lines).rstrip()
    lines += _entry("--config=FILE[:ARGUMENT]", _config_text())
    lines += _entry("--config.SECTION.FIELD=VALUE", "Any field of that config; a value is a number, a "
                    "text, True, False, None, or a tuple in quotes, \"('a','b')\". An item of a list "
                    "has its number: --config.model.decoder.segments[0].repeats=4.")
    lines += _entry("--override=SECTION.FIELD=VALUE", "The same, also for the config that a workdir holds.")
    lines += _entry("--gin.NAME=VALUE", "The same in T5X's spelling: --gin.TRAIN_STEPS=1000; "
                    "docs/from_t5x.md lists the names.")
    lines += ["", "The fields most used; a config file sets its own defaults", ""]
    for path in MOST_USED:
        lines += _entry(f"--config.{path}", _about(field_at(path)))
    lines += ["", *textwrap.wrap(
        f"--help=SECTION shows any section: --help=train, --help=model.decoder, --help=optimizer.schedule "
        f"(there are {', '.join(_top_sections())}). All fields: {REFERENCE}, or python -m "
        "t5x_lite.config_reference.", _width())]
    return "\n".join(lines)


def parser_text(parser: argparse.ArgumentParser, description: str) -> str:
    """The screen of a command that argparse reads: what it does, and its flags as door_text shows them."""
    entries: list[str] = []
    for action in parser._actions:   # argparse shows them to nobody else
        if action.dest == "help" or not action.option_strings:
            continue
        kind = {int: "NUMBER", float: "NUMBER"}.get(action.type, "TEXT")
        told = action.default not in (None, False, "", 0, []) and action.nargs != 0
        default = f" (default: {action.default})" if told else ""
        name = action.option_strings[-1] + (f"={kind}" if action.nargs != 0 else "")
        entries += _entry(name, f"{action.help or ''}{default}")
    head = ["", "Flags", ""] if entries else []
    return "\n".join([description.strip(), *head, *entries]) + "\n"


def section_text(where: str) -> str:
    """The fields of a section, or one field. Raises UserError that names the nearest."""
    path = where.strip().removeprefix("--").removeprefix("config").strip(".")
    if not path:
        return f"config has the sections {', '.join(_top_sections())}: --help=train shows one."
    field = field_at(path)
    inner = [kind for kind, _ in config_reference.inner_sections(field.kind)]
    if not inner:
        return "\n".join(_entry(f"--config.{path}", _about(field)))
    kind = inner[0]
    item = "" if dataclasses.is_dataclass(field.kind) or "[" in path.rpartition(".")[2] else "[0]"
    suffix = item if field.type.startswith("list") else ""
    lines = [f"{path}: {inspect.cleandoc(kind.__doc__ or '').split(chr(10) * 2)[0]}", ""]
    for one in config_reference.fields(kind):
        lines += _entry(f"--config.{path}{suffix}.{one.name}", _about(one))
    return "\n".join(lines)


def _no_such_field(path: str) -> UserError:
    paths = [p for p, _ in all_fields()] + _top_sections()
    hint = suggestion(path) or nearest(path, paths).removeprefix(" ")
    return UserError(f"--help={path}: the config has no such section or field."
                     f"{' ' + hint if hint else ''} Sections: {', '.join(_top_sections())}.")


def field_at(path: str) -> config_reference.Field:
    """The field at a dotted path, such as model.decoder.segments[0].blocks[0].mlp.

    Raises:
        UserError: no such field; names the nearest.
    """
    kind: type = RunConfig
    found = None
    for part in path.split("."):
        known = {f.name: f for f in config_reference.fields(kind)} if kind else {}
        name = part.partition("[")[0]
        name = name if name in known else name.lower()   # --help=Data
        if name not in known:
            raise _no_such_field(path)
        found = known[name]
        inner = [k for k, _ in config_reference.inner_sections(found.kind)]
        kind = inner[0] if inner else None
    assert found is not None
    return found


def flags_of(source: str) -> list[Flag]:
    """The flags that a module defines by absl's flags.DEFINE_…, in order, without importing it."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("DEFINE_")
             and isinstance(node.func.value, ast.Name) and node.func.value.id == "flags"]
    found = []
    for node in sorted(calls, key=lambda n: n.lineno):
        texts = [a for a in node.args[1:] if not isinstance(a, (ast.List, ast.Call))]
        default = node.args[1]
        shown = ast.unparse(default) if isinstance(default, ast.Constant) else ""
        found.append(Flag(ast.literal_eval(node.args[0]), node.func.attr.removeprefix("DEFINE_"),
                          "" if shown in ("None", "''", "False") else shown.strip("'"),
                          _text(texts[-1])))
    return found


def _text(node: ast.expr) -> str:
    """A literal text; what an f-string works out is shown as …"""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…"
                       for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def _placeholder(flag: Flag) -> str:
    return {"integer": "NUMBER", "float": "NUMBER", "bool": "True|False", "list": "A,B,…",
            }.get(flag.kind, "TEXT")


def _config_text() -> str:
    names = [f"{file.stem}" for folder in packages.folders("configs")
             for file in sorted(folder.glob("[!_]*.py"))]
    return ("A Python file whose get_config(ARGUMENT) returns the run: your own, or a shipped one, such "
            f"as configs/quickstart.py or configs/t5_1_1.py:base ({', '.join(names)}), or hf:NAME.")


def _about(field: config_reference.Field) -> str:
    default = f", default {field.default}" if field.default else ""
    return f"{field.type}{default}. {field.comment or config_reference.summary(field)}".rstrip()


def _entry(name: str, text: str) -> list[str]:
    """A name in the left column, its text beside it, or below where the name is long."""
    wide = " " * 42
    lines = textwrap.wrap(text, _width() - len(wide)) or [""]
    head = f"  {name}"
    if len(head) > len(wide) - 2:
        return [head, *(wide + line for line in lines)]
    return [head.ljust(len(wide)) + lines[0], *(wide + line for line in lines[1:])]


def _width() -> int:
    return max(80, min(120, shutil.get_terminal_size((100, 24)).columns))


def _top_sections() -> list[str]:
    return [f.name for f in config_reference.fields(RunConfig) if f.type == "section"]


# --- a flag that is not there -----------------------------------------------------------------

def all_fields(kind: type = RunConfig, where: str = "", depth: int = 7
               ) -> Iterator[tuple[str, config_reference.Field]]:
    """(dotted path, field) of all that holds a value; the first item of a list stands for all."""
    for field in config_reference.fields(kind):
        path = f"{where}.{field.name}".lstrip(".")
        inner = config_reference.inner_sections(field.kind)
        if not inner:
            yield path, field
        for deeper, suffix in inner if depth else ():
            yield from all_fields(deeper, path + suffix.replace("i", "0"), depth - 1)


@functools.cache
def loose_fields(kind: type = RunConfig, where: str = "", depth: int = 7) -> frozenset[str]:
    """Dotted paths, without numbers of items, of what may be None and of lists: what
    ml_collections cannot set, or not with a message that helps."""
    found = set()
    for field in config_reference.fields(kind):
        path = f"{where}.{field.name}".lstrip(".")
        if "None" in field.type.split(" or ") or "list" in field.type:
            found.add(path)
        for deeper, _ in config_reference.inner_sections(field.kind) if depth else ():
            found |= loose_fields(deeper, path, depth - 1)
    return frozenset(found)


def suggestion(flag: str, prefix: str = "--config.") -> str:
    """"did you mean --config.train.num_steps?" for a flag that means a field; "" where none does.

    flag: its name, with or without a section: num_steps, train.num_steps, lr.
    """
    name = flag.lstrip("-").removeprefix("config.").replace("-", "_")
    paths = [path for path, _ in all_fields()]
    plain = {re.sub(r"\[\d+\]", "", path): path for path in reversed(paths)}
    last = name.rpartition(".")[2]
    if re.sub(r"\[\d+\]", "", name) in plain:
        found = name
    elif last.lower() in ELSEWHERE:
        found = ELSEWHERE[last.lower()]
    elif same := [path for path in paths if path.rpartition(".")[2] == last]:
        found = min(same, key=lambda path: path.count("."))   # the outermost section that has it
    else:
        lasts = {path.rpartition(".")[2]: path for path in sorted(
            paths, key=lambda path: -path.count("."))}
        near = nearest(last, lasts).partition("'")[2].partition("'")[0]
        found = lasts.get(near, "")
    return f"did you mean {prefix}{found}?" if found else ""
