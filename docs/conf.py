"""Sphinx's settings for docs/: `make docs` builds the pages and treats every warning as an error.

Pages are MyST Markdown and notebooks (MyST-NB). T5X_LITE_DOCS_EXECUTE=1 runs the notebooks while
building, so that they show outputs; otherwise they are shown as they are stored, without.
"""

import os
import pathlib
import shutil

project = "t5x_lite"
author = "the t5x_lite authors"
copyright = f"2026, {author}"

extensions = ["myst_nb"]
root_doc = "index"
exclude_patterns = ["_build"]
suppress_warnings = ["misc.highlighting_failure"]   # a notebook's cells may hold !commands

# ## and ### get anchors, so that pages link to sections of one another.
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath", "deflist"]

nb_execution_mode = "cache" if os.environ.get("T5X_LITE_DOCS_EXECUTE") == "1" else "off"
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_render_markdown_format = "myst"   # tables that a cell shows are tables
nb_merge_streams = True   # a run prints line by line; cells tagged scroll-output keep to a box

html_theme = "sphinx_book_theme"
html_title = "t5x_lite"

# Sphinx reads below docs/ only; the notebooks stand beside it for those who open them.
_here = pathlib.Path(__file__).resolve().parent
_copies = _here / "notebooks"
shutil.rmtree(_copies, ignore_errors=True)
if any((_here.parent / "notebooks").glob("*.ipynb")):
    shutil.copytree(_here.parent / "notebooks", _copies,
                    ignore=lambda _, names: [n for n in names if not n.endswith(".ipynb")])


def _list_other_pages(app, docname: str, source: list[str]) -> None:
    """Pages that index.md does not name, and the notebooks, stand at its end by their names.

    A glob would do, but one that matches nothing is a warning that cannot be suppressed.
    """
    if docname == root_doc:
        named = set(source[0].split())
        others = sorted(name for name in app.env.found_docs if name not in {*named, root_doc})
        source[0] = source[0].replace("EVERY-OTHER-PAGE", "\n".join(others))


def setup(app) -> None:
    app.connect("source-read", _list_other_pages)
