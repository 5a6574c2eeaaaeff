"""Keeping the experts of a mixture in equal use: losses, the bias that follows the load, and the figures of a step.

All are made of sums over the whole batch (`model.moe.Routing`), whatever devices and micro-batches it was cut into.

Legend: L mixtures of a model, E experts, K experts per token, G groups of layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from model.moe import Routing

Routings = dict[str, Routing]  # by layer of a group; leaves [G, ...]


def balance_loss(routings: Routings, load: jax.Array, tokens: jax.Array) -> jax.Array:
    """E * sum over experts of (share of assignments) * (mean score), Switch (arXiv:2101.03961), equations 4 to 6.

    The mean over the mixtures; 1 where scores are uniform, at most E. A sum over micro-batches, which share `load` and
    `tokens`, is the loss of the whole batch.

    Args:
      load: [L, E], of `loads`, of the whole batch. tokens: [], those of the whole batch that are no padding.
    """
    share = load / jnp.maximum(load.sum(-1, keepdims=True), 1.0)
    mean = _each(routings, "probability") / jnp.maximum(tokens, 1.0)
    return share.shape[1] * jnp.sum(jax.lax.stop_gradient(share) * mean, -1).mean()


def router_z_loss(routings: Routings, tokens: jax.Array) -> jax.Array:
    """The mean over tokens and mixtures of logsumexp(logits)^2, ST-MoE (arXiv:2202.08906), equation 5."""
    return _each(routings, "z").mean() / jnp.maximum(tokens, 1.0)


def loads(routings: Routings) -> jax.Array:
    """Assignments to each expert of each mixture: [L, E]."""
    return _each(routings, "load")


def balance_figures(routings: Routings) -> dict[str, jax.Array]:
    """What a step reports, from the sums over its batch: means over the mixtures.

    `expert_load`: assignments to the busiest expert over the mean; 1 is even, E / K the worst. `dropped_share`: of
    assignments. `router_entropy`: of the scores, in nats; log E where they are uniform. `balance_loss` and
    `router_z_loss`: without their weights.
    """
    load, tokens = loads(routings), _each(routings, "tokens")[0]
    mean = jnp.maximum(load.mean(-1), 1e-9)
    return {
        "expert_load": (load.max(-1) / mean).mean(),
        "dropped_share": _each(routings, "dropped").sum() / jnp.maximum(load.sum(), 1.0),
        "router_entropy": _each(routings, "entropy").mean() / jnp.maximum(tokens, 1.0),
        "balance_loss": balance_loss(routings, load, tokens),
        "router_z_loss": router_z_loss(routings, tokens),
    }


def rebalanced(weights: Any, old: Any, routings: Routings, rate: float) -> Any:
    """`weights` with the bias of every router moved by `rate`, up where its expert had less than the mean load.

    Auxiliary-loss-free balancing (arXiv:2408.15664), algorithm 1: b += rate * sign(mean - load). It starts from the
    `old` weights, for the optimizer has no business with it.
    """
    groups = dict(weights["stack"]["groups"])
    for name, routing in routings.items():
        bias = old["stack"]["groups"][name]["moe"]["balance_bias"]  # [G, E], or [repeats, G / repeats, E]
        less = jnp.sign(routing.load.mean(-1, keepdims=True) - routing.load).reshape(bias.shape)
        moe = groups[name]["moe"] | {"balance_bias": bias + rate * less}
        groups[name] = groups[name] | {"moe": moe}
    return weights | {"stack": weights["stack"] | {"groups": groups}}


def _each(routings: Routings, field: str) -> jax.Array:
    """One field of all mixtures: [L, ...]."""
    return jnp.concatenate([getattr(routing, field) for routing in routings.values()])
