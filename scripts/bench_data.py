"""From raw text to packed rows: tokens a CPU second, and what tokenising alone takes.

    python scripts/bench_data.py --bytes=2400

Cuts the sources of Python's own library into documents of so many bytes, reads them
with data.train_files, span corruption and packing into rows of 512/114, and prints the tokens of rows a
CPU second: from text, from text as it was read before there were blocks of documents (data/blocks.py; old
checkpoints go on so), without packing, and from records that seqio_cache_tasks tokenised
(data.cached_tasks). Then what tokenising alone takes: seqio's SentencePiece inside tf.data, a document
and 64 of them in a call, and the plain sentencepiece library in batches.
CPU seconds are of the whole process with its threads, after a warm-up; they hold on a busy machine.
"""

import json
import os
import pathlib
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import app, flags

_BYTES = flags.DEFINE_integer("bytes", 2400, "Of a document.")
_TOTAL = 8_000_000   # bytes of all documents
_RECORDS = "bench_records"


def write(path: pathlib.Path) -> list[str]:
    """One document a line."""
    library = pathlib.Path(os.__file__).parent
    texts = (file.read_text(errors="replace") for file in sorted(library.glob("*.py")))
    text = " ".join(" ".join(texts).split())[:_TOTAL]
    documents = [text[i:i + _BYTES.value] for i in range(0, len(text), _BYTES.value)]
    path.write_text("\n".join(documents) + "\n")
    return documents


def write_records(folder: pathlib.Path, documents: list[str]) -> None:
    """What seqio_cache_tasks makes of the documents, and the task whose cache it is."""
    import seqio

    from t5x_lite.data import denoising, vocabularies
    vocabulary = vocabularies.load("python")
    source = seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=("train",))
    seqio.TaskRegistry.add(
        _RECORDS, source=source, preprocessors=denoising.steps("span_corruption", cached=True),
        output_features=dict.fromkeys(("inputs", "targets"), seqio.Feature(vocabulary, add_eos=True)))
    place = folder / _RECORDS
    place.mkdir()
    import tensorflow as tf
    prefix = seqio.get_cached_tfrecord_prefix(str(place), "train")
    with tf.io.TFRecordWriter(f"{prefix}-00000-of-00001") as writer:
        for tokens in vocabulary.tokenizer.encode(documents):
            writer.write(seqio.dict_to_tfexample({"targets": tokens}).SerializeToString())
    info = {"num_shards": 1, "features": {"targets": {"shape": [None], "dtype": "int32"}},
            "seqio_version": seqio.__version__}
    pathlib.Path(seqio.get_cached_info_path(str(place), "train")).write_text(json.dumps(info))
    pathlib.Path(seqio.get_cached_stats_path(str(place), "train")).write_text(
        json.dumps({"examples": len(documents)}))
    (place / "COMPLETED").touch()


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

        def rows(packing: bool = True, documents=None, **source):
            config = DataConfig(**(source or {"train_files": str(path), "vocabulary": "python"}),
                                inputs_length=512, targets_length=114, packing=packing, num_shards=1,
                                shuffle_buffer=100)
            kept = pipeline.blocks.documents_of
            if documents is not None:
                pipeline.blocks.documents_of = lambda *_: documents
            read = batches.ShardedRows(config, objective="seq2seq", global_batch_size=32, seed=0,
                                       shards=[0])
            pipeline.blocks.documents_of = kept
            return lambda: read.take(32)[0]

        def in_rows(batch) -> int:
            return sum(int(np.count_nonzero(batch[f"{side}_{name}_tokens"]))
                       for side, name in (("encoder", "input"), ("decoder", "target")))

        pipeline = tasks.tensorflow_side()
        import tensorflow as tf
        vocabulary = vocabularies.load("python")
        processor = vocabulary.tokenizer
        lines = tf.data.TextLineDataset(str(path)).repeat()
        encoded = iter(lines.map(vocabulary.encode_tf).prefetch(4))
        blocks = iter(lines.batch(64).map(lambda x: vocabulary.encode_tf(x).flat_values).prefetch(4))
        some = documents[:256]
        write_records(pathlib.Path(folder), documents)
        found = {
            "packed rows of span corruption": rate(rows(), in_rows),
            "the same, a document at a time": rate(rows(documents=0), in_rows),
            "rows of span corruption": rate(rows(packing=False), in_rows),
            "packed rows from tokenised records": rate(
                rows(train=_RECORDS, cached_tasks=folder), in_rows),
            "seqio's SentencePiece in tf.data": rate(lambda: next(encoded), lambda x: int(tf.size(x))),
            "the same, 64 documents at once": rate(lambda: next(blocks), lambda x: int(tf.size(x))),
            "plain sentencepiece, 256 at once": rate(
                lambda: processor.encode(some, num_threads=1), lambda x: sum(map(len, x)))}
    tokens = sum(map(len, processor.encode(documents[:100]))) / 100
    print(f"documents of {tokens:.0f} tokens, {np.mean([len(d) for d in documents]):.0f} bytes")
    for name, value in found.items():
        print(f"{name:<34} {value / 1e6:6.2f} M tokens a CPU second")


if __name__ == "__main__":
    app.run(main)
