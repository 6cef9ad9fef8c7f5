"""What a user installs: the wheel, in an environment of its own, trains from another folder."""

import os
import pathlib
import shutil
import site
import subprocess
import sys
import venv

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*words: str | os.PathLike, cwd: pathlib.Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env={**environment, "JAX_PLATFORMS": "cpu"},
                          text=True, capture_output=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_trains_from_another_folder_in_a_fresh_environment(tmp_path):
    source, environment, elsewhere = tmp_path / "source", tmp_path / "env", tmp_path / "elsewhere"
    for name in ("t5x_lite", "configs", "tasks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path,
        source, cwd=elsewhere)
    wheel, = tmp_path.glob("t5x_lite-*.whl")
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    # The packages that it needs are this environment's: no network is asked. t5x_lite is not among them.
    places = [place for place in site.getsitepackages() if pathlib.Path(place).is_dir()]
    own = pathlib.Path(run(python, "-c", "import site; print(site.getsitepackages()[0])",
                           cwd=elsewhere).strip())
    (own / "others.pth").write_text("\n".join(places) + "\n")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=elsewhere)
    found = run(python, "-c", "import t5x_lite, configs, tasks; print(t5x_lite.__file__, "
                "configs.__file__, tasks.__file__)", cwd=elsewhere)
    assert all(str(environment) in place for place in found.split())

    shown = run(environment / "bin" / "t5x-lite-train", "--config=configs/quickstart.py",
                "--workdir=run", "--config.train.num_steps=2", "--config.train.global_batch_size=8",
                "--config.eval.num_examples=8", "--config.eval.samples=1", cwd=elsewhere)
    assert "eval fact_wordings at step 2" in shown and "passage" in shown
    assert (elsewhere / "run" / "checkpoints" / "2").is_dir()
    assert "--config.train.num_steps" in run(environment / "bin" / "t5x-lite-train", "--help",
                                             cwd=elsewhere)
