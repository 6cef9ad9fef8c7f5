"""Puts a release's repository into setup.py, the notebooks and the docs:

    python scripts/set_repository.py https://github.com/OWNER/NAME

setup.py's REPOSITORY is the one setting. Colab's badges and install cells and the docs' links spell it out,
since they are read before anything is installed; tests/test_repository.py holds them equal to it.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETTING = re.compile(r'^REPOSITORY = "https://github\.com/([\w.-]+/[\w.-]+)"$', re.M)


def current(root: pathlib.Path) -> str:
    """OWNER/NAME of setup.py."""
    return SETTING.search((root / "setup.py").read_text()).group(1)


def places(root: pathlib.Path) -> list[pathlib.Path]:
    """The files that spell it out."""
    return [root / "setup.py", root / "README.md", *sorted((root / "notebooks").glob("*.ipynb")),
            *sorted((root / "docs").glob("*.md"))]


def change(root: pathlib.Path, new: str) -> list[pathlib.Path]:
    """Writes OWNER/NAME in place of the current one; returns the files that changed."""
    old = current(root)
    pattern = re.compile(rf"(github(?:\.com)?/){re.escape(old)}(?![\w-])")
    changed = []
    for file in places(root):
        text = file.read_text()
        fresh = pattern.sub(rf"\g<1>{new}", text)
        if fresh != text:
            file.write_text(fresh)
            changed.append(file)
    return changed


if __name__ == "__main__":
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)/?", "".join(sys.argv[1:]))
    if found is None:
        sys.exit("usage: python scripts/set_repository.py https://github.com/OWNER/NAME")
    print(*change(ROOT, found.group(1)), sep="\n")
