"""Any model of a Hugging Face folder or of the hub: shapes and tokenizer are what it says.

Command: python -m t5x_lite.train --config=hf:EleutherAI/pythia-160m --workdir=DIR …
`--config=hf:X` is short for `--config=configs/hf.py:X`, with X a folder or ORG/NAME. The model starts
from those parameters (init_from); with --config.init_from= it starts afresh. Batch, lengths,
optimizer and data are t5x_lite's defaults and are yours to set.
"""

import pathlib

from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.formats import hf, hub, safetensors
from t5x_lite.training import objectives
from t5x_lite.training.objectives import ObjectiveConfig

# Files that a vocabulary is read from, in the order in which they are looked for.
_VOCABULARIES = ("spiece.model", "tokenizer.json", "sentencepiece.model", "tokenizer.model")


def run(name: str | None = None) -> RunConfig:
    """A run of the model of a folder, or of ORG/NAME of the hub."""
    if not name:
        raise UserError("--config=hf:NAME: give a local folder or ORG/NAME.")
    folder = hub.local_folder(name, weights=False)
    if not (folder / "config.json").is_file():
        raise UserError(f"--config=hf:{name}: {folder / 'config.json'} does not exist.")
    given = safetensors.read_json(folder / "config.json")
    model = hf.model_config(given)
    objective = objectives.of_architecture(model.architecture)[0]
    return RunConfig(name=pathlib.Path(name).name, model=model, init_from=f"hf:{name}",
                     objective=ObjectiveConfig(objective),
                     data=DataConfig(vocabulary=_vocabulary(folder, given)))


def _vocabulary(folder: pathlib.Path, given: dict) -> str:
    if given.get("tokenizer_class") == "ByT5Tokenizer":
        return "byt5"
    return next((str(folder / name) for name in _VOCABULARIES if (folder / name).is_file()), "")


def get_config(name: str | None = None):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(name))
