"""ST-MoE-32B: top-2 mixtures in every fourth layer, with the router z-loss.

Paper: Zoph et al. 2022 (arXiv:2202.08906), table 16: 269B parameters, the FLOPs of a dense 32B.
Left open by the paper: where in 27 layers the mixtures stand; here layers 4, 8, …, 24 of each
stack, which gives the stated count.
Hardware: TPU pods with mesh.expert.
Command: python -m t5x_lite.train --config=configs/st_moe.py:32b --workdir=DIR
"""

import dataclasses

from configs import _common, _t5, switch
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import MLPConfig, MoEConfig

SIZES = {"32b": _t5.Size(5120, 20480, 64, 128, 27)}


def run(size: str | None = "32b") -> RunConfig:
    """The pre-training run: capacity factor 1.25 / 2, z-loss 0.001, balance 0.01."""
    dense = _t5.model(_common.size_of(SIZES, size, "st_moe"),
                      mlp=MLPConfig(activation="gelu_tanh", gated=True), tie_logits=False,
                      dropout_rate=0.0)
    moe = MoEConfig(num_experts=64, router="top_2", second_policy="random", capacity_factor=1.25,
                    eval_capacity_factor=2.0, balance_weight=0.01, z_weight=0.001)
    model = dataclasses.replace(dense, encoder=switch.sparsify(dense.encoder, moe, 4),
                                decoder=switch.sparsify(dense.decoder, moe, 4))
    return _t5.pretraining(f"st_moe_{size}", model, batch_size=2048, num_steps=700_000)


def get_config(size: str | None = "32b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
