"""Queries that meet the keys a block at a time against all scores at once, and which form attention takes.

Legend: B rows, T queries, S keys, H heads, G kv_heads, K head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import cached_attention
from model.attention.attend import Rules, attend
from model.attention.block_sparse_attention import SparsePattern
from model.place import Place

CASES = {
    "causal": {},
    "window": {"window": 5},
    "softcap and alibi": {"softcap": 2.0, "alibi": True},
    "sinks": {"sinks": np.array([0.3, -1.0, 2.0, 0.0], np.float32), "window": 9},
    "sparse": {"sparse": SparsePattern(4, 2, 1, 1, 5)},
    "both ways": {"causal": False},
}
B, T, S = 2, 13, 90


def inputs(seed: int = 0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, n, t, 8)).astype(np.float32) for n, t in ((4, T), (2, S), (2, S)))
    order = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    keys = Place((order < [[75], [64]]).astype(np.int32), order)
    first = np.array([[60], [51]])
    return q * 8**-0.5, k, v, Place(np.ones((B, T), np.int32), (first + np.arange(T)).astype(np.int32)), keys


@pytest.mark.parametrize("block", [7, 32, 1024])
@pytest.mark.parametrize("name", CASES)
def test_a_block_at_a_time_equals_all_at_once(name, block, monkeypatch):
    monkeypatch.setattr(cached_attention, "BLOCK", block)
    found, wanted = (
        jax.jit(lambda *a, kind=kind: attend(*a, Rules(kind, **CASES[name])))(*inputs())
        for kind in ("chunked", "plain")
    )
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_sees_nothing_is_finite(monkeypatch):
    monkeypatch.setattr(cached_attention, "BLOCK", 32)
    q, k, v, queries, keys = inputs()
    nobody = queries._replace(segments=queries.segments * np.array([[2], [0]], np.int32))
    assert jnp.isfinite(attend(q, k, v, nobody, keys, Rules("chunked"))).all()
    assert not attend(q, k, v, nobody, keys, Rules("chunked"))[1].any()


def test_blocks_that_nobody_sees_are_not_read(monkeypatch):
    """Not-a-number in keys and values of later tokens, and of those before every window, reaches no result."""
    monkeypatch.setattr(cached_attention, "BLOCK", 10)
    q, k, v, queries, keys = inputs()
    wanted = attend(q, k, v, queries, keys, Rules("chunked", window=5))
    k, v = (a.copy() for a in (k, v))
    for a in (k, v):
        a[:, :, :40], a[:, :, 80:] = np.nan, np.nan
    np.testing.assert_array_equal(attend(q, k, v, queries, keys, Rules("chunked", window=5)), wanted)


@pytest.mark.parametrize("kind", ["chunked", "plain"])
def test_an_equal_copy_of_a_place_takes_the_same_form(kind):
    """Also as an argument of its own of a compiled function, where no identity is left to tell by."""
    q, k, v, place = (
        *(np.ones((1, 2, 256, 8), np.float32),) * 3,
        Place(np.ones((1, 256), np.int32), np.arange(256)[None]),
    )
    copy = Place(*(None if a is None else a.copy() for a in place))

    def form(keys: Place, same: bool) -> str:
        return str(jax.make_jaxpr(lambda a, b: attend(q, k, v, a, b, Rules(kind, same=same)))(place, keys))

    assert form(copy, True) == form(place, True)
    assert ("custom_vjp" in form(copy, True)) == (kind == "chunked")
    assert "custom_vjp" not in form(place, False)
