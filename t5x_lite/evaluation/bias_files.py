"""Sets of stereotypes in the files that their authors publish, as choices between texts.

    crows_pairs   crows_pairs_anonymized.csv (Nangia et al. 2020, arXiv:2010.00133)
    winobias      pro_stereotyped_….txt.test,anti_stereotyped_….txt.test (Zhao et al. 2018, arXiv:1804.06876)
    winogender    all_sentences.tsv (Rudinger et al. 2018, arXiv:1804.09301)
    stereoset     dev.json (Nadeem et al. 2021, arXiv:2004.09456)
    bbq           Age.jsonl, Religion.jsonl … (Parrish et al. 2022, arXiv:2110.08193); several by commas
    toxicity      prompts: RealToxicityPrompts' prompts.jsonl (Gehman et al. 2020, arXiv:2009.11462), or a .txt
                  of one prompt a line

None ships with t5x_lite: the files are the user's. Every reader raises UserError with file and line.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from t5x_lite.data import readers
from t5x_lite.errors import UserError

log = logging.getLogger(__name__)


class Item(NamedTuple):
    """One choice: what is read first, what may follow, and what each would mean."""

    inputs: str                   # "": the choices are whole texts
    choices: tuple[str, ...]
    group: str = ""               # which stereotype it is about
    right: int = -1               # the choice that is right; -1: none is
    stereotype: int = -1          # … that the stereotype expects
    neither: int = -1             # … that speaks of nobody: BBQ's unknown, StereoSet's unrelated
    tag: str = ""                 # a pronoun's gender, whether a context tells


def crows_pairs(path: str) -> Iterator[Item]:
    """The more stereotypical sentence of a pair and the other."""
    rows = readers.table(path, ",")
    _, names = next(rows, (0, []))
    missing = sorted({"sent_more", "sent_less", "bias_type"} - set(names))
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}: is it crows_pairs_anonymized.csv?")
    for number, row in rows:
        record = dict(zip(names, row, strict=False))
        texts = tuple(record.get(name, "").strip() for name in ("sent_more", "sent_less"))
        _whole(texts, f"{path}, line {number}")
        yield Item("", texts, record["bias_type"], stereotype=0)


def _whole(texts: Sequence[str], where: str) -> None:
    """Raises UserError for an empty text."""
    if not all(texts):
        raise UserError(f"{where}: a sentence is empty")


_BRACKETS = re.compile(r"\[([^\]]*)\]")


def winobias(path: str) -> Iterator[Item]:
    """A sentence with the pronoun that the stereotype expects, and with the other: two files, line by line."""
    paths = [part.strip() for part in path.split(",")]
    if len(paths) != 2:
        raise UserError(f"--data={path}: WinoBias is two files, pro_stereotyped_….txt.test,anti_stereotyped_….txt.test")
    found = [[line for line in readers.lines(part) if line[1].strip()] for part in paths]
    if len(found[0]) != len(found[1]):
        raise UserError(f"--data={path}: {len(found[0])} sentences beside {len(found[1])}: not two halves of one set")
    pairs = [(number, pro, anti) for (number, pro), (_, anti) in zip(*found, strict=True)]
    odd = [pair for pair in pairs if not _differ_by_pronouns(*pair[1:])]
    if len(odd) > _MOST_ODD * len(pairs):
        number, pro, anti = odd[0]
        raise UserError(f"{paths[0]}, line {number}: {pro.strip()[:80]!r} is not the sentence of {paths[1]}, "
                        f"{anti.strip()[:80]!r}, with another pronoun in brackets")
    if odd:
        log.warning("%s: %d of %d pairs differ in more than their pronouns and are left out: lines %s", path,
                    len(odd), len(pairs), ", ".join(str(number) for number, _, _ in odd))
    for pair in pairs:
        if pair not in odd:
            yield Item("", tuple(_plain(text) for text in pair[1:]), "gender", stereotype=0)


# The published halves differ in wording in 3 to 9 of their 396 pairs, by slips.
_MOST_ODD = 0.1


def _plain(text: str) -> str:
    """Without its number and brackets."""
    return " ".join(_BRACKETS.sub(r"\1", re.sub(r"^\s*\d+\s+", "", text)).split())


_GENDERED = frozenset("he she him her his hers himself herself".split())


def _differ_by_pronouns(pro: str, anti: str) -> bool:
    """Whether two sentences are one but for their pronouns in brackets, of which there are some."""
    masked = [_BRACKETS.sub(lambda m: "_" if m[1].strip().lower() in _GENDERED else m[0], text)
              for text in (pro, anti)]
    return "_" in masked[0] and _plain(masked[0]) == _plain(masked[1])


_PRONOUNS = {"male": "he him his himself", "female": "she her hers herself",
             "neutral": "they them their theirs themself themselves"}


def winogender(path: str) -> Iterator[Item]:
    """Whom a pronoun refers to: "… 'She' refers to the" occupation or participant."""
    rows = readers.table(path, "\t")
    _, names = next(rows, (0, []))
    if names[:2] != ["sentid", "sentence"]:
        raise UserError(f"{path} does not begin with the columns sentid and sentence: is it all_sentences.tsv?")
    for number, row in rows:
        if not row:
            continue
        where = f"{path}, line {number}"
        parts = row[0].split(".")
        if len(row) < 2 or len(parts) < 4 or parts[2] not in ("0", "1") or parts[3] not in _PRONOUNS:
            raise UserError(f"{where}: {row[0][:60]!r} is not occupation.participant.0|1.male|female|neutral.txt")
        occupation, participant, right, gender = parts[:4]
        sentence = row[1].strip()
        pronoun = next((w for w in re.findall(r"\w+", sentence) if w.lower() in _PRONOUNS[gender].split()), None)
        if pronoun is None:
            raise UserError(f"{where}: {sentence[:60]!r} has no {gender} pronoun")
        yield Item(f"{sentence} ‘{pronoun.capitalize()}’ refers to the", (f" {occupation}", f" {participant}"),
                   occupation, right=int(right), tag=gender)


_LABELS = ("stereotype", "anti-stereotype", "unrelated")


def stereoset(path: str) -> Iterator[Item]:
    """A stereotype, its opposite and something unrelated, inside a sentence or behind one."""
    content = readers.json_file(path)
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict) or not {"intrasentence", "intersentence"} & set(data):
        raise UserError(f'{path} has no "data" with "intrasentence" or "intersentence": is it StereoSet\'s dev.json?')
    for kind in ("intrasentence", "intersentence"):
        for number, record in enumerate(data.get(kind, ())):
            yield _three(record, kind, f"{path}, {kind} {number}")


def _three(record: Mapping[str, Any], kind: str, where: str) -> Item:
    by_label = {s.get("gold_label"): s.get("sentence", "") for s in record.get("sentences", ())}
    if set(by_label) != set(_LABELS):
        raise UserError(f"{where}: its gold labels are {', '.join(map(repr, by_label))}, not {', '.join(_LABELS)}")
    texts = tuple(by_label[label].strip() for label in _LABELS)
    _whole(texts, where)
    group = record.get("bias_type", "")
    if kind == "intrasentence":
        return Item("", texts, group, stereotype=0, neither=2, tag=kind)
    context = readers.field(record, "context", where).strip()
    return Item(context, tuple(f" {text}" for text in texts), group, stereotype=0, neither=2, tag=kind)


_ANSWERS = ("ans0", "ans1", "ans2")
_GENDER_OF = {"woman": "f", "girl": "f", "man": "m", "boy": "m"}


def bbq(path: str) -> Iterator[Item]:
    """A question with three answers: two groups and "unknown", with a context that tells or does not."""
    for part in map(str.strip, path.split(",")):
        items = [_question(record, f"{part}, line {number}") for number, record in readers.json_lines(part)]
        sideless = sum(item.stereotype < 0 for item in items)
        if sideless:
            log.warning("%s: of %d of %d questions the stereotype expects both answers or neither: they count for "
                        "accuracy alone", part, sideless, len(items))
        yield from items


def _question(record: Mapping[str, Any], where: str) -> Item:
    context, question, polarity, condition = (
        readers.field(record, name, where)
        for name in ("context", "question", "question_polarity", "context_condition"))
    if polarity not in ("neg", "nonneg") or condition not in ("ambig", "disambig"):
        raise UserError(f"{where}: question_polarity={polarity!r} and context_condition={condition!r} must be neg or "
                        "nonneg, ambig or disambig")
    texts = tuple(readers.field(record, name, where).strip() for name in _ANSWERS)
    info = readers.field(record, "answer_info", where, dict)
    meta = readers.field(record, "additional_metadata", where, dict)
    groups = [_groups(info.get(name, ())) for name in _ANSWERS]
    expected = {str(g).lower() for g in meta.get("stereotyped_groups", ())}
    unknown = next((n for n, g in enumerate(groups) if "unknown" in g), -1)
    if unknown < 0:
        raise UserError(f"{where}: none of its answers is of the group unknown")
    named = [n for n in range(3) if n != unknown]
    biased = [n for n in named if bool(groups[n] & expected) == (polarity == "neg")]
    return Item(f"{context}\n\nQ: {question}\nA:", tuple(f" {text}" for text in texts),
                str(record.get("category", "")), readers.field(record, "label", where, int),
                biased[0] if len(biased) == 1 else -1, unknown, condition)


def _groups(info: Sequence[str]) -> set[str]:
    """What an answer is said to be, of its wording and its group's code: both whole, the code in parts as well,
    "F-Black" as f and black. A wording's parts say nothing: "22-year-old" is not old."""
    labels = {str(label).lower() for label in info}
    parts = set(re.split(r"[-_]", str(info[-1]).lower())) if info else set()
    return labels | parts | {_GENDER_OF[part] for part in parts & set(_GENDER_OF)}


def prompts(path: str) -> Iterator[Item]:
    """What a model is to continue."""
    if not path.removesuffix(".gz").endswith(".jsonl"):
        yield from (Item(line.strip(), ()) for _, line in readers.lines(path) if line.strip())
        return
    for number, record in readers.json_lines(path):
        prompt = record.get("prompt")
        text = prompt.get("text") if isinstance(prompt, dict) else prompt
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{path}, line {number} has no text in "prompt" (found {readers.shown(record)})')
        yield Item(text.strip(), ())
