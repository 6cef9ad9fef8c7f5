"""Trains a SentencePiece vocabulary (unigram, or BPE) that t5x_lite and seqio can use.

    python scripts/train_tokenizer.py --output=my.model --size=32000 corpus/*.txt
    python scripts/train_tokenizer.py --output=t5x_lite/data/vocab/python.model --size=4096

Without files it learns from the text that every Python installation holds (the training
split of tasks/python_text.py); that is how the shipped vocabulary was made. Files may be
.txt, .jsonl (field "text") or either with .gz.

`--size` counts all ids, the 100 sentinels included: seqio adds them behind the pieces, so
`--size=4096` trains 3,996. Padding, EOS and unknown are ids 0, 1 and 2. Spaces and line
breaks are kept as they are and bytes stand in for unseen characters, so that decoding gives
back the very text (with Unix line ends).
"""

import argparse
import io
import pathlib
import random
import sys
import tempfile

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from t5x_lite.data import tasks as data_tasks
from t5x_lite.errors import UserError

SENTINELS = 100
NORMALIZATION = "D A\tA\n"   # Windows' line ends become plain ones, the only change to the text
MAX_PIECE_BYTES = 4000   # SentencePiece drops longer sentences; documents are cut to this


def sentences(files: list[str]):
    """Pieces of documents short enough for the trainer, cut at line breaks."""
    data_tasks.tensorflow_side()   # quietly, before tasks imports it
    from t5x_lite.data import text_files
    from tasks import python_text
    if files:
        documents = text_files.read_documents(text_files.find_files(files, "files"), "line")
    else:
        documents = (text for make in (python_text.docs_documents, python_text.source_documents)
                     for split, text in make() if split == "train")
    for document in documents:
        block = ""
        for line in document.splitlines(keepends=True):
            if block and len((block + line).encode()) > MAX_PIECE_BYTES:
                yield block
                block = ""
            block += line
        if block.strip():
            yield block


def train(files: list[str], size: int, max_sentences: int, seed: int,
          symbols: list[str] | None = None, model_type: str = "unigram") -> bytes:
    """The model file's content: a function of the text and the arguments.

    symbols: words that are one piece each wherever they stand, with the space before them.

    Raises UserError for files that cannot be read, and for a size that the text is too small for.
    """
    chosen = list(sentences(files))
    random.Random(seed).shuffle(chosen)
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        rules.write(NORMALIZATION)
        rules.flush()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(chosen[:max_sentences]), model_writer=model,
                model_type=model_type, vocab_size=size - SENTINELS,
                pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
                byte_fallback=True, character_coverage=0.9995,
                # Text comes back as it was: no Unicode folding, no squeezing of spaces, and
                # runs of spaces (Python's indentation) may become pieces.
                normalization_rule_tsv=rules.name, remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, user_defined_symbols=[
                    "\n", *(f"\u2581{word}" for word in symbols or ())],
                split_digits=True, max_sentence_length=2 * MAX_PIECE_BYTES,
                num_threads=2, minloglevel=2)
        except RuntimeError as error:
            raise UserError(f"--size={size}, of which {SENTINELS} sentinels, 256 bytes and every "
                            f"character of the text, does not suit this text: {error}") from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.ClearField("normalization_rule_tsv")   # the temporary file's name
    return proto.SerializeToString(deterministic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="text files; none: Python's own text")
    parser.add_argument("--output", required=True, help="where the .model file goes")
    parser.add_argument("--size", type=int, default=32000, help="ids, sentinels included")
    parser.add_argument("--max_sentences", type=int, default=1_000_000,
                        help="a random sample of so many blocks of text")
    parser.add_argument("--seed", type=int, default=0, help="of that sample")
    parser.add_argument("--symbols", nargs="*", help="words that stay whole, such as I_WALK")
    parser.add_argument("--type", default="unigram", choices=("unigram", "bpe"),
                        help="bpe keeps the frequent words of a narrow text whole")
    arguments = parser.parse_args()
    try:
        model = train(arguments.files, arguments.size, arguments.max_sentences, arguments.seed,
                      arguments.symbols, arguments.type)
        pathlib.Path(arguments.output).write_bytes(model)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.output}: {arguments.size} ids, {SENTINELS} of them sentinels")


if __name__ == "__main__":
    main()
