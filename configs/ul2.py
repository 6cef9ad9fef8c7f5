"""UL2 20B: T5 1.1 with SwiGLU and 32 + 32 layers, trained on a mixture of denoisers.

Paper: Tay et al. 2022 (arXiv:2205.05131), section 4: width 4,096, MLPs of 16,384, 16 heads of
256, rows of 512 and 512 tokens, 1T tokens in batches of 1,024 rows (2M steps), Adafactor with
inverse-square-root decay, no dropout.
Expected: 20B parameters (19.5B counted, as in the released checkpoint).
Data: the paper's seven denoisers in equal shares, over C4 with T5's vocabulary.
Hardware: 512 TPU v4 with mesh.fsdp and mesh.tensor.
Command: python -m t5x_lite.train --config=configs/ul2.py:20b --workdir=DIR
"""

from configs import _common, _t5
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import MLPConfig

SIZES = {"20b": _t5.Size(4096, 16384, 16, 256, 32)}


def run(size: str | None = "20b") -> RunConfig:
    """The pre-training run."""
    model = _t5.model(_common.size_of(SIZES, size, "ul2"), mlp=MLPConfig(activation="silu"),
                      tie_logits=False, dropout_rate=0.0)
    return _t5.pretraining(f"ul2_{size}", model, batch_size=1024, num_steps=2_000_000,
                           inputs_length=512, targets_length=512, train="c4_ul2")


def get_config(size: str | None = "20b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
