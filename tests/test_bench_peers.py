"""scripts/bench_peers.py: a row that cannot be had says why, and none is waited for without end."""

import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "scripts" / "bench_peers.py"


def test_rows_without_t5x_and_rows_that_do_not_end_say_so(tmp_path):
    interpreter = tmp_path / "environment" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(sys.executable)
    (tmp_path / "environment" / "complete").touch()
    stuck = tmp_path / "stuck"
    stuck.write_text("#!/bin/sh\nsleep 60 & wait\n")
    stuck.chmod(0o755)
    done = subprocess.run(
        [sys.executable, SCRIPT, f"--folder={tmp_path}", f"--t5x={tmp_path / 'none'}", "--only=float32, s",
         "--seconds=0.5", f"--under={stuck}"], capture_output=True, text=True, timeout=50)
    assert not done.returncode, done.stderr
    with_peer, with_t5x = done.stdout.splitlines()[-2:]
    assert "against transformers" in with_peer and "not measured: no end after 0.5 s" in with_peer
    assert "against T5X" in with_t5x and "not measured: T5X is not to be had from" in with_t5x
