"""From a batch to a loss: which tokens are predicted, and how the error is summed.

The objective of a run, a row of the table OBJECTIVES, fixes what a row of a batch holds (a kind of
data/rows.py) and the one loss that train, eval and plan share:

    seq2seq     encoder_input_tokens -> decoder_target_tokens (T5, BART)
    choices     seq2seq whose targets are several choices, the right one first: likelihood of the
                right one, unlikelihood of the wrong ones, and their ranking (T-Few)
    lm          decoder_input_tokens -> decoder_target_tokens, causal; a task's inputs stand in
                front of its targets and carry no loss
    prefix_lm   lm whose prefix (decoder_prefix) is bidirectional and carries no loss
    mlm         encoder_input_tokens -> decoder_target_tokens at masked positions (BERT)

Losses are sums. They are divided by the weight of the whole global batch, which is known
before the first micro-batch, so that accumulating gradients changes nothing.

Shape letters: B batch, L length, D model.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from t5x_lite.errors import Rate, UserError, one_of
from t5x_lite.models.params import BoundModel
from t5x_lite.training import losses

Sums = dict[str, tuple[jax.Array, jax.Array]]
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised."""

    name: str = "seq2seq"           # a key of OBJECTIVES
    z_loss: float = 1e-4            # weight of log(Z)^2, which keeps logits near 0 (T5X)
    label_smoothing: Rate = 0.0    # probability mass spread over the vocabulary, in training alone
    logits_chunk: int = 0           # positions a chunk of logits spans; 0: chosen by size
    unlikelihood: float = 1.0       # choices: weight of the loss of wrong choices' tokens …
    length_normalized: float = 1.0  # … and of the ranking by mean log-probability

    @property
    def rows(self) -> str:
        """The kind of rows that it reads, a key of data/rows.ROWS."""
        return OBJECTIVES[self.name].rows


def likelihood(module: BoundModel, batch: Batch, key: jax.Array | None,
               config: ObjectiveConfig, divisors: Mapping[str, jax.Array], parts: int = 1, *,
               also: Callable | None = None) -> tuple[jax.Array, Sums]:
    """Cross-entropy of the weighted targets of `decoder_target_tokens`; a loss of the table.

    Args:
        also: (module, hidden, batch, config, divisors) -> (term, metrics) of a further term.
    """
    hidden, aux = module(batch, key)
    term, further = also(module, hidden, batch, config, divisors) if also else (0.0, {})
    loss_sum, sums = losses.chunked_cross_entropy(
        module.head, module.stored_head(), hidden, batch["decoder_target_tokens"],
        batch["decoder_loss_weights"], z_loss=config.z_loss,
        label_smoothing=config.label_smoothing, chunk=config.logits_chunk,
        gather=module.gather_head)
    total = loss_sum / divisors["weight"] + term
    if "aux_loss" in aux:
        total = total + aux["aux_loss"][0] / parts
        aux = {**aux, "aux_loss": (aux["aux_loss"][0] / parts, jnp.float32(1.0 / parts))}
    weight = sums["weight_sum"]
    metrics = {"loss": (sums["loss_sum"] - sums["z_loss_sum"], weight),
               "accuracy": (sums["correct_sum"], weight),
               "z_loss": (sums["z_loss_sum"], weight), **further, **aux}
    return total, metrics


def target_weight(batch: Batch) -> dict[str, jax.Array]:
    """{"weight": the weight of all targets}: what `likelihood` divides by."""
    return {"weight": jnp.sum(batch["decoder_loss_weights"], dtype=jnp.float32)}


def _has_choices(batch: Batch) -> bool:
    """Whether the decoder's segments are choices and not packed examples."""
    return "decoder_segment_ids" in batch and "encoder_segment_ids" not in batch


def _choices_weight(batch: Batch) -> dict[str, jax.Array]:
    """Also the numbers of wrong tokens and of rows, where the rows hold several choices."""
    weight = target_weight(batch)
    if not _has_choices(batch):
        return weight
    segments = batch["decoder_segment_ids"]
    return weight | {"wrong": jnp.sum(segments > 1, dtype=jnp.float32),
                     "rows": jnp.sum(jnp.any(segments == 1, axis=1), dtype=jnp.float32)}


def _choices(module: BoundModel, hidden: jax.Array, batch: Batch,
             config: ObjectiveConfig, divisors: Mapping[str, jax.Array]
             ) -> tuple[jax.Array | float, Sums]:
    """T-Few's two further terms, 0 for rows that hold one target."""
    if not _has_choices(batch):
        return 0.0, {}
    log_probs_BL = losses.target_log_probs(
        module.head, module.head_params(), hidden, batch["decoder_target_tokens"],
        chunk=config.logits_chunk)
    segments = batch["decoder_segment_ids"]
    unlikelihood_BL, normalised_B, is_first_B = losses.choice_losses(log_probs_BL, segments)
    unlikelihood, normalised = jnp.sum(unlikelihood_BL), jnp.sum(normalised_B)
    total = (config.unlikelihood * unlikelihood / divisors["wrong"]
             + config.length_normalized * normalised / divisors["rows"])
    rows = jnp.sum(jnp.any(segments == 1, axis=1), dtype=jnp.float32)
    return total, jax.lax.stop_gradient({
        "unlikelihood": (unlikelihood, jnp.sum(segments > 1, dtype=jnp.float32)),
        "length_normalized": (normalised, rows), "rank_accuracy": (jnp.sum(is_first_B), rows)})


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table: what an objective reads and how it is summed up."""

    architectures: tuple[str, ...]     # of ModelConfig.architecture
    rows: str                          # a key of data/rows.ROWS: what a row of a batch holds
    # (module, batch, key, config, divisors, parts) -> (loss, {metric: (sum, count)}), see `loss`.
    loss: Callable[..., tuple[jax.Array, Sums]] = likelihood
    # What the losses of a global batch are divided by, of the whole of it: see `totals`.
    divisors: Callable[[Batch], dict[str, jax.Array]] = target_weight


# Add a row to add an objective; where no kind of rows fits, add one in data/rows.py.
OBJECTIVES: dict[str, Objective] = {
    "seq2seq": Objective(("encoder_decoder",), "seq2seq"),
    "choices": Objective(("encoder_decoder",), "choices",
                         functools.partial(likelihood, also=_choices), _choices_weight),
    "lm": Objective(("decoder_only",), "lm"),
    "prefix_lm": Objective(("decoder_only",), "prefix_lm"),
    "mlm": Objective(("encoder_only",), "mlm"),
}


def validate(config: ObjectiveConfig, architecture: str) -> None:
    """Raises UserError for an unknown objective or one that the architecture cannot take."""
    one_of("objective.name", config.name, OBJECTIVES)
    if architecture not in OBJECTIVES[config.name].architectures:
        fitting = of_architecture(architecture)
        raise UserError(f"objective.name={config.name!r} does not fit "
                        f"model.architecture={architecture!r}: use {' or '.join(fitting)}.")


def of_architecture(architecture: str) -> list[str]:
    """The names of the objectives that a model of this architecture can learn from."""
    return [name for name, row in OBJECTIVES.items() if architecture in row.architectures]


def totals(config: ObjectiveConfig, batch: Batch) -> dict[str, jax.Array]:
    """What the losses of a global batch are divided by, float32 scalars of at least 1: the weight
    of all targets, and whatever else the objective counts."""
    counts = OBJECTIVES[config.name].divisors(batch)
    return {name: jnp.maximum(x, 1.0) for name, x in counts.items()}


def loss(module: BoundModel, batch: Batch, key: jax.Array | None, config: ObjectiveConfig,
         divisors: Mapping[str, jax.Array], parts: int = 1) -> tuple[jax.Array, Sums]:
    """The loss of a (micro-)batch and what to report.

    Args:
        module: the model with its parameters.
        key: dropout key; None evaluates without dropout.
        divisors: `totals` of the global batch that this is a part of.
        parts: into how many micro-batches that batch is split.
    Returns:
        float32 scalar whose sum over the parts is the loss of the global batch, and
        {metric: (sum, count)}: loss (cross-entropy in nats), accuracy, z_loss, and the
        layers' auxiliary values.
    """
    return OBJECTIVES[config.name].loss(module, batch, key, config, divisors, parts)


def held_out(config: ObjectiveConfig) -> ObjectiveConfig:
    """The objective as evaluation measures it: plain cross-entropy, whatever training smooths, so
    that the perplexities and bits per byte of two runs compare."""
    return dataclasses.replace(config, label_smoothing=0.0)
