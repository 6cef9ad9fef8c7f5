"""k-shot prompts: what is shown, that it is not what is asked, and that the question stays."""

import json
import logging

import jax
import numpy as np
import pytest
import tokenizers

from t5x_lite import infer
from t5x_lite.data import batches as data_batches, tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from tests import tiny

LENGTHS = dict(vocabulary="byt5", inputs_length=512, targets_length=16)


def prompts_of(name, split="validation", **settings):
    """(fields, the shown (inputs, targets) pairs, the question) of each example."""
    config = DataConfig(**{**LENGTHS, "validation": name, **settings})
    _, examples = data_tasks.eval_examples(
        config, *data_tasks.validation_tasks(config), objective="seq2seq", split=split)
    for e in examples:
        *shown, question = e["inputs_pretokenized"].decode().split("\n\n")
        yield e, [tuple(s.rsplit("\n", 1)) for s in shown], question


@pytest.fixture
def pairs(tmp_path):
    """A .jsonl file of 20 questions."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f'{{"inputs": "q{i} ?", "targets": "a{i}"}}\n' for i in range(20)))
    return path


def test_a_choice_is_shown_right_once_and_never_asked(registered, tmp_path):
    from t5x_lite.data import choices
    path = tmp_path / "rank.jsonl"
    path.write_text("".join(json.dumps({
        "question": f"q{i}", "choices": [f"no{i}", f"yes{i}", f"no{i}!"], "label": 1}) + "\n"
        for i in range(20)))
    choices.register_files("data_test_shown", {   # the same data under both names
        "train": [str(path)], "validation": [str(path)]}, choices.read_questions)
    found = list(prompts_of("data_test_shown", shots=4))
    shown = found[0][1]
    assert len(dict(shown)) == 4 and all(a == f"yes{q[1:]}" for q, a in shown)
    assert all(s == shown for _, s, _ in found)
    asked = [q.removesuffix("\n") for _, _, q in found]
    assert len(asked) == 16 * 3 and set(asked).isdisjoint(dict(shown))
    assert sum(e["is_correct"] for e, _, _ in found) == 16
    assert next(prompts_of("data_test_shown", shots=4, shots_seed=1))[1] != shown
    [*_, (e, together, _)] = prompts_of("data_test_shown_choices", shots=4)
    assert together == shown and e["targets_pretokenized"].startswith(b"yes")


def test_training_examples_are_shown_before_all_of_the_rest(registered, files):
    import seqio

    from t5x_lite.data import prompts
    task = prompts.few_shot("data_test_scan_2shot", "scan_simple", shots=2, seed=1)
    source = task.source
    assert source.num_input_examples("validation") == 4_182
    shown = source.demonstrations("validation")
    lines = {tuple(r) for r in scan_lines("train")}
    assert len(shown) == 2 and all(s[1:] in lines for s in shown)
    front = "".join(f"{s.inputs}\n{s.targets}\n\n" for s in shown)
    whole = [e["inputs"].decode() for e in source.get_dataset().take(8).as_numpy_iterator()]
    assert all(text.startswith(front) and text.endswith("\n") for text in whole)
    halves = [[e["inputs"].decode() for e in source.get_dataset(
        shard_info=seqio.ShardInfo(i, 2)).take(4).as_numpy_iterator()] for i in range(2)]
    assert [text for both in zip(*halves, strict=True) for text in both] == whole
    zero = prompts.few_shot("data_test_scan_0shot", "scan_simple", shots=0)
    assert b"\n" not in next(zero.source.get_dataset().as_numpy_iterator())["inputs"]
    from_test = prompts.few_shot("data_test_scan_val", "scan_simple", 2, split="validation")
    assert from_test.source.num_input_examples("validation") == 4_180


def scan_lines(split):
    from tasks import scan
    return scan.read_scan(scan._scan_files()[split][0])


def test_tasks_of_one_split_hold_out_what_they_show(registered, files, pairs):
    for name, count in (("piqa", 1_838), ("bigbench_boolean_expressions", 250), (str(pairs), 20)):
        found = list(prompts_of(name, shots=3))
        _, shown, question = found[0]
        assert len(shown) == 3 and question.endswith("\n")
        assert len({q for _, _, q in found} | {f"{q}\n" for q, _ in shown}) >= 0.98 * count
        step = 2 if name == "piqa" else 1
        assert len(found) == step * (count - 3)
    with pytest.raises(UserError, match="has 20 questions in 'train', too few for 20 "
                                        "demonstrations and one to ask"):
        next(prompts_of(str(pairs), shots=20))


def test_files_and_mixtures_by_name(registered, pairs):
    import seqio

    from t5x_lite.data import prompts
    by_path = prompts.few_shot("data_test_pairs", str(pairs), 2)
    assert by_path.source.num_input_examples("test") == 18
    mixture = prompts.few_shot("data_test_qa_2shot", "open_domain_qa", 2)
    assert [t.name for t in mixture.tasks] == [
        f"data_test_qa_2shot_{n}_open" for n in ("natural_questions", "trivia_qa", "web_questions")]
    before = seqio.MixtureRegistry.get("open_domain_qa")
    assert len(before.tasks) == 3
    with pytest.raises(UserError, match="'scan_simpl'; did you mean 'scan_simple'"):
        prompts.few_shot("data_test_x", "scan_simpl", 2)
    with pytest.raises(UserError, match="'scan_simple' has the splits train, validation"):
        prompts.few_shot("data_test_x", "scan_simple", 2, split="test")
    with pytest.raises(UserError, match="'fact_passages' gives text before its tokens: demonstrat"):
        next(prompts_of("fact_passages", shots=2, vocabulary="facts"))


@pytest.mark.parametrize("shots, settings, message", [
    (-1, {}, "-1 demonstrations"),
    (2, {"validation_files": "x.txt"}, "leave data.validation_files empty"),
    (2, {"cached_tasks": "folder"}, "leave data.cached_tasks empty"),
])
def test_shots_that_cannot_be(registered, pairs, shots, settings, message):
    with pytest.raises(UserError, match=message):
        next(prompts_of(str(pairs), shots=shots, **settings))


def test_infer_resumes_only_with_the_same_shots():
    assert {"data.shots", "data.shots_seed"} <= infer._what_decides(tiny.seq2seq()).keys()


def json_vocabulary(folder) -> str:
    """A tokenizer.json of the words that `pairs` holds, whose Python runs ahead of tf.data."""
    words = ["<unk>", "?", *(f"{c}{i}" for c in "qa" for i in range(20)), "</s>"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", ["byt5", "tokenizer.json"])
def test_demonstrations_give_way_to_the_question(
        registered, tmp_path, pairs, kind, caplog):
    in_bytes = kind == "byt5"
    pairs.write_text(pairs.read_text() + json.dumps(
        {"inputs": "q1 ? " * (6 if in_bytes else 4) + "q2 ?", "targets": "a2"}) + "\n")
    settings = dict(vocabulary=kind if in_bytes else json_vocabulary(tmp_path),
                    cache_dir=str(tmp_path / "cache"))
    size = lambda text: len(text.encode()) if in_bytes else len(text.split())
    _, solved, _ = next(prompts_of(str(pairs), shots=3, **settings))
    prompt = lambda shown, question: "\n\n".join([*map("\n".join, shown), question])
    limit = size(prompt(solved, "q1 ?\n")) + 1   # and EOS: just enough for the short questions
    caplog.set_level(logging.INFO)
    found = list(prompts_of(str(pairs), shots=3, inputs_length=limit, **settings))
    counts = [len(shown) for _, shown, _ in found]
    for (e, shown, question), n in zip(found, counts, strict=True):
        assert shown == solved[3 - n:]   # the front goes first
        assert len(e["inputs"]) == size(prompt(shown, question)) + 1 <= limit
        assert n == 3 or size(prompt(solved[2 - n:], question)) + 1 > limit
    assert set(counts) == ({0, 2, 3} if in_bytes else {0, 3})
    lost = sum(n < 3 for n in counts)
    said = [r.getMessage() for r in caplog.records if "lose demonstrations" in r.getMessage()]
    assert len(said) == 1 and f" {lost} of 18 prompts lose demonstrations to fit into" in said[0]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    config = DataConfig(validation=str(pairs), shots=3, inputs_length=limit, targets_length=8,
                        **settings)
    [name] = data_tasks.validation_tasks(config)
    assert name.endswith("pairs.jsonl_3shot")
    batch = next(data_batches.eval_batches(config, name, objective="seq2seq", batch_size=18,
                                   sharding=sharding))
    rows = np.asarray(batch["encoder_input_tokens"])
    assert [r[:len(e["inputs"])].tolist() for r, (e, _, _) in zip(rows, found, strict=True)] == [
        e["inputs"].tolist() for e, _, _ in found]
    assert len([r for r in caplog.records if "lose demonstrations" in r.getMessage()]) == 1
    bare = list(prompts_of(str(pairs), shots=3, inputs_length=size("q1 ?\n") + 1, **settings))
    assert not any(shown for _, shown, _ in bare)
    long = sum(size(question) > size("q1 ?\n") for _, _, question in bare)
    assert 0 < long and f"; {long} are too long without any" in caplog.records[-1].getMessage()
