"""Attention on TPU by the Pallas kernels of jax ("splash", sparse flash attention, arXiv:2205.14135).

Legend: B batch, H heads, G kv_heads, T tokens, K head_dim.
"""

from __future__ import annotations

import jax

LANES = 128  # rows are cut into blocks of a multiple of this


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    sinks: jax.Array | None = None,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
) -> jax.Array:
    """Attention of packed rows to themselves; arguments and result as `model.attention.attend`.

    Args:
      q: [B, H, T, K]. k, v: [B, G, T, K], T a multiple of LANES. segments: [B, T] int32, runs in which positions rise
        by one. sinks: [H] or None.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, tokens = q.shape[1:3]
    size = next(block for block in (512, 384, 256, LANES) if tokens % block == 0)
    shape = (tokens, tokens)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    mask = mask if causal else masks.FullMask(shape)
    attention = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_kv_dkv_compute=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name="attention",
    )
    return jax.vmap(lambda q, k, v, s: attention(q, k, v, kernel.SegmentIds(s, s), sinks))(q, k, v, segments)
