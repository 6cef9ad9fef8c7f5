"""Files that are written whole (a reader sees the old one or the new one, never a part), and the
folder of caches."""

import os
import pathlib


def cache_root() -> pathlib.Path:
    """$T5X_LITE_CACHE, else ~/.cache/t5x_lite ($XDG_CACHE_HOME)."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "t5x_lite"
    return pathlib.Path(os.environ.get("T5X_LITE_CACHE") or default).expanduser()


def write_whole(path: os.PathLike | str, text: str) -> None:
    """Writes a text file by way of a neighbour that is renamed over it once it is on the disk.

    Raises OSError where the folder cannot be written to; the old file then stands as it was.
    """
    path = pathlib.Path(path)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
