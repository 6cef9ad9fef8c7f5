"""What an export holds beside the model: AutoTokenizer reads the run's vocabulary, the card says what it was."""

import dataclasses
import json

import jax
import pytest

from t5x_lite import convert, tree
from t5x_lite.checkpoints.manager import CheckpointConfig, Checkpointer
from t5x_lite.config import to_json
from t5x_lite.data import vocabularies
from t5x_lite.data.config import DataConfig
from tests import tiny
from tests.evaluation import models
from tests.formats import folders

transformers = pytest.importorskip("transformers", reason="loads exports")

TEXTS = ("def alpha(beta):", "Größe, naïve  ½", "a", "  two\n\n  spaces, 日本語")


def exported(folder, run, lines=()):
    """The hf: folder of a workdir of this run, at step 3."""
    workdir = folder / "workdir"
    params = folders.random_params(run.model)
    with Checkpointer(workdir, CheckpointConfig(async_save=False)) as checkpointer:
        checkpointer.save(3, {"params": tree.unflatten(
            {path: jax.numpy.asarray(x) for path, x in params.items()})}, {}, to_json(run))
    (workdir / "config.json").write_text(to_json(run))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    convert.run(str(workdir), f"hf:{folder / 'hf'}")
    return folder / "hf"


@pytest.mark.parametrize("name", ["python", "byt5", "json"])
def test_auto_classes_load_it(name, tmp_path):
    run = models.causal(models.tokenizer_file(tmp_path)) if name == "json" else dataclasses.replace(
        tiny.seq2seq(), data=DataConfig(vocabulary=name))
    vocabulary = vocabularies.load(run.data.vocabulary)
    if name != "json":
        run = dataclasses.replace(run, model=dataclasses.replace(
            run.model, vocab_size=-(-vocabulary.vocab_size // 128) * 128))
    folder = exported(tmp_path, run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    auto = transformers.AutoModelForCausalLM if name == "json" else transformers.AutoModelForSeq2SeqLM
    model = auto.from_pretrained(folder)
    # A sentinel that is written out is bytes to seqio's ByT5, and a token to transformers'.
    for text in (*TEXTS, *(["x <extra_id_3> y"] if name == "python" else [])):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == list(map(int, vocabulary.encode(text)))
        assert tokenizer.decode(ids) == vocabulary.decode(ids)
    if name != "json":   # an encoder's texts end
        assert tokenizer("a").input_ids == [*map(int, vocabulary.encode("a")), vocabulary.eos_id]
    assert tokenizer.eos_token_id == vocabulary.eos_id == model.config.eos_token_id
    assert model.generation_config.eos_token_id == vocabulary.eos_id


def test_the_card(tmp_path):
    run = dataclasses.replace(tiny.seq2seq(), name="tiny_t5", data=DataConfig(
        train="squad", vocabulary="byt5"))
    folder = exported(tmp_path, run, [
        {"step": 2, "train/loss": 2.5, "energy_kwh": 0.125, "co2e_kg": 0.05, "chip": "cpu"},
        {"step": 3, "eval/squad/loss": 2.25}, {"step": 4, "train/loss": 9.0}])
    card = (folder / "README.md").read_text()
    for line in ("# tiny_t5", "| data.train | squad |", "| step | 3 |", "| train/loss | 2.5 |",
                 "| energy_kwh | 0.125 |", "| co2e_kg | 0.05 |", "| eval/squad/loss | 2.25 |"):
        assert line in card.splitlines()
    assert '"vocabulary": "byt5"' in card and "9" not in card.split("## Config")[0].split("step")[1]


def test_a_vocabulary_that_is_not_there_is_said(tmp_path, capsys):
    run = dataclasses.replace(tiny.seq2seq(), data=DataConfig(vocabulary="gone.model"))
    folder = exported(tmp_path, run)
    assert "no tokenizer is written" in capsys.readouterr().out
    assert not list(folder.glob("tokenizer*"))
