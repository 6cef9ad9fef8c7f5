"""Scaling laws: fit them, design the ladders that identify them, compare methods by them.

N and C mean nothing until it is said how they were counted: the one convention, and the names of the
columns, stand in running/counts.py. Fitting needs numpy and scipy, neither JAX nor TensorFlow;
ladders import JAX, where a run of them is built or measured, and so do coordinate checks.
"""
