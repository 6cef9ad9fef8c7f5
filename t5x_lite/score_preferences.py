"""Write a reference model's scores into preferences:
`python -m t5x_lite.score_preferences --workdir=DIR --input=PAIRS.jsonl --output=SCORED.jsonl`.

    --input=FILE        .jsonl ({"prompt" or "inputs", "chosen", "rejected"} a line), also .gz
    --output=FILE       the same objects with "reference_chosen" and "reference_rejected", the
                        log-probabilities of both answers in nats: what objective.reference=rows
                        reads
    --step=last         best or a number: which checkpoint of the workdir
    --config=…          instead of a workdir: the config of the run that is to start from
                        --config.init_from=hf:DIR, t5x:DIR or a workdir (see init_from.py)

Answers are cut and end as in training, so that data.inputs_length, data.targets_length and
data.vocabulary must be those of the run that reads the scores. The objective is dpo for a
decoder-only model and seq2seq_dpo for an encoder-decoder, whatever the config's.
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import dataclasses
import json
import math
from collections.abc import Iterator

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import

# isort: split

import jax
from absl import flags

from t5x_lite import files, init_from, log
from t5x_lite.build import Program, build
from t5x_lite.config import RunConfig
from t5x_lite.data import batches as data_batches, readers
from t5x_lite.data.rows import ANSWER
from t5x_lite.errors import UserError
from t5x_lite.training import objectives, preferences


def as_scorer(config: RunConfig, path: str) -> RunConfig:
    """The run's config with the objective and the data of scoring a file of preferences.

    Raises:
        UserError: a model that no preferences are for.
    """
    architecture = config.model.architecture
    able = [name for name in objectives.of_architecture(architecture)
            if objectives.OBJECTIVES[name].scored]
    if not able:
        raise UserError(f"model.architecture={architecture!r} writes no answers: preferences are "
                        "for decoder_only and encoder_decoder models.")
    return dataclasses.replace(
        config, objective=dataclasses.replace(
            config.objective, name=able[0], reference="none", label_smoothing=0.0),
        data=dataclasses.replace(config.data, packing=False, loss_on_inputs=False, train_files="",
                                 train=config.data.train or path))


def scores(program: Program, params, path: str) -> Iterator[tuple[float, float]]:
    """(log-probability of the chosen answer, of the rejected one) of each line, in order."""
    config = program.config
    score = jax.jit(lambda params, batch: (
        objectives.answer_scores(program.model.bind(params), batch, config.objective.logits_chunk),
        preferences.is_pair(batch[ANSWER])))
    with program.activate():
        for batch in data_batches.eval_batches(
                config.data, path, objective=config.objective.rows, split="train",
                batch_size=config.eval.batch_size or config.train.global_batch_size,
                sharding=program.batch_sharding):
            found, real = map(data_batches.whole, score(params, batch))
            yield from map(tuple, found[real].tolist())


def write(program: Program, params, path: str, output: str) -> int:
    """Writes the lines of `path` with their scores to `output`; gives their number.

    Raises:
        UserError: a malformed line, or a score that is no number.
    """
    try:
        scored = list(scores(program, params, path))
    except UserError as error:   # in this command's flags
        raise UserError(str(error).replace("data.validation=", "--input=")) from error
    lines = []
    for (number, record), found in zip(readers.json_lines(path), scored, strict=True):
        if not all(map(math.isfinite, found)):
            raise UserError(f"{path}, line {number}: the reference scores its answers {found}, "
                            "which is no number; try precision=float32.")
        named = dict(zip(("reference_chosen", "reference_rejected"), found, strict=True))
        lines.append(json.dumps({**record, **named}, ensure_ascii=False) + "\n")
    if log.is_main():
        files.write_whole(files.path(output), "".join(lines))
    return len(lines)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the reference's run.")
    _STEP = flags.DEFINE_string("step", "last", "last, best or the number of a step.")
    _INPUT = flags.DEFINE_string("input", None, "A .jsonl file of preferences.")
    _OUTPUT = flags.DEFINE_string("output", None, "The .jsonl file to write.")
    _CONFIG = cli.define_config()

    def main() -> None:
        for name in ("input", "output"):
            if not flags.FLAGS[name].value:
                raise UserError(f"--{name} is missing: the .jsonl file of preferences to "
                                f"{'read' if name == 'input' else 'write'}.")
        if not files.path(_INPUT.value).is_file():
            raise UserError(f"--input={_INPUT.value}: there is no such file.")
        config, workdir = cli.saved_or_given(_WORKDIR.value, _CONFIG)
        step = int(_STEP.value) if _STEP.value.isdigit() else _STEP.value
        program = build(as_scorer(config, _INPUT.value))
        with program.activate():
            params, _ = init_from.restore(program, workdir, step)
        count = write(program, params, _INPUT.value, _OUTPUT.value)
        log.say(f"{count:,} pairs scored, {_OUTPUT.value}")

    cli.run(main)
