"""Losses of texts without labels, by the probabilities of the classes that they may have.

A class is as likely as its text is as an answer (data/views.py has them all in one row): with s_c the
log-probability of class c's text, EOS included, summed over its tokens,

    p_c = exp s_c / sum_k exp s_k

The mean of a loss of unlabelled_losses.py over a batch's unlabelled rows, times a weight that may rise with
the step, is added to the objective's own loss. A mixture of experts' auxiliary losses are of labelled rows alone.

Shape letters: B rows, C classes, L length, D model.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_lite.data import views
from t5x_lite.data.config import DataConfig
from t5x_lite.data.rows import Rows
from t5x_lite.errors import UserError, one_of, refuse
from t5x_lite.layers.linear import RowKey
from t5x_lite.models.params import BoundModel
from t5x_lite.training import losses
from t5x_lite.training.unlabelled_losses import (
    LOSSES,
    RAMPS,
    UnlabelledConfig,
    entropy,
    is_confident,
    weight_at,
)

Sums = dict[str, tuple[jax.Array, jax.Array]]
ROWS = "unlabelled_rows"   # in a batch: where each unlabelled row stands among those of the step
_KEY = 0x5EE               # folded into the step's dropout key, with the number of the view


def validate(config: UnlabelledConfig, data: DataConfig) -> None:
    """Raises UserError for what cannot be, and for a loss without data or data without a loss."""
    one_of("objective.unlabelled.loss", config.loss, ("", *LOSSES))
    one_of("objective.unlabelled.ramp", config.ramp, RAMPS)
    if config.ramp != "constant" and config.ramp_to <= config.ramp_from:
        raise refuse("objective.unlabelled.ramp_to", config.ramp_to,
                     f"above objective.unlabelled.ramp_from={config.ramp_from}, where ramp="
                     f"{config.ramp!r} rises between the two")
    if bool(config.loss) != bool(data.unlabelled):
        raise UserError(f"objective.unlabelled.loss={config.loss!r} and data.unlabelled="
                        f"{data.unlabelled!r} go together: the one says what is learned of the texts that "
                        f"the other names. Set both, the loss to {', '.join(LOSSES)}, or neither.")
    if not config.loss:
        return
    needed, given = LOSSES[config.loss].views, len(views.views_of(data))
    if needed != given:
        raise UserError(f"objective.unlabelled.loss={config.loss!r} takes {needed} view(s) of a text, and "
                        f"data.views={data.views!r} names {given}: set data.views to "
                        + ("a weak and a strong one, dropout,spans." if needed == 2 else "one, plain."))


@dataclasses.dataclass(frozen=True)
class Unlabelled:
    """The term of a run, and how its classes are read off a model."""

    config: UnlabelledConfig
    num_classes: int
    drops: tuple[bool, ...]   # of each view: whether units are dropped
    logits_chunk: int = 0

    @classmethod
    def of(cls, config: UnlabelledConfig, data: DataConfig, logits_chunk: int) -> "Unlabelled | None":
        """None where data.classes names no classes."""
        if not data.classes:
            return None
        drops = tuple(views.VIEWS[name].dropout for name in views.views_of(data))
        return cls(config, len(views.classes_of(data)), drops, logits_chunk)

    def passes(self, kind: Rows, data: DataConfig, trained: frozenset[str]
               ) -> list[tuple[tuple[int, int], frozenset[str]]]:
        """(positions on the encoder's and the decoder's side, the parameters that get gradients) of each
        view's pass. kind: of the labelled rows; trained: what trains of the model."""
        lengths = kind.lengths(views.row_config(data, kind))
        positions = lengths.get("encoder", 0), lengths["decoder"]
        stopped = LOSSES[self.config.loss].stops_weak
        return [(positions, frozenset() if stopped and not number else trained)
                for number in range(len(self.drops))]

    def totals(self, batch: Mapping[str, jax.Array], step: jax.Array | int) -> dict[str, jax.Array]:
        """What the parts of a global batch share: {"rows": its unlabelled rows, "weight": at this step}."""
        return {"rows": jnp.float32(_num_rows(batch)), "weight": weight_at(self.config, step)}

    def log_probs(self, module: BoundModel, part: Mapping[str, jax.Array], key: RowKey | None) -> jax.Array:
        """float32 log p_BC of the classes, of the rows of one view."""
        hidden_BLD, _ = module(part, key)
        log_probs_BL = losses.target_log_probs(module.head, module.head_params(), hidden_BLD,
                                               part["decoder_target_tokens"], chunk=self.logits_chunk)
        number_BL = jnp.where(part["decoder_loss_weights"] > 0, part["decoder_segment_ids"], 0)
        scores_BC = jnp.stack([jnp.sum(jnp.where(number_BL == number, log_probs_BL, 0.0), axis=1)
                               for number in range(1, self.num_classes + 1)], axis=1)
        return jax.nn.log_softmax(scores_BC, axis=1)

    def loss(self, module: BoundModel, batch: Mapping[str, jax.Array], key: jax.Array | None,
             totals: Mapping[str, jax.Array]) -> tuple[jax.Array, Sums]:
        """The term of a (micro-)batch, whose sum over the parts is the weighted mean over the global
        batch's unlabelled rows, and {metric: (sum, count)}.

        Args:
            key: the step's dropout key; None: no dropout.
            totals: those of the global batch.
        """
        row = LOSSES[self.config.loss]
        views_BC = []
        for number, (prefix, drops) in enumerate(zip(views.PREFIXES, self.drops, strict=False)):
            own = RowKey(jax.random.fold_in(key, _KEY + number), batch[ROWS]) \
                if drops and key is not None else None
            found_BC = self.log_probs(module, views.part(batch, prefix), own)
            stopped = row.stops_weak and number == 0
            views_BC.append(jax.lax.stop_gradient(found_BC) if stopped else found_BC)
        total = jnp.sum(row.of_rows(views_BC, self.config))
        sure = jnp.sum(is_confident(views_BC[0], self.config.threshold), dtype=jnp.float32)
        rows, one = jnp.float32(_num_rows(batch)), jnp.float32(1.0)
        return total * (totals["weight"] / totals["rows"]), jax.lax.stop_gradient({
            "unlabelled_loss": (total, rows), "unlabelled_share": (sure, rows),
            "unlabelled_weight": (totals["weight"], one)})

    def graded(self, module: BoundModel, batch: Mapping[str, jax.Array]) -> Sums:
        """{metric: (sum, count)} of held-out texts whose classes are known (batches.graded_batches):
        class_accuracy, the share whose likeliest class is the right one; class_entropy, in nats;
        pseudo_share, of those at the threshold; pseudo_accuracy, class_accuracy among these."""
        part = views.part(batch, views.PREFIXES[0])
        log_probs_BC = self.log_probs(module, part, None)
        is_row_B = jnp.any(part["decoder_segment_ids"] > 0, axis=1)
        is_right_BC = jnp.stack(
            [jnp.any((part[views.RIGHT] > 0) & (part["decoder_segment_ids"] == number), axis=1)
             for number in range(1, self.num_classes + 1)], axis=1)
        chosen = jax.nn.one_hot(jnp.argmax(log_probs_BC, axis=1), self.num_classes, dtype=bool)
        hit_B = jnp.any(is_right_BC & chosen, axis=1) & is_row_B
        sure_B = is_confident(log_probs_BC, self.config.threshold) & is_row_B
        count = lambda mask: jnp.sum(mask, dtype=jnp.float32)
        entropy_B = jnp.where(is_row_B, entropy([log_probs_BC], self.config), 0.0)
        rows = count(is_row_B)
        return {"class_accuracy": (count(hit_B), rows), "class_entropy": (jnp.sum(entropy_B), rows),
                "pseudo_share": (count(sure_B), rows),
                "pseudo_accuracy": (count(hit_B & sure_B), count(sure_B))}


def _num_rows(batch: Mapping[str, jax.Array]) -> int:
    return batch[f"{views.PREFIXES[0]}decoder_target_tokens"].shape[0]
