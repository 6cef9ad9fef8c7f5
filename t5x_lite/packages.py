"""Packages by name: what an import need not drag in, and our `tasks` and `configs` beside a user's.

Both are top-level packages, and a user's folder tasks/ or configs/ in the working folder comes
before ours on Python's path. `join` lets both be found: the user's modules first, then ours.
"""

import builtins
import contextlib
import gc
import importlib
import importlib.util
import pathlib
import sys
import threading
import types
from collections.abc import Callable, Iterator

from t5x_lite.errors import UserError, nearest

_HOME = pathlib.Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def lean(*names: str) -> Iterator[None]:
    """For imports that try packages which they can do without: those of these names that are not
    imported yet seem not to be installed, and nothing collects garbage while modules pile up.

    TensorFlow's Keras takes scikit-learn and matplotlib along, tensorboardX takes torch: 1.5 and 2 s.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))   # None: Python's way to say that there is none
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()   # what imports make stays: later searches for garbage leave it out
        if collecting:
            gc.enable()
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


def keep_lazy_imports_apart() -> None:
    """Keeps what etils' lazy imports do to the thread that asks for them.

    While TFDS is imported they stand in the place of Python's own import, for every thread: another
    one that imports anything meanwhile (JAX does, as it compiles beside the data) would be given modules
    that are none.
    """
    from etils import epy
    from etils.epy import lazy_imports_utils as utils
    theirs, lazily, plain = utils.lazy_imports, utils._lazy_import, builtins.__import__
    if hasattr(theirs, "kept_apart"):
        return
    here = threading.local()

    @contextlib.contextmanager
    def lazy_imports(*args, **kwargs):
        before, here.lazy = getattr(here, "lazy", False), True
        try:
            with theirs(*args, **kwargs):
                yield
        finally:
            here.lazy = before

    def import_(name, globals_=None, locals_=None, fromlist=(), level=0, **settings):
        if getattr(here, "lazy", False):
            return lazily(name, globals_, locals_, fromlist, level, **settings)
        return plain(name, globals_, locals_, fromlist, level)

    lazy_imports.kept_apart = True
    utils._lazy_import = import_
    epy.lazy_imports = utils.lazy_imports = lazy_imports


def needed(name: str, extra: str, what: str) -> types.ModuleType:
    """The module, imported where it is used. Raises UserError that names the extra to install.

    what: who needs it, such as "a plan's tables".
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"{what} need {package}: pip install 't5x_lite[{extra}]'.") from error


def function(field: str, name: str) -> Callable:
    """What "module:function" names, of a module on Python's path.

    field: of the config, for messages.

    Raises:
        UserError: not of that form, no such module, or nothing in it of that name that can be called.
    """
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise UserError(f"{field}={name!r}: must be MODULE:FUNCTION.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not module_name.startswith(str(error.name)):
            raise
        raise UserError(f"{field}={name!r}: no module named {error.name!r} on PYTHONPATH.") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"{field}={name!r}: {module_name} has no function {attribute!r}."
                        f"{nearest(attribute, vars(module))}")
    return found


def join(name: str) -> types.ModuleType:
    """Our package of that name; from now on `name.module` is found in a user's and in ours.

    Raises:
        UserError: both packages have a module of the same name, which only one can have.
    """
    folder = _HOME / name
    package = importlib.import_module(name)
    if pathlib.Path(getattr(package, "__file__", None) or "").parent == folder:
        return package
    if str(folder) not in package.__path__:
        _check_apart(name, [pathlib.Path(place) for place in package.__path__], folder)
        package.__path__.append(str(folder))
    return _under_another_name(f"_t5x_lite_{name}", folder)


def folders(name: str) -> list[pathlib.Path]:
    """Where `name.module` is looked for: a user's folders, then ours."""
    join(name)
    return [pathlib.Path(place) for place in importlib.import_module(name).__path__]


def _check_apart(name: str, places: list[pathlib.Path], folder: pathlib.Path) -> None:
    ours = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    for place in places:
        both = sorted(ours & {path.stem for path in place.glob("*.py")})
        if both:
            raise UserError(f"your package {place} has modules of the same names as t5x_lite's own "
                            f"{name}: {', '.join(both)}. Rename them, or the folder.")


def _under_another_name(alias: str, folder: pathlib.Path) -> types.ModuleType:
    """The module of a package's __init__.py, whose own imports by `name.module` work by now."""
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, folder / "__init__.py")
        sys.modules[alias] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[alias])
    return sys.modules[alias]
