"""Two methods by their compute: arms that are equal, arms that differ by a known factor, bad input."""

import json

import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.scaling import __main__ as command, arms, compare


def _pairs(seed: int, *, ratio: float = 1.0, per_decade: float = 1.0, budgets: int = 5,
           seeds: int = 2, noise: float = 0.005, common: float = 0.0, floor: float = 2.0
           ) -> arms.Pairs:
    """Runs of two laws, of which A needs `ratio` times the compute of B amid the budgets.

    common: noise that a pair shares.
    """
    rng = np.random.default_rng(seed)
    flops = np.repeat(np.logspace(15, 17, budgets), seeds)
    shared = common * rng.standard_normal(len(flops))

    def losses(x):
        return (floor + 30 * (x / 1e12) ** -0.25) * np.exp(
            noise * rng.standard_normal(len(x)) + shared)

    # B at x has A's loss at gain x, where x = C / sqrt(rho(C)) and gain = rho(C).
    middle = np.log10(flops / 1e16) + np.log10(ratio) / 2
    gain = ratio * per_decade ** (middle / (1 - np.log10(per_decade) / 2))
    return arms.Pairs(("A", "B"), np.stack([flops, flops]),
                      np.stack([losses(flops), losses(flops * gain)]),
                      np.repeat(np.arange(budgets), seeds), {}, [])


def _draws(draws: int, **truth) -> list[dict]:
    return [compare.conclude(compare.fit(_pairs(seed, **truth))) for seed in range(draws)]


def _share(found, chosen) -> float:
    return float(np.mean([chosen(result) for result in found]))


def test_equal_arms_are_told_apart_at_the_nominal_rate():
    found = _draws(120, noise=0.01)
    # 5 per cent of 120 draws: 6, and with 99 % between 1 and 13.
    assert 1 / 120 <= _share(found, lambda r: r["ratio"]["told"]) <= 13 / 120
    assert 1 / 120 <= _share(found, lambda r: r["trend"]["told"]) <= 13 / 120
    said = _share(found, lambda r: not r["verdict"].startswith("No difference can be told"))
    assert said <= 14 / 120


def test_a_known_factor_lies_in_the_interval_at_its_rate():
    found = _draws(120, ratio=1.5, common=0.02)
    inside = _share(found, lambda r: r["ratio"]["interval"][0] <= 1.5 <= r["ratio"]["interval"][1])
    assert 107 / 120 <= inside <= 119 / 120
    # What pairs share is in no difference: the spread is that of the seeds, times sqrt 2.
    assert np.median([r["spread"]["of_a_pairs_difference"] for r in found]) == pytest.approx(
        0.005 * np.sqrt(2), rel=0.15)
    assert _share(found, lambda r: r["verdict"].startswith("B is better")) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("floor", ["shared", "own"])
@pytest.mark.parametrize("truth", [{}, {"ratio": 3.0}, {"seeds": 1}, {"ratio": 1.3, "noise": 0.02},
                                   {"ratio": 1.3, "per_decade": 1.5, "common": 0.01}], ids=str)
def test_intervals_cover_in_every_design(truth, floor):
    inside = []
    for seed in range(200):
        found = compare.conclude(compare.fit(_pairs(seed, **truth), floor=floor))
        for row, value in ((found["ratio"]["interval"], truth.get("ratio", 1.0)),
                           (found["trend"]["interval"], truth.get("per_decade", 1.0))):
            inside.append(row[0] <= value <= row[1])
    assert 0.91 <= np.mean(inside) <= 0.98


def test_the_smallest_difference_is_seen_as_often_as_it_says():
    smallest = np.median([r["smallest_difference"]["ratio"] for r in _draws(30)])
    seen = _share(_draws(100, ratio=float(smallest)), lambda r: r["ratio"]["told"])
    assert 0.65 <= seen <= 0.93


def test_drawn_laws_give_their_ratio_exactly():
    pairs = _pairs(0, ratio=2.0, noise=0.0)
    result = compare.conclude(compare.fit(pairs, noise=1e-6))
    assert result["ratio"]["ratio"] == pytest.approx(2.0, rel=1e-6)
    assert [row["ratio"] for row in result["by_budget"]] == pytest.approx([2.0] * 5, rel=1e-6)
    assert result["fits"]["A"]["E"] == pytest.approx(2.0, rel=1e-6)
    assert result["fits"]["B"]["A"] == pytest.approx(30 * 1e12**0.25 * 2**-0.25, rel=1e-4)
    # At budget C, A at C sqrt 2 has the loss of B at C / sqrt 2: the ends reach beyond.
    assert [row["inside"] for row in result["by_budget"]] == [False, True, True, True, False]
    swapped = arms.Pairs(("B", "A"), pairs.x[::-1], pairs.loss[::-1], pairs.budget, {}, [])
    assert compare.conclude(compare.fit(swapped, noise=1e-6))["ratio"]["ratio"] == pytest.approx(
        0.5, rel=1e-6)


def test_arms_that_cross_say_where():
    result = compare.conclude(compare.fit(_pairs(3, per_decade=3.0, noise=0.002)))
    assert "They cross" in result["verdict"] and "A is better below" in result["verdict"]
    low, high = result["crossing"]["interval"]
    assert low == pytest.approx(1e16, rel=0.3) and high == pytest.approx(1e16, rel=0.3)
    assert low <= result["crossing"]["at"] <= high
    grown = compare.conclude(compare.fit(_pairs(3, ratio=8.0, per_decade=2.0, noise=0.002)))
    assert grown["trend"]["said"] == "the difference grows with compute"
    assert grown["crossing"] is None


def test_budgets_are_counted_where_seeds_agree_better_than_they():
    pairs = _pairs(1, seeds=4, noise=1e-4)
    bumps = np.array([0.0, 0.01, -0.01, 0.01, -0.01])[pairs.budget]
    loss = pairs.loss * np.exp(np.stack([bumps, -bumps]))
    found = compare.fit(arms.Pairs(pairs.names, pairs.x, loss, pairs.budget, {}, []))
    assert found.spreads[1].by_budget and found.spreads[1].freedom == 3
    assert any("between budgets" in text for text in compare.conclude(found)["warnings"])


def test_differences_that_bend_are_said():
    pairs = _pairs(1)
    bend = 0.02 * (np.log10(pairs.x[0]) - 16) ** 2
    bent = arms.Pairs(pairs.names, pairs.x, pairs.loss * np.exp(np.stack([bend, -bend])),
                      pairs.budget, {}, [])
    straight, found = (compare.conclude(compare.fit(p)) for p in (pairs, bent))
    assert any("bends over budgets" in text for text in found["warnings"])
    assert not any("bends over budgets" in text for text in straight["warnings"])


def test_floors_that_differ_are_said_and_told():
    flops = np.repeat(np.logspace(15, 18, 7), 2)
    noise = 1e-3 * np.random.default_rng(0).standard_normal((2, 14))
    loss = (np.array([[2.0], [2.2]]) + 30 * (flops / 1e12) ** -0.25) * np.exp(noise)
    pairs = arms.Pairs(("A", "B"), np.stack([flops, flops]), loss, np.repeat(np.arange(7), 2), {},
                       [])
    shared = compare.conclude(compare.fit(pairs))
    assert any("--floor=own" in text for text in shared["warnings"])
    fits = compare.conclude(compare.fit(pairs, floor="own"))["fits"]
    assert fits["A"]["E"] == pytest.approx(2.0, abs=0.1)
    assert fits["B"]["E"] == pytest.approx(2.2, abs=0.1)


# --- tables and folders ---------------------------------------------------------------------------


def _write(path, rows) -> str:
    path.write_text("method,compute,final,seed,lr\n"
                    + "\n".join(",".join(map(str, row)) for row in rows) + "\n")
    return str(path)


def _rows(lrs=(1,), arms_=("A", "B"), budgets=(1e15, 3e15, 1e16, 3e16)):
    rng = np.random.default_rng(0)
    return [(arm, budget, round((2 + 30 * (budget / 1e12) ** -0.25) * (1 - 0.02 * (arm == "B"))
                                + 0.1 * abs(lr - 1) + 0.01 * rng.standard_normal(), 5), seed, lr)
            for arm in arms_ for budget in budgets for seed in (0, 1)
            for lr in (lrs if arm == "A" else (1,))]


_FLAGS = ["--columns=flops=compute,loss=final", "--arm_column=method", "--seed_column=seed",
          "--tuned=lr"]


def test_the_command_says_the_ratio_and_how_arms_were_tuned(tmp_path, capsys):
    table = _write(tmp_path / "t.csv", _rows(lrs=(0.5, 1, 2)))
    assert command.main(["compare", f"--table={table}", "--arms=A,B", *_FLAGS, "--json",
                         f"--output={tmp_path}/ratio.png"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == 8 and found["budgets"] == 4
    assert found["tuning"]["settings"] == {"A": [3] * 4, "B": [1] * 4}
    assert not found["tuning"]["alike"] and "tuned unlike" in found["tuning"]["said"]
    assert (tmp_path / "ratio.png").stat().st_size > 10000
    assert command.main(["compare", f"--table={table}", "--arms=A,B", *_FLAGS]) == 0
    screen = capsys.readouterr().out
    assert "B is better: A needs" in screen and "smallest difference" in screen


def test_the_best_setting_stands_for_its_arm_and_the_end_of_a_grid_is_said():
    losses = np.array([3.0, 2.5, 2.2, 3.1, 2.6, 2.3])
    runs = arms.Runs("A", np.full(6, 1e15), np.full(6, 1e15), losses, list("000111"),
                     [{"lr": lr} for lr in ("1", "2", "4") * 2])
    best, tried, edge = arms._best(runs)
    assert (best.loss.tolist(), best.seeds, tried, edge) == ([2.2, 2.3], ["0", "1"], 3, True)
    assert arms._partners(["0", "1", "2"], ["2", "5", "0"]) == [(0, 2), (2, 0), (1, 1)]


@pytest.mark.parametrize(("rows", "flags", "message"), [
    (_rows(budgets=(1e15,)), [], "share one budget"),
    (_rows(arms_=("A",)), [], "there are A"),
    (_rows(), ["--arms=A"], "must be two arms"),
    ([(a, b, 2.0 - 0.1 * i + (5 if a == "A" else 0), 0, 1) for a in "AB"
      for i, b in enumerate((1e15, 1e16, 1e17, 1e18))], [], "no loss was reached by both"),
    ([*_rows(), ("B", 1e15, "nan", 1, 1)], [], "line 18"),
    ([(a, b * (10 if a == "B" else 1), 3, 0, 1) for a in "AB" for b in (1e15, 1.5e15)], [],
     "no budget in common"),
    ([(a, b, 2.0 + 0.1 * i + (a == "B") * 0.01, 0, 1) for a in "AB"
      for i, b in enumerate((1e15, 1e16, 1e17, 1e18))], [], "does not fall with compute"),
    ([r for r in _rows(budgets=(1e15, 1e16)) if r[3] == 0], [], "--noise"),
    (_rows(), ["--floor=no"], "--floor"), (_rows(), ["--tuned=rate"], "rate"),
    (_rows(), ["--output=x.txt"], ".png"), (_rows(), ["--noise=nan"], "--noise"),
])
def test_wrong_input_is_named(tmp_path, capsys, rows, flags, message):
    table = _write(tmp_path / "t.csv", rows)
    assert command.main(["compare", f"--table={table}", "--arms=A,B", *_FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err


def test_folders_of_runs_are_arms(tmp_path, capsys):
    for arm, budget, loss, seed, _ in _rows():
        folder = tmp_path / arm / f"{budget:.0e}" / f"seed_{seed}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(
            {"train": {"seed": seed}, "model": {"embed_dim": budget}}))
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "flops": budget / 2, "eval/all/loss": 9.0}) + "\n"
            + json.dumps({"step": 2, "flops": budget, "eval/all/loss": loss}) + "\n")
    flags = ["compare", f"--arms={tmp_path}/A,{tmp_path}/B", "--json"]
    assert command.main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["arms"] == ["A", "B"] and found["pairs"] == 8 and found["tuning"]["alike"]
    table = _write(tmp_path / "t.csv", _rows())
    assert command.main(["compare", f"--table={table}", "--arms=A,B", *_FLAGS, "--json"]) == 0
    same = json.loads(capsys.readouterr().out)
    assert same["ratio"]["ratio"] == pytest.approx(found["ratio"]["ratio"], rel=1e-9)
    for file in tmp_path.rglob("metrics.jsonl"):    # of one task, as train writes it
        file.write_text(file.read_text().replace("eval/all/", "eval/text/"))
    assert command.main(flags) == 0
    assert json.loads(capsys.readouterr().out)["ratio"] == found["ratio"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "flops": 1e17, "eval/text/loss": NaN}\n')
    assert command.main(flags) == 2
    assert "seed_1 has no finite eval/all/loss" in capsys.readouterr().err


def test_arms_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="must be two arms"):
        command.COMMANDS["compare"][1](_options(arms="A,A"))


def _options(**values):
    import argparse
    parser = argparse.ArgumentParser()
    command.COMMANDS["compare"][0](parser)
    return parser.parse_args([f"--{name}={value}" for name, value in values.items()])
