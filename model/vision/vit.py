"""The vision transformer (arXiv:2010.11929): patches as tokens, positions in two dimensions, layers that see all.

It runs on patches, not on images: those of an image of one size, or those of several images of any size in one row
(arXiv:2307.06304), each a segment of its own.

Legend: R rows of patches, M patches of a row, P the dimensions of a patch, D embed_dim, h, w patches along the sides.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.attention.layer_inputs import LayerInputs
from model.config import ModelConfig
from model.linear import Linear, parameter
from model.norms import Norm
from model.place import Place
from model.positions.rope import plain_frequencies, rotation
from model.stack import Stack
from model.vision.interpolation import interpolated


def tower_config(config: ModelConfig) -> ModelConfig:
    """The shape of the encoder's layers; their attention is the text's kernel, where it computes them, or plain."""
    vision = config.vision
    same = ("weight_dtype", "compute_dtype", "platform", "layer_loop", "remat", "init_std")
    tower = dataclasses.replace(
        ModelConfig(
            kind="encoder",
            layers=vision.layers,
            embed_dim=vision.embed_dim,
            heads=vision.heads,
            mlp_dim=vision.mlp_dim,
            activation=vision.activation,
            attention_bias=vision.attention_bias,
            attention_qkv_bias=vision.qkv_bias,
            positions="rope" if vision.positions == "rope" else "none",
            norm=vision.norm,
            norm_eps=vision.norm_eps,
            init=vision.init,
            attention="plain",
            vision=dataclasses.replace(vision, encoder="none"),
        ),
        **{name: getattr(config, name) for name in same},
    ).resolved()
    if config.attention in ("splash", "cudnn"):
        kernel, _ = tower.attention_for({"splash": "tpu", "cudnn": "gpu"}[config.attention], "bfloat16")
        tower.attention = config.attention if kernel == config.attention else "plain"
    return tower


def patches(x: jax.Array, size: int, across: int = 0) -> jax.Array:
    """Images x [R, H, W, C] -> patches [R, h w, size, across, C], row by row; square where across is 0.

    Pixels that fill none are left out.
    """
    r, height, width, channels = x.shape
    across = across or size
    h, w = height // size, width // across
    x = x[:, : h * size, : w * across].reshape(r, h, size, w, across, channels).swapaxes(2, 3)
    return x.reshape(r, -1, size, across, channels)


def grid_positions(height: int, width: int) -> np.ndarray:
    """[height width, 2] int32: row and column of every patch, row by row."""
    return np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 2).astype(np.int32)


def sincos(positions: jax.Array, embed_dim: int) -> jax.Array:
    """positions [R, M, 2] -> [R, M, D] float32: sines and cosines of the column, then of the row, D / 4 of each
    (MoCo v3, arXiv:2104.02057, section 4.3)."""
    frequencies = 10_000.0 ** (-jnp.arange(embed_dim // 4, dtype=jnp.float32) / (embed_dim // 4))
    angles = positions[..., ::-1, None].astype(jnp.float32) * frequencies[None, None, None]  # [R, M, 2, D / 4]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -2).reshape(*positions.shape[:2], embed_dim)


def resampled(table: jax.Array, grid: tuple[int, int], wanted: tuple[int, int], slack: float = 0.0) -> jax.Array:
    """A table [M, D] of positions in a grid as one of another, [M', D]; bicubic, `slack` as vision.position_slack."""
    if grid == wanted:
        return table
    rows, columns = (interpolated(a, b, "bicubic", slack) for a, b in zip(grid, wanted, strict=True))
    return jnp.einsum("hr,wc,rcd->hwd", rows, columns, table.reshape(*grid, -1)).reshape(-1, table.shape[-1])


def position_table(rngs: nnx.Rngs, rows: int, config: ModelConfig, width: int) -> nnx.Param:
    """A learned vector of `width` for each of `rows` places of an image, as long at the start as 1 on average."""

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape) / math.sqrt(width)

    return parameter(rngs, (rows, width), ("positions", "norm"), config.weight_dtype, draw)


class ViT(nnx.Module):
    """Patches to vectors: embedding, positions, class token, layers, norm."""

    def __init__(self, config: ModelConfig, inputs: tuple[int, ...], rngs: nnx.Rngs):
        """inputs: the dimensions of a patch; (time,) rows, columns, channels."""
        vision, tower = config.vision, tower_config(config)
        self.embed_dim, self.positions, self.theta = vision.embed_dim, vision.positions, vision.rope_theta
        self.head_dim, self.used = tower.head_dim, vision.layers - vision.unused_layers
        self.grid, self.slack = (vision.grid, vision.columns), vision.position_slack
        norm = dataclasses.replace(tower, norm_eps=vision.final_norm_eps)

        of_patch = tuple((size, "patch") for size in inputs)
        self.patch = Linear(tower, of_patch, ((vision.embed_dim, "embed"),), vision.patch_bias, rngs)
        learned, rows = vision.positions == "learned", vision.grid * vision.columns + vision.class_token
        self.position_embedding = position_table(rngs, rows, config, vision.embed_dim) if learned else None
        self.class_token = position_table(rngs, 1, config, vision.embed_dim) if vision.class_token else None
        self.embedding_norm = Norm(tower, vision.embed_dim, "norm", rngs) if vision.embedding_norm else None
        self.stack = Stack(tower, rngs)
        self.final_norm = Norm(norm, vision.embed_dim, "norm", rngs) if vision.final_norm else None
        self.apply_norm = not (vision.unused_layers or vision.unused_norm)

    def __call__(
        self,
        x: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        key: jax.Array | None = None,
        grid: tuple[int, int] | None = None,
    ) -> jax.Array:
        """Patches x [R, M, *P] -> [R, M, D], or, with a class token, its vector first, [R, 1 + M, D].

        Args:
          segments: [R, M] int32, the image that each patch is of; 0: none.
          positions: [R, M, 2] int32, its row and column there.
          grid: where every row is one image, its patches along both sides: learned positions of another size are
            resampled for it (bicubic). None: positions are looked up in the learned table's grid.
        """
        with jax.named_scope("patches"):
            h = self.patch(x)
            if self.positions == "sincos":
                h = h + sincos(positions, self.embed_dim).astype(h.dtype)
            elif self.position_embedding is not None:
                h = h + self._learned(positions, grid).astype(h.dtype)
            if self.class_token is not None:
                first = self.class_token.get_value()
                if self.position_embedding is not None:
                    first = first + self.position_embedding.get_value()[:1]
                h = jnp.concatenate([jnp.broadcast_to(first.astype(h.dtype), (len(h), 1, h.shape[-1])), h], 1)
                segments = jnp.concatenate([segments[:, :1], segments], 1)
            h = h if self.embedding_norm is None else self.embedding_norm(h)
        turn: Any = None
        if self.positions == "rope":
            # Half of the pairs turn with the row, half with the column (Qwen2-VL, arXiv:2409.12191, section 2.1).
            angles = plain_frequencies(self.theta, self.head_dim // 2)
            parts = [rotation(positions[..., axis], angles) for axis in (0, 1)]
            turn = {"global": tuple(jnp.concatenate(both, -1) for both in zip(*parts, strict=True))}
        order = jnp.broadcast_to(jnp.arange(h.shape[1], dtype=jnp.int32), h.shape[:2])
        h, _, _ = self.stack(h, LayerInputs(Place(segments, order), rotation=turn), key=key, part=(0, self.used))
        return self.final_norm(h) if self.final_norm is not None and self.apply_norm else h

    def _learned(self, positions: jax.Array, grid: tuple[int, int] | None) -> jax.Array:
        """The table's rows for patches, [R or 1, M, D]."""
        table = self.position_embedding.get_value()[-self.grid[0] * self.grid[1] :]
        if grid is None:
            return jnp.take(table, positions[..., 0] * self.grid[1] + positions[..., 1], axis=0)
        return resampled(table, self.grid, grid, self.slack)[None]
