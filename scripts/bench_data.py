"""From raw text to packed rows: tokens a CPU second, and what tokenising alone takes.

    python scripts/bench_data.py --bytes=2400

Cuts the sources of Python's own library into documents of so many bytes, reads them
with data.train_files, span corruption and packing into rows of 512/114, and prints the tokens of rows a
CPU second, first over the text, and then of its parts: seqio's SentencePiece inside tf.data, the plain
sentencepiece library in batches (the limit of tokenising), span corruption without packing, and packing.
CPU seconds are of the whole process with its threads, after a warm-up; they hold on a busy machine.
"""

import os
import pathlib
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import app, flags

_BYTES = flags.DEFINE_integer("bytes", 2400, "Of a document.")
_TOTAL = 8_000_000   # bytes of all documents


def write(path: pathlib.Path) -> list[str]:
    """One document a line."""
    library = pathlib.Path(os.__file__).parent
    texts = (file.read_text(errors="replace") for file in sorted(library.glob("*.py")))
    text = " ".join(" ".join(texts).split())[:_TOTAL]
    documents = [text[i:i + _BYTES.value] for i in range(0, len(text), _BYTES.value)]
    path.write_text("\n".join(documents) + "\n")
    return documents


def rate(take, tokens) -> float:
    """Tokens a CPU second of the second half of a stream; take(): the next piece."""
    count, begin, least = 0, time.process_time(), 2.0
    take()
    while time.process_time() - begin < least:   # warm: buffers are full, functions traced
        take()
    begin = time.process_time()
    while time.process_time() - begin < least:
        count += tokens(take())
    return count / (time.process_time() - begin)


def main(argv) -> None:
    del argv
    import numpy as np

    from t5x_lite.data import batches, tasks, vocabularies
    from t5x_lite.data.config import DataConfig

    with tempfile.TemporaryDirectory() as folder:
        os.environ["T5X_LITE_CACHE"] = folder
        path = pathlib.Path(folder) / "text.txt"
        documents = write(path)

        def rows(packing: bool):
            config = DataConfig(train_files=str(path), vocabulary="python", inputs_length=512,
                                targets_length=114, packing=packing, num_shards=1,
                                shuffle_buffer=100)
            read = batches.ShardedRows(config, objective="seq2seq", global_batch_size=32, seed=0,
                                       shards=[0])
            return lambda: read.take(32)[0]

        def in_rows(batch) -> int:
            return sum(int(np.count_nonzero(batch[f"{side}_{name}_tokens"]))
                       for side, name in (("encoder", "input"), ("decoder", "target")))

        pipeline = tasks.tensorflow_side()
        import tensorflow as tf
        vocabulary = vocabularies.load("python")
        processor = vocabulary.tokenizer
        encoded = iter(tf.data.TextLineDataset(str(path)).repeat().map(vocabulary.encode_tf).prefetch(4))
        some = documents[:256]
        found = {
            "packed rows of span corruption": rate(rows(True), in_rows),
            "rows of span corruption": rate(rows(False), in_rows),
            "seqio's SentencePiece in tf.data": rate(lambda: next(encoded), lambda x: int(tf.size(x))),
            "plain sentencepiece, 256 at once": rate(
                lambda: processor.encode(some, num_threads=1), lambda x: sum(map(len, x)))}
        del pipeline
    tokens = sum(map(len, processor.encode(documents[:100]))) / 100
    print(f"documents of {tokens:.0f} tokens, {np.mean([len(d) for d in documents]):.0f} bytes")
    for name, value in found.items():
        print(f"{name:<34} {value / 1e6:6.2f} M tokens a CPU second")


if __name__ == "__main__":
    app.run(main)
