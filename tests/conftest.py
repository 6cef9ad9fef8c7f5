"""Eight simulated CPU devices for every test; set before JAX is first imported."""

import os
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and run little: without LLVM's optimisations they take 0.6 of the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
)
# One program is compiled once, whichever test, worker or subprocess comes to it first.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="t5x_lite_tests_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session", autouse=True)
def text_cache(tmp_path_factory):
    """Gathered text goes to a folder of the session (subprocesses included), not to ~/.cache."""
    os.environ.setdefault("T5X_LITE_CACHE", str(tmp_path_factory.mktemp("text_cache")))
