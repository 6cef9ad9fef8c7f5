"""Pieces of reference forwards in float64 numpy, written from the papers, one row at a time.

Parameters come flat, {path: array}; `layer` takes the slice of one layer.
"""

import numpy as np


def layer(params: dict, prefix: str, index: int) -> dict:
    """{rest of the path: array} of layer `index` of a stacked segment."""
    start = f"{prefix}/segment_0/block_0/"
    return {path[len(start):]: x[index] for path, x in params.items() if path.startswith(start)}


def layer_norm(x, scale, bias=0.0, epsilon=1e-5):
    """Ba et al. 2016, equation 4."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


def rms_norm(x, scale, epsilon=1e-6):
    """Zhang & Sennrich 2019, equation 4."""
    return x / np.sqrt((x ** 2).mean(axis=-1, keepdims=True) + epsilon) * scale


def softmax(x):
    """Along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def heads(x, num_heads):
    """[L, N * H] -> [N, L, H]."""
    return x.reshape(len(x), num_heads, -1).transpose(1, 0, 2)


def attention(q, k, v, mask):
    """Vaswani et al. 2017, equation 1, for [N, L, H] heads -> [L, N * H]."""
    logits = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    y = softmax(np.where(mask, logits, -np.inf)) @ v
    return y.transpose(1, 0, 2).reshape(y.shape[1], -1)


def sinusoid(position, features):
    """Vaswani et al. 2017, section 3.5, sines before cosines."""
    angle = position / 10000 ** (2 * np.arange(features // 2) / features)
    return np.concatenate([np.sin(angle), np.cos(angle)])
