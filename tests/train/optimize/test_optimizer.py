"""The update rules on the weights of a real model and on a problem of their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import kinds
from model.config import ModelConfig
from train.config import OptimizerConfig
from train.optimize.optimizer import decay_mask, ema_update, optimizer, state_bytes

NAMES = ["adamw", "adafactor", "lion", "sgd", "muon"]
CONFIG = ModelConfig(
    vocab_size=11, layers=3, embed_dim=8, heads=2, positions="learned", max_positions=5, qk_norm=True, tied_head=False
)
CONFIG = CONFIG.resolved().placed("cpu", "float32")
_, ABSTRACT, AXES = kinds.build(CONFIG)


def draw(seed: int) -> Any:
    """An array for every weight of the model."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), ABSTRACT)


def by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def rule(name: str, rate: float = 0.1, **fields) -> optax.GradientTransformation:
    return optimizer(OptimizerConfig(name=name, **{"clip_norm": 0.0} | fields), lambda step: rate, AXES)


def first_update(rule: optax.GradientTransformation, gradient: Any, weights: Any) -> Any:
    return jax.jit(lambda g, w: rule.update(g, rule.init(w), w)[0])(gradient, weights)


# What decays


def test_norms_biases_and_embeddings_do_not_decay():
    mask = by_name(decay_mask(ABSTRACT, OptimizerConfig().no_decay))
    assert all(decays == name.endswith("kernel") for name, decays in mask.items())
    assert sum(mask.values()) == 7  # query, key, value, out, up, down, head
    everything = by_name(decay_mask(ABSTRACT, ()))
    assert all(everything.values())
    only_mlp = by_name(decay_mask(ABSTRACT, ("attention", "head", "embedding", "final_norm", "bias", "mlp_norm")))
    assert {name for name, decays in only_mlp.items() if decays} == {
        f"stack.groups.layer_0.mlp.{part}.kernel" for part in ("up", "down")
    }


@pytest.mark.parametrize("name", NAMES)
def test_without_gradient_nothing_moves_but_by_decay(name):
    """Decoupled: a factor of 1 - rate * decay on what decays, in every rule."""
    weights = draw(0)
    updates = first_update(rule(name, weight_decay=0.3), jax.tree.map(jnp.zeros_like, weights), weights)
    for path, update in by_name(updates).items():
        wanted = -0.1 * 0.3 * by_name(weights)[path] if path.endswith("kernel") else jnp.zeros_like(update)
        np.testing.assert_allclose(update, wanted, rtol=1e-5, atol=1e-7, err_msg=path)


# The rules


@pytest.mark.parametrize("name", NAMES)
def test_a_small_problem_is_solved(name):
    """Least squares towards random weights, from other random weights."""
    target, weights = draw(1), draw(2)
    update = rule(name, rate=0.02, weight_decay=0.0, beta1=0.9, clip_norm=1e3)

    def distance(w: Any) -> jax.Array:
        return sum(jnp.mean((a - b) ** 2) for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(target), strict=True))

    def step(carry: Any, _: None) -> Any:
        w, state = carry
        updates, state = update.update(jax.grad(distance)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    (found, _), _ = jax.jit(lambda w: jax.lax.scan(step, (w, update.init(w)), None, 300))(weights)
    assert distance(found) < 0.2 * distance(weights)


def test_adamw_by_hand():
    """Two steps from the paper's algorithm 2, without decay."""
    beta1, beta2, eps, rate = 0.8, 0.9, 1e-3, 0.1
    update = rule("adamw", rate, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0)
    weights, gradients = draw(0), [draw(3), draw(4)]
    state, m, v, wanted = update.init(weights), 0.0, 0.0, np.asarray(weights["final_norm"]["scale"], np.float64)
    for t, gradient in enumerate(gradients, 1):
        g = np.asarray(gradient["final_norm"]["scale"], np.float64)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        wanted = wanted - rate * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        updates, state = update.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
    np.testing.assert_allclose(weights["final_norm"]["scale"], wanted, rtol=1e-5)


def test_lion_and_sgd_by_hand():
    weights, gradient = draw(0), draw(3)
    lion = first_update(rule("lion", weight_decay=0.0), gradient, weights)
    sgd = first_update(rule("sgd", weight_decay=0.0), gradient, weights)
    for path, g in by_name(gradient).items():
        np.testing.assert_allclose(by_name(lion)[path], -0.1 * np.sign(g), rtol=1e-6)
        np.testing.assert_allclose(by_name(sgd)[path], -0.1 * g, rtol=1e-6)


def test_muon_makes_the_matrices_of_layers_orthogonal():
    """Layer by layer, heads joined; embeddings, head, norms and biases go to Adam, whose first
    step has one size everywhere."""
    weights = draw(0)
    updates = by_name(first_update(rule("muon", weight_decay=0.0), draw(5), weights))
    matrices = {path: update for path, update in updates.items() if path.startswith("stack") and "kernel" in path}
    assert len(matrices) == 6
    for path, update in matrices.items():
        columns = update.shape[-1] if path.endswith(("out.kernel", "down.kernel")) else np.prod(update.shape[2:])
        for layer in np.asarray(update).reshape(CONFIG.layers, -1, columns):
            values = np.linalg.svd(layer, compute_uv=False)
            assert len(values) == CONFIG.embed_dim
            # Newton-Schulz leaves them between about 0.7 and 1.2 of each other's mean.
            assert values.min() > 0.55 * values.mean(), (path, values)
            assert values.max() < 1.45 * values.mean(), (path, values)
            rms = 0.2 * 0.1 * np.sqrt(max(layer.shape)) / np.sqrt(layer.size / CONFIG.embed_dim)
            np.testing.assert_allclose(np.sqrt((layer**2).mean()), rms, rtol=0.35, err_msg=path)
    for path in updates.keys() - matrices.keys():
        size = np.abs(updates[path])
        np.testing.assert_allclose(size, size.flat[0], rtol=1e-3, err_msg=path)


def test_clipping_by_the_global_norm():
    weights, gradient = draw(0), draw(3)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    for limit, factor in ((norm / 4, 0.25), (norm * 4, 1.0)):
        updates = first_update(rule("sgd", weight_decay=0.0, clip_norm=limit), gradient, weights)
        for path, g in by_name(gradient).items():
            np.testing.assert_allclose(by_name(updates)[path], -0.1 * factor * g, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_the_state_are_those_of_a_real_one(name):
    real = rule(name).init(draw(0))
    assert state_bytes(rule(name), ABSTRACT) == sum(leaf.nbytes for leaf in jax.tree.leaves(real))


# The moving average


def test_average_in_closed_form():
    """With a decay d that is reached at once, sum of (1 - d) d^(n - i) w_i; before, (1 + n) / (10 + n)."""
    weights = [float(w) for w in np.random.default_rng(0).normal(size=400)]
    average, wanted = {"w": jnp.float32(weights[0])}, weights[0]
    for step, w in enumerate(weights):
        average = ema_update(average, {"w": jnp.float32(w)}, 0.95, jnp.int32(step))
        decay = min(0.95, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * w
        np.testing.assert_allclose(average["w"], wanted, rtol=1e-4, atol=1e-5)
    late = sum(0.05 * 0.95 ** (399 - i) * w for i, w in enumerate(weights))  # the start has been forgotten
    np.testing.assert_allclose(average["w"], late, atol=1e-3)


def test_average_of_bfloat16_weights_is_kept_in_float32():
    average = {"w": jnp.float32(1.0)}
    found = ema_update(average, {"w": jnp.bfloat16(1.5)}, 0.9999, jnp.int32(10**6))
    assert found["w"].dtype == jnp.float32
    np.testing.assert_allclose(found["w"], 1 + 0.5e-4, rtol=1e-6)


# Noise on gradients, and the L1 penalty


def test_gradient_noise_has_the_variance_that_falls():
    noisy = rule("sgd", rate=1.0, beta1=0.0, weight_decay=0.0, gradient_noise=0.3)
    weights = {"kernel": jnp.zeros((200, 200))}
    zeros, state = jax.tree.map(jnp.zeros_like, weights), noisy.init(weights)
    for step in (1, 2, 3):
        updates, state = noisy.update(zeros, state, weights)
        assert float(updates["kernel"].var()) == pytest.approx(0.3 / step**0.55, rel=0.05)  # 40,000 draws: 1 in 140
    assert optimizer(OptimizerConfig(), lambda step: 0.1, AXES).init(weights)  # none, and nothing is drawn


def test_gradient_noise_follows_the_seed():
    config, weights = OptimizerConfig(name="sgd", gradient_noise=1.0), {"kernel": jnp.zeros((4, 4))}
    rules = [optimizer(config, lambda step: 1.0, AXES, seed=seed) for seed in (0, 0, 1)]
    drawn = [first_update(rule, weights, weights)["kernel"] for rule in rules]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_the_l1_penalty_finds_the_lasso_of_a_quadratic():
    goal = jnp.asarray([3.0, 0.4, -0.2, -2.0, 0.0])  # of |w - goal|^2 / 2: with the penalty, its soft threshold
    lasso = rule("sgd", rate=0.1, beta1=0.0, weight_decay=0.0, l1_penalty=0.5)
    weights = {"kernel": jnp.ones(5), "bias": jnp.ones(5)}
    state = lasso.init(weights)
    for _ in range(200):
        updates, state = lasso.update(jax.tree.map(lambda w: w - goal, weights), state, weights)
        weights = optax.apply_updates(weights, updates)
    np.testing.assert_allclose(weights["kernel"], [2.5, 0.0, 0.0, -1.5, 0.0], atol=1e-6)
    np.testing.assert_array_equal(weights["kernel"][jnp.asarray([1, 2, 4])], 0.0)  # exactly
    np.testing.assert_allclose(weights["bias"], goal, atol=1e-6)  # what does not decay does not shrink


@pytest.mark.parametrize("name", NAMES)
def test_the_l1_penalty_is_one_soft_threshold_after_any_rule(name):
    weights, gradient = draw(0), draw(1)
    plain = first_update(rule(name, weight_decay=0.0), gradient, weights)
    shrunk = first_update(rule(name, weight_decay=0.0, l1_penalty=2.0), gradient, weights)
    ends = jax.tree.map(jnp.add, weights, plain)
    mask = decay_mask(weights, OptimizerConfig().no_decay)
    expected = jax.tree.map(lambda m, e: jnp.sign(e) * jnp.maximum(abs(e) - 0.2, 0) if m else e, mask, ends)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(jax.tree.map(jnp.add, weights, shrunk)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-6, err_msg=str(path))
