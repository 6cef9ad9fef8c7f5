"""The script that makes vocabularies: ids as seqio expects them, text kept as it is."""

import pathlib
import subprocess
import sys
from pydoc_data.topics import topics

import pytest

from t5x_lite.data import tasks as data_tasks
from t5x_lite.data.config import DataConfig

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "train_tokenizer.py"
TEXT = topics["assignment"] + topics["class"]


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)],
                          capture_output=True, text=True)


@pytest.mark.slow
def test_trained_vocabulary_is_usable_and_reproducible(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    models = [tmp_path / "a.model", tmp_path / "b.model"]
    for model in models:
        result = run(f"--output={model}", "--size=600", tmp_path / "*.txt")
        assert result.returncode == 0, result.stderr
        assert "600 ids" in result.stdout
    assert models[0].read_bytes() == models[1].read_bytes()
    vocabulary = data_tasks.vocabulary_of(DataConfig(vocabulary=str(models[0])))
    assert vocabulary.vocab_size == 600 and vocabulary.eos_id == 1
    for text in ("the class  goes\n    over é", " leading and trailing "):
        tokens = vocabulary.encode(text)
        assert vocabulary.decode(tokens) == text and 2 not in tokens
    assert "\u2581the" in [vocabulary.tokenizer.IdToPiece(i) for i in range(500)]


@pytest.mark.parametrize("size,files,message", [
    (5000, "t.txt", "error: --size=5000, of which 100 sentinels"),
    (400, "missing.txt", "missing.txt': no such file"),
])
def test_bad_arguments_are_one_message(tmp_path, size, files, message):
    (tmp_path / "t.txt").write_text(TEXT)
    result = run(f"--output={tmp_path}/a.model", f"--size={size}", tmp_path / files)
    assert result.returncode == 1 and message in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "a.model").exists()
