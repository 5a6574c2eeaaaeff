"""Noise on embeddings: how strong it is, and that it is there in training alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kinds
from model.config import ModelConfig
from model.dropout import row_keys
from model.neftune import embedding_noise
from model.place import Place
from model.weights import bind

ALPHA = 5.0


def test_the_noise_is_uniform_and_scaled_by_the_rows_length():
    h = jnp.zeros((2, 64, 256))
    segments = jnp.ones((2, 64), jnp.int32).at[1, 16:].set(0)
    noise = np.asarray(embedding_noise(h, ALPHA, segments, row_keys(jax.random.key(0), 2)))
    for row, length in zip(noise, (64, 16), strict=True):
        bound = ALPHA / (length * 256) ** 0.5
        assert 0.999 * bound < abs(row).max() <= bound
        # 16,384 draws: the mean is within four of its own deviations, and so is the variance, bound^2 / 3
        assert abs(row.mean()) < 4 * bound / 3**0.5 / 128
        assert row.var() == pytest.approx(bound**2 / 3, rel=4 * (4 / 5) ** 0.5 / 128)


def test_a_row_has_its_noise_in_any_batch():
    h, segments, keys = jnp.zeros((3, 4, 8)), jnp.ones((3, 4), jnp.int32), row_keys(jax.random.key(1), 3)
    together = embedding_noise(h, ALPHA, segments, keys)
    alone = embedding_noise(h[2:], ALPHA, segments[2:], keys[2:])
    np.testing.assert_array_equal(together[2:], alone)
    assert not np.array_equal(together[0], together[1])


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
def test_a_model_has_it_where_it_has_keys(kind):
    positions = "relative" if kind == "encoder_decoder" else "learned"
    fields = {"vocab_size": 11, "layers": 1, "embed_dim": 8, "heads": 2, "kind": kind, "positions": positions}
    quiet = ModelConfig(**fields).resolved().placed("cpu", "float32")
    noisy = dataclasses.replace(quiet, embedding_noise=ALPHA)
    weights = kinds.init(quiet, jax.random.key(0))
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    place = Place(jnp.ones((2, 5), jnp.int32), jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (2, 5)))
    more = {"inputs": tokens, "input_segments": place.segments} if kind == "encoder_decoder" else {}

    def hidden(config: ModelConfig, key: jax.Array | None) -> np.ndarray:
        return np.asarray(bind(kinds.build(config)[0], weights)(tokens, place, key=key, **more)[0])

    keys = row_keys(jax.random.key(2), 2)
    np.testing.assert_array_equal(hidden(noisy, None), hidden(quiet, None))
    np.testing.assert_array_equal(hidden(quiet, keys), hidden(quiet, None))
    assert abs(hidden(noisy, keys) - hidden(quiet, None)).max() > 1e-3
