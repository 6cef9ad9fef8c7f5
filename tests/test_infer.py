"""Predicting and scoring: files in, JSONL out, resumed equals uninterrupted; metrics in eval."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import switch
from t5x_lite import (
    config as configs,
    eval as eval_main,
    infer,
    init_from,
    inspect_task,
    interactive,
    train,
    tree,
)
from t5x_lite.build import build
from t5x_lite.config import EvalConfig
from t5x_lite.data import tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.errors import UserError
from t5x_lite.evaluation import predictor as predictors
from t5x_lite.evaluation.evaluator import Evaluator
from t5x_lite.evaluation.predictor import Predictor
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import steps
from tests import tiny_config
from tests.helpers import xla_flags
from tests.test_train import free_port

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = [(f"{a}+{b}", str(a + b)) for a in range(4) for b in range(3)]   # 12: a batch and half


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The examples as a.jsonl, a.tsv and a.txt."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "a.jsonl").write_text("".join(
        json.dumps({"inputs": i, "targets": t}) + "\n" for i, t in EXAMPLES))
    (folder / "a.tsv").write_text("".join(f"{i}\t{t}\n" for i, t in EXAMPLES))
    (folder / "a.txt").write_text("".join(f"{i}\n" for i, _ in EXAMPLES))
    return folder


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """(config, workdir) of two steps on the examples, one device's batch split over 8."""
    path = str(files / "a.jsonl")
    base = tiny_config.run("")
    config = dataclasses.replace(
        base, data=dataclasses.replace(
            base.data, train_files="", validation_files="", train=path, validation=path,
            num_shards=2),
        train=dataclasses.replace(base.train, num_steps=2),
        eval=EvalConfig(every=2, decode=DecodeConfig(max_length=6)))
    workdir = tmp_path_factory.mktemp("run")
    return config, workdir, train.run(config, workdir)


@pytest.fixture(scope="module")
def session(run):
    return interactive.load(run[1])


def go(run, items, output, *, mode="predict", decode=None, source="x"):
    config, workdir, _ = run
    return infer.infer(config, workdir, "last", decode or config.eval.decode, items, output,
                       mode=mode, source=source)


def items(path, **options):
    options = {"on_error": "refuse", "needs_targets": False, **options}
    with open(path, "rb") as lines:
        return list(infer.read_lines(lines, infer.format_of(str(path), ""), **options))


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluation_runs_the_tasks_metrics_in_the_loop(run, session):
    config, _, held_out = run
    [values] = held_out.values()
    predictions = session.predict([i for i, _ in EXAMPLES])
    exact = 100 * np.mean([p.strip() == t for p, (_, t) in zip(predictions, EXAMPLES, strict=True)])
    assert values["metric/exact_match"] == pytest.approx(exact)
    assert {"metric/em", "metric/f1", "loss"} <= values.keys()


def test_targets_that_do_not_fit_are_counted(run, capsys):
    config = configs.replace(run[0], "data.targets_length", 1)
    program = build(config)
    with program.activate():
        Evaluator(program)
    assert "12 of 12 targets are longer than data.targets_length=1" in capsys.readouterr().out


def test_inputs_that_do_not_fit_are_counted_by_evaluation_and_infer(run, tmp_path, capsys):
    config = configs.replace(run[0], "data.inputs_length", 3)
    said = "12 of 12 inputs are longer than data.inputs_length=3 and are cut"
    with build(config).activate():
        Evaluator(build(config))
    assert said in capsys.readouterr().out
    go((config, *run[1:]), infer.read_task(config, config.data.validation, "validation"),
       tmp_path / "out.jsonl")
    assert said in capsys.readouterr().out


def test_a_session_tells_of_cut_and_empty_texts(session, capsys):
    capsys.readouterr()
    session.score(["a", "a" * 30], ["z" * 100, ""])
    assert capsys.readouterr().out == (
        "1 of 2 inputs are longer than data.inputs_length=24 and are cut\n"
        "1 of 2 targets are longer than data.targets_length=12 and are cut\n"
        "1 of 2 targets are empty\n")
    session.score(["a"], ["z"])
    assert capsys.readouterr().out == ""


def damaged(session, text: str):
    """Its parameters with NaN for the first byte of a text, and a decoder that says nothing."""
    flat = dict(tree.flatten(session.params))
    for path, rows, value in (("token_embedding/embedding", 3 + ord(text), np.nan),   # ByT5's ids
                              ("decoder/final_norm/scale", slice(None), 0.0)):
        array = np.array(flat[path])
        array[rows] = value
        flat[path] = jax.device_put(array, flat[path].sharding)
    return tree.unflatten(flat)


NO_NUMBER = ("a score that is not a number: the model overflows its number format, so use "
             "precision=bf16 or float32, or its parameters hold NaN")


def test_scores_that_are_no_numbers_and_empty_texts_are_named(run, session, tmp_path, capsys):
    """By infer, evaluation and a session: the rows and the remedy. (Of "3+…" inputs hold NaN.)"""
    config, params = run[0], damaged(session, "3")
    program = session.program
    predictor = Predictor(program, data_tasks.vocabulary_of(config.data), config.eval.decode)
    capsys.readouterr()
    inputs = [infer.Item(n, i, i, (t,)) for n, (i, t) in enumerate(EXAMPLES, 1)]
    empty = "an empty text: the model ends at once, or its tokens spell none"
    with program.activate():
        for mode in ("predict", "score"):
            output = infer.Output(tmp_path / f"{mode}.jsonl", {})
            infer.run(predictor, params, inputs, output, mode)
            output.close()
            said = capsys.readouterr().out
            rows = {"predict": "3 rows have {} (rows 10, 11, 12)",   # those of 1+2 and 2+1 hold 3
                    "score": "5 rows have {} (rows 6, 8, 10, 11, 12)"}[mode]   # in their targets
            assert f"warning: {rows.format(NO_NUMBER)}" in said
            assert (empty in said) == (mode == "predict")
        found = Evaluator(program).evaluate(params)
    said = capsys.readouterr().out
    assert NO_NUMBER in said and empty in said
    assert all(np.isnan(values["loss"]) for values in found.values())
    lines = written(tmp_path / "score.jsonl")
    assert lines[9]["scores"] == [None] and lines[0]["scores"][0] < 0
    assert "NaN" not in (tmp_path / "predict.jsonl").read_text()
    whole = interactive.Session(program, {**session.state, "params": params})
    whole.score(["3", "4"], ["1", "1"])
    assert capsys.readouterr().out == f"warning: 1 row has {NO_NUMBER} (row 0)\n"
    whole.predict(["4", "5"])
    assert "warning: 2 rows have an empty text" in capsys.readouterr().out


def test_evaluation_without_metrics(run):
    config = configs.replace(run[0], "eval.metrics", False)
    program = build(config)
    with program.activate():
        assert Evaluator(program)._examples == {}


def test_another_vocabulary_than_the_models_is_refused_by_name(run):
    """In training and evaluation, and of infer --task; also a run's own, overridden."""
    config = configs.replace(run[0], "data", DataConfig(
        train="closed_book_qa", validation="python_docs_span_corruption", num_shards=2))
    with pytest.raises(UserError, match="data.validation='python_docs_span_corruption' has another "
                       "vocabulary than data.train='closed_book_qa'.* of 4096 ids.* there .* of "
                       "3072 ids.*set data.vocabulary=facts$"):
        Evaluator(build(configs.replace(config, "model.vocab_size", 3072)))
    with pytest.raises(UserError, match="--task='python_docs_span_corruption' has another"):
        next(infer.read_task(config, "python_docs_span_corruption", "train"))
    overridden = configs.replace(run[0], "data.vocabulary", "python")
    for start in (lambda: eval_main.run(overridden, run[1], [2]),
                  lambda: go((overridden, *run[1:]), [], run[1] / "none.jsonl")):
        with pytest.raises(UserError, match="vocab_size=384 is smaller than .* 4096 ids: for a "
                                            "trained model set data.vocabulary to its own"):
            start()


def test_a_score_is_the_loss_of_its_row(run, session):
    program = session.program
    vocabulary = data_tasks.vocabulary_of(program.config.data)
    with program.activate():
        predictor = Predictor(program, vocabulary, DecodeConfig())
        batch = predictor.place(predictor.training_rows(["1+2"], ["3"]))
        sums = jax.jit(program.eval_step)(session.state["params"], batch, np.zeros(384))
    assert session.score(["1+2"], ["3"])[0] == pytest.approx(-float(sums["loss"][0]), rel=1e-5)
    assert float(sums["loss"][1]) == 2   # the target and EOS


def test_results_do_not_depend_on_the_neighbours(session):
    inputs = [i for i, _ in EXAMPLES]
    together = session.predict_many(inputs)
    assert session.predict_many(inputs[::-1])[::-1] == together
    assert session.predict_many(inputs[:1]) == together[:1]


def nothing_but_a(logits_RV, tokens_RT, step):
    """Allows "a" alone (97 in ByT5's ids, 3 further on) and, from the third token on, the end (1)."""
    allowed = jnp.where(step < 2, 100, 1)
    return jnp.where(jnp.arange(logits_RV.shape[1]) == allowed, logits_RV, -1e9)


def no_token_twice(logits_RV, tokens_RT, step):
    """An encoder's input is none of the tokens: these are what the row has emitted."""
    ids = jnp.arange(logits_RV.shape[1])
    return jnp.where((tokens_RT[:, :, None] == ids).any(1), -1e9, logits_RV)


@pytest.mark.parametrize("decode", [{}, {"method": "beam", "beam_size": 2},
                                    {"method": "sample", "temperature": 0.7}])
def test_a_function_of_ones_own_changes_what_is_decoded(run, files, tmp_path, session, decode):
    """In a session as itself and by its name, and through infer, which writes what the session says."""
    inputs = ["1+1", "2+2"]
    assert session.predict(inputs, logits_fn=nothing_but_a, **decode) == ["aa", "aa"]
    named = "tests.test_infer:nothing_but_a"
    assert session.predict(inputs, logits_fn=named, **decode) == ["aa", "aa"]
    assert session.predict(inputs, **decode) != ["aa", "aa"]
    if decode.get("method") == "sample":
        return
    config = dataclasses.replace(run[0].eval.decode, logits_fn=named, **decode)
    output = tmp_path / "out.jsonl"
    go(run, items(files / "a.txt")[:2], output, decode=config)
    assert [line["predictions"][0] for line in written(output)] == ["aa", "aa"]


def test_a_function_of_ones_own_sees_what_the_row_holds(session):
    letters = jnp.zeros(384).at[100:106].set(jnp.arange(6.0) + 50).at[1].set(-1e9)
    def chosen(logits_RV, tokens_RT, step):
        return no_token_twice(logits_RV * 0 + letters, tokens_RT, step)
    assert session.predict(["1+1"], logits_fn=chosen) == ["fedcba"]


def test_files_of_all_formats_give_the_same_predictions(run, files, tmp_path):
    outputs = []
    for name in ("a.jsonl", "a.tsv", "a.txt"):
        output = tmp_path / f"{name}.out.jsonl"
        assert go(run, items(files / name), output) == len(EXAMPLES)
        outputs.append(written(output))
    assert [r["inputs"] for r in outputs[0]] == [i for i, _ in EXAMPLES]
    assert [r["targets"] for r in outputs[1]] == [[t] for _, t in EXAMPLES]
    for key in ("line", "predictions", "scores"):
        assert [r[key] for r in outputs[0]] == [r[key] for r in outputs[2]]
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_writes_the_same_bytes(run, files, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    decode = DecodeConfig(method="sample", num_samples=2, max_length=4)
    go(run, items(files / "a.jsonl"), whole, decode=decode)
    content = whole.read_bytes()
    go(run, items(files / "a.jsonl")[:3], cut, decode=decode)
    for end in (0, 10, content.index(b"\n") + 1, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:end])   # a kill in the middle of a write
        go(run, items(files / "a.jsonl"), cut, decode=decode)
        assert cut.read_bytes() == content, end
    assert go(run, items(files / "a.jsonl"), cut, decode=decode) == 0
    with pytest.raises(UserError, match="belongs to another run:\n  decode: "):
        go(run, items(files / "a.jsonl"), cut)


def test_damaged_ends_of_an_output_are_made_anew(tmp_path, capsys):
    """As a power loss leaves them; the record beside it is written whole."""
    path = tmp_path / "out.jsonl"
    lines = b"".join(json.dumps({"line": n}).encode() + b"\n" for n in (1, 2, 3))
    for damage, last in ((b"", 3), (b'{"line": 4', 3), (b"\0" * 9 + b"\n", 3), (b"\xff\n\n", 3),
                         (b'{"line": null}\n[1]\n{"lin', 3), (b"9" * 6000 + b"\n", 3)):
        path.write_bytes(lines + damage)
        (tmp_path / "out.jsonl.run").write_text('{"of": "x"}')
        output = infer.Output(path, {"of": "x"})
        output.close()
        assert output.last_line == last and path.read_bytes() == lines
    path.write_bytes(b"\0\0\n")
    assert infer.Output(path, {"of": "x"}).last_line == 0 and path.read_bytes() == b""
    path.write_bytes(lines)
    (tmp_path / "out.jsonl.run").write_bytes(b"\0\0")
    with pytest.raises(UserError, match="belongs to another run:\n  of: None before, 'x' now"):
        infer.Output(path, {"of": "x"})
    assert "is damaged and is made anew" in capsys.readouterr().out


def test_an_output_of_something_else_is_left_alone(run, files, tmp_path):
    (tmp_path / "notes.jsonl").write_text("mine")
    with pytest.raises(UserError, match="is not an output of infer"):
        go(run, items(files / "a.jsonl"), tmp_path / "notes.jsonl")
    assert (tmp_path / "notes.jsonl").read_text() == "mine"


def test_a_run_refused_before_its_first_line_leaves_nothing_in_the_way(run, files, tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="no task or mixture is called 'no_task'"):
        go(run, infer.read_task(run[0], "no_task", "validation"), output, source="no_task")
    assert go(run, items(files / "a.jsonl")[:3], output, source="a.jsonl") == 3


def test_scoring(run, files, tmp_path, session):
    output = tmp_path / "scores.jsonl"
    go(run, items(files / "a.tsv", needs_targets=True), output, mode="score")
    inputs, targets = zip(*EXAMPLES, strict=True)
    expected = session.score(inputs, targets)
    assert [r["scores"][0] for r in written(output)] == pytest.approx(expected, rel=1e-6)


def test_every_target_is_scored(run, tmp_path, session):
    lines = [b'{"inputs": "1+1", "targets": ["2", "3"]}', b'{"inputs": "1+2", "targets": "3"}']
    read = infer.read_lines(lines, "jsonl", on_error="refuse", needs_targets=True)
    go(run, read, tmp_path / "out.jsonl", mode="score")
    expected = session.score(["1+1", "1+1", "1+2"], ["2", "3", "3"])
    first, second = (row["scores"] for row in written(tmp_path / "out.jsonl"))
    assert (len(first), len(second)) == (2, 1)
    assert first + second == pytest.approx(expected, rel=1e-6)


def test_a_rank_classification_tasks_lines_give_its_accuracy(run, tmp_path):
    from t5x_lite.data import choices
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": q, "choices": ["yes", "no"], "label": i % 2})
                            + "\n" for i, q in enumerate(("a", "b", "c"))))
    task = choices.register_files("data_test_infer_choices", {"validation": [str(path)]})
    output = tmp_path / "out.jsonl"
    go(run, infer.read_task(run[0], task.name, "validation"), output, mode="score")
    rows = written(output)
    assert [(r["question"], r["is_correct"]) for r in rows] == [
        (0, True), (0, False), (1, False), (1, True), (2, True), (2, False)]
    best = {r["question"]: r for r in sorted(rows, key=lambda r: r["scores"])}
    config = configs.replace(run[0], "data.validation", task.name)
    program = build(config)
    with program.activate():
        evaluator = Evaluator(program)
        [values] = evaluator.evaluate(init_from.restore(program, run[1])[0]).values()
    accuracy = 100 * np.mean([r["is_correct"] for r in best.values()])
    assert values["metric/accuracy"] == pytest.approx(accuracy)


def test_a_task_gives_the_same_as_its_file(run, files, tmp_path):
    config = run[0]
    output = tmp_path / "task.jsonl"
    go(run, infer.read_task(config, config.data.validation, "validation"), output)
    by_input = {r["inputs"]: r["predictions"] for r in written(output)}
    go(run, items(files / "a.jsonl"), tmp_path / "file.jsonl")
    assert by_input == {r["inputs"]: r["predictions"] for r in written(tmp_path / "file.jsonl")}


def test_an_output_of_other_settings_or_another_input_is_refused(run, files, tmp_path):
    output, path = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    path.write_bytes((files / "a.jsonl").read_bytes())
    source = infer.source_of(str(path), "jsonl")
    go(run, items(path)[:1], output, source=source)
    shorter = configs.replace(run[0], "data.inputs_length", 4)
    with pytest.raises(UserError, match="another run:\n  data.inputs_length: 24 before, 4 now"):
        go((shorter, *run[1:]), items(path), output, source=source)
    other = configs.replace(run[0], "precision", "bf16_params")
    with pytest.raises(UserError, match="precision: 'float32' before"):
        go((other, *run[1:]), items(path), output, source=source)
    path.write_bytes(path.read_bytes().replace(b"0+0", b"9+9"))
    with pytest.raises(UserError, match="source: '.*in.jsonl as jsonl, .* bytes, crc32 "):
        go(run, items(path), output, source=infer.source_of(str(path), "jsonl"))


def test_what_stands_before_a_malformed_line_is_written(run, files, tmp_path):
    lines = [*(files / "a.jsonl").read_bytes().splitlines(), b"{"]
    read = infer.read_lines(lines, "jsonl", on_error="refuse", needs_targets=False)
    with pytest.raises(UserError, match="line 13 is not JSON"):
        go(run, read, tmp_path / "out.jsonl")
    assert [row["line"] for row in written(tmp_path / "out.jsonl")] == list(range(1, 13))


def test_narrow_rows_predict_what_wide_ones_do(session, monkeypatch):
    """Rows of unlike lengths in any company: the same tokens, in the order of the inputs."""
    program, vocabulary = session.program, data_tasks.vocabulary_of(session.program.config.data)
    texts = ["1", "2+2=4 5", "a longer one, of 20", "3+3", "0123456789", "x" * 40]
    assert predictors.widths(program.config) == (24,)   # narrower ones are not worth a program
    wide = Predictor(program, vocabulary, DecodeConfig(max_length=4), batch_size=8)
    monkeypatch.setattr(predictors, "MIN_WIDTH", 1)
    narrow = Predictor(program, vocabulary, DecodeConfig(max_length=4), batch_size=8)
    assert narrow.widths == (24, 12, 6)
    assert list(narrow._grouped([24, 6, 7, 13, 0])) == [(24, [0, 3]), (12, [2]), (6, [1, 4])]
    with program.activate():
        expected = wide.predict(session.params, texts)
        found = narrow.predict(session.params, texts)
        alone = narrow.predict(session.params, texts[1:2])
    assert [p.tokens for p in found] == [p.tokens for p in expected]
    np.testing.assert_allclose([p.scores for p in found], [p.scores for p in expected], rtol=1e-5)
    assert alone == found[1:2]


def test_mixtures_have_one_width():
    config = configs.replace(tiny_config.run(""), "data.inputs_length", 512)
    assert predictors.widths(config) == (512, 256, 128)
    assert predictors.widths(configs.replace(config, "eval.length_buckets", 1)) == (512,)
    assert predictors.widths(dataclasses.replace(config, model=switch.run().model)) == (512,)


def test_rows_of_causal_and_prefix_models_by_hand(session, capsys):
    """[inputs, targets] in one row, as long as training's; loss on the targets; a prefix sees its
    own EOS."""
    vocabulary = data_tasks.vocabulary_of(session.program.config.data)   # byt5: "a" is 100
    config = session.program.config
    config = dataclasses.replace(config, data=dataclasses.replace(
        config.data, inputs_length=3, targets_length=6))

    def rows(objective):
        program = dataclasses.replace(session.program, config=dataclasses.replace(
            config, objective=dataclasses.replace(config.objective, name=objective)))
        predictor = Predictor(program, vocabulary, DecodeConfig(), batch_size=8)
        return predictor, {n: x[0].tolist() for n, x in predictor.training_rows(
            ["ab"], ["c"]).items()}, predictor._prompts([predictor._inputs("ab", 3)], 3)

    _, causal, prompt = rows("lm")
    assert causal == {"decoder_input_tokens": [0, 100, 101, 102, 0, 0],
                      "decoder_target_tokens": [100, 101, 102, 0, 0, 0],
                      "decoder_loss_weights": [0, 0, 1, 0, 0, 0]}
    assert prompt["decoder_prompt_tokens"][0].tolist() == [0, 100, 101, 0]
    assert prompt["decoder_prompt_lengths"][0] == 3
    predictor, prefix, prompt = rows("prefix_lm")
    assert prefix == {"decoder_prefix": [1, 1, 1, 1, 0, 0],
                      "decoder_input_tokens": [0, 100, 101, 1, 102, 1],
                      "decoder_target_tokens": [100, 101, 1, 102, 1, 0],
                      "decoder_loss_weights": [0, 0, 0, 1, 1, 0]}
    assert prompt["decoder_prefix"][0].tolist() == [1, 1, 1, 1]
    predictor.say_misfits()
    capsys.readouterr()
    row = lambda predictor, *pair: predictor.training_rows(*([text] for text in pair))[
        "decoder_target_tokens"][0].tolist()
    assert row(predictor, "ab", "cdef") == [1, 102, 103, 104, 105, 1]   # the inputs give way
    assert row(predictor, "", "cdefg") == [1, 102, 103, 104, 105, 1]
    predictor.say_misfits()
    assert capsys.readouterr().out == (
        "1 of 2 inputs are longer than data.inputs_length=3, or than their targets leave of "
        "data.targets_length=6, and are cut\n"
        "1 of 2 targets are longer than data.targets_length=6 and are cut\n")
    predictor, *_ = rows("lm")
    assert row(predictor, "abcd", "cd") == [101, 102, 103, 102, 103, 0]
    assert row(predictor, "abcd", "cdefg") == [103, 102, 103, 104, 105, 106]   # at their start
    assert row(predictor, "ab", "cdefgh") == [102, 103, 104, 105, 106, 107]


def test_a_session_learns_predicts_and_evaluates(run, capsys):
    from t5x_lite.data import task_metrics
    session = interactive.start(configs.replace(run[0], "objective.z_loss", 0.0))
    losses = session.train([("x", "y")], 30)
    assert losses[-1] < losses[0] / 2 and int(session.state["step"]) == 30
    found = session.evaluate([("x", "y")], [task_metrics.accuracy])
    assert found["score"] == session.score(["x"], ["y"])[0] and "accuracy" in found
    assert len(session.predict_many(["x"], method="beam", num_samples=2, max_length=4)[0].texts) == 2
    for call, message in (
            (lambda: session.predict([3]), "inputs must be strings, not int"),
            (lambda: session.predict("1+2"), r"for one, write \['1\+2'\]"),
            (lambda: session.score(["a"], "b"), r"targets must be a list .* \['b'\]"),
            (lambda: session.train([], 1), "no examples to train on"),
            (lambda: session.evaluate([]), "no examples to evaluate on"),
            (lambda: session.evaluate([("a", "b", "c")]), r"pairs .* not \('a', 'b', 'c'\)"),
            (lambda: session.train(["ab"], 1), "pairs .* not 'ab'"),
            (lambda: session.predict(["a"], metod="beam"), "did you mean 'method'")):
        with pytest.raises(UserError, match=message):
            call()
    capsys.readouterr()
    session.train([("a", "")], 1)
    assert capsys.readouterr().out == "8 of 8 targets are empty\n"


def test_inspection_shows_tokens_and_text(run):
    config = dataclasses.replace(run[0].data, inputs_length=10, targets_length=2)
    text = inspect_task.describe(config, config.validation, "validation", "seq2seq", 2, 50)
    assert "encoder_input_tokens   int32 [2, 10]" in text and "exact_match, squad" in text
    assert "1 x padding" not in text and "6 x padding" in text
    assert "targets  mean 2.0, longest 2; 0 of 12 longer" in text
    # the ids and the text of the same tokens stand in one line
    line = next(l for l in text.splitlines() if "'" in l and "+" in l)
    ids = [int(i) for i in line.split("'")[0].split()[1:]]
    assert bytes(i - 3 for i in ids if i > 1).decode() in line


def test_the_command_reads_standard_input(run, tmp_path):
    """With a function of one's own from a module on PYTHONPATH: two letters, then the end."""
    output = tmp_path / "out.jsonl"
    (tmp_path / "own.py").write_text(
        "import jax.numpy as jnp\n"
        "def letters(logits, tokens, step):\n"
        "    ids = jnp.arange(logits.shape[1])\n"
        "    allowed = jnp.where(step < 2, (ids == 100) | (ids == 101), ids == 1)\n"
        "    return jnp.where(allowed, logits, -1e9)\n")
    result = subprocess.run(
        [sys.executable, "-m", "t5x_lite.infer", f"--workdir={run[1]}", "--input=-",
         "--format=text", f"--output={output}", "--decode.method=beam", "--decode.max_length=3",
         "--on_error=skip", "--decode.num_samples=2", "--decode.logits_fn=own:letters"],
        input=b"1+1\n\n2+2\n", capture_output=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}, timeout=300)
    assert result.returncode == 0, result.stderr.decode()
    assert [r["line"] for r in written(output)] == [1, 3]
    for record in written(output):
        assert len(record["predictions"]) == 2 == len(set(record["predictions"]))
        assert all(len(text) == 2 and set(text) <= {"a", "b"} for text in record["predictions"])
    assert b"standard input, line 2 is empty" in result.stdout and b"2 lines in" in result.stdout


def test_fsdp_is_gathered_once_and_not_at_every_token(run, files, tmp_path, capsys):
    config, workdir, held_out = run
    split = configs.replace(config, "mesh", MeshConfig(fsdp=8))
    go((split, workdir, held_out), items(files / "a.jsonl"), tmp_path / "split.jsonl")
    assert "parameters gathered over mesh.fsdp=8 once" in capsys.readouterr().out
    go(run, items(files / "a.jsonl"), tmp_path / "whole.jsonl")
    predictions = [[r["predictions"] for r in written(tmp_path / name)]
                   for name in ("split.jsonl", "whole.jsonl")]
    assert predictions[0] == predictions[1]
    program = build(split)
    batch = {"encoder_input_tokens": program.abstract_batch()["encoder_input_tokens"]}

    def gathers(params):
        with program.activate():
            return jax.jit(steps.make_decode_step(program.model, DecodeConfig(max_length=6))
                           ).lower(params, batch).compile().as_text().count(" all-gather(")

    whole = tree.map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
            program.mesh, PartitionSpec(*[None] * x.ndim))), program.abstract_params)
    assert gathers(whole) < gathers(program.abstract_params)


def test_two_processes_killed_and_restarted_write_each_line_once(run, files, tmp_path):
    """Both read the input, process 0 alone has the output: the other need not even see it."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    go(run, items(files / "a.jsonl"), whole,
       source=infer.source_of(str(files / "a.jsonl"), "jsonl"))
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:3]) + lines[3][:9])   # a kill in the middle of a write
    cut.with_name("cut.jsonl.run").write_bytes(whole.with_name("whole.jsonl.run").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    address = f"127.0.0.1:{free_port()}"
    processes = [subprocess.Popen(
        [sys.executable, "-m", "t5x_lite.infer", f"--workdir={run[1]}",
         f"--input={files / 'a.jsonl'}", f"--output={folder / 'cut.jsonl'}",
         f"--coordinator_address={address}", "--num_processes=2", f"--process_id={i}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
             "XLA_FLAGS": xla_flags(4)})
        for i, folder in enumerate((tmp_path, tmp_path / "elsewhere"))]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"{len(EXAMPLES) - 3} lines in" in outputs[0] and "behind 3 of before" in outputs[0]
    rows = [json.loads(line) for line in lines]
    assert [(r["line"], r["predictions"]) for r in written(cut)] == [
        (r["line"], r["predictions"]) for r in rows]
    assert not list((tmp_path / "elsewhere").iterdir())
