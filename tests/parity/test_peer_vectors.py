"""What transformers and trl give on small inputs, by scripts/make_peer_vectors.py; these run everywhere."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from t5x_lite import tree
from t5x_lite.data import chat_template, chats, vocabularies
from t5x_lite.data.batches import ShardedRows
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.formats import hf, hf_card
from t5x_lite.formats.mapping import read_parameter
from t5x_lite.models.language_model import Model
from t5x_lite.training import objectives
from t5x_lite.training.objectives import ObjectiveConfig

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "vectors" / "peers"


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


CHAT = read("chat")
TEMPLATES = [(name, marked) for name in CHAT["templates"] for marked in (False, True)]


def vocabulary_of(folder, name: str, marked: bool, in_config: bool):
    """The vocabulary of a folder with the tokenizer and this template, by either of its two places."""
    source, special = CHAT["templates"][name]
    for mark, tag in (("{B}", "{% generation %}"), ("{E}", "{% endgeneration %}")):
        source = source.replace(mark, tag if marked else "")
    tokenizer = CHAT["tokenizer"]
    if "bos_token" in special:   # what puts a start token in front of texts
        tokenizer = tokenizer | {"post_processor": {
            "type": "TemplateProcessing", "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = special | ({"chat_template": source} if in_config else {"chat_template": "{{ wrong }}"})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if not in_config:
        (folder / "chat_template.jinja").write_text(source)
    return vocabularies.load(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name, marked", TEMPLATES)
def test_conversations_are_rendered_as_transformers_does(name, marked, tmp_path):
    """Texts, tokens and which of them the assistant says, with marks in the template and without; where a
    row begins with the start token, that one is not part of it."""
    vocabulary = vocabulary_of(tmp_path, name, marked, in_config=marked)
    template = chats.template_of(vocabulary)
    cases = [case for case in CHAT["cases"] if case["template"] == name]
    for case in cases:
        chat = {"messages": case["messages"]}
        rendered = template.rendered(chat, "the case")
        assert rendered.text == case["text"]
        found = chats.tokens(vocabulary, *rendered)
        first = int(case["ids"][0] == vocabulary.tokenizer.token_to_id("<s>"))
        assert found.ids == case["ids"][first:]
        learned = [int(any(a <= i < b for a, b in found.answers)) for i in range(len(found.ids))]
        assert learned == case["mask"][first:]
        prompt = {"messages": case["messages"][:-1]}
        assert template.prompt(prompt, "the case") == case["prompt"]
    assert len(cases) == 4 if name == "gemma" else 8
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "zephyr": "</s>", "gemma": "<end_of_turn>"}
    assert chats.turn_end(vocabulary) == vocabulary.tokenizer.token_to_id(end[name])


def test_a_template_that_refuses_is_named(tmp_path):
    vocabulary = vocabulary_of(tmp_path, "gemma", False, in_config=False)
    said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for turns, why in (([{"role": "system", "content": "s"}, *said], "System role not supported"),
                       ([said[0], *said], "Roles must alternate")):
        with pytest.raises(UserError, match=f"line 3: .*chat_template.jinja refuses it: {why}"):
            chats.template_of(vocabulary).rendered({"messages": turns}, "line 3")


def test_an_exported_folder_keeps_the_template(tmp_path):
    for in_config in (True, False):
        folder = tmp_path / str(in_config)
        folder.mkdir()
        vocabulary = vocabulary_of(folder, "chatml", True, in_config)
        [(name, content)] = hf_card.chat_template_files(vocabulary).items()
        assert name == "chat_template.jinja" and content.decode() == chats.template_of(vocabulary).source
    assert hf_card.chat_template_files(vocabularies.load("byt5")) == {}


def test_the_plain_template():
    turns = [{"role": role, "content": text} for role, text in (
        ("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "And 3?"))]
    template = chat_template.ChatTemplate(chat_template.PLAIN, (("eos_token", "</s>"),))
    text, answers = template.rendered({"messages": turns}, "")
    assert text == ("System:\nBe brief.\n\nUser:\n2 + 2?\n\nAssistant:\n4</s>\n\nUser:\nAnd 3?\n\n")
    assert [text[start:end] for start, end in answers] == ["4</s>"]
    assert template.prompt({"messages": turns}, "") == text + "Assistant:\n"


# --- preferences ----------------------------------------------------------------------------------

DPO = read("dpo")
TOLD = {"sigmoid": {}, "smoothed": {"label_smoothing": 0.2}, "ipo": {"preference_loss": "ipo_by_token"},
        "reference_free": {"reference": "none"}}


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """(folder of the model that trl tuned, with its tokenizer; the shapes of its tensors)."""
    folder = tmp_path_factory.mktemp("llama")
    shapes = {name: tuple(shape) for name, shape in DPO["shapes"].items()}
    safetensors.numpy.save_file({name: np.array(DPO["weights"][name], np.float32).reshape(shape)
                                 for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_act": "silu",
                                                    "rms_norm_eps": 1e-6, **DPO["config"]}))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(DPO["words"])}, "<s>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)])
    words.save(str(folder / "tokenizer.json"))
    return folder, shapes


def batch_of(name: str, folder, target) -> dict:
    """The batch that trl read, as a file of preferences gives it."""
    config = ObjectiveConfig(**{"name": "dpo", "reference": "rows"} | TOLD[name])
    lines = []
    for i, pair in enumerate(DPO["pairs"]):
        record = dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))
        if config.reference == "rows":
            record |= {f"reference_{side}": DPO["reference"][n][i]
                       for n, side in enumerate(("chosen", "rejected"))}
        lines.append(json.dumps(record) + "\n")
    (target / "pairs.jsonl").write_text("".join(lines))
    data = DataConfig(train=str(target / "pairs.jsonl"), vocabulary=str(folder / "tokenizer.json"),
                      inputs_length=6, targets_length=24, num_shards=1, shuffle_buffer=1,
                      cache_dir=str(target))
    return next(ShardedRows(data, objective=config.rows, global_batch_size=len(lines), seed=0,
                            shards=[0]))[0]


@pytest.mark.parametrize("name", TOLD)
def test_dpo_is_trls(name, tiny_llama, tmp_path):
    folder, shapes = tiny_llama
    case, source = DPO["cases"][name], hf.read_model(str(folder))
    config = ObjectiveConfig(**{"name": "dpo", "reference": "rows", "beta": DPO["beta"]} | TOLD[name])
    batch = jax.tree.map(jnp.asarray, batch_of(name, folder, tmp_path))
    model = Model(source.config)

    @jax.jit
    @jax.value_and_grad
    def run(params):
        return objectives.loss(model.bind(params), batch, None, config, objectives.totals(config, batch))[0]

    found, gradients = run(tree.unflatten({path: source.read(path) for path in source.table}))
    assert float(found) == pytest.approx(case["loss"], rel=1e-5)
    theirs = {n: np.array(g, np.float32).reshape(shapes[n]) for n, g in case["gradients"].items()}
    for path, ours in tree.flatten(gradients).items():
        want = read_parameter(source.placed[path], theirs.__getitem__)
        np.testing.assert_allclose(ours, want, rtol=1e-3, atol=1e-4 * np.abs(want).max(), err_msg=path)
