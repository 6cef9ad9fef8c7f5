"""T5 1.1 LM-adapted: T5 1.1 trained for another while to continue text, as prompt tuning wants it.

Paper: Lester et al. 2021 (arXiv:2104.08691), section 3.2: 100,000 further steps of Raffel et al.'s
LM objective (a prefix is read, the rest is written), on the public T5 1.1 checkpoints.
Expected: T5 1.1's 77M, 248M, 783M, 2.85B and 11.1B parameters.
Left open by the paper: batch and rate, taken as pre-training's (2,048 rows, Adafactor).
Hardware: as configs/t5_1_1.py.
Command: python -m t5x_lite.train --config=configs/t5_lm_adapted.py:small --workdir=DIR
--config.init_from=hf:google/t5-v1_1-small (google/t5-small-lm-adapt is the result)
"""

import dataclasses

from configs import t5_1_1
from t5x_lite.config import RunConfig, to_config_dict

SIZES = t5_1_1.SIZES


def run(size: str | None = "small") -> RunConfig:
    """The adaptation of one size."""
    run = t5_1_1.run(size)
    return dataclasses.replace(
        run, name=f"t5_lm_adapted_{size}",
        data=dataclasses.replace(run.data, train="c4_prefix_lm", validation="c4_prefix_lm"),
        train=dataclasses.replace(run.train, num_steps=100_000))


def get_config(size: str | None = "small"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
