"""Scaling laws: fit them, design the ladders that identify them, compare methods by them.

N and C mean nothing until it is said how they were counted (the head's products alone move Porian's
exponent from .84 to .71), so a table names its columns by this convention:

    params                      all parameters
    params_no_embed             without token and position tables, hidden layers only (Kaplan's N)
    params_no_embed_head        the hidden layers and the head's kernel
    params_active               those that a token meets; of a mixture, its chosen experts alone
    flops                       of training, forward and backward
    flops_6nd                   6 x params_no_embed_head x positions
    tokens                      positions, padding included, unless a column says otherwise
    tokens_loss, tokens_filled  those that bear loss, and those that are not padding

This package needs numpy and scipy, neither JAX nor TensorFlow.
"""
