"""The shipped comparisons list runs that build, and draw the conclusions they promise."""

import json

import pytest

from configs.experiments import (
    closed_book_qa,
    muon_vs_adamw,
    precision as precision_experiment,
    scan,
    switch_vs_dense,
)
from t5x_lite import config as configs, experiment
from t5x_lite.build import build
from t5x_lite.cost import flops
from t5x_lite.errors import UserError
from t5x_lite.experiment import Run
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import precision


def test_switch_and_dense_spend_the_same_flops_a_token():
    runs = switch_vs_dense.get_runs()
    assert [(r.arm, r.seed) for r in runs] == [
        (arm, seed) for seed in (0, 1, 2) for arm in ("dense", "switch")]
    dense, sparse = (flops.train_flops(r.config.model, 1, 128, 32) for r in runs[:2])
    assert dense < sparse < 1.01 * dense   # the router's share
    for run in runs[:2]:
        build(run.config)


def test_the_conclusion_counts_steps_to_the_dense_loss(tmp_path):
    curves = {("dense", 0): [(20, 5.0), (40, 4.0)], ("dense", 1): [(20, 5.0), (40, 4.2)],
              ("switch", 0): [(20, 4.5), (40, 3.7)], ("switch", 1): [(20, 4.0), (40, 3.9)]}
    runs = [Run(*key, switch_vs_dense.get_runs()[0].config) for key in curves]
    for run in runs:
        folder = tmp_path / run.folder
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(
            json.dumps({"step": s, "eval/all/loss": v}) + "\n" for s, v in
            curves[run.arm, run.seed]))
    text = switch_vs_dense.conclude(runs, tmp_path)
    assert "mean final loss, 4.1000" in text
    assert "| dense | 38, – | – |" in text      # 20 + 20 * 0.9
    assert "| switch | 30, 20 | 25 |" in text   # 20 + 20 * 0.4 / 0.8
    assert switch_vs_dense.step_at(curves["switch", 0], 3.0) is None


def test_closed_book_qa_has_four_arms_and_takes_text_of_your_own():
    runs = closed_book_qa.get_runs()
    assert len(runs) == 3 * 7 and {r.arm for r in runs} == {"span", "salient", "none", "permuted"}
    assert {(r.arm, r.stage): r.config.data.train for r in runs if r.seed == 0} == {
        ("span", "pretrain"): "fact_passages", ("salient", "pretrain"): "fact_passages_salient",
        ("permuted", "pretrain"): "fact_passages_permuted",
        **{(arm, "finetune"): "closed_book_qa" for arm in ("span", "salient", "none", "permuted")}}
    assert {r.after for r in runs if r.stage == "finetune"} == {"", "pretrain"}
    assert [r.folder for r in runs if r.arm == "none" and r.after] == []
    build(runs[0].config)
    own = closed_book_qa.get_runs("passages=f.txt,questions=q.jsonl[:50%],held_out=q.jsonl[50%:]")
    assert {r.arm for r in own} == {"span", "salient", "none"}
    assert own[-1].config.data.validation == "q.jsonl[50%:]"
    public = closed_book_qa.get_runs("passages=span_corrupted_wikipedia,"
                                     "salient=salient_span_masked_wikipedia,questions=nq")
    assert {(r.arm, r.config.data.train) for r in public} == {
        ("span", "span_corrupted_wikipedia"), ("salient", "salient_span_masked_wikipedia"),
        *((arm, "nq") for arm in ("span", "salient", "none"))}
    with pytest.raises(UserError, match="every line of q.jsonl would be trained on and scored"):
        closed_book_qa.get_runs("passages=f.txt,questions=q.jsonl")
    with pytest.raises(UserError, match="goes with a task"):
        closed_book_qa.get_runs("passages=f.txt,salient=t,questions=nq")
    with pytest.raises(UserError, match="did you mean 'passages'"):
        closed_book_qa.get_runs("pasages=f.txt")
    with pytest.raises(UserError, match="give both"):
        closed_book_qa.get_runs("passages=f.txt")


def test_closed_book_qa_reports_questions_of_your_own(tmp_path):
    runs = closed_book_qa.get_runs("passages=f.txt,questions=q.jsonl[:50%],held_out=q.jsonl[50%:]")
    run = runs[-1]
    (tmp_path / run.folder).mkdir(parents=True)
    (tmp_path / run.folder / "metrics.jsonl").write_text(json.dumps(
        {"step": 1, "eval/q/metric/em": 40.0}) + "\n")
    assert "| none/finetune | 1 | 40 (40 … 40) | – |" in experiment.summary(
        runs, tmp_path, closed_book_qa.SHOWN)
    assert experiment.curve(tmp_path / run.folder / "metrics.jsonl",
                            f"eval/{closed_book_qa.SHOWN[0]}") == [(1, 40.0)]
    text = closed_book_qa.conclude(runs, tmp_path)
    assert "Exact match on q.jsonl[50%:]" in text and "| none | – | – | 40.0 |" in text


def test_closed_book_qa_reports_every_seed_against_the_majority(tmp_path):
    runs = closed_book_qa.get_runs()
    for run in runs:
        if run.stage == "finetune" and run.arm in ("span", "none"):
            (tmp_path / run.folder).mkdir(parents=True)
            (tmp_path / run.folder / "metrics.jsonl").write_text(json.dumps(
                {"step": 1, "eval/closed_book_qa/metric/em": 50.0 + run.seed}) + "\n")
    text = closed_book_qa.conclude(runs, tmp_path)
    assert "| span | 50.0 | 51.0 | 52.0 |" in text
    assert "The majority answer of each relation: " in text and "- none: +" in text


def test_scan_is_one_model_and_three_seeds():
    runs = scan.get_runs()
    assert [(r.arm, r.seed) for r in runs] == [("t5", 0), ("t5", 1), ("t5", 2)]
    build(runs[0].config)


def test_every_precision_policy_trains_the_same_model(tmp_path):
    runs = precision_experiment.get_runs()
    assert [(r.arm, r.seed) for r in runs] == [
        (name, seed) for seed in (0, 1, 2) for name in precision.POLICIES]
    assert {r.config.precision for r in runs} == set(precision.POLICIES)
    assert len({str(configs.replace(r.config, "precision", "")) for r in runs}) == 3   # seeds
    for run in runs[:len(precision.POLICIES)]:
        build(configs.replace(run.config, "mesh", MeshConfig(data=8)))
        folder = tmp_path / run.folder
        folder.mkdir(parents=True)
        loss = 4.0 if run.arm == "float32" else 4.25
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval/all/loss": loss}) + "\n")
    assert "- bf16_params: +0.2500 (+0.2500)" in precision_experiment.conclude(runs, tmp_path)


def test_muon_and_adamw_share_budgets_and_follow_the_width():
    runs = muon_vs_adamw.runs(((64, 3), (128, 5)), (0,), (0.004,))
    assert [(r.arm, r.stage) for r in runs] == [
        (arm, stage) for stage in ("64_3_0.004", "128_5_0.004") for arm in muon_vs_adamw.ARMS]
    assert {(r.config.model.embed_dim, r.config.train.num_steps) for r in runs} == {(64, 3), (128, 5)}
    program = build(runs[3].config)
    assert program.model.config.init.logits_std == pytest.approx(32**-0.5 / 4)
    # Muon's steps have AdamW's size: its hidden rates fall as the root of the width.
    hidden = next(path for path in program.optimizer.width_rates if path.endswith("mlp/wo/kernel"))
    assert program.optimizer.width_rates[hidden] == 0.5
    assert build(runs[2].config).optimizer.width_rates[hidden] == 0.25
