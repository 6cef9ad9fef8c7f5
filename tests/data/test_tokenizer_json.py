"""A tokenizer.json gives the tokenizers library's own ids, in any script and through tf.data."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from t5x_lite.data import (
    batches as data_batches,
    tasks as data_tasks,
    vocabularies,
    vocabulary as data_vocabulary,
)
from t5x_lite.data.batches import ShardedRows
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from tests.helpers import shared_data

SCRIPTS = ("Hello, world! It's 2024.\n\n  def f(x): return x", "Ça va? Größe naïve ½ €",
           "Ελληνικά και Русский текст", "日本語のテキスト、漢字", "العربية والعبرية עברית",
           "हिन्दी भाषा", "ไทย", "emoji 👩‍👩‍👧 🎉!", "", " ", "\t tabs \r\n", "!!! \" 0 !")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def corpus():
    text = shared_data("corpora/factbook.txt").read_text()[:60_000]
    return [*text.split("\n"), *SCRIPTS]


def byte_level(specials, split=None, template=None):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = bytes_ if split is None else pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(split), "isolated"), bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials["first"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens(specials["last"])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{template} $A", special_tokens=[(template, tokenizer.token_to_id(template))])
    return tokenizer


def llama2():
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>",
                                                fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(corpus()[:300], trainers.BpeTrainer(
        vocab_size=600, limit_alphabet=60, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]))
    # As in the released files, where bytes are ordinary pieces.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    content["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    return tokenizers.Tokenizer.from_str(json.dumps(content))


MAKERS = {
    "gpt2": lambda: byte_level({"first": [], "last": ["<|endoftext|>"]}),
    "neox": lambda: byte_level({"first": ["<|endoftext|>", "<|padding|>"], "last": []}),
    "llama3": lambda: byte_level(
        {"first": [], "last": ["<|begin_of_text|>", "<|end_of_text|>"]}, LLAMA3,
        "<|begin_of_text|>"),
    "llama2": llama2,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    made = {}

    def path(name):
        if name not in made:
            file = tmp_path_factory.mktemp(name) / "tokenizer.json"
            MAKERS[name]().save(str(file))   # skips where the text to learn from is absent
            made[name] = file
        return str(made[name])
    return path


SPECIAL = {   # end, start, whether id 0 is text
    "gpt2": ("<|endoftext|>", "<|endoftext|>", True), "neox": ("<|endoftext|>",) * 2 + (False,),
    "llama3": ("<|end_of_text|>", "<|begin_of_text|>", True), "llama2": ("</s>", "<s>", False)}


@pytest.mark.parametrize("name", MAKERS)
def test_ids_and_texts_are_the_librarys(files, name):
    reference = tokenizers.Tokenizer.from_file(files(name))
    vocabulary = vocabularies.load(files(name))
    end, start, zero_is_text = SPECIAL[name]
    assert vocabulary.eos_id == reference.token_to_id(end)
    assert vocabulary.start_id == reference.token_to_id(start)
    assert vocabulary.zero_is_text == zero_is_text
    assert vocabulary.required_size == reference.get_vocab_size()
    assert vocabulary.vocab_size == reference.get_vocab_size() + 100
    table = vocabulary.id_bytes()
    for text in SCRIPTS:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert list(vocabulary.encode(text)) == ids
        assert vocabulary.decode([*ids, vocabulary.eos_id, 5]) == reference.decode(ids) == text
        # LLaMA's normaliser puts one space in front of the text.
        front = name == "llama2"
        assert table[ids].sum() - front == len(text.encode()) or not text
    assert vocabulary.decode([vocabulary.vocab_size - 1, *vocabulary.encode("a"),
                              vocabulary.vocab_size - 3]) == "<extra_id_0>a<extra_id_2>"


def rows(config, objective, batch=4):
    return next(ShardedRows(config, objective=objective, global_batch_size=batch, seed=0,
                            shards=range(config.num_shards)))


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_a_causal_lm_of_text_files_holds_the_librarys_ids(files, name, tmp_path):
    """Documents joined by the end token, cut into rows, the start token in front of each."""
    texts = [*SCRIPTS[:8], *corpus()[:40]]
    texts = [t.replace("\n", " ").replace("\r", " ") for t in texts if t.strip()]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(texts))
    config = DataConfig(validation_files=str(path), vocabulary=files(name), targets_length=32)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = list(data_batches.eval_batches(config, "validation_files", objective="lm", batch_size=8,
                                     sharding=sharding))
    tokens, weights, read = (np.concatenate([b[f"decoder_{n}"] for b in batches]) for n in (
        "target_tokens", "loss_weights", "input_tokens"))
    reference = tokenizers.Tokenizer.from_file(files(name))
    vocabulary = vocabularies.load(files(name))
    expected = sum(([*reference.encode(t, add_special_tokens=False).ids, vocabulary.eos_id]
                    for t in texts), [])
    kept = weights.ravel() > 0
    # The cache spreads documents over files, so compare them as a set.
    split = lambda ids: sorted(tuple(d) for d in np.split(ids, np.flatnonzero(
        ids == vocabulary.eos_id) + 1))
    assert split(tokens.ravel()[kept]) == split(np.array(expected))
    real = weights[:, 0] > 0   # the last batch is filled up with rows of zeros
    assert (read[real, 0] == vocabulary.start_id).all()
    np.testing.assert_array_equal(read[:, 1:], tokens[:, :-1])


def test_a_run_over_pairs_can_be_resumed(files, tmp_path):
    """The pipeline holds no Python; where "!" has id 0, segment ids say what is padding."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"inputs": f"{n}!!", "targets": f"-{n}"}) + "\n"
                            for n in range(50)))
    config = DataConfig(train=str(path), vocabulary=files("gpt2"), inputs_length=8,
                        targets_length=8, num_shards=2, shuffle_buffer=8)
    make = lambda: ShardedRows(config, objective="seq2seq", global_batch_size=4, seed=0,
                               shards=range(2))
    stream = make()
    next(stream)
    states, expected = stream.state(range(2)), [next(stream) for _ in range(15)]
    again = make()
    again.restore(states)
    jax.tree.map(np.testing.assert_array_equal, [next(again) for _ in range(15)], expected)
    vocabulary = vocabularies.load(files("gpt2"))
    for row, segments in zip(expected[0][0]["encoder_input_tokens"],
                             expected[0][0]["encoder_mask"], strict=True):
        used = int(segments.sum())
        assert row[used - 1] == vocabulary.eos_id and not segments[used:].any()
        assert data_vocabulary.text_of(vocabulary, row[:used]).endswith("!!")


def test_span_corruption_takes_added_sentinels(files, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(corpus()[:60]))
    config = DataConfig(train_files=str(path), vocabulary=files("neox"), inputs_length=64,
                        targets_length=32, num_shards=1)
    inputs = rows(config, "seq2seq")[0]["encoder_input_tokens"]
    vocabulary = data_tasks.vocabulary_of(config)
    assert (inputs == vocabulary.vocab_size - 1).sum() == len(inputs)   # the first one, once a row
    assert data_tasks.uses_sentinels(config, "seq2seq") and not data_tasks.uses_sentinels(config, "lm")
    data_vocabulary.check_vocabulary(vocabulary, vocabulary.required_size, sentinels=False)
    with pytest.raises(UserError, match=f"set model.vocab_size to {vocabulary.vocab_size} or more"):
        data_vocabulary.check_vocabulary(vocabulary, vocabulary.required_size)


def test_own_specials_come_from_the_files_beside(tmp_path):
    """T5's tokenizer.json: its sentinels are its last ids, id 0 pads and starts."""
    ids = ["<pad>", "</s>", "<unk>", "\u2581a", "<extra_id_1>", "<extra_id_0>"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({t: i for i, t in enumerate(ids)}, "<unk>"))
    tokenizer.add_special_tokens([t for t in ids if t.startswith("<")])
    tokenizer.enable_truncation(2)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    vocabulary = vocabularies.load(str(path))
    assert (vocabulary.eos_id, vocabulary.start_id, vocabulary.unk_id) == (1, 0, 2)
    assert vocabulary.vocab_size == 6 and vocabularies.num_sentinels(vocabulary) == 2
    assert vocabulary.decode([5, 4]) == "<extra_id_0><extra_id_1>"
    other = tmp_path / "other"
    other.mkdir()
    tokenizer.save(str(other / "tokenizer.json"))
    (other / "tokenizer_config.json").write_text('{"eos_token": {"content": "<pad>"}}')
    assert vocabularies.load(str(other / "tokenizer.json")).eos_id == 0


@pytest.mark.parametrize("content,message", [
    ("{}", "is no tokenizer.json"), (None, "no such file"),
    (tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")).to_str(), "names its \"eos_token\"")])
def test_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        vocabularies.load(str(path))
