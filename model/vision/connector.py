"""From an image encoder's vectors to those that the text takes: fewer of them, of the text's width, or both.

none           as they are
linear         one product (PaliGemma)
mlp            two, with GELU between them (LLaVA 1.5)
pixel_shuffle  neighbours beside each other, then one product (nanoVLM)
average_pool   the mean of neighbours, RMSNorm, one product (Gemma 3)
merger         LayerNorm, neighbours beside each other, two products (Qwen2-VL)
perceiver      learned latents that look at the vectors (Flamingo)

Legend: R images, M vectors of an image, h, w of them along its sides, f neighbours along a side, C the encoder's width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention.cross_attention import CrossAttention, Source
from model.config import ModelConfig
from model.linear import Linear, parameter
from model.mlp import ACTIVATIONS, MLP
from model.norms import Norm
from model.place import Place


class Connector(nnx.Module):
    """What config.vision.connector says."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision, width = config.vision, config.vision.encoder_width
        self.kind, self.factor = vision.connector, vision.shrink
        self.activation = ACTIVATIONS[vision.connector_activation]
        own = dataclasses.replace(config, norm_eps=vision.connector_eps)
        merged, inner = width * self.factor**2, (vision.connector_dim, "mlp")
        inputs = {"pixel_shuffle": merged, "merger": merged}.get(self.kind, width)
        two = self.kind in ("mlp", "merger")
        norm = {"average_pool": "rmsnorm", "merger": "layernorm"}.get(self.kind)
        self.norm = None if norm is None else Norm(own, width, "norm", rngs, norm)
        self.perceiver = Perceiver(config, rngs) if self.kind == "perceiver" else None
        bias, text = vision.connector_bias, (config.embed_dim, "embed")
        self.up = Linear(config, ((inputs, "embed"),), (inner,), bias, rngs) if two else None
        last = inner if two else (inputs, "mlp")
        projects = config.source_width != width or self.kind not in ("none", "perceiver")
        projects = projects or (self.kind == "perceiver" and config.fusion == "merge")
        self.out = Linear(config, (last,), (text,), bias, rngs) if projects else None

    def __call__(self, x: jax.Array, grid: tuple[int, int] | None, segments: jax.Array) -> jax.Array:
        """x [R, M, C] -> [R, M', C'].

        Args:
          grid: (h, w), where each of the R is one image whose M = h w vectors lie row by row. None: f f vectors that
            become one follow each other.
          segments: [R, M] int32, 0 where there is no vector; a perceiver does not look there.
        """
        if self.perceiver is not None:
            x = self.perceiver(x, segments)
            return x if self.out is None else self.out(x)
        if self.norm is not None and self.kind == "merger":
            x = self.norm(x)
        if self.factor > 1:
            x = self._neighbours(x, grid)  # [R, M / f^2, f^2, C]
            x = x.mean(2) if self.kind == "average_pool" else x.reshape(*x.shape[:2], -1)
        if self.norm is not None and self.kind == "average_pool":
            x = self.norm(x)
        if self.up is not None:
            x = self.activation(self.up(x, "float32")).astype(x.dtype)
        return x if self.out is None else self.out(x)

    def _neighbours(self, x: jax.Array, grid: tuple[int, int] | None) -> jax.Array:
        """The f f vectors that become one, row by row, in a dimension of their own."""
        r, m, c = x.shape
        if grid is None:
            return x.reshape(r, m // self.factor**2, self.factor**2, c)
        height, width = (size // self.factor for size in grid)
        x = x.reshape(r, height, self.factor, width, self.factor, c).swapaxes(2, 3)
        return x.reshape(r, height * width, self.factor**2, c)


class Perceiver(nnx.Module):
    """Latents that attend to the vectors and to themselves, then a feed-forward block, in each layer; a norm at the end
    (Flamingo, arXiv:2204.14198, section 3.1.1 and appendix A.1.1). No biases but those of the norms."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision, width = config.vision, config.vision.encoder_width
        heads, head_dim = vision.connector_heads, vision.connector_head_dim
        self.layers = vision.connector_layers
        own = dataclasses.replace(
            config,
            embed_dim=width,
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            query_scalar=0.0,
            mlp_dim=4 * width,
            activation=vision.connector_activation,
            attention_bias=False,
            mlp_bias=False,
            norm="layernorm",
            norm_eps=vision.connector_eps,
            norm_bias=True,
            norm_unit_offset=False,
            attention_dropout=0.0,
        )

        def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return config.init_std * jax.random.normal(key, shape)

        self.latents = parameter(rngs, (vision.latents, width), ("positions", "norm"), config.weight_dtype, draw)
        qk_norm = "layernorm" if vision.connector_qk_norm else ""
        for i in range(self.layers):
            setattr(self, f"source_norm_{i}", Norm(own, width, "norm", rngs))
            setattr(self, f"latents_norm_{i}", Norm(own, width, "norm", rngs))
            setattr(self, f"attention_{i}", CrossAttention(own, rngs, qk_norm=qk_norm))
            setattr(self, f"mlp_norm_{i}", Norm(own, width, "norm", rngs))
            setattr(self, f"mlp_{i}", MLP(own, rngs))
        self.final_norm = Norm(own, width, "norm", rngs)

    def __call__(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        """x [R, M, C], of which those in segment 0 are not looked at -> [R, latents, C]."""
        latents = self.latents.get_value().astype(x.dtype)
        h = jnp.broadcast_to(latents, (len(x), *latents.shape))
        own = jnp.ones(h.shape[:2], jnp.int32)
        there = jnp.concatenate([(segments > 0).astype(jnp.int32), own], 1)
        keys, queries = (Place(s, jnp.zeros_like(s)) for s in (there, own))
        for i in range(self.layers):
            of = {
                name: getattr(self, f"{name}_{i}") for name in ("source_norm", "latents_norm", "attention", "mlp_norm")
            }
            z = of["latents_norm"](h)
            source = Source(jnp.concatenate([of["source_norm"](x), z], 1), keys)
            h = h + of["attention"](z, queries, source, None, None)[0]
            h = h + getattr(self, f"mlp_{i}")(of["mlp_norm"](h))
        return self.final_norm(h)
