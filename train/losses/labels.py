"""Losses of heads that give labels: classes, numbers, several labels at once, the two ends of an answer.

Legend: B rows, T tokens per row, L labels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def label_sums(
    name: str, logits: jax.Array, targets: jax.Array, loss_weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over a batch of the loss and of what is right.

    Args:
      name: "classification" or "token_classification": cross-entropy (nats), right where the highest logit is the
        target's. "regression": squared error, mean over L; nothing is right or wrong, and the second sum is 0.
        "multi_label": binary cross-entropy of each label (nats), mean over L; the share of labels that are right.
        "span": cross-entropy over the whole row's tokens of the first token (label 0) and the last (label 1), mean of
        both (arXiv:1810.04805, section 4.2); right where both are.
      logits: [B, T, L] float32.
      targets: [B, T] int32 for the classifications, else [B, T, L] float32; of "span", 1 at the two tokens.
      loss_weights: [B, T] float32; of "span", a half at each of the two tokens, 1 where they are one.
    """
    if name in ("classification", "token_classification"):
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        loss, right = jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.argmax(logits, axis=-1) == targets
    elif name == "regression":
        loss, right = jnp.square(logits - targets).mean(-1), jnp.zeros(logits.shape[:2])
    elif name == "multi_label":
        loss = (jax.nn.softplus(logits) - targets * logits).mean(-1)
        right = ((logits > 0) == (targets > 0.5)).mean(-1)
    else:
        marks = targets * jnp.sign(loss_weights)[..., None]  # A row of padding has no answer.
        both = (jnp.argmax(logits, 1) == jnp.argmax(targets, 1)).all(-1)  # [B]
        loss = -jnp.sum(marks * jax.nn.log_softmax(logits, axis=1).astype(marks.dtype)) / 2
        return loss, jnp.sum(jnp.where(both, loss_weights.sum(1), 0.0))
    loss, right = (a.astype(loss_weights.dtype) for a in (loss, right))
    return jnp.sum(loss * loss_weights), jnp.sum(right * loss_weights)
