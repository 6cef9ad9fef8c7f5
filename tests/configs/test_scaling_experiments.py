"""The experiments on scaling: what their runs share, and what they conclude from drawn curves."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from configs.experiments import (
    critical_batch,
    double_descent,
    grokking,
    ladder,
    modalities,
    muon_vs_adamw,
    repeated_data,
    sample_efficiency,
    switch_ladder,
    transfer,
)
from t5x_lite import experiment
from t5x_lite.errors import UserError
from t5x_lite.scaling import fits, laws, tables

STUDIES = (critical_batch, double_descent, grokking, modalities, repeated_data, sample_efficiency,
           switch_ladder, transfer)


def write(workdir, run, curve, metric="eval/some_task/loss"):
    """A run's metrics.jsonl: {step: value} of one metric."""
    folder = workdir / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        for step, value in curve.items():
            file.write(json.dumps({"step": step, metric: value}) + "\n")


def rows(path):
    return list(csv.DictReader(open(path)))


@pytest.mark.parametrize("study", STUDIES, ids=lambda m: m.__name__.rsplit(".")[-1])
def test_folders_are_distinct_and_nothing_is_concluded_from_nothing(study, tmp_path):
    runs = study.get_runs()
    assert len({run.folder for run in runs}) == len(runs)
    if hasattr(study, "conclude"):
        study.conclude(runs, tmp_path)


def test_small_takes_width_and_layers():
    config = ladder.small(44, 4, steps=50, rate=0.02, rows=8)
    [segment] = config.model.decoder.segments
    assert (config.model.embed_dim, segment.repeats, segment.blocks[0].mlp.mlp_dim) == (44, 4, 176)
    assert (config.train.num_steps, config.train.global_batch_size, config.eval.every,
            config.optimizer.schedule.warmup_steps) == (50, 8, 5, 5)


def test_shapes_are_of_one_size_and_sizes_are_apart():
    sizes = {run.arm: ladder.ladders.kernels(run.config.model) for run in sample_efficiency.get_runs()}
    shapes = [sizes[arm] for arm in sample_efficiency.SHAPES]
    assert max(shapes) / min(shapes) < 1.04
    grown = [sizes[arm] for arm in sample_efficiency.SIZES]
    assert min(b / a for a, b in zip(grown, grown[1:], strict=False)) > 2.5


def test_larger_sizes_are_told_by_their_steps(tmp_path):
    runs = sample_efficiency.get_runs()
    order = list(sample_efficiency.SIZES)
    for run in runs:
        level = 4.0 - 0.5 * order.index(run.arm) if run.arm in order else 3.0
        write(tmp_path, run, {100: level, 200: level - 0.5})
    text = sample_efficiency.conclude(runs, tmp_path)
    assert "- size_25k, seed 0: 100\n" in text and "0.0% apart" in text


def test_switch_ladder_is_the_dense_arm_with_experts():
    dense = [run for run in muon_vs_adamw.get_runs() if run.arm == "adamw"]
    sparse = switch_ladder.get_runs()
    assert [(r.seed, r.stage) for r in sparse] == [(r.seed, r.stage) for r in dense]
    for one, other in zip(dense, sparse, strict=True):
        assert one.config.optimizer == other.config.optimizer and one.config.train == other.config.train
        blocks = [b for s in other.config.model.decoder.segments for b in s.blocks * s.repeats]
        assert [b.moe is not None for b in blocks] == [False, True]
        dense_mlp = one.config.model.decoder.segments[0].blocks[0].mlp
        assert blocks[1].moe.mlp == dense_mlp and blocks[1].moe.num_experts == 8


def test_grokking_says_when_each_half_is_learned(tmp_path):
    run = grokking.get_runs()[0]
    write(tmp_path, run, {50: 0.5, 100: 0.995, 900: 1.0}, "train/accuracy")
    write(tmp_path, run, {100: 0.1, 900: 0.99}, "eval/modular_addition/accuracy")
    assert f"| {run.arm} | 0 | 100 | 900 |" in grokking.conclude([run], tmp_path)


def test_turns_of_a_curve_are_its_largest_rise():
    # Small dips before do not count; nor does the end where it stays above the first minimum.
    curve = [(0, 0.9), (1, 0.5), (2, 0.55), (3, 0.4), (4, 0.7), (5, 0.72), (6, 0.5), (7, 0.6)]
    assert double_descent.turns(curve) == ((3, 0.4), (5, 0.72), (6, 0.5))
    falling = [(0, 0.9), (1, 0.5), (2, 0.3)]
    assert double_descent.turns(falling) == ((2, 0.3),) * 3


def test_repeated_data_are_fitted_from_what_conclude_writes(tmp_path):
    truth = {"E": 1.5, "A": 30.0, "B": 60.0, "alpha": 0.4, "beta": 0.35, "R_D": 4.0, "R_N": 5.0}
    law = laws.LAWS["muennighoff"]
    runs = repeated_data.get_runs()
    for run in runs:
        text = repeated_data.python_parts.PARTS.get(run.arm.split("_")[1], 9e6)
        x = {"params": ladder.ladders.kernels(run.config.model), "unique_tokens": text,
             "tokens": run.config.train.num_steps * 1024}
        [loss] = law.predict(truth, {name: np.array([float(v)]) for name, v in x.items()})
        write(tmp_path, run, {1: loss + 1, run.config.train.num_steps: loss})
    text = repeated_data.conclude(runs, tmp_path)
    assert "| 64 | 32k |" in text and text.count("–") == 7
    table = rows(tmp_path / "runs.csv")
    assert len(table) == 22 and {row["unique_tokens"] for row in table} == {
        "32768", "131072", "524288", "9000000.0"}
    found = law.predict(truth, tables.read(str(tmp_path / "runs.csv"), {}).columns)
    np.testing.assert_allclose(found, [float(row["loss"]) for row in table], rtol=1e-12)


def test_data_for_a_loss_lie_on_the_curve_of_the_scratch_runs():
    curve = [(100, 4.0), (10_000, 1.0)]
    assert transfer.data_for(2.0, curve) == pytest.approx(1000)
    assert transfer.data_for(0.9, curve) is None and transfer.data_for(4.1, curve) is None


def test_transfer_is_what_scratch_would_have_needed_besides(tmp_path):
    runs = transfer.get_runs()
    starts = [r.stage for r in runs if r.arm == "transfer" and r.seed == 0]
    assert starts[0] == "docs" and {r.after for r in runs if r.arm == "transfer"} == {"", "docs"}
    for run in runs:
        if run.stage != "docs":
            size = transfer.python_parts.PARTS[run.stage] + 20_000 * (run.arm == "transfer")
            # Line by line a power law, so that interpolation is exact; the best counts, not the last.
            write(tmp_path, run, {1: 9.0, 2: 50 * size**-0.3, 3: 8.0})
    said = transfer.conclude(runs, tmp_path)
    assert "| above 2,097,152 | – |" in said and "\n2 of 10 lie outside" in said, said
    gained = [float(row["tokens_transferred"]) for row in rows(tmp_path / "transferred.csv")]
    np.testing.assert_allclose(gained, [20_000] * 8, rtol=1e-9)   # the largest lies beyond the curve


def test_sweep_of_batches_gives_the_critical_one(tmp_path):
    runs = critical_batch.get_runs()
    for run in runs:
        batch = run.config.train.global_batch_size
        factor = float(run.arm.split("_")[1])
        steps = (100 + 5120 // batch) * (1 if factor == 1 else 2)
        write(tmp_path, run, {0: 4.0, steps: 3.0})
    assert "| 3.0 | 1380 (1) | 420 (1) | 180 (1) | 120 (1) |" in (said := critical_batch.conclude(runs, tmp_path)), said
    table = tables.read(str(tmp_path / "sweep.csv"), {"batch": "rows", "steps": "steps"},
                        where={"loss": "3.0"})
    found = fits.fit(laws.LAWS["steps_of_batch"], table)
    assert found.exponents["B_crit"] == pytest.approx(51.2, rel=1e-3)
    [critical] = [row for row in rows(tmp_path / "critical.csv") if row["loss"] == "3.0"]
    assert float(critical["batch"]) == pytest.approx(found.exponents["B_crit"])
    assert {run.config.train.noise_scale for run in runs} == {False, True}


def test_steps_to_a_loss_that_the_first_evaluation_is_below_are_not_known(tmp_path):
    for run in critical_batch.get_runs():
        late = 40 + 512 // run.config.train.global_batch_size
        write(tmp_path, run, {20: 3.1, late: 2.7})
    said = critical_batch.conclude(critical_batch.get_runs(), tmp_path)
    assert "| 3.2 | at most 20 | at most 20 |" in said, said
    assert {row["loss"] for row in rows(tmp_path / "sweep.csv")} == {"3.0", "2.8"}


@pytest.mark.parametrize("study", STUDIES, ids=lambda m: m.__name__.rsplit(".")[-1])
def test_the_table_shows_what_the_runs_measure(study, tmp_path):
    """Runs of one task have no "all/loss"."""
    [run, *_] = study.get_runs()
    for metric in ("loss", "accuracy"):
        write(tmp_path, run, {1: 2.0}, f"eval/{run.config.data.train}/{metric}")
    shown = getattr(study, "SHOWN", ("*/loss",))
    assert "–" not in (said := experiment.summary([run], tmp_path, shown)), said


def test_integers_are_whole_tables_and_noise_is_as_said():
    from tasks import integers
    added = integers.modular_addition(7, 0.5)
    pairs = np.concatenate([added["train"][0], added["validation"][0]])
    assert len(np.unique(pairs, axis=0)) == len(pairs) == 49
    for inputs, targets in added.values():
        np.testing.assert_array_equal(inputs.sum(1) % 7, targets[:, 0])
    noisy, clean = integers.noisy_classes(), integers.noisy_classes(0.0)
    wrong = (noisy["train"][1] != clean["train"][1]).mean()
    assert 0.15 < wrong < 0.21       # a tenth of what is drawn is right by chance
    np.testing.assert_array_equal(noisy["validation"][1], clean["validation"][1])
    with pytest.raises(UserError, match="bytes, 0 to 255"):
        integers._ids("mine", np.array([256]))


def test_parts_are_samples_that_contain_the_smaller_ones(monkeypatch):
    from tasks import python_parts
    texts = [("train", f"{i} é " * 900) for i in range(30)] + [("validation", "held out")]
    monkeypatch.setattr(python_parts.python_text, "source_documents", lambda: iter(texts))
    assert list(python_parts.part(1))[-1] == ("validation", b"held out")
    few, more = ([text for split, text in python_parts.part(size) if split == "train"]
                 for size in (10_000, 50_000))
    assert (sum(map(len, few)), sum(map(len, more))) == (10_000, 50_000)
    assert b"".join(more).startswith(b"".join(few))


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES, ids=lambda m: m.__name__.rsplit(".")[-1])
def test_each_trains_and_concludes(study, tmp_path):
    runs = study.get_runs()
    last = runs[-1]     # of as many rows as the tests' devices divide
    chosen = [*(r for r in runs if last.after and (r.arm, r.seed, r.stage) == (
        last.arm, last.seed, last.after)), last]
    short = [dataclasses.replace(r, config=dataclasses.replace(
        r.config, train=dataclasses.replace(r.config.train, num_steps=2),
        eval=dataclasses.replace(r.config.eval, num_examples=32))) for r in chosen]
    experiment.execute(short, tmp_path)
    values = experiment.final_values(short, tmp_path)
    assert all(any(n.endswith("/loss") for n in values[r.folder]) for r in short)
    if hasattr(study, "conclude"):
        study.conclude(runs, tmp_path)


def test_modalities_share_one_ladder(tmp_path):
    """Budgets, models, steps and rates are the same whatever the tokens are; the table holds each budget's best."""
    runs = modalities.get_runs()
    arms = {arm: [run for run in runs if run.arm == arm] for arm in modalities.ARMS}
    recipes = [[(run.stage, run.config.model, run.config.train, run.config.optimizer) for run in found]
               for found in arms.values()]
    assert recipes[0] == recipes[1] == recipes[2] and len(recipes[0]) == 9
    assert {run.config.data.train for run in runs} == {
        "digit_pixels", "python_source_causal_lm", "python_docs_causal_lm"}
    for place, run in enumerate(arms["digits"]):
        write(tmp_path, run, {1: 9.0, 2: (3 - place % 3) * np.log(2)})
    text = modalities.conclude(runs, tmp_path)
    widest = [max(run.config.model.embed_dim for run in arms["digits"] if run.stage.startswith(f"c{budget:.3g}_"))
              for budget in modalities.LADDER.budgets]
    for budget, width in zip(modalities.LADDER.budgets, widest, strict=True):
        assert f"| {budget:.3g} | 1.000 ({width}) | – | – |" in text
