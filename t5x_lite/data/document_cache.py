"""Documents gathered by Python ahead of tf.data, kept as TFRecord files.

tf.data cannot save iterators that call into Python, so text that needs Python to be found
or parsed is written once and read natively ever after. A cache folder holds

    <split>-<digest>-00003-of-00064.tfrecord    one UTF-8 document a record
    manifest.json                               {split: {"documents": n, "digest": …}}

The folder's name says where the documents came from; the digest, what they are. File names
thus change whenever the content does, and a saved iterator cannot be resumed on other text.
"""

import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterable

import seqio
import tensorflow as tf

from t5x_lite import files, log
from t5x_lite.errors import UserError

NUM_FILES = 64   # a split; data.num_shards up to this many read only their own files

# For this process, and where it is: data.cache_dir, $T5X_LITE_CACHE or ~/.cache/t5x_lite.
set_root, root = files.set_cache_root, files.cache_root


class DocumentSource(seqio.DataSource):
    """A seqio source of {"text": document} over a cache folder that is filled on first use.

    key: names the origin of the documents (and the version of the code that finds them).
    documents: () -> iterable of (split, document); called where the folder is missing.
    """

    def __init__(self, key: Callable[[], str], splits: Iterable[str],
                 documents: Callable[[], Iterable[tuple[str, str | bytes]]]):
        self._key, self._documents = key, documents
        super().__init__(splits=splits)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def get_dataset(self, split: str = "train", shuffle: bool = True, seed: int | None = None,
                    shard_info: seqio.ShardInfo | None = None, **unused) -> tf.data.Dataset:
        """Documents of the split or of a shard's files, files shuffled anew each epoch.

        The files are drawn by number: a saved iterator holds no paths, so that it can be
        restored where the cache lies elsewhere.
        """
        files = tf.constant(self.list_shards(split), tf.string)
        numbers = tf.data.Dataset.range(len(files))
        if shard_info:
            numbers = numbers.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            numbers = numbers.shuffle(NUM_FILES, seed=seed)

        @tf.autograph.experimental.do_not_convert
        def documents(number):
            return tf.data.TFRecordDataset(files[number])

        return numbers.interleave(
            documents, cycle_length=16, block_length=16, num_parallel_calls=tf.data.AUTOTUNE
        ).map(tf.autograph.experimental.do_not_convert(lambda record: {"text": record}))

    def list_shards(self, split: str) -> list[str]:
        return sorted(str(p) for p in self.folder().glob(f"{split}-*.tfrecord"))

    def num_input_examples(self, split: str) -> int:
        return _manifest(self.folder())[split]["documents"]

    def digest(self, split: str) -> str:
        """What the split's documents are: the same for splits of the same ones."""
        return _manifest(self.folder())[split]["digest"]

    def folder(self) -> pathlib.Path:
        """The cache folder, written first if need be."""
        key = self._key()
        path = root() / key
        if path.exists() and not _is_whole(path, self.splits):
            _put_aside(path)
        if not (path / "manifest.json").exists():
            _write(path, self.splits, self._documents())
        return path


def _manifest(path: pathlib.Path) -> dict[str, dict]:
    """{split: what its documents are} of a cache folder that is whole."""
    return json.loads((path / "manifest.json").read_text())


def _is_whole(path: pathlib.Path, splits: Iterable[str]) -> bool:
    """Whether a cache folder says what it holds, and holds as many files. (A full disk, a power loss
    or a hand may have damaged it.)"""
    try:
        manifest = _manifest(path)
        return all(len(list(path.glob(f"{split}-{manifest[split]['digest'][:12]}-*.tfrecord")))
                   == min(manifest[split]["documents"], NUM_FILES) for split in splits)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return False


def _put_aside(path: pathlib.Path) -> None:
    """Renames a damaged cache folder: it is made anew, and whoever reads the rest of it may."""
    aside = path.with_name(f"{path.name}.damaged.{secrets.token_hex(4)}")
    log.say(f"warning: the text cache {path} is damaged: it is made anew (the old one is now {aside})")
    try:
        os.rename(path, aside)
    except FileNotFoundError:   # another process was first
        return
    except OSError as error:
        raise UserError(f"the text cache {path} is damaged and cannot be renamed "
                        f"({error.strerror}); remove it") from error


def _write(path: pathlib.Path, splits: Iterable[str],
           documents: Iterable[tuple[str, str | bytes]]) -> None:
    """Fills a fresh folder and renames it into place, so that no reader sees half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # By the umask, which mkdtemp does not ask: a group may share the cache.
        scratch = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        scratch.mkdir()
    except OSError as error:
        raise UserError(f"the text cache {path.parent} cannot be written ({error.strerror}); "
                        "set data.cache_dir or T5X_LITE_CACHE to a writable folder") from error
    try:
        counts = {split: 0 for split in splits}
        hashes = {split: hashlib.sha256() for split in splits}
        writers = {split: [tf.io.TFRecordWriter(str(scratch / f"{split}-{i}"))
                           for i in range(NUM_FILES)] for split in splits}
        for split, document in documents:
            record = document if isinstance(document, bytes) else document.encode()
            # Round robin: neighbours (parts of one file) end up in different shards.
            writers[split][counts[split] % NUM_FILES].write(record)
            hashes[split].update(len(record).to_bytes(8, "big") + record)
            counts[split] += 1
        for split, files in writers.items():
            digest = hashes[split].hexdigest()[:12]
            for i, writer in enumerate(files):
                writer.close()
                if i < counts[split]:
                    os.rename(scratch / f"{split}-{i}",
                              scratch / f"{split}-{digest}-{i:05}-of-{NUM_FILES:05}.tfrecord")
                else:   # fewer documents than files
                    os.remove(scratch / f"{split}-{i}")
        manifest = {s: {"documents": counts[s], "digest": hashes[s].hexdigest()} for s in splits}
        (scratch / "manifest.json").write_text(json.dumps(manifest))
        try:
            os.rename(scratch, path)
        except OSError:
            # Another process finished first; its folder has the same content.
            if not (path / "manifest.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
