"""Text and images in streams of their own, joined by connections before each of the text's last layers.

A connection (`co_attention`, `model.fusion.tangled_attention`) is followed by one layer of the text and one of the
images, as in ViLBERT (arXiv:1908.02265, section 3.1) and ActBERT (arXiv:2011.07231). After the last one nothing of the
other streams reaches the text: its half of theirs has weights, as published, which no loss here moves, and the compiler
leaves the computation out.

Legend: B batch, T tokens, N images of a row, S image vectors, C their width, D embed_dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention.cache import parts
from model.attention.cross_attention import Source
from model.attention.layer_inputs import LayerInputs
from model.block import Block
from model.config import ModelConfig
from model.dropout import fold_in
from model.fusion import tangled_attention
from model.fusion.co_attention import CoConnection
from model.fusion.tangled_attention import TangledConnection
from model.linear import Linear
from model.norms import Norm
from model.place import Place
from model.stack import Stack
from model.vision.vit import tower_config


class Streams(nnx.Module):
    """The connections and the layers of the other streams."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.parts, width = tuple(parts(config)), config.source_width
        self.tangled, self.actions = config.fusion == "tangled", config.vision.actions
        # A vector sees its own image and those before: causal, by the number of the image, which several vectors share;
        # the kernels of accelerators take positions to rise by one.
        tower = dataclasses.replace(
            tower_config(config), kind="decoder", positions="none", norm_order=config.norm_order, attention="plain"
        )
        region = dataclasses.replace(tower, embed_dim=width, head_dim=width // tower.heads)
        action = dataclasses.replace(
            config, kind="decoder", fusion="none", positions="none", experts=0, attention="plain"
        )
        for i in range(len(self.parts) - 1):
            setattr(self, f"connection_{i}", (TangledConnection if self.tangled else CoConnection)(config, rngs))
            setattr(self, f"images_{i}", Block(region, "global", rngs))
            if self.tangled:
                setattr(self, f"actions_{i}", Block(action, "global", rngs))
        text = config.embed_dim
        self.action = Linear(config, ((width, "embed"),), ((text, "mlp"),), True, rngs) if self.tangled else None
        self.action_norm = Norm(config, text, "norm", rngs) if self.tangled else None

    def __call__(
        self,
        stack: Stack,
        h: jax.Array,
        inputs: LayerInputs,
        cached: Any,
        key: jax.Array | None,
        given: jax.Array | None,
        images: int,
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        """The layers of `stack` over h [B, T, D], with the connections between them; arguments as those of `Stack`.

        Args:
          cached: `layers` of a `model.attention.cache.Cache`, or None.
          inputs: its source has the images' vectors, without which the earlier call's are read; their places; where
            tokens stand. None: there are no images.
          given: [B, T], 1 where images may look; images: N. Neither is read where the source has no vectors.
        """
        held = [None] * (len(self.parts) - 1) if cached is None else cached["streams"]
        place, slots, source, of_text = inputs.place, inputs.slots, inputs.source, inputs._replace(source=None)
        streams, queries = None, None if source is None else source.queries
        if self.tangled and source is not None and source.hidden is not None:
            streams = self._begin(source, images)
        new_parts, new_held, routings = [], [], []
        for number, part in enumerate(self.parts):
            if number:
                connection, layer = getattr(self, f"connection_{number - 1}"), getattr(self, f"images_{number - 1}")
                if self.tangled:
                    h, streams, kept = connection(h, place, slots, queries, given, streams, held[number - 1])
                    if streams is not None:
                        actions = getattr(self, f"actions_{number - 1}")
                        streams = streams._replace(
                            regions=layer(streams.regions, LayerInputs(streams.region_place))[0],
                            actions=actions(streams.actions, LayerInputs(streams.action_place))[0],
                        )
                else:
                    h, vectors, kept = connection(h, place, given, source, held[number - 1])
                    if vectors is not None:
                        source = source._replace(hidden=layer(vectors, LayerInputs(source.place))[0])
                new_held.append(kept)
            layers = None if cached is None else cached["parts"][number]
            if part[0] < part[1]:
                h, layers, routing = stack(h, of_text, layers, fold_in(key, number), part)
                routings.append(routing)
            new_parts.append(layers)
        joined = jax.tree.map(lambda *a: jnp.concatenate(a), *routings)
        return h, None if cached is None else {"parts": new_parts, "streams": new_held}, joined

    def _begin(self, source: Source, images: int) -> tangled_attention.Streams:
        """The streams beside the text: an image's actions start as means of its vectors, as many of them for each."""
        vectors, place, actions = source.hidden, source.place, images * self.actions
        mean = vectors.reshape(len(vectors), actions, -1, vectors.shape[-1]).mean(2)
        each = Place(*(a.reshape(len(a), actions, -1)[:, :, 0] for a in place[:2]))
        return tangled_attention.Streams(vectors, place, self.action_norm(self.action(mean)), each)
