"""Memory of a LLaMA-2-7B train step on described TPUs: ours against plain JAX.

    python scripts/bench_memory.py --topology=v5e:4x4 --batch=2 --length=2048
    python scripts/bench_memory.py --topology=v5p:2x2x4 --batch=4 --length=4096

The plain step shares no code with ours but the compiler: float32 parameters and AdamW moments
split over all devices and left to XLA's partitioner, a scan over layers of bfloat16 products
with full rematerialisation, splash attention, one-hot cross-entropy over float32 logits, a
clipped gradient norm, the state donated. Published figures of other systems are for such steps.

Prints, in GiB a device, the arguments, the temporaries as libtpu allocates them, and
memory_analysis().temp_size_in_bytes, which counts some donated programs' buffers twice. Two
minutes and 6 GB on two CPU cores; needs the extra [plan].
"""

import dataclasses

from absl import flags

from t5x_lite import cli

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "TPUs to compile for.")
_BATCH = flags.DEFINE_integer("batch", 2, "Sequences a device.")
_LENGTH = flags.DEFINE_integer("length", 2048, "Positions of a sequence, a multiple of 512.")


@dataclasses.dataclass(frozen=True)
class Shape:
    """LLaMA-2-7B (Touvron et al. 2023)."""

    layers: int = 32
    embed: int = 4096
    heads: int = 32
    head_dim: int = 128
    mlp: int = 11008
    vocab: int = 32000


def plain_step(mesh, rows: int, length: int):
    """The lowered step over a mesh with the one axis "all", abstract arguments included."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding, PartitionSpec as P
    s = Shape()

    def array(shape, *spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def inward(*shape):
        return array((s.layers, s.embed, *shape), None, "all")

    params = {
        "embedding": array((s.vocab, s.embed), None, "all"),
        "head": array((s.embed, s.vocab), "all"), "norm": array((s.embed,), "all"),
        "layers": {"q": inward(s.heads, s.head_dim), "k": inward(s.heads, s.head_dim),
                   "v": inward(s.heads, s.head_dim), "gate": inward(s.mlp), "up": inward(s.mlp),
                   "o": array((s.layers, s.heads, s.head_dim, s.embed), None, None, None, "all"),
                   "down": array((s.layers, s.mlp, s.embed), None, None, "all"),
                   "norm_attention": inward(), "norm_mlp": inward()}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0),
                            optax.adamw(3e-4, b2=0.95, weight_decay=0.1))
    by_shape = {x.shape: x.sharding for x in jax.tree.leaves(params)}
    everywhere = NamedSharding(mesh, P())
    moments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                       sharding=by_shape.get(x.shape, everywhere)),
        jax.eval_shape(optimizer.init, params))
    tokens = array((rows, length), "all", dtype=jnp.int32)

    def step(state, inputs, targets):
        params, moments = state
        loss, gradient = jax.value_and_grad(_plain_loss)(params, inputs, targets, mesh, s)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), loss
    state = (params, moments)
    outputs = (jax.tree.map(lambda x: x.sharding, state), everywhere)
    return jax.jit(step, donate_argnums=0, out_shardings=outputs).lower(state, tokens, tokens)


def _plain_loss(params, inputs, targets, mesh, s: Shape):
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P
    rows = NamedSharding(mesh, P("all"))

    def split(x):
        return jax.lax.with_sharding_constraint(x, rows)

    def norm(x, scale):
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
        return x.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)

    def rotate(x):
        angles = (jnp.arange(x.shape[2])[:, None]
                  * 1e4 ** (-jnp.arange(0, s.head_dim, 2) / s.head_dim))
        a, b = jnp.split(x.astype(jnp.float32), 2, -1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(jnp.bfloat16)

    def layer(x, stored):
        w = {name: x.astype(jnp.bfloat16) for name, x in stored.items() if "norm" not in name}
        y = norm(split(x), stored["norm_attention"])
        q, k, v = (jnp.einsum("ble,ehd->bhld", y, w[name]) for name in "qkv")
        y = _splash(rotate(q) * s.head_dim ** -0.5, rotate(k), v, mesh)
        x = split(x + jnp.einsum("bhld,hde->ble", y, w["o"]))
        y = norm(x, stored["norm_mlp"])
        return split(x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]), None

    x = split(params["embedding"].astype(jnp.bfloat16)[inputs])
    x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, params["layers"])
    x = norm(x, params["norm"]) @ params["head"].astype(jnp.bfloat16)
    logits = split(x.astype(jnp.float32))
    target = jnp.sum(logits * jax.nn.one_hot(targets, s.vocab), -1)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - target)


def _splash(q, k, v, mesh):
    import jax
    from jax.experimental.pallas.ops.tpu import splash_attention
    from jax.sharding import PartitionSpec as P
    mask = splash_attention.CausalMask((q.shape[2], q.shape[2]))
    tile = 512
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * q.shape[1]), head_shards=1, q_seq_shards=1,
        block_sizes=splash_attention.BlockSizes(
            block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile,
            block_kv_dq=tile))
    return jax.shard_map(lambda q, k, v: jax.vmap(kernel)(q, k, v), mesh=mesh,
                         in_specs=P("all"), out_specs=P("all"), check_vma=False)(q, k, v)


def our_step(devices, rows: int, length: int):
    """Our lowered step, as `t5x_lite.plan` compiles it."""
    from configs import llama
    from t5x_lite import config as configs
    from t5x_lite.build import build
    run = llama.run("2_7b")
    for path, value in (("mesh.data", 1), ("mesh.fsdp", len(devices)), ("precision", "bf16"),
                        ("sharding.rules", {"norm": ("fsdp",)}), ("model.decoder.remat", "full"),
                        ("train.global_batch_size", rows), ("data.targets_length", length)):
        run = configs.replace(run, path, value)
    program = build(run, devices)
    with program.activate():
        return program.jit_train_step().lower(
            program.abstract_state, program.abstract_batch())


def main() -> None:
    import jax
    import numpy as np

    from t5x_lite.planning import rehearse
    jax.config.update("jax_platforms", "cpu")   # devices are described
    devices = rehearse.topology(_TOPOLOGY.value).devices
    rows = _BATCH.value * len(devices)
    figures = {}
    print(f"GiB a device        arguments   allocated   temp_size_in_bytes    ({_TOPOLOGY.value})")
    for name, lowered in (
            ("t5x_lite", our_step(devices, rows, _LENGTH.value)),
            ("plain JAX", plain_step(jax.sharding.Mesh(np.array(devices), ("all",)), rows,
                                     _LENGTH.value))):
        compiled, _, temp = rehearse.compile_lowered(lowered, "tpu")
        memory = compiled.memory_analysis()
        figures[name] = memory.argument_size_in_bytes, temp, memory.temp_size_in_bytes
        print(f"{name:<18}" + "".join(f"{x / 2**30:12.3f}" for x in figures[name]), flush=True)
    print(f"{'ratio':<18}" + "".join(
        f"{a / b:12.3f}" for a, b in zip(*figures.values(), strict=True)))


if __name__ == "__main__":
    cli.run(main)
