"""Comparisons: get_runs() lists arms, seeds and stages; run by t5x_lite.experiment."""
