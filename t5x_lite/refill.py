"""Write texts anew with a denoiser, for the view "filled" of texts without labels:
`python -m t5x_lite.refill --workdir=DENOISER --input=TEXTS.jsonl --output=FILLED.jsonl`.

    --input=FILE        .jsonl ({"inputs", "question" or "text"} a line), also .gz
    --output=FILE       the same objects with "filled", a list of the text's versions: what
                        data.views=plain,filled reads
    --versions=2        of each text
    --hidden=0.3        share of the words that are hidden, in runs of --run=2 words
    --seed=0            of what is hidden, and of what is drawn with --override=eval.decode.method=sample
    --step=last         best or a number: which checkpoint of the workdir
    --config=…          instead of a workdir: a config with --config.init_from=hf:DIR, t5x:DIR or a workdir

Runs of words stand behind sentinels, as in the span corruption that the model of the workdir was trained on,
and what it writes for a sentinel takes their place; where it writes nothing, and behind data.inputs_length, the
words stay as they are. That happens ahead of the run that reads the file, so that its rows are a function of
its data and seed alone.
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import json
import random
import re
from collections.abc import Sequence

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import

# isort: split

from absl import flags

from t5x_lite import config as configs, files, init_from, log
from t5x_lite.build import Program, build
from t5x_lite.data import readers, spans, tasks as data_tasks, vocabulary as data_vocabulary
from t5x_lite.errors import UserError, at_least, between
from t5x_lite.evaluation.predictor import Predictor

_FIELDS = ("inputs", "question", "text")
_SENTINELS = 100
_SENTINEL = re.compile(r"<extra_id_(\d+)>")


def hide(text: str, rng: random.Random, share: float, run: int) -> tuple[str, list[str]]:
    """(the text with runs of words behind <extra_id_0>, <extra_id_1> …, the words of each). At least one run
    is hidden of a text that has words, and at most 100."""
    words = text.split()
    pieces = [" ".join(words[start:start + run]) for start in range(0, len(words), run)]
    count = min(len(pieces), _SENTINELS, max(1, round(share * len(pieces))))
    chosen = sorted(rng.sample(range(len(pieces)), count))
    hidden = [pieces[place] for place in chosen]
    for number, place in enumerate(chosen):
        pieces[place] = f"<extra_id_{number}>"
    return " ".join(pieces), hidden


def fill(text: str, written: str, hidden: Sequence[str]) -> str:
    """The text of `hide` with what a model wrote behind each sentinel in its place, else the hidden words."""
    found = spans.fillings(written)
    return _SENTINEL.sub(lambda match: found.get(match[1]) or hidden[int(match[1])], text)


def versions_of(program: Program, params, texts: Sequence[str], versions: int, share: float, run: int,
                seed: int) -> list[list[str]]:
    """So many versions of each text; what is hidden for one hangs on the seed, its number and the text."""
    config = program.config
    predictor = Predictor(program, data_tasks.vocabulary_of(config.data), config.eval.decode)
    made: list[list[str]] = [[] for _ in texts]
    for number in range(versions):
        pairs = [hide(text, random.Random(f"{seed}/{number}/{text}"), share, run) for text in texts]
        ids = range(number * len(texts), (number + 1) * len(texts))
        written = predictor.predict(params, [masked for masked, _ in pairs], ids)
        for own, (masked, hidden), prediction in zip(made, pairs, written, strict=True):
            own.append(fill(masked, prediction.texts[0], hidden))
    return made


def read(path: str) -> list[tuple[dict, str]]:
    """(object, its text) of each line. Raises UserError for a line without a text, by its number."""
    found = []
    for number, record in readers.json_lines(path):
        where = f"{path}, line {number}"
        text = readers.field(record, next((n for n in _FIELDS if n in record), _FIELDS[0]), where)
        if not text.strip() or spans.hidden(text):
            raise UserError(f"{where} has no words, or sentinels of its own (<extra_id_0>): leave it out")
        found.append((record, text))
    if not found:
        raise UserError(f"--input={path} holds no text")
    return found


def write(records: Sequence[tuple[dict, str]], filled: Sequence[list[str]], output: str) -> None:
    """Writes the objects with their versions as "filled"."""
    lines = [json.dumps({**record, "filled": made}, ensure_ascii=False) + "\n"
             for (record, _), made in zip(records, filled, strict=True)]
    if log.is_main():
        files.write_whole(files.path(output), "".join(lines))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the denoiser's run.")
    _STEP = flags.DEFINE_string("step", "last", "last, best or the number of a step.")
    _INPUT = flags.DEFINE_string("input", None, "A .jsonl file of texts.")
    _OUTPUT = flags.DEFINE_string("output", None, "The .jsonl file to write.")
    _VERSIONS = flags.DEFINE_integer("versions", 2, "Of each text.")
    _HIDDEN = flags.DEFINE_float("hidden", 0.3, "Share of the words that are hidden.")
    _RUN = flags.DEFINE_integer("run", 2, "Words that are hidden together.")
    _SEED = flags.DEFINE_integer("seed", 0, "Of what is hidden and drawn.")
    _CONFIG = cli.define_config()

    def main() -> None:
        for name in ("input", "output"):
            if not flags.FLAGS[name].value:
                raise UserError(f"--{name} is missing.")
        if not files.path(_INPUT.value).is_file():
            raise UserError(f"--input={_INPUT.value}: there is no such file.")
        at_least("--versions", _VERSIONS.value, 1)
        at_least("--run", _RUN.value, 1)
        between("--hidden", _HIDDEN.value, 0, 1, open_below=True)
        records = read(_INPUT.value)
        config, workdir = cli.saved_or_given(_WORKDIR.value, _CONFIG)
        config = configs.replace(config, "eval.decode.seed", _SEED.value)
        data_vocabulary.check_there(config.data.vocabulary)
        program = build(config)
        step = int(_STEP.value) if _STEP.value.isdigit() else _STEP.value
        with program.activate():
            params, _ = init_from.restore(program, workdir, step)
            made = versions_of(program, params, [text for _, text in records], _VERSIONS.value,
                               _HIDDEN.value, _RUN.value, _SEED.value)
        write(records, made, _OUTPUT.value)
        same = sum(text == own for (_, text), found in zip(records, made, strict=True) for own in found)
        log.say(f"{len(records):,} texts in {_VERSIONS.value} versions, {same:,} of them as they were: "
                f"{_OUTPUT.value}")

    cli.run(main)
