"""Numbers as tokens: vocabularies of codes, alone or beside text.

    data.vocabulary=codes:512         ids 0, 1, 2 are padding, end and unknown; code n is id 3 + n.
                                      In text: "17 0 511"
    data.vocabulary=bytes+codes:64    ByT5's bytes, ids 3 to 258, and behind them the codes. In text:
                                      "a seven: <17><0><63>"

Codes are what is no text: states, actions, returns, pixels, cells of a codebook (quantise.py). arrays.py
makes tasks of them; in files of examples they are text, as above.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from t5x_lite.data.python_vocabulary import PythonVocabulary
from t5x_lite.errors import UserError

_NAME = re.compile(r"(bytes\+)?codes:([0-9]+)")
_SPECIAL, _BYTES = 3, 256
_CODE = re.compile(r"<([0-9]+)>")
_MOST = 1 << 24


def _number(digits: str) -> int:
    """The number that the digits write; of more than 18 figures one that is as much too large."""
    return int(digits.lstrip("0")[:18] or 0)


class CodeVocabulary(PythonVocabulary):
    """Codes 0 to num_codes - 1, in text numbers with spaces between them."""

    first = _SPECIAL   # id of code 0

    def __init__(self, num_codes: int):
        super().__init__(extra_ids=0)
        self.num_codes = num_codes
        self.path = f"codes:{num_codes}"   # what data.vocabulary calls it

    pad_id, bos_id, eos_id, unk_id = 0, 0, 1, 2

    @property
    def _base_vocab_size(self) -> int:
        return self.first + self.num_codes

    def ids(self, codes: Sequence[int] | np.ndarray, where: str = "a text") -> list[int]:
        """The ids of codes. Raises UserError, `where` in front, for one that the vocabulary has not."""
        numbers = np.asarray(codes, np.int64).ravel()
        beyond = numbers[(numbers < 0) | (numbers >= self.num_codes)]
        if beyond.size:
            raise UserError(f"{where} holds the code {beyond[0]}, which is not in data.vocabulary="
                            f"{self.path}: its codes are 0 to {self.num_codes - 1}. Take a larger "
                            "vocabulary, or the one that the codes were made for")
        return (numbers + self.first).tolist()

    def _encode(self, s: str) -> list[int]:
        words = s.split()
        wrong = next((word for word in words if not word.isascii() or not word.isdigit()), None)
        if wrong is not None:
            raise UserError(f"{wrong[:40]!r} is no code: data.vocabulary={self.path} reads whole numbers "
                            f"with spaces between them; bytes+{self.path} reads text beside codes")
        return self.ids([_number(word) for word in words], f"{s[:40]!r}")

    def decode(self, ids: Iterable[int]) -> str:
        """The codes up to the first end token; ids that are none are left out."""
        return " ".join(map(str, self.codes(ids)))

    _decode = decode

    def codes(self, ids: Iterable[int]) -> list[int]:
        """The codes among ids up to the first end token."""
        return [i - self.first for i in _until_end(ids) if self.first <= i < self.vocab_size]

    def __eq__(self, other) -> bool:
        return type(other) is type(self) and other.num_codes == self.num_codes

    def __hash__(self):
        return hash(self.path)


class TextAndCodes(CodeVocabulary):
    """UTF-8 bytes, and codes that text writes as <n>."""

    first = _SPECIAL + _BYTES

    def __init__(self, num_codes: int):
        super().__init__(num_codes)
        self.path = f"bytes+codes:{num_codes}"

    def _encode(self, s: str) -> list[int]:
        ids: list[int] = []
        for place, part in enumerate(_CODE.split(s)):   # text, number, text, number, …
            ids += self.ids([_number(part)], f"{s[:40]!r}") if place % 2 else [
                byte + _SPECIAL for byte in part.encode()]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text with <n> for codes up to the first end token."""
        parts = [bytes([i - _SPECIAL]) if i < self.first else f"<{i - self.first}>".encode()
                 for i in _until_end(ids) if _SPECIAL <= i < self.vocab_size]
        return b"".join(parts).decode(errors="ignore")

    _decode = decode

    def id_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes of text that each id stands for; codes for none."""
        ids = np.arange(self.vocab_size)
        return ((ids >= _SPECIAL) & (ids < self.first)).astype(np.int32)


def _until_end(ids: Iterable[int]) -> list[int]:
    ids = [int(i) for i in np.asarray(ids).ravel()]
    return ids[:ids.index(CodeVocabulary.eos_id)] if CodeVocabulary.eos_id in ids else ids


def named(name: str) -> CodeVocabulary | None:
    """The vocabulary of such a name, None for another name.

    Raises:
        UserError: a number of codes that cannot be.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    count = _number(match[2])
    if not 0 < count <= _MOST:
        raise UserError(f"data.vocabulary={name!r}: from 1 to {_MOST:,} codes are possible")
    return TextAndCodes(count) if match[1] else CodeVocabulary(count)
