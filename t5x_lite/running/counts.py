"""What a run has seen and spent up to a step: rows, tokens and FLOPs, kept in every checkpoint.

They are counted, not derived from the step: a batch size or a ramp that changes on a resume does not
change what is said of the past.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class Counts:
    """Rows by what a row costs: [rows, tokens a row, FLOPs a row], a new entry where that changes.

    Sums of products, so that a resumed run gives the very floats of the uninterrupted one.
    """

    spent: list[list[float]]

    @classmethod
    def resumed(cls, spent: Sequence[Sequence[float]], tokens: int, flops: float) -> "Counts":
        """Goes on from what a checkpoint holds, with rows that cost so much from here on."""
        spent = [list(entry) for entry in spent]
        if not spent or spent[-1][1:] != [tokens, flops]:
            spent.append([0, tokens, flops])
        return cls(spent)

    def add(self, rows: int) -> None:
        """So many more rows."""
        self.spent[-1][0] += rows

    @property
    def rows(self) -> int:
        """Sequences that the run has seen."""
        return sum(rows for rows, _, _ in self.spent)

    @property
    def tokens(self) -> int:
        """Positions of those sequences, padding included."""
        return sum(rows * tokens for rows, tokens, _ in self.spent)

    @property
    def flops(self) -> float:
        """Model FLOPs of those sequences."""
        return sum(rows * flops for rows, _, flops in self.spent)
