"""Vocabularies by name: `data.vocabulary` and the tasks of this package.

    python      the shipped SentencePiece model: 3,996 pieces learned on Python's documentation
                and source by scripts/train_tokenizer.py, byte fallback, 100 sentinels: 4,096 ids
    facts       the shipped SentencePiece model of tasks/facts_qa.py: 3,072 ids, most names whole
    scan        the shipped SentencePiece model of SCAN: 399 ids, each of its actions whole
    byt5        UTF-8 bytes behind T5's ids 0..2: 259 ids, the last 100 of which are sentinels
                too (ByT5, Xue et al. 2021, arXiv:2105.13626; its models have 384 rows)
    t5          T5's public English vocabulary: 32,100 ids with its sentinels
    codes:N     whole numbers 0 to N - 1, and bytes+codes:N these beside bytes (codes.py)
    PATH.model  any SentencePiece file, local or gs://; 100 sentinels are added where it has none
    PATH.json   a tokenizer.json of Hugging Face: byte-level BPE and others (tokenizer_json.py)

Ids 0, 1, 2 are padding, end of sequence and unknown, but for a tokenizer.json, whose ids are its
own.
"""

import functools
import hashlib
import os
import pathlib
import urllib.error
import urllib.request

import seqio
import tensorflow as tf
from google.protobuf import message

from t5x_lite import files
from t5x_lite.data import codes
from t5x_lite.data.tokenizer_json import TokenizerJson
from t5x_lite.errors import UserError, nearest

SHIPPED = {name: pathlib.Path(__file__).parent / "vocab" / f"{name}.model"
           for name in ("python", "facts", "scan")}
T5_MODEL = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
_T5_SHA256 = "839ffa4b9afae8d77834a88b87781849aa021975d6063dec6085633fcaf7171c"
NAMES = (*SHIPPED, "byt5", "t5")
_DAMAGE = (RuntimeError, OSError, ValueError, tf.errors.OpError, message.DecodeError)
SECONDS_TO_ANSWER = 5.0   # for a network, before a vocabulary counts as out of reach


class T5Vocabulary(seqio.SentencePieceVocabulary):
    """T5's public vocabulary, found on first use: $T5X_LITE_T5_VOCAB, else fetched once.

    Registering a task must not touch the network, hence the late look-up.
    """

    def __init__(self):
        super().__init__(T5_MODEL)

    def _model_context(self):
        if self._model is not None:
            return super()._model_context()
        path = self._sentencepiece_model_file = t5_model_path()
        try:
            return super()._model_context()
        except _DAMAGE as error:
            raise UserError(f"T5's vocabulary {path} is no whole SentencePiece model "
                            f"({str(error).strip().splitlines()[0][:200]}); fetch it again "
                            "(T5X_LITE_T5_VOCAB names it)") from error


def t5_model_path() -> str:
    """The file of T5's vocabulary: $T5X_LITE_T5_VOCAB, the cached copy, or a download."""
    path = os.environ.get("T5X_LITE_T5_VOCAB", T5_MODEL)
    if path != T5_MODEL:
        if not tf.io.gfile.exists(path):
            raise UserError(f"T5X_LITE_T5_VOCAB={path} does not exist")
        return path
    cached = files.cache_root() / "vocab" / "cc_all.32000.100extra.sentencepiece.model"
    if not cached.exists():
        url = T5_MODEL.replace("gs://", "https://storage.googleapis.com/")
        try:
            with urllib.request.urlopen(url, timeout=SECONDS_TO_ANSWER) as reply:
                content = reply.read()
        except (urllib.error.URLError, OSError) as error:
            raise UserError(
                f"T5's vocabulary {T5_MODEL} cannot be reached ({error}); copy it to a local "
                "file and set T5X_LITE_T5_VOCAB to its path, or choose another data.vocabulary"
            ) from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != _T5_SHA256:
            raise UserError(f"{url} has sha256 {digest}, not {_T5_SHA256}; fetch it by hand and "
                            "set T5X_LITE_T5_VOCAB to its path")
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(f".{os.getpid()}")
        part.write_bytes(content)
        part.replace(cached)
    return str(cached)


@functools.cache
def load(name: str) -> seqio.Vocabulary:
    """The vocabulary of that name or path (see the module's head); UserError for others."""
    if name in SHIPPED:
        return seqio.SentencePieceVocabulary(str(SHIPPED[name]), extra_ids=100)
    if name == "byt5":
        return seqio.ByteVocabulary()
    if name == "t5":
        return T5Vocabulary()
    if made := codes.named(name):
        return made
    if not name.endswith((".model", ".json")):
        raise UserError(f"data.vocabulary={name!r} is unknown: one of {', '.join(NAMES)}, codes:N, or the "
                        "path of a SentencePiece .model file or a tokenizer.json;"
                        f"{nearest(name, NAMES)}")
    if not files.is_file(name):
        raise UserError(f"data.vocabulary={name!r}: no such file")
    name = str(files.local_copy(name)) if files.is_url(name) else name
    if name.endswith(".json"):
        return TokenizerJson(name)
    vocabulary = seqio.SentencePieceVocabulary(name)
    pieces = _pieces_of(vocabulary, f"data.vocabulary={name!r}")
    if "<extra_id_" not in pieces.IdToPiece(pieces.GetPieceSize() - 1):
        vocabulary = seqio.SentencePieceVocabulary(name, extra_ids=100)
    if (pieces.pad_id(), pieces.eos_id(), pieces.unk_id()) != (0, 1, 2):
        raise UserError(
            f"data.vocabulary={name!r} has pad, eos, unk = {pieces.pad_id()}, {pieces.eos_id()}, "
            f"{pieces.unk_id()}; t5x_lite needs 0, 1, 2 (scripts/train_tokenizer.py makes such)")
    return vocabulary


def _pieces_of(vocabulary: seqio.SentencePieceVocabulary, what: str):
    """The SentencePiece processor of a vocabulary; what: how messages name its file.

    Raises:
        UserError: a file that is cut off, or no SentencePiece model.
    """
    try:
        return vocabulary.tokenizer
    except _DAMAGE as error:
        raise UserError(f"{what} is no whole SentencePiece model "
                        f"({str(error).strip().splitlines()[0][:200]}); fetch it again") from error


def name_of(vocabulary: seqio.Vocabulary) -> str:
    """What data.vocabulary calls it: a name of this module's head, or its file."""
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return "byt5"
    if isinstance(vocabulary, T5Vocabulary):
        return "t5"
    path = str(getattr(vocabulary, "sentencepiece_model_file", getattr(vocabulary, "path", "")))
    return next((name for name, shipped in SHIPPED.items() if str(shipped) == path), path)


# --- which ids are what ---------------------------------------------------------------------

def num_sentinels(vocabulary: seqio.Vocabulary) -> int:
    """Sentinels at the vocabulary's end: its extra ids, or its own <extra_id_N> pieces.

    ByT5 (arXiv:2105.13626, section 3.1) takes the last 100 byte ids for sentinels.
    """
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return vocabulary.extra_ids or 100
    if vocabulary.extra_ids or not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return vocabulary.extra_ids
    model, count = vocabulary.tokenizer, 0
    while "<extra_id_" in model.IdToPiece(model.GetPieceSize() - 1 - count):
        count += 1
    return count


def mask_id(vocabulary: seqio.Vocabulary) -> int:
    """The id that hides a token: the vocabulary's own mask, else its first sentinel.

    That of bytes is 255, which UTF-8 never has.
    """
    own = getattr(vocabulary, "mask_id", None)
    return vocabulary.vocab_size - 1 if own is None else own


def ordinary_ids(vocabulary: seqio.Vocabulary) -> tuple[int, int]:
    """(first, one past the last) of the ids that stand for text."""
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return 3, 259
    return 3, vocabulary.vocab_size - num_sentinels(vocabulary)
