"""A 32k-token causal forward and backward pass fits in little memory."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_32k_tokens_train_within_4_gb():
    """T5's relative bias, 2 heads: their logits alone would be 2 x 32768^2 x 4 bytes = 8.6 GB."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.long_context", "auto", "32768"], capture_output=True,
        text=True, cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak_bytes"] < 4e9, found
    assert 0 < found["loss"] < 6 and 0 < found["gradient"] < 10
