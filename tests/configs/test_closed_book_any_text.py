"""Closed-book questions on any text: the arms, what is refused, and what the report says of a stored fact."""

import json

import pytest

from configs.experiments import closed_book_any_text as experiment
from t5x_lite import experiment as runner
from t5x_lite.errors import UserError


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Name=value pairs of a text of twelve persons and a question about each."""
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "cache"))
    names = [f"Ada {name}holm" for name in "Al Bo Cy Di Ed Fi Gil Hal Io Jo Kai Li".split()]
    (tmp_path / "p.txt").write_text("".join(f"{n} was a cook. She was born in Bern{i} on 1 May 1900.\n"
                                            for i, n in enumerate(names)))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": f"where was {n} born", "answer": [f"Bern{i}"]})
                                              + "\n" for i, n in enumerate(names)))
    return (f"passages={tmp_path / 'p.txt'},questions={tmp_path / 'q.jsonl'}[:50%],"
            f"held_out={tmp_path / 'q.jsonl'}[50%:]")


def test_arms_differ_in_what_they_read(given):
    runs = experiment.get_runs(f"{given},seeds=2,steps=10,arms=none+salient+long+cured")
    assert [(r.arm, r.stage, r.config.train.num_steps) for r in runs[:6]] == [
        ("none", "finetune", 100), ("salient", "pretrain", 10), ("salient", "finetune", 100), ("long", "pretrain", 40),
        ("long", "finetune", 100), ("cured", "pretrain", 10)]
    control, cured = (next(r.config.data for r in runs if r.arm == arm) for arm in ("salient", "cured"))
    assert (control.rewriting, control.train, control.salient_like, control.denoising) == ("sentences", "", "", "salient")
    assert cured.rewriting == "sentences,named,headed,thinned" and cured.salient_like.endswith("q.jsonl[:50%]")
    assert cured.train.startswith("train_files=3,") and "50%:" not in cured.train + cured.salient_like
    storage = control.validation.rpartition(",")[2]
    lines = [json.loads(line) for line in open(storage)]
    assert len(lines) == 6 and lines[0] == {"inputs": "nem: She was born in _X_ on 1 May 1900.", "targets": "Bern6"}
    named = open(cured.validation.rpartition(",")[2]).readline()
    assert json.loads(named)["inputs"] == "nem: Ada Gilholm was born in _X_ on 1 May 1900."
    asking = experiment.get_runs(f"{given},seeds=1,arms=asked")[0].config.data
    assert (asking.denoising, asking.salient_like, asking.rewrites) == ("salient_asked", cured.salient_like, 20)
    assert {r.arm for r in experiment.get_runs(given)} == {"none", "salient", "asked"}
    assert {r.arm for r in experiment.get_runs(given.replace("[:50%]", "[:34%]"))} == {"none", "salient", "cured"}
    dev = experiment.get_runs(f"{given},dev=1,arms=none")[0].config.data
    assert dev.train.endswith("[0%:40%]") and dev.validation.endswith("[40%:50%]")


def test_wrong_input_is_refused_by_name(given, tmp_path):
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "other.txt").write_text("Tom Fry was a cook.\n")
    (tmp_path / "none.jsonl").write_text('{"question": "who", "answer": []}\n')
    p = given.partition(",")[0].removeprefix("passages=")
    for arg, message in (
            (given.replace(p, str(tmp_path / "blank.txt")), "hold no document"),
            (given.replace(p, str(tmp_path / "other.txt")), "answer none of the questions"),
            (given.replace(p, str(tmp_path / "nowhere.txt")), "no such file"),
            (f"passages={p},questions={tmp_path / 'none.jsonl'},held_out={tmp_path / 'q.jsonl'}", "none.jsonl"),
            (f"passages={p},questions=q.jsonl", "held_out missing"),
            (f"passages={p},questions=q.jsonl,held_out=q.jsonl", "what is trained on would be scored"),
            (given.replace("[:50%]", "[:34%]") + ",arms=none+asked",
             "no wording stands 5 times among the 4 training .* arm asked has nothing to ask; take arms=none"),
            (f"{given},arms=cured+curd", "did you mean 'cured'"), (f"{given},unit=words", "sentences"),
            (f"{given},seeds=0", "a number from 1 on"), (f"{given},pasages=f", "did you mean 'passages'")):
        with pytest.raises(UserError, match=message):
            experiment.get_runs(arg)


def test_stored_and_not_extractable_is_said(given, tmp_path):
    runs = experiment.get_runs(f"{given},seeds=1,arms=none+salient+cured")
    for run in runs:
        values = {"salient": (66.0, 0.7, 3.8), "cured": (40.0, 30.0, 35.0), "none": (0, 0, 5.2)}[run.arm]
        names = run.config.data.validation.split(",") if run.stage == "pretrain" else [""]
        folder = tmp_path / run.folder
        folder.mkdir(parents=True)
        line = {f"eval/{name.replace('/', ':')}q/metric/em": value for name, value in zip(
            names, values[1::-1] if run.stage == "pretrain" else values[2:], strict=True)}
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, **line}) + "\n")
    text = experiment.conclude(runs, tmp_path)
    assert "| salient | 1 | 66.0 | 0.7 | 3.8 |" in text and "| none | 1 | – | – | 5.2 |" in text
    assert "- salient: 66 % of the facts are filled into their own sentence, 0.7 % are found" in text
    assert "no better than without pre-training" in text and "- cured:" not in text
    assert "- 6 questions" in text and "- 0 in a sentence that also holds the whole name" in text
    assert "- 6 as a name or date" in text and runner.summary(runs, tmp_path, experiment.SHOWN)


def test_the_made_up_persons_are_the_same_everywhere():
    from t5x_lite.data import names
    from tasks import biographies
    texts, questions = biographies.make(60, 30)
    assert (texts, questions) == biographies.make(60, 30) and texts != biographies.make(60, 30, seed=1)[0]
    subjects = [names.subject(text) for text in texts]
    assert len(set(subjects)) == 60
    for question, answer in questions:
        name = question.removeprefix("where was ").removesuffix(" born")
        assert answer in texts[subjects.index(name)]
