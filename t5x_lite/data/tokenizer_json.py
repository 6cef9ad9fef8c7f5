"""Hugging Face's tokenizer.json as a seqio vocabulary: `data.vocabulary=DIR/tokenizer.json`.

Whatever the tokenizers library reads works: byte-level BPE (GPT-2, GPT-NeoX, LLaMA 3),
SentencePiece's BPE with byte fallback (LLaMA 2), WordPiece (BERT), Unigram (T5). Ids are the
library's own, so that converted checkpoints fit.

    end      eos_token of tokenizer_config.json or special_tokens_map.json beside the file, else
             the first of EOS_NAMES that the tokenizer has
    start    what a decoder-only model reads first: the token that the tokenizer's template puts
             in front of a text (<s>, <|begin_of_text|>), else id 0 if that is no text, else the
             end token (GPT-2). Decoders of encoder-decoders start with id 0 as T5's do
    padding  id 0 in every batch, whatever the tokenizer calls so. Where id 0 stands in rows as
             well ("!" of GPT-2 and LLaMA 3, [UNK] of others, the end token of NeoX) they say by
             segment ids and loss weights where they end
    sentinels   the tokenizer's own <extra_id_N> if they are its last ids, else 100 more ids
             behind its last one; only a task that uses them needs rows in the embedding for them
    mask     [MASK] or <mask>, else the first sentinel

A special token that stands literally in a text becomes that token, as in the library. Encoding
is Python and runs ahead of tf.data (tokenized.py).
"""

import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf
import tokenizers

from t5x_lite.data.python_vocabulary import PythonVocabulary
from t5x_lite.errors import UserError

EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|im_end|>")
MASK_NAMES = ("[MASK]", "<mask>")
SENTINELS = 100   # where the tokenizer has none, as in T5
_MOST_IDS = 1 << 24   # that a table of their bytes is made for


def _json_object(content: bytes, what: str) -> dict:
    """The object of a file. Raises UserError, `what` in front, for whatever is none."""
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:   # not UTF-8, not JSON, too deep, too many digits
        raise UserError(f"{what} is not JSON ({str(error)[:200]}); is it whole?") from error
    if not isinstance(value, dict):
        raise UserError(f"{what} is not JSON's object but a {type(value).__name__}")
    return value


def _tokenizer_of(content: bytes, path: str) -> tokenizers.Tokenizer:
    """The tokenizer of a file's content. Raises UserError for whatever is none."""
    what = f"data.vocabulary={path!r}"
    _json_object(content, what)   # says where the file is cut off
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except BaseException as error:
        # The library raises a plain Exception, or a Rust panic, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} is no tokenizer.json that the tokenizers library reads "
                        f"({str(error)[:200]})") from error


class TokenizerJson(PythonVocabulary):
    """The vocabulary of a tokenizer.json, local or gs://; see the module's head.

    Raises UserError for a file that is none, and where no end token can be found.
    """

    def __init__(self, path: str):
        self.path = path
        with tf.io.gfile.GFile(path, "rb") as file:
            self.content = file.read()
        self.tokenizer = _tokenizer_of(self.content, path)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        ids = self.tokenizer.get_vocab()
        self._size = max(ids.values(), default=-1) + 1
        if not 0 < self._size <= _MOST_IDS:
            raise UserError(f"data.vocabulary={path!r} has ids up to {self._size - 1:,} for its "
                            f"{len(ids):,} tokens; from 0 to {_MOST_IDS:,} are possible")
        own = 0
        while ids.get(f"<extra_id_{own}>") == self._size - 1 - own:
            own += 1
        super().__init__(extra_ids=own or SENTINELS)
        self.required_size = self._size   # rows that a task without sentinels needs
        self._base = self._size - own
        self._added = self.tokenizer.get_added_tokens_decoder()
        self._eos = self._find_eos(path, ids)
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        self._unk = ids.get(unknown) if isinstance(unknown, str) else None
        self.zero_is_text = not (0 in self._added and self._added[0].special)
        self.zero_in_rows = self.zero_is_text or 0 in (self._eos, self._unk)
        front = self.tokenizer.encode("").ids
        self.starts_texts = bool(front and front[0] != self._eos)   # as transformers reads them
        if self.starts_texts:
            self.start_id = front[0]
        else:
            self.start_id = self._eos if self.zero_is_text else 0
        self.mask_id = next((ids[n] for n in MASK_NAMES if n in ids), None)

    @staticmethod
    def _find_eos(path: str, ids: dict[str, int]) -> int:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            beside = os.path.join(os.path.dirname(path), name)
            if tf.io.gfile.exists(beside):
                with tf.io.gfile.GFile(beside, "rb") as file:
                    token = _json_object(file.read(), beside).get("eos_token")
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str) and token in ids:
                    return ids[token]
        eos = next((ids[n] for n in EOS_NAMES if n in ids), None)
        if eos is None:
            raise UserError(f"data.vocabulary={path!r} has none of {', '.join(EOS_NAMES)}; put a "
                            'tokenizer_config.json beside it that names its "eos_token"')
        return eos

    @property
    def bos_id(self) -> int:
        """The token that a decoder-only model reads first."""
        return self.start_id

    @property
    def eos_id(self) -> int:
        """The end of a text."""
        return self._eos

    @property
    def unk_id(self) -> int | None:
        """What stands for text that has no token; None where there is no such text."""
        return self._unk

    @property
    def _base_vocab_size(self) -> int:
        return self._base

    def _encode(self, s: str) -> list[int]:
        return self.tokenizer.encode(s, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first end token, with <extra_id_N> for sentinels."""
        ids = [int(i) for i in np.asarray(ids).ravel()]
        return self._decode(ids[:ids.index(self._eos)] if self._eos in ids else ids)

    def _decode(self, ids: Sequence[int]) -> str:
        parts, begin = [], 0
        for end in [*(n for n, i in enumerate(ids) if i >= self._base), len(ids)]:
            parts.append(self.tokenizer.decode(ids[begin:end], skip_special_tokens=True))
            if end < len(ids):
                parts.append(f"<extra_id_{self.vocab_size - 1 - ids[end]}>")
            begin = end + 1
        return "".join(parts)

    def __eq__(self, other) -> bool:
        return isinstance(other, TokenizerJson) and self.content == other.content

    def id_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes of text that each id stands for; 0 for special ones."""
        decoder = json.loads(self.content).get("decoder") or {}
        kinds = {d.get("type") for d in (decoder, *decoder.get("decoders", ()))}
        table = np.zeros([self.vocab_size], np.int32)
        for piece, i in self.tokenizer.get_vocab().items():
            table[i] = _bytes_of_piece(piece, kinds)
        for i, added in self._added.items():
            table[i] = 0 if added.special else len(added.content.encode())
        table[self._base:] = 0
        return table


def _bytes_of_piece(piece: str, decoders: set[str]) -> int:
    """UTF-8 bytes of text that a piece stands for, under decoders of these types."""
    if "ByteLevel" in decoders:
        return len(piece)   # a character for every byte
    if "ByteFallback" in decoders and piece.startswith("<0x") and len(piece) == 6:
        return 1
    text = piece.removeprefix("##") if "WordPiece" in decoders else piece
    return len(text.replace("\u2581", " ").encode())
