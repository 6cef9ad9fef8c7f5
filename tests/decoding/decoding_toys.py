"""Toy models for the tests of decoding: two tables of logits.

A Markov chain, whose cache is only the position, and one that mixes every token so far
through a cache of slots, so that a slot written at the wrong position, read too early or
left behind by take_rows changes the result. The table rides in the cache, as parameters
would, so that tests share compiled programs.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite.decoding import decode

BATCH_AXES = ("data", "fsdp")


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def read(tokens, cache, counts):
    """The position after the tokens, or after as many of each row as count."""
    return cache["position"] + (tokens.shape[1] if counts is None else counts)


def markov(tokens, cache, counts=None):
    return cache["table"][tokens], {**cache, "position": read(tokens, cache, counts)}


def markov_cache(table, batch):
    return {"table": jnp.asarray(table, jnp.float32), "position": jnp.zeros(batch, jnp.int32)}


def mixing_logits(table, tokens):
    """[V]: logits after a sequence; every token counts, the last most, and so does its place."""
    hidden = sum(table[t] * (0.6 ** (len(tokens) - 1 - i)) * (1 + 0.1 * i)
                 for i, t in enumerate(tokens))
    return np.asarray(hidden, np.float32)


def mixing(tokens, cache, counts=None):
    """mixing_logits with a cache: slots hold the table rows of the tokens written there."""
    position = cache["position"][:, None] + jnp.arange(tokens.shape[1])
    place = jnp.arange(cache["slots"].shape[1])
    new = lookup(cache["table"], tokens)
    written = position[:, :, None] == place
    slots = jnp.where(written.any(axis=1)[..., None],
                      jnp.einsum("BLS,BLV->BSV", written.astype(jnp.float32), new),
                      cache["slots"])
    age = position[:, :, None] - place
    share = jnp.where(age >= 0, 0.6 ** age * (1 + 0.1 * place), 0.0)
    logits = jnp.einsum("BLS,BSV->BLV", share, slots)
    if not jax.sharding.get_abstract_mesh().empty:
        logits = jax.sharding.reshard(logits, P(BATCH_AXES, None, "tensor"))
    return logits, {**cache, "slots": slots, "position": read(tokens, cache, counts)}


def prefix_lm(tokens, cache, counts=None):
    """Two layers: tokens within cache["prefix"] mix before anything else is made of them."""
    position = cache["position"][:, None] + jnp.arange(tokens.shape[1])
    put = jax.vmap(lambda slots, at, new: slots.at[at].set(new))
    raw = put(cache["raw"], position, cache["table"][tokens])
    place = jnp.arange(raw.shape[1])
    prompt = jnp.where((place < cache["prefix"][:, None])[..., None], raw, 0).sum(axis=1)
    made = jnp.sin(cache["table"][tokens] * prompt[:, None])
    mixed = put(cache["mixed"], position, made)
    seen = (position[:, :, None] >= place).astype(jnp.float32)
    return (jnp.einsum("BLS,BSV->BLV", seen, mixed),
            {**cache, "raw": raw, "mixed": mixed, "position": read(tokens, cache, counts)})


def mixing_cache(table, batch, slots=24):
    # what nobody wrote is large: reading it would show
    return {"table": jnp.asarray(table, jnp.float32),
            "slots": jnp.full((batch, slots, table.shape[0]), 1e3),
            "position": jnp.zeros(batch, jnp.int32)}


def take_rows(cache, rows):
    return {name: x if name == "table" else lookup(x, rows) for name, x in cache.items()}


def lookup(x, rows):
    if jax.sharding.get_abstract_mesh().empty:
        return x[rows]
    return x.at[rows].get(out_sharding=P(BATCH_AXES))


def table_of(seed, vocab, scale=2.0):
    return np.random.default_rng(seed).normal(size=(vocab, vocab)).astype(np.float32) * scale


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(decode_fn, cache, prompt, lengths, config, row_ids=None):
    return decode.decode(decode_fn, take_rows, cache, prompt, lengths, config, row_ids)


def run_markov(table, config, first=(0,), row_ids=None):
    """Decodes from one start token a row."""
    prompt = jnp.asarray(first, jnp.int32)[:, None]
    return run(markov, markov_cache(table, len(first)), prompt,
               jnp.ones(len(first), jnp.int32), config, row_ids)


def pad_prompts(prompts):
    # padded with a real token: it must not matter
    width = max(map(len, prompts))
    return (np.array([list(p) + [3] * (width - len(p)) for p in prompts], np.int32),
            np.array([len(p) for p in prompts], np.int32))


def run_mixing(table, prompts, config, row_ids=None):
    return run(mixing, mixing_cache(table, len(prompts)), *pad_prompts(prompts), config, row_ids)


def chain(*tokens, vocab=6, other=None):
    """A table that makes each token follow the one before it; `other` adds (from, to, logit)."""
    table = np.zeros((vocab, vocab), np.float32)
    table[:, 1] = -20.0  # nothing ends by chance
    for a, b in itertools.pairwise(tokens):
        table[a, b] = 5.0
    for a, b, value in other or ():
        table[a, b] = value
    return table
