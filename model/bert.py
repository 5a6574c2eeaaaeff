"""The encoder: BERT (arXiv:1810.04805), with the heads that its tasks need. Tokens in, hidden states out, head apart.

Attention sees a whole segment, both ways. Layers are normalised after each sum, and the sum of the embeddings is too.

Legend: B batch, T tokens, D embed_dim, V vocab_size, L labels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention.layer_inputs import LayerInputs
from model.config import ModelConfig
from model.dropout import dropout, fold_in
from model.embedding import Embedding
from model.linear import Linear, parameter, zeros
from model.mlp import ACTIVATIONS
from model.neftune import embedding_noise
from model.norms import Norm
from model.place import Place
from model.positions.rope import Rope, rotations
from model.positions.sinusoidal import sinusoidal
from model.residual import residual
from model.stack import Stack


class MaskedHead(nnx.Module):
    """What stood at a position: a dense layer, its norm, and the token embedding's transpose with a bias of its own."""

    def __init__(self, config: ModelConfig, embedding: Embedding, rngs: nnx.Rngs):
        embed, vocab = (config.embed_dim, "embed"), (config.vocab_size, "vocab")
        self.activation = ACTIVATIONS[config.activation]
        self.dense = Linear(config, (embed,), ((config.embed_dim, "mlp"),), True, rngs)
        self.norm = Norm(config, config.embed_dim, "norm", rngs)
        self.embedding = embedding if config.tied_head else None
        self.linear = None if config.tied_head else Linear(config, (embed,), (vocab,), False, rngs)
        self.bias = parameter(rngs, (config.vocab_size,), ("vocab",), config.weight_dtype, zeros)

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., D] -> logits [..., V] float32."""
        h = self.norm(self.activation(self.dense(h, "float32"))).astype(h.dtype)
        logits = self.linear(h, "float32") if self.embedding is None else self.embedding.logits(h)
        return logits + jax.lax.broadcast_to_rank(self.bias.get_value().astype(jnp.float32), logits.ndim)


class PooledHead(nnx.Module):
    """Labels of a whole text, from its first token: a dense layer with tanh (the pooler), then a linear one.

    It reads P = `config.pooled_width` features, D unless an image's are beside the text's.
    """

    def __init__(self, config: ModelConfig, labels: int, rngs: nnx.Rngs):
        embed, pooled = (config.embed_dim, "embed"), (config.pooled_width, "embed")
        self.pooler = Linear(config, (pooled,), ((config.embed_dim, "mlp"),), True, rngs)
        self.out = Linear(config, (embed,), ((labels, "vocab"),), True, rngs)

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., P] -> logits [..., L] float32, of which those at first tokens mean something."""
        return self.out(jnp.tanh(self.pooler(h, "float32")), "float32")


class Bert(nnx.Module):
    """Embeddings of tokens, positions and token types, their norm, the layers, and one head (`config.head`).

    A pooled head labels texts, a token head each token: `labels` numbers, whatever the loss makes of them. With
    `next_sentence` there is a second, pooled head of two labels beside the language head.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dropout_rate, self.positions = config.embedding_dropout, config.positions
        self.noise = config.embedding_noise
        self.embed_dim, self.rope = config.embed_dim, Rope.of(config) if config.positions == "rope" else None
        learned, types = config.positions == "learned", config.token_types
        self.embedding = Embedding(config, config.vocab_size, "vocab", rngs)
        self.position_embedding = Embedding(config, config.max_positions, "positions", rngs) if learned else None
        self.type_embedding = Embedding(config, types, "positions", rngs) if types else None
        self.embedding_norm = Norm(config, config.embed_dim, "norm", rngs)
        self.stack = Stack(config, rngs)
        self.final_norm = Norm(config, config.embed_dim, "norm", rngs) if config.norm_order != "post" else None
        if config.head == "language":
            self.head = MaskedHead(config, self.embedding, rngs)
        elif config.head == "pooled":
            self.head = PooledHead(config, config.labels, rngs)
        else:
            self.head = Linear(config, ((config.embed_dim, "embed"),), ((config.labels, "vocab"),), True, rngs)
        self.next_sentence = PooledHead(config, 2, rngs) if config.next_sentence else None

    def __call__(
        self,
        tokens: jax.Array,
        place: Place,
        cache: None = None,
        key: jax.Array | None = None,
        token_types: jax.Array | None = None,
        keys: Place | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """tokens [B, T] int32 at `place` -> (hidden states [B, T, D], None: an encoder has no cache).

        Args:
          key: [B] keys for dropout; None for none.
          token_types: [B, T] int32; None: all 0.
          keys, positions: as `model.transformer.Transformer` takes them.
        """
        positions = place.positions if positions is None else positions
        key, stack_key, noise_key = fold_in(key, 0), fold_in(key, 1), fold_in(key, 2)
        with jax.named_scope("embedding"):
            h = embedding_noise(self.embedding(tokens), self.noise, place.segments, noise_key)
            if self.position_embedding is not None:
                h = h + self.position_embedding(positions)
            elif self.positions == "sinusoidal":
                h = h + sinusoidal(positions, self.embed_dim).astype(h.dtype)
            if self.type_embedding is not None:
                h = h + self.type_embedding(jnp.zeros_like(tokens) if token_types is None else token_types)
            h = dropout(self.embedding_norm(residual(h)), self.dropout_rate, key)
        turn = None if self.rope is None else rotations(self.rope, place._replace(positions=positions))
        h, _, _ = self.stack(h, LayerInputs(place, keys, turn), key=stack_key)
        return h if self.final_norm is None else self.final_norm(h), None
