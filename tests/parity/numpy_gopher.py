"""Gopher (Rae et al. 2021, section 3.1) for one row of tokens, in float64."""

import numpy as np

from tests.parity.numpy_common import heads, layer, rms_norm, sinusoid, softmax


def relative_attention(h, p, num_heads):
    """Dai et al. 2019, equation of section 3.3, term by term:

    A_ij = q_i . k_j + q_i . (W_R R_{i-j}) + u . k_j + v . (W_R R_{i-j})
    """
    length, width = h.shape
    q, k, v = (heads(h @ p[f"self_attention/{name}/kernel"], num_heads)
               for name in ("query", "key", "value"))
    head_dim = q.shape[-1]
    content = p["self_attention/content_bias"].reshape(num_heads, head_dim)
    position = p["self_attention/position_bias"].reshape(num_heads, head_dim)
    logits = np.full((num_heads, length, length), -np.inf)
    for i in range(length):
        for j in range(i + 1):
            r = sinusoid(i - j, width) @ p["self_attention/relative_key/kernel"]
            r = r.reshape(num_heads, head_dim)
            logits[:, i, j] = ((q[:, i] * k[:, j]).sum(-1) + (q[:, i] * r).sum(-1)
                               + (content * k[:, j]).sum(-1) + (position * r).sum(-1))
    y = softmax(logits / np.sqrt(head_dim)) @ v
    return y.transpose(1, 0, 2).reshape(length, -1) @ p["self_attention/out/kernel"]


def gelu(x):
    """Hendrycks & Gimpel 2016, the tanh form."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


def forward(params, tokens, config):
    """Logits [L, V]: pre-norm blocks with RMSNorm, tied embeddings."""
    stack = config.decoder
    num_heads = stack.segments[0].blocks[0].self_attention.num_heads
    embedding = params["token_embedding/embedding"]
    x = embedding[tokens]
    for n in range(stack.num_layers):
        p = layer(params, "decoder", n)
        x = x + relative_attention(rms_norm(x, p["pre_self_attention_norm/scale"]), p, num_heads)
        h = rms_norm(x, p["pre_mlp_norm/scale"])
        x = x + gelu(h @ p["mlp/wi/kernel"]) @ p["mlp/wo/kernel"]
    return rms_norm(x, params["decoder/final_norm/scale"]) @ embedding.T
