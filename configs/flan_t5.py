"""Flan-T5: T5 1.1 LM-adapted, fine-tuned on instructions.

Paper: Chung et al. 2022 (arXiv:2210.11416), appendix E: Adafactor at a constant 5e-4, dropout 0.05,
batches of 64 packed rows of 1,024 inputs and 256 targets for 98,000 (small) to 14,000 (xxl) steps.
Expected: T5 1.1's 77M, 248M, 783M, 2.85B and 11.1B parameters.
Taken: data.train, the FLAN mixture, is yours to give (`tasks/__init__.py` lists what is shipped).
Hardware: as configs/t5_1_1.py.
Command: python -m t5x_lite.train --config=configs/flan_t5.py:small --workdir=DIR
--config.init_from=hf:google/t5-small-lm-adapt --config.data.train=TASKS
(hf:google/flan-t5-small is the result)
"""

import dataclasses

from configs import _common, _t5, t5_1_1
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.mlp import MLPConfig

# Appendix E's steps.
SIZES = {"small": 98_000, "base": 84_000, "large": 64_000, "xl": 38_000, "xxl": 14_000}


def run(size: str | None = "small") -> RunConfig:
    """The fine-tuning of one size."""
    steps = _common.size_of(SIZES, size, "flan_t5")
    model = _t5.model(t5_1_1.SIZES[size], mlp=MLPConfig(activation="gelu_tanh", gated=True),
                      tie_logits=False, dropout_rate=0.05)
    run = _t5.pretraining(f"flan_t5_{size}", model, batch_size=64, num_steps=steps,
                          inputs_length=1024, targets_length=256, train="", vocabulary="t5")
    schedule = dataclasses.replace(run.optimizer.schedule, factors="constant",
                                   base_learning_rate=5e-4)
    return dataclasses.replace(
        run, data=dataclasses.replace(run.data, packing=True),
        optimizer=dataclasses.replace(run.optimizer, schedule=schedule))


def get_config(size: str | None = "small"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
