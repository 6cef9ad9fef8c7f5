"""Eight simulated CPU devices for every test; set before JAX is first imported."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and run little: without LLVM's optimisations they take 0.6 of the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session", autouse=True)
def text_cache(tmp_path_factory):
    """Gathered text goes to a folder of the session (subprocesses included), not to ~/.cache."""
    os.environ.setdefault("T5X_LITE_CACHE", str(tmp_path_factory.mktemp("text_cache")))


pytest_plugins = ["tests.fixtures_tfds"]
