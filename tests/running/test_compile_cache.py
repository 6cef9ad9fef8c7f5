"""The cache of compiled programs: where it is, what it costs where it cannot be, how it is bounded."""

import os
import pathlib
import stat
import subprocess
import sys

import jax
import pytest

from t5x_lite.errors import UserError
from t5x_lite.running import compile_cache

CODE = """
import os, sys, jax
from t5x_lite.running import compile_cache
os.umask(0o002)
print(compile_cache.switch_on(sys.argv[1]), jax.config.jax_compilation_cache_dir)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 2 + 1)(1.0)
"""


def switched(tmp_path, flag, **variables):
    """What switch_on says, and what JAX then has, in a process without other settings."""
    env = {n: v for n, v in os.environ.items() if not n.startswith("JAX_COMPILATION")}
    done = subprocess.run([sys.executable, "-c", CODE, flag], capture_output=True, text=True,
                          env={**env, "T5X_LITE_CACHE": str(tmp_path / "cache"), **variables})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_programs_stand_beside_the_text_cache_with_the_umasks_mode(tmp_path):
    said, set_to = switched(tmp_path, "")
    assert said == set_to == str(tmp_path / "cache" / "programs" / compile_cache.machine())
    files = list(pathlib.Path(said).glob("*-cache"))
    assert files and all(stat.S_IMODE(f.stat().st_mode) == 0o664 for f in files)
    assert stat.S_IMODE(pathlib.Path(said).stat().st_mode) == 0o775


def test_the_flag_moves_it_or_leaves_it_out(tmp_path):
    assert switched(tmp_path, str(tmp_path / "other"))[0].startswith(str(tmp_path / "other"))
    assert switched(tmp_path, "none") == ["None", "None"]
    assert not (tmp_path / "cache").exists()


def test_jaxs_own_variable_stays(tmp_path):
    assert switched(tmp_path, "", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax")) == [
        "None", str(tmp_path / "jax")]


def test_a_folder_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(UserError, match="--compile_cache=.*Name a folder"):
        compile_cache.switch_on(str(tmp_path / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "file"))
    assert compile_cache.switch_on("") is None   # nobody asked for it: the run goes on
    assert jax.config.jax_compilation_cache_dir == before


def test_what_was_read_longest_ago_goes_first(tmp_path):
    for i, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (i if name != "a" else 99, 0))
    compile_cache.bound(tmp_path, 25)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "d"]
