"""One name of the repository: badges, install cells and links are setup.py's REPOSITORY."""

import importlib.util
import json
import re
import runpy
import shutil
import tomllib

import pytest

from tests.test_imports import ROOT

_SPEC = importlib.util.spec_from_file_location("set_repository", ROOT / "scripts" / "set_repository.py")
set_repository = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(set_repository)

NAMED = re.compile(r"github(?:\.com)?/([\w.-]+/t5x_lite)\b")   # also of Colab's /github/OWNER/NAME/blob/


def links(root) -> dict[str, list[str]]:
    """{file: the repositories of this project that it names}."""
    return {str(file.relative_to(root)): NAMED.findall(file.read_text())
            for file in set_repository.places(root)}


def test_all_places_name_the_one_setting():
    found = links(ROOT)
    name = set_repository.current(ROOT)
    assert {one for names in found.values() for one in names} == {name}
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = ["".join(cell["source"]) for cell in json.loads(file.read_text())["cells"]]
        assert f"https://colab.research.google.com/github/{name}/blob/main/notebooks/{file.name})" in cells[0]
        assert f"@ git+https://github.com/{name}\"" in cells[1]


def test_install_cells_and_docs_name_extras_that_there_are(monkeypatch):
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **settings: given.update(settings))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    named = {extra for file in set_repository.places(ROOT)
             for found in re.findall(r"(?:t5x_lite|\\.)\[([a-z_,]+)\]", file.read_text())
             for extra in found.split(",")}
    assert {"cpu", "report", "plan"} <= named <= set(given["extras_require"])
    assert given["url"] == f"https://github.com/{set_repository.current(ROOT)}"


@pytest.mark.parametrize("new", ["lab/t5x_lite", "a.b-c/t5x_lite"])
def test_a_release_fills_it_in_everywhere(tmp_path, new):
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("notebooks", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=lambda _, names: [
            n for n in names if not n.endswith((".md", ".ipynb"))])
    before = links(tmp_path)
    changed = set_repository.change(tmp_path, new)
    after = links(tmp_path)
    assert set_repository.current(tmp_path) == new and len(changed) >= 8
    assert {file: len(names) for file, names in after.items()} == {
        file: len(names) for file, names in before.items()}
    assert {one for names in after.values() for one in names} == {new}
    assert set_repository.change(tmp_path, new) == []


def test_extras_keep_their_spelling_in_the_wheel():
    """setuptools 75 writes plan_gpu as plan-gpu, of which the pip of Python 3.11 installs nothing."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert build["requires"] == ["setuptools>=64,<75"]
