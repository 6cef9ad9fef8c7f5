"""lm-evaluation-harness over a workdir gives what its own `hf` model gives over the workdir's export.

Two tasks of YAML and JSONL files: multiple choice (loglikelihood) and written answers
(generate_until), and a perplexity (loglikelihood_rolling). No network.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from t5x_lite import convert, eval as evaluation, tree
from t5x_lite.checkpoints.manager import CheckpointConfig, Checkpointer
from t5x_lite.config import RunConfig, to_json
from t5x_lite.errors import UserError
from t5x_lite.models.language_model import Model
from tests.evaluation import models
from tests.formats import folders

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (extra [lm_eval])")
pytest.importorskip("transformers", reason="compares with the harness's hf model")

YAML = {
    "tiny_choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_answer": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["a"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
    "tiny_pages": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    with open(folder / "examples.jsonl", "w") as file:
        for i in range(11):
            words = list(rng.choice(models.WORDS, 8))
            file.write(json.dumps({
                "question": " ".join(words[:i % 5 + 1]) + ("  " if i == 3 else ""),
                "choices": [" " + words[5], " " + words[6] + " " + words[0], " é!"],
                "answer": i % 3, "page": " ".join(words * (i % 4 + 1))}) + "\n")
    for name, text in YAML.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\n{text}dataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/examples.jsonl}}}}\n")
    return folder


def write_workdir(folder, run: RunConfig) -> None:
    """A workdir whose checkpoint has random parameters, of a size that prefers some tokens."""
    table = Model(run.model).table
    params = {path: np.float32(0.3) * x + np.float32("norm" in path and x.ndim < 3)
              for path, x in folders.random_params(run.model).items() if path in table}
    with Checkpointer(folder, CheckpointConfig(async_save=False)) as checkpointer:
        checkpointer.save(3, {"params": tree.unflatten(
            {path: jax.numpy.asarray(x) for path, x in params.items()})}, {}, to_json(run))
    (folder / "config.json").write_text(to_json(run) + "\n")


def of_hf(folder, tasks) -> dict:
    """What the harness's own model gives of an exported folder, with its table."""
    from lm_eval import simple_evaluate, utils
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4,
                 max_length=models.MAX_LENGTH)
    found = simple_evaluate(model, tasks=list(YAML), task_manager=TaskManager(
        include_path=str(tasks)), log_samples=False,
        bootstrap_iters=0)
    print(f"hf\n{utils.make_table(found)}")
    return found


@pytest.mark.parametrize("kind", ["causal", pytest.param("seq2seq", marks=pytest.mark.slow)])
def test_equal_to_the_harnesss_own_model(kind, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    workdir = tmp_path / "workdir"
    run = models.seq2seq() if kind == "seq2seq" else models.causal(models.tokenizer_file(tmp_path))
    write_workdir(workdir, run)
    convert.run(str(workdir), f"hf:{tmp_path / 'hf'}")
    asked = evaluation.Harness(list(YAML), str(tasks))
    ours = evaluation.run_harness(run, workdir, ["last"], asked)[3]
    said = capsys.readouterr().out
    theirs = of_hf(tmp_path / "hf", tasks)["results"]
    assert "|tiny_choice|" in said and f"max_length={models.MAX_LENGTH}" in said
    for task in YAML:
        for metric, value in ours[task].items():
            if "stderr" in metric:   # bootstrapped
                continue
            expected = theirs[task].get(f"{metric},none", theirs[task].get(metric))
            assert value == pytest.approx(expected, rel=1e-4), (task, metric)


@pytest.mark.slow
def test_the_harnesss_own_command(tasks, tmp_path):
    write_workdir(tmp_path / "workdir", models.seq2seq())
    command = [sys.executable, "-m", "t5x_lite.evaluation.harness", "run", "--model", "t5x_lite",
               "--tasks", "tiny_choice", "--include_path", str(tasks), "--limit", "2"]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    right, wrong = (subprocess.run(
        [*command, "--model_args", arguments], env=environment, capture_output=True, text=True)
        for arguments in (f"workdir={tmp_path / 'workdir'}", f"workdir={tmp_path / 'none'}"))
    assert right.returncode == 0 and "|tiny_choice|" in right.stdout, right.stderr
    assert wrong.returncode == 2 and "is that the workdir of a run?" in wrong.stderr.splitlines()[-1]


def test_bad_input(tasks, tmp_path):
    from t5x_lite.evaluation import harness
    run = models.seq2seq()
    write_workdir(tmp_path, run)

    def ask(names, arguments=""):
        evaluation.run_harness(run, tmp_path, ["last"],
                               evaluation.Harness(names, str(tasks), arguments))

    with pytest.raises(UserError, match="has no such task, nor has"):
        ask(["tiny_choise"])
    with pytest.raises(UserError, match="max_lenght.*must be one of max_length"):
        ask(["tiny_choice"], "max_lenght=3")
    with pytest.raises(UserError, match="is longer than max_length=2: give a larger one"):
        ask(["tiny_choice"], "max_length=2")
    with pytest.raises(UserError, match="workdir=DIR"):
        harness.HarnessModel()
