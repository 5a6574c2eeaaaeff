"""The feed-forward block: two projections around a nonlinearity, or a gated unit (GLU variants, arXiv:2002.05202)."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from model.config import ModelConfig
from model.linear import Linear
from tpu.rules import constrain

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """down(f(up x)), or down(f(gate x) * up x) for the gated activations."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        embed, mlp = ((config.embed_dim, "embed"),), ((config.mlp_dim, "mlp"),)
        self.activation = config.activation
        self.up = Linear(config, embed, mlp, config.mlp_bias, rngs)
        gated = config.activation in ("swiglu", "geglu")
        self.gate = Linear(config, embed, mlp, config.mlp_bias, rngs) if gated else None
        self.down = Linear(config, mlp, embed, config.mlp_bias, rngs, residual=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        activate = ACTIVATIONS[self.activation]
        h = activate(self.up(x)) if self.gate is None else activate(self.gate(x)) * self.up(x)
        return self.down(constrain(h, "batch", "sequence", "activation_mlp"))
