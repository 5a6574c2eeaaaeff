"""The decoder-only transformer (GPT-1 to GPT-4, Llama and relatives): tokens in, hidden states and logits out.

Images reach the text as `model.fusion` says: their vectors stand where tokens would ("merge"), layers of the text look
at them ("cross", `gated_cross_attention`), or they have streams of their own ("co", "tangled", `model.fusion.streams`).

Legend: B batch, T tokens, D embed_dim, V vocab_size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention.cache import Cache, write_slots
from model.attention.cross_attention import Source
from model.attention.layer_inputs import LayerInputs
from model.attention.memory import Memory, recall, remember
from model.config import ModelConfig
from model.dropout import dropout, fold_in
from model.embedding import Embedding, Head
from model.fusion.streams import Streams
from model.moe import Routing
from model.neftune import embedding_noise
from model.norms import Norm
from model.place import Place
from model.positions.rope import Rope, rotations
from model.positions.sinusoidal import sinusoidal
from model.residual import residual
from model.stack import Stack
from model.vision.images import Images
from model.vision.vision import Vision


class Transformer(nnx.Module):
    """Embedding, stack of layers, final norm (but for post-norm) and head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.positions, self.dropout_rate = config.positions, config.embedding_dropout
        self.embed_dim = config.embed_dim
        self.rope = Rope.of(config) if config.positions == "rope" else None
        self.noise = config.embedding_noise
        self.embedding_scale = config.embed_dim**0.5 if config.scale_embedding else 1.0
        learned = config.positions == "learned"
        self.embedding = Embedding(config, config.vocab_size, "vocab", rngs)
        self.position_embedding = Embedding(config, config.max_positions, "positions", rngs) if learned else None
        self.stack = Stack(config, rngs)
        self.final_norm = Norm(config, config.embed_dim, "norm", rngs) if config.norm_order != "post" else None
        self.head = Head(config, self.embedding, rngs)
        self.fusion, self.mask = config.fusion, config.vision.mask
        self.vision = Vision(config, rngs) if config.fusion != "none" else None
        self.streams = Streams(config, rngs) if config.fusion in ("co", "tangled") else None

    def __call__(
        self,
        tokens: jax.Array,
        place: Place,
        cache: Cache | Memory | None = None,
        key: jax.Array | None = None,
        keys: Place | None = None,
        positions: jax.Array | None = None,
        images: Images | None = None,
        source: Source | None = None,
        opens: bool = False,
    ) -> tuple[jax.Array, Cache | Memory | None]:
        """tokens [B, T] int32 at `place` -> (final hidden states [B, T, D], the cache with these tokens in it).

        Args:
          cache: where earlier tokens of the rows are, after which these follow one another; in training None, or the
            memory of the rows before.
          key: [B] keys for dropout; None for none.
          keys: without a cache, where the tokens stand for those that look at them, if not at `place`: in another
            segment, padding is seen by nobody and yet may look.
          positions: [B, T] int32, what is embedded or turned by, if not the order of tokens in `place`; no memory then.
            With model.rope_sections [B, T, 3]: time, row and column.
          images: what the rows show, and, where their vectors are known, `source`, with places alone where an earlier
            call with this cache has seen them; or only `source`, with where the tokens stand among the images, too.
            Neither: no images.
          opens: whether these are the first tokens of every row, at the positions from 0 on, so that the cache, which
            holds nothing yet, is written and not read.
        """
        return self.routed(tokens, place, cache, key, keys, positions, images, source, opens)[:2]

    def routed(
        self,
        tokens: jax.Array,
        place: Place,
        cache: Cache | Memory | None = None,
        key: jax.Array | None = None,
        keys: Place | None = None,
        positions: jax.Array | None = None,
        images: Images | None = None,
        source: Source | None = None,
        opens: bool = False,
    ) -> tuple[jax.Array, Cache | Memory | None, dict[str, Routing]]:
        """As a call, and what the routers of mixtures of experts did, stacked [groups, ...] by layer of a group."""
        positions = place.positions if positions is None else positions
        key, stack_key, noise_key = fold_in(key, 0), fold_in(key, 1), fold_in(key, 2)
        with jax.named_scope("embedding"):
            h = embedding_noise(self.embedding(tokens), self.noise, place.segments, noise_key)
            h = h if self.embedding_scale == 1.0 else h * self.embedding_scale
            if images is not None:
                source = images.looked_at(self.vision(images) if source is None else source, place)
                place = place._replace(blocks=images.blocks(self.mask, place))
                h = merged(h, source.hidden, images.slots) if self.fusion == "merge" else h
            if self.position_embedding is not None:
                h = h + self.position_embedding(positions)
            elif self.positions == "sinusoidal":
                h = h + sinusoidal(positions, self.embed_dim).astype(h.dtype)
            h = dropout(residual(h), self.dropout_rate, key)
        slots, layers, written, turned = keys, None, None, place._replace(positions=positions)
        if isinstance(cache, Memory):
            slots, layers = recall(cache, place, self.stack.unroll)
            turned = slots
        elif cache is not None:
            written, layers = write_slots(cache.slots, place), cache.layers
            slots = None if opens else written
        turn = None if self.rope is None else rotations(self.rope, turned, written)
        if self.streams is not None:
            given, count = (None, 0) if images is None else (images.opening(place), images.segments.shape[1])
            inputs = LayerInputs(place, slots, turn, source=source)
            h, layers, routings = self.streams(self.stack, h, inputs, layers, stack_key, given, count)
        else:
            of_stack = source if self.fusion == "cross" else None
            h, layers, routings = self.stack(h, LayerInputs(place, slots, turn, source=of_stack), layers, stack_key)
        if self.final_norm is not None:
            h = self.final_norm(h)
        if isinstance(cache, Memory):
            return h, remember(slots, layers, tokens.shape[1]), routings
        return h, None if cache is None else Cache(written._replace(blocks=None), layers), routings


def merged(h: jax.Array, vectors: jax.Array, slots: jax.Array) -> jax.Array:
    """h [B, T, D] with the image vector [B, S, D] number slots [B, T] wherever that is not -1."""
    chosen = jnp.take_along_axis(vectors, jnp.maximum(slots, 0)[..., None], axis=1)
    return jnp.where((slots >= 0)[..., None], chosen.astype(h.dtype), h)
