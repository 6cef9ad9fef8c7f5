"""What every field of a config is: type, default and the comment beside it in the source.

The dataclasses are the only place where fields are described. `python -m t5x_lite.config_reference`
prints docs/config_reference.md from them; tests/test_docs.py holds that page current.
"""

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from t5x_lite.config import RunConfig

HEAD = """# Config reference

Every field of a run's config, made from the dataclasses and their comments by
`python -m t5x_lite.config_reference > docs/config_reference.md`. A field is a flag of `train`,
`--config.model.embed_dim=256`, and an override of the commands that read a workdir,
`--override=model.embed_dim=256`. Defaults are those of the dataclasses; a preset of configs/ sets
its own, and a run writes what holds into its `config.json`.
"""


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config dataclass."""

    name: str
    type: str      # as a reader would write it: "int | None", "section", "list of (str, str)"
    default: str   # "" where the field must be given or is a section
    comment: str   # plain English, "" where the name says it
    kind: Any      # the type itself


@functools.cache
def fields(kind: type) -> list[Field]:
    """The fields of a config dataclass in the order of their definition."""
    comments = _comments(kind)
    hints = typing.get_type_hints(kind)
    return [Field(f.name, _type_name(hints[f.name]), _default(f), comments.get(f.name, ""),
                  hints[f.name]) for f in dataclasses.fields(kind)]


def sections(kind: type = RunConfig, where: str = "") -> Iterator[tuple[list[str], type]]:
    """([dotted places], dataclass) of a config's sections, the outermost first.

    A dataclass that stands in several places, such as the encoder's and the decoder's stack, comes
    once with all of them.
    """
    places: dict[type, list[str]] = {}

    def visit(kind: type, where: str) -> None:
        seen = kind in places
        places.setdefault(kind, []).append(where)
        if seen:
            return
        for field in fields(kind):
            for inner, suffix in inner_sections(field.kind):
                visit(inner, f"{where}.{field.name}{suffix}".lstrip("."))

    visit(kind, where)
    return ((where, kind) for kind, where in places.items())


def inner_sections(kind: Any) -> list[tuple[type, str]]:
    """[(dataclass, "" or "[i]")] that a field of this type holds."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return [(kind, "")]
    suffix = "[i]" if typing.get_origin(kind) is tuple else ""
    return [(inner, suffix + deeper) for part in typing.get_args(kind)
            for inner, deeper in inner_sections(part)]


def _comments(kind: type) -> dict[str, str]:
    """{field: its comment}: the lines right above it, and what stands behind it.

    A comment that goes on in a line of its own is indented more deeply than fields are.
    """
    source = textwrap.dedent(inspect.getsource(kind))
    body = ast.parse(source).body[0].body   # type: ignore[attr-defined]
    above, behind = _comment_lines(source, body[0].col_offset)
    comments = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            first, last = node.lineno, node.end_lineno or node.lineno
            here = [behind[n] for n in range(first, last + 1) if n in behind]
            name = typing.cast(ast.Name, node.target).id
            comments[name] = " ".join(_block_above(above, first) + here)
    return comments


def _comment_lines(source: str, indent: int) -> tuple[dict[int, str], dict[int, str]]:
    """{line: comment} of those in lines of their own at `indent`, and of those behind code."""
    above: dict[int, str] = {}
    behind: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, column = token.start
        text = token.string.lstrip("# ")
        if token.type != tokenize.COMMENT:
            continue
        if column == indent:
            above[line] = text
            continue
        if token.line.strip().startswith("#"):   # goes on from the comment before it
            line = max(n for n in behind if n < line)
            text = f"{behind[line]} {text}"
        behind[line] = text
    return above, behind


def _block_above(above: Mapping[int, str], line: int) -> list[str]:
    """The comment lines that end right above `line`, from the first."""
    block: list[str] = []
    while line - 1 - len(block) in above:
        block.append(above[line - 1 - len(block)])
    return block[::-1]


def _type_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return "section"
    if kind is type(None):
        return "None"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(map(_type_name, args)))
    if origin is tuple and args[-1] is Ellipsis:
        return f"list of {_type_name(args[0])}"
    if origin is tuple:
        return f"({', '.join(map(_type_name, args))})"
    if origin is dict:
        return f"{_type_name(args[0])} to {_type_name(args[1])}"
    return getattr(kind, "__name__", str(kind))


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING or dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        return ""
    if isinstance(value, dict):
        return "see below" if value else "{}"
    return repr(value)


def summary(field: Field) -> str:
    """The first sentence that a section's dataclass says of itself, "" for other fields."""
    inner = [kind for kind, _ in inner_sections(field.kind)][:1]
    return inspect.cleandoc(inner[0].__doc__ or "").split("\n\n")[0] if inner else ""


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "\\<").replace("*", "\\*").replace("$", "\\$")


def page() -> str:
    """docs/config_reference.md."""
    lines = [HEAD]
    for places, kind in sections():
        title = " and ".join(f"`{place}`" for place in places if place) or "A run"
        lines += [f"## {title}", "", inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0], "",
                  "| field | type | default | what it is |", "|---|---|---|---|"]
        for field in fields(kind):
            default = f"`{_cell(field.default)}`" if field.default else ""
            comment = field.comment or summary(field)
            lines.append(f"| `{field.name}` | {field.type} | {default} | {_cell(comment)} |")
        lines.append("")
    rules = dataclasses.fields(RunConfig)
    default = next(f.default_factory().rules for f in rules if f.name == "sharding")  # type: ignore
    lines += ["## The default of `sharding.rules`", "", "| logical axis | mesh axes |", "|---|---|",
              *(f"| `{name}` | {', '.join(axes) or 'none'} |" for name, axes in default.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
