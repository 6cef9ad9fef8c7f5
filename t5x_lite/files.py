"""Files and folders of this machine and of buckets: gs://BUCKET/PATH wherever a path may stand.

`path` makes a pathlib.Path of a local name and an etils.epath.Path of a URL, which is of the same
kind: /, name, parent, exists, is_file, is_dir, iterdir, glob, read_text, read_bytes. What the two have
not in common stands here, one function for both:

    write_whole, write_bytes   a reader sees the old file or the new one, never a part
    write_new                  the same where there must be none
    append                     adds to a file's end, which no object has: it is written anew
    Growing                    files that a run appends to all the time: of a bucket, kept in a
                               temporary folder and copied there every now and then
    rename                     of a folder: in a bucket, many objects one after another
    local_copy                 what only local readers read (memory maps, SentencePiece)

The first name in a bucket is also where a lost connection, missing rights or packages are found;
buckets.py is the only module beside this one, and the lock, that knows what a bucket is.
"""

import glob as glob_lib
import hashlib
import io
import os
import pathlib
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias

from etils import epath

from t5x_lite import buckets
from t5x_lite.buckets import failures, is_url
from t5x_lite.errors import TryAgain, UserError

Path: TypeAlias = pathlib.Path | epath.Path

__all__ = ["Path", "failures", "is_url"]

_SPECIAL = "*?[]#"   # orbax and gcsfs read them as patterns, or as the end of the name
SECONDS_BETWEEN_COPIES = 30.0


def path(name: os.PathLike | str) -> Path:
    """The path of a local name or of a gs:// URL.

    Raises:
        UserError: another URL, a character that buckets' libraries do not take in a name, or a
            bucket that cannot be reached, is not there or may not be read.
    """
    text = os.fspath(name)
    _check(text)
    if not is_url(text):
        return pathlib.Path(text)
    if found := [c for c in _SPECIAL if c in text]:
        raise UserError(f"{text}: a name in a bucket may not hold {' '.join(found)} here.")
    return epath.Path(text)


def local(name: os.PathLike | str, field: str) -> pathlib.Path:
    """The path of a local name, for what works on this machine's disk alone.

    field: what messages call it. Raises UserError for a URL.
    """
    if is_url(name):
        raise UserError(f"{field}={os.fspath(name)}: must be a local folder; copy it into a bucket "
                        "afterwards.")
    return pathlib.Path(name)


def _check(name: str) -> None:
    try:
        buckets.check(name)
    except buckets.Refused as error:
        raise (TryAgain if error.passing else UserError)(str(error)) from error


def absolute(name: os.PathLike | str) -> str:
    """The name in full: a local one from the root, ~ expanded."""
    return os.fspath(path(name)) if is_url(name) else os.path.abspath(os.path.expanduser(name))


def explain(error: BaseException, where: os.PathLike | str) -> str:
    """What an error of reading or writing at a path says, and of a bucket what to do about it."""
    return buckets.explain(error, buckets.split(where).bucket if is_url(where) else "")


def refusal(error: BaseException, where: os.PathLike | str, message: str) -> UserError:
    """The error (not raised) of what could not be read or written at a path: TryAgain where a bucket
    is out of reach for the moment."""
    kind = TryAgain if is_url(where) and buckets.is_passing(error) else UserError
    return kind(message)


def is_out_of_reach(error: BaseException, where: os.PathLike | str) -> bool:
    """Whether an error of reading in a bucket tells of the way there, or of rights, and not of what
    is in it; False for a local path."""
    return is_url(where) and buckets.is_out_of_reach(error)


# --- looking --------------------------------------------------------------------------------------

def exists(name: str) -> bool:
    """Whether there is a file, folder or anything else; the name may hold any character."""
    return is_file(name) or is_dir(name) if is_url(name) else os.path.exists(name)


def is_file(name: str) -> bool:
    """Whether there is such a file; the name may hold any character."""
    if not is_url(name):
        return os.path.isfile(name)
    _check(name)
    return buckets.entry(name) is not None


def is_dir(name: str) -> bool:
    """Whether there is such a folder (in a bucket: one that holds something); the name may hold any
    character."""
    if not is_url(name):
        return os.path.isdir(name)
    _check(name)
    return next(buckets.entries(name), None) is not None


def names(folder: os.PathLike | str) -> list[str]:
    """The names in a folder, sorted; [] where there is none."""
    place = path(folder)
    return sorted(child.name for child in place.iterdir()) if place.is_dir() else []


def glob(pattern: str) -> list[str]:
    """The files that a pattern (*, ?, [ and **) matches, sorted."""
    if is_url(pattern):
        _check(pattern)
        return sorted(buckets.glob(pattern))
    found = glob_lib.glob(pattern, recursive=True)
    return sorted(match for match in found if os.path.isfile(match))


def find(folder: Path, name: str, skip: str = "checkpoints") -> list[Path]:
    """The files of that name in a folder and below, sorted, but for folders called `skip`."""
    if is_url(folder):
        return sorted(map(path, buckets.find(folder, name, skip)))
    return sorted(file for file in folder.rglob(name) if skip not in file.relative_to(folder).parts)


def state_of(name: str) -> tuple[str, int, int]:
    """(name in full, bytes, a number that changes with the content: time or generation)."""
    if not is_url(name):
        stat = os.stat(name)
        return os.path.abspath(name), stat.st_size, stat.st_mtime_ns
    _check(name)
    found = buckets.entry(name)
    if found is None:
        raise FileNotFoundError(name)
    return name, found.size, found.generation


# --- reading --------------------------------------------------------------------------------------

def open_binary(name: str) -> BinaryIO:
    """A file's bytes. Raises OSError and others of `failures`."""
    if not is_url(name):
        return open(name, "rb")
    _check(name)
    return io.BufferedReader(epath.Path(name).open("rb"), 1 << 20)   # type: ignore[arg-type]


def read_text(file: Path) -> str:
    """A file's text, with U+FFFD for what is not UTF-8."""
    return file.read_bytes().decode("utf-8", errors="replace")


def copy(source: Path, target: pathlib.Path) -> None:
    """Copies a file to a local one."""
    target.write_bytes(source.read_bytes())


def local_copy(name: os.PathLike | str, wanted: Callable[[str], bool] = lambda name: True
               ) -> pathlib.Path:
    """The local path of a file or folder: of a bucket, a copy in the cache, made anew when what is
    there has changed; a local name as it is.

    Args:
        wanted: which of a folder's files to bring, by name.
    Raises:
        UserError: there is nothing of that name, or it cannot be read.
    """
    if not is_url(name):
        return pathlib.Path(name).expanduser()
    source = path(name)
    bucket, key = buckets.split(source)
    try:
        one = buckets.entry(source)
        held = [one] if one else [e for e in buckets.entries(source) if wanted(e.key)]
        if not held:
            raise UserError(f"{source}: there is no file and no folder of that name.")
        digest = hashlib.sha256(repr((bucket, held)).encode()).hexdigest()[:16]
        folder = cache_root() / "buckets" / f"{source.name}-{digest}"
        if not folder.is_dir():
            _bring(f"gs://{bucket}", key, held, folder)
    except failures() as error:
        raise refusal(error, source, f"{source}: {explain(error, source)}") from error
    return folder / source.name if one else folder


def _bring(bucket: str, key: str, held: list[buckets.Entry], folder: pathlib.Path) -> None:
    """Fills a fresh folder and renames it into place, so that no reader sees half of one."""
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        for entry in held:
            file = scratch / (entry.key.removeprefix(f"{key}/") if entry.key != key
                              else entry.key.rpartition("/")[2])
            file.parent.mkdir(parents=True, exist_ok=True)
            buckets.download(f"{bucket}/{entry.key}", file)
        try:
            scratch.rename(folder)
        except OSError:   # another process was first, with the same content
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# --- writing --------------------------------------------------------------------------------------

def write_whole(path: os.PathLike | str, text: str) -> None:
    """Writes a text file, by way of a neighbour that is renamed over it once it is on the disk.

    Raises OSError where the folder cannot be written to; the old file then stands as it was.
    """
    write_bytes(path, text.encode())


def write_bytes(path: os.PathLike | str, content: bytes) -> None:
    """Writes a file whole: readers see the old content or the new one, never a part, in a bucket too."""
    if is_url(path):
        buckets.write(path, content)
        return
    path = pathlib.Path(path)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_new(path: os.PathLike | str, text: str) -> None:
    """Writes a text file where there is none. Raises FileExistsError where there is one."""
    if not is_url(path):
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    elif buckets.replace(path, text.encode(), 0) is None:
        raise FileExistsError(os.fspath(path))


def append(path: os.PathLike | str, text: str) -> None:
    """Adds a text to a file's end, once in a while: a bucket's object is read and written anew."""
    if is_url(path):
        buckets.append(path, text.encode())
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def rename(source: Path, target: Path, marker: str) -> None:
    """Renames a folder. marker: see buckets.move_folder."""
    if is_url(source):
        buckets.move_folder(source, target, marker)
    else:
        source.rename(target)


def upload_folder(folder: pathlib.Path, target: Path, unfinished: str) -> None:
    """Writes the files of a local folder into one of a bucket, in which nothing else then is.

    unfinished: the name of an object that stands there until all of them do.
    """
    buckets.write(target / unfinished, b"")
    held = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    for name in sorted(held):
        buckets.upload(folder / name, target / name)
    prefix = f"{buckets.split(target).key}/"
    there = {entry.key.removeprefix(prefix) for entry in buckets.entries(target)}
    for name in there - held - {unfinished}:   # of another that was killed
        buckets.delete(target / name)
    buckets.delete(target / unfinished)


# --- files that grow ------------------------------------------------------------------------------

class Growing:
    """Files of a folder that are appended to, over and over, by one process.

    Attributes:
        folder: where to append. It is the folder itself, or for a bucket a temporary one, whose files
            a thread copies there: at most every SECONDS_BETWEEN_COPIES, and a tenth of the time.
    """

    def __init__(self, folder: os.PathLike | str, complain: Callable[[BaseException], None]):
        """complain: is told of copies that failed (of `failures`); the next is tried all the same."""
        self._target = path(folder)
        self._complain = complain
        self._copied: dict[str, tuple[int, int]] = {}
        self._one_at_a_time = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if not is_url(folder):
            self.folder = pathlib.Path(folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="t5x_lite-"))
        self._thread = threading.Thread(target=self._copy_now_and_then, name="bucket", daemon=True)
        self._thread.start()

    def bring(self, name: str) -> pathlib.Path:
        """The local path of a file of the folder, with what it holds up to now."""
        file = self.folder / name
        if self._thread is not None and (self._target / name).exists():
            buckets.download(self._target / name, file)
            self._copied[name] = _size_and_time(file)
        return file

    def sync(self) -> bool:
        """Whether all that was appended up to now is where it belongs; else `complain` was told."""
        if self._thread is None:
            return True
        with self._one_at_a_time:
            try:
                for name, state in self._changed():
                    buckets.upload(self.folder / name, self._target / name, state[0])
                    self._copied[name] = state
            except failures() as error:
                self._complain(error)
                return False
        return True

    def _changed(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for file in sorted(self.folder.rglob("*")):
            name = file.relative_to(self.folder).as_posix()
            if file.is_file() and not name.endswith(".new"):
                state = _size_and_time(file)
                if self._copied.get(name) != state:
                    yield name, state

    def _copy_now_and_then(self) -> None:
        pause = SECONDS_BETWEEN_COPIES
        while not self._closed.wait(pause):
            began = time.monotonic()
            self.sync()
            pause = max(SECONDS_BETWEEN_COPIES, 10 * (time.monotonic() - began))

    def close(self) -> None:
        """The last copy; the temporary folder goes, unless that failed."""
        if self._thread is None or self._closed.is_set():
            return
        self._closed.set()
        if self.sync():
            shutil.rmtree(self.folder, ignore_errors=True)


def _size_and_time(file: pathlib.Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


# --- the cache ------------------------------------------------------------------------------------

_cache_override = ""


def set_cache_root(name: str) -> None:
    """Uses this folder for every cache of this process; '' goes back to the default."""
    global _cache_override
    _cache_override = name


def cache_root() -> pathlib.Path:
    """data.cache_dir, else $T5X_LITE_CACHE, else ~/.cache/t5x_lite ($XDG_CACHE_HOME).

    Raises:
        UserError: a URL. The cache is read by memory maps and renames.
    """
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "t5x_lite"
    chosen = _cache_override or os.environ.get("T5X_LITE_CACHE") or default
    if is_url(chosen):
        raise UserError(f"data.cache_dir or T5X_LITE_CACHE={chosen}: the cache must be a local "
                        "folder; what it holds is made anew on each machine.")
    return pathlib.Path(chosen).expanduser()
