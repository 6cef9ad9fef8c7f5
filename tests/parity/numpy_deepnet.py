"""DeepNet (Wang et al. 2022, figure 2) for one pair of rows, in float64."""

import numpy as np

from tests.parity.numpy_common import attention, heads, layer, layer_norm, sinusoid


def dense(x, p, name):
    """x W + b."""
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def attend(x, other, p, name, num_heads, mask):
    """Multi-head attention of x over `other`, with biases."""
    q = heads(dense(x, p, f"{name}/query"), num_heads)
    k, v = (heads(dense(other, p, f"{name}/{part}"), num_heads) for part in ("key", "value"))
    return dense(attention(q, k, v, mask), p, f"{name}/out")


def stack(params, side, x, config, mask, encoded=None, cross_mask=None):
    """Blocks of x_{l+1} = LN(alpha x_l + G(x_l))."""
    settings = getattr(config, side)
    num_heads = settings.segments[0].blocks[0].self_attention.num_heads

    def deepnorm(x, y, p, name):
        return layer_norm(settings.residual_alpha * x + y, p[f"post_{name}_norm/scale"],
                          p[f"post_{name}_norm/bias"])

    for n in range(settings.num_layers):
        p = layer(params, side, n)
        x = deepnorm(x, attend(x, x, p, "self_attention", num_heads, mask), p, "self_attention")
        if encoded is not None:
            y = attend(x, encoded, p, "cross_attention", num_heads, cross_mask)
            x = deepnorm(x, y, p, "cross_attention")
        y = dense(np.maximum(dense(x, p, "mlp/wi"), 0), p, "mlp/wo")
        x = deepnorm(x, y, p, "mlp")
    return x


def forward(params, tokens, config, source):
    """Logits [L, V] of the decoder's tokens given the encoder's, which hold no padding."""
    embedding = params["token_embedding/embedding"]
    width = embedding.shape[1]

    def embed(ids):
        vectors = embedding[ids] * np.sqrt(width)
        return vectors + np.array([sinusoid(i, width) for i in range(len(ids))])

    everything = np.ones((1, 1), bool)
    encoded = stack(params, "encoder", embed(source), config, everything)
    causal = np.tril(np.ones((len(tokens), len(tokens)), bool))
    x = stack(params, "decoder", embed(tokens), config, causal, encoded, everything)
    return x @ embedding.T
