"""Prompts read in parts against prompts read at once, and the memory that either takes.

Legend: B rows, T tokens, V vocab_size.
"""

from __future__ import annotations

import dataclasses
import functools
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kinds
from model.adapters import prefix
from model.config import ModelConfig
from model.generate.prefill import advance, prefill
from model.weights import bind

BASE = ModelConfig(vocab_size=31, embed_dim=16, heads=4, max_positions=48, init_std=0.3, attention="chunked")
CASES = {
    "sinks, softcap": {"attention_sinks": True, "attention_softcap": 2.0, "pattern": ("global", "local"), "window": 20}
    | {"kv_heads": 2},
    "learned, experts": {"positions": "learned", "experts": 4, "mlp_bias": False, "capacity_factor": 0.5},
    "alibi": {"positions": "alibi", "pattern": ("local", "global"), "window": 7},
    "dynamic": {
        "rope_scaling": "dynamic",
        "rope_factor": 4.0,
        "rope_original_context": 8,
        "pattern": ("local", "global"),
    }
    | {"window": 9},
    "local rope": {"pattern": ("local", "global"), "window": 5, "rope_local_theta": 100.0, "layer_loop": "scan"},
    "sparse": {"pattern": ("sparse",), "sparse_block": 2, "sparse_newest": 2},
    "linear": {"pattern": ("linear", "gated_linear"), "kv_heads": 2},
    "knn": {"pattern": ("knn", "global"), "knn_memory": 8},
    "memory, prefix": {"memory": 8, "prefix_tokens": 3},
    "sinusoidal, plain": {"positions": "sinusoidal", "norm_order": "post", "pattern": ("local",), "window": 3}
    | {"attention": "plain"},
}
LENGTHS, TOKENS, SLOTS = np.array([41, 1, 17, 32], np.int32), 41, 64


@functools.cache
def case(name: str):
    config = dataclasses.replace(BASE, layers=len(CASES[name].get("pattern", "1")), **CASES[name])
    config = config.resolved().placed("cpu", "float32")
    graphdef, weights = kinds.build(config)[0], kinds.init(config, jax.random.key(0))
    if config.prefix_tokens:
        gate = weights["stack"]["groups"]["layer_0"]["attention"]["prefix"]
        gate["gate"] = gate["gate"] + 1.0
    return config, bind(graphdef, weights)


def prompts() -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 31, (len(LENGTHS), TOKENS)).astype(np.int32)
    return np.where(np.arange(TOKENS) < LENGTHS[:, None], tokens, 0)


@pytest.mark.parametrize("name", CASES)
def test_prompts_read_in_parts_are_those_read_at_once(name, monkeypatch):
    """The logits after the prompts, and those of tokens after them, which read what the parts left in the cache."""
    monkeypatch.setattr(prefix, "LONG", 8)
    config, model = case(name)
    later = np.random.default_rng(1).integers(0, 31, (4, len(LENGTHS))).astype(np.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def logits(chunk: int) -> jax.Array:
        cache, first, _ = prefill(model, config, prompts(), LENGTHS, SLOTS, chunk=chunk)

        def one(cache, x):
            return advance(model, cache, *x)

        _, rest = jax.lax.scan(one, cache, (later, LENGTHS + np.arange(4, dtype=np.int32)[:, None]))
        return jnp.concatenate([first[None], rest])

    wanted = logits(64)
    assert np.abs(wanted).max() > 0.1
    # Five parts and a rest of one token; four and a rest of five.
    chunk = 8 if list(CASES).index(name) % 2 else 9
    np.testing.assert_allclose(logits(chunk), wanted, atol=1e-5, rtol=1e-5)


WIDE = ModelConfig(vocab_size=4096, layers=4, embed_dim=512, heads=8)
GIB = 2**30


def compiled(tokens: int, **fields):
    """Prefill of one prompt of so many tokens, compiled, and the config."""
    config = dataclasses.replace(WIDE, **fields).resolved().placed("cpu", "float32")
    graphdef, abstract, _ = kinds.build(config)

    def read(weights, tokens, lengths):
        return prefill(bind(graphdef, weights), config, tokens, lengths, tokens.shape[1])[:2]

    shapes = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return config, jax.jit(read).lower(abstract, *shapes).compile()


def test_memory_grows_with_the_cache_alone():
    """Of one layer, 8 times the tokens: no array but the cache grows, neither activations nor scores."""
    short, long = (compiled(tokens, layers=1)[1].memory_analysis() for tokens in (4096, 32768))
    grown = 7 * 4096 * 2 * 512 * 4  # keys and values, float32
    assert abs(long.output_size_in_bytes - short.output_size_in_bytes - grown) < 2**20
    assert long.temp_size_in_bytes - short.temp_size_in_bytes < 2**20
    assert long.temp_size_in_bytes + long.output_size_in_bytes < 0.3 * GIB


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_a_prompt_of_32768_tokens_takes_less_than_two_gibibytes_above_the_weights(loop):
    """Compiled and, in a process of its own, resident."""
    found = compiled(32768, layer_loop=loop)[1].memory_analysis()
    assert found.temp_size_in_bytes + found.output_size_in_bytes < 2 * GIB
    command = [sys.executable, "-c", f"from {__name__} import resident; print(resident({loop!r}))"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.5 * GIB < float(done.stdout) < 2 * GIB  # The cache alone takes half a gibibyte.


def resident(loop: str) -> int:
    """By how many bytes the process grows at most while it reads such a prompt, weights and program being there."""
    config, read = compiled(32768, layer_loop=loop)
    weights = jax.block_until_ready(jax.jit(lambda key: kinds.init(config, key))(jax.random.key(0)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jax.block_until_ready(read(weights, np.zeros((1, 32768), np.int32), np.array([32768], np.int32)))
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
