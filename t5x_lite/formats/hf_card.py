"""What an exported folder holds besides the model: tokenizer, generation config and model card."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from t5x_lite import files, log
from t5x_lite.checkpoints.format import Record
from t5x_lite.data import vocabulary as data_vocabulary
from t5x_lite.formats import safetensors

_TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model", "tokenizer_config.json")


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Whether a folder holds files that AutoTokenizer reads."""
    return any((folder / name).exists() for name in _TOKENIZERS)


def write(folder: pathlib.Path, record: Record, workdir: str,
          vocabulary: Any = None) -> None:
    """Adds to a folder that hf.write_model wrote; files that are there already stay.

    Args:
        record: of the exported checkpoint: its step and its run's config.
        workdir: whose metrics the card quotes.
        vocabulary: the run's seqio.Vocabulary, of which a tokenizer is made where the folder has none.
    """
    config = record.config
    written = safetensors.read_json(folder / "config.json")
    if vocabulary is not None and not has_tokenizer(folder):
        written |= _tokenizer(folder, vocabulary, written)
        _write_json(folder / "config.json", written)
    if not (folder / "generation_config.json").exists():
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        ids = {name: written[name] for name in names if written.get(name) is not None}
        _write_json(folder / "generation_config.json", ids)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(_card(config, record.step, files.path(workdir)))


def _tokenizer(folder: pathlib.Path, vocabulary: Any, written: Mapping[str, Any]
               ) -> dict[str, Any]:
    """Writes the files that AutoTokenizer reads; returns what config.json says of its ids."""
    found, ids = data_vocabulary.tokenizer_files(
        vocabulary, starts=written.get("is_encoder_decoder") is not True)
    if not found:
        log.say(f"no tokenizer is written: transformers has none for this "
                f"{type(vocabulary).__name__}")
    for name, content in {**found, **chat_template_files(vocabulary)}.items():
        (folder / name).write_bytes(content)
    return ids


def chat_template_files(vocabulary: Any) -> dict[str, bytes]:
    """{file: content} of the chat template beside a vocabulary's tokenizer.json, where it has one."""
    if not hasattr(vocabulary, "content"):
        return {}
    from t5x_lite.data import chat_template  # brings Jinja, which an install without data has not
    found = chat_template.beside(vocabulary.path)
    return {"chat_template.jinja": found.source.encode()} if found else {}


def _write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _card(config: Mapping[str, Any], step: int, workdir: files.Path) -> str:
    """The model card: what it was trained on, for how long, its last metrics, its config."""
    data = config.get("data", {})
    trained_on = {"data.train": data.get("train"), "data.train_files": data.get("train_files"),
                  "data.vocabulary": data.get("vocabulary"), "init_from": config.get("init_from"),
                  "objective": config.get("objective", {}).get("name"),
                  "optimizer": config.get("optimizer", {}).get("name"),
                  "train.global_batch_size": config.get("train", {}).get("global_batch_size"),
                  "precision": config.get("precision"), "step": step}
    rows = [f"| {name} | {value} |" for name, value in trained_on.items() if value]
    metrics = [f"| {name} | {value:g} |" for name, value in _last_metrics(workdir, step).items()]
    parts = ["---\nlibrary_name: transformers\ntags: [t5x_lite]\n---",
             f"# {config.get('name', 'model')}",
             "Trained and exported by t5x_lite.",
             "## Training\n\n| | |\n|---|---|\n" + "\n".join(rows)]
    if metrics:
        parts.append("## Metrics\n\nOf the last lines up to this step of metrics.jsonl.\n\n"
                     "| | |\n|---|---|\n" + "\n".join(metrics))
    parts.append("## Config\n\n```json\n" + json.dumps(config, indent=1, default=str) + "\n```")
    return "\n\n".join(parts) + "\n"


def _last_metrics(workdir: files.Path, step: int) -> dict[str, float]:
    """{name: its last number up to a step} of a run's metrics.jsonl; {} where there is none."""
    file = workdir / "metrics.jsonl"
    last: dict[str, float] = {}
    if not file.is_file():
        return last
    for line in files.read_text(file).splitlines():
        try:
            row = json.loads(line)
        except ValueError:   # a log line that was cut never stops an export
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            prefix = f"{row['task']}/" if isinstance(row.get("task"), str) else ""
            last |= {prefix + name: value for name, value in row.items()
                     if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return last
