"""Bottleneck adapters (Houlsby et al., arXiv:1902.00751, section 2.1): y + W_up gelu(W_down y) on a block's result.

W_up and its bias start at zero, so that a new adapter changes nothing. The paper trains the norms beside them; here
they stay as they are.

Legend: B batch, T tokens, D embed_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.linear import Linear


class Bottleneck(nnx.Module):
    """Two projections around a nonlinearity, through `config.bottleneck_dim`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        embed, rank = ((config.embed_dim, "embed"),), ((config.bottleneck_dim, "rank"),)
        self.down = Linear(config, embed, rank, True, rngs)
        self.up = Linear(config, rank, embed, True, rngs)
        self.up.kernel.set_value(jnp.zeros_like(self.up.kernel.get_value()))

    def __call__(self, y: jax.Array) -> jax.Array:
        """y [B, T, D] -> [B, T, D]."""
        return y + self.up(jax.nn.gelu(self.down(y), approximate=True))
