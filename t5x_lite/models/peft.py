"""Parameter-efficient fine-tuning: which numbers train, and how they make the weights.

A `Tuning` is of one model's table and one config. Its `split` divides the model's parameters into a
trainable and a frozen dict; `combine` makes the effective parameters of them, which the unchanged
model then uses. The loss is differentiated through `combine` with respect to the trainable part
alone, so only that part has gradients, optimizer state and checkpoints:

    tuning = Tuning(table, config)
    trainable, frozen = tuning.split(params, key)
    grads = jax.grad(lambda t: loss(tuning.combine(t, frozen)))(trainable)

Methods:

    lora     W + (alpha / rank) A B for each target kernel W; A and B train (arXiv:2106.09685).
    ia3      W diag(l) for targets, diag(l) W for input_targets; the vectors l train: on key
             and value outputs and on the inputs of mlp/wo, which is where (IA)^3 rescales
             activations (arXiv:2205.05638).
    bitfit   biases train (arXiv:2106.10199).
    regex    whatever `targets` matches trains.
    prompt   a soft prompt trains (arXiv:2104.08691), a parameter of the model's own.
    adapter  bottleneck adapters train (arXiv:1902.00751), parameters of the model's own.
    none     everything trains.

LoRA starts from B = 0 and (IA)^3 from l = 1, so that step 0 is the base model bit for bit.
What `combine` returns is also the merged model: nothing is lost by saving it as plain
parameters, and it decodes at the base model's speed. During training it costs one more array
of each target's size; kernels stacked over layers or experts have an A, B or l for each.

A run does this with its `peft` section: state["params"] is the trainable part, and
state["frozen"] the rest, which comes from init_from anew whenever the run starts or resumes; its
checkpoints hold digests of it instead of a copy (checkpoints/format.py). A merged weight is
rounded to its parameter's own type: keep float32 parameters (precision "float32" or "bf16"), for
in bfloat16 an update of less than 0.4 % of a weight is lost.

All dicts are flat, {path: array}. A target ".../query/kernel" has its A, B and l beside it, at
".../query/lora_a", ".../query/lora_b" and ".../query/ia3".

Shape letters: I and O a kernel's input and output dims, R rank, P prompt length, D model.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_lite import tree
from t5x_lite.errors import Count, Positive, UserError, at_least, nearest, one_of
from t5x_lite.models.params import ParamInfo
from t5x_lite.parallel import sharding

METHODS = ("none", "lora", "ia3", "prompt", "adapter", "bitfit", "regex")

PROMPT = "prompt/embedding"              # models.ModelConfig.prompt_length
EMBEDDING = "token_embedding/embedding"
# models.ModelConfig.scalar_head: it starts at 0, so that every method trains it in full.
SCALAR_HEAD = "scalar_head/kernel"

_TARGETS = {
    "none": (r".*",),
    "lora": (r".*_attention/(query|value)/kernel",),
    "ia3": (r".*_attention/(key|value)/kernel",),
    "prompt": (re.escape(PROMPT),),
    "adapter": (r".*_adapter/.*",),
    "bitfit": (r".*/bias",),
    "regex": (),
}
_INPUT_TARGETS = (r".*/wo/kernel",)
# Dims over which kernels are stacked; a matrix has none of these among its last two.
_STACKED = ("layers", "expert")

Flat = dict[str, jax.Array]
Table = Mapping[str, ParamInfo]


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What trains. Regexes are matched against whole parameter paths."""

    method: str = "none"                    # one of METHODS
    targets: tuple[str, ...] = ()           # empty: the method's own (the papers' choices)
    input_targets: tuple[str, ...] = ()     # ia3: kernels scaled by input; empty: mlp outputs
    also: tuple[str, ...] = ()              # trains in full besides: norm scales, the logits, …
    rank: Count = 8                           # lora
    alpha: Positive = 16.0                     # lora
    rank_stabilized: bool = False           # lora: alpha / sqrt(rank), arXiv:2312.03732

    def __post_init__(self):
        one_of("peft.method", self.method, METHODS)
        at_least("peft.rank", self.rank, 1)
        if self.method == "regex" and not self.targets:
            raise UserError("peft.targets is empty: peft.method='regex' needs at least one regex "
                            "of the parameters to train.")
        if self.input_targets and self.method != "ia3":
            raise UserError(f"peft.input_targets={self.input_targets!r} belongs to "
                            f"peft.method='ia3', not {self.method!r}.")
        for field in ("targets", "input_targets", "also"):
            for pattern in getattr(self, field):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"peft.{field}: {pattern!r} is no regex: {error}.") from None

    @property
    def lora_scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What of a model trains and how the whole is made of it: a model's table and a PeftConfig.

    Raises UserError, from every property and method, for a regex that matches no parameter, or a
    lora or ia3 target that is no matrix.
    """

    table: Table
    config: PeftConfig

    @functools.cached_property
    def roles(self) -> dict[str, str]:
        """{base path: full | lora | ia3_output | ia3_input} of what the regexes select."""
        roles: dict[str, str] = {SCALAR_HEAD: "full"} if SCALAR_HEAD in self.table else {}
        for field, role, patterns in _selections(self.config):
            for pattern in patterns:
                for path in self._matches(field, pattern):
                    if roles.setdefault(path, role) != role:
                        raise UserError(
                            f"peft.{field}: {pattern!r} matches {path}, which another of peft's "
                            "regexes trains in another way; make one narrower.")
        for path, role in roles.items():
            if role != "full":
                _check_matrix(self.table[path], self.config)
        return roles

    def _matches(self, field: str, pattern: str) -> list[str]:
        paths = [p for p in self.table if re.fullmatch(pattern, p)]
        if not paths:
            raise UserError(_no_match(self.table, self.config, field, pattern))
        return paths

    @functools.cached_property
    def trainable(self) -> dict[str, ParamInfo]:
        """The table of what trains: for sharding, initialisation, optimizers and reports."""
        rows = [self.table[path] for path, role in self.roles.items() if role == "full"]
        for path, role in self.roles.items():
            rows += _added_rows(self.table[path], role, self.config)
        return {row.path: row for row in sorted(rows, key=lambda row: row.path)}

    @functools.cached_property
    def changed(self) -> frozenset[str]:
        """Paths whose effective parameter is computed: all others are stored as they are used."""
        roles = {p: role for p, role in self.roles.items() if role != "full"}
        biases = (_beside(p, "bias") for p, role in roles.items() if role == "ia3_output")
        return frozenset(roles) | {b for b in biases if b in self.table}

    @property
    def freezes(self) -> bool:
        """Whether some of the model's parameters do not train."""
        return bool(self.table.keys() - self.trainable.keys())

    @property
    def keeps_base(self) -> bool:
        """Whether every parameter of the language model stays as it was, beside what trains."""
        return not (self.trainable.keys() & self.table.keys()) - {SCALAR_HEAD}

    def split(self, params: Mapping[str, jax.Array], key: jax.Array) -> tuple[Flat, Flat]:
        """Base parameters -> (trainable, frozen), fresh A, B and l among the trainable.

        What is drawn depends on the key and each parameter's path only. Under a mesh, call it
        inside jit with out_shardings from `trainable`.
        """
        trainable = {p: params[p] if p in self.table else _fresh(info, key)
                     for p, info in self.trainable.items()}
        return trainable, {p: x for p, x in params.items() if p not in self.trainable}

    def combine(self, trainable: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array]) -> Flat:
        """(trainable, frozen) -> the effective parameters, one for each path of the table.

        Pure, and differentiable with respect to `trainable` (arrays, or under ZeRO-2
        sharding.WholeWeight). Sums and products are made in float32 and rounded to each
        parameter's own dtype.
        """
        params = {p: trainable[p] if p in trainable else frozen[p] for p in self.table}
        for path, role in self.roles.items():
            if role == "lora":
                # Placed like the weight, which below ZeRO-3 is not split over fsdp.
                update = jnp.einsum(
                    "...IR,...RO->...IO", trainable[_beside(path, "lora_a")][...],
                    trainable[_beside(path, "lora_b")][...], preferred_element_type=jnp.float32,
                    out_sharding=_spec_of(params[path]))
                params[path] = _rounded(
                    params[path], lambda w, u=update: w + self.config.lora_scale * u)
            elif role == "ia3_output":
                scale = trainable[_beside(path, "ia3")][...]
                params[path] = _rounded(params[path], lambda w, s=scale: w * s[..., None, :])
                bias = _beside(path, "bias")
                if bias in params:  # l scales the layer's output, of which the bias is a part
                    params[bias] = _rounded(params[bias][...], lambda b, s=scale: b * s)
            elif role == "ia3_input":
                scale = trainable[_beside(path, "ia3")][...]
                params[path] = _rounded(params[path], lambda w, s=scale: w * s[..., None])
        return params

    def merged(self, trainable: Mapping, frozen: Mapping) -> Flat:
        """Of nested (trainable, frozen), the effective parameters at `changed`."""
        params = self.combine(tree.flatten(trainable), tree.flatten(frozen))
        return {path: params[path] for path in self.changed}


def _selections(config: PeftConfig) -> list[tuple[str, str, tuple[str, ...]]]:
    """(field of PeftConfig, role, regexes) of everything that a config selects."""
    method = config.method
    first = {"lora": "lora", "ia3": "ia3_output"}.get(method, "full")
    fields = [("also", "full", config.also), ("targets", first, config.targets or _TARGETS[method])]
    if method == "ia3":
        fields.append(("input_targets", "ia3_input", config.input_targets or _INPUT_TARGETS))
    return fields


def _added_rows(info: ParamInfo, role: str, config: PeftConfig) -> list[ParamInfo]:
    """The rows of the arrays that stand beside a kernel in this role, float32 even where the base
    is bfloat16: small updates to small numbers."""
    if role == "full":
        return []
    *lead, into, out = zip(info.shape, info.logical_axes, info.units, strict=True)
    rank = (config.rank, None, config.rank)
    if role == "lora":
        # kaiming_uniform_(a=sqrt(5)), as the reference and Hugging Face's PEFT start
        parts = {"lora_a": ((into, rank), into[0], f"uniform({1 / math.sqrt(into[0]):.4g})"),
                 "lora_b": ((rank, out), config.rank, "constant(0)")}
    else:
        parts = {"ia3": ((into,) if role == "ia3_input" else (out,), 0, "constant(1)")}
    rows = []
    for name, (dims, fan_in, init) in parts.items():
        shape, axes, units = zip(*lead, *dims, strict=True)
        rows.append(ParamInfo(_beside(info.path, name), shape, jnp.dtype(jnp.float32), axes, units,
                              fan_in, init))
    return rows


def added(table: Table) -> frozenset[str]:
    """Paths of the model's own parameters that only tuning needs: prompts, adapters and a scalar head."""
    patterns = (*_TARGETS["prompt"], *_TARGETS["adapter"], SCALAR_HEAD)
    return frozenset(p for p in table if any(re.fullmatch(pattern, p) for pattern in patterns))


def vocabulary_prompt(embedding_VD: jax.Array, length: int, key: jax.Array,
                      common: int = 5000) -> jax.Array:
    """A soft prompt_PD that starts as the embeddings of distinct random tokens.

    The "sampled vocab" start of prompt tuning (section 3.2): from the `common` first ids,
    which SentencePiece orders by frequency; at that paper's sizes it beats random numbers.
    """
    rows = min(common, embedding_VD.shape[0])
    if length > rows:
        raise UserError(f"a prompt of {length} tokens cannot start from {rows} distinct ones; "
                        f"shorten it to {rows} at most.")
    return embedding_VD[jax.random.permutation(key, rows)[:length]]


def _no_match(table: Table, config: PeftConfig, field: str, pattern: str) -> str:
    if not getattr(config, field):
        missing = {"bitfit": "no biases; peft.method='regex' can train norm scales instead",
                   "prompt": "no prompt; set model.prompt_length",
                   "adapter": "no adapters; set model.encoder.adapter_dim, or the decoder's"}
        why = missing.get(config.method, f"no parameter like {pattern!r}; set peft.{field}")
        return f"peft.method={config.method!r}: this model has {why}."
    hint = nearest(pattern, table) or f" Paths look like {next(iter(table))!r}."
    return f"peft.{field}: {pattern!r} matches no parameter.{hint}"


def _check_matrix(info: ParamInfo, config: PeftConfig) -> None:
    if len(info.shape) < 2 or set(info.logical_axes[-2:]) & set(_STACKED):
        raise UserError(f"peft.method={config.method!r} wants kernels, but {info.path} has shape "
                        f"{info.shape}; narrow the regex, or list it in peft.also to train it.")
    if config.method == "lora" and config.rank > min(info.shape[-2:]):
        raise UserError(f"peft.rank={config.rank} is above the smaller side of {info.path} "
                        f"{info.shape[-2:]}; set at most {min(info.shape[-2:])}.")


def _fresh(info: ParamInfo, key: jax.Array) -> jax.Array:
    if info.init.startswith("constant"):
        return jnp.full(info.shape, 1.0 if info.path.endswith("ia3") else 0.0, info.dtype)
    key = jax.random.fold_in(key, zlib.crc32(info.path.encode()))
    bound = 1 / math.sqrt(info.fan_in)
    return jax.random.uniform(key, info.shape, info.dtype, -bound, bound)


def _spec_of(x: jax.Array):
    """The PartitionSpec of an array on the active mesh, None without one."""
    return jax.typeof(x).sharding.spec if sharding.mesh_sizes() else None


def _rounded(x: jax.Array, fn) -> jax.Array:
    return fn(x.astype(jnp.float32)).astype(x.dtype)


def _beside(path: str, name: str) -> str:
    return "/".join((*path.split("/")[:-1], name))
