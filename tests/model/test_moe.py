"""Mixtures of experts against a plain loop over experts.

Legend: B rows, T tokens, D embed_dim, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from model import kinds
from model.attention.cache import empty_cache
from model.config import ModelConfig
from model.linear import grouped_matmul
from model.mlp import ACTIVATIONS
from model.moe import MoE, Routing
from model.place import Place
from model.weights import bind
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.config import MeshConfig


def configured(**fields: Any) -> ModelConfig:
    base = ModelConfig(vocab_size=20, layers=2, embed_dim=12, heads=2, mlp_dim=8, mlp_bias=False, init="fan_in")
    return dataclasses.replace(base, **fields).resolved().placed("cpu", "float32")


def build(config: ModelConfig, seed: int, uneven: float = 0.0) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """A mixture with random weights; the larger `uneven`, the more tokens go to the first experts."""
    graph, state = nnx.split(MoE(config, nnx.Rngs(seed)))
    weights = nnx.to_pure_dict(state)
    rng = np.random.default_rng(seed)
    weights["router"] = jnp.asarray(rng.normal(size=weights["router"].shape), jnp.float32)
    if config.router_bias:
        weights["balance_bias"] = -uneven * jnp.arange(config.experts, dtype=jnp.float32)
    return graph, weights


def reference(
    config: ModelConfig, weights: dict[str, Any], x: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Every expert for every token, times its weight: ([B, T, D], kept choices [B, T, E], all choices [B, T, E])."""
    logits = x @ weights["router"]
    scores = jax.nn.sigmoid(logits) if config.router == "sigmoid" else jax.nn.softmax(logits)
    order = jnp.argsort(-(scores + weights.get("balance_bias", 0.0)), axis=-1)[..., : config.experts_per_token]
    chosen = (order[..., None] == jnp.arange(config.experts)).any(-2) & real[..., None]
    kept = chosen
    if config.capacity_factor:
        even = x.shape[1] * config.experts_per_token / config.experts
        kept = chosen & (jnp.cumsum(chosen, axis=1) <= math.ceil(config.capacity_factor * even))
    weight = jnp.where(chosen, scores, 0.0)
    if config.router_renormalize:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    weight = jnp.where(kept, weight, 0.0) * config.router_scale
    act = ACTIVATIONS[config.activation]

    def feed_forward(up: Any, gate: Any, down: Any) -> jax.Array:
        return (act(x @ up) if gate is None else act(x @ gate) * (x @ up)) @ down

    out = jnp.zeros_like(x)
    for e in range(config.experts):
        gate = weights["gate"]["kernel"][e] if "gate" in weights else None
        y = feed_forward(weights["up"]["kernel"][e], gate, weights["down"]["kernel"][e])
        out = out + weight[..., e, None] * y
    if config.shared_experts:
        shared = weights["shared"]
        gate = shared["gate"]["kernel"] if "gate" in shared else None
        out = out + feed_forward(shared["up"]["kernel"], gate, shared["down"]["kernel"])
    return out, kept, chosen


@st.composite
def cases(draw: st.DrawFn, capacity: bool) -> tuple[ModelConfig, int, int, int, float]:
    experts = draw(st.sampled_from([1, 2, 5, 8]))
    config = configured(
        experts=experts,
        experts_per_token=draw(st.integers(1, min(3, experts))),
        expert_dim=draw(st.sampled_from([0, 6])),
        shared_experts=draw(st.sampled_from([0, 0, 2])),
        activation=draw(st.sampled_from(["gelu", "swiglu"])),
        router=draw(st.sampled_from(["softmax", "sigmoid"])),
        router_renormalize=draw(st.booleans()),
        router_scale=draw(st.sampled_from([1.0, 2.5])),
        router_bias=draw(st.booleans()),
        capacity_factor=draw(st.sampled_from([0.3, 1.0, 1.5])) if capacity else 0.0,
    )
    rows, tokens = draw(st.sampled_from([(1, 1), (2, 3), (3, 17), (2, 150)]))
    return config, rows, tokens, draw(st.integers(0, 9)), draw(st.sampled_from([0.0, 0.1, 9.0]))


def agrees(case: tuple[ModelConfig, int, int, int, float]) -> Routing:
    """The mixture and its gradients equal the loop's; returns what the router said it did."""
    config, rows, tokens, seed, uneven = case
    graph, weights = build(config, seed, uneven)
    rng = np.random.default_rng(seed)
    x, g = (jnp.asarray(rng.normal(size=(rows, tokens, config.embed_dim)), jnp.float32) for _ in range(2))
    real = jnp.asarray(rng.random((rows, tokens)) < 0.8)

    def ours(weights: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        out, routing = nnx.merge(graph, nnx.State(weights))(x, real, dropless=False)
        return jnp.sum(out * g), (out, routing)

    def loop(weights: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        out, kept, chosen = reference(config, weights, x, real)
        return jnp.sum(out * g), (out, kept, chosen)

    found, (out, routing) = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(weights, x)
    wanted, (plain, kept, chosen) = jax.grad(loop, (0, 1), has_aux=True)(weights, x)
    np.testing.assert_allclose(out, plain, rtol=0, atol=2e-5 * (1 + np.abs(plain).max()))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * (1 + np.abs(b).max()), err_msg=jax.tree_util.keystr(path))
    np.testing.assert_array_equal(routing.load, chosen.sum((0, 1)))
    assert routing.dropped == chosen.sum() - kept.sum()
    assert routing.tokens == real.sum()
    return routing


@settings(max_examples=5)
@given(case=cases(capacity=False))
def test_dropless_equals_a_loop_over_experts(case):
    assert agrees(case).dropped == 0


@settings(max_examples=4)
@given(case=cases(capacity=True))
def test_with_a_capacity_it_equals_the_loop_with_the_same_drops(case):
    agrees(case)


@settings(max_examples=8)
@given(data=st.data())
def test_grouped_products_and_their_gradients_equal_a_loop(data):
    """For any sizes, empty groups and rows of no group included, and blocks that do not divide."""
    groups, width, out = data.draw(st.sampled_from([(1, 4, 3), (4, 5, 2)]))
    sizes = np.array(data.draw(st.lists(st.sampled_from([0, 1, 7, 128, 130]), min_size=groups, max_size=groups)))
    rng = np.random.default_rng(sum(sizes))
    rows = 4 * 130 + 9
    x, w, g = (rng.normal(size=s).astype(np.float32) for s in ((rows, width), (groups, width, out), (rows, out)))
    ends = np.cumsum(sizes)
    g[ends[-1] :] = np.nan  # Nothing of it may arrive anywhere.
    y, pull = jax.vjp(
        lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes), "float32", "cpu"), *map(jnp.asarray, (x, w))
    )
    dx, dw = pull(jnp.asarray(g))
    wanted_y, wanted_dx, wanted_dw = np.zeros((rows, out)), np.zeros(x.shape), np.zeros(w.shape)
    for e, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        at = slice(end - size, end)
        wanted_y[at], wanted_dx[at], wanted_dw[e] = x[at] @ w[e], g[at] @ w[e].T, x[at].T @ g[at]
    for found, wanted in ((y, wanted_y), (dx, wanted_dx), (dw, wanted_dw)):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("uneven", [0.0, 9.0])
def test_over_devices_nothing_is_dropped_however_uneven_the_load(uneven):
    """Where all tokens choose experts of one device, they reach it in several rounds."""
    config = configured(experts=8, router_bias=True)
    graph, weights = build(config, 3, uneven)
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(8, 64, config.embed_dim)), jnp.float32) for _ in range(2))
    real = jnp.ones((8, 64), bool)

    def loss(weights: Any, x: jax.Array) -> tuple[jax.Array, Routing]:
        out, routing = nnx.merge(graph, nnx.State(weights))(x, real, dropless=False)
        return jnp.sum(out * g), routing

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    wanted = jax.jit(run)(weights, x)
    with jax.set_mesh(make_mesh(MeshConfig(expert=4), jax.devices()[:4])):
        found = jax.jit(run)(weights, x)
    load = np.asarray(found[0][1].load)
    assert (load[:2].sum() == load.sum()) == (uneven > 0)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * (1 + np.abs(b).max()))


@pytest.mark.parametrize("fields", [{"layer_loop": "scan", "moe_every": 2}, {"shared_experts": 1}])
def test_generation_through_the_cache_equals_the_full_forward(fields):
    """A token at a time; with a capacity, generation drops nothing and equals the dropless model."""
    config = configured(experts=4, **fields)
    limited = dataclasses.replace(config, capacity_factor=0.5)
    weights = kinds.init(config, jax.random.key(0))
    weights = jax.tree.map(lambda w: w + 0.3 * jax.random.normal(jax.random.key(1), w.shape), weights)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (3, 9)), jnp.int32)
    places = Place(jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), tokens.shape))
    full, _ = bind(kinds.build(config)[0], weights)(tokens, places)
    dropped, _ = bind(kinds.build(limited)[0], weights)(tokens, places)
    assert np.abs(np.asarray(full - dropped)).max() > 0.1
    model, cache = bind(kinds.build(limited)[0], weights), empty_cache(limited, 3, 9)
    step = jax.jit(lambda cache, tokens, place: model(tokens, place, cache))
    for t in range(9):
        hidden, cache = step(cache, tokens[:, t : t + 1], jax.tree.map(lambda a: a[:, t : t + 1], places))
        np.testing.assert_allclose(hidden[:, 0], full[:, t], rtol=0, atol=1e-5 * (1 + np.abs(full).max()))


def test_which_layers_are_mixtures():
    config = configured(layers=12, experts=4, moe_every=2, pattern=("local", "local", "global"), window=3)
    assert config.pattern == ("local", "local", "global") * 2
    assert config.resolved() == config
    assert [config.mixes(i) for i in range(6)] == [False, True] * 3
    groups = kinds.build(config)[1]["stack"]["groups"]
    found = {name: {"mlp", "moe"} & layer.keys() for name, layer in groups.items()}
    assert found == {f"layer_{i}": {"moe"} if i % 2 else {"mlp"} for i in range(6)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 4, "experts_per_token": 5}, "model.experts_per_token=5: valid: 1 to model.experts=4"),
        ({"experts": 4, "experts_per_token": 0}, "model.experts_per_token=0: valid: 1 to model.experts=4"),
        ({"experts": -1}, "model.experts=-1: must be at least 0"),
        ({"experts": 4, "moe_every": 0}, "model.moe_every=0: must be at least 1"),
        ({"experts": 4, "layers": 3, "moe_every": 2}, "model.layers=3: not a multiple of the 2 layers"),
        ({"experts": 4, "mlp_bias": True}, "model.mlp_bias=True: experts have none"),
        ({"experts": 4, "router": "top"}, "model.router='top': valid: softmax, sigmoid"),
        ({"shared_experts": 1}, "model.shared_experts=1: has no effect with model.experts=0"),
        ({"capacity_factor": 1.0}, "model.capacity_factor=1.0: has no effect with model.experts=0"),
        ({"experts": 4, "router_scale": 0.0}, "model.router_scale=0.0: must be positive"),
        *(
            ({"experts": 4, "kind": kind}, f"model.experts=4: only with model.kind='decoder', not {kind!r}")
            for kind in ("encoder", "encoder_decoder", "vision")
        ),
        ({"experts": 4, "fusion": "contrastive"}, "model.experts=4: not with model.fusion='contrastive'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(fields, message):
    with pytest.raises(UserError) as raised:
        configured(**fields)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
