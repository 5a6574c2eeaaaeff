"""The decoder-only transformer (GPT-1 to GPT-4, Llama and relatives): tokens in, hidden states and logits out.

Images reach the text as `model.fusion` says: their vectors stand where tokens would ("merge"), layers of the text look
at them ("cross", `model.gated_cross_attention`), or they have streams of their own ("co", "tangled", `model.streams`).

Modules describe; they are used functionally. `build` gives the graph and the abstract weights, `init` the weights, and
`bind` joins graph and weights into a model to call, inside or outside of `jax.jit`. Weights are a plain nested
dictionary of arrays.

Legend: B batch, T tokens, D embed_dim, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from model.attention import Place
from model.block import residual
from model.cache import Cache, write_slots
from model.config import ModelConfig
from model.cross_attention import Source
from model.dropout import dropout, fold_in
from model.layer_inputs import LayerInputs
from model.linear import Linear, initializer, matmul, parameter
from model.memory import Memory, recall, remember
from model.moe import Routing
from model.norms import Norm
from model.positions import sinusoidal
from model.rope import Rope, rotations
from model.stack import Stack
from model.streams import Streams
from model.vision import Images, Vision
from tpu import rules

Weights = dict[str, Any]


class Embedding(nnx.Module):
    """A table with one row per token or position; a tied head multiplies by its transpose."""

    def __init__(self, config: ModelConfig, rows: int, axis: str, rngs: nnx.Rngs):
        draw = initializer(config)
        if config.init in ("fan_in", "xavier"):

            def initialize(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
                return config.init_std * jax.random.normal(key, shape)
        else:

            def initialize(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
                return draw(key, shape, *shape)

        self.embedding = parameter(
            rngs, (rows, config.embed_dim), (axis, "table_embed"), config.weight_dtype, initialize
        )
        self.compute_dtype, self.platform = config.compute_dtype, config.platform

    def __call__(self, indices: jax.Array) -> jax.Array:
        """indices [B, T] int32 -> [B, T, D] in the compute dtype."""
        table = self.embedding.get_value()
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return jnp.take(table, indices, axis=0).astype(self.compute_dtype)
        rows = rules.partition_spec(("batch", "residual_sequence"), mesh, indices.shape)
        columns = rules.partition_spec(("positions", "embed"), mesh, table.shape)
        shared = tuple(axis for axis in rules.axes_in(columns) if axis in rules.axes_in(PartitionSpec(rows[0])))
        columns = rules.without(columns, tuple(axis for axis in mesh.axis_names if axis not in shared))

        def look_up(table: jax.Array, indices: jax.Array) -> jax.Array:
            # Each device looks up some columns for the rows of all: exchanging those moves less than the table would.
            if shared:
                indices = jax.lax.all_gather(indices, shared, axis=0, tiled=True)
            h = jnp.take(table, indices, axis=0)
            return jax.lax.all_to_all(h, shared, split_axis=0, concat_axis=2, tiled=True) if shared else h

        layout = PartitionSpec(*rows, None)
        across = jax.shard_map(
            look_up,
            mesh=mesh,
            in_specs=(columns, rows),
            out_specs=layout,
            axis_names=rules.free_axes(mesh),
            check_vma=False,
        )
        return across(table, indices).astype(self.compute_dtype)

    def logits(self, h: jax.Array) -> jax.Array:
        """h [..., D] -> [..., V] float32."""
        return matmul(h, self.embedding.get_value(), 1, self.compute_dtype, self.platform, transposed=True)


class Head(nnx.Module):
    """The output projection, tied to the token embedding or its own, with an optional soft-cap on the logits."""

    def __init__(self, config: ModelConfig, embedding: Embedding, rngs: nnx.Rngs):
        self.embedding = embedding if config.tied_head else None
        embed, vocab = ((config.embed_dim, "table_embed"),), ((config.vocab_size, "vocab"),)
        self.linear = None if config.tied_head else Linear(config, embed, vocab, False, rngs)
        self.softcap = config.logits_softcap

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., D] -> logits [..., V] float32."""
        logits = self.linear(h, "float32") if self.embedding is None else self.embedding.logits(h)
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits


class Transformer(nnx.Module):
    """Embedding, stack of layers, final norm (but for post-norm) and head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.positions, self.dropout_rate = config.positions, config.embedding_dropout
        self.embed_dim = config.embed_dim
        self.rope = Rope.of(config) if config.positions == "rope" else None
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
    ) -> tuple[jax.Array, Cache | Memory | None]:
        """tokens [B, T] int32 at `place` -> (final hidden states [B, T, D], the cache with these tokens in it).

        Args:
          cache: where earlier tokens of the rows are; in training None, or the memory of the rows before.
          key: [B] keys for dropout; None for none.
          keys: without a cache, where the tokens stand for those that look at them, if not at `place`: in another
            segment, padding is seen by nobody and yet may look.
          positions: [B, T] int32, what is embedded or turned by, if not the order of tokens in `place`; no memory then.
            With model.rope_sections [B, T, 3]: time, row and column.
          images: what the rows show; or else `source`, the images' places and where the tokens stand among them, where
            an earlier call with this cache has seen them. Neither: no images.
        """
        return self.routed(tokens, place, cache, key, keys, positions, images, source)[:2]

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
    ) -> tuple[jax.Array, Cache | Memory | None, dict[str, Routing]]:
        """As a call, and what the routers of mixtures of experts did, stacked [groups, ...] by layer of a group."""
        positions = place.positions if positions is None else positions
        key, stack_key = fold_in(key, 0), fold_in(key, 1)
        with jax.named_scope("embedding"):
            h = self.embedding(tokens)
            h = h if self.embedding_scale == 1.0 else h * self.embedding_scale
            if images is not None:
                source = images.looked_at(self.vision(images), place)
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
            written = slots = write_slots(cache.slots, place)
            layers = cache.layers
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
        return h, None if cache is None else Cache(slots._replace(blocks=None), layers), routings


def merged(h: jax.Array, vectors: jax.Array, slots: jax.Array) -> jax.Array:
    """h [B, T, D] with the image vector [B, S, D] number slots [B, T] wherever that is not -1."""
    chosen = jnp.take_along_axis(vectors, jnp.maximum(slots, 0)[..., None], axis=1)
    return jnp.where((slots >= 0)[..., None], chosen.astype(h.dtype), h)


def build(config: ModelConfig, make: type[nnx.Module] = Transformer) -> tuple[nnx.GraphDef, Weights, Any]:
    """The graph, the abstract weights (jax.ShapeDtypeStruct) and, alike in structure, each weight's logical axes.

    Allocates nothing and touches no device. `config` must be `resolved` and `placed`; `make` is the class of its kind
    (`model.kinds.maker`).
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(config, nnx.Rngs(0))))
    axes = jax.tree.map(lambda p: p.get_metadata("axes"), state, is_leaf=lambda n: isinstance(n, nnx.Variable))
    return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def init(config: ModelConfig, key: jax.Array, make: type[nnx.Module] = Transformer) -> Weights:
    """Draws the weights; call inside `jax.jit` with `out_shardings` to lay them out as they are made."""
    return nnx.to_pure_dict(nnx.state(make(config, nnx.Rngs(key))))


def bind(graphdef: nnx.GraphDef, weights: Weights) -> Transformer:
    """The model that computes with these weights."""
    return nnx.merge(graphdef, nnx.State(weights))
