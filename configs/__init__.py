"""Configs: one file an experiment or a model family; `get_config(arg)` returns one run."""
