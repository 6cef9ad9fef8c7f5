"""The compiled functions of a run: train, evaluate, decode; pure in (state, batch).

Dropout keys are folded from the seed, the step and the row of the global batch here, and from
the stack and the layer in models/language_model.py, so that a resumed run draws what the
uninterrupted one drew, and an accumulated or pipelined step what the whole batch would.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5x_lite import tree
from t5x_lite.data import rows as data_rows, views
from t5x_lite.decoding import decode as decoding
from t5x_lite.decoding.decode import DecodeConfig, Decoded
from t5x_lite.decoding.logits_fn import LogitsFn, load as load_logits_fn
from t5x_lite.layers import masks
from t5x_lite.layers.linear import RowKey
from t5x_lite.models.cache import take_rows
from t5x_lite.models.params import ModelDefinition
from t5x_lite.models.peft import Tuning
from t5x_lite.parallel import offload, sharding
from t5x_lite.training import objectives, precision, unlabelled
from t5x_lite.training.layerwise import FINITE, Layerwise, with_info
from t5x_lite.training.objectives import ObjectiveConfig, Sums
from t5x_lite.training.optimizers import Optimizer
from t5x_lite.training.state import REFERENCE, State
from t5x_lite.training.unlabelled import Unlabelled

Batch = Mapping[str, jax.Array]
_ROWS = "rows"   # beside a batch's features: where each row stands in the global batch
_SHUFFLE = 0x5F1E   # folded into the step's key, of which minibatches are drawn
FILLED = "filled"   # the metric of positions that are not padding
_FEATURE_AXES = ("act_batch", "act_length")   # of every feature; of _ROWS the first


def split_batch(batch: Batch, parts: int) -> Batch:
    """[B, …] -> [parts, B / parts, …]; micro-batch m holds rows m, m + parts, …

    Strided rows, not blocks: every device keeps the rows it has.
    """
    def split(x):
        x = sharding.reshape(x, (x.shape[0] // parts, parts, *x.shape[1:]),
                             "act_batch", None, *_FEATURE_AXES[1:x.ndim])
        return jnp.swapaxes(x, 0, 1)
    return jax.tree.map(split, dict(batch))


def _by_slice(batch: Batch, slices: int) -> Batch:
    """[B, …] -> [slices, B / slices, …], the rows of each slice, which are a block of B."""
    def split(x):
        with sharding.inside("slice"):
            inner = sharding.spec(*_FEATURE_AXES[:x.ndim])
        return jax.lax.reshape(x, (slices, x.shape[0] // slices, *x.shape[1:]),
                               out_sharding=PartitionSpec("slice", *inner))
    return jax.tree.map(split, dict(batch))


@dataclasses.dataclass(frozen=True)
class Differentiated:
    """What a train step differentiates, fixed when the run is built."""

    model: ModelDefinition
    objective: ObjectiveConfig
    tuning: Tuning                          # makes the model's parameters of those that train
    frozen: frozenset[str] = frozenset()    # paths of parameters that need no gradient
    parts: int = 1   # micro-batches; their float32 gradients add up to those of the whole batch
    # ZeRO's stage. 1: gradients stay whole on every device of the fsdp axis; 2 and 3: each
    # micro-batch's are reduced onto the devices that hold their optimizer state.
    zero: int = 3
    noise_scale: bool = False   # measure the gradient noise scale, see noise_scale
    unlabelled: Unlabelled | None = None   # the loss of data.unlabelled; None: there is none

    def slices(self) -> int:
        """Into how many copies the mesh's slices ask for gradients of their own: see `gradients`."""
        sizes = sharding.mesh_sizes()
        many = self.parts > 1 or sizes.get("stage", 1) > 1
        return sizes.get("slice", 1) if many else 1

    def born_split(self) -> bool:
        """Whether gradients of whole parameters are split where they arise (ZeRO-2)."""
        return self.zero == 2 and bool(sharding.mesh_sizes())

    def trained(self, params: Mapping) -> dict[str, jax.Array]:
        """Flat: with respect to what the loss is differentiated."""
        held = {p: x for p, x in tree.flatten(params).items() if p not in self.frozen}
        if not self.born_split():
            return held
        infos = self.tuning.trainable
        return {p: jnp.zeros(x.shape, x.dtype, out_sharding=sharding.spec(*infos[p].logical_axes))
                for p, x in held.items()}

    def module(self, trained: Mapping[str, jax.Array], flat: Mapping[str, jax.Array]):
        """The model with the parameters that `trained` and all others make."""
        if self.born_split():
            trained = {p: sharding.WholeWeight(flat[p], x) for p, x in trained.items()}
        return self.model.bind(tree.unflatten(self.tuning.combine({**flat, **trained}, {})))

    def base(self, flat: Mapping[str, jax.Array]):
        """The model that a run is measured by, of all parameters, without a gradient: the frozen copy where
        there is one, else the model under what `tuning` adds."""
        copy = f"{REFERENCE}/{{}}".format
        kept = {p: jax.lax.stop_gradient(flat[copy(p) if copy(p) in flat else p])
                for p in self.tuning.table}
        return self.model.bind(tree.unflatten(kept))


def gradients(of: Differentiated, params: Mapping, batch: Batch, key: jax.Array | None, *,
              scale: jax.Array | float = 1.0, base: Mapping | None = None,
              step: jax.Array | int = 0) -> tuple[dict, Sums]:
    """The gradient of `scale` times the loss of a global batch, and its metrics.

    With micro-batches, accumulated or pipelined, each slice (mesh.slice > 1) adds up gradients
    of its own; only their sums cross the data-centre network, once a step, each device's part
    of them. (The map over slices costs something: XLA then sums over fsdp by all-reduces where
    it would use reduce-scatters. A step of one micro-batch crosses once anyway and goes
    without.)

    Args:
        key: the step's dropout key, None for no dropout.
        base: what `of.tuning` combines `params` with; never differentiated.
        step: before the update, which the weight of unlabelled text may follow.
    Returns:
        Nested gradients of the parameters that train, and {metric: (sum, count)}.
    """
    slices, trained = of.slices(), of.trained(params)
    flat = tree.flatten(params) | tree.flatten(base or {})
    divisors = objectives.totals(of.objective, batch)
    beside = of.unlabelled.totals(batch, step) if of.unlabelled else {}
    if slices > 1:   # each slice's own: what is shared would have its gradients summed at once
        flat, trained = jax.tree.map(lambda x: _copies(x, slices), (flat, trained))

    def part_loss(trained, flat, part):
        part_key = None if key is None else RowKey(key, part[_ROWS])
        part = objectives.with_base(lambda: of.base(flat), part, of.objective)
        module = of.module(trained, flat)
        value, sums = objectives.loss(module, part, part_key, of.objective, divisors,
                                      of.parts * slices)
        if of.unlabelled:
            more, further = of.unlabelled.loss(module, part, key, beside)
            value, sums = value + more, {**sums, **further}
        return value * scale, sums

    def slices_loss(trained, flat, part):
        with sharding.inside("slice"):
            values, sums = jax.vmap(part_loss)(trained, flat, _by_slice(part, slices))
        return jnp.sum(values), sums

    def part_gradients(part):
        loss = part_loss if slices == 1 else slices_loss
        return jax.grad(loss, has_aux=True)(trained, flat, part)

    num_rows = _num_rows(views.labelled(batch))
    batch = {**batch, _ROWS: _numbers(num_rows)}
    if of.unlabelled:
        batch[unlabelled.ROWS] = _numbers(_num_rows(views.part(batch, views.PREFIXES[0])))
    totals, squares = (part_gradients(batch), None) if of.parts == 1 else _accumulated(
        part_gradients, split_batch(batch, of.parts), of.noise_scale,
        frozenset(path for path, x in trained.items() if offload.is_on_host(x)))
    if slices > 1:
        totals = jax.tree.map(sharding.sum_of_copies, totals)
    grads, sums = totals
    if of.noise_scale:
        sums = sums | noise_scale(squares / scale**2, _squares(grads) / scale**2,
                                  of.parts * slices, num_rows)
    return tree.unflatten(grads), sums


def _num_rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def _numbers(count: int) -> jax.Array:
    """0, 1, … of so many rows, where each is."""
    return sharding.shard(jnp.arange(count), "act_batch")


def noise_scale(parts: jax.Array, whole: jax.Array, count: int, rows: int
                ) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Metrics (sum, count) of the gradient noise scale B = tr(Sigma) / |G|^2, in rows (McCandlish et
    al. 2018, arXiv:1812.06162, appendix A.1), with Sigma the covariance of one row's gradient.

    A batch of b rows has E|G_b|^2 = |G|^2 + tr(Sigma) / b, so that two sizes tell both. "noise_scale"
    has tr(Sigma) as its sum and |G|^2 as its count: over steps they add up apart, and the ratio is of
    means. Of few steps it may be negative; "gradient_noise" and "gradient_signal" are the two alone.

    Args:
        parts: the squares' sum of the gradients of `count` equal parts of the batch, each a part of
            the whole's gradient: they add up to it.
        whole: the square of that sum.
    """
    small = count * parts   # |mean gradient of a part|^2, averaged over parts
    signal = (count * whole - small) / (count - 1)
    noise = (small - whole) * rows / (count - 1)
    one = jnp.ones_like(noise)
    return {"noise_scale": (noise, signal), "gradient_noise": (noise, one),
            "gradient_signal": (signal, one)}


def _squares(grads: Mapping[str, jax.Array]) -> jax.Array:
    return sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads))


def _copies(x: jax.Array, slices: int) -> jax.Array:
    """x for every slice: [slices, …], split over the axis of slices."""
    return jax.lax.broadcast(x, (slices,), out_sharding=PartitionSpec(
        "slice", *jax.typeof(x).sharding.spec))


def _added(total: jax.Array, part: jax.Array) -> jax.Array:
    """total + part, where total is kept."""
    add = lambda part, total: total + part.astype(total.dtype)
    return offload.each_layer(add, part, total) if offload.is_on_host(total) else add(part, total)


def _accumulated(part_gradients: Callable, split: Batch, measured: bool, on_host: frozenset[str]
                 ) -> tuple[tuple[dict, Sums], jax.Array | None]:
    """(the float32 sums of part_gradients over micro-batches [parts, …], one after another; where
    measured, the sum of the squares of their gradients).

    on_host: paths of stacks whose gradients arise in the host's memory.
    """
    def accumulate(total, part):
        grads, sums = part_gradients(part)
        added = jax.tree.map(_added, total, (grads, sums))
        return added, _squares(grads) if measured else None

    first = jax.eval_shape(part_gradients, jax.tree.map(lambda x: x[0], split))
    zeros, sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32,
                                                   out_sharding=_spec(x)), first)
    zeros = {p: offload.to_host(x) if p in on_host else x for p, x in zeros.items()}, sums
    totals, squares = jax.lax.scan(accumulate, zeros, split)
    return totals, None if squares is None else jnp.sum(squares)


def _spec(x: jax.ShapeDtypeStruct) -> PartitionSpec | None:
    return None if x.sharding is None or not sharding.mesh_sizes() else x.sharding.spec


def make_gradient_step(of: Differentiated, optimizer: Optimizer, seed: int
                       ) -> Callable[[State, Batch], tuple[dict, Sums]]:
    """(state, batch) -> (gradients of the loss, times its scale; {metric: (sum, count)}), what every
    train step begins with. The metric FILLED counts the positions of the batch that are not padding."""
    def gradient_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        grads, sums = gradients(of, state["params"], batch, key, base=state.get("frozen"),
                                scale=optimizer.loss_scale(state["opt_state"]), step=state["step"])
        return grads, {**sums, FILLED: (_filled(of, batch), jnp.float32(1.0))}
    return gradient_step


def make_train_step(of: Differentiated, optimizer: Optimizer, seed: int, *,
                    skip_bad: bool = False) -> Callable[..., tuple[State, Sums]]:
    """(state, batch, loss_bound=inf) -> (state after one update, {metric: (sum, count)}).

    An objective that draws answers makes several updates of a batch, objective.passes: so many passes
    over as many minibatches, drawn anew for each pass (`shuffled_minibatches`). Learning rates are then those
    of the step, and metrics those of all its updates.

    Metrics are make_gradient_step's and the optimizer's. FINITE is 1 where the parameters and
    moments after the update hold no NaN and no infinity (gradients that overflow under loss scaling
    are skipped by the optimizer and count as finite). The loss speaks of the parameters before it.

    Args:
        skip_bad: leave parameters and optimizer as they were where the update is not finite, the
            loss or the gradients' norm is not, or the loss is above loss_bound; the metric "skipped"
            is then 1.
    """
    gradient_step, layerwise = make_gradient_step(of, optimizer, seed), Layerwise(optimizer)

    def update(state, batch, loss_bound):
        """(state after an update but for its step, (sums, {metric: scalar}))."""
        grads, sums = gradient_step(state, batch)
        on_host = any(map(offload.is_on_host, jax.tree.leaves(state["params"])))
        apply = layerwise.update if on_host else optimizer.update
        params, opt_state, info = apply(grads, state["opt_state"], state["params"], state["step"])
        finite = _all_finite((params, opt_state)) & info.pop(FINITE, True)
        if skip_bad:
            nats, tokens = sums["loss"]
            loss = nats / tokens
            good = finite & jnp.isfinite(loss) & (loss <= loss_bound)
            if "loss_scale" not in info:   # whose overflows are the optimizer's own business
                good &= jnp.isfinite(info["grad_norm"])
            params, opt_state = _choose(good, (params, opt_state),
                                        (state["params"], state["opt_state"]))
            info = {**info, "skipped": jnp.maximum(info.get("skipped", 0.0), 1.0 - good)}
        info = {name: jnp.float32(x) for name, x in {**info, FINITE: finite}.items()}
        return {**state, "params": params, "opt_state": opt_state}, (sums, info)

    def train_step(state, batch, loss_bound=jnp.inf):
        if of.objective.passes == (1, 1):
            state, (sums, info) = update(state, batch, loss_bound)
        else:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state["step"]), _SHUFFLE)
            state, (sums, info) = _updates(update, state, batch, loss_bound, of.objective.passes, key)
        return {**state, "step": state["step"] + 1}, with_info(sums, info)
    return train_step


def shuffled_minibatches(batch: Batch, parts: int, key: jax.Array) -> Batch:
    """[B, …] -> [parts, B / parts, …]: of each `parts` rows that stand side by side every minibatch has one,
    which one is drawn.

    So a minibatch has as many answers to each prompt as another, where as many divide its answers, and rows
    stay on their devices; what is drawn is the same on any mesh.
    """
    groups = next(iter(batch.values())).shape[0] // parts
    order_GP = jax.random.permutation(key, jnp.tile(jnp.arange(parts), (groups, 1)), axis=1, independent=True)

    def drawn(x_PG):
        """x [parts, groups, …], each group's rows in its order."""
        order_PG = sharding.shard(order_GP.T, None, "act_batch")
        chosen = jnp.expand_dims(order_PG, range(2, x_PG.ndim))
        return sum(jnp.where(chosen == part, x_PG[part], 0) for part in range(parts)).astype(x_PG.dtype)
    return jax.tree.map(drawn, split_batch(batch, parts))


def _updates(update: Callable, state: State, batch: Batch, loss_bound, passes: tuple[int, int], key: jax.Array
             ) -> tuple[State, tuple[Sums, dict[str, jax.Array]]]:
    """What `update` makes of the minibatches of each pass, one after another: the last state, the sums of
    all, and the means of the other metrics (FINITE is that of the worst). key: the step's own."""
    epochs, minibatches = passes

    def one(updated, part):
        new, told = update({**state, **updated}, part, loss_bound)
        return {name: new[name] for name in updated}, told

    def one_pass(updated, number):
        return jax.lax.scan(one, updated, shuffled_minibatches(
            batch, minibatches, jax.random.fold_in(key, number)))

    updated, (sums, info) = jax.lax.scan(
        one_pass, {name: state[name] for name in ("params", "opt_state")}, jnp.arange(epochs))
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=(0, 1)), sums)
    info = {name: jnp.min(x) if name == FINITE else jnp.mean(x) for name, x in info.items()}
    return {**state, **updated}, (sums, info)


def _filled(of: Differentiated, batch: Batch) -> jax.Array:
    """int32 scalar: the positions of all sides that are not padding, of unlabelled rows too."""
    rows = data_rows.of(of.objective.learned)
    parts = [views.labelled(batch)]
    if of.unlabelled:
        parts += [views.part(batch, prefix) for prefix in views.PREFIXES[:len(of.unlabelled.drops)]]
    return sum(_filled_of(rows, part) for part in parts)


def _filled_of(rows: data_rows.Rows, batch: Batch) -> jax.Array:
    total = jnp.int32(0)
    for side in rows.made:
        if side in rows.reading_sides or f"{side}_segment_ids" in batch:
            held = masks.read_segments(batch, side) != 0
        else:
            held = masks.up_to_the_last(batch["decoder_loss_weights"])
        total += jnp.sum(held, dtype=jnp.int32)
    return total


def _all_finite(updated: Any) -> jax.Array:
    """bool scalar: no NaN or infinity in any float array of the tree that the device keeps.

    Scalars of an optimizer may be infinite by design (the best loss so far). Moments in the
    host's memory are not read for this: they are finite where the parameters made of them are.
    """
    checked = [x for x in jax.tree.leaves(updated)
               if jnp.issubdtype(x.dtype, jnp.inexact) and x.ndim and not offload.is_on_host(x)]
    if not checked:
        return jnp.bool(True)
    # Behind the barrier nothing of the update is computed another way for being looked at.
    return precision.all_finite(jax.lax.optimization_barrier(checked))


def _choose(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `good`, else `old`, leaf by leaf, where each is kept."""
    def pick(new, old):
        kept_on_host = offload.is_on_host(old)
        if not kept_on_host:
            return jnp.where(good, new, old)
        return offload.at_once(lambda new, old: jnp.where(good, offload.to_device(new), old),
                               new, old)
    return jax.tree.map(pick, new, old)


def make_eval_step(model: ModelDefinition, objective: ObjectiveConfig
                   ) -> Callable[[Mapping, Batch, jax.Array], Sums]:
    """(params, batch, bytes of each token) -> {metric: (sum, count)}, no dropout.

    `bytes` is the pair (bytes of the targets' text, 1 a target): what bits per byte divides by.
    """
    def eval_step(params, batch, token_bytes):
        _, sums = objectives.held_out_loss(model.bind(params), batch, objective)
        weights = batch["decoder_loss_weights"]
        lengths = sharding.lookup(token_bytes, batch["decoder_target_tokens"],
                                  ("act_batch", "act_length"))
        return {**sums, "bytes": (jnp.sum(lengths * weights), jnp.sum(weights))}
    return eval_step


def make_graded_step(model: ModelDefinition, classes: Unlabelled) -> Callable[[Mapping, Batch], Sums]:
    """(params, batch of data.batches.graded_batches) -> {metric: (sum, count)}, see Unlabelled.graded."""
    def graded_step(params, batch):
        return classes.graded(model.bind(params), batch)
    return graded_step


def make_decode_step(model: ModelDefinition, config: DecodeConfig,
                     logits_fn: LogitsFn | None = None) -> Callable[[Mapping, Batch], Decoded]:
    """(params, batch) -> Decoded; an encoder-decoder reads encoder_input_tokens.

    Optional in the batch: decoder_prompt_tokens int32 [B, P], left-aligned, and
    decoder_prompt_lengths int32 [B], which the output continues. A decoder-only model needs
    them; an encoder-decoder's default is its start token, model.decoder_start_id. decoder_prefix
    [B, P] marks a prefix LM's prompt, row_ids int32 [B] names the rows for sampling.

    A decoder with scan=False is unrolled here as well: see
    language_model.Model.with_layers_apart.

    logits_fn: changes the next token's logits; None: what config.logits_fn names.
    """
    logits_fn = logits_fn or load_logits_fn(config.logits_fn)

    def decode_step(params, batch):
        # A token at a time has no length to split.
        rules = sharding.active_rules().replace(act_length=(), act_norm_length=())
        with sharding.using(rules):
            return decode(params, {name: sharding.shard(x, *_FEATURE_AXES[:x.ndim])
                                   for name, x in batch.items()})

    def decode(params, batch):
        staged = any(sharding.mesh_sizes().get(axis, 1) > 1
                     for axis in sharding.active_rules().mesh_axes("layers"))
        if model.config.decoder.scan or staged:
            module = model.bind(params)
        else:
            apart, cut = model.with_layers_apart(params)
            module = apart.bind(cut)
        inputs = batch.get("encoder_input_tokens")
        if "decoder_prompt_tokens" in batch:
            prompt, lengths = batch["decoder_prompt_tokens"], batch["decoder_prompt_lengths"]
        else:
            prompt = jnp.full_like(inputs[:, :1], model.config.decoder_start_id)
            lengths = jnp.ones_like(inputs[:, 0])
        slots = prompt.shape[1] + config.max_length
        read = {"encoder_input_tokens": inputs, "decoder_input_tokens": prompt}
        for name in ("decoder_prefix", "encoder_segment_ids", "encoder_mask"):
            if name in batch:
                read[name] = batch[name]
        cache = module.init_cache(read, slots)
        # Made once, and kept with each token's weights in a row: so few rows of x multiply them
        # a third faster on CPU than across the rows of the kernel.
        head = module.head_params()
        turned = jax.lax.optimization_barrier(head["kernel"].T)

        def decode_fn(tokens, cache, counts=None):
            return module.decode(tokens, cache, {**head, "kernel": turned.T}, counts)
        return decoding.decode(decode_fn, take_rows, cache, prompt, lengths, config,
                               batch.get("row_ids"), logits_fn)
    return decode_step
