"""From a batch to a loss: which tokens are predicted, and how the error is summed.

The objective of a run fixes the batch schema that data/batches.py makes and the one loss that
train, eval and plan share:

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
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_lite.errors import UserError, nearest
from t5x_lite.models.language_model import LanguageModel
from t5x_lite.training import losses

OBJECTIVES = {  # name -> architectures it fits
    "seq2seq": ("encoder_decoder",),
    "choices": ("encoder_decoder",),
    "lm": ("decoder_only",),
    "prefix_lm": ("decoder_only",),
    "mlm": ("encoder_only",),
}

Sums = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised."""

    name: str = "seq2seq"           # a key of OBJECTIVES
    z_loss: float = 1e-4            # weight of log(Z)^2, which keeps logits near 0 (T5X)
    label_smoothing: float = 0.0    # probability mass spread over the vocabulary
    logits_chunk: int = 0           # positions a chunk of logits spans; 0: chosen by size
    unlikelihood: float = 1.0       # choices: weight of the loss of wrong choices' tokens …
    length_normalized: float = 1.0  # … and of the ranking by mean log-probability


def validate(config: ObjectiveConfig, architecture: str) -> None:
    """Raises UserError for an unknown objective or one that the architecture cannot take."""
    if config.name not in OBJECTIVES:
        raise UserError(f"objective.name={config.name!r} is unknown."
                        f"{nearest(config.name, OBJECTIVES)} Known: {', '.join(OBJECTIVES)}.")
    if architecture not in OBJECTIVES[config.name]:
        fitting = [n for n, a in OBJECTIVES.items() if architecture in a]
        raise UserError(f"objective.name={config.name!r} does not fit "
                        f"model.architecture={architecture!r}: use {' or '.join(fitting)}.")


def totals(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What the losses of a global batch are divided by, float32 scalars of at least 1: the weight
    of all targets, and where rows hold several choices, wrong tokens and rows."""
    weights = batch["decoder_loss_weights"]
    found = {"weight": jnp.sum(weights, dtype=jnp.float32)}
    if _has_choices(batch):
        segments = batch["decoder_segment_ids"]
        found |= {"wrong": jnp.sum(segments > 1, dtype=jnp.float32),
                  "rows": jnp.sum(jnp.any(segments == 1, axis=1), dtype=jnp.float32)}
    return {name: jnp.maximum(x, 1.0) for name, x in found.items()}


def _has_choices(batch: Mapping[str, jax.Array]) -> bool:
    """Whether the decoder's segments are choices and not packed examples."""
    return "decoder_segment_ids" in batch and "encoder_input_tokens" in batch and \
        "encoder_segment_ids" not in batch


def loss(module: LanguageModel, batch: Mapping[str, jax.Array], key: jax.Array | None,
         config: ObjectiveConfig, divisors: Mapping[str, jax.Array], parts: int = 1
         ) -> tuple[jax.Array, Sums]:
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
    hidden, aux = module(batch, key)
    choices_loss, choices_metrics = 0.0, {}
    if config.name == "choices" and _has_choices(batch):
        choices_loss, choices_metrics = _choices(module, hidden, batch, config, divisors)
    loss_sum, sums = losses.chunked_cross_entropy(
        module.head, module.stored_head(), hidden, batch["decoder_target_tokens"],
        batch["decoder_loss_weights"], z_loss=config.z_loss,
        label_smoothing=config.label_smoothing, chunk=config.logits_chunk,
        gather=module.gather_head)
    total = loss_sum / divisors["weight"] + choices_loss
    if "aux_loss" in aux:
        total = total + aux["aux_loss"][0] / parts
        aux = {**aux, "aux_loss": (aux["aux_loss"][0] / parts, jnp.float32(1.0 / parts))}
    weight = sums["weight_sum"]
    metrics = {"loss": (sums["loss_sum"] - sums["z_loss_sum"], weight),
               "accuracy": (sums["correct_sum"], weight),
               "z_loss": (sums["z_loss_sum"], weight), **choices_metrics, **aux}
    return total, metrics


def _choices(module: LanguageModel, hidden: jax.Array, batch: Mapping[str, jax.Array],
             config: ObjectiveConfig, divisors: Mapping[str, jax.Array]
             ) -> tuple[jax.Array, Sums]:
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
