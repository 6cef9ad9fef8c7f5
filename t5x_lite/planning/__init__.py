"""Rehearsing a run on machines that are only described: what fits, what it sends, what it costs."""
