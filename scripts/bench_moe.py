"""Times a mixture of experts against the dense MLP of equal FLOPs per token, forward and backward.

    python scripts/bench_moe.py --experts=8,32,128

Every token uses one expert (Switch), so the dense MLP with the same mlp_dim multiplies as much.
Printed are ratios to it: of elapsed time, and of CPU time, which other programs on the machine
disturb less. All are timed in turn, so that what slows one slows all, and the best taken.

    dropless       sorted tokens, one run of rows per expert
    capacity 1.0   buffers of exactly the dense MLP's rows; overflow is dropped
    capacity 1.25  Switch's training buffers, a quarter of them empty: to the dense MLP over a
                   quarter more tokens, which multiplies as much
"""

import argparse
import dataclasses
import time

import cpu_environment  # noqa: F401  first of all: it may start the script again
import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite import cli  # noqa: F401  before JAX: it sets what that reads on import
from t5x_lite.layers.config import InitConfig, MLPConfig, MoEConfig
from t5x_lite.layers.mlp import MLP
from t5x_lite.layers.moe import MoE


def step_of(module, x):
    """A compiled () -> (loss, gradients) of one layer."""
    graphdef, params = nnx.split(module)

    def loss(params, x):
        y, aux = nnx.merge(graphdef, params)(x)
        return jnp.mean(jnp.square(y)) + (aux["aux_loss"][0] if aux else 0.0)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x).compile()
    return lambda: jax.block_until_ready(step(params, x))


def measure(steps, repeats):
    """{name: (least elapsed seconds, least CPU seconds)}, timed in turn after one warm-up."""
    times = {name: [] for name in steps}
    for i in range(repeats + 1):
        for name, step in steps.items():
            start, cpu = time.perf_counter(), time.process_time()
            step()
            if i:
                times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return {name: tuple(map(min, zip(*pairs, strict=True)))
            for name, pairs in times.items()}


def bench(num_experts, tokens_per_expert, length, embed_dim, mlp, repeats):
    """One line of the table for each way of dispatching."""
    def tokens(share):
        rows = num_experts * tokens_per_expert // length
        return jax.random.normal(jax.random.key(0), (rows, int(share * length), embed_dim))

    switch, x = MoEConfig(num_experts=num_experts, mlp=mlp), tokens(1.0)
    configs = {
        "dropless": dataclasses.replace(switch, dropless=True),
        "capacity 1.0": dataclasses.replace(switch, eval_capacity_factor=1.0),
        "capacity 1.25": dataclasses.replace(switch, eval_capacity_factor=1.25),
    }
    key, init = jax.random.key(1), InitConfig()
    dense, sparse = MLP(key, embed_dim, mlp, init), MoE(key, embed_dim, switch, init)
    steps = {"dense": step_of(dense, x), "dense 1.25": step_of(dense, tokens(1.25))}
    for name, config in configs.items():
        sparse.config = config
        steps[name] = step_of(sparse, x)
    times = measure(steps, repeats)
    matmuls = 3 if mlp.gated else 2
    flops = 6 * x.size * mlp.mlp_dim * matmuls  # forward 2, backward 4 for each weight
    elapsed, _ = times["dense"]
    print(f"{num_experts} experts, {x.shape[0] * length} tokens: dense {elapsed:.3f} s, "
          f"{flops / elapsed / 1e9:.0f} GFLOP/s")
    for name in configs:
        elapsed, cpu = times["dense 1.25" if name == "capacity 1.25" else "dense"]
        print(f"    {name:14}{times[name][0] / elapsed:6.2f} x elapsed"
              f"{times[name][1] / cpu:6.2f} x CPU", flush=True)


def main():
    """Parses the flags and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", default="8,32,128", help="numbers of experts")
    parser.add_argument("--tokens_per_expert", type=int, default=512)
    parser.add_argument("--length", type=int, default=512, help="sequence (and group) length")
    parser.add_argument("--embed_dim", type=int, default=512)
    parser.add_argument("--mlp_dim", type=int, default=2048)
    parser.add_argument("--gated", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    mlp = MLPConfig(mlp_dim=args.mlp_dim, activation="relu", gated=args.gated)
    for num_experts in map(int, args.experts.split(",")):
        bench(num_experts, args.tokens_per_expert, args.length, args.embed_dim, mlp, args.repeats)


if __name__ == "__main__":
    main()
