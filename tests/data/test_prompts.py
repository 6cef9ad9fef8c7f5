"""Multiple choice, language-model text, k-shot prompts, P3 templates, published mixtures."""

import dataclasses
import json

import pytest

from t5x_lite.data import described, tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from tests.helpers import shared_data
from tests.tasks.test_formats import CASES, batches, made


def test_the_right_choice_is_marked_and_measured(registered):
    examples = made(registered.get("hellaswag"), CASES["hellaswag"][0])
    assert [(e["question"], e["is_correct"], e["length"]) for e in examples] == [
        (0, False, 5), (0, True, 6)]   # "é" is two bytes
    assert [e["is_correct"] for e in made(registered.get("race_high"), CASES["race_high"][0])] == [
        False, True, True, False]
    assert [e["question"] for e in made(registered.get("race_high"), CASES["race_high"][0])] == [
        0, 0, 1, 1]
    task = registered.get("hellaswag")
    targets = [task.postprocess_fn("", example=e, is_target=True) for e in examples]
    [metric] = task.score_metric_fns
    assert metric(targets, [-1.0, -1.1]) == {"accuracy": 0, "accuracy_by_length": 100}


def test_piqa_records(registered, files):
    source = registered.get("piqa").source
    assert source.num_input_examples("validation") == 1_838
    labels = shared_data("finetune/piqa.valid-labels.lst").read_text().split()
    goals = [json.loads(line) for line in shared_data(
        "finetune/piqa.valid.jsonl").read_text().splitlines()]
    right = {(r["goal"], r[f"sol{int(l) + 1}"]) for r, l in zip(goals, labels, strict=True)}
    examples = registered.get("piqa").preprocessors[0](
        source.get_dataset("validation", shuffle=False)).take(10)
    for e in examples.as_numpy_iterator():
        goal = e["inputs"].decode().removeprefix("Question: ").removesuffix("\nAnswer:")
        assert ((goal, e["targets"].decode()) in right) == e["is_correct"]


# As the authors publish them: {name: ({file: text}, the first question)}.
PUBLISHED = {
    "mmlu": ({f"data/{d}/{s}_{d}.csv": f'"1, 2?",a,b,c,d,{a}\n' for d, s, a in (
        ("dev", "us_law", "A"), ("val", "us_law", "C"), ("test", "us_law", "B"))},
        ("The following are multiple choice questions (with answers) about us law.\n\n"
         "1, 2?\nA. a\nB. b\nC. c\nD. d\nAnswer:", ["A", "B", "C", "D"], "2")),
    "siqa": ({f"socialiqa-train-dev/{s}{ending}": text for s in ("train", "dev")
              for ending, text in ((".jsonl", json.dumps(
                  {"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b",
                   "answerC": "c"}) + "\n"), ("-labels.lst", "3\n"))},
             ("Context: C.\nQuestion: Q?\nAnswer:", ["a", "b", "c"], "2")),
    "truthfulqa": ({"mc_task.json": json.dumps([{"question": "Q?", "mc1_targets": {
        "no": 0, "yes": 1}, "mc2_targets": {}}])}, ("Question: Q?\nAnswer:", ["no", "yes"], "1")),
    "fever": ({"paper_dev.jsonl": '{"id": 1, "label": "REFUTES", "claim": "X is.", '
               '"evidence": []}\n'},
              ("Claim: X is.\nIs the claim true, false or unknown?\nAnswer:",
               ["true", "false", "unknown"], "1")),
    "multifc": ({"multifc/dev.tsv": "pomt-1\tA \"b\" c\tpants on fire!\turl\n"
                 "snes-1\tD\tmixture\turl\npomt-2\tE\ttrue\turl\n"},
                ('Claim: A "b" c\nRating:', ["pants on fire!", "true"], "0")),
    "raft": ({"raft/data/ade/train.csv": 'Sentence,ID,Label\n"S, t",0,yes\nU,1,no\n'},
             ("Sentence: S, t\nLabel:", ["no", "yes"], "1")),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_choices_from_published_files(monkeypatch, tmp_path, name):
    from t5x_lite.data import choice_files
    monkeypatch.setenv("T5X_LITE_FILES", str(tmp_path))
    published = choice_files.PUBLISHED[name]
    with pytest.raises(UserError, match=f"no file .* get it from {published.origin}"):
        published.files()
    files, expected = PUBLISHED[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = published.files()
    assert found.keys() == published.globs.keys()
    assert next(published.read(found["validation"][0])) == expected


@pytest.mark.parametrize("name, path, text, message", [
    ("mmlu", "x/val/a_val.csv", "q,a,b,c,d,E\n", "line 1 has the answer 'E'"),
    ("mmlu", "x/val/a_val.csv", "q,a,b,c,D\n", "line 1 has 5 fields; it must have 6"),
    ("siqa", "dev.jsonl", "{}\n", "has no dev-labels.lst beside it"),
    ("fever", "paper_dev.jsonl", '{"claim": "x", "label": "MAYBE"}\n', "line 1 has the label 'MAYBE'"),
    ("multifc", "dev.tsv", "pomt-1\tx\n", "line 1 has 2 fields; it must have 3 or more"),
    ("raft", "train.csv", "a,b\n1,2\n", "has no column ID or Label"),
    ("truthfulqa", "mc_task.json", '[{"mc1_targets": {"a": 0}}]', "question 1 has not one true"),
])
def test_malformed_published_files_are_named(tmp_path, name, path, text, message):
    from t5x_lite.data import choice_files
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
    with pytest.raises(UserError, match=message):
        list(choice_files.PUBLISHED[name].read(str(tmp_path / path)))


def test_a_registered_task_reads_the_published_files(registered, monkeypatch, tmp_path):
    monkeypatch.setenv("T5X_LITE_FILES", str(tmp_path))
    files, (inputs, choices, label) = PUBLISHED["fever"]
    for path, text in files.items():
        (tmp_path / path).write_text(text)
    task = registered.get("fever")
    dataset = task.preprocessors[0](task.source.get_dataset("validation", shuffle=False))
    found = list(dataset.as_numpy_iterator())
    assert [e["targets"].decode() for e in found] == choices
    assert [e["is_correct"] for e in found] == [i == int(label) for i in range(3)]
    assert {e["inputs"].decode() for e in found} == {inputs}


def test_raft_does_not_score_its_training_lines(registered, monkeypatch, tmp_path):
    path = tmp_path / "raft/data/ade/train.csv"
    path.parent.mkdir(parents=True)
    path.write_text("Sentence,ID,Label\n" + "".join(
        f"s{i},{i},{'no' if i == 7 else 'yes'}\n" for i in range(50)))
    monkeypatch.setenv("T5X_LITE_FILES", str(tmp_path))
    task, found = registered.get("raft"), {}
    for split in ("train", "validation"):
        dataset = task.preprocessors[0](task.source.get_dataset(split, shuffle=False))
        examples = list(dataset.as_numpy_iterator())
        assert {e["targets"] for e in examples} == {b"yes", b"no"}   # also where no line has it
        found[split] = {int(e["inputs"].split()[1][1:]) for e in examples}
    assert found == {"train": set(range(0, 50, 2)), "validation": set(range(1, 50, 2))}


@pytest.mark.parametrize("line, message", [
    ('{"question": "q", "choices": ["a"], "label": 1}', 'line 1 has "label" 1; it must number'),
    ('{"question": "q", "choices": [], "label": 0}', 'line 1 must hold a string "question"'),
])
def test_bad_questions_are_named(tmp_path, line, message):
    from t5x_lite.data import choices
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        list(choices.read_questions(str(tmp_path / "q.jsonl")))


def test_wikitext_and_pile_text(registered, monkeypatch, tmp_path):
    from tasks import lm_evaluation
    pages = list(lm_evaluation.wikitext_pages(str(shared_data("corpora/wikitext-2.valid.txt"))))
    assert len(pages) > 50 and all(page.startswith("= ") for page, in pages)
    (tmp_path / "pile.val.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    monkeypatch.setenv("T5X_LITE_FILES", str(tmp_path))
    for name in ("pile", "pg19", "wikitext103"):
        assert list(registered.get(name).output_features) == ["targets"]
    documents = registered.get("pile").source.get_dataset("validation", shuffle=False)
    assert sorted(d["text"] for d in documents.as_numpy_iterator()) == [b"one two", b"three"]


def test_p3_templates_by_hand():
    from t5x_lite.data import prompts
    boolq = {t.name: t for t in prompts.read_templates(
        str(shared_data("templates/p3_super_glue_boolq.yaml")))}
    record = {"passage": "It rains.", "question": "is it wet", "label": 1}
    assert prompts.render(boolq["GPT-3 Style"], record) == (
        "It rains. \nQuestion: is it wet\nAnswer:", ["Yes"])
    assert prompts.render(boolq["after_reading"], record)[1] == ["True"]
    assert prompts.render(boolq["GPT-3 Style"], {**record, "label": -1}) is None


def test_p3_templates_of_every_file_render_real_records(tmp_path):
    from t5x_lite.data import prompts
    nq = json.loads(shared_data("cbqa/nq_open/NQ-open.dev.jsonl").read_text().splitlines()[0])
    article = json.loads(shared_data("finetune/xquad.en.json").read_text())["data"][0]
    paragraph = article["paragraphs"][0]
    question = paragraph["qas"][0]
    squad = {"context": paragraph["context"], "question": question["question"],
             "title": "Panthers", "answers": {"text": [a["text"] for a in question["answers"]]}}
    records = {"nq_open": nq, "web_questions": {**nq, "answers": nq["answer"]}, "squad": squad,
               "super_glue_rte": {"premise": "p", "hypothesis": "h", "label": 0},
               "super_glue_boolq": {"passage": "p", "question": "q", "label": 0}}
    for name, record in records.items():
        templates = prompts.read_templates(str(shared_data(f"templates/p3_{name}.yaml")))
        assert len(templates) >= 5
        for template in templates:
            inputs, targets = prompts.render(template, record)
            assert inputs and all(targets) and "{{" not in inputs + targets[0], template.name


def test_a_task_for_each_template_and_their_mixture(registered, tmp_path):
    import seqio

    from t5x_lite.data import prompts, readers
    path = tmp_path / "nq.jsonl"
    path.write_text(json.dumps({"question": "who ran", "answer": ["Ann", "Eve"]}) + "\n")
    read = lambda p: (record for _, record in readers.json_lines(p))
    names = prompts.register_templates(
        "data_test_p3_nq", str(shared_data("templates/p3_nq_open.yaml")),
        {"validation": [str(path)]}, read, original_only=True)
    assert "data_test_p3_nq_question_answer" in names
    rates = data_tasks._subtasks(seqio.MixtureRegistry.get("data_test_p3_nq"))
    assert list(rates.values()) == pytest.approx([1 / len(names)] * len(names))
    config = DataConfig(vocabulary="byt5", inputs_length=64, targets_length=8)
    [(inputs, target), *_] = batches("data_test_p3_nq_question_answer", config=config)
    assert inputs == "Question : who ran\nAnswer :" or inputs == "Question : who ran\n\nAnswer :"
    assert target in ("Ann", "Eve")


def test_rates_of_many_tasks():
    from t5x_lite.data import prompts
    assert prompts.capped_rates({"a": 10, "b": 5_000}, 3_000) == [("a", 10.0), ("b", 3_000.0)]
    assert prompts.p3_rates({"a": 10, "b": 600_000}, {"a": 5, "b": 10}) == {"a": 10, "b": 50_000}


def test_published_mixtures():
    from t5x_lite.data import published_mixtures
    for name, parts in published_mixtures.MIXTURES.items():
        assert sum(p.share for p in parts.values()) == pytest.approx(100, abs=1.5), name
    def epochs_of(name, tokens):
        lines = published_mixtures.epochs(name, tokens).splitlines()[1:]
        return {line.split()[0]: float(line.split()[-1]) for line in lines}
    # GPT-3: 300 billion tokens see Common Crawl 0.44 times (and, its table says, WebText2 2.9)
    epochs = epochs_of("gpt3", 300e9)
    assert epochs["common_crawl"] == pytest.approx(0.44, abs=0.015)
    assert epochs["webtext2"] == pytest.approx(3.4, abs=0.6)
    assert epochs_of("massive_text_chinchilla", 1.4e12) == pytest.approx(   # its own column
        {"web": 1.24, "books": 0.75, "c4": 0.77, "news": 0.21, "github": 0.13, "wikipedia": 3.5},
        abs=0.011)
    epochs = epochs_of("pile_mt_nlg", 270e9)
    assert epochs["books3"] == pytest.approx(1.5, abs=0.05)
    assert epochs["openwebtext2"] == pytest.approx(3.6, abs=0.1)
    assert published_mixtures.weights("gpt3", {"wikipedia": "wiki", "books1": "b"}) == "wiki=3,b=8"
    assert published_mixtures.epochs("gpt3", 10e9, ["wikipedia", "books1"]).splitlines()[1:] == [
        "books1                  12B    72.7%    0.606",
        "wikipedia                3B    27.3%    0.909"]
    with pytest.raises(UserError, match="did you mean 'books1'"):
        published_mixtures.weights("gpt3", {"book1": "b"})
    with pytest.raises(UserError, match="did you mean 'gpt3'"):
        published_mixtures.epochs("gpt", 1)


def test_a_published_mixture_is_a_value_of_data_train():
    config = DataConfig(train="gpt3( wikipedia=python_docs_causal_lm, books1 = "
                              "python_source_causal_lm)", targets_length=64)
    mixture = data_tasks.train_mixture(config, "lm")
    assert {task.name: share for task, share in mixture} == pytest.approx(
        {"python_docs_causal_lm": 3 / 11, "python_source_causal_lm": 8 / 11})
    lines = described.describe_training(config, "lm", 10)
    assert lines[2] == "epochs that 640 tokens are of the corpora of gpt3:"
    assert [line.split()[0] for line in lines[3:]] == ["part", "books1", "wikipedia"]
    with pytest.raises(UserError, match="no published mixture is called 'gpt4'.*'gpt3'"):
        data_tasks.train_mixture(dataclasses.replace(config, train="gpt4(web=t)"), "lm")
