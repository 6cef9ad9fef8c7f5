"""The house of t5x_lite: a room imports only from the floors below its own, without circles.

A room is a folder of t5x_lite or a module directly in it. Rooms of one floor may import one another
as long as no circle comes of it.
"""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# From the ground up. Every room stands here; a new one takes its place.
FLOORS = (
    ("errors", "tree", "log", "files", "buckets", "packages", "quiet", "first"),
    ("parallel", "decoding", "data"),
    ("layers", "checkpoints"),
    ("models",),
    ("training", "formats", "cost", "running"),
    ("config", "config_reference"),
    ("build", "manual"),
    ("init_from", "same_vocabulary", "report", "gin_spelling", "cli", "evaluation", "rollouts", "planning", "scaling", "corpus",
     "reporting"),
    ("train", "eval", "infer", "score_preferences", "refill", "plan", "convert", "experiment", "interactive",
     "inspect_task", "audit", "bias", "console"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LONGEST_CHAIN = 12   # modules, each importing the next

# TensorFlow takes seconds to import and a GPU box may do without it. What stands below data/ imports
# it where a task is made; the rest of the house reaches it by data/tasks.py, which imports it inside
# functions only. So does the command that reads Mesh TensorFlow's checkpoints.
TENSORFLOW = ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio")
TENSORFLOW_FREE_DATA = ("config", "tasks", "batches", "vocabulary", "spans", "chat_template", "chat_prompts")
MAY_IMPORT_TENSORFLOW = ("data", "convert")

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


def room(module: str) -> str | None:
    """"t5x_lite.layers.mlp" -> "layers"; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def climbs(graph: dict[str, set[str]]) -> list[str]:
    """The imports that go up, as readable lines."""
    wrong = []
    for module, imported in graph.items():
        for other in imported:
            if not other.startswith("t5x_lite.") or room(module) is None:
                continue
            upper, lower = FLOOR.get(room(other)), FLOOR.get(room(module))
            if upper is not None and lower is not None and upper > lower:
                wrong.append(f"{module} (floor {lower}) imports {other} (floor {upper})")
    return wrong


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest list of modules of which each imports the next; the graph has no circle."""
    chains: dict[str, list[str]] = {}

    def below(module: str) -> list[str]:
        if module not in chains:
            others = (below(other) for other in graph.get(module, ()) if other in graph)
            chains[module] = [module, *max(others, key=len, default=[])]
        return chains[module]

    return max(map(below, graph), key=len)


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


def test_every_module_has_a_room():
    unplaced = {room(m) for m in modules("t5x_lite")} - {None, *FLOOR}
    assert not unplaced, f"give {sorted(unplaced)} a place in FLOORS, in tests/test_imports.py"


def test_nothing_imports_upward():
    assert climbs(import_graph("t5x_lite")) == []


def test_imports_have_no_circle():
    assert find_cycle(import_graph("t5x_lite")) == []


def test_no_chain_of_imports_is_long():
    chain = longest_chain(import_graph("t5x_lite"))
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_the_checks_see_what_they_look_for():
    known = {"t5x_lite.tree", "t5x_lite.train"}
    assert imports("from t5x_lite import tree, nothing\ndef f():\n  import seqio", known) == {
        "t5x_lite.tree", "t5x_lite", "seqio"}
    assert climbs({"t5x_lite.tree": {"t5x_lite.train"}}) == [
        "t5x_lite.tree (floor 0) imports t5x_lite.train (floor 8)"]
    assert find_cycle({"a": {"b", "os"}, "b": {"c"}, "c": set()}) == []
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert longest_chain({"a": {"c", "os"}, "b": {"c", "a"}, "c": set()}) == ["b", "a", "c"]


def _needs_no_tensorflow(module: str) -> bool:
    if room(module) == "data":
        return module.count(".") == 1 or module.split(".")[2] in TENSORFLOW_FREE_DATA
    return room(module) is None or FLOOR[room(module)] <= FLOOR["build"]


def _first_of_ours(source: str) -> str:
    """The module of t5x_lite that a module imports before any other, "" for none."""
    found = [(node.lineno, node.names[0].name if node.module == "t5x_lite" else node.module)
             for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("t5x_lite")]
    return min(found, default=(0, ""))[1]


def test_a_command_is_quiet_before_it_imports_jax():
    """What JAX's CUDA plugin says on import is dropped in `first`, to which the doors' first import leads."""
    first = {name: _first_of_ours((ROOT / f"t5x_lite/{name}.py").read_text())
             for name in ("manual", "cli", *FLOORS[-1])}
    assert {first.pop("manual"), first.pop("cli")} == {"first"}
    del first["interactive"], first["console"]   # imported by a notebook; starts a door
    assert set(first.values()) <= {"manual", "cli"}, first


def test_only_data_knows_tensorflow_and_nothing_the_zoo():
    graph = import_graph("t5x_lite")
    for module, imported in graph.items():
        names = {name.split(".")[0] for name in imported}
        if room(module) not in MAY_IMPORT_TENSORFLOW:
            assert not names & {*TENSORFLOW}, module
        assert not names & {"tasks", "configs"}, module


def test_everything_but_the_making_of_tasks_imports_without_tensorflow():
    names = [m for m in modules("t5x_lite") if _needs_no_tensorflow(m)]
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
