"""What tests/running/test_launchers.py launches in the place of a training: NAME FOLDER WHAT."""

import pathlib
import signal
import sys
import time

name, folder, what = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]


def mark(event: str) -> None:
    with open(folder / "events", "a") as file:
        file.write(f"{event} {name}\n")


def save(*_):
    mark("saved")
    sys.exit(77)


signal.signal(signal.SIGTERM, save)
mark("begins")
time.sleep(0.3)
if what == "fails":
    print("Traceback (most recent call last):\nValueError: no such luck\n(and more)")
    sys.exit(3)
if what == "hangs":
    time.sleep(60)
(folder / f"{name}.done").touch()
mark("ends")
