"""The texts that tasks make of records: T5's prefixes to the letter, and real records."""

import json

import numpy as np
import pytest

from t5x_lite.data import batches as data_batches, tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from tests.helpers import shared_data

INFERENCE = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 1, "idx": 7}
SENTENCES = {"sentence1": "A b.", "sentence2": "C d.", "label": 0, "idx": 1}
SQUAD = {"id": "x", "question": "Who won?", "context": "Ada (1815) won, twice.",
         "answers": {"text": ["Ada (1815)", "Ada"]}}
NEWS = {"article": "Long.", "highlights": "Short.", "document": "Long.", "summary": "Short."}
WORDS = {"en": "Good.", "de": "Gut.", "fr": "Bon.", "ro": "Bun."}
RECORD = {"passage": "Ann met Bob.\n@highlight\nThey sang\n@highlight\nEnd",
          "query": "@placeholder sang", "entities": ["Ann", "Bob"], "answers": ["Ann", "Bob"],
          "idx": {"passage": 3, "query": 4}}
WSC = {"text": "Mark told Pete lies about him, he said.", "span1_text": "Mark",
       "span2_text": "him", "span2_index": 5, "label": 0, "idx": 2}
DPR = {"sentence": "Bob asked Tom if he can lend some money.", "pronoun": "he",
       "candidates": ["Bob", "Tom"], "label": 1}
TRIVIA = {"question": "Capital of Peru?", "answer": {"value": "Lima", "aliases": ["Lima", "LIM"]}}
MULTIRC = {"question": "Who?", "answer": "Ann", "paragraph": "<b>S 1: </b>Ann sat.<br>Bob lay.",
           "label": 1, "idx": {"paragraph": 2, "question": 5, "answer": 9}}

_SQUAD_CONTEXT = "Ada ( 1815 ) won , twice . "
_NLI = "hypothesis: It is wet. premise: It rains."
# task: (record, [(inputs, targets), …])
COPA = {"premise": "I fell. ", "choice1": "It was icy.", "choice2": "É was I.", "question": "cause",
        "label": 0}
XNLI = {"premise": {"de": "Ja.", "en": "Yes."}, "label": 1, "hypothesis": {
    "language": ["de", "en"], "translation": ["Nein.", "No."]}}
CASES = {
    "natural_questions_open": ({"question": "who", "answer": ["a", "b"]}, [("nq question: who", "a")]),
    "web_questions_open": ({"question": "who?", "answers": ["a"]}, [("wq question: who?", "a")]),
    "trivia_qa_open": (TRIVIA, [("trivia_qa question: Capital of Peru?", "Lima")]),
    "salient_span_masked_wikipedia": (
        {"title": "t", "text": "Zoë sang in 1990.", "spans": {
            "start": np.array([0, 13]), "limit": np.array([4, 17]), "type": ["P", "D"]}},
        [("nem: _X_ sang in 1990.", "Zoë"), ("nem: Zoë sang in _X_.", "1990")]),
    "glue_cola": ({"sentence": "Me go.", "label": 0, "idx": 0},
                  [("cola sentence: Me go.", "unacceptable")]),
    "glue_sst2": ({"sentence": "fine", "label": 1, "idx": 0}, [("sst2 sentence: fine", "positive")]),
    "glue_mrpc": (SENTENCES, [("mrpc sentence1: A b. sentence2: C d.", "not_equivalent")]),
    "glue_qqp": ({"question1": "Q?", "question2": "R?", "label": 1, "idx": 0},
                 [("qqp question1: Q? question2: R?", "duplicate")]),
    "glue_stsb": ({**SENTENCES, "label": np.float32(3.25)},
                  [("stsb sentence1: A b. sentence2: C d.", "3.2")]),
    "glue_mnli": (INFERENCE, [(f"mnli {_NLI}", "neutral")]),
    "glue_mnli_matched": (INFERENCE, [(f"mnli {_NLI}", "neutral")]),
    "glue_mnli_mismatched": (INFERENCE, [(f"mnli {_NLI}", "neutral")]),
    "glue_ax": ({**INFERENCE, "label": -1}, [(f"mnli {_NLI}", "<unk>")]),
    "glue_qnli": ({"question": "Q?", "sentence": "S.", "label": 0, "idx": 0},
                  [("qnli question: Q? sentence: S.", "entailment")]),
    "glue_rte": (SENTENCES, [("rte sentence1: A b. sentence2: C d.", "entailment")]),
    "glue_wnli": (SENTENCES, [("wnli sentence1: A b. sentence2: C d.", "not_entailment")]),
    "super_glue_boolq": ({"passage": "P.", "question": "q", "label": 1, "idx": 0},
                         [("boolq passage: P. question: q", "True")]),
    "super_glue_cb": (INFERENCE, [(f"cb {_NLI}", "contradiction")]),
    "super_glue_copa": ({"choice1": "a", "choice2": "b", "premise": "p", "question": "cause",
                         "label": 1, "idx": 0},
                        [("copa choice1: a choice2: b premise: p question: cause", "choice2")]),
    "super_glue_rte": (INFERENCE, [(f"rte {_NLI}", "not_entailment")]),
    "super_glue_wic": ({**SENTENCES, "word": "w", "start1": 1, "end1": 2, "start2": 1, "end2": 2},
                       [("wic sentence1: A b. sentence2: C d. word: w", "False")]),
    "super_glue_axb": (SENTENCES, [("rte hypothesis: C d. premise: A b.", "entailment")]),
    "super_glue_axg": (INFERENCE, [(f"rte {_NLI}", "not_entailment")]),
    "super_glue_multirc": (MULTIRC, [
        ("multirc question: Who? answer: Ann paragraph: S 1: Ann sat. Bob lay.", "True")]),
    "super_glue_record": (RECORD, [
        ("record query: @placeholder sang entities: Ann, Bob passage: Ann met Bob. They sang. End",
         name) for name in ("Ann", "Bob")]),
    "super_glue_wsc_train": ({**WSC, "label": 1}, [
        ("wsc: Mark told Pete lies about *him*, he said.", "Mark")]),
    "super_glue_wsc_eval": (WSC, [("wsc: Mark told Pete lies about *him*, he said.", "Mark")]),
    "dpr": (DPR, [("wsc: Bob asked Tom if *he* can lend some money.", "Tom")]),
    "squad": (SQUAD, [(f"question: Who won ? context: {_SQUAD_CONTEXT}", "Ada ( 1815 ) ")]),
    "squad_context_free": (SQUAD, [("squad trivia question: Who won ? ", "Ada ( 1815 ) ")]),
    "cnn_dailymail": (NEWS, [("summarize: Long.", "Short.")]),
    "xsum": (NEWS, [("summarize: Long.", "Short.")]),
    "hellaswag": ({"context": "He", "endings": ["sits.", "is é."], "label": 1},
                  [("He", "sits."), ("He", "is é.")]),
    "winogrande": ({"sentence": "Ann saw _ cry.", "option1": "Bob", "option2": "Eve", "label": 0},
                   [("", "Ann saw Bob cry."), ("", "Ann saw Eve cry.")]),
    "winogrande_partial": (
        {"sentence": "Ann saw _ cry.", "option1": "Bob", "option2": "Eve", "label": 0},
        [("Ann saw Bob", "cry."), ("Ann saw Eve", "cry.")]),
    "copa_ranked": (COPA, [("I fell because", "it was icy."), ("I fell because", "é was I.")]),
    "copa_partial": (COPA, [("It was icy so", "I fell."), ("É was I so", "I fell.")]),
    "xnli_train": ({"premise": "A.", "hypothesis": "B.", "label": 2}, [
        ("xnli: premise: A. hypothesis: B.", "2")]),
    "xnli_de": (XNLI, [("xnli: premise: Ja. hypothesis: Nein.", "1")]),
    "xnli_en": (XNLI, [("xnli: premise: Yes. hypothesis: No.", "1")]),
    "wikiann_en": ({"tokens": ["rick", "is", "here"], "tags": [1, 0, 0], "langs": ["en"] * 3,
                    "spans": ["PER: rick", "LOC: here"]}, [
        ("tag: rick is here", "PER: rick $$ LOC: here")]),
    "arc_easy": ({"question": "Why?", "answerKey": 1, "choices": {
        "text": ["a", "b"], "label": [0, 1]}},
        [("Question: Why?\nAnswer:", "a"), ("Question: Why?\nAnswer:", "b")]),
    "openbookqa": ({"question": {"stem": "S", **{f"choice_{c}": c for c in "ABCD"}},
                    "answerKey": 2}, [("S", c) for c in "ABCD"]),
    "race_high": ({"article": "T", "questions": ["Q1", "Q2"], "answers": ["B", "A"],
                   "options": [["a", "b"], ["c", "d"]]},
                  [(f"Article: T\n\nQ: {q}\n\nA:", c) for q, cs in (("Q1", "ab"), ("Q2", "cd"))
                   for c in cs]),
    "lambada": ({"passage": "he closed the\nold door\n"}, [("he closed the\nold", "door")]),
    "wmt14_ende": (WORDS, [("translate English to German: Good.", "Gut.")]),
    "wmt14_enfr": (WORDS, [("translate English to French: Good.", "Bon.")]),
    "wmt16_enro": (WORDS, [("translate English to Romanian: Good.", "Bun.")]),
}
SAME = {   # task: another whose format it has
    "natural_questions_open_test": "natural_questions_open",
    "web_questions_open_test": "web_questions_open", "trivia_qa_open_test": "trivia_qa_open",
    "arc_challenge": "arc_easy", "race_middle": "race_high",
    "wmt15_enfr": "wmt14_enfr", "wmt_t2t_ende": "wmt14_ende",
    **{f"mlqa_{code}": "squad" for code in "ar de en es hi vi zh".split()}, "tydiqa": "squad",
    **{f"tydiqa_{code}": "squad" for code in "ar bn en fi id ko ru sw te".split()},
    **{f"xquad_{code}": "squad" for code in "ar de el en es hi ru th tr vi zh".split()},
}
FROM_FILES = {"scan_simple", "scitldr", "piqa", "mmlu", "siqa", "truthfulqa", "fever", "multifc",
              "raft", "wikitext103", "pile", "pg19"}   # below, and in test_prompts.py
OTHERS = {   # tested by name further down or beside, and in test_choices.py
    "natural_questions_open_randanswer", "web_questions_open_randanswer",
    "span_corrupted_wikipedia", "open_domain_qa", "open_domain_qa_test", "glue_proportional",
    "super_glue_proportional"}


def names() -> set[str]:
    """Every text-to-text task that is registered; the rest is in test_registered, and what the
    shipped facts make in test_facts_qa."""
    from t5x_lite.data import choice_files
    from tasks import big_bench, flan, multilingual
    facts = {"fact_passages", "fact_passages_permuted", "fact_passages_salient",
             "closed_book_qa", "closed_book_qa_dev", "fact_wordings", "fact_wordings_dev"}
    languages = {*(f"xnli_{code}" for code in multilingual.XNLI_LANGUAGES),
                 *(f"wikiann_{code}" for code in multilingual.WIKIANN_LANGUAGES)}
    ranked = {*choice_files.PUBLISHED, "copa_ranked", "hellaswag", "winogrande", "arc_easy", "arc_challenge",
              "openbookqa", "race_middle", "race_high"}
    ranked |= {f"bigbench_{name}_ranked" for name in big_bench.RANKED}
    return {*CASES, *SAME, *languages, *FROM_FILES, *OTHERS, *facts, *(f"{name}_choices" for name in ranked),
            "flan", *(f"flan_{name}" for name in flan.DATASETS),
            *(f"bigbench_{name}" for name in big_bench.HARD),
            *(f"bigbench_{name}_ranked" for name in big_bench.RANKED)}


def made(task, record) -> list[dict]:
    """What the task's format makes of one record, as a pipeline whose place can be saved."""
    import tensorflow as tf
    dataset = task.preprocessors[0](tf.data.Dataset.from_tensors(record))
    data_tasks.tensorflow_side().check_saveable(dataset, task.name)
    return list(dataset.as_numpy_iterator())


def texts(examples) -> list[tuple[str, str]]:
    return [(e["inputs"].decode(), e["targets"].decode()) for e in examples]


def test_formats(registered):
    for name, (record, expected) in CASES.items():
        assert texts(made(registered.get(name), record)) == expected, name


def test_tasks_of_the_same_format(registered):
    for name, other in SAME.items():
        record, expected = CASES[other]
        assert texts(made(registered.get(name), record)) == expected, name


def test_training_on_winograd_leaves_wrong_candidates_out(registered):
    assert made(registered.get("super_glue_wsc_train"), WSC) == []


def test_postprocessors(registered):
    get = registered.get
    assert get("glue_mnli").postprocess_fn("neutral") == 1
    assert get("glue_mnli").postprocess_fn("no label") == -1
    assert get("glue_stsb").postprocess_fn("3.4") == 3.4
    assert get("glue_stsb").postprocess_fn("similar") == -1
    [target] = made(get("super_glue_multirc"), MULTIRC)
    found = get("super_glue_multirc").postprocess_fn("True", example=target, is_target=True)
    assert found["value"] == 1 and found["group"].tolist() == [2, 5]
    [target] = made(get("natural_questions_open"), {"question": "who", "answer": ["a", "b"]})
    postprocess = get("natural_questions_open").postprocess_fn
    assert postprocess("a", example=target, is_target=True) == ["a", "b"]
    assert postprocess("b", example=target, is_target=False) == "b"


def test_a_winograd_answer_names_the_candidate():
    from tasks import glue
    example = {"targets_pretokenized": b"The city councilmen", "label": 1}
    answer = lambda text: glue.wsc_answer(text, example=example)
    assert glue.wsc_answer("", example=example, is_target=True) == 1
    assert answer("councilmen") == answer("the old city councilmen") == 1
    assert answer("the demonstrators") == answer("councilmen's") == 0


def test_sampled_answers_differ_over_epochs_and_come_from_the_list(registered):
    import tensorflow as tf
    task = registered.get("natural_questions_open_randanswer")
    record = {"question": "who", "answer": ["a", "b", "c"]}
    import seqio
    with seqio.utils.map_seed_manager(1):
        dataset = task.preprocessors[0](tf.data.Dataset.from_tensors(record).repeat(30))
    data_tasks.tensorflow_side().check_saveable(dataset, task.name)
    found = [t for _, t in texts(dataset.as_numpy_iterator())]
    assert set(found) == {"a", "b", "c"}


def test_mixtures_have_the_sizes_of_their_tasks(registered):
    import seqio
    for name, share in (("open_domain_qa", 79_168 / (79_168 + 3_417 + 78_785)),
                        ("open_domain_qa_test", 87_925 / (87_925 + 3_778 + 98_935))):
        task = registered.get(name.replace("open_domain_qa", "natural_questions_open"))
        rates = data_tasks._subtasks(seqio.MixtureRegistry.get(name))
        assert rates[task] == pytest.approx(share)
    rates = data_tasks._subtasks(seqio.MixtureRegistry.get("glue_proportional"))
    assert sum(rates.values()) == pytest.approx(1) and len(rates) == 8
    rates = data_tasks._subtasks(seqio.MixtureRegistry.get("super_glue_proportional"))
    assert len(rates) == 9


def batches(name, objective="seq2seq", split="validation", config=None, batch_size=4, limit=1):
    import jax
    config = config or DataConfig(validation=name, inputs_length=96, targets_length=64)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = data_batches.eval_batches(config, name, objective=objective, batch_size=batch_size,
                              sharding=sharding, split=split, max_batches=limit)
    vocabulary = data_tasks.validation_task(config, name, objective).output_features[
        "targets"].vocabulary
    text = lambda ids: vocabulary.decode([int(i) for i in ids if i > 1])
    return [(text(i), text(t)) for b in found for i, t in zip(
        np.asarray(b["encoder_input_tokens"]), np.asarray(b["decoder_target_tokens"]), strict=True)]


def test_natural_questions_through_tfds(registered, offline_tfds):
    wanted = [json.loads(line) for line in shared_data(
        "cbqa/nq_open/NQ-open.dev.jsonl").read_text().splitlines()]
    by_question = {f"nq question: {r['question']}": r["answer"][0] for r in wanted}
    squeeze = lambda t: "".join(t.split())
    by_question = {squeeze(q): squeeze(a) for q, a in by_question.items()}
    found = batches("natural_questions_open_test")
    assert len(found) == 4
    for question, answer in found:
        assert by_question[squeeze(question)] == squeeze(answer)


def test_web_questions_records(registered, tmp_path):
    from t5x_lite.data import records
    path = tmp_path / "webquestions.json"
    path.symlink_to(shared_data("cbqa/web_questions/webquestions.train"))
    content = {q: answers for q, answers in records.read_examples(str(path))}
    assert len(content) == 3778
    assert content["what character did natalie portman play in star wars?"] == ["Padmé Amidala"]
    assert '"Hope" is the thing with feathers' in sum(content.values(), [])
    assert "In Living Color (Season 4)" in sum(content.values(), [])
    question, answers = next(iter(content.items()))
    example = {"question": question, "answers": answers}
    assert texts(made(registered.get("web_questions_open"), example)) == [
        ("wq question: what is the name of justin bieber brother?", "Jazmyn Bieber")]


def test_xquad_through_tfds(registered, offline_tfds):
    found = batches("xquad_en")
    squeeze = lambda t: "".join(t.split())
    wanted = {squeeze(f"question:{q['question']}context:{p['context']}"): squeeze(
        q["answers"][0]["text"]) for article in json.loads(shared_data(
            "finetune/xquad.en.json").read_text())["data"]
        for p in article["paragraphs"] for q in p["qas"]}
    for question, answer in found:
        assert squeeze(answer) in [a for q, a in wanted.items() if q.startswith(squeeze(question))]


def test_salient_wikipedia_through_tfds(registered, offline_tfds):
    config = DataConfig(inputs_length=256, targets_length=32)
    found = batches("salient_span_masked_wikipedia", split="train", config=config)
    assert all(i.startswith("nem: ") and "_X_" in i and t for i, t in found)
    found = batches("span_corrupted_wikipedia", split="train",
                    config=DataConfig(inputs_length=64, targets_length=32))
    assert len(found) == 4


def test_scan_bigbench_and_scitldr_files(registered, files):
    assert batches("scan_simple")[0][1].startswith("I_")
    source = registered.get("scan_simple").source
    assert source.num_input_examples("train") == 16_728
    assert source.num_input_examples("validation") == 4_182
    assert ("not ( True ) and ( True ) is", "False") in batches(
        "bigbench_boolean_expressions", limit=None, batch_size=10)
    assert batches("bigbench_date_understanding")[0][1][0] == "("
    assert batches("scitldr")[0][0].startswith("summarize: ")


def test_a_missing_file_is_named_with_its_origin(registered, monkeypatch, tmp_path):
    monkeypatch.setenv("T5X_LITE_FILES", str(tmp_path))
    with pytest.raises(UserError, match="tasks_train_simple.txt is not below T5X_LITE_FILES=.*SCAN"):
        registered.get("scan_simple").source.folder()


def test_unprepared_tfds_data_names_the_folder(registered, tmp_path, monkeypatch):
    import seqio

    from t5x_lite.data.text_to_text import TfdsSource
    seqio.set_tfds_data_dir_override(str(tmp_path))
    try:
        with pytest.raises(UserError, match="no_such_data.* set TFDS_DATA_DIR"):
            TfdsSource("no_such_data:1.0.0", ("train",)).num_input_examples("train")
    finally:
        seqio.set_tfds_data_dir_override(None)


def test_a_jsonl_or_tsv_path_is_a_task(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"inputs": "2 + 2", "targets": "4"}\n\n{"question": "why", "answer": ["x", "y"]}\n')
    (tmp_path / "b.tsv").write_text("up\tdown\n")
    config = DataConfig(vocabulary="byt5", inputs_length=16, targets_length=16)
    find = lambda name: sorted(p for p in batches(
        str(tmp_path / name), config=config, batch_size=2) if p[0])
    assert find("a.jsonl") == [("2 + 2", "4"), ("why", "x")]
    assert find("b.tsv") == [("up", "down")]
    assert find("a.jsonl[:50%]") == [("2 + 2", "4")]
    assert find("a.jsonl[50%:]") == [("why", "x")]
    (tmp_path / "c.json").write_text('[{"inputs": "2 + 2", "targets": "4"}]')
    assert find("c.json") == [("2 + 2", "4")]
    (tmp_path / "d.json").write_text('{"text": "x"}')
    with pytest.raises(UserError, match="d.json is not a list of objects"):
        find("d.json")
    held_out = DataConfig(validation=str(tmp_path / "a.jsonl[50%:]"), vocabulary="byt5")
    (name,) = data_tasks.validation_tasks(held_out)
    assert [e["targets_pretokenized"] for e in data_tasks.eval_examples(
        held_out, name, objective="seq2seq")[1]] == [b"x"]
    with pytest.raises(UserError, match="from a lower to a higher per cent"):
        find("a.jsonl[60%:50%]")


@pytest.mark.parametrize("line, message", [
    ('{"inputs": "a", "targets": ""}', "line 2 has an empty target"),
    ('{"inputs": "a", "targets": []}', "line 2 has an empty target"),
    ('{"inputs": "a"}', 'line 2 has no "targets"'),
    ('{"targets": "a"}', 'line 2 has no string "inputs"'),
    ("[1]", "line 2 is not an object but a list"),
    ("{", "line 2 is not JSON"),
])
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"inputs": "a", "targets": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        batches(str(path), config=DataConfig(vocabulary="byt5"))


def test_a_mixture_is_not_read_as_a_task(registered):
    with pytest.raises(UserError, match="'open_domain_qa' is a mixture; name one of its tasks: "
                                        "natural_questions_open, trivia_qa_open"):
        data_tasks.eval_examples(DataConfig(), "open_domain_qa", objective="seq2seq")


def test_instructions_go_through_their_templates_with_the_options(registered):
    import seqio
    import tensorflow as tf
    task = registered.get("flan_copa")
    record = {"premise": "It fell.", "question": "cause", "choice1": "Wind.", "choice2": "Sun.",
              "label": 1}
    dataset = task.preprocessors[0](tf.data.Dataset.from_tensors(record).repeat(4))
    data_tasks.tensorflow_side().check_saveable(dataset, task.name)
    found = texts(dataset.as_numpy_iterator())
    options = "\nOPTIONS:\n- Wind.\n- Sun."
    assert found[0] == found[3] == (f"It fell. What is the cause?{options}", "Sun.")
    assert found[2][0] == f"It fell.\nChoose the most likely cause.{options}"
    rte = texts(made(registered.get("flan_rte"), INFERENCE))
    assert rte == [('It rains.\nDoes it follow that "It is wet."?\nOPTIONS:\n- yes\n- no', "no")]
    assert made(registered.get("flan_mnli"), {**INFERENCE, "label": -1}) == []
    rates = data_tasks._subtasks(seqio.MixtureRegistry.get("flan"))
    assert rates[task] == pytest.approx(400 / (250 + 400 + 2_490 + 7 * 3_000))


def test_an_empty_answer_is_never_right():
    from tasks import glue
    for label in (0, 1):
        example = {"targets_pretokenized": b"The city councilmen", "label": label}
        for text in ("", "  ", "the", " The  their ", "\n"):
            assert glue.wsc_answer(text, example=example) == -1
    example = {"targets_pretokenized": b"the", "label": 0}   # a candidate that is a determiner
    assert glue.wsc_answer("Bob", example=example) in (0, 1)


def test_only_punctuation_is_set_apart():
    """RE2 knows ASCII letters alone in \\w: whatever else is a letter or a mark stays in its word."""
    from tasks import t5_benchmarks
    pad = lambda text, *pattern: t5_benchmarks.pad_punctuation(text, *pattern).numpy().decode()
    texts_of_the_world = ("François Größe", "北京大学 東京", "Москва", "हिन्दी भाषा", "ภาษาไทย", "العَرَبِيّة",
                          "tiếng Việt", "٣٤٥ snake_case")
    for text in texts_of_the_world:
        assert pad(text, t5_benchmarks.ALL_PUNCTUATION) == text
    assert pad("谁？«Да» ¿qué?", t5_benchmarks.ALL_PUNCTUATION) == "谁 ？ « Да » ¿ qué ? "
    assert pad("François's  (a_b)") == "François ' s ( a _ b ) "


def test_a_pronoun_is_no_pattern():
    import tensorflow as tf

    from tasks import glue
    record = {"sentence": "Ann (she) and a+b met, as a+b said.", "pronoun": "a+b",
              "candidates": ["Ann", "x"], "label": 0}
    [made] = glue.definite_pronoun(tf.data.Dataset.from_tensors(record)).as_numpy_iterator()
    assert made["inputs"].decode() == "wsc: Ann (she) and *a+b* met, as a+b said."
