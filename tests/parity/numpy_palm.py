"""PaLM (Chowdhery et al. 2022, section 2) for one row of tokens, in float64."""

import numpy as np

from tests.parity.numpy_common import attention, heads, layer, layer_norm


def rope(x):
    """Su et al. 2021, equation 34: feature pairs (2i, 2i + 1) of x_NLH turn by m theta_i."""
    out = np.empty_like(x)
    head_dim = x.shape[-1]
    for m in range(x.shape[1]):
        for i in range(head_dim // 2):
            theta = m * 10000 ** (-2 * i / head_dim)
            a, b = x[:, m, 2 * i], x[:, m, 2 * i + 1]
            out[:, m, 2 * i] = a * np.cos(theta) - b * np.sin(theta)
            out[:, m, 2 * i + 1] = b * np.cos(theta) + a * np.sin(theta)
    return out


def forward(params, tokens, config):
    """Logits [L, V] of y = x + MLP(LayerNorm(x)) + Attention(LayerNorm(x))."""
    stack = config.decoder
    num_heads = stack.segments[0].blocks[0].self_attention.num_heads
    embedding = params["token_embedding/embedding"]
    x = embedding[tokens]
    mask = np.tril(np.ones((len(tokens), len(tokens)), bool))
    epsilon = stack.norm.epsilon
    for n in range(stack.num_layers):
        p = layer(params, "decoder", n)
        h = layer_norm(x, p["pre_self_attention_norm/scale"], epsilon=epsilon)
        q = rope(heads(h @ p["self_attention/query/kernel"], num_heads))
        # Multi-query: one key and one value head for all.
        k = rope(heads(h @ p["self_attention/key/kernel"], 1))
        v = heads(h @ p["self_attention/value/kernel"], 1)
        attended = attention(q, k, v, mask) @ p["self_attention/out/kernel"]
        gate = h @ p["mlp/wi_0/kernel"]
        swiglu = gate / (1 + np.exp(-gate)) * (h @ p["mlp/wi_1/kernel"])
        x = x + swiglu @ p["mlp/wo/kernel"] + attended
    x = layer_norm(x, params["decoder/final_norm/scale"], epsilon=epsilon)
    return x @ embedding.T / np.sqrt(x.shape[-1])
