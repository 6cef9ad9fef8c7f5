"""A run of seconds for the tests of the mains: a tiny T5 over the bytes of a text file.

    --config=tests/tiny_config.py:TEXT_FILE
"""

import dataclasses

from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.parallel.sharding import MeshConfig
from tests import tiny


def run(text_file: str) -> RunConfig:
    """The run as dataclasses: 8 rows a step, a checkpoint every other step."""
    base = tiny.seq2seq(dropout=0.1)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, vocab_size=384),
        data=DataConfig(train_files=text_file, validation_files=text_file, vocabulary="byt5",
                        inputs_length=24, targets_length=12, num_shards=4, shuffle_buffer=16),
        train=TrainConfig(num_steps=6, global_batch_size=8, log_every=1),
        eval=EvalConfig(every=4, num_batches=2),
        checkpoint=CheckpointConfig(every=2, keep_last=2),
        mesh=MeshConfig(data=-1))


def get_config(text_file: str):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(text_file))


def write_text(path) -> str:
    """Makes a text file of 200 short lines; returns its name."""
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
    lines = (" ".join(words[(i * k + k) % 10] for k in range(3, 9)) for i in range(200))
    path.write_text("\n".join(lines) + "\n")
    return str(path)
