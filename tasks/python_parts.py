"""Parts of the running Python's source, each a sample of the whole: how much text is enough?

    source_8k_causal_lm, … source_2m_causal_lm    so many bytes of python_text's training split (PARTS),
                                                  and all of its validation split

Modules are cut into pieces of at most 4,096 characters, whose order is their hash's: a part holds the
smaller ones. `tasks/python_text.py` says which modules there are.
"""

import functools
import hashlib
from collections.abc import Iterator

import seqio

from t5x_lite.data import denoising, vocabularies
from t5x_lite.data.document_cache import DocumentSource
from tasks import python_text

PARTS = {"8k": 2**13, "32k": 2**15, "128k": 2**17, "512k": 2**19, "2m": 2**21}
_PIECE = 4096


def pieces() -> list[str]:
    """The training split's pieces, in the order in which parts take them."""
    texts = (text for split, text in python_text.source_documents() if split == "train")
    found = [text[i:i + _PIECE] for text in texts for i in range(0, len(text), _PIECE)]
    return sorted(found, key=lambda piece: hashlib.sha256(piece.encode()).digest())


def part(size: int) -> Iterator[tuple[str, bytes]]:
    """(split, text): `size` bytes to train on, the last piece cut short; then what is held out."""
    left = size
    for piece in pieces():
        if left <= 0:
            break
        record = piece.encode()[:left]
        left -= len(record)
        yield "train", record
    for split, text in python_text.source_documents():
        if split == "validation":
            yield split, text.encode()


def _register() -> None:
    feature = seqio.Feature(vocabularies.load("byt5"), add_eos=True)
    for name, size in PARTS.items():
        source = DocumentSource(functools.partial(python_text.key, f"source_{name}"),
                                ("train", "validation"), functools.partial(part, size))
        seqio.TaskRegistry.add(f"source_{name}_causal_lm", source=source,
                               preprocessors=denoising.steps("causal_lm"),
                               output_features={"targets": feature})


_register()
