"""Dropout: what it does to an array, and that no two places of a model draw alike."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import block, kinds, transformer
from model.attention import attend
from model.config import ModelConfig
from model.dropout import dropout, row_keys
from model.place import Place
from model.weights import bind


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_share_and_scale(rate, dtype):
    x = jnp.full((100, 1000), 2.0, dtype)
    y = dropout(x, rate, row_keys(jax.random.key(0), 100))
    assert y.dtype == x.dtype
    kept = np.asarray(y != 0)
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / x.size)
    assert abs(kept.mean(0) - (1 - rate)).max() < 0.3  # no column is favoured
    np.testing.assert_allclose(np.asarray(y, np.float32)[kept], 2 / (1 - rate), rtol=0.01)
    np.testing.assert_array_equal(y, dropout(x, rate, row_keys(jax.random.key(0), 100)))
    assert (y != dropout(x, rate, row_keys(jax.random.key(1), 100))).any()
    assert (y[0] != y[1]).any()


def test_what_a_row_loses_does_not_depend_on_its_batch():
    keys = row_keys(jax.random.key(0), 6)
    whole = dropout(jnp.ones((6, 50)), 0.5, keys)
    some = jnp.array([4, 1])
    np.testing.assert_array_equal(dropout(jnp.ones((2, 50)), 0.5, keys[some]), whole[some])


def test_without_key_or_rate_it_is_not_there():
    x = jnp.arange(6.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, row_keys(jax.random.key(0), 6)) is x


def test_every_place_of_every_layer_draws_its_own(monkeypatch):
    config = ModelConfig(
        vocab_size=5,
        layers=4,
        embed_dim=4,
        heads=1,
        pattern=("global", "local"),
        window=2,
        embedding_dropout=0.1,
        attention_dropout=0.2,
        residual_dropout=0.3,
        layer_loop="unroll",
    )
    config = config.resolved().placed("cpu", "float32")
    graphdef, abstract, _ = kinds.build(config)
    tokens = jnp.zeros((1, 3), jnp.int32)
    drawn = []

    def recording(x, rate, key):
        drawn.append((rate, jax.random.key_data(key)[0]))
        return dropout(x, rate, key)

    for room in (attend, block, transformer):
        monkeypatch.setattr(room, "dropout", recording)

    def keys(key: jax.Array) -> list:
        drawn.clear()
        weights = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract)
        bind(graphdef, weights)(tokens, Place(tokens + 1, tokens), key=row_keys(key, 1))
        return [data for _, data in drawn]

    keys_of_steps = jax.jit(jax.vmap(keys))(jax.random.split(jax.random.key(0), 2))
    assert sorted(rate for rate, _ in drawn) == [0.1] + 4 * [0.2] + 8 * [0.3]
    seen = {tuple(np.asarray(data)[step]) for data in keys_of_steps for step in range(2)}
    assert len(seen) == 2 * (1 + 3 * config.layers)


def test_rates_without_a_key_change_nothing():
    config = ModelConfig(vocab_size=5, layers=1, embed_dim=4, heads=1).resolved().placed("cpu", "float32")
    rates = {"embedding_dropout": 0.5, "attention_dropout": 0.5, "residual_dropout": 0.5}
    graphdef, abstract, _ = kinds.build(config)
    noisy = kinds.build(dataclasses.replace(config, **rates))[0]
    weights = jax.tree.map(lambda leaf: jnp.linspace(0, 1, leaf.size).reshape(leaf.shape), abstract)
    tokens = jnp.arange(5, dtype=jnp.int32)[None]
    hidden = [
        jax.jit(lambda w, g=g, key=key: bind(g, w)(tokens, Place(tokens * 0, tokens), key=key)[0])(weights)
        for g, key in ((graphdef, None), (noisy, None), (noisy, row_keys(jax.random.key(0), 1)))
    ]
    np.testing.assert_array_equal(hidden[0], hidden[1])
    assert np.abs(hidden[2] - hidden[1]).max() > 0.01
