"""Real text from any Python installation: its documentation and its source code.

Documentation: the language reference that `help()` shows (pydoc_data.topics) and the
docstrings of the standard library, one document a module. Source: the library's modules,
one document each. About 2 MB and 9 MB, no download. Modules are parsed, never imported;
tests, IDLE, installed packages and the codec tables of `encodings` are left out.

    python_docs_span_corruption      T5's objective on the documentation
    python_source_span_corruption    … on the source
    python_span_corruption           mixture of the two, by size
    …_byt5                           the same over bytes, with ByT5's mean span of 20
    …_causal_lm, …_prefix_lm, …_bert, …_bart, …_ul2   other denoisers (data/denoising.py)

A module's documentation and source fall on the same side of the train/validation split.
"""

import ast
import functools
import hashlib
import pathlib
import sys
import sysconfig
from collections.abc import Iterator

import seqio

from t5x_lite.data import denoising, vocabularies
from t5x_lite.data.document_cache import DocumentSource

_VERSION = 1   # raise it whenever other documents come out, so that caches are made anew
_SKIPPED_FOLDERS = frozenset({
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3",
    "encodings", "pydoc_data", "ensurepip", "__pycache__", "turtledemo"})
_VALIDATION_SHARE = 20   # one module in twenty is held out


def split_of(module: str) -> str:
    """'train' or 'validation', from the module's dotted name alone."""
    digest = hashlib.sha256(module.encode()).digest()
    return "validation" if digest[0] * 256 + digest[1] < 65536 // _VALIDATION_SHARE else "train"


def modules() -> Iterator[tuple[str, str]]:
    """(dotted name, source) of the standard library's modules, in order of their paths."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and not parts[0].startswith("config-"):
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue   # no source text; nothing in it to learn from


def docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, in order, blank lines between."""
    try:
        tree = ast.parse(source)
    except SyntaxError:   # templates and the like
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = ((n.lineno if hasattr(n, "lineno") else 0, ast.get_docstring(n))
             for n in ast.walk(tree) if isinstance(n, documented))
    return "\n\n".join(text for _, text in sorted(d for d in found if d[1]))


def docs_documents() -> Iterator[tuple[str, str]]:
    """(split, text) of the language reference's topics and of every module's docstrings."""
    from pydoc_data import topics
    for topic, text in sorted(topics.topics.items()):
        yield split_of(f"topic:{topic}"), text
    for name, source in modules():
        text = docstrings(source)
        if text:
            yield split_of(name), text


def source_documents() -> Iterator[tuple[str, str]]:
    """(split, source) of every module that is not empty."""
    for name, source in modules():
        if source.strip():
            yield split_of(name), source


def key(kind: str) -> str:
    """The name of the cache folder of one kind of documents of this Python."""
    version = "".join(c if c.isalnum() or c == "." else "_" for c in sys.version.split(" (")[0])
    where = hashlib.sha256((sys.version + sysconfig.get_paths()["stdlib"]).encode()).hexdigest()
    return f"python_{kind}-{version}-{where[:8]}-v{_VERSION}"


_SOURCES = {
    "docs": DocumentSource(functools.partial(key, "docs"), ("train", "validation"),
                           docs_documents),
    "source": DocumentSource(functools.partial(key, "source"), ("train", "validation"),
                             source_documents),
}


def _register() -> None:
    byt5 = seqio.Feature(vocabularies.load("byt5"), add_eos=True)
    for kind, source in _SOURCES.items():
        denoising.register(f"python_{kind}", source, "python")
        seqio.TaskRegistry.add(
            f"python_{kind}_span_corruption_byt5", source=source,
            preprocessors=denoising.steps("span_corruption", mean_span_length=20.0),
            output_features={"inputs": byt5, "targets": byt5})
    for name in (*denoising.DENOISERS, "span_corruption_byt5"):
        # Bytes of each: about one part documentation to four parts source.
        seqio.MixtureRegistry.add(f"python_{name}", [
            (f"python_docs_{name}", 1.0), (f"python_source_{name}", 4.0)])


_register()
