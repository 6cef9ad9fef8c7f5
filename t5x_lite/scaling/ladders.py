"""Ladders: the runs that identify a scaling law, solved from budgets.

A design says which (N, C) or (N, D) to train. Shapes come from one rule of depth and width, the
batch and the learning rate from a rule of the budget, the steps from the FLOPs as cost/flops.py
counts them (with the head, causal attention whole):

    isoflop   at each of --budgets models of --sizes sizes about the size that spends --ratio tokens
              a parameter, --factor apart (Hoffmann et al. 2022, approach 2)
    kaplan    N and D apart: --params models on the most of --tokens, and the largest of them on
              each of --tokens (Kaplan et al. 2020, L(N) and L(D))
    ratio     --params models on --ratio tokens a parameter each
    cooldown  --params models on each of --tokens: one run at a constant rate that cools down at the
              most tokens, and branches of it that cool down at the others; a branch costs its
              cool-down alone (Hägele et al. 2024)

N here is kernels with the head, what runs record as params_no_embed_head less norms and biases.
"""

import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from t5x_lite import config as configs, files
from t5x_lite.config import RunConfig
from t5x_lite.cost import flops
from t5x_lite.data import rows as data_rows
from t5x_lite.errors import UserError, at_least, between, one_of, positive
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig

PLAN = "ladder.json"              # what a folder of a ladder says of itself
PREDICTION = "prediction.json"    # written before the predicted run is trained
PREDICTED = "predicted"           # its arm


@dataclasses.dataclass(frozen=True)
class Ladder:
    """What a ladder is solved from."""

    design: str = "isoflop"           # a key of DESIGNS
    budgets: tuple[float, ...] = ()   # FLOPs, isoflop
    sizes: int = 5                    # models of a budget, isoflop
    factor: float = 2.0               # between one size and the next, isoflop
    params: tuple[float, ...] = ()    # sizes: kaplan, ratio, cooldown
    tokens: tuple[float, ...] = ()    # positions: kaplan, cooldown
    ratio: float = 20.0               # tokens a parameter: isoflop's middle, ratio's runs
    seeds: int = 1
    aspect: float = 32.0              # width over layers
    unit: int = 0                     # widths are multiples of it; 0: of the config's head dim
    rule: str = "deepseek"            # of batch and learning rate, a key of RULES
    rate_factor: float = 1.0          # on the rule's learning rate
    warmup: float = 0.1               # share of the steps
    decay: float = 0.2                # share of the steps that a cool-down takes
    evaluations: int = 5              # of each run, the last at its end
    multiple: int = 1                 # of it are a step's rows: of the number of devices

    def __post_init__(self):
        one_of("--design", self.design, DESIGNS)
        one_of("--rule", self.rule, RULES)
        for name in ("budgets", "params", "tokens"):
            values = tuple(sorted(getattr(self, name)))
            object.__setattr__(self, name, values)
            for value in values:
                positive(f"--{name}", value)
        for name in ("sizes", "seeds", "evaluations", "multiple"):
            at_least(f"--{name}", getattr(self, name), 1)
        at_least("--unit", self.unit, 0)
        positive("--ratio", self.ratio)
        positive("--aspect", self.aspect)
        positive("--rate_factor", self.rate_factor)
        between("--factor", self.factor, 1, 100, open_below=True)
        between("--warmup", self.warmup, 0, 1, open_above=True)
        between("--decay", self.decay, 0, 1, open_below=True, open_above=True)
        for name, fewest, why in DESIGNS[self.design].needs:
            if len(getattr(self, name)) < fewest:
                raise UserError(f"--design={self.design} needs --{name} with {fewest} or more values "
                                f"({why}), as in --{name}={DESIGNS[self.design].example}.")


@dataclasses.dataclass(frozen=True)
class Rung:
    """One run of a ladder."""

    arm: str
    seed: int
    config: RunConfig
    params: float         # N
    tokens: float         # D, positions
    flops: float          # C, of the whole run
    own_flops: float      # of what it trains itself: a branch its cool-down alone
    stage: str = ""
    after: str = ""       # the stage whose checkpoint of step `at` it goes on from
    at: int = 0


# --- shapes -----------------------------------------------------------------------------------------

def kernels(model: ModelConfig) -> float:
    """Weights that one position of each side is multiplied by, the head included."""
    once = flops.forward_flops(model, 1, 1 if model.encoder else 0, 1 if model.decoder else 0)
    return (once.total - once.attention) / 2


def resized(base: ModelConfig, width: int, aspect: float) -> ModelConfig:
    """The model at another width: as many heads and as wide an MLP for it as the base has, and a layer
    for every `aspect` of width (at least one of each kind).

    Raises:
        UserError: a base whose stacks have several segments.
    """
    def stack(old: StackConfig | None) -> StackConfig | None:
        if old is None:
            return None
        if len(old.segments) != 1:
            raise UserError(f"a ladder resizes stacks of one segment, and {base.architecture} here "
                            f"has {len(old.segments)}: give a config whose layers are all alike.")
        [segment] = old.segments
        blocks = tuple(_block(block, width, base.embed_dim) for block in segment.blocks)
        repeats = max(1, round(width / aspect / len(blocks)))
        return dataclasses.replace(old, segments=(dataclasses.replace(
            segment, blocks=blocks, repeats=repeats),))
    return dataclasses.replace(base, embed_dim=width, encoder=stack(base.encoder),
                               decoder=stack(base.decoder))


def _block(block: BlockConfig, width: int, base_width: int) -> BlockConfig:
    def attention(old):
        if old is None:
            return None
        heads = max(1, width // old.head_dim)
        groups = old.num_heads // old.kv_heads
        kv = 0 if groups == 1 else max(1, heads // groups)
        return dataclasses.replace(old, num_heads=kv * groups if kv else heads, num_kv_heads=kv)

    def mlp(old):
        return old and dataclasses.replace(old, mlp_dim=max(1, round(old.mlp_dim * width / base_width)))

    moe = block.moe and dataclasses.replace(block.moe, mlp=mlp(block.moe.mlp))
    return dataclasses.replace(block, self_attention=attention(block.self_attention),
                               cross_attention=attention(block.cross_attention),
                               mlp=mlp(block.mlp), moe=moe)


def shapes(base: RunConfig, ladder: Ladder, most: float) -> list[tuple[float, ModelConfig]]:
    """(N, model) of every width of the ladder's unit, up to the first above `most` parameters."""
    stack = base.model.decoder or base.model.encoder
    unit = ladder.unit or stack.segments[0].blocks[0].self_attention.head_dim
    found, width = [], 0
    while not found or found[-1][0] <= most:
        width += unit
        model = resized(base.model, width, ladder.aspect)
        found.append((kernels(model), model))
    return found


def nearest_shapes(base: RunConfig, ladder: Ladder, wanted: Sequence[float]
                   ) -> list[tuple[float, ModelConfig]]:
    """The shape whose size is nearest to each that is wanted, another one where it is taken; rising."""
    known = shapes(base, ladder, max(wanted))
    known = shapes(base, ladder, 2 * known[-1][0])   # others, where some are taken
    left = list(range(len(known)))
    for size in sorted(wanted, reverse=True):
        left.remove(min(left, key=lambda i: abs(math.log(known[i][0] / size))))
    return [shape for i, shape in enumerate(known) if i not in left]


# --- batch, rate and steps --------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Rule:
    """Learning rate and batch (positions) of a run of N parameters, D positions and C FLOPs."""

    rate: Callable[[float, float, float], float]
    batch: Callable[[float, float, float], float]
    source: str


# "base" keeps what the config says: None.
RULES: dict[str, Rule | None] = {
    "base": None,
    "deepseek": Rule(lambda n, d, c: 0.3118 * c**-0.125, lambda n, d, c: 0.292 * c**0.3271,
                     "Bi et al. 2024 (DeepSeek LLM), section 3.1"),
    "step_law": Rule(lambda n, d, c: 1.79 * n**-0.713 * d**0.307, lambda n, d, c: 0.58 * d**0.571,
                     "Li et al. 2025 (Step Law)")}


def _lengths(base: RunConfig) -> tuple[int, int]:
    lengths = data_rows.of(base.objective.rows).lengths(base.data)
    return lengths.get("encoder", 0), lengths.get("decoder", 0)


def _recipe(base: RunConfig, ladder: Ladder, params: float, tokens: float, compute: float
            ) -> tuple[int, float]:
    """(rows a step, peak learning rate)."""
    rule, unit = RULES[ladder.rule], math.lcm(base.data.num_shards, ladder.multiple)
    if rule is None:
        return base.train.global_batch_size, \
            base.optimizer.schedule.base_learning_rate * ladder.rate_factor
    rows = rule.batch(params, tokens, compute) / sum(_lengths(base))
    return unit * max(1, round(rows / unit)), \
        rule.rate(params, tokens, compute) * ladder.rate_factor


def rung(base: RunConfig, ladder: Ladder, model: ModelConfig, arm: str, seed: int, *,
         tokens: float = 0.0, compute: float = 0.0, factors: str = "") -> Rung:
    """The run of a model on so many positions, or on so many FLOPs.

    factors: of the schedule; "": warm-up and a cosine to a tenth.

    Raises:
        UserError: fewer than 10 steps.
    """
    lengths, params = _lengths(base), kernels(model)
    row_flops = flops.train_flops(model, 1, *lengths)
    tokens = tokens or compute / row_flops * sum(lengths)
    compute = compute or tokens / sum(lengths) * row_flops
    rows, rate = _recipe(base, ladder, params, tokens, compute)
    steps = round(tokens / sum(lengths) / rows)
    if steps < 10:
        raise UserError(f"{arm}: {tokens:.3g} tokens are {steps} steps of {rows} rows; a run needs 10 "
                        f"steps or more. Raise the budget, or lower the batch (--rule=base takes the "
                        f"config's).")
    warmup = max(1, round(ladder.warmup * steps))
    schedule = dataclasses.replace(
        base.optimizer.schedule, base_learning_rate=rate, warmup_steps=warmup, total_steps=steps,
        factors=factors or "constant * linear_warmup * cosine_to_floor",
        decay_steps=min(max(1, round(ladder.decay * steps)), steps - warmup))
    config = dataclasses.replace(
        base, model=model, name=arm,
        optimizer=dataclasses.replace(base.optimizer, schedule=schedule),
        train=dataclasses.replace(base.train, num_steps=steps, global_batch_size=rows, seed=seed,
                                  log_every=max(1, steps // 20)),
        eval=dataclasses.replace(base.eval, every=-(-steps // ladder.evaluations)),
        checkpoint=dataclasses.replace(base.checkpoint, every=steps, keep_last=1))
    spent = steps * rows
    return Rung(arm, seed, config, params, float(spent * sum(lengths)), spent * row_flops,
                spent * row_flops)


# --- designs ----------------------------------------------------------------------------------------

def _isoflop(base: RunConfig, ladder: Ladder, seed: int) -> list[Rung]:
    found = []
    for budget in ladder.budgets:
        middle = balanced(base, ladder, budget)
        wanted = [middle * ladder.factor ** (i - (ladder.sizes - 1) / 2)
                  for i in range(ladder.sizes)]
        for _, model in nearest_shapes(base, ladder, wanted):
            found.append(rung(base, ladder, model, f"c{budget:.3g}_w{model.embed_dim}", seed,
                              compute=budget))
    return found


def balanced(base: RunConfig, ladder: Ladder, budget: float) -> float:
    """The size that spends --ratio tokens a parameter of a budget, between the shapes' own ones."""
    lengths = _lengths(base)
    # Attention's own FLOPs make it smaller than C = 6 N D has it.
    known = shapes(base, ladder, math.sqrt(budget / (6 * ladder.ratio)))
    sizes = np.log([size for size, _ in known])
    ratios = np.log([budget / flops.train_flops(model, 1, *lengths) * sum(lengths) / size
                     for size, model in known])
    return float(np.exp(np.interp(-math.log(ladder.ratio), -ratios, sizes)))


def _kaplan(base: RunConfig, ladder: Ladder, seed: int) -> list[Rung]:
    models = [model for _, model in nearest_shapes(base, ladder, ladder.params)]
    pairs = [(model, ladder.tokens[-1]) for model in models]
    pairs += [(models[-1], tokens) for tokens in ladder.tokens[:-1]]
    return [rung(base, ladder, model, f"w{model.embed_dim}_d{tokens:.3g}", seed, tokens=tokens)
            for model, tokens in pairs]


def _ratio(base: RunConfig, ladder: Ladder, seed: int) -> list[Rung]:
    return [rung(base, ladder, model, f"w{model.embed_dim}", seed, tokens=ladder.ratio * params)
            for params, model in nearest_shapes(base, ladder, ladder.params)]


def _cooldown(base: RunConfig, ladder: Ladder, seed: int) -> list[Rung]:
    found = []
    for _, model in nearest_shapes(base, ladder, ladder.params):
        found += _trunk_and_branches(base, ladder, model, seed)
    return found


def _trunk_and_branches(base: RunConfig, ladder: Ladder, model: ModelConfig, seed: int
                        ) -> list[Rung]:
    """The run on the most tokens, which keeps the checkpoints that the others go on from."""
    def name(tokens):
        return f"d{tokens:.3g}"

    trunk = rung(base, ladder, model, f"w{model.embed_dim}", seed, tokens=ladder.tokens[-1],
                 factors="constant * linear_warmup * stable_then_decay")
    steps = trunk.config.train.num_steps
    row_tokens, stable = trunk.tokens / steps, 1 - ladder.decay
    first = stable * ladder.tokens[0] / row_tokens
    every = max(1, round(first / 8))      # branches start at multiples of it
    schedule = trunk.config.optimizer.schedule
    config = configs.replace(trunk.config, "checkpoint.every", every)
    config = configs.replace(config, "checkpoint.keep_every", every)
    trunk = dataclasses.replace(trunk, config=config, stage=name(ladder.tokens[-1]))
    found = [trunk]
    for tokens in ladder.tokens[:-1]:
        start = every * max(1, round(stable * tokens / row_tokens / every))
        if start < schedule.warmup_steps:
            raise UserError(f"{trunk.arm}: the branch at {tokens:.3g} tokens would begin in the "
                            f"warm-up of {schedule.warmup_steps} steps: lower --warmup, or raise the "
                            f"least of --tokens.")
        length = max(start + 1, round(start / stable))
        branch = configs.replace(trunk.config, "train.num_steps", length)
        branch = configs.replace(branch, "checkpoint", dataclasses.replace(
            base.checkpoint, every=length, keep_last=1))
        branch = configs.replace(branch, "eval.every", -(-length // ladder.evaluations))
        branch = configs.replace(branch, "optimizer.schedule", dataclasses.replace(
            schedule, total_steps=length, decay_steps=length - start))
        share = trunk.flops / steps
        found.append(Rung(trunk.arm, seed, branch, trunk.params, length * row_tokens,
                          length * share, (length - start) * share, name(tokens), trunk.stage, start))
    return found


@dataclasses.dataclass(frozen=True)
class Design:
    """A row of the table: what it makes, and the lists of a Ladder that it needs."""

    make: Callable[[RunConfig, Ladder, int], list[Rung]]
    needs: tuple[tuple[str, int, str], ...]   # (field, fewest values, why)
    example: str
    laws: tuple[str, ...]       # what is fitted to it: frontier.APPROACHES and laws.LAWS
    keeps_ratio: bool = False   # a predicted run spends --ratio too; else its size is the fits' best


DESIGNS: dict[str, Design] = {
    "isoflop": Design(_isoflop, (("budgets", 2, "an exponent needs two; take four"),),
                      "1e15,4e15,1.6e16,6.4e16", ("envelope", "parabola", "akima", "hoffmann")),
    "kaplan": Design(_kaplan, (("params", 2, "sizes"), ("tokens", 2, "lengths of training")),
                     "1e6,4e6,16e6", ("kaplan_nd", "hoffmann")),
    "ratio": Design(_ratio, (("params", 2, "sizes"),), "1e6,4e6,16e6", ("kaplan_c", "frontier"), keeps_ratio=True),
    "cooldown": Design(_cooldown, (("params", 1, "sizes"), ("tokens", 2, "lengths of training")),
                       "1e6,4e6,16e6", ("hoffmann", "kaplan_nd"))}


def rungs(base: RunConfig, ladder: Ladder) -> list[Rung]:
    """The runs of a ladder, cheap ones first within a seed.

    Raises:
        UserError: what cannot be solved, by name.
    """
    found = [made for seed in range(ladder.seeds)
             for made in DESIGNS[ladder.design].make(base, ladder, base.train.seed + seed)]
    folders = [(r.arm, r.seed, r.stage) for r in found]
    doubled = sorted({"/".join(map(str, f)) for f in folders if folders.count(f) > 1})
    if doubled:
        raise UserError(f"two runs of the ladder are one: {', '.join(doubled)}; space --params, "
                        f"--tokens or --budgets further apart.")
    return found


def predicted(base: RunConfig, ladder: Ladder, params: float, compute: float) -> Rung:
    """The run, larger than the ladder, whose loss is predicted."""
    [(_, model)] = nearest_shapes(base, ladder, [params])
    return rung(base, ladder, model, PREDICTED, base.train.seed, compute=compute)


# --- the plan on disk -------------------------------------------------------------------------------

def base_module(path: str) -> tuple[types.ModuleType, str | None]:
    """The module of FILE:ARG, and ARG. Raises UserError: no such file, or one without get_config."""
    return configs.module_of(
        path, "get_config", "name the run to resize, such as configs/experiments/ladder.py:lm")


def base_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that FILE:ARG's get_config describes, which a ladder resizes.

    Raises:
        UserError: no such file, one without get_config, or an override that does not fit.
    """
    module, argument = base_module(path)
    found = module.get_config(argument) if argument else module.get_config()
    return configs.override(configs.from_mapping(RunConfig, found), overrides)


def write_plan(workdir: files.Path, base: RunConfig, ladder: Ladder) -> None:
    """WORKDIR/ladder.json, what `read_plan` reads.

    Raises:
        UserError: the folder holds another ladder.
    """
    path = workdir / PLAN
    plan = {"ladder": dataclasses.asdict(ladder), "base": json.loads(configs.to_json(base))}
    text = json.dumps(plan, indent=1) + "\n"
    if path.is_file() and json.loads(path.read_text()) != json.loads(text):
        raise UserError(f"{path} is of another ladder: take another --workdir, or the flags that it "
                        f"was made with.")
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, text)


def read_plan(path: files.Path) -> tuple[RunConfig, Ladder]:
    """What `write_plan` wrote. Raises UserError where it is none."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: python -m t5x_lite.scaling ladder writes it.")
    try:
        plan = json.loads(path.read_text())
        return configs.saved(plan["base"]), Ladder(**{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in plan["ladder"].items()})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what python -m t5x_lite.scaling ladder writes ({error!r}).") \
            from error


def planned(path: files.Path) -> list[Rung]:
    """The runs of WORKDIR/ladder.json, with the predicted one where its prediction is written."""
    base, ladder = read_plan(path)
    found = rungs(base, ladder)
    prediction = path.parent / PREDICTION
    if prediction.is_file():
        said: Mapping = json.loads(prediction.read_text())
        found.append(predicted(base, ladder, said["params"], said["flops"]))
    return found
