"""Look into a corpus: `python -m t5x_lite.audit FILES|TASK --output=DIR`.

Writes card.md, card.html and audit.json into the output folder: documents, words and tokens,
lengths, hosts and years, languages, exact and near duplicates, which examples of evaluation sets
stand in it, what a block list removes and of whom, personal data.

    FILES                           paths, globs or a list of .txt, .jsonl, .gz; or a seqio TASK
    --split=train                   of a task
    --text_document=line            what a document of a .txt file is: line, paragraph or file
    --against=squad,qa.jsonl        evaluation sets to look for: tasks or files
    --vocabulary=t5                 counts tokens too
    --block_list=FILE --groups=FILE your own lists instead of the shipped ones
    --remove=exact,near,overlap     writes what is left to DIR/rest/*.jsonl, listed in files.txt
    --processes=2 --nolanguages
    --beam_options=--runner=DataflowRunner,--region=…   Beam's workers instead (docs/audit.md)
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import itertools
import json
import os
import pathlib
import secrets
import shlex
import sys

from absl import flags

from t5x_lite import cli, files, log
from t5x_lite.corpus import beam, card, documents, measure, overlap, patterns, run
from t5x_lite.errors import UserError, nearest


def corpus_of(name: str, split: str, document: str, modules: str) -> documents.Corpus:
    """A fresh stream of a corpus' documents at each call: files, or a task where no file is called so.

    Raises:
        UserError: there is neither.
    """
    if not documents.names_files(name):
        return lambda: documents.of_task(name, split, modules)
    from t5x_lite.data import text_files
    files = text_files.find_files(name, "audit")
    return lambda: documents.of_files(files, document)


def parts_of(name: str, split: str, document: str, modules: str) -> list[beam.Part]:
    """What Beam's workers read one by one: the files of a corpus, or the shards of a task.

    Raises:
        UserError: there is neither.
    """
    if documents.names_files(name):
        from t5x_lite.data import text_files
        return [beam.File(file, document) for file in text_files.find_files(name, "audit")]
    number = documents.shards_of(name, split, modules)
    return [beam.Shard(name, split, modules, shard, number) for shard in range(number)]


def audit(name: str, corpus: documents.Corpus, settings: measure.Settings, folder: pathlib.Path,
          remove: tuple[str, ...] = (), workers: measure.Workers | None = None, command: str = ""
          ) -> card.Audit:
    """Measures a corpus and writes its card; with `remove` also what is left of it.

    workers: who measures; None: this process.

    Raises:
        UserError: an unknown reason to remove, or a corpus without documents.
    """
    for reason in remove:
        if reason not in run.REASONS:
            raise UserError(f"--remove={reason}: must be of {', '.join(run.REASONS)}."
                            f"{nearest(reason, run.REASONS)}")
    if "overlap" in remove and not settings.evaluation:
        raise UserError("--remove=overlap needs the evaluation sets: --against=TASK,FILE.")
    counts, rows, exact, near = run.audited(
        corpus, settings, workers or run.processes(1), _progress())
    if not rows:
        raise UserError(f"{name}: the corpus holds no documents.")
    removed = None
    if remove:
        out = run.reasons(rows, exact, near, remove)
        removed = {reason: sum(r == reason for r in out.values()) for reason in remove}
        run.write_rest(corpus, out, folder / "rest")
    copies = exact.keys() | near.keys()
    repeated = sum(len(measure.ngrams.word_hashes(document.text))
                   for number, document in enumerate(corpus()) if number in copies) if copies else 0
    result = card.Audit(
        name=name, command=command, counts=counts, exact=len(exact), near=len(near),
        duplicate_words=repeated, blocked=sum(row.blocked for row in rows),
        evaluation=measure.summary(settings, counts, rows), vocabulary=settings.vocabulary,
        removed=removed)
    _write(result, folder)
    return result


def _write(result: card.Audit, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = card.markdown(result)
    (folder / "card.md").write_text(text, encoding="utf-8")
    (folder / "card.html").write_text(card.to_html(text, f"Corpus card: {result.name}"),
                                      encoding="utf-8")
    (folder / "audit.json").write_text(json.dumps(result.to_json(), indent=1), encoding="utf-8")


def _progress():
    from tqdm import tqdm
    bar = tqdm(unit=" documents", disable=not sys.stderr.isatty())
    return lambda documents: bar.update(documents - bar.n)


def _said(result: card.Audit, folder: pathlib.Path) -> str:
    """The audit in a few lines."""
    counts = result.counts
    lines = [f"{counts.documents:,} documents, {counts.words:,} words"
             + (f", {counts.tokens:,} tokens" if result.vocabulary else "")
             + f"; {result.exact:,} repeat another exactly, {result.near:,} nearly"]
    for name, row in result.evaluation.items():
        lines.append(f"{name}: {row['by_words']:,} of {row['examples']:,} examples stand in "
                     f"{row['documents']:,} documents ({row['short']:,} too short to tell)")
    for kind, number in counts.personal.most_common():
        lines.append(f"{kind}: {number:,} in {counts.personal_documents[kind]:,} documents")
    if result.removed is not None:
        lines.append("left out: " + ", ".join(f"{n:,} {r}" for r, n in result.removed.items())
                     + f"; the rest is listed in {folder / 'rest' / 'files.txt'}")
    return "\n".join([*lines, f"the card: {folder / 'card.md'}, {folder / 'card.html'}"])


if __name__ == "__main__":
    flags.DEFINE_string("corpus", "", "The files or the task; may stand without --corpus=.")
    flags.DEFINE_string("output", None, "The folder that the card is written to.")
    flags.DEFINE_string("split", "train", "The split of a task.")
    flags.DEFINE_string("text_document", "line", "A document of a .txt file: line, paragraph, file.")
    flags.DEFINE_list("against", [], "Evaluation sets: tasks or files.")
    flags.DEFINE_string("vocabulary", "", "Counts tokens of this vocabulary.")
    flags.DEFINE_string("block_list", None, "A file of words, one a line.")
    flags.DEFINE_string("groups", None, "A TOML file of groups and words.")
    flags.DEFINE_list("remove", [], "Reasons to leave documents out: exact, near, overlap, blocked.")
    flags.DEFINE_integer("processes", os.cpu_count() or 1, "Processes that share the work.",
                         lower_bound=1)
    flags.DEFINE_list("beam_options", [], "Beam's pipeline options: its workers share the work.")
    flags.DEFINE_string("beam_scratch", "", "A folder that Beam's workers reach; its default is in --output.")
    flags.DEFINE_bool("languages", True, "Tell languages.")
    flags.DEFINE_string("task_modules", "", "Your modules that register tasks.")

    def main() -> None:
        values = flags.FLAGS
        if not values.corpus or not values.output:
            raise UserError("usage: python -m t5x_lite.audit FILES|TASK --output=DIR")
        sets = tuple(overlap.evaluation_set(name, documents.texts_of(name, values.task_modules))
                     for name in values.against)
        settings = measure.Settings(
            patterns.block_list(values.block_list), patterns.groups(values.groups), sets,
            values.vocabulary, values.languages)
        where = values.corpus, values.split, values.text_document, values.task_modules
        corpus = corpus_of(*where)
        folder = files.local(values.output, "--output")
        workers = run.processes(values.processes)
        if values.beam_options:
            parts, scratch = parts_of(*where), values.beam_scratch or str(folder)
            corpus = beam.corpus(parts)
            workers = beam.workers(parts, values.beam_options,
                                   f"{scratch.rstrip('/')}/beam-{secrets.token_hex(4)}")
        command = shlex.join(["python", "-m", "t5x_lite.audit", *sys.argv[1:]])
        result = audit(values.corpus, corpus, settings, folder, tuple(values.remove),
                       workers, command)
        log.say(_said(result, folder))

    # What stands before the first flag is the corpus: one name or, as a shell's *.txt becomes, several files.
    _files = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    if _files:
        sys.argv[1:1 + len(_files)] = [f"--corpus={','.join(_files)}"]
    cli.run(main, alone=True)
