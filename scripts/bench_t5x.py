"""T5X as the peer of bench_step.py and bench_start.py, in an environment that bench_peers.py makes.

    python scripts/bench_t5x.py step 8 512,114 float32     a step of T5.1.1-small for every line it reads
    python scripts/bench_t5x.py start FOLDER               one step of the quickstart's shapes, from text

`step` answers each line of standard input with the seconds of one train step of T5X's own Trainer,
PjitPartitioner and Adafactor on random tokens, after one that compiles. `start` calls T5X's train() with
configs/quickstart.py's sizes on its task and prints when the step has ended. Both take T5X as it is
published (t5x/examples/t5, learning rates of its pretrain.gin, no dropout), whole masks and no packing, as
ours there. Imports nothing of t5x_lite but the tasks.
"""

import sys
import time

import cpu_environment  # noqa: F401  first of all: it may start the script again
import jax
import numpy as np
import seqio
from t5x import adafactor, models, partitioning, trainer, utils
from t5x.examples.t5 import network


class Numbers(seqio.PassThroughVocabulary):
    """Ids as they are: what a model is asked for, where no text is read."""


def model(vocabulary: seqio.Vocabulary, dtype: str, **sizes) -> models.EncoderDecoderModel:
    """T5 1.1 of these sizes with the optimizer of its gin files."""
    return models.EncoderDecoderModel(
        module=network.Transformer(network.T5Config(
            dtype=dtype, mlp_activations=("gelu", "linear"), dropout_rate=0.0,
            logits_via_embedding=False, **sizes)),
        input_vocabulary=vocabulary, output_vocabulary=vocabulary, z_loss=1e-4,
        optimizer_def=adafactor.Adafactor(
            decay_rate=0.8, step_offset=0, logical_factor_rules=adafactor.standard_logical_factor_rules()))


def learning_rate():
    return utils.create_learning_rate_scheduler(
        factors="constant * rsqrt_decay", base_learning_rate=1.0, warmup_steps=10_000)


def serve_steps(rows: int, inputs: int, targets: int, dtype: str) -> None:
    """Answers every line with the seconds of a step."""
    vocab_size = 32128
    small = model(Numbers(vocab_size), dtype, vocab_size=vocab_size, emb_dim=512, num_heads=6,
                  head_dim=64, num_encoder_layers=8, num_decoder_layers=8, mlp_dim=1024)
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(2, vocab_size, (rows, length), dtype=np.int32)
    batch = {"encoder_input_tokens": draw(inputs), "decoder_input_tokens": draw(targets),
             "decoder_target_tokens": draw(targets),
             "decoder_loss_weights": np.ones((rows, targets), np.int32)}
    partitioner = partitioning.PjitPartitioner(
        num_partitions=1, logical_axis_rules=partitioning.standard_logical_axis_rules())
    made = utils.TrainStateInitializer(
        optimizer_def=small.optimizer_def, init_fn=small.get_initial_variables,
        input_shapes={name: x.shape for name, x in batch.items()},
        input_types={name: x.dtype for name, x in batch.items()}, partitioner=partitioner)
    loop = trainer.Trainer(
        model=small, train_state=made.from_scratch(jax.random.PRNGKey(0)), partitioner=partitioner,
        eval_names=(), summary_dir=None, train_state_axes=made.train_state_axes,
        rng=jax.random.PRNGKey(1), learning_rate_fn=learning_rate(), num_microbatches=None)
    loop.compile_train(batch)
    batches = iter(lambda: batch, None)

    def step() -> float:
        begin = time.perf_counter()
        loop.train(batches, 1)
        jax.block_until_ready(loop.train_state)
        return time.perf_counter() - begin

    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


def start(folder: str) -> None:
    """One step of the quickstart's sizes on its task."""
    from t5x import train

    import tasks
    tasks.register_all()
    name, lengths = "fact_wordings", {"inputs": 32, "targets": 16}
    vocabulary = seqio.get_mixture_or_task(name).output_features["targets"].vocabulary
    train.train(
        model=model(vocabulary, "float32", vocab_size=3072, emb_dim=128, num_heads=4,
                    head_dim=32, num_encoder_layers=2, num_decoder_layers=2, mlp_dim=512),
        train_dataset_cfg=utils.DatasetConfig(name, lengths, "train", 128, shuffle=True, seed=0),
        train_eval_dataset_cfg=None, infer_eval_dataset_cfg=None,
        checkpoint_cfg=utils.CheckpointConfig(save=None, restore=None),
        partitioner=partitioning.PjitPartitioner(
            num_partitions=1, logical_axis_rules=partitioning.standard_logical_axis_rules()),
        trainer_cls=lambda **given: trainer.Trainer(
            learning_rate_fn=learning_rate(), num_microbatches=None, **given),
        model_dir=folder, total_steps=1, eval_steps=0, eval_period=0, random_seed=0,
        summarize_config_fn=lambda *_: None)
    print("step 1 has ended", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "step":
        serve_steps(int(sys.argv[2]), *map(int, sys.argv[3].split(",")), sys.argv[4])
    else:
        start(sys.argv[2])
