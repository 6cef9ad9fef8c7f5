"""What a run shows."""

import os
import pty
import subprocess
import sys

from t5x_lite import log, report

SHOW = '''
import fcntl, struct, sys, termios
fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
from t5x_lite import report
seen = 0
bar = report.Progress(0, 4, lambda: seen)
for step in range(1, 5):
    seen = 100 * step
    bar.update(step, 2.5, log=True)
bar.close()
'''


def test_si():
    assert [log.si(x, "FLOP") for x in (0.5, 12.0, 1234.0, 5.9e10)] == [
        "0.5 FLOP", "12 FLOP", "1.23 kFLOP", "59 GFLOP"]


def test_a_live_line_on_a_terminal_and_plain_lines_elsewhere(capsys):
    seen = iter((0, 200, 300))
    bar = report.Progress(0, 4, lambda: next(seen))
    bar.update(2, 2.5, log=True)
    bar.update(3, 2.25, log=False)
    line = capsys.readouterr().out
    assert line.startswith("step 2/4  loss 2.500, ") and "tokens/s" in line and "left" in line
    assert len(line.splitlines()) == 1

    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", SHOW], stderr=theirs, stdout=subprocess.PIPE,
                          text=True) as process:
        out = process.communicate(timeout=120)[0]
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert out == "" and "\r" in shown
    assert "step 4/4 |" in shown and "loss 2.500" in shown and "left" in shown


def test_samples_are_wrapped_and_show_line_ends():
    text = report.samples([("a\n\n  b", "c", "d " * 80)])
    assert text.splitlines()[0] == "  input      a ⏎ b"
    assert text.splitlines()[1] == "  predicted  c"
    assert max(map(len, text.splitlines())) <= 100 and len(text.splitlines()) == 4


def test_hidden_spans_are_shown_where_they_stood_and_counted():
    row = ("Norway lies <extra_id_0>. It <extra_id_1> rains", "<extra_id_0> in Europe <extra_id_1> never",
           "<extra_id_0> in Europe <extra_id_1> often")
    shown = report.samples([row, ("2 + 2", "5", "4")])
    assert "passage    Norway lies [in Europe]. It [never, not: often] rains" in shown
    assert "predicted  5" in shown
    values = {"exact": 51.2, "of_words": 99.9, "most_frequent": 3.9, "between_same_words": 20.7}
    text = report.filled({"facts": {f"metric/spans_{n}": v for n, v in values.items()},
                          "other": {"loss": 2.0}})
    assert text.startswith("facts: 51.2 % of the hidden spans are filled with the very words, 99.9 %")
    assert "3.9 %" in text and "20.7 %" in text and report.filled({"other": {"loss": 2.0}}) == ""
