"""An audit finds exactly what was planted, in any number of processes, and says it on a card."""

import gzip
import json
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
import seqio

from t5x_lite import audit as audit_main
from t5x_lite.corpus import (
    beam,
    card,
    documents,
    duplicates,
    measure,
    ngrams,
    overlap,
    patterns,
    run,
)
from t5x_lite.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
_WORDS = [f"{a}{b}{c}" for a in "bdfgkl" for b in ("o", "ar", "in", "ul") for c in
          ("", "m", "tes", "ver", "zon")]


def passage(rng: random.Random, words: int = 60) -> str:
    """A text of random words whose runs of five are its own."""
    return " ".join(rng.choice(_WORDS) for _ in range(words)) + "."


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(file of 130 documents, evaluation file) with duplicates, overlaps and personal data."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("planted")
    texts = [passage(rng) for _ in range(100)]
    asked = [passage(rng, 20) for _ in range(10)] + [passage(rng, 10), passage(rng, 5)]
    exact = [texts[i] for i in range(8)] + [f"  {texts[8]} "]
    near = [" ".join([*texts[20 + i].split()[:-2], "other", "end."]) for i in range(6)]
    holding = [f"{passage(rng, 20)} {asked[i].upper()} {passage(rng, 20)}" for i in (0, 1, 2)]
    holding.append(f"{passage(rng, 20)} {asked[10].replace(' ', ', ')} {passage(rng, 20)}")
    cut = f"{passage(rng, 9)} {' '.join(asked[3].split()[:12])} {passage(rng, 9)}"   # 12 of 13 words
    personal = [
        f"{passage(rng)} Write to ann.lee+news@mail.example.org or call +49 30 1234 5678.",
        f"{passage(rng)} Card 4111 1111 1111 1111, not 4111 1111 1111 1112.",
        f"{passage(rng)} IBAN DE89 3704 0044 0532 0130 00 and 078-05-1120; host 8.8.8.8, 10.0.0.1."]
    listed = [f"{passage(rng)} The gay couple saw porn.", f"{passage(rng)} The gay couple.",
              f"{passage(rng)} An African-American woman."]
    all_texts = [*texts, *exact, *near, *holding, cut, *personal, *listed]
    lines = [json.dumps({"text": text, "url": f"https://www.host{i % 2}.org/{i}",
                         "timestamp": f"20{10 + i % 3}-04-25T12:57:54Z"})
             for i, text in enumerate(all_texts)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(lines) + "\n")
    against = folder / "asked.jsonl"
    against.write_text("".join(json.dumps({"inputs": a, "targets": "yes"}) + "\n" for a in asked))
    return corpus, against


def settings_for(against) -> measure.Settings:
    sets = (overlap.evaluation_set("asked", [
        text.removesuffix("\nyes") for text in documents.texts_of(str(against))]),)
    return measure.Settings(patterns.block_list(None), patterns.groups(None), sets, languages=False)


@pytest.fixture(scope="module")
def audited(planted, tmp_path_factory):
    corpus, against = planted
    folder = tmp_path_factory.mktemp("card")
    result = audit_main.audit(
        "planted", lambda: documents.of_files([str(corpus)], "line"), settings_for(against), folder,
        remove=("exact", "near", "overlap"), command="audit")
    return result, folder


def test_it_finds_exactly_the_planted_duplicates(audited):
    result, _ = audited
    assert (result.counts.documents, result.exact, result.near) == (126, 9, 6)


def test_it_finds_the_planted_evaluation_examples_and_no_others(audited):
    result, _ = audited
    assert result.evaluation["asked"] == {
        "examples": 12, "short": 1, "by_words": 4, "by_sentences": 0, "documents": 4}


def test_it_finds_personal_data_by_its_check_digits(audited):
    result, _ = audited
    assert result.counts.personal == {
        "e-mail address": 1, "telephone number": 1, "card number": 1, "IBAN": 1, "IP address": 1,
        "IP address of a private or reserved net": 1,
        "US social security number": 1}


@pytest.mark.parametrize(("kind", "found", "others"), [
    ("telephone number", ["+15551234567", "1-800-555-1234", "555 123 4567", "+49 30 1234567", "+49 (0)30 123456",
                          "020 7946 0958", "(555) 123-4567", "555.123.4567", "+44 20 7946 0958", "030 1234567"],
     ["2001-02-20", "12 345 678", "3.14159 26535", "100 200 300", "007", "1,234,567", "ISBN 978-3-16-148410-0",
      "DE89 3704 0044 0532 0130 00"]),
    ("IP address", ["2001:4860:4860::8888", "8.8.8.8"], ["12:30:45", "std::vector", "a :: b", "1.2.3", "999.1.1.1", "10:20"]),
    ("IP address of a private or reserved net", ["192.168.1.10", "203.0.113.7", "fe80::1ff:fe23:4567:890a"], ["::", "1::"]),
    ("e-mail address", ["user@müller.de", "a.b+c@mail.example.org"], ["a@b", "me @home.org", "@user.name"]),
    ("card number", ["4111.1111.1111.1111", "4111-1111-1111-1111", "4111111111111111"], ["4111.1111.1111.1112", "1" * 16]),
])
def test_forms_of_personal_data_and_their_look_alikes(kind, found, others):
    for text in found:
        assert patterns.personal_data(f"See {text}, or not.") == {kind: 1}, text
    for text in others:
        assert kind not in patterns.personal_data(f"See {text}, or not."), text


def test_pages_of_one_template_are_measured_against_a_few():
    """Their pairs would grow by the square; each is found, and so is a near duplicate of a later one."""
    body = passage(random.Random(1), 200)
    texts = [f"{body} number {i}" for i in range(300)]
    corpus = [documents.Document(text) for text in texts]
    counts, rows, exact, near = run.audited(lambda: iter(corpus), measure.Settings(
        patterns.block_list(None), patterns.groups(None), languages=False), run.processes(1), lambda *_: None)
    assert not exact and near == dict.fromkeys(range(1, 300), 0)
    assert len(duplicates.candidates(rows, exact)) <= 300 * duplicates._MANY


def test_it_says_whose_texts_a_block_list_removes(audited):
    counts = audited[0].counts
    assert audited[0].blocked == 1
    assert (counts.groups["orientation: gay"], counts.blocked_groups["orientation: gay"]) == (2, 1)
    assert counts.groups["origin: african_american"] == counts.groups["gender: women"] == 1


def test_hosts_and_years_are_counted(audited):
    assert audited[0].counts.hosts == {"host0.org": 63, "host1.org": 63}
    assert sum(audited[0].counts.years.values()) == 126 and "2011" in audited[0].counts.years


def test_what_is_left_has_none_of_what_was_removed(audited, planted):
    result, folder = audited
    assert dict(result.removed) == {"exact": 9, "near": 6, "overlap": 4}
    files = (folder / "rest" / "files.txt").read_text().split()
    again, rows, exact, near = run.audited(
        lambda: documents.of_files(files, "line"), settings_for(planted[1]), run.processes(1))
    assert (again.documents, len(exact), len(near)) == (126 - 19, 0, 0)
    assert not any(any(row.overlaps) for row in rows)
    assert again.hosts.keys() == result.counts.hosts.keys()


def test_the_card_holds_the_figures(audited):
    result, folder = audited
    text = (folder / "card.md").read_text()
    assert "| exactly | 9 | 7.1 % |" in text and "| asked | 12 | 1 | 4 | 33.3 % |" in text
    assert "<table>" in (folder / "card.html").read_text()
    assert json.loads((folder / "audit.json").read_text())["exact_duplicates"] == 9


def test_processes_change_nothing(planted, audited):
    corpus, against = planted
    texts = list(documents.of_files([str(corpus)], "line"))
    settings = settings_for(against)
    parts = [measure.measure(block, settings) for block in documents.blocks(texts, 1000)]
    assert len(parts) > 5
    total = measure.Counts()
    for counts, _ in reversed(parts):
        total.add(counts)
    assert total == audited[0].counts


def test_parts_that_workers_measure_in_any_order_give_the_same_audit(planted, audited, tmp_path):
    """A file, and a task's shards, as Beam's workers take them: numbered, and each by itself."""
    corpus, against = planted
    lines = corpus.read_text().splitlines()
    names = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for name, start in zip(names, (0, 50, 51), strict=True):
        name.write_text("\n".join(lines[start:{0: 50, 50: 51, 51: None}[start]]) + "\n")
    parts = audit_main.parts_of(f"{tmp_path}/?.jsonl", "train", "line", "")
    assert parts == [beam.File(str(name), "line") for name in names]
    settings = settings_for(against)

    def workers(_, settings):
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        for numbered in reversed(list(enumerate(parts))):
            beam.Measure(settings, str(scratch))(numbered)
        yield from beam.results(str(scratch))
        assert not scratch.exists()
    counts, _, exact, near = run.audited(beam.corpus(parts), settings, workers)
    assert (counts, len(exact), len(near)) == (audited[0].counts, 9, 6)


def test_a_tasks_shards_hold_its_documents_once(tmp_path):
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for number, file in enumerate(files):
        file.write_text(f"text {number}\nmore of {number}\n")
    name = "data_test_audit_shards"
    seqio.TaskRegistry.add(
        name, source=seqio.TextLineDataSource({"train": [str(file) for file in files]}),
        preprocessors=[], output_features={})
    parts = audit_main.parts_of(name, "train", "line", "")
    assert [part.number for part in parts] == [0, 1, 2]
    assert [document.text for document in beam.corpus(parts)()] == [
        f"{words} {number}" for number in range(3) for words in ("text", "more of")]
    with pytest.raises(UserError, match="has no split 'dev'; it has train"):
        audit_main.parts_of(name, "dev", "line", "")


def test_beam_is_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"needs Apache Beam \(extra \[beam\]\)"):
        beam.workers([], ["--runner=DirectRunner"], "scratch")


def test_a_run_of_words_is_found_wherever_it_stands():
    words = "one two three four five six seven eight nine ten eleven twelve thirteen".split()
    example = overlap.evaluation_set("e", [" ".join(words)])
    for text, hit in ((" ".join(["zero", *words]), True), (" ".join([*words, "more"]), True),
                      ("One, TWO... " + " ".join(words[2:]), True),
                      (" ".join(words[1:]), False), (" ".join(reversed(words)), False)):
        by_words, _ = overlap.examples_in(ngrams.word_hashes(text), text, example)
        assert bool(by_words) == hit, text


def test_thirteen_words_of_a_longer_example_are_enough_and_twelve_are_not():
    words = [f"word{i}" for i in range(20)]
    example = overlap.evaluation_set("e", [" ".join(words)])
    for count, hit in ((13, True), (12, False)):
        text = " ".join(["before", *words[4:4 + count], "after"])
        by_words, _ = overlap.examples_in(ngrams.word_hashes(text), text, example)
        assert bool(by_words) == hit, count


def test_account_numbers_have_check_digits():
    assert patterns.personal_data("GB82 WEST 1234 5698 7654 32") == {"IBAN": 1}
    assert patterns.personal_data("GB82 WEST 1234 5698 7654 33") == {}


def test_three_sentences_are_found_as_t5_does():
    asked = "It rained all day long. We stayed. Nobody came to us."
    example = overlap.evaluation_set("e", [asked])
    for text, hit in ((f"So then! {asked} And on.", True),
                      (asked.replace("We stayed.", "We left."), False)):
        assert bool(overlap.examples_in(ngrams.word_hashes(text), text, example)[1]) == hit


def test_near_is_jaccards_index_of_the_texts():
    assert duplicates.jaccard(np.array([1, 2, 3, 4]), np.array([2, 3, 4, 5])) == 0.6


def test_gz_and_a_task_are_read_too(tmp_path, planted):
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(planted[0].read_bytes()))
    assert len(list(documents.of_files([str(packed)], "line"))) == 126


@pytest.mark.parametrize("make, message", [
    (lambda d: documents.texts_of(str(d / "none.jsonl")), "no such file"),
    (lambda d: documents.texts_of(str(d / "blank.txt")), "holds no texts"),
    (lambda d: list(documents.of_files([str(d / "bad.jsonl")], "line")), "line 1 has no string"),
    (lambda d: patterns.block_list(str(d / "blank.txt")), "holds no word"),
    (lambda d: patterns.groups(str(d / "bad.jsonl")), "must be TOML"),
    (lambda d: audit_main.audit("x", lambda: [], measure.Settings(), d), "holds no documents"),
    (lambda d: audit_main.audit("x", lambda: [], measure.Settings(), d, ("exakt",)),
     "--remove=exakt: must be of exact, near.*exact"),
    (lambda d: audit_main.audit("x", lambda: [], measure.Settings(), d, ("overlap",)),
     "needs the evaluation sets"),
])
def test_wrong_input_is_refused_by_name(tmp_path, make, message):
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "bad.jsonl").write_text('{"words": 1}\n')
    with pytest.raises(UserError, match=message):
        make(tmp_path)


def test_shares_are_in_tenths_of_a_per_cent():
    assert [card.share(1, 3), card.share(0, 0), card.share(5, 5)] == ["33.3 %", "–", "100.0 %"]


@pytest.mark.slow
def test_the_command(planted, tmp_path):
    corpus, against = planted
    result = subprocess.run(
        [sys.executable, "-m", "t5x_lite.audit", str(corpus), f"--against={against}",
         f"--output={tmp_path}", "--remove=exact", "--processes=2"],
        cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "126 documents" in result.stdout and "left out: 9 exact" in result.stdout


@pytest.mark.slow
def test_beams_workers_write_the_same_card(planted, tmp_path):
    pytest.importorskip("apache_beam", reason="needs Apache Beam (extra [beam]), in an environment of its own")
    corpus, against = planted
    cards = []
    for name, options in (("here", []), ("beam", ["--beam_options=--runner=DirectRunner"])):
        subprocess.run(
            [sys.executable, "-m", "t5x_lite.audit", str(corpus), f"--against={against}",
             f"--output={tmp_path / name}", *options], cwd=ROOT, check=True)
        cards.append(json.loads((tmp_path / name / "audit.json").read_text()) | {"command": ""})
    assert cards[0] == cards[1]
