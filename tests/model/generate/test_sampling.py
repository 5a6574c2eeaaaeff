"""Each filter against its definition in plain numpy, the draws against the distribution that they should have.

Legend: B rows, V tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.generate.sampling import Sampling, draw, filtered, penalized

V = 12
# A grid of few values, so that equal logits are common; zeros of both signs among them.
LOGITS = st.lists(st.sampled_from([-0.0, *(i / 4 for i in range(-24, 25))]), min_size=V, max_size=V)
FILTERS = st.tuples(st.integers(0, V + 2), st.floats(0.01, 1.0), st.floats(0.0, 0.99))

jit_filtered, jit_draw = jax.jit(filtered), jax.jit(draw)


def sampling(rows: int, **values: Any) -> Sampling:
    """Plain sampling for all rows but for the parameters named, each a number or one number per row."""
    plain = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | values
    return Sampling(
        **{f: np.broadcast_to(np.asarray(v, np.int32 if f == "top_k" else np.float32), rows) for f, v in plain.items()}
    )


def reference(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of logits [V] stay, token by token in float64; and for which rounding decides: both [V] bool."""
    staying, close = np.full(V, True), np.full(V, False)
    if top_k:
        staying = np.array([(logits > x).sum() < top_k for x in logits])
    if top_p < 1:
        probabilities = np.where(staying, scipy.special.softmax(np.where(staying, logits, -np.inf)), 0.0)
        mass = np.array([probabilities[logits > x].sum() for x in logits])
        close |= np.abs(mass - top_p) < 1e-5
        staying &= mass < top_p
    probabilities = scipy.special.softmax(np.where(staying, logits, -np.inf))
    close |= staying & (np.abs(probabilities / probabilities.max() - min_p) < 1e-5)
    return staying & (probabilities >= min_p * probabilities.max()), close


@settings(max_examples=150)
@given(LOGITS, FILTERS)
@example([0.0, -0.0] * (V // 2), (3, 1.0, 0.0))
def test_exactly_the_right_tokens_stay(logits, filters):
    logits = np.array(logits)
    found = np.asarray(jit_filtered(logits[None].astype(np.float32), *(np.array([f], np.float32) for f in filters)))[0]
    stays, close = reference(logits, *filters)
    assert (np.isfinite(found) == stays)[~close].all()
    assert (found == logits)[np.isfinite(found)].all(), "what stays is not changed: the softmax renormalises it"


@settings(max_examples=60)
@given(st.permutations(range(V)), st.integers(1, V))
def test_top_k_keeps_k_tokens_where_all_differ(order, k):
    found = jit_filtered(np.array(order, np.float32)[None], np.array([k]), np.ones(1), np.zeros(1))
    assert np.isfinite(found).sum() == k


@settings(max_examples=60)
@given(st.permutations(range(V)), st.floats(0.05, 0.95))
def test_top_p_keeps_the_smallest_set_with_that_probability(order, p):
    logits = np.array(order) / 3
    found = np.asarray(jit_filtered(np.float32(logits)[None], np.zeros(1), np.array([p]), np.zeros(1)))[0]
    kept = scipy.special.softmax(logits)[np.isfinite(found)]
    assert kept.sum() >= p - 1e-5
    assert kept.sum() - kept.min() < p + 1e-5
    assert set(np.flatnonzero(np.isfinite(found))) == set(np.argsort(-logits)[: len(kept)])


@settings(max_examples=60)
@given(LOGITS, st.lists(st.booleans(), min_size=V, max_size=V), st.floats(0.1, 10))
def test_repetition_penalty(logits, seen, penalty):
    found = penalized(np.float32(logits)[None], np.array(seen)[None], np.float32([penalty]))[0]
    wanted = [(x / penalty if x > 0 else x * penalty) if s else x for x, s in zip(logits, seen, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.85, "min_p": 0.1, "repetition_penalty": 1.4},
    ],
)
def test_draws_have_the_distribution_of_the_tokens_that_stay(parameters):
    rng = np.random.default_rng(3)
    logits, seen = rng.normal(size=V) * 0.7, rng.random(V) < 0.5
    every = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | parameters
    penalty = every["repetition_penalty"]
    tempered = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits) / every["temperature"]
    stays, close = reference(tempered, every["top_k"], every["top_p"], every["min_p"])
    assert not close.any()
    assert stays.sum() > 1
    rows = 20_000
    keys = jax.random.split(jax.random.key(7), rows)
    tokens = jit_draw(jnp.tile(jnp.float32(logits), (rows, 1)), np.tile(seen, (rows, 1)), sampling(rows, **every), keys)
    counts = np.bincount(tokens, minlength=V)
    assert counts[~stays].sum() == 0
    wanted = scipy.special.softmax(tempered[stays]) * rows
    assert scipy.stats.chisquare(counts[stays], wanted).pvalue > 1e-3


def test_temperature_zero_takes_the_most_probable_token_whatever_the_filters_and_neighbours():
    logits = np.random.default_rng(0).normal(size=(6, V)).astype(np.float32)
    logits[1, [3, 5]] = 9.0  # of equal ones the first
    keys = jax.random.split(jax.random.key(0), 6)
    seen = np.zeros((6, V), bool)
    seen[2] = True
    penalties, top_k = [1, 1, 2, 1, 1, 1], [0, 5, 0, 2, 0, 0]
    chosen = sampling(6, temperature=[0, 0, 0, 1, 0, 1], top_k=top_k, repetition_penalty=penalties)
    tokens = np.asarray(jit_draw(logits, seen, chosen, keys))
    greedy = [0, 1, 2, 4]
    np.testing.assert_array_equal(tokens[greedy], logits[greedy].argmax(1))
    assert tokens[1] == 3


def test_a_row_draws_the_same_alone_and_beside_any_rows():
    rng = np.random.default_rng(1)
    rows = 24
    logits, seen = rng.normal(size=(rows, 1000)).astype(np.float32) * 2, rng.random((rows, 1000)) < 0.2
    keys = jax.random.split(jax.random.key(2), rows)
    mixed = sampling(
        rows,
        temperature=rng.choice([0.0, 0.7, 1.3], rows),
        top_k=rng.choice([0, 40], rows),
        top_p=rng.choice([1.0, 0.9], rows),
        min_p=rng.choice([0.0, 0.05], rows),
        repetition_penalty=rng.choice([1.0, 1.2], rows),
    )
    together = np.asarray(jit_draw(logits, seen, mixed, keys))
    alone = [
        int(jit_draw(logits[i : i + 1], seen[i : i + 1], Sampling(*(v[i : i + 1] for v in mixed)), keys[i : i + 1])[0])
        for i in range(rows)
    ]
    np.testing.assert_array_equal(together, alone)
    assert len(set(alone)) > rows / 2


@pytest.mark.parametrize(
    "parameters", [{"temperature": 1e-38}, {"temperature": 1e-6}, {"top_p": 1e-9}, {"top_k": 1}, {"min_p": 0.99999}]
)
def test_extreme_values_leave_the_most_probable_token(parameters):
    logits = np.float32([[0.5, 30.0, -np.inf, 29.0, -1e30]] * 50)
    keys = jax.random.split(jax.random.key(5), 50)
    assert (np.asarray(jit_draw(logits, np.zeros((50, 5), bool), sampling(50, **parameters), keys)) == 1).all()


def test_new_values_compile_nothing():
    fresh = jax.jit(lambda *a: draw(*a))
    logits, keys = np.zeros((2, V), np.float32), jax.random.split(jax.random.key(0), 2)
    for parameters in ({}, {"temperature": 0.0}, {"top_k": [3, 0]}, {"top_p": 0.5, "min_p": 0.1}):
        fresh(logits, np.zeros((2, V), bool), sampling(2, **parameters), keys)
    assert fresh._cache_size() == 1
