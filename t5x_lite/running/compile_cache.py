"""JAX's cache of compiled programs: on for every door, of bounded size, apart for unlike machines.

    --compile_cache=       programs/ beside the text cache ($T5X_LITE_CACHE, else ~/.cache/t5x_lite)
    --compile_cache=DIR    there, such as a folder that a group shares: files take the umask's mode
    --compile_cache=none   nothing is kept

JAX's keys hold the program, the devices, XLA's flags and jaxlib's version, so that what is read back is
what would be compiled, to the bit. They do not hold the CPU's instructions, for which each kind of
machine has a folder of its own. A JAX_COMPILATION_CACHE_DIR of the environment stays where the flag
is not given. A file that is torn or cannot be written costs a compilation, never a run.
"""

import hashlib
import os
import pathlib
import platform

import jax

from t5x_lite import files
from t5x_lite.errors import UserError

OFF = "none"
MAX_BYTES = 2 << 30        # of a machine's folder; what was read longest ago goes first
MIN_SECONDS = 0.1          # what compiles faster is not kept


def switch_on(chosen: str) -> pathlib.Path | None:
    """Has JAX keep its programs as --compile_cache says; returns the folder, None where there is none.

    Raises:
        UserError: a folder that was asked for cannot be written to. The default one is then left out.
    """
    if chosen == OFF or (not chosen and os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        if chosen == OFF:
            jax.config.update("jax_compilation_cache_dir", None)
        return None
    root = pathlib.Path(chosen).expanduser() if chosen else files.cache_root() / "programs"
    folder = root / machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written to")
        bound(folder, MAX_BYTES)
    except OSError as error:
        if chosen:
            raise UserError(f"--compile_cache={chosen}: {error}. Name a folder that can be written "
                            f"to, or {OFF}.") from error
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def machine() -> str:
    """A name of this machine's instructions: a program compiled for others must not be loaded."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def bound(folder: pathlib.Path, max_bytes: int) -> None:
    """Removes the files that were read longest ago until the rest is at most `max_bytes`."""
    found = []
    for file in folder.iterdir():
        try:
            found.append((file.stat(), file))
        except FileNotFoundError:   # another process bounds it, too
            continue
    total = sum(stat.st_size for stat, _ in found)
    for stat, file in sorted(found, key=lambda pair: pair[0].st_atime):
        if total <= max_bytes:
            return
        file.unlink(missing_ok=True)
        total -= stat.st_size
