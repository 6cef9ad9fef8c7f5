"""What is said: lines on standard output from the main process, and numbers with SI prefixes."""

import sys

import jax
from tqdm import tqdm


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def say(line: str = "") -> None:
    """One line on standard output, from process 0, above the progress line."""
    if is_main():
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def si(number: float, unit: str = "", digits: int = 3) -> str:
    """A number to so many figures with an SI prefix: 1.2345e13 "FLOP" -> "12.3 TFLOP"."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
    power = 0
    # 999.6 has three figures as 1.00 k: what rounds up to a thousand has the next prefix.
    while float(f"{abs(number):.{digits}g}") >= 1000 and power < len(prefixes) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.{digits}g} {prefixes[power]}{unit}".rstrip()
