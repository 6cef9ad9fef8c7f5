"""Ladders: what a budget is solved to, by hand; what a folder of runs says of a known truth."""

import dataclasses
import json
import math
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

from configs.experiments import ladder as ladder_config
from t5x_lite import config as configs
from t5x_lite.build import build
from t5x_lite.cost import flops
from t5x_lite.errors import UserError
from t5x_lite.running import launchers
from t5x_lite.scaling import (
    __main__ as command,
    frontier,
    ladder_command,
    ladder_cost,
    ladder_page,
    ladder_results as results,
    ladders,
    tables,
)
from t5x_lite.scaling.ladders import Ladder

BASE = ladder_config.run("lm")


def test_kernels_are_those_of_the_table():
    for base in (BASE, ladder_config.run("t5")):
        program = build(base)
        counts = program.parameter_counts
        norms = sum(info.size for path, info in program.table.items() if path.endswith("/scale"))
        assert ladders.kernels(base.model) == counts["params_no_embed_head"] - norms


def test_a_shape_keeps_the_ratios_of_its_base():
    model = ladders.resized(BASE.model, 96, 32)
    block, segment = model.decoder.segments[0].blocks[0], model.decoder.segments[0]
    assert (model.embed_dim, segment.repeats) == (96, 3)
    assert (block.self_attention.num_heads, block.self_attention.head_dim) == (12, 8)
    assert block.mlp.mlp_dim == 384
    assert ladders.resized(BASE.model, 8, 32).decoder.segments[0].repeats == 1
    two = dataclasses.replace(BASE.model, decoder=dataclasses.replace(
        BASE.model.decoder, segments=BASE.model.decoder.segments * 2))
    with pytest.raises(UserError, match="one segment.*has 2"):
        ladders.resized(two, 8, 32)


def test_isoflop_spends_each_budget_on_sizes_about_the_ratio():
    ladder = Ladder(budgets=(1e12, 1e11), ratio=60, unit=4, sizes=5, multiple=8)
    found = ladders.rungs(BASE, ladder)
    assert len({r.arm for r in found}) == 10
    for budget in (1e11, 1e12):
        members = [r for r in found if r.arm.startswith(f"c{budget:.3g}_")]
        assert len({r.params for r in members}) == 5
        assert min(r.tokens / r.params for r in members) < 60 < max(
            r.tokens / r.params for r in members)
        for r in members:
            train, schedule = r.config.train, r.config.optimizer.schedule
            assert r.flops == pytest.approx(budget, rel=0.02)
            assert r.flops == train.num_steps * train.global_batch_size * flops.train_flops(
                r.config.model, 1, 0, 64)
            assert r.tokens == train.num_steps * train.global_batch_size * 64
            # Bi et al. 2024: 0.3118 C^-0.125 and 0.292 C^0.3271
            assert schedule.base_learning_rate == pytest.approx(0.3118 * budget**-0.125)
            assert train.global_batch_size == 8 * round(0.292 * budget**0.3271 / 64 / 8)
            assert schedule.warmup_steps == round(0.1 * train.num_steps)
    assert build(found[-1].config).row_cost.flops * found[-1].config.train.global_batch_size \
        * found[-1].config.train.num_steps == pytest.approx(found[-1].flops)


def test_kaplan_varies_one_at_a_time_and_ratio_both():
    found = ladders.rungs(BASE, Ladder("kaplan", params=(5e3, 2e4, 1e5), tokens=(1e5, 2e5, 4e5),
                                       unit=4))
    at_most = [r for r in found if abs(math.log(r.tokens / 4e5)) < 0.02]
    largest = [r for r in found if r.params == max(r.params for r in found)]
    assert (len(found), len(at_most), len(largest)) == (5, 3, 3)
    found = ladders.rungs(BASE, Ladder("ratio", params=(5e3, 2e4), ratio=40, unit=4))
    assert [r.tokens / r.params for r in found] == pytest.approx([40, 40], rel=0.05)


def test_a_cooldown_ladder_trains_one_trunk_and_branches_where_it_was_constant():
    ladder = Ladder("cooldown", params=(1e4,), tokens=(1e5, 2e5, 4e5), unit=4, decay=0.2)
    trunk, *branches = ladders.rungs(BASE, ladder)
    assert trunk.after == "" and trunk.own_flops == trunk.flops
    train, schedule = trunk.config.train, trunk.config.optimizer.schedule
    assert schedule.decay_steps == round(0.2 * train.num_steps)
    for branch, tokens in zip(branches, (1e5, 2e5), strict=True):
        own = branch.config.optimizer.schedule
        assert branch.tokens == pytest.approx(tokens, rel=0.1)
        assert (branch.after, branch.arm) == (trunk.stage, trunk.arm)
        assert branch.at % trunk.config.checkpoint.keep_every == 0     # the trunk keeps it
        assert branch.at == own.total_steps - own.decay_steps < train.num_steps
        assert own.total_steps == branch.config.train.num_steps
        assert schedule.total_steps - schedule.decay_steps >= branch.at
        assert branch.own_flops / branch.flops == pytest.approx(0.2, abs=0.02)
        assert dataclasses.replace(own, total_steps=0, decay_steps=0) == dataclasses.replace(
            schedule, total_steps=0, decay_steps=0)
    assert len({r.stage for r in (trunk, *branches)}) == 3


@pytest.mark.parametrize("arguments, message", [
    (dict(design="isoflops"), "design='isoflops'.*isoflop"),
    (dict(budgets=(1e10,)), "needs --budgets with 2 or more"),
    (dict(budgets=(-1.0, 1e10)), "--budgets=-1.0"),
    (dict(design="kaplan", params=(1e4, 2e4), tokens=(1e5,)), "needs --tokens with 2"),
    (dict(budgets=(1e6, 1e7)), "needs 10 steps or more"),
    (dict(design="ratio", params=(1e4, 1e4), ratio=0.0), "--ratio=0.0"),
])
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        ladders.rungs(BASE, Ladder(**arguments))


def test_a_plan_is_read_back_and_not_overwritten_by_another(tmp_path):
    ladder = Ladder(budgets=(1e10, 1e11), unit=4)
    ladders.write_plan(tmp_path, BASE, ladder)
    assert ladders.read_plan(tmp_path / "ladder.json") == (BASE, ladder)
    ladders.write_plan(tmp_path, BASE, ladder)
    with pytest.raises(UserError, match="of another ladder"):
        ladders.write_plan(tmp_path, BASE, dataclasses.replace(ladder, sizes=3))
    planned = ladder_config.get_runs(f"{tmp_path}/ladder.json")
    assert [r.config for r in planned] == [r.config for r in ladders.rungs(BASE, ladder)]
    (tmp_path / "prediction.json").write_text('{"params": 5e4, "flops": 4e11}')
    last = ladders.planned(tmp_path / "ladder.json")[-1]
    assert last.arm == "predicted" and last.flops == pytest.approx(4e11, rel=0.02)
    (tmp_path / "ladder.json").write_text("{}")
    with pytest.raises(UserError, match="is not what"):
        ladders.read_plan(tmp_path / "ladder.json")


def test_hours_add_up_starts_steps_and_evaluations():
    ladder = Ladder("cooldown", params=(1e4,), tokens=(1e5, 2e5), unit=4, evaluations=1)
    found = ladders.rungs(configs.override(BASE, ["eval.num_examples=64"]), ladder)
    pace = ladder_cost.Pace(step=0.5, flop=0.0, start=10.0, watts=100, dollars_per_hour=2.0)
    trunk, branch = found
    assert pace.seconds(trunk) == 10 + 0.5 * trunk.config.train.num_steps
    own = branch.config.train.num_steps - branch.at
    assert pace.seconds(branch) == pytest.approx(10 + 0.5 * own)
    by_flop = ladder_cost.Pace(step=0.0, flop=1e-9, start=0.0)
    held_out = 64 * flops.train_flops(trunk.config.model, 1, 0, 64) / 3
    assert by_flop.seconds(trunk) == pytest.approx(1e-9 * (trunk.flops + held_out))
    total = ladder_cost.total(found, pace)
    assert total["kwh"] == pytest.approx(total["hours"] * 0.1 * 1.1)
    assert total["dollars"] == pytest.approx(2 * total["hours"])
    ladder_cost.refuse_above(found, pace, 1.0)
    with pytest.raises(UserError, match="more than --max_hours=0.01.*Nothing was started"):
        ladder_cost.refuse_above(found, pace, 0.01)
    assert "price unknown" in ladder_cost.describe(found, by_flop)


# --- results ----------------------------------------------------------------------------------------

def truth(params, tokens):
    return 1.2 + 30 / params**0.4 + 60 / tokens**0.4


def write_ladder(folder, budgets=(1e10, 1e11, 1e12, 1e13), *, noise=0.0, alone=()):
    """An IsoFLOP ladder's folder whose losses are `truth`, with evaluations on the way."""
    rng = np.random.default_rng(0)
    for budget in (*budgets, *alone):
        middle = math.sqrt(budget / 6) * 0.15
        for i in range(1 if budget in alone else 5):
            size = middle * 2.0 ** (i - (0 if budget in alone else 2))
            name = "predicted" if budget in alone else f"c{budget:.3g}_n{i}"
            path = folder / name / "seed_0"
            path.mkdir(parents=True)
            lines = [{"step": 10 * k, "tokens_seen": k / 4 * budget / 6 / size,
                      "flops": k / 4 * budget, "params_no_embed_head": size,
                      "eval/all/loss": truth(size, k / 4 * budget / 6 / size)
                      * math.exp(noise * rng.standard_normal())} for k in range(1, 5)]
            (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            (path / "config.json").write_text("{}")


def test_a_folder_gives_back_the_exponents_of_its_truth_and_predicts(tmp_path):
    write_ladder(tmp_path, noise=1e-4)
    found = results.fitted(tmp_path, ("envelope", "parabola", "akima", "hoffmann"), draws=50)
    for name in ("parabola", "akima", "hoffmann"):
        assert found[name].exponents["N_of_C"] == pytest.approx(0.5, abs=0.03), name
        low, high = found[name].intervals["N_of_C"]
        assert low <= found[name].exponents["N_of_C"] <= high
    assert isinstance(found["envelope"], frontier.Frontier)
    compute = 4e13
    size = results.optimal_params(found, compute)
    best = min(np.geomspace(size / 9, 9 * size, 999), key=lambda n: truth(n, compute / 6 / n))
    assert size == pytest.approx(best, rel=0.25)
    said = results.predictions(found, size, compute / 6 / size, compute)
    wanted = truth(size, compute / 6 / size)
    assert said["hoffmann"]["loss"] == pytest.approx(wanted, rel=2e-3)
    assert said["hoffmann"]["interval"][0] < wanted < said["hoffmann"]["interval"][1]
    assert said["parabola, power law with a floor"]["loss"] == pytest.approx(wanted, rel=0.02)


def test_a_prediction_is_written_once_and_compared_with_its_run_alone(tmp_path):
    write_ladder(tmp_path)
    assert results.compared(tmp_path) is None
    said = {"params": 1e4, "flops": 4e13, "predicted": {
        "a": {"loss": 2.0, "interval": [1.9, 2.1]}, "b": {"loss": 1.0}}}
    results.write_prediction(tmp_path, said)
    with pytest.raises(UserError, match="a prediction is made once"):
        results.write_prediction(tmp_path, said)
    assert results.compared(tmp_path) is None        # its run has not been trained
    write_ladder(tmp_path, (), alone=(4e13,))
    assert len(results.table_of(tmp_path, {})) == 20    # the predicted run is in no fit
    outcome = results.compared(tmp_path)
    measured = outcome["measured"]
    assert outcome["predicted"]["b"] == {"loss": 1.0, "error": 1.0 / measured - 1}
    assert outcome["predicted"]["a"]["inside"] == (1.9 <= measured <= 2.1)
    text = results.summary(results.fitted(tmp_path, ("parabola",)), outcome)
    assert f"measured: {measured:.4f}" in text and "params are parameters without embed" in text


def test_bad_ladders_say_what_is_wrong(tmp_path):
    write_ladder(tmp_path / "one", (1e11,))
    found = results.fitted(tmp_path / "one", ("parabola", "hoffmann"))
    assert "an exponent needs two" in found["parabola"]
    with pytest.raises(UserError, match="no size can be predicted.*needs two"):
        results.optimal_params({"parabola": found["parabola"]}, 1e12)
    assert "| parabola | – | – | parabola: 1 of the budgets" in results.summary(found, None)


def test_tables_that_say_nothing_are_named_or_drawn_with_what_is_wrong(tmp_path, capsys):
    def drawn(rows, columns="params=N,flops=C,loss=L", head="N,C,L"):
        (tmp_path / "t.csv").write_text(f"{head}\n{rows}")
        flags = [f"--columns={columns}"] if columns else []
        status = command.main(["page", f"--table={tmp_path}/t.csv", *flags,
                               f"--output={tmp_path}/p.html"])
        return capsys.readouterr().err if status else (tmp_path / "p.html").read_text()

    one = "1e6,1e16,3.0\n2e6,1e16,2.9\n4e6,1e16,3.1\n8e6,1e16,3.3\n"
    assert "1 of the budgets has an optimum" in drawn(one)
    up = "".join(f"{n}e6,1e{16 + k},{3 + k + (n - 2) ** 2 / 10}\n" for k in range(3) for n in (1, 2, 4))
    assert "the loss rises with compute" in drawn(up)
    assert "loss (L) is empty in line 3" in drawn("1e6,1e16,3\n2e6,1e16,\n")
    assert "no column 'N'" in drawn(
        "1,2\n", head="a,b")
    assert "none of the columns that laws know" in drawn("1,2\n", columns="", head="a,b")


def test_seed_noise_is_the_spread_within_arms(tmp_path):
    for seed, loss in ((0, 2.0), (1, 2.2), (2, 2.4)):
        path = tmp_path / "a" / f"seed_{seed}"
        path.mkdir(parents=True)
        (path / "metrics.jsonl").write_text(json.dumps({
            "step": 1, "tokens_seen": 1e4, "flops": 1e9, "params_no_embed_head": 1e3,
            "eval/all/loss": loss}) + "\n")
    table = results.table_of(tmp_path, {})
    assert results.seed_noise(table) == pytest.approx(np.std(np.log([2.0, 2.2, 2.4]), ddof=1))


def test_charts_hold_what_was_measured(tmp_path):
    write_ladder(tmp_path)
    runs, curves = (results.table_of(tmp_path, {}, curves=c) for c in (False, True))
    charts = ladder_page.charts_of(runs, curves, results.fitted_to(
        runs, curves, ("parabola", "hoffmann"), draws=20))
    assert list(charts) == ["compute", "isoflop", "optimal_params", "optimal_tokens", "residuals"]
    lines, papers, points = (layer["data"]["values"] for layer in
                             charts["optimal_params"]["spec"]["layer"])
    assert {p["by"] for p in papers} == set(ladder_page.PAPERS) and len(points) == 4
    assert {p["by"] for p in lines} == {"parabola", "hoffmann"}
    size, tokens = ladder_page.PAPERS["Hoffmann et al. 2022"]
    assert size(5.76e23) == 67e9 and tokens(5.76e23) == 1.5e12
    size, tokens = ladder_page.PAPERS["Kaplan et al. 2020"]
    assert size(8.64e19) == 1.3e9 and tokens(8.64e19) == 2e10


def test_a_browser_draws_the_page_without_network_or_complaint(tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed (Debian's package chromium)")
    write_ladder(tmp_path / "runs")
    results.write_prediction(tmp_path / "runs", {
        "params": 1e4, "flops": 4e13, "predicted": {"a": {"loss": 2.0, "interval": [1.9, 2.1]}}})
    write_ladder(tmp_path / "runs", (), alone=(4e13,))
    assert command.main(["page", f"--table={tmp_path}/runs", f"--output={tmp_path}/l.html"]) == 0
    shot = tmp_path / "l.png"
    result = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2400",
         "--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom",
         f"--screenshot={shot}", (tmp_path / "l.html").as_uri()],
        capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    assert len(re.findall(r'class="[^"]*marks[^"]*"', result.stdout)) >= 5, "a chart was not drawn"
    assert shot.stat().st_size > 40_000


def test_the_clusters_options_are_the_configs_and_then_those_given(tmp_path):
    config = tmp_path / "c.py"
    config.write_text('SLURM = {"timeout_min": 30, "slurm_partition": "gpu"}\ndef get_config(): ...\n')
    flags = ladder_command._launch(str(config), "slurm", ["timeout_min=600"])
    assert flags[0] == "--launcher=slurm"
    assert launchers.options_of([f.removeprefix("--slurm=") for f in flags[1:]]) == {
        "timeout_min": 600, "slurm_partition": "gpu"}
    assert ladder_command._launch(str(config), "local:2", []) == ["--launcher=local:2"]


DESIGNS = {
    "kaplan": (["--params=1.5e3,3e3,6e3", "--tokens=2e4,4e4,8e4"], 5, {"kaplan_nd"}),
    "ratio": (["--params=1.5e3,3e3,6e3,1e4", "--ratio=8", "--predict=4"], 5, {"kaplan_c"}),
    "cooldown": (["--params=2e3,8e3", "--tokens=2e4,4e4,8e4"], 6, {"kaplan_nd"})}


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_each_design_trains_and_fits_from_end_to_end(design, tmp_path):
    flags, runs, laws = DESIGNS[design]
    config = pathlib.Path(ladder_config.__file__)
    assert command.main([
        "ladder", f"--config={config}:lm", f"--design={design}", "--unit=4", "--rate_factor=0.3",
        "--evaluations=1", "--override=eval.num_examples=64", "--max_hours=9",
        f"--workdir={tmp_path}", *flags]) == 0
    table = tables.read(tmp_path, {})
    assert len(table) == runs and (table.columns["loss"] < math.log(384)).all()
    said = json.loads((tmp_path / "fits.json").read_text())
    fitted = {name for name, one in said["fits"].items() if "refused" not in one}
    assert laws <= fitted, said["fits"]
    planned = ladders.planned(tmp_path / "ladder.json")
    np.testing.assert_allclose(sorted(table.columns["flops"]), sorted(r.flops for r in planned),
                               rtol=1e-6)
    assert (tmp_path / "ladder.html").stat().st_size > 1e5
    if design == "ratio":
        [run] = [r for r in planned if r.arm == "predicted"]
        assert run.tokens / run.params == pytest.approx(8, rel=0.3)
        assert set(said["prediction"]["predicted"]) <= {"kaplan_c", "frontier"}


@pytest.mark.parametrize("flags, message", [
    (["ladder", "--budgets=1e10,1e11"], "--workdir is missing"),
    (["ladder", "--plan_only", "--budgets=1e10,x"], "'x' must be a number"),
    (["ladder", "--plan_only", "--config=none.py", "--budgets=1e9,1e10"], "none.py does not exist"),
    (["ladder", "--plan_only", "--max_hours=0", "--budgets=1e9,1e10"], "--max_hours=0"),
    (["ladder", "--plan_only", "--launcher=slrum", "--budgets=1e9,1e10"], "one of local, slurm"),
    (["ladder", "--plan_only", "--slurm=mem_gb", "--budgets=1e9,1e10"], "must be option=value"),
    (["page"], "--table is missing"),
])
def test_the_commands_name_mistakes(flags, message, capsys):
    assert command.main(flags) == 2
    assert message in capsys.readouterr().err
