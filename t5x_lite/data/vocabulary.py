"""Vocabularies: which ids are text, what each stands for, and whether a model has a row for it.

Imports seqio inside functions only, as tasks.py, which finds the vocabulary of a run.
"""

import json
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from t5x_lite import files
from t5x_lite.data import readers, sentencepiece_json
from t5x_lite.errors import UserError, nearest

if TYPE_CHECKING:
    import seqio


def vocabulary_identity(vocabulary: "seqio.Vocabulary") -> str:
    """A name that is the same in every process for the same vocabulary, wherever its file is."""
    content = getattr(vocabulary, "sp_model", None) or getattr(vocabulary, "content", b"")
    return (f"{type(vocabulary).__name__} of {vocabulary.vocab_size} ids, "
            f"crc32 {zlib.crc32(content):08x}")


def check_vocabulary(vocabulary: "seqio.Vocabulary", model_vocab_size: int,
                     sentinels: bool = True) -> None:
    """Raises UserError where token ids would fall outside the model's embedding.

    sentinels: whether those that were added to the vocabulary's own ids occur.
    """
    size = vocabulary.vocab_size
    if not sentinels:
        size = getattr(vocabulary, "required_size", size)
    if size > model_vocab_size:
        raise UserError(
            f"model.vocab_size={model_vocab_size} is smaller than the vocabulary's {size} ids: for "
            "a trained model set data.vocabulary to its own, for a new one set model.vocab_size to "
            f"{size} or more (a multiple of 128 suits accelerators: {-(-size // 128) * 128})")


def start_id(vocabulary: "seqio.Vocabulary") -> int:
    """What a decoder-only model reads before a row: 0, or a tokenizer.json's own start."""
    return getattr(vocabulary, "start_id", 0)


def zero_in_rows(vocabulary: "seqio.Vocabulary") -> bool:
    """Whether id 0 may stand in a row that is not padded there, so that it cannot tell padding.

    It is "!" in GPT-2's, the end of a text in NeoX's, and unknown words in many a tokenizer.json
    and in LLaMA's SentencePiece model. Rows carry what was padded (rows.py); this is for what has ids
    alone. A vocabulary of your own says it by an attribute zero_in_rows.
    """
    import seqio
    if hasattr(vocabulary, "zero_in_rows"):
        return vocabulary.zero_in_rows
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return vocabulary.tokenizer.pad_id() != 0
    return False


def text_of(vocabulary: "seqio.Vocabulary", ids: Sequence[int]) -> str:
    """The text of tokens, without end tokens and, unless id 0 is a token, padding."""
    hidden = {vocabulary.eos_id} | (set() if zero_in_rows(vocabulary) else {0})
    return vocabulary.decode([int(i) for i in ids if int(i) not in hidden])


def pieces_of(vocabulary: "seqio.Vocabulary") -> list[str]:
    """What each id stands for, to compare vocabularies by; [] where that cannot be listed."""
    import seqio
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return _BYTE_PIECES
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return _sentence_pieces(vocabulary.tokenizer)
    content = getattr(vocabulary, "content", b"")   # of a tokenizer.json
    return _json_pieces(content) if content else []


def pieces_of_folder(folder: files.Path) -> list[str]:
    """What each id stands for in a folder of Hugging Face: of a SentencePiece model, tokenizer.json
    or ByT5; [] where it has none of them."""
    for name in ("spiece.model", "sentencepiece.model", "tokenizer.model"):
        if (folder / name).is_file():
            import sentencepiece
            try:
                return _sentence_pieces(sentencepiece.SentencePieceProcessor(
                    model_proto=(folder / name).read_bytes()))
            except RuntimeError as error:
                raise UserError(f"{folder / name} is no whole SentencePiece model; fetch it "
                                "again.") from error
    whole = folder / "tokenizer.json"
    if whole.is_file():
        try:
            return _json_pieces(whole.read_bytes())
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{whole} is no whole tokenizer.json ({str(error)[:200]}); fetch it "
                            "again.") from error
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        said = readers.json_object(readers.whole(str(settings)), str(settings))
        if "ByT5" in str(said.get("tokenizer_class")):
            return _BYTE_PIECES
    return []


def tokenizer_files(vocabulary: "seqio.Vocabulary", starts: bool
                    ) -> tuple[dict[str, bytes], dict[str, int]]:
    """({file: content} that AutoTokenizer of transformers reads as this vocabulary, what config.json
    says of its ids); empty ones of a kind that transformers does not have.

    starts: whether the model reads a start token before a text, as decoder-only ones do.
    """
    import seqio
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return {"tokenizer_config.json": _json({"tokenizer_class": "ByT5Tokenizer"})}, {}
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        if not starts and sentencepiece_json.is_t5s_kind(vocabulary.tokenizer):
            return {"spiece.model": vocabulary.sp_model, "tokenizer_config.json": _json(
                {"tokenizer_class": "T5Tokenizer", "extra_ids": vocabulary.extra_ids})}, {}
        whole, special = sentencepiece_json.convert(vocabulary.tokenizer, ends=not starts)
        return ({"tokenizer.json": whole, "tokenizer_config.json": _json(
            {"tokenizer_class": "PreTrainedTokenizerFast", **special})} if whole else {}), {}
    content = getattr(vocabulary, "content", b"")   # of a tokenizer.json
    if not content:
        return {}, {}
    ids = {"eos_token": vocabulary.eos_id} | ({"bos_token": start_id(vocabulary)} if starts else {})
    names = {name: vocabulary.tokenizer.id_to_token(i) for name, i in ids.items()}
    return {"tokenizer.json": content, "tokenizer_config.json": _json(
        {"tokenizer_class": "PreTrainedTokenizerFast", **names})}, {
            f"{name}_id": i for name, i in ids.items()}


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


_BYTE_PIECES = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]


def _json_pieces(content: bytes) -> list[str]:
    held = json.loads(content).get("model", {}).get("vocab", [])
    return sorted(held, key=held.get) if isinstance(held, dict) else [p for p, _ in held]


def _sentence_pieces(processor) -> list[str]:
    return [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]


def bytes_of_tokens(vocabulary: "seqio.Vocabulary", model_vocab_size: int) -> np.ndarray:
    """int32 [model_vocab_size]: UTF-8 bytes of text each id stands for, for bits per byte.

    Padding, EOS, sentinels and ids beyond the vocabulary stand for none. ByT5's sentinels
    are byte ids as well and count as bytes.
    """
    known = _known_bytes(vocabulary)[:model_vocab_size]
    return np.pad(np.asarray(known, np.int32), (0, model_vocab_size - len(known)))


def _known_bytes(vocabulary: "seqio.Vocabulary") -> Sequence[int]:
    """Bytes of text of each of the vocabulary's own ids."""
    import seqio
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return [0] * 3 + [1] * 256
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        pieces = vocabulary.tokenizer
        return [_bytes_of_sentence_piece(pieces, i) for i in range(pieces.GetPieceSize())]
    if hasattr(vocabulary, "id_bytes"):
        return vocabulary.id_bytes()
    ids = range(vocabulary.vocab_size - vocabulary.extra_ids)
    return [len(vocabulary.decode([i]).encode()) for i in ids]


def _bytes_of_sentence_piece(pieces, i: int) -> int:
    if pieces.IsByte(i):
        return 1
    piece = pieces.IdToPiece(i)
    if pieces.IsControl(i) or pieces.IsUnknown(i) or "<extra_id_" in piece:
        return 0
    return len(piece.replace("\u2581", " ").encode())


# --- before TensorFlow ------------------------------------------------------------------------

def check_there(name: str) -> None:
    """Raises UserError where data.vocabulary names a file that is not there: at the door, before
    TensorFlow is imported and a model is made."""
    if name.endswith((".model", ".json")) and not files.is_file(name):
        file = files.path(name)
        raise UserError(f"data.vocabulary={name!r}: no such file;"
                        f"{nearest(file.name, files.names(file.parent))}")


def rows_for_file(path: str) -> int | None:
    """Rows of an embedding that a vocabulary's file asks for: its ids and 100 sentinels where it
    has none of its own, as a multiple of 128. None where the file cannot be read here."""
    try:
        if path.endswith(".json"):
            content = files.local_copy(path).read_bytes()
            pieces, added = _json_pieces(content), json.loads(content).get("added_tokens", ())
            size = max([len(pieces) - 1, *(token["id"] for token in added)]) + 1
            own = any(token["content"] == "<extra_id_0>" for token in added)
        else:
            import sentencepiece
            pieces = _sentence_pieces(
                sentencepiece.SentencePieceProcessor(str(files.local_copy(path))))
            size, own = len(pieces), "<extra_id_" in pieces[-1]
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        return None   # what is wrong with the file is said where it is used
    size += 0 if own else 100
    return -(-size // 128) * 128
