"""`model.weights.build` remembers, and what it gives is the caller's own."""

from __future__ import annotations

import jax

from model import kinds
from model.config import ModelConfig


def test_what_is_built_again_is_equal_and_the_callers_own():
    config = ModelConfig(vocab_size=9, layers=1, embed_dim=4, heads=1).resolved().placed("cpu", "float32")
    graphdef, weights, axes = kinds.build(config)
    weights.pop("stack"), axes.pop("embedding")
    again = kinds.build(config)
    assert again[0] == graphdef
    assert again[1].keys() == again[2].keys() > weights.keys()
    config.embed_dim = 8
    assert kinds.build(config)[1]["embedding"]["embedding"].shape == (9, 8)


def test_a_mesh_in_use_stays_with_what_was_built_in_it(one_device):
    config = ModelConfig(vocab_size=9, layers=1, embed_dim=4, heads=1).resolved().placed("cpu", "float32")
    with jax.set_mesh(one_device):
        kinds.build(config)
    outside = kinds.build(config)[1]
    assert all(leaf.sharding is None for leaf in jax.tree.leaves(outside))
