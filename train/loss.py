"""Cross-entropy over the vocabulary without ever holding the logits of all tokens.

Rows go through the head in chunks of the sequence. When a gradient is wanted, each chunk's gradient is formed with its
loss, while its logits exist, and only scaled afterwards: the loss is a sum, so its gradient needs nothing more.

Legend: B rows, T tokens per row, C tokens per row of one chunk, D embed_dim, V vocab_size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from train.config import LossConfig

Head = Callable[[Any, jax.Array], jax.Array]


def cross_entropy(
    head: Head, weights: Any, hidden: jax.Array, targets: jax.Array, loss_weights: jax.Array, config: LossConfig
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over all tokens of the loss that is trained and of the plain negative log-likelihood, in nats.

    The trained loss adds label smoothing (arXiv:1512.00567, section 7) and z-loss, the weight times log(Z)^2 (PaLM,
    arXiv:2204.02311, section 5). Neither sum is divided by the sum of `loss_weights`.

    Args:
      head: (weights, hidden [B, C, D]) -> logits [B, C, V] float32.
      hidden: [B, T, D]. targets: [B, T] int32. loss_weights: [B, T] float32, constants of the differentiation.

    Returns:
      Two float32 scalars; no gradient flows through the second.
    """
    vocab_size = jax.eval_shape(head, weights, hidden[:, :1]).shape[-1]
    rows, tokens = targets.shape
    limit = config.chunk_tokens or max(256, 2**24 // vocab_size)
    chunks = next(n for n in range(1, tokens + 1) if tokens % n == 0 and (rows * tokens // n <= limit or n == tokens))
    return _cross_entropy(head, chunks, config.label_smoothing, config.z_loss, weights, hidden, targets, loss_weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _cross_entropy(head, chunks, smoothing, z_loss, weights, hidden, targets, loss_weights):
    def add(sums, index):
        h, t, w = (_cut(a, index, chunks) for a in (hidden, targets, loss_weights))
        loss, nll, _ = _terms(head(weights, h), t, w, smoothing, z_loss)
        return (sums[0] + loss, sums[1] + nll), None

    return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), jnp.arange(chunks))[0]


def _forward(head, chunks, smoothing, z_loss, weights, hidden, targets, loss_weights):
    def add(carry, index):
        h, t, w = (_cut(a, index, chunks) for a in (hidden, targets, loss_weights))
        logits, pull = jax.vjp(head, weights, h)
        loss, nll, d_logits = _terms(logits, t, w, smoothing, z_loss)
        d_weights, d_hidden = pull(d_logits)
        d_weights = jax.tree.map(lambda total, part: total + part, carry[2], d_weights)
        return (carry[0] + loss, carry[1] + nll, d_weights), d_hidden

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    (loss, nll, d_weights), d_hidden = jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(()), zeros), jnp.arange(chunks))
    d_hidden = d_hidden.swapaxes(0, 1).reshape(hidden.shape)
    d_weights = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, weights)
    return (loss, nll), (d_weights, d_hidden)


def _backward(head, chunks, smoothing, z_loss, saved, cotangents):
    d_weights, d_hidden = jax.tree.map(lambda d: (d * cotangents[0]).astype(d.dtype), saved)
    return d_weights, d_hidden, None, None


_cross_entropy.defvjp(_forward, _backward)


def _cut(array: jax.Array, index: jax.Array, chunks: int) -> jax.Array:
    size = array.shape[1] // chunks
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=1)


def _terms(logits, targets, loss_weights, smoothing, z_loss):
    """Loss and negative log-likelihood of one chunk, summed, and the loss's gradient for logits [B, C, V]."""
    vocab_size = logits.shape[-1]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_z - target_logit
    loss = nll + z_loss * jnp.square(log_z)
    if smoothing:
        loss = loss + smoothing * (target_logit - logits.mean(-1))
    scale = (loss_weights * (1 + 2 * z_loss * log_z))[..., None]
    d_logits = jnp.exp(logits - log_z[..., None]) * scale - loss_weights[..., None] * (smoothing / vocab_size)
    is_target = jnp.arange(vocab_size) == targets[..., None]
    d_logits = jnp.where(is_target, d_logits - loss_weights[..., None] * (1 - smoothing), d_logits)
    return jnp.sum(loss * loss_weights), jnp.sum(nll * loss_weights), d_logits
