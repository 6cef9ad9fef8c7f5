"""The tokenizer.json of SentencePiece models gives their ids: ten languages, unigram and BPE."""

import io

import pytest

from t5x_lite.data import vocabulary as data_vocabulary

seqio = pytest.importorskip("seqio")
transformers = pytest.importorskip("transformers", reason="reads tokenizer.json as its users do")

# Article 1 of the Universal Declaration of Human Rights.
LANGUAGES = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft begabt.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos, dotados de razón.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميرًا.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.")
AWKWARD = ("", " ", "  two  spaces  ", "tab\tand\nline\r\n", "ﬁ ½ Ⅳ ｆｕｌｌ", "u\u0308ber e\u0301t\u00e9",
           "🙂 unseen ζ", "a\u00a0b\u3000c", "x▁y", "0123456789" * 9, "\u200bzero\ufeff width")


@pytest.fixture(scope="module")
def trained():
    """The vocabulary of a kind, with T5's special ids and sentinels."""
    import sentencepiece
    made = {}

    def get(kind, plain, **options):
        key = (kind, plain, *options.items())
        if key not in made:
            model = io.BytesIO()
            rule = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} if plain \
                else {}
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(LANGUAGES * 3), model_writer=model, model_type=kind,
                vocab_size=480, hard_vocab_limit=kind == "bpe", character_coverage=0.98,
                minloglevel=2,
                **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, **rule, **options})
            made[key] = model.getvalue()
        return vocabulary_of(made[key])
    return get


def vocabulary_of(model, extra_ids=8):
    class Given(seqio.SentencePieceVocabulary):
        def __init__(self):
            super().__init__("given", extra_ids)

        def _load_model(self):
            raise AssertionError

    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for i in reversed(range(extra_ids)):
        proto.pieces.add(piece=f"▁<extra_id_{i}>", score=0.0, type=proto.SentencePiece.USER_DEFINED)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    Given.tokenizer = property(lambda self: processor)
    Given.sp_model = property(lambda self: proto.SerializeToString())
    return Given()


def written(folder, vocabulary, starts):
    found, _ = data_vocabulary.tokenizer_files(vocabulary, starts=starts)
    for name, content in found.items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_of_ten_languages(trained, tmp_path, kind, plain, byte_fallback):
    """A decoder's texts have no EOS; an encoder's have one."""
    vocabulary = trained(kind, plain, byte_fallback=byte_fallback)
    (tmp_path / "decoder").mkdir()
    (tmp_path / "encoder").mkdir()
    decoder = written(tmp_path / "decoder", vocabulary, starts=True)
    encoder = written(tmp_path / "encoder", vocabulary, starts=False)
    for text in (*LANGUAGES, *AWKWARD):
        ids = [*map(int, vocabulary.encode(text))]
        assert decoder(text).input_ids == ids, text
        assert encoder(text).input_ids == [*ids, 1], text
        if 2 not in ids:   # "⁇" to one, "<unk>" to the other
            assert decoder.decode(ids) == vocabulary.decode(ids), text
    assert decoder.eos_token_id == 1 and decoder.pad_token_id == 0
