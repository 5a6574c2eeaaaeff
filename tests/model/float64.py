"""Pieces of models in plain numpy and float64, written from the papers, for the tests to compare with.

Weights are the nested dictionaries of `model.weights.build`, of one layer.

Legend: B rows, T queries, S keys, H heads, K head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import scipy.special
from flax import nnx

from model.config import ModelConfig
from model.weights import build

ACTIVATIONS = {
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * scipy.special.expit(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "swiglu": lambda x: x * scipy.special.expit(x),
    "geglu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def drawn(config: ModelConfig, make: Callable[..., nnx.Module], seed: int = 0) -> tuple[nnx.GraphDef, Any]:
    """The graph of `make(config, rngs)` and random weights that keep activations near 1, none of them at its start."""
    graphdef, abstract, _ = build(config, make)
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values, name = rng.normal(size=leaf.shape), path[-1].key
        if name in ("scale", "variance"):
            values = np.abs(1 + 0.3 * values) + 0.1
        elif name == "kernel":
            values = values / np.sqrt(np.prod(leaf.shape) / leaf.shape[-1]) ** 0.5
        return jax.numpy.asarray(values * (0.3 if name == "bias" else 1), leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, abstract)


def exactly(weights: Any) -> Any:
    """Weights as float64 arrays of numpy."""
    return jax.tree.map(lambda w: np.asarray(w, np.float64), weights)


def layers(weights: Any, count: int) -> list[Any]:
    """The layers of a stack whose groups have one layer, each by itself."""
    return [jax.tree.map(lambda w: w[i], weights["groups"]["layer_0"]) for i in range(count)]


def linear(x: np.ndarray, w: Any, contract: int = 1) -> np.ndarray:
    """x [..., *inputs] -> [..., *outputs]."""
    return np.tensordot(x, w["kernel"], contract) + w.get("bias", 0.0)


def norm(x: np.ndarray, w: Any, eps: float, kind: str = "layernorm") -> np.ndarray:
    """Over the last dimension."""
    x = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w["scale"] + w.get("bias", 0.0)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """q [B, T, H, K], k and v [B, S, H, K], mask [B, T, S] -> [B, T, H, K]; zero for a query that sees nothing."""
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        if seen := np.flatnonzero(mask[b, t]).tolist():
            scores = k[b, seen, h] @ q[b, t, h] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ v[b, seen, h] / weights.sum()
    return out


def cross(
    x: np.ndarray, y: np.ndarray, w: Any, mask: np.ndarray, turn: Callable = lambda a: a, eps: float = 0.0
) -> np.ndarray:
    """Attention of x [B, T, D] to y [B, S, D'] with the projections `w`; zero for a query that sees nothing.

    turn: what is done to queries and keys [B, T, H, K] for their positions, after their RMSNorm with `eps` where `w`
    has one.
    """
    q, k = linear(x, w["query"]), linear(y, w["key"])
    if "query_norm" in w:
        q, k = norm(q, w["query_norm"], eps, "rmsnorm"), norm(k, w["key_norm"], eps, "rmsnorm")
    out = attention(turn(q), turn(k), linear(y, w["value"]), mask)
    return np.where(mask.any(-1)[..., None], linear(out, w["out"], 2), 0.0)


def mlp(x: np.ndarray, w: Any, activation: str) -> np.ndarray:
    """The feed-forward block, gated where there is a gate."""
    f, up = ACTIVATIONS[activation], linear(x, w["up"])
    return linear(f(linear(x, w["gate"])) * up if "gate" in w else f(up), w["down"])


def block(
    x: np.ndarray, w: Any, mask: np.ndarray, config: Any, post: bool = False, turn: Callable = lambda a: a
) -> np.ndarray:
    """One layer, normalised before its branches or, `post`, after the sums; `turn` as for `cross`."""

    def of(name: str, a: np.ndarray) -> np.ndarray:
        return norm(a, w[name], config.norm_eps, config.norm)

    z = x if post else of("attention_norm", x)
    x = x + cross(z, z, w["attention"], mask, turn)
    x = of("attention_norm", x) if post else x
    x = x + mlp(x if post else of("mlp_norm", x), w["mlp"], config.activation)
    return of("mlp_norm", x) if post else x
