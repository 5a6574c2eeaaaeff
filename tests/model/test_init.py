"""How weights start, and what their dimensions are called."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import kinds
from model.config import ModelConfig
from tpu import rules

RESIDUAL = ("attention.out.kernel", "mlp.down.kernel")


def drawn(**fields) -> dict[str, np.ndarray]:
    """Fresh weights by dotted path."""
    config = ModelConfig(
        vocab_size=300, layers=8, embed_dim=48, heads=4, mlp_dim=160, positions="learned", max_positions=200, **fields
    )
    weights = jax.jit(lambda key: kinds.init(config.resolved().placed("cpu", "float32"), key))(jax.random.key(3))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    }


def assert_normal(values: np.ndarray, std: float) -> None:
    error = std / np.sqrt(2 * values.size)  # of a sample's standard deviation
    assert abs(values.std() - std) < 5 * error
    assert abs(values.mean()) < 5 * std / np.sqrt(values.size)
    assert 2.5 * std < np.abs(values).max() < 7 * std  # a normal distribution's tail, not a uniform one's


@pytest.mark.parametrize("init", ["gpt2", "normal"])
def test_normal_starts(init):
    """GPT-2's: 0.02, divided by sqrt(2 * layers) in the projections back into the residual stream."""
    weights = drawn(init=init, init_std=0.05, tied_head=False)
    assert {name.rpartition(".")[2] for name in weights} == {"kernel", "bias", "scale", "embedding"}
    for name, values in weights.items():
        if name.endswith(("kernel", "embedding")):
            scaled = init == "gpt2" and name.endswith(RESIDUAL)
            assert_normal(values, 0.05 / np.sqrt(16) if scaled else 0.05)
        else:
            np.testing.assert_array_equal(values, 0 if name.endswith("bias") else 1)
    assert sum(name.endswith(RESIDUAL) for name in weights) == 2
    kernel = weights["stack.groups.layer_0.mlp.up.kernel"]
    assert len(np.unique(kernel[:, 0, 0])) == 8  # every layer has its own
    query, key = (weights[f"stack.groups.layer_0.attention.{name}.kernel"].ravel() for name in ("query", "key"))
    assert abs(np.corrcoef(query, key)[0, 1]) < 0.05


@pytest.mark.parametrize("init", ["fan_in", "xavier"])
def test_starts_by_fan(init):
    weights = drawn(init=init, attention_bias=False, mlp_bias=False, norm_bias=False)
    fans = {"query": (48, 48), "key": (48, 48), "value": (48, 48), "out": (48, 48), "up": (48, 160), "down": (160, 48)}
    kernels = {name.split(".")[-2]: values for name, values in weights.items() if name.endswith("kernel")}
    assert kernels.keys() == fans.keys()
    for name, (fan_in, fan_out) in fans.items():
        if init == "fan_in":
            assert_normal(kernels[name], fan_in**-0.5)
        else:
            limit = np.sqrt(6 / (fan_in + fan_out))
            assert 0.99 * limit < np.abs(kernels[name]).max() <= limit
            assert abs(kernels[name].std() - limit / np.sqrt(3)) < 0.02 * limit
    for name in ("embedding.embedding", "position_embedding.embedding"):
        assert_normal(weights[name], 0.02)


@settings(max_examples=25)
@given(data=st.data())
def test_every_dimension_of_every_weight_has_a_name_in_the_table(model_configs, data):
    config = data.draw(model_configs).placed("cpu", "float32")
    _, weights, axes = kinds.build(config)
    named = jax.tree.structure(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert named == jax.tree.structure(weights)
    sizes = {
        "layers": config.layers // len(config.pattern),
        "vocab": config.vocab_size,
        "table_embed": config.embed_dim,
        "positions": config.max_positions,
        "embed": config.embed_dim,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp_dim,
    }
    for leaf, names in zip(
        jax.tree.leaves(weights), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)), strict=True
    ):
        assert len(names) == leaf.ndim
        assert set(names) <= rules.RULES.keys()
        assert [sizes[name] for name in names if name != "norm"] == [
            size for size, name in zip(leaf.shape, names, strict=True) if name != "norm"
        ]
        flat = jax.tree.leaves(tuple(rules.partition_spec(names)))
        assert len(set(flat)) == len(flat)
        assert set(flat) <= set(rules.MESH_AXES)
    last_names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(weights)}
    assert last_names <= {"kernel", "bias", "scale", "embedding"}


def test_weights_come_in_their_dtype():
    config = ModelConfig(vocab_size=9, layers=2, embed_dim=4, heads=1, weight_dtype="bfloat16").resolved()
    config = config.placed("cpu", "float32")
    weights = jax.eval_shape(lambda: kinds.init(config, jax.random.key(0)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(weights)} == {"bfloat16"}
    assert jax.tree.structure(weights) == jax.tree.structure(kinds.build(config)[1])
