"""Every kind of attention against a plain reference with its mask, and packed rows against their documents alone.

Generation with a cache is in test_decode.py, for every kind too.

Legend: B rows, T tokens, H heads, G kv_heads, R = H / G, K head_dim, S keys.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from model import kinds
from model.attention.attend import Rules, attend
from model.attention.block_sparse_attention import SparsePattern, block_sparse_attention, chosen_blocks, sparse_mask
from model.attention.linear_attention import linear_attention
from model.config import ModelConfig
from model.place import Place, visible
from model.positions import alibi
from model.weights import bind
from tpu.errors import UserError


def packed(rng: np.random.Generator, tokens: int, documents: int, padding: int = 0) -> Place:
    """Two rows of documents of random lengths, the second with padding at its end."""
    starts = np.zeros((2, tokens), bool)
    starts[:, 0] = True
    for row in starts:
        row[rng.choice(tokens, documents - 1, replace=False)] = True
    steps = np.arange(tokens)
    segments, positions = np.cumsum(starts, 1), steps - np.maximum.accumulate(np.where(starts, steps, 0), 1)
    real = (np.arange(2)[:, None] == 0) | (steps < tokens - padding)
    return Place(*(np.where(real, a, 0).astype(np.int32) for a in (segments, positions)))


def arrays(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def value_and_gradients(function: Callable, real: np.ndarray, *inputs: Any) -> list[np.ndarray]:
    """function(*inputs) [B, H, T, K], zero at padding, and the gradients of a mixture of it."""

    def mixed(*inputs: Any) -> tuple[jax.Array, jax.Array]:
        out = function(*inputs) * real[:, None, :, None]
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(mixed, tuple(range(len(inputs))), has_aux=True))(*inputs)
    return [np.asarray(a) for a in (out, *gradients)]


def assert_close(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert np.abs(y).max() > 1e-3
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(1.0, np.abs(y).max()))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "before", "documents", "fields"),
    [
        (4, 2, 150, 0, 3, {"alibi": True}),
        (6, 2, 70, 0, 2, {"alibi": True, "window": 20, "softcap": 2.0}),
        (4, 2, 150, 0, 3, {"sinks": True}),
        (3, 1, 131, 0, 2, {"sinks": True, "window": 40, "softcap": 2.0}),
        (2, 2, 150, 37, 3, {}),
        (2, 1, 70, 100, 2, {"window": 50, "alibi": True, "sinks": True}),
    ],
)
def test_chunked_equals_plain(heads, kv_heads, tokens, before, documents, fields):
    """Biases, sinks, and a memory of `before` tokens that the first documents of the rows go on from."""
    rng = np.random.default_rng(tokens)
    place = packed(rng, tokens + before, documents, 10)
    queries = Place(*(a[:, before:] for a in place[:2]))
    q, k, v = arrays(rng, (2, heads, tokens, 8), *[(2, kv_heads, tokens + before, 8)] * 2)
    inputs = (q, k, v, *(arrays(rng, (heads,)) if fields.pop("sinks", False) else []))

    def run(q, k, v, sinks=None, *, kind):
        own = queries if before else place
        return attend(q * 8**-0.5, k, v, own, place, Rules(kind, sinks=sinks, same=True, **fields))

    found, wanted = (
        value_and_gradients(functools.partial(run, kind=kind), queries.segments > 0, *inputs)
        for kind in ("chunked", "plain")
    )
    assert_close(found, wanted)


def test_a_sink_is_a_key_without_a_value():
    rng = np.random.default_rng(0)
    place = packed(rng, 6, 1)
    q, k, v = arrays(rng, (2, 1, 6, 4), (2, 1, 6, 4), (2, 1, 6, 4))
    sinks = np.array([0.7], np.float32)
    scores = np.where(visible(place, place, 0), np.einsum("bhtk,bhsk->bts", q, k), -np.inf)
    weights = np.exp(scores) / (np.exp(scores).sum(-1, keepdims=True) + np.exp(0.7))
    for kind in ("plain", "chunked"):
        out = attend(q, k, v, place, place, Rules(kind, sinks=sinks, same=True))
        np.testing.assert_allclose(out[:, 0], np.einsum("bts,bsk->btk", weights, v[:, 0]), atol=1e-5)


def test_slopes_of_alibi():
    """The sequences of the paper: 8 heads and 16 heads, and 12 heads from both."""
    np.testing.assert_allclose(alibi.slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi.slopes(16), [2.0 ** (-i / 2) for i in range(1, 17)], rtol=1e-6)
    np.testing.assert_allclose(alibi.slopes(12), [*alibi.slopes(8), *alibi.slopes(16)[0:8:2]], rtol=1e-6)


def test_the_tpu_kernel_takes_sinks(monkeypatch):
    interpreted = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", interpreted)
    rng = np.random.default_rng(0)
    place = packed(rng, 256, 4)
    inputs = arrays(rng, (2, 2, 256, 16), (2, 1, 256, 16), (2, 1, 256, 16), (2,))

    def run(q, k, v, sinks, kind):
        return attend(q * 0.25, k, v, place, place, Rules(kind, sinks=sinks, same=True))

    found, wanted = (
        value_and_gradients(functools.partial(run, kind=kind), place.segments > 0, *inputs)
        for kind in ("splash", "plain")
    )
    assert_close(found, wanted)


@settings(max_examples=6)
@given(
    pattern=st.builds(
        SparsePattern,
        block=st.sampled_from([3, 8]),
        newest=st.integers(1, 3),
        first=st.integers(0, 2),
        random=st.integers(0, 3),
        seed=st.integers(0, 9),
    ),
    documents=st.integers(1, 4),
    padding=st.sampled_from([0, 11]),
    extras=st.booleans(),
)
def test_block_sparse_equals_plain(pattern, documents, padding, extras):
    rng = np.random.default_rng(1)
    place = packed(rng, 100, documents, padding)
    inputs = arrays(rng, (2, 4, 100, 8), (2, 2, 100, 8), (2, 2, 100, 8), (4,))
    fields = {"alibi": True, "softcap": 3.0} if extras else {}

    def run(q, k, v, sinks, kind):
        return attend(q * 8**-0.5, k, v, place, place, Rules(kind, sparse=pattern, sinks=sinks, same=True, **fields))

    found, wanted = (
        value_and_gradients(functools.partial(run, kind=kind), place.segments > 0, *inputs)
        for kind in ("chunked", "plain")
    )
    assert_close(found, wanted)


def test_the_sparse_pattern_is_newest_first_and_as_many_others_as_asked_for():
    pattern = SparsePattern(4, 2, 1, 2, 5)
    positions = np.arange(80, dtype=np.int32)[None]
    mask = np.asarray(sparse_mask(pattern, positions, positions))[0] & np.tri(80, dtype=bool)
    by_block = mask.reshape(20, 4, 20, 4).any((1, 3))
    for block, row in enumerate(by_block):
        seen = set(np.flatnonzero(row))
        assert {0, block, max(0, block - 1)} <= seen
        assert len(seen) == min(block + 1, 5)
    longer = chosen_blocks(pattern, 40)
    np.testing.assert_array_equal(longer[:20], chosen_blocks(pattern, 20))
    assert len({tuple(row) for row in longer[20:]}) > 15
    assert (chosen_blocks(pattern._replace(seed=6), 40) != longer).any()


def quadratic(q: Any, k: Any, v: Any, log_decay: Any, segments: np.ndarray) -> jax.Array:
    """The sum that `linear_attention` stands for, term by term, without its state."""
    t = q.shape[3]
    fade = jnp.cumsum(log_decay, -1)
    between = jnp.stack([fade[..., i, None] - fade for i in range(t)], 2)  # [B, G, T, T]
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(t, dtype=bool)
    weights = jnp.exp(jnp.where(mask[:, None], between, -jnp.inf))
    return jnp.einsum("bgrtk,bgsk,bgts,bgsv->bgrtv", q, k, weights, v)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
@pytest.mark.parametrize("decays", [0.0, 5.0])
def test_linear_attention_of_any_chunk_equals_its_sum(chunk, decays):
    """One token to a chunk is the recurrent form. Strong decays would overflow if they were masked too late."""
    rng = np.random.default_rng(0)
    place = packed(rng, 50, 3, 9)
    q, k, v, decay = arrays(rng, (2, 2, 2, 50, 6), (2, 2, 50, 6), (2, 2, 50, 5), (2, 2, 50))
    decay = -decays * np.abs(decay)
    real = place.segments > 0

    def flat(out: jax.Array) -> jax.Array:
        return out.reshape(2, 4, 50, -1)

    found = value_and_gradients(
        lambda *a: flat(linear_attention(*a, place.segments, chunk=chunk)[0]), real, q, k, v, decay
    )
    wanted = value_and_gradients(lambda *a: flat(quadratic(*a, place.segments)), real, q, k, v, decay)
    if not decays:
        assert_close(found[:4], wanted[:4])
        found, wanted = found[4:], wanted[4:]
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(1.0, np.abs(y).max()))


@pytest.mark.parametrize(("cut", "documents"), [(1, 1), (13, 3), (24, 2)])
def test_the_state_of_linear_attention_goes_from_one_call_to_the_next(cut, documents):
    """Two calls, the second with the first one's state, are one: where the second goes on with the segment."""
    rng = np.random.default_rng(cut)
    q, k, v, decay = arrays(rng, (2, 1, 2, 30, 4), (2, 1, 30, 4), (2, 1, 30, 4), (2, 1, 30))
    segments = packed(rng, 30, documents).segments
    inputs = q, k, v, -np.abs(decay)
    whole, last = linear_attention(*inputs, segments, chunk=8)
    first, state = linear_attention(*(a[..., :cut, :] for a in inputs[:3]), inputs[3][..., :cut], segments[:, :cut])
    goes_on = segments[:, cut - 1] == segments[:, cut]
    state = jnp.where(goes_on[:, None, None, None], state, 0)
    rest = *(a[..., cut:, :] for a in inputs[:3]), inputs[3][..., cut:]
    second, end = linear_attention(*rest, segments[:, cut:], state, chunk=5)
    np.testing.assert_allclose(jnp.concatenate([first, second], 3), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-5)


KINDS = {
    "global": {"pattern": ("global",)},
    "banded": {"pattern": ("global", "local"), "window": 5},
    "alibi": {"positions": "alibi"},
    "sinks": {"attention_sinks": True},
    "sparse": {"pattern": ("sparse",), "sparse_block": 4, "sparse_newest": 1},
    "linear": {"pattern": ("linear",)},
    "gated_linear": {"pattern": ("gated_linear",)},
    "knn": {"pattern": ("knn", "global"), "knn_memory": 4},
}


@pytest.mark.parametrize("name", KINDS)
def test_documents_of_a_packed_row_are_alone(name):
    """Hidden states of a row of three documents and padding, and of each document in a row of its own."""
    config = ModelConfig(vocab_size=20, layers=2, embed_dim=16, heads=2, init_std=0.3)
    config = dataclasses.replace(config, **KINDS[name]).resolved().placed("cpu", "float32")
    graphdef, _, _ = kinds.build(config)
    weights = kinds.init(config, jax.random.key(0))
    forward = jax.jit(lambda tokens, place: bind(graphdef, weights)(tokens, place)[0])
    lengths = [21, 6, 30]
    tokens = np.random.default_rng(0).integers(0, 20, (1, 64)).astype(np.int32)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 64 - sum(lengths)])[None]
    positions = np.concatenate([np.arange(n) for n in (*lengths, 64 - sum(lengths))])[None]
    together = forward(tokens, Place(segments.astype(np.int32), positions.astype(np.int32)))
    start = 0
    for length in lengths:
        row, place = np.zeros((1, 64), np.int32), np.arange(64, dtype=np.int32)[None]
        row[0, :length] = tokens[0, start : start + length]
        alone = forward(row, Place((place < length).astype(np.int32), np.where(place < length, place, 0)))
        np.testing.assert_allclose(together[0, start : start + length], alone[0, :length], atol=2e-5)
        start += length


@pytest.mark.slow
def test_block_sparse_attention_grows_linearly():
    """Processor time and temporary memory, forward and back, from 2,048 to 16,384 tokens: 8 times, not 64."""
    pattern = SparsePattern(64, 3, 1, 2, 0)

    def measured(tokens: int) -> tuple[float, int]:
        place = Place(np.ones((1, tokens), np.int32), np.arange(tokens, dtype=np.int32)[None])
        inputs = arrays(np.random.default_rng(0), *[(1, 2, tokens, 32)] * 3)
        loss = lambda *a: jnp.square(block_sparse_attention(*a, *place[:2], pattern)).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs).compile()
        seconds = []
        for _ in range(4):
            start = time.process_time()
            jax.block_until_ready(compiled(*inputs))
            seconds.append(time.process_time() - start)
        return min(seconds), compiled.memory_analysis().temp_size_in_bytes

    (short, small), (long, large) = measured(2048), measured(16384)
    print(f"2,048: {short:.3f} s, {small / 2**20:.0f} MiB; 16,384: {long:.3f} s, {large / 2**20:.0f} MiB")
    assert large <= 10 * small
    assert long <= 16 * short


@pytest.mark.slow
def test_block_sparse_attention_grows_linearly_on_a_tpu():
    """Memory and estimated time of the training step for a TPU, by its compiler, the tokens of a step staying alike."""
    pytest.importorskip("libtpu")
    reports = []
    for context, rows in ((2048, 64), (16384, 8)):
        code = f"""
import dataclasses, json
from model.config import ModelConfig
from tpu.compile.pod import compile_step, prepare
from train.config import DataConfig, Experiment, MeshConfig
from train.resolve import resolve
prepare("v5e:2x2")
model = ModelConfig(vocab_size=512, layers=2, embed_dim=256, heads=4, pattern=("sparse",), remat="full")
data = DataConfig(tokenizer="bytes", bpe_vocab_size=512, context={context}, batch_size={rows})
report = compile_step(resolve(Experiment(model=model, data=data, mesh=MeshConfig(fsdp=4))), "v5e:2x2")
print(json.dumps(dataclasses.asdict(report)))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        reports.append(json.loads(done.stdout.splitlines()[-1]))
    figures = [(r["bytes_per_chip"]["temporary"], r["matmul_flops_per_chip"]) for r in reports]
    print(f"2,048 and 16,384 tokens to a row: temporary bytes and operations {figures}")
    assert figures[1][0] <= 1.5 * figures[0][0]
    assert figures[1][1] <= 1.2 * figures[0][1]


@pytest.mark.parametrize(
    ("platform", "fields", "kind", "word"),
    [
        ("cpu", {}, "chunked", "CPU"),
        ("tpu", {}, "splash", "TPU"),
        ("gpu", {}, "cudnn", "GPU"),
        ("tpu", {"attention_sinks": True, "attention_softcap": 3.0}, "splash", "TPU"),
        ("tpu", {"positions": "alibi"}, "chunked", "ALiBi"),
        ("gpu", {"positions": "alibi"}, "chunked", "ALiBi"),
        ("gpu", {"attention_softcap": 3.0}, "chunked", "softcap"),
        ("gpu", {"attention_sinks": True}, "chunked", "sinks"),
        ("gpu", {"compute_dtype": "float32"}, "chunked", "16 bits"),
        ("gpu", {"head_dim": 20}, "chunked", "head_dim"),
        ("tpu", {"memory": 8}, "chunked", "memory"),
    ],
)
def test_auto_takes_what_the_platform_has_and_the_mask_allows(platform, fields, kind, word):
    config = ModelConfig(**fields).resolved()
    found, why = config.attention_for(platform, "bfloat16")
    assert (found, word in why) == (kind, True)
    assert config.placed(platform, "bfloat16").attention == kind


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"attention": "splash", "positions": "alibi"}, "model.attention"),
        ({"attention": "cudnn", "attention_softcap": 1.0}, "model.attention"),
        ({"pattern": ("knn",)}, "model.knn_memory"),
        ({"knn_memory": 5}, "model.knn_memory"),
        ({"memory": 5, "positions": "learned"}, "model.positions"),
        ({"memory": 5, "pattern": ("sparse",)}, "model.memory"),
        ({"pattern": ("sparse",), "sparse_newest": 0}, "model.sparse_newest"),
        ({"pattern": ("knn",), "knn_memory": 5, "attention_softcap": 1.0}, "attention_softcap"),
        ({"pattern": ("dense",)}, "gated_linear"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(fields, word):
    with pytest.raises(UserError, match=word):
        ModelConfig(**fields).resolved()
