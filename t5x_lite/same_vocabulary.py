"""Whether a checkpoint's token ids mean what the run's mean, as far as both sides say.

The run's vocabulary is compared with that of a source of init_from: a workdir's own, or the one in a
Hugging Face folder.
"""

import re
from collections.abc import Mapping, Sequence

from t5x_lite import files, log
from t5x_lite.checkpoints import manager
from t5x_lite.config import RunConfig, from_mapping
from t5x_lite.data import tasks as data_tasks, vocabulary as data_vocabulary
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.formats import hub
from t5x_lite.formats.mapping import ForeignModel
from t5x_lite.models import peft

_TABLE = peft.EMBEDDING


def check(config: RunConfig, loaded: Mapping[str, str], source: ForeignModel) -> None:
    """Raises UserError where the run's token ids mean something else in the source.

    loaded: {path of the model: the source's}; nothing is asked where a rule of init_map names the
    embeddings, or they are not loaded.
    """
    if _TABLE not in loaded or any(re.fullmatch(p, _TABLE) for p, _ in config.init_map):
        return
    if not names_one(config.data):
        return
    vocabulary = data_tasks.vocabulary_of(config.data)
    rows = source.shapes[loaded[_TABLE]][0]
    # Sentinels that were added here to a tokenizer.json's own ids are new to any checkpoint.
    size = getattr(vocabulary, "required_size", vocabulary.vocab_size)
    if size > rows:
        raise UserError(f"{_named(config.data)} has {size} ids and "
                        f"{source.where} {rows} rows: it was trained with another. {_FIX}")
    compare(config.data, source.where)


_FIX = ("Set data.vocabulary to that of the checkpoint, or leave the embeddings fresh with a rule "
        f"of init_map for {_TABLE} (and logits/.* where they are not tied).")


def compare(config: DataConfig, source: str) -> None:
    """Raises UserError at the first id that stands for other text in the source, where both sides
    name a vocabulary."""
    ours = data_vocabulary.pieces_of(data_tasks.vocabulary_of(config))
    theirs = _pieces_of_source(source)
    if not ours or not theirs:
        log.say(f"  {source} names no vocabulary that {_named(config)} could be compared with")
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b and "<extra_id_" not in a + b:
            raise UserError(f"{_named(config)} is not the vocabulary that {source} was trained "
                            f"with: id {i} is {a!r}, there {b!r}. {_FIX}")


def _pieces_of_source(source: str) -> Sequence[str]:
    kind, _, rest = source.partition(":")
    if kind == "t5x":
        return []
    if kind == "hf":
        return data_vocabulary.pieces_of_folder(hub.local_folder(rest))
    saved = from_mapping(DataConfig, manager.read_record(source).config["data"], "data")
    if not names_one(saved):
        return data_vocabulary.pieces_of_folder(files.path(source) / "hf")
    try:
        return data_vocabulary.pieces_of(data_tasks.vocabulary_of(saved))
    except UserError as error:   # its file has gone since
        log.say(f"  vocabulary of {source}: {error}")
        return []


def names_one(config: DataConfig) -> bool:
    """Whether the data say in which vocabulary they are."""
    return bool(config.vocabulary or config.train)


def _named(config: DataConfig) -> str:
    if config.vocabulary:
        return f"data.vocabulary={config.vocabulary}"
    return f"the vocabulary of data.train={config.train}"
