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


def si(number: float, unit: str = "") -> str:
    """1.23e9 -> '1.23 G'."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"),
                           (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()
