"""The shipped comparisons list runs that build, and draw the conclusions they promise."""

import json

from configs.experiments import switch_vs_dense
from t5x_lite.build import build
from t5x_lite.cost import flops
from t5x_lite.experiment import Run


def test_switch_and_dense_spend_the_same_flops_a_token():
    runs = switch_vs_dense.get_runs()
    assert [(r.arm, r.seed) for r in runs] == [
        (arm, seed) for seed in (0, 1, 2) for arm in ("dense", "switch")]
    dense, sparse = (flops.train_flops(r.config.model, 1, 128, 32) for r in runs[:2])
    assert dense < sparse < 1.01 * dense   # the router's share
    for run in runs[:2]:
        build(run.config)


def test_the_conclusion_counts_steps_to_the_dense_loss(tmp_path):
    curves = {"dense": [(20, 5.0), (40, 4.0)], "switch": [(20, 4.1), (40, 3.9)]}
    runs = [Run(arm, 0, switch_vs_dense.get_runs()[0].config) for arm in curves]
    for run in runs:
        folder = tmp_path / run.folder
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(
            json.dumps({"step": s, "eval/all/loss": v}) + "\n" for s, v in curves[run.arm]))
    text = switch_vs_dense.conclude(runs, tmp_path)
    assert "mean final loss, 4.0000" in text
    assert "- dense, seed 0: step 40" in text and "- switch, seed 0: step 40" in text
    assert switch_vs_dense.first_step_at(curves["switch"], 4.1) == 20
    assert switch_vs_dense.first_step_at(curves["switch"], 3.0) is None
