"""The card of a corpus: what an audit found, as Markdown and as one HTML page.

After the documentation of C4 (Dodge et al. 2021, arXiv:2104.08758) and data sheets (Gebru et al.
2021): sizes, where and when texts come from, languages, duplicates, evaluation sets, what a filter
removes and of whom, personal data.
"""

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from t5x_lite.corpus.measure import Counts

_MOST = 15   # rows of a table of hosts or languages


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit found."""

    name: str                    # what was read
    command: str                 # the command line that repeats it
    counts: Counts
    exact: int                   # documents that repeat an earlier one
    near: int                    # … that are near to an earlier one, and no exact copies
    duplicate_words: int         # words of both
    blocked: int                 # documents that the block list would remove
    evaluation: Mapping[str, Mapping[str, int]]   # see measure.summary
    vocabulary: str = ""
    removed: Mapping[str, int] | None = None      # reason -> documents, where any were left out

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        counts = self.counts
        return {
            "name": self.name, "documents": counts.documents, "characters": counts.characters,
            "utf8_bytes": counts.utf8_bytes, "words": counts.words,
            "tokens": counts.tokens if self.vocabulary else None,
            "exact_duplicates": self.exact, "near_duplicates": self.near,
            "duplicate_words": self.duplicate_words, "blocked": self.blocked,
            "lengths": {str(k): v for k, v in sorted(counts.lengths.items())},
            "languages": dict(counts.languages.most_common()),
            "hosts": dict(counts.hosts.most_common()),
            "years": dict(sorted(counts.years.items())),
            "groups": {group: {"documents": n, "blocked": counts.blocked_groups[group]}
                       for group, n in counts.groups.items()},
            "personal_data": {kind: {"found": n, "documents": counts.personal_documents[kind]}
                              for kind, n in counts.personal.items()},
            "evaluation_sets": {name: dict(row) for name, row in self.evaluation.items()},
            "removed": dict(self.removed) if self.removed is not None else None}


def markdown(audit: Audit) -> str:
    """The card as Markdown."""
    sections = [f"# Corpus card: {audit.name}", f"Made by `{audit.command}`.",
                *_size(audit), *_lengths(audit.counts),
                *_top("Languages", "Told by py3langid from a document's first 300 characters: a "
                      "guess, poor on short texts and code.", "language", audit.counts.languages,
                      audit.counts.documents),
                *_top("Hosts", "Of the documents that say where they come from.", "host",
                      audit.counts.hosts, audit.counts.documents),
                *_top("Years", "Of the documents that say when they were written or fetched.",
                      "year", dict(sorted(audit.counts.years.items())), audit.counts.documents),
                *_duplicates(audit), *_evaluation(audit), *_blocked(audit), *_personal(audit),
                *_removed(audit)]
    return "\n\n".join(sections) + "\n"


def to_html(text: str, title: str) -> str:
    """The card's Markdown as one page that needs nothing else."""
    from markdown_it import MarkdownIt
    body = MarkdownIt("commonmark").enable("table").render(text)
    return _PAGE.format(title=html.escape(title), body=body)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem;
        color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .8rem; text-align: left; }}
td:not(:first-child), th:not(:first-child) {{ text-align: right; }}
code {{ background: #f4f4f4; padding: 0 .2rem; overflow-wrap: anywhere; }}
</style></head><body>
{body}</body></html>
"""


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (str(f"{v:,}" if isinstance(v, int) else v).replace("|", "\\|") for v in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share(part: float, whole: float) -> str:
    """A part in per cent, to a tenth; – of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _size(audit: Audit) -> Iterable[str]:
    counts = audit.counts
    rows = [("documents", counts.documents), ("words", counts.words),
            ("characters", counts.characters), ("bytes of UTF-8", counts.utf8_bytes)]
    if audit.vocabulary:
        rows.append((f"tokens ({audit.vocabulary})", counts.tokens))
    return "## Size", _table(("of", "number"), rows)


def _lengths(counts: Counts) -> Iterable[str]:
    rows = [(f"{low:,} to {2 * low - 1:,}" if low > 1 else str(low), n, share(n, counts.documents))
            for low, n in sorted(counts.lengths.items())]
    return "## Lengths", _table(("words of a document", "documents", "share"), rows)


def _top(title: str, remark: str, column: str, numbers: Mapping[str, int], documents: int
         ) -> Iterable[str]:
    if not numbers:
        return ()
    known = sum(numbers.values())
    rows = [(name or "no letters", n, share(n, known)) for name, n in numbers.items()]
    if column != "year":
        rows.sort(key=lambda row: -row[1])
    more = len(rows) - _MOST
    rest = [(f"{more} more", sum(n for _, n, _ in rows[_MOST:]), "")] if more > 0 else []
    missing = f" {documents - known:,} documents do not say." if known < documents else ""
    return f"## {title}", remark + missing, _table(
        (column, "documents", "share"), [*rows[:_MOST], *rest])


def _duplicates(audit: Audit) -> Iterable[str]:
    counts = audit.counts
    return ("## Duplicates",
            "Near: at least 80 % of the distinct runs of five words in common. The first of a set "
            "is not counted.",
            _table(("documents that repeat an earlier one", "number", "share"), [
                ("exactly", audit.exact, share(audit.exact, counts.documents)),
                ("nearly", audit.near, share(audit.near, counts.documents)),
                ("their words", audit.duplicate_words,
                 share(audit.duplicate_words, counts.words))]))


def _evaluation(audit: Audit) -> Iterable[str]:
    if not audit.evaluation:
        return ()
    rows = [(name, row["examples"], row["short"], row["by_words"],
             share(row["by_words"], row["examples"]), row["by_sentences"], row["documents"])
            for name, row in audit.evaluation.items()]
    return ("## Evaluation sets in the corpus",
            "An example counts where 13 of its words in a row stand in a document (Brown et al. "
            "2020, appendix C), or all of an example of 8 to 12 words; shorter ones say nothing "
            "and are not looked for.",
            _table(("evaluation set", "examples", "too short", "found", "share",
                    "by three sentences", "documents that hold one"), rows))


def _blocked(audit: Audit) -> Iterable[str]:
    counts = audit.counts
    rows = [("all", counts.documents, audit.blocked, share(audit.blocked, counts.documents))]
    rows += [(group, n, counts.blocked_groups[group], share(counts.blocked_groups[group], n))
             for group, n in sorted(counts.groups.items(),
                                    key=lambda item: -counts.blocked_groups[item[0]] / item[1])]
    return ("## What a block list would remove, and of whom",
            "A document goes where it holds a word of the list. Shares above that of all documents "
            "say whose texts the filter removes more often (Dodge et al. 2021, section 5.2).",
            _table(("documents that mention", "number", "removed", "share"), rows))


def _personal(audit: Audit) -> Iterable[str]:
    counts = audit.counts
    rows = [(kind, n, counts.personal_documents[kind]) for kind, n in counts.personal.most_common()]
    if not rows:
        return "## Personal data", "No pattern of it was found. Names are not looked for."
    return ("## Personal data", "By patterns and check digits; names are not looked for.",
            _table(("kind", "found", "in documents"), rows))


def _removed(audit: Audit) -> Iterable[str]:
    if audit.removed is None:
        return ()
    left = audit.counts.documents - sum(audit.removed.values())
    return ("## Left out", _table(("reason", "documents"),
                                  [*audit.removed.items(), ("left", left)]))
