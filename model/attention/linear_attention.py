"""Attention without a softmax, whose past is one matrix per head: linear attention and its gated form.

"linear" (arXiv:2006.16236, equations 8 to 12): queries and keys pass through elu + 1, and results are divided by the
sum of their weights. "gated_linear" (RetNet, arXiv:2307.08621, section 2; gates of the data, GLA, arXiv:2312.06635):
every token lets the past fade by a factor that it chooses for each head; results are normalised and gated.

A row is computed in chunks: tokens of one chunk meet as in ordinary attention, and what came before them is a state
S [K, V], which for "linear" has one more column, of ones, so that the sum of the weights falls out too. A chunk of one
token is the recurrent form, which generation uses: its cache does not grow.

A query of a new segment does not see the state of the one before, and padding (segment 0) leaves the state alone.

Legend: B batch, T tokens, C tokens of a chunk, D embed_dim, G kv_heads, R = H / G, K head_dim, V columns of the state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.attention.layer_inputs import LayerInputs
from model.config import ModelConfig
from model.linear import Linear, together
from model.norms import Norm
from model.positions.rope import rotate
from tpu.rules import constrain

CHUNK = 64


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    segments: jax.Array,
    state: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """sum over j <= i of the segment of (q_i k_j) exp(log_decay_(j+1) + ... + log_decay_i) v_j, for every token i.

    Args:
      q: [B, G, R, T, K]. k: [B, G, T, K]. v: [B, G, T, V]. log_decay: [B, G, T] float32, at most 0, or None for 0.
      segments: [B, T] int32, rising along a row; 0 is padding.
      state: [B, G, K, V] float32 of what came before, all of it of the segment that opens the row; None: nothing.
      chunk: tokens that meet at one time.

    Returns:
      [B, G, R, T, V] float32, and the state after the last token, of its segment.
    """
    b, g, r, t, width = q.shape
    columns = v.shape[-1]
    if state is None:
        state = jnp.zeros((b, g, width, columns), jnp.float32)
    if log_decay is None:
        log_decay = jnp.zeros((b, g, t), jnp.float32)
    chunk = min(chunk, t)
    n = -(-t // chunk)
    missing = n * chunk - t

    def cut(a: jax.Array, axis: int) -> jax.Array:
        a = jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)])
        return jnp.moveaxis(a.reshape(*a.shape[:axis], n, chunk, *a.shape[axis + 1 :]), axis, 0)

    opening = segments[:, 0]

    @jax.checkpoint
    def one_chunk(carry: tuple, x: tuple) -> tuple[tuple, jax.Array]:
        state, of_state = carry
        q, k, v, log_decay, segments = x
        real = segments > 0  # [B, C]
        fade = jnp.cumsum(jnp.where(real[:, None], log_decay, 0.0), -1)  # [B, G, C]
        same = (segments[:, :, None] == segments[:, None, :]) & real[:, None, :] & np.tri(segments.shape[1], dtype=bool)
        # Masked before the exponential: above the diagonal it would overflow.
        between = jnp.where(same[:, None], fade[..., :, None] - fade[..., None, :], -jnp.inf)  # [B, G, C, C]
        scores = _einsum("bgrck,bgsk->bgrcs", q, k) * jnp.exp(between)[:, :, None]
        goes_on = (segments == of_state[:, None])[:, None, None, :, None]
        earlier = _einsum("bgrck,bgkv->bgrcv", q.astype(jnp.float32), state) * jnp.exp(fade)[:, :, None, :, None]
        out = _einsum("bgrcs,bgsv->bgrcv", scores.astype(v.dtype), v) + jnp.where(goes_on, earlier, 0.0)
        last = jnp.maximum(of_state, segments.max(-1))  # the segment of the last token that is no padding
        kept = real & (segments == last[:, None])
        left = jnp.where(kept[:, None], fade[..., -1:] - fade, -jnp.inf)  # [B, G, C]
        faded = jnp.where((last == of_state)[:, None, None, None], jnp.exp(fade[..., -1])[..., None, None] * state, 0.0)
        new = faded + _einsum("bgsk,bgsv->bgkv", k * jnp.exp(left)[..., None], v.astype(jnp.float32))
        return (new, last), out

    parts = (cut(q, 3), cut(k, 2), cut(v, 2), cut(log_decay, 2), cut(segments, 1))
    (state, _), out = jax.lax.scan(one_chunk, (state, opening), parts)
    return jnp.moveaxis(out, 0, 3).reshape(b, g, r, n * chunk, columns)[:, :, :, :t], state


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def usual_decay(heads: int) -> np.ndarray:
    """[G] float32: how much heads keep of the past before anything is learned, in front of the logistic function.

    From the first head to the last 31/32 to 511/512, the factors of RetNet (equation 8).
    """
    keeps = 1 - 2.0 ** np.linspace(-5, -9, heads)
    return np.log(keeps / (1 - keeps)).astype(np.float32)


def state_shape(config: ModelConfig, kind: str, rows: int) -> tuple[int, ...]:
    """Of the state of a layer of the kind "linear" or "gated_linear", float32: [B, G, K, V]."""
    return rows, config.kv_heads, config.head_dim, config.head_dim + (kind == "linear")


class LinearAttention(nnx.Module):
    """A layer's attention of the kind "linear" or "gated_linear", called as `model.block.SelfAttention` is.

    Rotary positions turn queries and keys of "gated_linear" alone: a turn could make the weights of "linear" negative.
    """

    def __init__(self, config: ModelConfig, kind: str, rngs: nnx.Rngs):
        embed, head_dim = (config.embed_dim, "embed"), (config.head_dim, "head_dim")
        heads, kv_heads = (config.heads, "heads"), (config.kv_heads, "kv_heads")
        self.query = Linear(config, (embed,), (heads, head_dim), config.attention_bias, rngs)
        self.key = Linear(config, (embed,), (kv_heads, head_dim), config.attention_bias, rngs)
        self.value = Linear(config, (embed,), (kv_heads, head_dim), config.attention_bias, rngs)
        out_bias = config.attention_bias and config.attention_out_bias
        self.out = Linear(config, (heads, head_dim), (embed,), out_bias, rngs, residual=True)
        self.rope_interleaved = config.rope_interleaved
        self.query_norm = Norm(config, config.head_dim, "norm", rngs, "rmsnorm") if config.qk_norm else None
        self.key_norm = Norm(config, config.head_dim, "norm", rngs, "rmsnorm") if config.qk_norm else None
        self.gated = kind == "gated_linear"
        if self.gated:
            self.decay = Linear(config, (embed,), (kv_heads,), False, rngs)
            self.gate = Linear(config, (embed,), (heads, head_dim), False, rngs)
            self.head_norm = Norm(config, config.head_dim, "norm", rngs, "rmsnorm")

    def __call__(self, x: jax.Array, inputs: LayerInputs, cached: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> ([B, T, D], the state after these tokens, or None).

        cached: the state [B, G, K, V] of `linear_attention` before these tokens, or None to begin with nothing.
        """
        q, k, v = together(x, self.query, self.key, self.value)  # [B, T, H, K], [B, T, G, K] twice
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        log_decay = None
        if self.gated:
            if inputs.rotation is not None:
                # Of memory and row, the row's.
                turn = jax.tree.map(lambda a: a[:, -x.shape[1] :], inputs.rotation["global"])
                q, k = (rotate(a, turn, self.rope_interleaved) for a in (q, k))
            q = q * q.shape[-1] ** -0.5
            log_decay = jax.nn.log_sigmoid(self.decay(x, "float32") + usual_decay(k.shape[2])).swapaxes(
                1, 2
            )  # [B, G, T]
        else:
            q, k = (jax.nn.elu(a) + 1 for a in (q, k))
        q, k, v = (constrain(a.swapaxes(1, 2), "batch", "activation_heads", "sequence", "head_dim") for a in (q, k, v))
        b, h, t, width = q.shape
        if not self.gated:
            v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], -1)
        grouped = q.reshape(b, k.shape[1], -1, t, width)
        out, state = linear_attention(grouped, k, v, log_decay, inputs.place.segments, cached)
        out = out.reshape(b, h, t, -1).swapaxes(1, 2)  # [B, T, H, V]
        if self.gated:
            out = self.head_norm(out.astype(x.dtype)) * jax.nn.silu(self.gate(x))
        else:
            out = (out[..., :-1] / jnp.maximum(out[..., -1:], 1e-6)).astype(x.dtype)
        return checkpoint_name(self.out(out), "out"), None if cached is None else state
