"""The feed-forward block: two projections around a nonlinearity, or a gated unit (GLU variants, arXiv:2002.05202)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.config import ModelConfig
from model.fields.shape import GATED
from model.linear import Linear, together
from tpu.rules import constrain

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
    "geglu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "reglu": jax.nn.relu,
}


class MLP(nnx.Module):
    """down(f(up x)), or down(f(gate x) * up x) for the gated activations."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        embed, mlp = ((config.embed_dim, "embed"),), ((config.mlp_dim, "mlp"),)
        self.activation = config.activation
        self.up = Linear(config, embed, mlp, config.mlp_bias, rngs)
        gated = config.activation in GATED
        # Left alone, XLA computes the nonlinearity anew for every tile of the products that read it. From so many tiles
        # on, writing it once takes less time (libtpu's estimate for Llama 2 70B: 1 %), below it does not.
        self.written = config.platform != "cpu" and gated and config.embed_dim >= 8192
        self.gate = Linear(config, embed, mlp, config.mlp_bias, rngs) if gated else None
        self.down = Linear(config, mlp, embed, config.mlp_bias, rngs, residual=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        h = together(x, self.up) if self.gate is None else together(x, self.gate, self.up)
        h = [checkpoint_name(constrain(part, "batch", "sequence", "activation_mlp"), "mlp") for part in h]
        h = nonlinearity(self.activation, *h)
        if self.written:
            h = jax.lax.optimization_barrier(h)
        return self.down(h)


@functools.partial(jax.checkpoint, static_argnums=0)
def nonlinearity(activation: str, h: jax.Array, times: jax.Array | None = None) -> jax.Array:
    """f(h), or f(h) * times, computed in float32. Its inputs alone are kept for the backward pass: computing them again
    costs less than storing what lies between."""
    y = ACTIVATIONS[activation](h.astype(jnp.float32))
    return (y if times is None else y * times.astype(jnp.float32)).astype(h.dtype)
