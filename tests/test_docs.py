"""README and docs/ say what there is: commands, flags, fields, links; the short commands run."""

import ast
import dataclasses
import importlib
import pathlib
import re
import shlex
import subprocess
import sys
import typing

import pytest

from t5x_lite import config as configs, config_reference
from t5x_lite.config import RunConfig
from t5x_lite.data import tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
MAX_README_LINES = 150
SECTIONS = tuple(f.name for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.type))
SUFFIXES = (".py", ".json", ".jsonl", ".md", ".txt", ".ipynb")
ABSL = {"help", "helpfull", "verbosity", "alsologtostderr"}

# Commands of the pages that take seconds, and what each must print.
SHORT = {
    "python -m t5x_lite.plan --published": "GPT-3",
    "python -m t5x_lite.inspect_task --list": "scan_simple",
    "python -m t5x_lite.scaling laws": "hoffmann",
}


# --- what a page says ---------------------------------------------------------------------------

def code_lines(text: str) -> list[str]:
    """The lines of code blocks, indented or fenced, continued lines joined, comments dropped."""
    lines, fenced, before = [], False, ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (not before or lines and before == lines[-1])):
            lines.append(line)
        before = line if line.strip() else ""
    joined = "\n".join(line.strip() for line in lines).replace("\\\n", " ")
    return [re.sub(r"\s+#\s.*$", "", line) for line in joined.splitlines()]


def commands(text: str) -> list[list[str]]:
    """The words of each command that runs something of ours, settings of variables left out."""
    found = []
    for line in code_lines(text):
        if not re.match(r"(?:[A-Z][A-Z0-9_]*=\S+ )*(python|make|t5x-lite-)", line):
            continue
        words = shlex.split(line.replace("…", " "))
        while re.match(r"[A-Z][A-Z0-9_]*=", words[0]):
            words.pop(0)
        found.append(words)
    return found


def fields_named(text: str) -> list[str]:
    """The dotted fields, such as train.num_steps, that stand in a page's inline code."""
    found = []
    for code in re.findall(r"`([^`\n]+)`", text):
        for word in re.split(r"[\s,()'\"]+", code):
            name = word.removeprefix("--override=").removeprefix("--").removeprefix("config.")
            name = name.partition("=")[0].rstrip(".:;")
            if name.startswith(tuple(f"{s}." for s in SECTIONS)) and not name.endswith(SUFFIXES):
                found.append(name)
    return found


# --- what there is ------------------------------------------------------------------------------

def flags_of(file: pathlib.Path) -> set[str]:
    """The flags that a main, or a folder with one, defines by absl or argparse, and cli.py's."""
    names = set()
    own = set(file.parent.glob("*.py")) if file.name == "__main__.py" else {file}
    for source in {*own, ROOT / "t5x_lite" / "cli.py"}:
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called, first = getattr(node.func, "attr", ""), node.args[0]
            if (called.lower().startswith("define_") or called == "add_argument") and isinstance(
                    first, ast.Constant):
                names.add(str(first.value).lstrip("-"))
    return names | ABSL


def kinds_at(kind: object, name: str) -> list:
    """The types that the field `name` has in the dataclasses that `kind` may be."""
    if typing.get_origin(kind) is dict:
        return [typing.get_args(kind)[1]]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return [hints[name]] if name in hints else []
    return [found for part in typing.get_args(kind) for found in kinds_at(part, name)]


def field_exists(path: str) -> bool:
    """Whether a dotted path, perhaps with [i], names a field of a run's config."""
    kinds: list = [RunConfig]
    for name in re.sub(r"\[\w+\]", "", path).split("."):
        if name.isupper() or name == "*":   # a reader puts a name here
            return True
        kinds = [found for kind in kinds for found in kinds_at(kind, name)]
    return bool(kinds)


# Modules that hand their command line over to another program's parser.
PASSED_ON = {"t5x_lite.evaluation.harness": "lm_eval's"}


def main_of(words: list[str]) -> pathlib.Path:
    if words[0].startswith("t5x-lite-"):
        return ROOT / "t5x_lite" / f"{words[0].removeprefix('t5x-lite-').replace('-', '_')}.py"
    if words[1] == "-m":
        module = ROOT / words[2].replace(".", "/")
        return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
    return ROOT / words[1]


def check_command(words: list[str]) -> None:
    """Fails where a command names a module, flag, config or field that does not exist."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(words[1:2]) <= set(targets), words
        return
    if words[0] == "python" and words[1] == "-m" and not words[2].startswith("t5x_lite"):
        return
    main = main_of(words)
    assert main.is_file(), main
    if set(words[2:3]) & set(PASSED_ON):
        return
    known, run, changes = flags_of(main), RunConfig(), []
    for word in words:
        if not word.startswith("--"):
            continue
        flag, _, value = word[2:].partition("=")
        head, _, field = flag.partition(".")
        assert head in known or head.removeprefix("no") in known, f"--{flag} of {' '.join(words)}"
        if flag == "config" and value.startswith("configs/") and pathlib.Path(
                ROOT / value.partition(":")[0]).is_file() and "experiments/" not in value:
            name, _, argument = value.partition(":")
            module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
            run = configs.from_mapping(RunConfig, module.get_config(*([argument] * bool(argument))))
        if head == "config" and field:
            changes.append(f"{field}={value}")
        elif head == "override":
            changes.append(value)
        elif head == "decode":
            changes.append(f"eval.decode.{field}={value}")
    for change in changes:
        assert field_exists(change.partition("=")[0]), f"{change} of {' '.join(words)}"
    if known & {"config"} and "experiment" not in main.name:
        configs.override(run, [c for c in changes if c.partition("=")[0].count("rules") == 0])


# --- the tests ----------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_fields_exist(page):
    text = page.read_text()
    for words in commands(text):
        check_command(words)
    wrong = [name for name in fields_named(text) if not field_exists(name)]
    assert not wrong, f"{page.name} names fields that do not exist: {wrong}"


def test_the_check_sees_what_it_looks_for():
    text = ("Say\n\n    A=b python -m t5x_lite.train \\\n        --config=configs/t5_1_1.py:small # x\n"
            "\nor `train.num_step=3`, `data.train`, `train.py`\n\n```\nmake test\n```\n")
    words = ["python", "-m", "t5x_lite.train", "--config=configs/t5_1_1.py:small"]
    assert commands(text) == [words, ["make", "test"]]
    assert fields_named(text) == ["train.num_step", "data.train"]
    assert not field_exists("train.num_step") and field_exists("optimizer.groups[0].schedule")
    assert field_exists("model.decoder.segments[i].blocks[i].moe.router.kind") or field_exists(
        "model.decoder.segments[i].blocks[i].moe")
    for wrong in (["--workdirs=x"], ["--config.train.num_step=3"], ["--config.mesh.fsdp.x=3"]):
        with pytest.raises(AssertionError):
            check_command([*words, *wrong])
    with pytest.raises(UserError):
        check_command([*words, "--config.train.num_steps=many"])
    with pytest.raises(AssertionError):
        check_command(["make", "tests"])


def test_readme_is_short_and_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= MAX_README_LINES
    for target in re.findall(r"\]\(([^)#]+)", readme):
        assert "://" in target or (ROOT / target).exists(), target


def test_python_in_the_docs_is_python():
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
            compile(block, page.name, "exec")


def test_the_task_of_ones_own_in_the_readme_is_one(tmp_path, monkeypatch):
    block, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    monkeypatch.chdir(tmp_path)
    for name in ("train.tsv", "held_out.tsv"):
        (tmp_path / name).write_text("The capital of Norway\tOslo\n")
    pytest.importorskip("seqio")
    # The registry outlives the test: names with this prefix are known as the tests' own.
    own = block.replace('"t5"', '"facts"').replace('"my_task"', '"data_test_readme"')
    (tmp_path / "readme_tasks.py").write_text(own)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = DataConfig(task_modules="readme_tasks", validation="data_test_readme")
    task, examples = data_tasks.eval_examples(config, "data_test_readme", objective="seq2seq")
    example = next(examples)
    vocabulary = task.output_features["targets"].vocabulary
    assert vocabulary.decode(example["targets"].tolist()[:-1]) == "Oslo"
    assert example["targets"][-1] == vocabulary.eos_id


def test_the_config_of_ones_own_in_train_md_is_one():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "train.md").read_text(), flags=re.S)
    names: dict = {}
    exec(blocks[0], names)
    config = names["get_config"]()
    assert config.name == "mine" and config.train.num_steps == 20_000


def test_config_reference_is_current():
    found = (ROOT / "docs" / "config_reference.md").read_text()
    assert found == config_reference.page(), (
        "the dataclasses changed: python -m t5x_lite.config_reference > docs/config_reference.md")


def test_config_reference_reads_comments_beside_and_above(tmp_path, monkeypatch):
    (tmp_path / "reference_example.py").write_text('''
import dataclasses

@dataclasses.dataclass(frozen=True)
class Example:
    """An example."""

    one: int = 1   # beside, and
                   # going on
    # above, in
    # two lines
    two: tuple[tuple[str, float], ...] = ()
    three: int | None = None
''')
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("reference_example").Example
    assert [(f.name, f.type, f.default, f.comment) for f in config_reference.fields(kind)] == [
        ("one", "int", "1", "beside, and going on"),
        ("two", "list of (str, float)", "()", "above, in two lines"),
        ("three", "int or None", "None", "")]


@pytest.mark.parametrize("command", SHORT, ids=lambda command: command.split(".")[-1])
def test_short_commands_run(command):
    assert any(command.split() in commands(page.read_text()) for page in PAGES), "say it in docs/"
    result = subprocess.run([sys.executable, *command.split()[1:]], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    assert SHORT[command] in result.stdout
