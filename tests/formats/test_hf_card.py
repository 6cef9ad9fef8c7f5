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
from tests.parity import hf_cases

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


def write_words(folder):
    """A tokenizer of ten words, for models of few rows."""
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers
    ids = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *models.WORDS])}
    tokenizer = Tokenizer(kinds.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}))


@pytest.mark.slow
@pytest.mark.parametrize("name", hf_cases.CASES)
def test_every_family_comes_back_by_the_auto_classes(name, tmp_path):
    """hf: to a workdir and back: the same class, tensors and tokenizer."""
    case = hf_cases.CASES[name]
    model = hf_cases.make(case)
    model.save_pretrained(tmp_path / "in")
    if case.untied and case.config_class != "T5Config":   # as the published files say
        file = tmp_path / "in" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": False}))
    write_words(tmp_path / "in")
    convert.run(f"hf:{tmp_path / 'in'}", str(tmp_path / "workdir"))
    convert.run(str(tmp_path / "workdir"), f"hf:{tmp_path / 'out'}")
    kind = {"ForConditionalGeneration": "Seq2SeqLM", "ForMaskedLM": "MaskedLM"}
    auto = getattr(transformers, "AutoModelFor" + next(
        (found for end, found in kind.items() if case.model_class.endswith(end)), "CausalLM"))
    again, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(again).__name__ == case.model_class
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    for path, value in model.state_dict().items():
        assert again.state_dict()[path].equal(value), path
    _, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not {key for key in info["missing_keys"] if "pooler" not in key}   # BERT's, which no MLM has
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("alpha iota").input_ids == [3, 11] and tokenizer.pad_token_id == 0


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
