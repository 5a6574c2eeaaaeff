"""Cross-entropy over the vocabulary without ever holding the logits of all tokens.

Rows go through the head in chunks of the sequence. When a gradient is wanted, each chunk's gradient is formed with its
loss, while its logits exist, and only scaled afterwards: the loss is a sum, so its gradient needs nothing more. On a
mesh every device takes a share of the tokens and the whole head, and the head's gradient is summed over devices once.

Legend: B rows, T tokens, C tokens per row of one chunk, D embed_dim, V vocab_size; on a mesh, of one device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.weights import axes_of
from tpu import rules
from train.config import LossConfig

Head = Callable[[Any, jax.Array], jax.Array]


def cross_entropy(
    head: Head,
    weights: Any,
    axes: Any,
    hidden: jax.Array,
    targets: jax.Array,
    loss_weights: jax.Array,
    config: LossConfig,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over all tokens of the loss that is trained and of the plain negative log-likelihood, in nats.

    The trained loss adds label smoothing (arXiv:1512.00567, section 7) and z-loss, the weight times log(Z)^2 (PaLM,
    arXiv:2204.02311, section 5). Neither sum is divided by the sum of `loss_weights`.

    Args:
      head: (weights, hidden [B, C, D]) -> logits [B, C, V] float32.
      axes: the logical axes of each of `weights`, which say how its gradient is laid out.
      hidden: [B, T, D]. targets: [B, T] int32. loss_weights: [B, T] float32, constants of the differentiation.

    Returns:
      Two float32 scalars; no gradient flows through the second.
    """
    names = tuple(jax.tree.structure(weights).flatten_up_to(axes_of(weights, axes)))
    fixed = (head, names, config.chunk_tokens, config.label_smoothing, config.z_loss)
    return _cross_entropy(*fixed, weights, hidden, targets, loss_weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _cross_entropy(head, names, chunk_tokens, smoothing, z_loss, weights, hidden, targets, loss_weights):
    def each(weights, hidden, targets, loss_weights):
        chunks = _chunks(head, weights, hidden, chunk_tokens)

        def add(sums, index):
            h, t, w = (_cut(a, index, chunks) for a in (hidden, targets, loss_weights))
            loss, nll, _ = _terms(head(weights, h), t, w, smoothing, z_loss)
            return (sums[0] + loss, sums[1] + nll), None

        sums = jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), jnp.arange(chunks))[0]
        return jax.lax.psum(sums, spread.axes)

    spread = _Spread(targets)
    none = PartitionSpec()
    return spread.over_devices(each, (none, none))(weights, hidden, targets, loss_weights)


def _forward(head, names, chunk_tokens, smoothing, z_loss, weights, hidden, targets, loss_weights):
    def each(weights, hidden, targets, loss_weights):
        chunks, moving = _chunks(head, weights, hidden, chunk_tokens), _floats(weights)

        def of_floats(moving, h):
            return head(jax.tree.map(lambda m, w: w if m is None else m, moving, weights, is_leaf=_is_none), h)

        def add(carry, index):
            h, t, w = (_cut(a, index, chunks) for a in (hidden, targets, loss_weights))
            logits, pull = jax.vjp(of_floats, moving, h)
            loss, nll, d_logits = _terms(logits, t, w, smoothing, z_loss)
            d_weights, d_hidden = pull(d_logits)
            d_weights = jax.tree.map(lambda total, part: total + part, carry[2], d_weights)
            at = index * d_hidden.shape[1]
            d_hidden = jax.lax.dynamic_update_slice_in_dim(carry[3], d_hidden.astype(hidden.dtype), at, axis=1)
            return (carry[0] + loss, carry[1] + nll, d_weights, d_hidden), None

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), moving)
        start = (jnp.zeros(()), jnp.zeros(()), zeros, jnp.zeros_like(hidden))
        loss, nll, d_weights, d_hidden = jax.lax.scan(add, start, jnp.arange(chunks))[0]
        d_weights = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, moving)
        d_weights = jax.tree.map(spread.reduced, d_weights, layout)
        return *jax.lax.psum((loss, nll), spread.axes), d_weights, d_hidden

    spread = _Spread(targets)
    structure = jax.tree.structure(weights)
    layout = structure.unflatten(map(spread.layout, names, jax.tree.leaves(weights)))
    layout = jax.tree.map(lambda m, at: None if m is None else at, _floats(weights), layout, is_leaf=_is_none)
    none = PartitionSpec()
    over_devices = spread.over_devices(each, (none, none, layout, spread.tokens))
    loss, nll, d_weights, d_hidden = over_devices(weights, hidden, targets, loss_weights)
    return (loss, nll), (d_weights, d_hidden)


def _backward(head, names, chunk_tokens, smoothing, z_loss, saved, cotangents):
    d_weights, d_hidden = jax.tree.map(lambda d: (d.astype(jnp.float32) * cotangents[0]).astype(d.dtype), saved)
    return d_weights, d_hidden, None, None


_cross_entropy.defvjp(_forward, _backward)


def _floats(weights):
    """The weights with None for what has no gradient: the integers of a quantised matrix."""
    return jax.tree.map(lambda w: w if jnp.issubdtype(w.dtype, jnp.inexact) else None, weights)


def _is_none(node):
    return node is None


class _Spread:
    """How tokens [B, T] are shared out among the devices of the mesh in use; without one, a single share."""

    def __init__(self, targets: jax.Array):
        self.mesh = jax.sharding.get_abstract_mesh()
        self.tokens = PartitionSpec()
        if not self.mesh.empty and self.mesh.size > 1:
            self.tokens = rules.partition_spec(("batch", "loss_sequence"), self.mesh, targets.shape)
        self.axes = rules.axes_in(self.tokens)

    def over_devices(self, each: Callable, out_specs: Any) -> Callable:
        """`each`(weights, hidden, targets, loss_weights) on every device, with all weights and its share of tokens."""
        if not self.axes:
            return each
        return jax.shard_map(
            each,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), self.tokens, self.tokens, self.tokens),
            out_specs=out_specs,
            axis_names=rules.free_axes(self.mesh),
            check_vma=False,
        )

    def layout(self, names: tuple[str, ...], weight: jax.Array) -> PartitionSpec:
        """How the gradient of a weight with these logical axes leaves `reduced`."""
        if not self.axes:
            return PartitionSpec()
        spec = rules.partition_spec(names, self.mesh, weight.shape)
        return rules.without(spec, tuple(axis for axis in self.mesh.axis_names if axis not in self.axes))

    def reduced(self, gradient: jax.Array, layout: PartitionSpec) -> jax.Array:
        """This device's part, according to `layout`, of the sum of all devices' gradients."""
        left = self.axes
        for dimension, axes in enumerate(layout):
            if axes:
                gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dimension, tiled=True)
                left = tuple(axis for axis in left if axis not in rules.axes_in(PartitionSpec(axes)))
        return jax.lax.psum(gradient, left)


def _chunks(head: Head, weights: Any, hidden: jax.Array, chunk_tokens: int) -> int:
    """Into how many parts to cut the sequence, so that each has at most `chunk_tokens`, or half a GiB of logits."""
    rows, tokens = hidden.shape[:2]
    limit = chunk_tokens or max(256, 2**27 // jax.eval_shape(head, weights, hidden[:, :1]).shape[-1])
    return next(n for n in range(1, tokens + 1) if tokens % n == 0 and (rows * tokens // n <= limit or n == tokens))


def _cut(array: jax.Array, index: jax.Array, chunks: int) -> jax.Array:
    size = array.shape[1] // chunks
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=1)


def _terms(logits, targets, loss_weights, smoothing, z_loss):
    """Loss and negative log-likelihood of one chunk, summed, and the loss's gradient for logits [B, C, V]."""
    shape, vocab_size = logits.shape, logits.shape[-1]
    # As the product of the head leaves them and as its gradient takes them: XLA:CPU then writes one over the other.
    logits, targets, loss_weights = logits.reshape(-1, vocab_size), targets.reshape(-1), loss_weights.reshape(-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_z - target_logit
    loss = nll + z_loss * jnp.square(log_z)
    if smoothing:
        loss = loss + smoothing * (target_logit - logits.mean(-1))
    scale = (loss_weights * (1 + 2 * z_loss * log_z))[..., None]
    d_logits = jnp.exp(logits - log_z[..., None]) * scale - loss_weights[..., None] * (smoothing / vocab_size)
    is_target = jnp.arange(vocab_size)[None, None] == targets[..., None]
    d_logits = jnp.where(is_target, d_logits - loss_weights[..., None] * (1 - smoothing), d_logits)
    return jnp.sum(loss * loss_weights), jnp.sum(nll * loss_weights), d_logits.reshape(shape)
