"""What a run must record, so that a law can be fitted to it: the one convention of counts.

N, D and C mean nothing until it is said how they were counted: the head alone moves Porian's exponent
of N* from .835 to .706. Every line of metrics.jsonl carries these, and whatever reads runs
(scaling/tables.py, reporting/runs.py) knows them by these names:

    params                all parameters
    params_no_embed       less the token and position tables and the head (Kaplan's N)
    params_no_embed_head  params_no_embed and the head's kernel, also where that is the token table
    params_active         of params, those that one token meets: of a mixture its chosen experts
    tokens_seen           positions of encoder and decoder, padding included
    tokens_filled         those that are not padding
    tokens_loss           those that bear loss: the sum of the targets' weights
    flops                 forward and backward, as MFU counts: kernels, head, causal attention whole
    flops_causal_half     the same with the pairs alone that causality and windows let through
    flops_no_head         flops without the head's
    flops_6nd             6 x params_no_embed_head (those of them that are active) x tokens_seen
    batch                 positions of the step that the line speaks of
    lr                    learning rate of that step
    phase                 what the schedule does there: warmup, stable or decay

tokens_* and flops* are sums from the first step on, those of the run that a branch starts from
included. They are counted, not derived from the step: a batch size or a ramp that changes on a resume
does not change what is said of the past. Every checkpoint keeps them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

# What the names of sums and sizes mean, for whoever prints a fit.
MEANINGS = {
    "params": "all parameters",
    "params_no_embed": "parameters without embeddings and head (Kaplan's N)",
    "params_no_embed_head": "parameters without embeddings, with the head",
    "params_active": "parameters that one token meets, embeddings included",
    "tokens_seen": "positions, padding included",
    "tokens_filled": "positions that are not padding",
    "tokens_loss": "tokens that bear loss",
    "flops": "FLOPs as counted, with the head and causal attention whole",
    "flops_causal_half": "FLOPs as counted, with the head and half of causal attention",
    "flops_no_head": "FLOPs as counted, without the head, causal attention whole",
    "flops_6nd": "6 N D, N without embeddings and with the head, D positions",
    "non_embedding_params": "parameters without embeddings and head (Kaplan's N)",
}


@dataclasses.dataclass(frozen=True)
class RowCost:
    """What one row of a batch costs, by the names above."""

    tokens: int
    flops: float
    flops_causal_half: float = 0.0
    flops_no_head: float = 0.0
    flops_6nd: float = 0.0


@dataclasses.dataclass
class Counts:
    """Rows by what a row costs, a new entry where that changes: [rows, *RowCost].

    Sums of products, so that a resumed run gives the very floats of the uninterrupted one.
    """

    spent: list[list[float]]
    loss: float | None = 0       # tokens that bore loss; None: the run began before they were counted
    filled: int | None = 0       # positions that were not padding, likewise

    @classmethod
    def resumed(cls, spent: Sequence[Sequence[float]], cost: RowCost,
                tokens: Sequence[float | None] | None = None) -> "Counts":
        """Goes on from what a checkpoint holds, with rows that cost so much from here on.

        tokens: what `tokens` of the run before was; None of a checkpoint that has none.
        """
        now, begun = list(dataclasses.astuple(cost)), bool(spent)
        spent = [list(entry) for entry in spent]
        for entry in spent:   # of before the further FLOPs were kept: of the same rows, the same
            if len(entry) == 3 and entry[1:] == now[:2]:
                entry[1:] = now
        if not spent or spent[-1][1:] != now:
            spent.append([0, *now])
        loss, filled = tokens or ((None, None) if begun else (0, 0))
        return cls(spent, loss, filled)

    def add(self, rows: int, loss: float = 0, filled: int = 0) -> None:
        """So many more rows, with so many tokens that bear loss and that are no padding."""
        self.spent[-1][0] += rows
        if self.loss is not None:
            self.loss += int(loss) if loss == int(loss) else loss
            self.filled += filled

    @property
    def token_counts(self) -> list[float | None]:
        """What `resumed` takes beside `spent`."""
        return [self.loss, self.filled]

    @property
    def rows(self) -> int:
        """Sequences that the run has seen."""
        return sum(entry[0] for entry in self.spent)

    @property
    def tokens(self) -> int:
        """Positions of those sequences, padding included."""
        return self._total(1)

    @property
    def flops(self) -> float:
        """Model FLOPs of those sequences."""
        return self._total(2)

    def stamp(self) -> dict[str, Any]:
        """The sums, by name; those that are not known from the run's begin are left out."""
        fields = [field.name for field in dataclasses.fields(RowCost)]
        found = {name: self._total(place) for place, name in enumerate(fields, 1)
                 if all(len(entry) > place for entry in self.spent)}
        found["tokens_seen"] = found.pop("tokens")
        tokens = {"tokens_filled": self.filled, "tokens_loss": self.loss}
        return found | {name: value for name, value in tokens.items() if value is not None}

    def _total(self, place: int) -> float:
        return sum(entry[0] * entry[place] for entry in self.spent)
