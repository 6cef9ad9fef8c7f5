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
    dpo         lm with two answers to a prompt, of which the chosen one is to become likelier than
                the rejected one, measured from a reference model (training/preferences.py)
    seq2seq_dpo the same of an encoder-decoder
    reward      two answers to a prompt, of which the chosen one is to have the higher score: a reward
                model (training/preferences.py); its score is the model's scalar head
    seq2seq_reward the same of an encoder-decoder
    ppo, grpo   prompts, to which the model draws answers that a function of yours or a reward model
                judges (training/policy.py, rollouts/)
    seq2seq_ppo, seq2seq_grpo the same of an encoder-decoder

Losses are sums. They are divided by the weight of the whole global batch, which is known
before the first micro-batch, so that accumulating gradients changes nothing.

Shape letters: B batch, L length, D model.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from t5x_lite.data import rows as data_rows
from t5x_lite.data.rows import ANSWER, REFERENCE
from t5x_lite.errors import Positive, Rate, UserError, at_least, one_of
from t5x_lite.models import ahead
from t5x_lite.models.params import BoundModel
from t5x_lite.models.peft import PeftConfig, Tuning
from t5x_lite.training import losses, policy, preferences
from t5x_lite.training.policy import RolloutConfig
from t5x_lite.training.policy_losses import GRPO, PPO, drawn_weight
from t5x_lite.training.preferences import REFERENCES
from t5x_lite.training.unlabelled_losses import UnlabelledConfig

Sums = dict[str, tuple[jax.Array, jax.Array]]
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised."""

    name: str = "seq2seq"           # a key of OBJECTIVES
    z_loss: float = 1e-4            # weight of log(Z)^2, which keeps logits near 0 (T5X)
    # Probability mass spread over the vocabulary, in training alone; dpo: the share of pairs that
    # are labelled the wrong way round.
    label_smoothing: Rate = 0.0
    # lm and prefix_lm: weight of the losses of model.further_tokens, on their mean (DeepSeek-V3:
    # 0.3, and 0.1 for the last third).
    further_weight: float = 0.3
    logits_chunk: int = 0           # positions a chunk of logits spans; 0: chosen by size
    unlikelihood: float = 1.0       # choices: weight of the loss of wrong choices' tokens …
    length_normalized: float = 1.0  # … and of the ranking by mean log-probability
    preference_loss: str = "sigmoid"   # dpo: sigmoid, ipo, or ipo_by_token (trl's ipo)
    beta: Positive = 0.1            # dpo: how dear it is to leave the reference
    # dpo, ppo, grpo: base, the model under peft.method=lora or ia3; copy, a frozen copy of the parameters
    # that the run starts from; none, all answers are equally likely (of ppo and grpo: no beta). dpo alone:
    # rows, scores in the data, as `python -m t5x_lite.score_preferences` writes them.
    reference: str = "base"
    unlabelled: UnlabelledConfig = UnlabelledConfig()   # of the texts of data.unlabelled, beside that
    rollout: RolloutConfig = RolloutConfig()   # ppo, grpo

    @property
    def rows(self) -> str:
        """The kind of rows that it reads, a key of data/rows.ROWS; where it draws answers, that of
        held-out data and of what it completes."""
        row = OBJECTIVES[self.name]
        return row.scored if row.scored and REFERENCES[self.reference].from_rows else row.rows

    @property
    def draws(self) -> "Draws | None":
        """How it draws answers and what of; None: its data hold what it learns from."""
        return OBJECTIVES[self.name].draws

    @property
    def given(self) -> str:
        """The kind of rows that training data give."""
        return self.draws.prompts if self.draws else self.rows

    @property
    def learned(self) -> str:
        """The kind of rows that a step learns from."""
        return self.draws.answers if self.draws else self.rows

    @property
    def per_row(self) -> int:
        """Rows that a step learns from for each that the data give."""
        return self.rollout.answers if self.draws else 1

    @property
    def passes(self) -> tuple[int, int]:
        """(passes of a step over its rows, optimizer updates a pass)."""
        return (self.rollout.epochs, self.rollout.minibatches) if self.draws else (1, 1)

    @property
    def learned_per_row(self) -> int:
        """As per_row, each as often as it is learned from."""
        return self.per_row * self.passes[0]

    @property
    def compares_with_base(self) -> bool:
        """Whether it is measured from the untuned model."""
        row = OBJECTIVES[self.name]
        return bool(row.scored or row.draws) and REFERENCES[self.reference].from_base

    @property
    def copies_base(self) -> bool:
        """Whether that model is a frozen copy in the state."""
        return self.compares_with_base and REFERENCES[self.reference].copied

    @property
    def asks_base(self) -> bool:
        """Whether its loss asks for what the untuned model makes of a batch: see `with_base`."""
        return self.compares_with_base and not self.draws


def likelihood(module: BoundModel, batch: Batch, key: jax.Array | None,
               config: ObjectiveConfig, divisors: Mapping[str, jax.Array], parts: int = 1, *,
               also: Callable | None = None) -> tuple[jax.Array, Sums]:
    """Cross-entropy of the weighted targets of `decoder_target_tokens`; a loss of the table.

    Args:
        also: (module, hidden, batch, config, divisors) -> (term, metrics) of a further term.
    """
    hidden, aux = module(batch, key)
    term, further = also(module, hidden, batch, config, divisors) if also else (0.0, {})
    if module.config.further_tokens:
        states, aux = module.further(batch, hidden, aux, key)
        more, metrics = _further_tokens(module, states, batch, config, divisors)
        term, further = term + more, {**further, **metrics}
    loss_sum, sums = losses.chunked_cross_entropy(
        module.head, module.stored_head(), hidden, batch["decoder_target_tokens"],
        batch["decoder_loss_weights"], z_loss=config.z_loss,
        label_smoothing=config.label_smoothing, chunk=config.logits_chunk,
        gather=module.gather_head)
    total, aux = losses.with_aux(loss_sum / divisors["weight"] + term, aux, parts)
    weight = sums["weight_sum"]
    metrics = {"loss": (sums["loss_sum"] - sums["z_loss_sum"], weight),
               "accuracy": (sums["correct_sum"], weight),
               "z_loss": (sums["z_loss_sum"], weight), **further, **aux}
    return total, metrics


def _further_tokens(module: BoundModel, hidden: list[jax.Array], batch: Batch,
                    config: ObjectiveConfig, divisors: Mapping[str, jax.Array]
                    ) -> tuple[jax.Array | float, Sums]:
    """The losses of further tokens (models/further_tokens.py): (term, metrics).

    As in the paper each is divided by the number of all targets, of which the last of an example
    are too near to its end. Metrics are by the number that there is: further_loss/2 is of the token
    after the next.
    """
    total, metrics = 0.0, {}
    for step, states in enumerate(hidden, 1):
        tokens, weights = ahead.targets(batch, step)
        loss_sum, sums = losses.chunked_cross_entropy(
            module.head, module.stored_head(), states, tokens, weights, z_loss=config.z_loss,
            label_smoothing=config.label_smoothing, chunk=config.logits_chunk,
            gather=module.gather_head)
        total = total + config.further_weight / len(hidden) * loss_sum / divisors["weight"]
        metrics |= {f"further_loss/{step + 1}": (sums["loss_sum"] - sums["z_loss_sum"],
                                                 sums["weight_sum"]),
                    f"further_accuracy/{step + 1}": (sums["correct_sum"], sums["weight_sum"])}
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


def _target_log_probs(module: BoundModel, hidden_BLD: jax.Array, batch: Batch, chunk: int
                      ) -> jax.Array:
    """float32 log p(target)_BL of rows that hold preferences."""
    return losses.target_log_probs(module.head, module.head_params(), hidden_BLD,
                                   batch["decoder_target_tokens"], chunk=chunk)


def answer_scores(module: BoundModel, batch: Batch, chunk: int = 0) -> jax.Array:
    """float32 [B, 2]: the log-probabilities of both answers, without dropout."""
    hidden, _ = module(batch, None)
    log_probs_BL = _target_log_probs(module, hidden, batch, chunk)
    return preferences.of_answers(log_probs_BL, batch[ANSWER])


def _dpo_weight(batch: Batch) -> dict[str, jax.Array]:
    """Also the number of pairs."""
    return target_weight(batch) | {
        "pairs": jnp.sum(preferences.is_pair(batch[ANSWER]), dtype=jnp.float32)}


def _dpo(module: BoundModel, batch: Batch, key: jax.Array | None, config: ObjectiveConfig,
         divisors: Mapping[str, jax.Array], parts: int = 1) -> tuple[jax.Array, Sums]:
    """The mean loss of preferences.LOSSES over pairs; a loss of the table.

    Its metric "loss" is that mean, though counted by the chosen answers' tokens, as every
    objective's is.
    """
    hidden, aux = module(batch, key)
    log_probs_BL = _target_log_probs(module, hidden, batch, config.logits_chunk)
    margin_B = preferences.margins(log_probs_BL, batch[ANSWER], batch.get(REFERENCE))
    is_pair_B = preferences.is_pair(batch[ANSWER])
    row = preferences.LOSSES[config.preference_loss]
    compared_B = preferences.margins(
        log_probs_BL, batch[ANSWER], batch.get(REFERENCE), row.by_token)
    loss_B = row.of_margins(compared_B, config.beta, config.label_smoothing)
    mean = jnp.sum(jnp.where(is_pair_B, loss_B, 0.0)) / divisors["pairs"]
    total, aux = losses.with_aux(mean, aux, parts)
    weight = jnp.sum(batch["decoder_loss_weights"])
    metrics = {"loss": (mean * divisors["weight"], weight)} | _margin_metrics(margin_B, batch)
    # Chosen answers' likelihood, which may fall while the margin rises.
    chosen = jnp.sum(log_probs_BL * batch["decoder_loss_weights"])
    return total, {**jax.lax.stop_gradient({**metrics, "chosen_nats": (-chosen, weight)}), **aux}


def _margin_metrics(margin_B: jax.Array, batch: Batch) -> Sums:
    """{metric: (sum, number of pairs)}: how many chosen answers win, and by how many nats."""
    is_pair_B = preferences.is_pair(batch[ANSWER])
    pairs = jnp.sum(is_pair_B, dtype=jnp.float32)
    return {"pair_accuracy": (jnp.sum(is_pair_B & (margin_B > 0), dtype=jnp.float32), pairs),
            "margin": (jnp.sum(jnp.where(is_pair_B, margin_B, 0.0)), pairs)}


def _reward_pairs(batch: Batch) -> dict[str, jax.Array]:
    """The number of pairs."""
    return {"pairs": jnp.sum(preferences.is_pair(batch[ANSWER]), dtype=jnp.float32)}


def _reward(module: BoundModel, batch: Batch, key: jax.Array | None, config: ObjectiveConfig,
            divisors: Mapping[str, jax.Array], parts: int = 1) -> tuple[jax.Array, Sums]:
    """Bradley and Terry's loss of the scores' difference, its mean over pairs (Ouyang et al. 2022,
    arXiv:2203.02155, equation 1, with one pair a prompt); a loss of the table.

        - log sigmoid(r(x, y_w) - r(x, y_l))
    """
    hidden, aux = module(batch, key)
    scores_BL = module.scalar_head(hidden)
    margin_B = preferences.margins(scores_BL, batch[ANSWER], None)
    is_pair_B = preferences.is_pair(batch[ANSWER])
    loss_B = preferences.sigmoid_loss(margin_B, 1.0, config.label_smoothing)
    loss_sum = jnp.sum(jnp.where(is_pair_B, loss_B, 0.0))
    total, aux = losses.with_aux(loss_sum / divisors["pairs"], aux, parts)
    metrics = _margin_metrics(margin_B, batch)
    pairs = metrics["margin"][1]
    chosen = preferences.of_answers(scores_BL, batch[ANSWER])[:, 0]
    metrics |= {"loss": (loss_sum, pairs), "chosen_score": (jnp.sum(chosen), pairs)}
    return total, {**jax.lax.stop_gradient(metrics), **aux}


def answer_score(module: BoundModel, batch: Batch) -> jax.Array:
    """float32 [B]: what a reward model makes of rows whose ANSWER is 1 where an answer has been read."""
    hidden, _ = module(batch, None)
    return preferences.of_answers(module.scalar_head(hidden), batch[ANSWER])[:, 0]


def _margin(module: BoundModel, hidden: jax.Array, batch: Batch, config: ObjectiveConfig,
            divisors: Mapping[str, jax.Array]) -> tuple[float, Sums]:
    """No further term, but the metrics of the margin: held-out data of `_dpo`."""
    log_probs_BL = _target_log_probs(module, hidden, batch, config.logits_chunk)
    margin_B = preferences.margins(log_probs_BL, batch[ANSWER], batch.get(REFERENCE))
    return 0.0, jax.lax.stop_gradient(_margin_metrics(margin_B, batch))


@dataclasses.dataclass(frozen=True)
class Draws:
    """What an objective learns from answers that the model draws in each step."""

    prompts: str           # a key of data/rows.ROWS: what the data give
    answers: str           # a key of data/rows.ROWS: what they become once answered and judged
    # (arrays of the answers, config) -> the same with what each token was worth.
    advantages: Callable[[Mapping[str, jax.Array], ObjectiveConfig], dict[str, jax.Array]]
    answers_needed: int = 1   # rollout.answers at least


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table: what an objective reads and how it is summed up."""

    architectures: tuple[str, ...]     # of ModelConfig.architecture
    rows: str                          # a key of data/rows.ROWS: what a row of a batch holds
    # (module, batch, key, config, divisors, parts) -> (loss, {metric: (sum, count)}), see `loss`.
    loss: Callable[..., tuple[jax.Array, Sums]] = likelihood
    # What the losses of a global batch are divided by, of the whole of it: see `totals`.
    divisors: Callable[[Batch], dict[str, jax.Array]] = target_weight
    # As `loss`, of held-out data: its "loss" is the targets' cross-entropy; None: `loss` itself.
    held_out: Callable[..., tuple[jax.Array, Sums]] | None = None
    scalar_head: bool = False   # whether it needs model.scalar_head
    # Whether "loss" of held-out data is nats of targets, of which perplexity and bits per byte are made.
    predicts: bool = True
    draws: Draws | None = None   # where the model itself makes what is learned from
    scored: str = ""   # a key of ROWS: `rows` with a reference's scores, of objectives that have one


# Add a row to add an objective; where no kind of rows fits, add one in data/rows.py.
OBJECTIVES: dict[str, Objective] = {
    "seq2seq": Objective(("encoder_decoder",), "seq2seq"),
    "choices": Objective(("encoder_decoder",), "choices",
                         functools.partial(likelihood, also=_choices), _choices_weight),
    "lm": Objective(("decoder_only",), "lm"),
    "prefix_lm": Objective(("decoder_only",), "prefix_lm"),
    "mlm": Objective(("encoder_only",), "mlm"),
    "dpo": Objective(
        ("decoder_only",), "preferences", _dpo, _dpo_weight,
        functools.partial(likelihood, also=_margin), scored="scored_preferences"),
    "seq2seq_dpo": Objective(
        ("encoder_decoder",), "seq2seq_preferences", _dpo, _dpo_weight,
        functools.partial(likelihood, also=_margin), scored="seq2seq_scored_preferences"),
    "reward": Objective(("decoder_only",), "rankings", _reward, _reward_pairs, scalar_head=True,
                        predicts=False),
    "seq2seq_reward": Objective(("encoder_decoder",), "seq2seq_rankings", _reward, _reward_pairs,
                                scalar_head=True, predicts=False),
    "ppo": Objective(
        ("decoder_only",), "lm", PPO, drawn_weight,
        likelihood, scalar_head=True,
        draws=Draws("prompts", "valued_answers", policy.with_token_advantages)),
    "seq2seq_ppo": Objective(
        ("encoder_decoder",), "seq2seq", PPO, drawn_weight,
        likelihood, scalar_head=True,
        draws=Draws("seq2seq_prompts", "seq2seq_valued_answers", policy.with_token_advantages)),
    "grpo": Objective(
        ("decoder_only",), "lm", GRPO, drawn_weight,
        likelihood, draws=Draws("prompts", "answers", policy.with_group_advantages, 2)),
    "seq2seq_grpo": Objective(
        ("encoder_decoder",), "seq2seq", GRPO, drawn_weight,
        likelihood, draws=Draws("seq2seq_prompts", "seq2seq_answers", policy.with_group_advantages, 2)),
}


def validate(config: ObjectiveConfig, architecture: str, scalar_head: bool = False) -> None:
    """Raises UserError for an unknown objective or one that the model cannot take.

    scalar_head: whether the model has one.
    """
    one_of("objective.name", config.name, OBJECTIVES)
    one_of("objective.preference_loss", config.preference_loss, preferences.LOSSES)
    one_of("objective.reference", config.reference, REFERENCES)
    if data_rows.of(OBJECTIVES[config.name].rows).compares and config.label_smoothing >= 0.5:
        raise UserError(f"objective.label_smoothing={config.label_smoothing} is the share of pairs "
                        f"that are labelled wrongly in objective.name={config.name!r}: from 0.5 on "
                        "nothing can be learned of them. Set it below.")
    if architecture not in OBJECTIVES[config.name].architectures:
        fitting = of_architecture(architecture)
        raise UserError(f"objective.name={config.name!r} does not fit "
                        f"model.architecture={architecture!r}: use {' or '.join(fitting)}.")
    if config.draws:
        _validate_draws(config)
    if OBJECTIVES[config.name].scalar_head and not scalar_head:
        raise UserError(f"objective.name={config.name!r} learns a number a position: set "
                        "model.scalar_head=True.")


def _validate_draws(config: ObjectiveConfig) -> None:
    """Raises UserError for what an objective that draws answers cannot do."""
    one_of("objective.rollout.average", config.rollout.average, policy.AVERAGES)
    if REFERENCES[config.reference].from_rows:
        raise UserError(f"objective.reference={config.reference!r}: data have no scores of answers that "
                        f"objective.name={config.name!r} has yet to draw; use base, copy or none.")
    at_least("objective.rollout.answers", config.rollout.answers, config.draws.answers_needed,
             f"objective.name={config.name!r} compares the answers to a prompt with one another.")
    if not config.rollout.reward:
        raise UserError(f"objective.rollout.reward is empty: objective.name={config.name!r} needs "
                        "MODULE:FUNCTION, (prompt, answer, record) -> a number, or the workdir of a "
                        "reward model.")


def check_reference(config: ObjectiveConfig, peft: PeftConfig, tuning: Tuning) -> None:
    """Raises UserError where the objective measures from an untuned model that the run does not keep."""
    kept = tuning.keeps_base or config.copies_base
    if config.compares_with_base and not kept:
        raise UserError(
            f"objective.reference='base' is the model under peft.method=lora or ia3, but "
            f"peft.method={peft.method!r} trains parameters of the model itself"
            f"{' (peft.also)' if peft.also else ''}: use one of those, or "
            "objective.reference=copy, which keeps a frozen copy of the parameters that the run starts "
            "from, or (dpo) objective.reference=rows with a file that `python -m "
            "t5x_lite.score_preferences` wrote the reference's scores into, or objective.reference=none.")


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
    """The loss of a (micro-)batch, one that went through `with_base`, and what to report.

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


def with_base(base: Callable[[], BoundModel], batch: Batch, config: ObjectiveConfig) -> Batch:
    """The batch with what the objective asks of the untuned model: as it is for most.

    Args:
        base: makes that model; it is never differentiated.
    """
    if not config.asks_base:
        return batch
    module = base()
    log_probs_BL = _target_log_probs(module, module(batch, None)[0], batch, config.logits_chunk)
    return {**batch, REFERENCE: jax.lax.stop_gradient(log_probs_BL)}


def held_out_loss(module: BoundModel, batch: Batch, config: ObjectiveConfig
                  ) -> tuple[jax.Array, Sums]:
    """`loss` as evaluation measures it: plain cross-entropy of the targets, whatever training
    smooths or compares, so that the perplexities and bits per byte of two runs compare.

    Margins of preferences are from the reference in the rows, or from none: evaluation reads one
    model, in which a base and its tuning are merged.
    """
    row, plain = OBJECTIVES[config.name], dataclasses.replace(config, label_smoothing=0.0)
    return (row.held_out or row.loss)(module, batch, None, plain, totals(config, batch))
