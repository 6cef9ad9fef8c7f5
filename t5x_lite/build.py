"""From a run's config and the devices to everything that runs: the one place they meet.

train, eval, infer and plan all call `build`, so what is rehearsed is what trains. All
errors that a config can hold are raised here, before anything is allocated or compiled.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from t5x_lite import errors, tree
from t5x_lite.config import RunConfig
from t5x_lite.cost import flops, hardware
from t5x_lite.data import rows as data_rows, views
from t5x_lite.errors import UserError, multiple_of
from t5x_lite.layers import fp8, moe
from t5x_lite.models import language_model, parametrization, room
from t5x_lite.models.blocks import MIXERS
from t5x_lite.models.language_model import Model
from t5x_lite.models.params import ParamInfo
from t5x_lite.models.peft import Tuning
from t5x_lite.parallel import disk, offload, pipeline, sharding
from t5x_lite.parallel.offload import ON_DEVICE
from t5x_lite.parallel.sharding import Rules
from t5x_lite.running import counts
from t5x_lite.training import draw_checks, objectives, precision, state, steps, unlabelled
from t5x_lite.training.layerwise import Layerwise, held_of
from t5x_lite.training.optimizers import EMA, Optimizer, make_optimizer, until
from t5x_lite.training.streamed import StreamedStep
from t5x_lite.training.unlabelled import Unlabelled


@dataclasses.dataclass(frozen=True)
class Program:
    """A run that is ready to be compiled."""

    config: RunConfig
    mesh: Mesh
    rules: Rules
    policy: precision.Policy
    model: Model
    optimizer: Optimizer
    tuning: Tuning                       # what trains of the model, and how the whole is made of it
    abstract_state: state.State          # ShapeDtypeStructs with shardings
    batch_sharding: NamedSharding        # of every [B, L] input
    differentiated: steps.Differentiated   # what train_step takes the gradient of
    train_step: Callable                 # (state, batch) -> (state, sums), not yet jitted
    eval_step: Callable                  # (params, batch, token_bytes) -> sums
    # (params, batch of data.batches.graded_batches) -> sums; None: data.classes names none.
    graded_step: Callable | None
    # What evaluation and decoding read: the whole model's parameters, nested ShapeDtypeStructs.
    abstract_params: dict
    merge_changed: Callable              # (trainable, frozen) -> {path: what models/peft.py computes}

    @property
    def table(self) -> dict[str, ParamInfo]:
        """The parameter table of the model."""
        return self.model.table

    @property
    def trainable(self) -> Mapping[str, ParamInfo]:
        """The parameter table of state["params"]: the model's own, or what models/peft.py leaves of it
        and adds."""
        return self.optimizer.table

    @property
    def num_trainable(self) -> int:
        """Numbers in state["params"]."""
        return sum(info.size for info in self.trainable.values())

    @property
    def num_params(self) -> int:
        """All parameters."""
        return sum(info.size for info in self.table.values())

    @property
    def num_non_embedding_params(self) -> int:
        """Parameters less the token and position tables (Kaplan et al. 2020)."""
        return sum(i.size for i in self.table.values()
                   if not {"vocab", "position"} & set(i.logical_axes))

    @property
    def lengths(self) -> tuple[int, int]:
        """Positions a row has on the encoder's and the decoder's side."""
        return _lengths(self.config)

    @property
    def tokens_per_sequence(self) -> int:
        """Positions of one row, padding included, and of the unlabelled rows that go with it."""
        return sum(self.lengths) + sum(
            self.config.data.unlabelled_ratio * sum(lengths) for lengths, _ in self._views)

    @property
    def flops_per_sequence(self) -> float:
        """Model FLOPs of forward and backward of one row, from the structure: what MFU counts."""
        return sum(self.step_flops(1).values())

    @property
    def row_cost(self) -> counts.RowCost:
        """What one row costs, by every way of counting that a run records."""
        parts = self.step_flops(1)
        half = self.step_flops(1, causal_half=True)
        drawn, drawn_half = (flops.drawing_flops_a_row(self.config, self.lengths, only) for only in (False, True))
        total, tokens = sum(parts.values()) + drawn.total, self.tokens_per_sequence
        found = self._counted
        return counts.RowCost(
            tokens, total, sum(half.values()) + drawn_half.total, total - parts["logits"] - drawn.logits,
            flops.six_nd(found.non_embedding_active + found.head, tokens))

    @property
    def parameter_counts(self) -> dict[str, int | float]:
        """The parameters by every way of counting, as running/counts.py names them."""
        found = self._counted
        return {"params": found.total, "params_no_embed": found.non_embedding,
                "params_no_embed_head": found.non_embedding + found.head,
                "params_active": found.active}

    @property
    def _counted(self) -> flops.ParameterCounts:
        return flops.parameter_counts(self.config.model, self.table, length=self.lengths[-1] or
                                      self.lengths[0])

    @property
    def _trained(self) -> frozenset[str]:
        return frozenset(self.trainable.keys() - self.optimizer.frozen)

    def step_flops(self, rows: int, least: bool = False, causal_half: bool = False
                   ) -> dict[str, float]:
        """Model FLOPs of a step over so many rows by part, see cost.flops.step_flops; of the views of
        the unlabelled rows that go with them too, a forward pass alone where one has no gradient."""
        ratio = self.config.data.unlabelled_ratio
        passes = [(rows, self.lengths, self._trained)]
        passes += [(ratio * rows, lengths, trained) for lengths, trained in self._views]
        total: collections.Counter[str] = collections.Counter()
        for count, lengths, trained in passes:
            total.update(flops.step_flops(self.config.model, self.table, trained, count, *lengths,
                                          least=least, causal_half=causal_half))
        return dict(total)

    @property
    def _views(self) -> list[tuple[tuple[int, int], frozenset[str]]]:
        """See Unlabelled.passes; [] without unlabelled text."""
        term, config = self.differentiated.unlabelled, self.config
        kind = data_rows.of(config.objective.rows)
        return term.passes(kind, config.data, self._trained) if term else []

    @property
    def bubbles(self) -> dict[str, float]:
        """The share of idle stage-ticks in each stack's layers; {} without a pipeline."""
        stages, model = self.mesh.shape["stage"], self.config.model
        stacks = {"encoder": model.encoder, "decoder": model.decoder}
        return {} if stages == 1 else {
            side: stack.pipeline.plan(stages).bubble
            for side, stack in stacks.items() if stack is not None}

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """The context in which steps are traced."""
        with sharding.activate(self.mesh, self.rules), fp8.matmuls(self.policy.fp8):
            yield

    def init_state(self) -> state.State:
        """Fresh parameters and optimizer state, drawn shard by shard."""
        init = jax.jit(lambda: disk.instead(
            state.init(self.model, self.optimizer, self.tuning, self._key,
                       copies=self.config.objective.copies_base), self.abstract_state),
            out_shardings=state.shardings(self.abstract_state))
        return self._filled(init())

    def init_params(self) -> dict:
        """The fresh parameters of the whole model alone: those that init_state starts from."""
        return jax.jit(lambda: self.model.init(self._key),
                       out_shardings=state.shardings(self.abstract_params))()

    def start(self, params: Mapping, trained: Mapping | None = None) -> state.State:
        """The state of step 0 from parameters of the whole model, which it consumes.

        trained: state["params"], where it is not to be what models/peft.py starts with.
        """
        start = jax.jit(lambda params, trained: disk.instead(state.start(
            params, self.optimizer, self.tuning,
            jax.random.fold_in(self._key, 1), trained,
            copies=self.config.objective.copies_base), self.abstract_state),
            donate_argnums=0, out_shardings=state.shardings(self.abstract_state))
        with self.activate():
            return self._filled(start(params, trained))

    def _filled(self, fresh: state.State) -> state.State:
        """A state of step 0 whose optimizer state on disk is made, a moment at a time."""
        for name, arrays in held_of(self.abstract_state["opt_state"]).items():
            if disk.kept(arrays):
                moment = jax.jit(lambda params, name=name: tree.flatten(
                    self.optimizer.init(params)[name]), out_shardings={
                        path: place.sharding for path, place in arrays.items()})
                for path, values in moment(fresh["params"]).items():
                    arrays[path].fill(values)
        return fresh

    def gathered(self, params: Mapping) -> dict:
        """The parameters, which it consumes, whole on every device of the fsdp axis: what decodes
        token by token must not gather them at every step. Those in the host's memory stay there."""
        if self.config.sharding.places.params == "host":
            return params
        flat = tree.flatten(params)
        places = {path: self.rules.spec(info.logical_axes, dict(self.mesh.shape),
                                        drop=sharding.GATHERED_AXES)
                  for path, info in self.table.items()}
        gather = jax.jit(lambda flat: {path: jax.sharding.reshard(x, places[path])
                                       for path, x in flat.items()}, donate_argnums=0)
        with self.activate():
            return tree.unflatten(gather(flat))

    def evaluated_params(self, state: state.State) -> dict:
        """The whole model's parameters that evaluation and samples use: with the moving average in the
        place of what trains, where the run keeps one and eval.ema asks for it. That is a copy of them
        on the devices."""
        if EMA not in state["opt_state"] or not self.config.eval.ema:
            return self.whole_params(state)
        with self.activate():
            averaged = self._averaged(state["params"], disk.read(state["opt_state"][EMA]))
        return self.whole_params({**state, "params": averaged})

    @functools.cached_property
    def _averaged(self) -> Callable:
        def averaged(params, average):
            flat = tree.flatten(params)   # parameters that optimizer.groups freeze have no average
            return tree.unflatten(flat | {
                path: sharding.place_like(offload.to_device(x), flat[path]).astype(flat[path].dtype)
                for path, x in tree.flatten(average).items()})
        return jax.jit(averaged, out_shardings=state.shardings(self.abstract_state["params"]))

    def whole_params(self, state: state.State) -> dict:
        """The whole model's parameters: what was trained and what was frozen, merged."""
        if "frozen" not in state:
            return state["params"]
        flat = tree.flatten(state["frozen"]) | tree.flatten(state["params"])
        with self.activate():
            flat |= self.merge_changed(state["params"], state["frozen"])
        return tree.unflatten({path: flat[path] for path in self.table})

    @property
    def _key(self) -> jax.Array:
        return jax.random.key(self.config.train.seed)

    def jit_train_step(self) -> Callable:
        """The compiled-on-first-call train step; donates the state."""
        if disk.kept(self.abstract_state):
            return self._streamed
        return jax.jit(self.train_step, donate_argnums=0,
                       out_shardings=(state.shardings(self.abstract_state), None))

    @functools.cached_property
    def _streamed(self) -> StreamedStep:
        return StreamedStep(
            steps.make_gradient_step(self.differentiated, self.optimizer, self.config.train.seed),
            Layerwise(self.optimizer), self.abstract_state)

    def largest_program(self) -> Callable:
        """The train step; where it is several programs, that of the gradients: it holds what the others
        hold, but for the moments of a layer."""
        streamed = disk.kept(self.abstract_state)
        return self._streamed.gradients if streamed else self.jit_train_step()

    def compile_train_step(self, rows: int) -> Callable:
        """The train step for batches of so many rows, compiled now; called as jit_train_step's."""
        guard = (jax.ShapeDtypeStruct((), jnp.float32),) \
            if self.config.train.bad_steps == "skip" else ()
        with self.activate():
            if disk.kept(self.abstract_state):
                return self._streamed.compile(self.abstract_state, self.abstract_batch(rows))
            return self.jit_train_step().lower(
                self.abstract_state, self.abstract_batch(rows), *guard).compile()

    def abstract_batch(self, rows: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """What one step learns from as ShapeDtypeStructs with shardings; rows: of the data, None for a full
        batch."""
        objective, data = self.config.objective, self.config.data
        rows = (rows or self.config.train.global_batch_size) * objective.per_row
        kind = data_rows.of(objective.learned)
        return {name: jax.ShapeDtypeStruct((rows * ratio, length), jnp.dtype(dtype),
                                           sharding=self.batch_sharding)
                for ratio, arrays in ((1, kind.arrays(data)), views.arrays(kind, data))
                for name, (length, dtype) in arrays.items()}


def build(config: RunConfig, devices: Sequence[jax.Device] | None = None) -> Program:
    """Everything that a run needs, allocated nowhere yet.

    Raises:
        UserError: whatever in the config cannot be, naming the field and the fix.
    """
    errors.check(config)   # a config made in Python has not come through the door
    policy = precision.policy(config.precision)
    language_model.validate(config.model)
    objectives.validate(config.objective, config.model.architecture, config.model.scalar_head)
    mesh = sharding.make_mesh(config.mesh, devices)
    _check_fp8(policy, mesh)
    rules = Rules({**sharding.DEFAULT_RULES, **config.sharding.rules})
    if config.sharding.sequence_parallel:
        rules = rules.replace(act_norm_length=(*rules.mesh_axes("act_norm_length"), "tensor"))
    _check_train(config, mesh, rules)
    _check_rows(config)
    views.validate(config.data, data_rows.of(config.objective.rows), config.objective.name)
    unlabelled.validate(config.objective.unlabelled, config.data)
    _check_pipelines(config, mesh, rules)
    _check_lengths(config, mesh, rules)
    _check_mixers(config, mesh)
    room.check(config)
    with sharding.activate(mesh, rules):
        _check_mixtures(config)
    model = Model(config.model, jnp.dtype(policy.compute_dtype), jnp.dtype(policy.param_dtype))
    table = model.table
    tuning = Tuning(table, config.peft)
    objectives.check_reference(config.objective, config.peft, tuning)
    state.check_divisible({**table, **tuning.trainable}, mesh, rules)
    optimizer = make_optimizer(until(config.optimizer, config.train.num_steps),
                               tuning.trainable, policy, config.loss_scale,
                               seed=config.train.seed,
                               width=parametrization.width_ratio(config.model),
                               ema_decay=config.train.ema_decay)
    if config.sharding.places != ON_DEVICE:
        optimizer.check_offload("sharding.offload_optimizer=True" if config.sharding.offload_optimizer
                                else f"sharding.offload={config.sharding.offload}")
        _check_places(config, policy, mesh)
    classes = Unlabelled.of(config.objective.unlabelled, config.data, config.objective.logits_chunk)
    differentiated = steps.Differentiated(
        model, config.objective, tuning, optimizer.frozen, config.train.accumulation,
        config.sharding.zero, config.train.noise_scale, classes if config.data.unlabelled else None)
    return Program(
        config=config, mesh=mesh, rules=rules, policy=policy, model=model, optimizer=optimizer,
        abstract_state=state.abstract(model, optimizer, mesh, rules, tuning,
                                      config.sharding.zero, config.sharding.places,
                                      config.sharding.offload_folder, config.objective.copies_base),
        abstract_params=state.abstract_params(model, mesh, rules, config.sharding.zero,
                                              config.sharding.places),
        tuning=tuning, merge_changed=jax.jit(tuning.merged),
        batch_sharding=sharding.named_sharding(mesh, rules, ("act_batch", "act_length")),
        differentiated=differentiated,
        train_step=steps.make_train_step(differentiated, optimizer, config.train.seed,
                                         skip_bad=config.train.bad_steps == "skip"),
        eval_step=steps.make_eval_step(model, config.objective),
        graded_step=steps.make_graded_step(model, classes) if classes else None)


def _check_fp8(policy: precision.Policy, mesh: Mesh) -> None:
    device = mesh.devices.flat[0]
    if not policy.fp8 or device.platform == "cpu":
        return
    able = [chip.name for chip in hardware.CHIPS.values() if "fp8" in chip.peak_flops]
    if device.device_kind not in {
            kind for name in able for kind in hardware.CHIPS[name].device_kinds}:
        raise UserError(f"precision=fp8: a {device.device_kind!r} has no 8-bit float products, or "
                        f"none that this program knows of; {', '.join(able)} have (and the CPU, "
                        f"which only imitates them). Use precision=bf16.")


def _check_places(config: RunConfig, policy: precision.Policy, mesh: Mesh) -> None:
    """What arrays that visit the device a layer at a time cannot be combined with."""
    places, model = config.sharding.places, config.model
    visits = f"sharding.offload={config.sharding.offload}"
    if places.opt_state == "host" and places.params == "device":
        return
    stacks = {f"model.{side}": stack for side in ("encoder", "decoder")
              if (stack := getattr(model, side)) is not None}
    refusals = [
        (mesh.shape["stage"] > 1, f"mesh.stage={mesh.shape['stage']}", "mesh.stage=1 and mesh.fsdp"),
        (model.has_mixtures, "mixtures of experts", "sharding.offload=optimizer_host"),
        (jax.process_count() > 1, f"{jax.process_count()} processes", "sharding.offload=optimizer_host"),
        (config.train.bad_steps == "skip", "train.bad_steps=skip, which needs the state before the step",
         "train.bad_steps=stop"),
        (policy.stochastic_rounding, f"precision={config.precision}, whose rounding is of whole arrays",
         "precision=bf16"),
    ]
    if places.params == "host":
        refusals += [
            (policy.loss_scaling, f"precision={config.precision}", "precision=bf16"),
            (config.peft.method != "none", f"peft.method={config.peft.method}", "sharding.offload=optimizer_host"),
            (mesh.shape["slice"] > 1, f"mesh.slice={mesh.shape['slice']}", "sharding.offload=optimizer_host"),
            (config.train.noise_scale, "train.noise_scale=True", "train.noise_scale=False"),
            (config.sharding.zero == 2, "sharding.zero=2", "sharding.zero=3"),
            *((not stack.scan, f"{name}.scan=False", f"{name}.scan=True") for name, stack in stacks.items()),
            *((stack.remat == "none" or stack.remat.startswith("recompute"),
               f"{name}.remat={stack.remat}, which keeps what is fetched", f"{name}.remat=full")
              for name, stack in stacks.items())]
    for refused, what, fix in refusals:
        if refused:
            raise UserError(f"{visits} cannot be combined with {what}: set {fix}.")


def _lengths(config: RunConfig) -> tuple[int, int]:
    lengths = data_rows.of(config.objective.learned).lengths(config.data)
    return lengths.get("encoder", 0), lengths.get("decoder", 0)


def _check_train(config: RunConfig, mesh: Mesh, rules: Rules) -> None:
    train = config.train
    ways = _ways(mesh, rules, "act_batch")
    _check_batch("train.global_batch_size", train.global_batch_size, config, ways)
    for i, (size, _) in enumerate(train.batch_ramp.stages):
        field = f"train.batch_ramp.stages[{i}]"
        multiple_of(field, size, config.data.num_shards, "as many shards (data.num_shards)")
        _check_batch(field, size, config, ways)
    multiple_of("eval.batch_size", config.eval.batch_size, ways,
                "the ways that the mesh splits a batch (0: train.global_batch_size)")


def _check_batch(field: str, size: int, config: RunConfig, ways: int) -> None:
    accumulation, objective = config.train.accumulation, config.objective
    split = f"{accumulation} micro-batches (train.accumulation) x {ways} ways that the mesh splits a batch"
    if not objective.draws:
        multiple_of(field, size, ways * accumulation, split)
        return
    multiple_of(field, size, ways, f"the {ways} ways that the mesh splits a batch")
    rows, updates = size * objective.per_row, objective.passes[1]
    multiple_of(f"{field} x objective.rollout.answers", rows, ways * accumulation * updates,
                f"{updates} minibatches (objective.rollout.minibatches) x {split}")


def _check_rows(config: RunConfig) -> None:
    """What the objective's rows and a soft prompt ask of the data."""
    rows = data_rows.of(config.objective.given)
    if config.data.packing and not rows.packs:
        raise UserError(f"objective.name={config.objective.name!r} has a whole row for one example: "
                        "set data.packing=False.")
    draw_checks.check_draws(config)
    prompt, rows = config.model.prompt_length, data_rows.of(config.objective.learned)
    if prompt and (config.data.packing or rows.marks_inputs or rows.cuts_prompt):
        raise UserError(f"model.prompt_length={prompt} stands before a row that holds one example "
                        "and, in a decoder, is read from left to right: set data.packing=False, "
                        "and objective.name=lm for prefix_lm; dpo has no room for it.")


def _check_pipelines(config: RunConfig, mesh: Mesh, rules: Rules) -> None:
    """What the mesh's stages ask of the stacks and the batches."""
    ways, train, objective = _ways(mesh, rules, "act_batch"), config.train, config.objective
    parts = train.accumulation * objective.passes[1]
    sizes = (train.global_batch_size, *(size for size, _ in train.batch_ramp.stages))
    for side in ("encoder", "decoder"):
        stack = getattr(config.model, side)
        if stack is None:
            continue
        repeats = [segment.repeats for segment in stack.segments]
        for size in sizes:
            pipeline.validate(stack.pipeline, f"model.{side}", mesh.shape["stage"], repeats,
                              size * objective.per_row // parts, ways)


def _check_lengths(config: RunConfig, mesh: Mesh, rules: Rules) -> None:
    """What the mesh axes that split a length ask of it, and of a prompt before it."""
    prompt, (inputs, targets) = config.model.prompt_length, _lengths(config)
    sides = (("inputs_length", inputs, prompt if inputs else 0),
             ("targets_length", targets, 0 if inputs else prompt))
    for name, length, before in sides:
        for axis in ("act_length", "act_norm_length"):
            ways = _ways(mesh, rules, axis)
            why = f"{axis} is split over mesh axes {' and '.join(rules.mesh_axes(axis))}"
            multiple_of("model.prompt_length", before, ways, f"like data.{name}, {why}")
            multiple_of(f"data.{name}", length, ways, why)


def _check_mixers(config: RunConfig, mesh: Mesh) -> None:
    """What rows and the mesh may not ask of layers that do not attend."""
    for side in ("encoder", "decoder"):
        stack = getattr(config.model, side)
        kinds = [b.mixer.kind for s in (stack.segments if stack else ()) for b in s.blocks
                 if not MIXERS[b.mixer.kind].attends]
        if not kinds:
            continue
        where = f"model.{side} has layers of mixer.kind={kinds[0]!r}, which"
        if mesh.shape["sequence"] > 1:
            raise UserError(f"mesh.sequence={mesh.shape['sequence']} splits rows, and {where} read them "
                            "token after token: set mesh.sequence=1.")
        if side == "decoder" and data_rows.of(config.objective.rows).marks_inputs:
            raise UserError(f"objective.name={config.objective.name!r} reads inputs both ways, and {where} "
                            "read from left to right: set objective.name=lm.")


def _ways(mesh: Mesh, rules: Rules, axis: str) -> int:
    """Into how many parts the mesh splits a logical axis."""
    return math.prod(mesh.shape[a] for a in rules.mesh_axes(axis))


def _check_mixtures(config: RunConfig) -> None:
    """What lengths, mesh and micro-batches ask of the mixtures of experts."""
    split = config.train.accumulation > 1 or sharding.mesh_sizes().get("stage", 1) > 1
    for side, length in zip(("encoder", "decoder"), _lengths(config), strict=True):
        stack = getattr(config.model, side)
        for i, segment in enumerate(stack.segments if stack else ()):
            for j, block in enumerate(segment.blocks):
                if block.moe is not None:
                    moe.validate(block.moe, f"model.{side}.segments[{i}].blocks[{j}].moe",
                                 causal=stack.causal, length=length, split=split)
