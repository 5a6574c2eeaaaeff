"""The tangled transformer (ActBERT, arXiv:2011.07231, section 3.2): text, regions and actions, the last in between.

An action looks at the regions and at the text, and what it finds enters the keys and values of the other: c_r of the
regions those of the text, c_w of the text those of the regions. Each stream then attends to itself. Two variants:

    code   (as published: added)       K_w + up(W1 c_r), V_w + up(W2 c_r);   K_r + up(W3 c_w), V_r + up(W4 c_w)
    paper  (equations 5 and 6: stacked) [K_w; W1 c_r], [V_w; W2 c_r];        [K_r; W3 c_w], [V_r; W4 c_w]

Here a region is an image vector, and an action a vector of a whole image or frame, or of a part of one. `up` gives each
region what the nearest of its image's actions has, as published. For the text that resize would go by the length of the
row, and give tokens what comes of later images: a token sees an image's actions as a whole, and gets the mean of those
of the last image before it, so that generated text can go on with it. Stacked, tokens see every action by itself.
Actions look at the text before the first answer alone (as in `co_attention`); images see those before them, not
those after. With vision.qk_norm a stream's own queries and keys are normalised, not what actions give to the keys.

Legend: B batch, T tokens, S regions, N actions, H heads, K head_dim, D embed_dim, C width of the regions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention import cache as kv_cache
from model.attention.attend import plain_attention
from model.config import ModelConfig
from model.fusion.co_attention import Side, connection_config
from model.linear import Linear, together
from model.norms import Norm
from model.place import Place, visible


class Streams(NamedTuple):
    """What is beside the text: regions [B, S, C], actions [B, N, D], and their places (segment, number of image)."""

    regions: jax.Array
    region_place: Place
    actions: jax.Array
    action_place: Place


class Pairs(NamedTuple):
    """Keys and values [B, H, N, K] that the actions give to the text, at the actions' place."""

    keys: jax.Array
    values: jax.Array
    place: Place


class Projections(nnx.Module):
    """Queries, keys and values of one stream of some width, and the way back into it."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs):
        embed, each = ((width, "embed"),), ((config.heads, "heads"), (config.head_dim, "head_dim"))
        for name in ("query", "key", "value"):
            setattr(self, name, Linear(config, embed, each, config.attention_bias, rngs))
        self.out = Linear(config, each, embed, config.attention_bias, rngs, residual=True)
        normed = config.vision.qk_norm
        norms = [Norm(config, config.head_dim, "norm", rngs, "rmsnorm") if normed else None for _ in range(2)]
        self.query_norm, self.key_norm = norms
        self.scale = config.head_dim**-0.5

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, width] -> queries, scaled, keys, values [B, H, T, K]."""
        q, k, v = together(x, self.query, self.key, self.value)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return (q * self.scale).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)


class TangledConnection(nnx.Module):
    """One tangled block of the three streams."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        own, width, mlp_dim = connection_config(config), config.source_width, config.vision.mlp_dim
        self.stacked = config.vision.tangled == "paper"
        self.text = Side(config, config.embed_dim, config.mlp_dim, rngs)
        self.regions = Side(config, width, mlp_dim, rngs)
        self.actions = Side(config, config.embed_dim, config.mlp_dim, rngs)
        self.of_text = Projections(own, config.embed_dim, rngs)
        self.of_regions = Projections(own, width, rngs)
        self.of_actions = Projections(own, config.embed_dim, rngs)
        inner = ((own.heads, "heads"), (own.head_dim, "head_dim"))
        for name in ("text_keys", "text_values", "region_keys", "region_values"):  # W1 to W4
            setattr(self, name, Linear(own, inner, inner, own.attention_bias, rngs))

    def __call__(
        self,
        h: jax.Array,
        place: Place,
        slots: Place | None,
        seen: Place | None,
        given: jax.Array | None,
        streams: Streams | None,
        held: tuple[tuple[jax.Array, jax.Array], Pairs | None] | None,
    ) -> tuple[jax.Array, Streams | None, tuple[tuple[jax.Array, jax.Array], Pairs] | None]:
        """h [B, T, D] at `place` -> (h, the streams, what generation holds on to).

        Args:
          slots: where the keys of the cache held[0] stand.
          seen: where the tokens stand among the images; None: there are none.
          given: [B, T], 1 where the actions may look; not read without streams.
          streams: None where an earlier call has left their pairs in `held`.
          held: with a cache the text's keys and values and, after the first call, the actions' pairs; None without.
        """
        q, k, v = self.of_text(self.text.enter(h))
        cached, pairs = (None, None) if held is None else held
        new = None
        if streams is not None:
            pairs, new = self._others(streams, k, v, place, given)
        if pairs is not None and not self.stacked:
            k, v = (a + self._mean(b, pairs.place, seen) for a, b in ((k, pairs.keys), (v, pairs.values)))
        k, v, keys, cached = kv_cache.extend(cached, k, v, place, slots)
        mask = visible(place, keys, 0)
        if pairs is not None and self.stacked:
            k, v, mask = self._stack(k, v, mask, pairs, visible(seen, pairs.place, 0))
        out = self.of_text.out(plain_attention(q, k, v, mask).swapaxes(1, 2))
        return self.text.leave(h, out), new, None if held is None else (cached, pairs)

    def _others(
        self, streams: Streams, text_keys: jax.Array, text_values: jax.Array, place: Place, given: jax.Array
    ) -> tuple[Pairs, Streams]:
        """What the actions give to the text, and both other streams after the block."""
        regions, actions = self.regions.enter(streams.regions), self.actions.enter(streams.actions)
        q_r, k_r, v_r = self.of_regions(regions)
        q_a, k_a, v_a = self.of_actions(actions)
        of_actions, of_regions = streams.action_place, streams.region_place
        sees_regions = visible(of_actions, of_regions, 0)
        sees_text = of_actions.segments[:, :, None] == (place.segments * given)[:, None, :]
        sees_text &= of_actions.segments[:, :, None] > 0
        c_r = plain_attention(q_a, k_r, v_r, sees_regions)
        c_w = plain_attention(q_a, text_keys, text_values, sees_text)
        c_w = jnp.where(sees_text.any(-1)[:, None, :, None], c_w, 0)
        pairs = Pairs(_inner(self.text_keys, c_r), _inner(self.text_values, c_r), of_actions)
        back = Pairs(_inner(self.region_keys, c_w), _inner(self.region_values, c_w), of_actions)
        mask = visible(of_regions, of_regions, 0)
        if self.stacked:
            k_r, v_r, mask = self._stack(k_r, v_r, mask, back, visible(of_regions, of_actions, 0))
        else:
            each = k_r.shape[2] // back.keys.shape[2]
            k_r, v_r = (a + jnp.repeat(b, each, axis=2) for a, b in ((k_r, back.keys), (v_r, back.values)))
        regions = self.of_regions.out(plain_attention(q_r, k_r, v_r, mask).swapaxes(1, 2))
        actions = self.of_actions.out(plain_attention(q_a, k_a, v_a, visible(of_actions, of_actions, 0)).swapaxes(1, 2))
        return pairs, streams._replace(
            regions=self.regions.leave(streams.regions, regions), actions=self.actions.leave(streams.actions, actions)
        )

    @staticmethod
    def _mean(a: jax.Array, place: Place, onto: Place) -> jax.Array:
        """a [B, H, N, K] of the actions at `place` -> [B, H, T, K]: for each of `onto` its image's mean, or zero."""
        at = onto.positions[:, :, None] == place.positions[:, None, :]
        at &= (onto.segments[:, :, None] == place.segments[:, None, :]) & (onto.segments[:, :, None] > 0)
        share = at / jnp.maximum(at.sum(-1, keepdims=True), 1)
        return jnp.einsum("btn,bhnk->bhtk", share.astype(a.dtype), a)

    @staticmethod
    def _stack(
        k: jax.Array, v: jax.Array, mask: jax.Array, pairs: Pairs, sees: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys, values and mask with the actions' pairs after them; `sees` [B, T, N] says who sees which."""
        k, v = (jnp.concatenate([a, b.astype(a.dtype)], 2) for a, b in ((k, pairs.keys), (v, pairs.values)))
        return k, v, jnp.concatenate([mask, sees], -1)


def _inner(linear: Linear, a: jax.Array) -> jax.Array:
    """A Linear over heads and head_dim of a [B, H, N, K]."""
    return linear(a.swapaxes(1, 2)).swapaxes(1, 2)
