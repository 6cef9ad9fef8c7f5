"""Prediction of further tokens while training: DeepSeek-V3's sequential modules (DeepSeek-AI 2024,
arXiv:2412.19437, section 2.2, equations 21 to 25).

    h'_i^k = M_k [norm(h_i^(k-1)); norm(Emb(t_(i+k)))]      h^k = norm(T_k(h'^k))
    L_k    = - 1/T sum_i log P_i^k(t_(i+k+1)),  P^k = Head(h^k)

h^0 are the model's hidden states before the logits, T_k one more block like the decoder's last, the
embedding and the head are the model's own. At i the module k sees t_1 … t_(i+k), so that nothing is
told that it is to predict. The modules are no part of decoding.

Shape letters: B batch, L length, D model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.errors import UserError, at_least
from t5x_lite.layers.config import InitConfig
from t5x_lite.layers.linear import Dense, kernel_std
from t5x_lite.layers.norm import Norm
from t5x_lite.layers.position import POSITIONS
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.parallel import remat, sharding


def validate(config: ModelConfig) -> None:
    """Raises UserError for models that cannot have such modules, naming the field."""
    number = at_least("model.further_tokens", config.further_tokens, 0)
    if not number:
        return
    stack = config.decoder
    obstacles = {
        f"model.architecture={config.architecture!r}": config.architecture != "decoder_only",
        f"model.prompt_length={config.prompt_length}": config.prompt_length > 0,
        f"model.parametrization={config.parametrization!r}": config.parametrization != "standard",
        "this decoder.position.kind, a bias on the logits": stack is not None and (
            POSITIONS[stack.position.kind].bias is not None)}
    for what, holds in obstacles.items():
        if holds:
            raise UserError(f"model.further_tokens={number} does not go with {what}. Use 0, or a "
                            "plain decoder_only model.")


class FurtherToken(nnx.Module):
    """One module: from the hidden states of the one before to those that predict a token more."""

    def __init__(self, key: jax.Array, embed_dim: int, block: nnx.Module, stack: StackConfig,
                 init: InitConfig, dtype: jnp.dtype = jnp.float32):
        """block: a new one like the decoder's last."""
        keys = jax.random.split(key, 4)
        self.hidden_norm = Norm(keys[0], embed_dim, stack.norm, dtype)
        self.token_norm = Norm(keys[1], embed_dim, stack.norm, dtype)
        self.merge = Dense(keys[2], 2 * embed_dim, embed_dim, ("embed", None), dtype=dtype,
                           std=kernel_std(init, 2 * embed_dim, embed_dim))
        self.block = block
        self.final_norm = Norm(keys[3], embed_dim, stack.norm, dtype)
        self.stack = stack

    def __call__(self, hidden: jax.Array, embedded: jax.Array, inputs: Any
                 ) -> tuple[jax.Array, dict]:
        """h^(k-1)_BLD, the embedded tokens_BLD t_(i+k) and blocks.BlockInputs -> (h^k_BLD, aux)."""
        both = jnp.concatenate([self.hidden_norm(hidden), self.token_norm(embedded)], axis=-1)
        x = self.merge(both, ("act_batch", "act_norm_length", "act_embed"))

        def run(x, block, inputs):
            return block(x, inputs, inputs.key)

        x, (_, aux) = remat.remat(run, self.stack.remat, in_scan=False)(x, self.block, inputs)
        x = sharding.shard(self.final_norm(x), "act_batch", "act_length", "act_embed")
        return x, aux
