"""t5x_lite: train, evaluate and serve T5s, decoder-only LMs and sparse MoEs in JAX."""
