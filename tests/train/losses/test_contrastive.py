"""The losses over all pairs against float64 loops, and over eight devices against one.

Legend: B rows, E the width of the vectors.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from tpu.mesh import make_mesh
from train.config import MeshConfig
from train.losses.contrastive import contrastive_sums

both = pytest.mark.parametrize("similarity", ["softmax", "sigmoid"])
sums = jax.jit(contrastive_sums, static_argnums=2)


def reference(logits: np.ndarray, weights: np.ndarray, similarity: str) -> tuple[float, float]:
    """One pair after the other."""
    rows = [i for i, weight in enumerate(weights) if weight]
    loss = right = 0.0
    for i in rows:
        right += (max(rows, key=lambda j: logits[i, j]) == i) / 2 + (max(rows, key=lambda j: logits[j, i]) == i) / 2
        if similarity == "softmax":
            for line in (logits[i], logits[:, i]):
                highest = max(line[j] for j in rows)
                loss += (math.log(sum(math.exp(line[j] - highest) for j in rows)) + highest - line[i]) / 2
            continue
        for j in rows:
            z = logits[i, j] if i == j else -logits[i, j]
            loss += math.log1p(math.exp(-abs(z))) + max(-z, 0.0)
    return loss, right


@both
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 3.0, 60.0]), padding=st.integers(0, 5))
def test_a_loss_is_its_loop(similarity, seed, scale, padding):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(6, 6))).astype(np.float32)
    weights = rng.permutation([0.0] * padding + [1.0] * (6 - padding)).astype(np.float32)
    found = sums(logits, weights, similarity)
    wanted = reference(logits.astype(np.float64), weights, similarity)
    assert [float(a) for a in found] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@both
def test_padding_changes_nothing_not_even_a_gradient(similarity):
    rng = np.random.default_rng(0)
    logits, weights = rng.normal(size=(5, 5)), np.array([1, 0, 1, 1, 0], np.float32)
    there = np.flatnonzero(weights)
    wild = logits.copy()
    wild[[1, 4]], wild[:, [1, 4]] = 1e4, -1e4
    grad = jax.jit(jax.value_and_grad(lambda a, w: contrastive_sums(a, w, similarity)[0]))
    alone, of_alone = grad(jnp.asarray(logits[np.ix_(there, there)], jnp.float32), np.ones(3, np.float32))
    for padded in (logits, wild):
        loss, gradient = grad(jnp.asarray(padded, jnp.float32), weights)
        assert loss == pytest.approx(float(alone), rel=1e-6)
        np.testing.assert_allclose(np.asarray(gradient)[np.ix_(there, there)], of_alone, rtol=1e-5, atol=1e-7)
        assert not np.any(np.asarray(gradient)[weights == 0])
        assert not np.any(np.asarray(gradient)[:, weights == 0])


@pytest.mark.parametrize("rows", [2, 7])
def test_identical_vectors_lose_the_logarithm_of_their_number(rows):
    loss, right = sums(np.full((rows, rows), 3.0, np.float32), np.ones(rows, np.float32), "softmax")
    assert loss / rows == pytest.approx(math.log(rows), rel=1e-6)
    assert right == 1  # The first of equals counts as the best.


@both
def test_pairs_that_fit_lose_little_and_are_found(similarity):
    logits = np.where(np.eye(4), 20.0, -20.0).astype(np.float32)
    loss, right = sums(logits, np.ones(4, np.float32), similarity)
    assert 0 <= loss < 1e-6
    assert right == 4
    assert sums(-logits, np.ones(4, np.float32), similarity)[1] == 0


@both
@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}])
def test_eight_devices_meet_the_negatives_of_all(similarity, axes):
    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(16, 5)).astype(np.float32) for _ in range(2))
    weights = (rng.random(16) < 0.8).astype(np.float32)

    def loss(vectors: tuple[jax.Array, jax.Array], weights: jax.Array) -> jax.Array:
        return contrastive_sums(2 * vectors[0] @ vectors[1].T, weights, similarity)[0] / weights.sum()

    both_of = jax.value_and_grad(loss)
    wanted, of_wanted = jax.jit(both_of)((images, texts), weights)
    mesh = make_mesh(MeshConfig(**axes), jax.devices())
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        divided = jax.device_put(((images, texts), weights), rows)
        found, of_found = jax.jit(both_of)(*divided)
    assert len(divided[1].sharding.device_set) == 8
    assert divided[1].addressable_shards[0].data.shape == (2,)
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    for mine, theirs in zip(of_found, of_wanted, strict=True):
        assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs)
