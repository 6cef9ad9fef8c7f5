"""Beam's workers for an audit of more than one machine reads: `--beam_options=--runner=…` (extra [beam]).

A part, a file of the corpus or a shard of a task, is read and measured where a worker is. What it finds of
each block goes into a file of its own in a scratch folder that all machines share (a bucket); the machine
that asked reads those in the corpus' order. It alone looks for near duplicates among the sketches of all
documents, and then reads the corpus once more.
"""

import dataclasses
import itertools
import pickle
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from t5x_lite import files
from t5x_lite.corpus import documents, measure
from t5x_lite.corpus.documents import Corpus, Document
from t5x_lite.corpus.measure import Counts, Row, Settings, Workers
from t5x_lite.errors import UserError


class File(NamedTuple):
    """A part that is a file."""

    path: str
    document: str   # what a document of a .txt file is

    def read(self) -> Iterator[Document]:
        return documents.of_files([self.path], self.document)


class Shard(NamedTuple):
    """A part that is one of so many shards of a seqio task's split."""

    task: str
    split: str
    modules: str
    number: int
    of: int

    def read(self) -> Iterator[Document]:
        return documents.of_task(self.task, self.split, self.modules, (self.number, self.of))


Part = File | Shard


def corpus(parts: Sequence[Part]) -> Corpus:
    """The documents of the parts in their order, as `workers` number them."""
    return lambda: itertools.chain.from_iterable(part.read() for part in parts)


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a worker does with a part: its blocks' sums and rows, a file each in the scratch folder."""

    settings: Settings
    scratch: str

    def __call__(self, numbered: tuple[int, Part]) -> None:
        number, part = numbered
        for place, block in enumerate(documents.blocks(part.read())):
            # There only once it is whole; a worker that tries again writes the same.
            files.write_bytes(_path(self.scratch, number, place),
                              pickle.dumps(measure.measure(block, self.settings)))


def workers(parts: Sequence[Part], options: Sequence[str], scratch: str) -> Workers:
    """Beam's workers over the parts of a corpus; it must be `corpus` of the same parts.

    Args:
        options: of Beam's pipeline, "--runner=DataflowRunner" say.
        scratch: a new folder that the workers and this machine can reach.
    Raises:
        UserError: Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("--beam_options needs Apache Beam (extra [beam]), in an environment of its own: "
                        "see docs/audit.md") from error

    def measured(_: Corpus, settings: Settings) -> Iterator[tuple[Counts, list[Row]]]:
        files.path(scratch).mkdir(parents=True)
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            _ = (pipeline | beam.Create(list(enumerate(parts))) | beam.Reshuffle()
                 | beam.Map(Measure(settings, scratch)))
        return results(scratch)
    return measured


def _path(scratch: str, part: int, block: int) -> str:
    """Paths in the order of their names are in the corpus' order."""
    return f"{scratch.rstrip('/')}/{part:08}-{block:08}.pickle"


def results(scratch: str) -> Iterator[tuple[Counts, list[Row]]]:
    """What the workers left, in the corpus' order; each file is removed once it is read."""
    for path in map(files.path, files.glob(f"{scratch.rstrip('/')}/*.pickle")):
        yield pickle.loads(path.read_bytes())
        path.unlink()
    if not files.is_url(scratch):   # a bucket has no empty folders
        files.path(scratch).rmdir()
