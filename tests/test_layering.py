"""The layers of t5x_lite: a module imports only from lines above its own, without cycles."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Every module or package directly in t5x_lite stands here; a new one takes its place.
LAYERS = (
    ("errors", "tree", "sharding", "precision", "remat", "fp8", "offload", "pipeline_schedules",
     "pipeline"),
    ("layers",),
    ("blocks", "models", "beam", "decoding", "peft", "convert"),
    ("losses", "objectives", "adafactor", "schedules", "optim", "metrics",
     "data_pipeline", "data_vocabulary", "data_tasks", "data", "cost"),
    ("state", "steps", "checkpoint_format", "checkpoint"),
    ("config", "build"),
    ("processes", "cli", "report", "predictor", "evaluate", "init_from", "train", "eval",
     "infer", "inspect_task", "rehearse", "remedies", "plan", "convert_main", "experiment", "interactive",
     "scaling"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# TensorFlow takes seconds to import and a GPU box may do without it. data_tasks.py imports it,
# and data_pipeline.py that needs it throughout, inside functions only; so do data_vocabulary.py
# and the command that reads Mesh TensorFlow's checkpoints.
TENSORFLOW = ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio")
MAY_IMPORT_TENSORFLOW = (
    "t5x_lite.data_tasks", "t5x_lite.data_vocabulary", "t5x_lite.data_pipeline",
    "t5x_lite.convert.__main__")

MAX_LINES = 500
MAX_FUNCTION_LINES = 80


def modules(package: str) -> dict[str, pathlib.Path]:
    """{dotted name: file} of every module in a package of the repository."""
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(source: str, known) -> set[str]:
    """The dotted names that a module imports, wherever in it the import stands.

    `from a import b` is an import of a.b where that is a module (in `known`), else of a.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found


def import_graph(package: str) -> dict[str, set[str]]:
    known = modules(package)
    return {name: imports(file.read_text(), known) for name, file in known.items()}


def component(module: str) -> str | None:
    """"t5x_lite.layers.mlp" -> "layers"; None for the package itself. A package's command
    stands apart from it: "t5x_lite.convert.__main__" -> "convert_main"."""
    parts = module.split(".")
    if parts[-1] == "__main__" and f"{parts[1]}_main" in LEVEL:
        return f"{parts[1]}_main"
    return parts[1] if len(parts) > 1 else None


def downward(graph: dict[str, set[str]]) -> list[str]:
    """The imports that go against the layers, as readable lines."""
    wrong = []
    for module, imported in graph.items():
        for other in imported:
            if not other.startswith("t5x_lite.") or component(module) is None:
                continue
            upper, lower = LEVEL.get(component(other)), LEVEL.get(component(module))
            if upper is not None and lower is not None and upper > lower:
                wrong.append(f"{module} (L{lower}) imports {other} (L{upper})")
    return wrong


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of some import cycle in the graph; [] where there is none."""
    done = set()

    def visit(module: str, above: list[str]) -> list[str]:
        if module in above:
            return [*above[above.index(module):], module]
        if module in done or module not in graph:
            return []
        for other in graph[module]:
            if cycle := visit(other, [*above, module]):
                return cycle
        done.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in graph)), [])


def test_every_module_has_a_layer():
    unplaced = {component(m) for m in modules("t5x_lite")} - {None, *LEVEL}
    assert not unplaced, f"give {sorted(unplaced)} a place in LAYERS, in tests/test_layering.py"


def test_no_module_imports_from_a_layer_below():
    assert downward(import_graph("t5x_lite")) == []


def test_imports_have_no_cycle():
    assert find_cycle(import_graph("t5x_lite")) == []


def test_the_checks_see_what_they_look_for():
    known = {"t5x_lite.tree", "t5x_lite.train"}
    assert imports("from t5x_lite import tree, nothing\ndef f():\n  import seqio", known) == {
        "t5x_lite.tree", "t5x_lite", "seqio"}
    assert downward({"t5x_lite.tree": {"t5x_lite.train"}}) == [
        "t5x_lite.tree (L0) imports t5x_lite.train (L6)"]
    assert find_cycle({"a": {"b", "os"}, "b": {"c"}, "c": set()}) == []
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_only_the_data_modules_and_tasks_know_tensorflow():
    graph = import_graph("t5x_lite")
    for module, imported in graph.items():
        names = {name.split(".")[0] for name in imported}
        if module not in MAY_IMPORT_TENSORFLOW:
            assert not names & {*TENSORFLOW, "tasks"}, module
        assert "configs" not in names, module


def test_everything_but_the_data_pipeline_imports_without_tensorflow():
    names = [m for m in modules("t5x_lite") if m != "t5x_lite.data_pipeline"
             and (component(m) is None or LEVEL[component(m)] <= LEVEL["build"])]
    code = (f"import importlib, json, sys\n"
            f"for name in {TENSORFLOW}: sys.modules[name] = None\n"
            f"for name in json.loads(sys.argv[1]): importlib.import_module(name)\n")
    result = subprocess.run([sys.executable, "-c", code, json.dumps(names)], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_the_builder_does_not_import_tensorflow():
    code = ("import sys, t5x_lite.build\n"
            f"assert not set(sys.modules) & set({TENSORFLOW})")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", ["t5x_lite", "tasks", "configs", "scripts"])
def test_files_and_functions_are_short(package):
    too_long = []
    for file in sorted((ROOT / package).rglob("*.py")):
        source = file.read_text()
        lines = source.count("\n")
        if lines > MAX_LINES:
            too_long.append(f"{file.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    too_long.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}: {length}")
    assert not too_long
