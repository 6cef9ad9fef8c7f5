"""Sums and counts; files that survive kills and resumes without gaps or duplicates."""

import json
import math
import subprocess
import sys

import jax.numpy as jnp
import pytest

from t5x_lite.errors import UserError
from t5x_lite.training import metrics


def test_sums_add_and_only_the_total_is_divided():
    """A batch of 1 token at loss 8 and one of 3 at loss 4 average 5, not 6."""
    total = metrics.add({"loss": (jnp.float32(8.0), jnp.float32(1.0))},
                        {"loss": (12.0, 3.0), "accuracy": (1.0, 4.0)})
    assert total == {"loss": (20.0, 4.0), "accuracy": (1.0, 4.0)}
    assert metrics.divide(total) == {"loss": 5.0, "accuracy": 0.25}
    assert metrics.add({}, total) == total == metrics.add(total, {})
    assert math.isnan(metrics.divide({"loss": (0.0, 0.0)})["loss"])


def test_many_small_sums_do_not_lose_to_float32():
    total = {}
    for _ in range(3):
        total = metrics.add(total, {"loss": (jnp.float32(2.0**24), 1.0)})
    assert metrics.add(total, {"loss": (1.0, 1.0)})["loss"][0] == 3 * 2.0**24 + 1


def test_perplexity_and_bits_per_byte():
    assert math.isclose(metrics.perplexity(4 * math.log(7.0), 4), 7.0)
    assert metrics.perplexity(1e6, 1.0) == math.inf
    assert math.isnan(metrics.perplexity(math.nan, 1.0)) and math.isnan(metrics.perplexity(0, 0))
    # 10 tokens of 2 bits each that spell 5 bytes
    assert math.isclose(metrics.bits_per_byte(20 * math.log(2.0), 5), 4.0)


def stamp(step):
    return {"step": step, "tokens_seen": 10 * step, "flops": 1e3 * step,
            "non_embedding_params": 7}


def test_every_line_is_stamped_and_non_finite_values_are_null(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(stamp(1), {"loss": jnp.float32(2.5)}, prefix="train/")
        writer.write(stamp(1), {"loss": math.nan, "perplexity": math.inf})
    assert metrics.read_metrics(tmp_path / "metrics.jsonl") == [
        {**stamp(1), "train/loss": 2.5}, {**stamp(1), "loss": None, "perplexity": None}]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(stamp(step), {"loss": step})
    with open(path, "a") as file:
        file.write('{"step": 6, "tokens_s')  # killed within a line
    assert len(metrics.read_metrics(path)) == 5
    with metrics.MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(stamp(4), {"loss": 40})
    lines = metrics.read_metrics(path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    with metrics.MetricsWriter(tmp_path):  # from scratch
        pass
    assert metrics.read_metrics(path) == []


def test_a_line_is_whole_on_disk_before_the_next_step(tmp_path):
    """A process that dies without closing anything has lost nothing."""
    code = f"""
import os
from t5x_lite.training import metrics
writer = metrics.MetricsWriter({str(tmp_path)!r})
values = {{f"{{'long' * 50}}/{{i}}": 1.0 for i in range(200)}}
for step in (1, 2):
    writer.write({{"step": step}}, values)
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("\n") and len(text) > 2 * 8192
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2]
    assert sum(f.stat().st_size for f in (tmp_path / "tensorboard").iterdir()) > 1000


def test_tensorboard_holds_the_values(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(stamp(3), {"loss": 0.5}, prefix="train/")
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(stamp(1), {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        metrics.read_metrics(tmp_path / "metrics.jsonl")


def test_importing_does_not_import_tensorflow():
    code = "import sys, t5x_lite.training.metrics; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("damage", [
    b"\0\0\0\0\n", b"\n", b"\xff\xfe{}\n", b'{"loss": 1.0}\n', b'{"step": "4"}\n', b"[1, 2]\n",
    b"null\n", b'{"step": 4, "loss"\n', b"[" * 100_000 + b"\n", b'{"step": ' + b"9" * 6000 + b"}\n",
])
@pytest.mark.parametrize("at_the_end", [True, False])
def test_a_damaged_line_never_stops_a_resume(tmp_path, capsys, damage, at_the_end):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": %d, "loss": 1.0}\n' % step for step in range(1, 5)]
    lines.insert(4 if at_the_end else 2, damage)
    path.write_bytes(b"".join(lines))
    assert [line["step"] for line in metrics.read_metrics(path)] == [1, 2, 3, 4]
    with metrics.MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(stamp(4), {})
    assert [line["step"] for line in metrics.read_metrics(path)] == [1, 2, 3, 4]
    assert "1 damaged lines of" in capsys.readouterr().out


def test_a_full_disk_costs_a_warning_and_no_run(tmp_path, capsys):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(stamp(1), {})
        good, writer._file = writer._file, open("/dev/full", "wb", buffering=0)
        writer.write(stamp(2), {})
        writer.write(stamp(3), {})
        writer._file.close()
        writer._file = good
        writer.write(stamp(4), {})
    assert [line["step"] for line in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [1, 4]
    assert capsys.readouterr().out.count("metrics cannot be written") == 1
