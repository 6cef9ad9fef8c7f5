"""The term of unlabelled texts in a step: what it is made of, and that nothing else moves."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import train, tree
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig
from t5x_lite.cost import flops
from t5x_lite.data import views
from t5x_lite.data.config import DataConfig
from t5x_lite.layers.config import AttentionConfig, MLPConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import losses, steps
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.unlabelled_losses import LOSSES, UnlabelledConfig
from tests import tiny

B, RATIO, INPUTS, TARGETS = 8, 2, 6, 8
CLASSES = ([5, 1], [7, 9, 1], [4, 1])   # tokens, EOS included


def model(architecture: str, dropout: float) -> ModelConfig:
    if architecture == "encoder_decoder":
        return dataclasses.replace(tiny.seq2seq(dropout=dropout).model, vocab_size=64)
    block = BlockConfig(AttentionConfig(num_heads=4, head_dim=4, dropout_rate=dropout), None,
                        MLPConfig(mlp_dim=32, dropout_rate=dropout))
    stack = StackConfig((SegmentConfig((block,), 2),), causal=True, dropout_rate=dropout)
    return ModelConfig("decoder_only", vocab_size=64, embed_dim=16, encoder=None, decoder=stack)


def run_of(loss="uda", *, objective="seq2seq", names="plain,plain", dropout=0.0, unlabelled="texts.jsonl", mesh=1,
           accumulation=1, **term) -> RunConfig:
    architecture = "encoder_decoder" if objective in ("seq2seq", "choices") else "decoder_only"
    row = LOSSES.get(loss)
    names = names if row and row.views == 2 else names.split(",")[0]
    return RunConfig(
        model=model(architecture, dropout),
        objective=ObjectiveConfig(name=objective, unlabelled=UnlabelledConfig(
            loss if unlabelled else "", **{"threshold": 0.35, "temperature": 0.5, **term})),
        data=DataConfig(inputs_length=INPUTS, targets_length=TARGETS if objective == "seq2seq" else INPUTS + 4,
                        classes="a,bc,d", unlabelled=unlabelled, unlabelled_ratio=RATIO, views=names,
                        num_shards=4),
        train=TrainConfig(num_steps=4, global_batch_size=B, accumulation=accumulation), mesh=MeshConfig(data=mesh))


def texts(rows, seed):
    rng = np.random.default_rng(seed)
    return [[*rng.integers(2, 60, rng.integers(1, INPUTS)), 1] for _ in range(rows)]


def padded(rows, length):
    return np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)


def of_classes(found, objective):
    """One view's arrays by hand, of texts that end in 1 (which a decoder-only model does not read)."""
    if objective == "seq2seq":
        target = [token for tokens in CLASSES for token in tokens]
        segments = [number for number, tokens in enumerate(CLASSES, 1) for _ in tokens]
        positions = [place for tokens in CLASSES for place in range(len(tokens))]
        read = [0 if place == 0 else target[i - 1] for i, place in enumerate(positions)]
        count = len(found)
        tile = lambda row, kind=np.int32: padded([row] * count, TARGETS).astype(kind)
        return {"encoder_input_tokens": padded(found, INPUTS),
                "encoder_mask": padded([[1] * len(text) for text in found], INPUTS),
                "decoder_target_tokens": tile(target), "decoder_input_tokens": tile(read),
                "decoder_segment_ids": tile(segments), "decoder_positions": tile(positions),
                "decoder_loss_weights": tile([1] * len(target), np.float32)}
    names = ("target_tokens", "input_tokens", "segment_ids", "positions", "loss_weights")
    rows = {name: [] for name in names}
    for text in found:
        row = {name: [] for name in names}
        for number, tokens in enumerate(CLASSES, 1):
            own = [*text[:-1], *tokens]
            row["target_tokens"] += own
            row["input_tokens"] += [0, *own[:-1]]
            row["segment_ids"] += [number] * len(own)
            row["positions"] += range(len(own))
            row["loss_weights"] += [0] * (len(text) - 1) + [1] * len(tokens)
        for name in names:
            rows[name].append(row[name])
    made = {f"decoder_{name}": padded(rows[name], 3 * (INPUTS + 4)) for name in names}
    return made | {"decoder_loss_weights": made["decoder_loss_weights"].astype(np.float32)}


def batch_of(objective="seq2seq", two=True, seed=0):
    """(a batch, the texts of each view)."""
    labelled = {name: np.asarray(x) for name, x in tiny.batch(B, seed).items()}
    if objective == "seq2seq":
        labelled["encoder_input_tokens"] = labelled["encoder_input_tokens"][:, :INPUTS]
        labelled["encoder_mask"] = (labelled["encoder_input_tokens"] != 0).astype(np.int32)
    else:
        labelled = {n: np.pad(x, ((0, 0), (0, 2))) for n, x in labelled.items() if n.startswith("decoder")}
    found = {prefix: texts(RATIO * B, seed + 10 + i) for i, prefix in enumerate(views.PREFIXES[:1 + two])}
    for prefix, of_view in found.items():
        labelled |= {prefix + name: x for name, x in of_classes(of_view, objective).items()}
    return {name: jnp.asarray(x) for name, x in labelled.items()}, found


def plainly(program, params, found, objective):
    """log p_BC of the classes, a forward pass for each class alone."""
    module, scores = program.model.bind(params), []
    for tokens in CLASSES:
        if objective == "seq2seq":
            rows = np.tile(np.array(tokens, np.int32), (len(found), 1))
            read = np.pad(rows[:, :-1], ((0, 0), (1, 0)))
            part = {"encoder_input_tokens": padded(found, INPUTS),
                    "encoder_mask": padded([[1] * len(text) for text in found], INPUTS)}
            weights = np.ones_like(rows)
        else:
            length = INPUTS + len(tokens)
            rows = padded([[*text[:-1], *tokens] for text in found], length)
            read = padded([[0, *text[:-1], *tokens[:-1]] for text in found], length)
            part, weights = {}, padded([[0] * (len(t) - 1) + [1] * len(tokens) for t in found], length)
        part = {n: jnp.asarray(x) for n, x in {**part, "decoder_input_tokens": read}.items()}
        hidden, _ = module(part, None)
        log_probs = losses.target_log_probs(module.head, module.head_params(), hidden, jnp.asarray(rows))
        scores.append(jnp.sum(log_probs * weights, axis=1))
    return jax.nn.log_softmax(jnp.stack(scores, axis=1), axis=1)


def params_of(program):
    return jax.jit(program.model.init)(jax.random.key(3))


@pytest.mark.parametrize("objective", ["seq2seq", pytest.param("lm", marks=pytest.mark.slow)])
def test_class_probabilities_are_those_of_answers_apart(objective):
    """Nothing leaks from one class to the next; a decoder's positions are relative or begin anew."""
    program = build(run_of("entropy", objective=objective), jax.devices()[:1])
    batch, found = batch_of(objective, two=False)
    with program.activate():
        params = params_of(program)
        wanted = jax.jit(lambda p: plainly(program, p, found["weak/"], objective))(params)
        got = jax.jit(lambda p: program.differentiated.unlabelled.log_probs(
            program.model.bind(p), views.part(batch, "weak/"), None))(params)
    np.testing.assert_allclose(np.exp(got).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize("loss, objective", [
    ("uda", "seq2seq"), *(pytest.param(*case, marks=pytest.mark.slow)
                          for case in (("fixmatch", "seq2seq"), ("entropy", "lm")))])
def test_gradients_are_the_objectives_and_the_weighted_means(loss, objective):
    """With two micro-batches, at a step within the ramp."""
    term = dict(weight=3.0, ramp="linear", ramp_from=2, ramp_to=10)
    program = build(run_of(loss, objective=objective, accumulation=2, **term), jax.devices()[:1])
    batch, found = batch_of(objective, two=LOSSES[loss].views == 2)
    of = program.differentiated
    alone = dataclasses.replace(of, unlabelled=None)
    with program.activate():
        params = params_of(program)

        def mean(params):
            views_BC = [plainly(program, params, rows, objective) for rows in found.values()]
            return jnp.mean(LOSSES[loss].of_rows(views_BC, program.config.objective.unlabelled))

        value, own = jax.jit(jax.value_and_grad(mean))(params)
        plain, _ = jax.jit(lambda p: steps.gradients(alone, p, views.labelled(batch), None))(params)
        both, sums = jax.jit(lambda p: steps.gradients(of, p, batch, None, step=6))(params)
    rate = lambda name: float(sums[name][0] / sums[name][1])
    assert rate("unlabelled_weight") == 1.5 and rate("unlabelled_loss") == pytest.approx(float(value), rel=1e-5)
    assert sums["unlabelled_loss"][1] == RATIO * B
    expected = jax.tree.map(lambda a, b: np.asarray(a) + 1.5 * np.asarray(b), plain, own)
    tiny.assert_close(both, expected, 3e-4)
    assert max(np.abs(x).max() for x in jax.tree.leaves(own)) > 1e-4
    assert float(value) > 0 and 0 < rate("unlabelled_share") <= 1


@pytest.mark.slow
def test_the_weak_view_has_no_gradient():
    """Whatever the strong view's loss: the derivative is that with the weak view held fixed."""
    program = build(run_of("uda"), jax.devices()[:1])
    batch, found = batch_of()
    term = program.differentiated.unlabelled
    with program.activate():
        params = params_of(program)
        fixed = plainly(program, params, found["weak/"], "seq2seq")

        def held(params):
            strong = plainly(program, params, found["strong/"], "seq2seq")
            return jnp.mean(LOSSES["uda"].of_rows([fixed, strong], term.config))

        totals = {"rows": jnp.float32(RATIO * B), "weight": jnp.float32(1.0)}
        got = jax.jit(jax.grad(lambda p: term.loss(program.model.bind(p), batch, None, totals)[0]))(params)
        tiny.assert_close(got, jax.tree.map(np.asarray, jax.jit(jax.grad(held))(params)), 3e-4)


def stepped(run, batch, devices=1):
    program = build(run, jax.devices()[:devices])
    with program.activate():
        state = program.init_state()
        if devices > 1:
            batch = {n: jax.device_put(x, program.batch_sharding) for n, x in batch.items()}
        for _ in range(2):
            state, sums = program.jit_train_step()(state, batch)
    return jax.tree.map(np.asarray, (state["params"], sums))


@pytest.mark.slow
def test_one_device_equals_eight_and_one_part_two():
    """With dropout, whose keys are of each row and view."""
    batch, _ = batch_of()
    run = run_of("fixmatch", names="dropout,dropout", dropout=0.1)
    (params, sums) = stepped(run, batch)
    for other in (stepped(dataclasses.replace(run, mesh=MeshConfig(data=4, tensor=2)), batch, 8),
                  stepped(dataclasses.replace(run, train=dataclasses.replace(run.train, accumulation=2)), batch)):
        tiny.assert_close(other[0], params, 2e-4)
        for name in ("loss", "unlabelled_loss", "unlabelled_share"):
            assert other[1][name][0] / other[1][name][1] == pytest.approx(sums[name][0] / sums[name][1], rel=1e-5)
    assert sums["filled"][0] == sum(int((np.asarray(batch[n]) != 0).sum()) for n in batch if n.endswith(
        ("encoder_mask", "decoder_segment_ids"))) + int((np.asarray(batch["decoder_loss_weights"]) > 0).sum())


@pytest.mark.slow
def test_views_drop_units_of_their_own():
    batch, found = batch_of()
    for prefix in views.PREFIXES:   # the same texts twice: all that differs is what is dropped
        batch |= {prefix + n: jnp.asarray(x) for n, x in of_classes(found["weak/"], "seq2seq").items()}
    means = {}
    for names in ("plain,plain", "plain,dropout", "dropout,dropout"):
        run = run_of("uda", names=names, dropout=0.3, temperature=1.0, threshold=0.0)
        means[names] = float(np.divide(*stepped(run, batch)[1]["unlabelled_loss"]))
    assert means["plain,plain"] == pytest.approx(0, abs=1e-6)   # of no learning signal
    assert means["plain,dropout"] > 1e-4 and means["dropout,dropout"] > 1e-4
    assert means["plain,dropout"] != means["dropout,dropout"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["entropy", "fixmatch"])
def test_weight_0_is_the_run_without_bit_for_bit(loss):
    batch, _ = batch_of(two=LOSSES[loss].views == 2)
    with_term = run_of(loss, names="dropout,dropout", dropout=0.1, weight=0.0)
    without = run_of(loss, dropout=0.1, unlabelled="")
    params, sums = stepped(with_term, batch)
    plain, alone = stepped(without, views.labelled(batch))
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    assert sums["loss"] == alone["loss"] and sums["unlabelled_loss"][0] > 0


def test_flops_and_tokens_count_the_views():
    run = run_of("fixmatch")
    program, alone = (build(other, jax.devices()[:1]) for other in (run, run_of("fixmatch", unlabelled="")))
    assert program.tokens_per_sequence == (1 + 2 * RATIO) * alone.tokens_per_sequence
    table = program.table
    forward = sum(flops.step_flops(run.model, table, frozenset(), RATIO, INPUTS, TARGETS).values())
    whole = sum(flops.step_flops(run.model, table, frozenset(table), RATIO, INPUTS, TARGETS).values())
    assert program.flops_per_sequence == pytest.approx(alone.flops_per_sequence + forward + whole)
    assert forward < whole / 2.5
    decoder = build(run_of("entropy", objective="lm"), jax.devices()[:1])
    assert decoder.tokens_per_sequence == (INPUTS + 4) * (1 + 3 * RATIO)   # a text before each of 3 classes


def test_held_out_metrics_by_hand():
    program = build(run_of("", unlabelled="", threshold=0.4), jax.devices()[:1])
    batch, found = batch_of(two=False)
    right = np.array([0, 1, 2, 0] * 4)
    marks = np.zeros((16, TARGETS), np.int32)
    for row, number in zip(marks, right, strict=True):
        row[:7] = np.array([1, 1, 2, 2, 2, 3, 3]) == number + 1
    graded = {n: np.asarray(x).copy() for n, x in batch.items() if n.startswith("weak/")}
    graded["weak/decoder_right"] = marks
    for name in graded:
        graded[name][13:] = 0   # rows that fill the last batch
    with program.activate():
        params = params_of(program)
        log_probs = np.asarray(plainly(program, params, found["weak/"], "seq2seq"))[:13]
        sums = jax.tree.map(float, jax.jit(program.graded_step)(params, graded))
    hit = log_probs.argmax(axis=1) == right[:13]
    sure = np.exp(log_probs).max(axis=1) >= 0.4
    assert 0 < sure.sum() < 13 or sure.all()
    assert sums["class_accuracy"] == (hit.sum(), 13) and sums["pseudo_share"] == (sure.sum(), 13)
    assert sums["pseudo_accuracy"] == ((hit & sure).sum(), sure.sum())
    entropy = -(np.exp(log_probs) * log_probs).sum()
    assert sums["class_entropy"] == pytest.approx((entropy, 13), rel=1e-5)


# --- whole runs -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("semi")
    for name, count, label in (("few", 8, "ab"), ("many", 64, "ab"), ("nonsense", 64, "xy")):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(
            {"inputs": "red blue"[4 * (i % 2):][:4] + str(i), "targets": label[i % 2]}) + "\n" for i in range(count)))
    return folder


def file_run(files, texts="many", **changes):
    base = tiny.seq2seq(dropout=0.1)
    run = dataclasses.replace(
        base, model=dataclasses.replace(base.model, vocab_size=384),
        objective=ObjectiveConfig(unlabelled=UnlabelledConfig("uda", threshold=0.1, ramp="linear", ramp_to=4)),
        data=DataConfig(train=str(files / "few.jsonl"), validation=str(files / "few.jsonl"), vocabulary="byt5",
                        unlabelled=str(files / f"{texts}.jsonl"), classes="a,b", views="dropout,spans",
                        inputs_length=8, targets_length=4, num_shards=4, shuffle_buffer=4),
        train=TrainConfig(num_steps=6, global_batch_size=8, log_every=1),
        eval=EvalConfig(every=6, metrics=False), checkpoint=CheckpointConfig(every=3),
        mesh=MeshConfig(data=-1))
    return dataclasses.replace(run, **changes)


def lines_of(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{n: x for n, x in line.items() if n.startswith(("train/", "eval/"))} for line in lines]


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_reads_no_labels(files, tmp_path):
    run = file_run(files)
    train.run(run, tmp_path / "whole")
    half = dataclasses.replace(run, train=dataclasses.replace(run.train, num_steps=3))
    train.run(half, tmp_path / "resumed")
    train.run(run, tmp_path / "resumed")
    program = build(run)
    params = [manager.restore_params(tmp_path / name, program.abstract_state["params"])[0]
              for name in ("whole", "resumed")]
    jax.tree.map(np.testing.assert_array_equal, *[jax.tree.map(np.asarray, p) for p in params])
    whole = lines_of(tmp_path / "whole")
    shown = whole[0]
    assert shown["train/unlabelled_weight"] == 0 and whole[3]["train/unlabelled_weight"] == 0.75
    assert not math.isnan(shown["train/unlabelled_loss"]) and 0 <= shown["train/unlabelled_share"] <= 1
    last = [line for line in whole if any(n.startswith("eval/") for n in line)][-1]
    assert {n.rsplit("/")[-1] for n in last} >= {"class_accuracy", "pseudo_share", "pseudo_accuracy"}
    assert tree.flatten(params[0])
