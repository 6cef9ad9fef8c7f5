"""Whatever bytes stand in a vocabulary's file, it answers with a vocabulary or a UserError.

Whole files are damaged as in tests/formats/test_fuzz.py: bytes changed, cut, doubled, and of
tokenizer.json a value at a random place replaced by an awkward one. Seeds are fixed.
"""

import json

import pytest

from t5x_lite.data import vocabularies, vocabulary as data_vocabulary
from t5x_lite.errors import UserError
from tests.formats.test_fuzz import SETTINGS, damaged_bytes, damaged_value

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

SMALL = "scan"   # of the shipped ones, the smallest


def look_at(path: str) -> None:
    """All that a run asks of a vocabulary before its first batch, and a text there and back."""
    try:
        vocabulary = vocabularies.load.__wrapped__(path)
        data_vocabulary.check_vocabulary(vocabulary, 10**6)
        data_vocabulary.bytes_of_tokens(vocabulary, 10**4)
        vocabulary.decode(vocabulary.encode("walk and \u00fc twice"))
    except UserError as error:
        assert len(str(error)) < 1000, "a screen"


@pytest.mark.slow
def test_sentence_piece_files(tmp_path):
    whole = vocabularies.SHIPPED[SMALL].read_bytes()
    path = tmp_path / "a.model"

    @settings(SETTINGS, max_examples=200)
    @given(st.integers(0, 2**32 - 1))
    def run(seed):
        path.write_bytes(damaged_bytes(whole, seed))
        look_at(str(path))
    run()


def small_tokenizer() -> dict:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {piece: i for i, piece in enumerate(["<pad>", "</s>", "<unk>", *alphabet, "wa"])}
    tokenizer = Tokenizer(models.BPE(ids, [("w", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    return json.loads(tokenizer.to_str())


@pytest.mark.slow
def test_tokenizer_json_files(tmp_path):
    whole = small_tokenizer()
    path = tmp_path / "tokenizer.json"

    @settings(SETTINGS, max_examples=400)
    @given(st.integers(0, 2**32 - 1))
    def run(seed):
        content = json.dumps(damaged_value(whole, seed)).encode() if seed % 4 else \
            damaged_bytes(json.dumps(whole).encode(), seed)
        path.write_bytes(content)
        look_at(str(path))
    run()
