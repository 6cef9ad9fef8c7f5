"""What a command does before anything imports JAX, TensorFlow or gRPC: their C++ parts read the
environment once, and JAX's CUDA plugin says on import that there is no GPU.

A door's first import, of whichever of our modules, leads here; those that read the config's
dataclasses import JAX.
"""

import os

from t5x_lite import quiet

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("GLOG_minloglevel", "2")

with quiet.stderr():
    import jax  # noqa: F401
