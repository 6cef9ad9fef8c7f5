"""lm-evaluation-harness over a workdir gives what its own `hf` model gives over the workdir's export.

Two tasks of YAML and JSONL files: multiple choice (loglikelihood) and written answers
(generate_until), and a perplexity (loglikelihood_rolling). No network.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from t5x_lite import convert, eval as evaluation
from t5x_lite.errors import UserError
from tests.evaluation import models

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (extra [lm_eval])")
pytest.importorskip("transformers", reason="compares with the harness's hf model")

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    models.write_tasks(folder)
    return folder


def recorded(kind, monkeypatch) -> list[str]:
    """The texts that models of this class will write."""
    texts, write = [], kind.generate_until

    def generate_until(self, *args, **kwargs):
        texts[:] = write(self, *args, **kwargs)
        return texts
    monkeypatch.setattr(kind, "generate_until", generate_until)
    return texts


def of_hf(folder, tasks) -> dict:
    """What the harness's own model gives of an exported folder, with its table."""
    from lm_eval import simple_evaluate, utils
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Counted(HFLM):
        """0.4.13 lets an encoder-decoder write as many more tokens than max_gen_toks as its batch's
        contexts are wide: what it counts is context and text, and of these two rows one alone."""

        def _model_generate(self, context, max_length, stop, **kwargs):
            if self.backend == "seq2seq":
                max_length -= context.shape[1] - 1   # the start token counts
            return super()._model_generate(context, max_length, stop, **kwargs)

    model = Counted(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4,
                 max_length=models.MAX_LENGTH)
    found = simple_evaluate(model, tasks=list(models.TASKS), task_manager=TaskManager(
        include_path=str(tasks)), log_samples=False,
        bootstrap_iters=0)
    print(f"hf\n{utils.make_table(found)}")
    return found


@pytest.mark.parametrize("kind", ["causal", pytest.param("seq2seq", marks=pytest.mark.slow)])
def test_equal_to_the_harnesss_own_model(kind, tasks, tmp_path, monkeypatch, capsys):
    from lm_eval.models.huggingface import HFLM

    from t5x_lite.evaluation.harness import HarnessModel
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    texts, their_texts = recorded(HarnessModel, monkeypatch), recorded(HFLM, monkeypatch)
    workdir = tmp_path / "workdir"
    run = models.seq2seq() if kind == "seq2seq" else models.causal(models.tokenizer_file(tmp_path))
    models.write_workdir(workdir, run)
    convert.run(str(workdir), f"hf:{tmp_path / 'hf'}")
    asked = evaluation.Harness(list(models.TASKS), str(tasks))
    ours = evaluation.run_harness(run, workdir, ["last"], asked)[3]
    said = capsys.readouterr().out
    theirs = of_hf(tmp_path / "hf", tasks)["results"]
    assert texts == their_texts and len({*texts}) > 5 and not any("a" in text for text in texts)
    assert "|tiny_choice|" in said and f"max_length={models.MAX_LENGTH}" in said
    for task in models.TASKS:
        for metric, value in ours[task].items():
            if "stderr" in metric:   # bootstrapped
                continue
            expected = theirs[task].get(f"{metric},none", theirs[task].get(metric))
            assert value == pytest.approx(expected, rel=1e-4), (task, metric)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a process in which t5x_lite is installed as setup.py says."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={folder}"], cwd=ROOT,
                   check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "HF_DATASETS_OFFLINE": "1",
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def command_of(program, tasks, workdir):
    return [*program, "--model", "t5x_lite", "--tasks", "tiny_choice", "--include_path", str(tasks),
            "--limit", "2", "--model_args", f"workdir={workdir}"]


@pytest.mark.slow
def test_the_harnesss_own_program_finds_the_model_of_an_installed_package(tasks, tmp_path, installed):
    """`lm_eval --model t5x_lite` is an argument of the harness's program, not of one of ours."""
    models.write_workdir(tmp_path / "workdir", models.seq2seq())
    program = str(pathlib.Path(sys.executable).parent / "lm_eval")
    done = subprocess.run(command_of([program], tasks, tmp_path / "workdir"), env=installed,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "|tiny_choice|" in done.stdout, done.stderr


def test_the_name_is_for_processes_of_the_harness_alone(installed):
    """Importing torch with t5x_lite installed imports neither the harness nor JAX."""
    said = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print('t5x_lite.evaluation.harness_name' in "
         "sys.modules, {'jax', 'lm_eval'} & {*sys.modules})"],
        env=installed, capture_output=True, text=True)
    assert said.stdout == "True set()\n", said.stdout + said.stderr


@pytest.mark.slow
def test_the_program_from_a_checkout_says_what_is_wrong_in_a_line(tasks, tmp_path):
    program = [sys.executable, "-m", "t5x_lite.evaluation.harness", "run"]
    models.write_workdir(tmp_path / "workdir", models.seq2seq())
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    right, wrong = (subprocess.run(command_of(program, tasks, tmp_path / name), env=environment,
                                   capture_output=True, text=True) for name in ("workdir", "none"))
    assert right.returncode == 0 and "|tiny_choice|" in right.stdout, right.stderr
    assert wrong.returncode == 2 and "is that the workdir of a run?" in wrong.stderr.splitlines()[-1]


def test_bad_input(tasks, tmp_path):
    from t5x_lite.evaluation import harness
    run = models.seq2seq()
    models.write_workdir(tmp_path, run)

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
