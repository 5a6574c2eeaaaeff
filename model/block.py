"""One layer of the transformer: self-attention and a feed-forward block around a residual stream.

Legend: B batch, T tokens, D embed_dim, H heads, G kv_heads, K head_dim.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from model.adapters.bottleneck import Bottleneck
from model.attention.cross_attention import CrossAttention
from model.attention.knn_attention import KNNAttention
from model.attention.layer_inputs import LayerInputs
from model.attention.linear_attention import LinearAttention
from model.attention.memory import Hidden
from model.attention.self_attention import SelfAttention
from model.config import ModelConfig
from model.dropout import dropout, fold_in
from model.mlp import MLP
from model.moe import MoE, Routing
from model.norms import Norm
from model.residual import residual


class Block(nnx.Module):
    """Attention, then feed-forward, each a branch beside the residual stream.

    Normalised before each branch ("pre", GPT-2), after each sum ("post", the original Transformer), before and after
    each branch ("sandwich", Gemma 2, arXiv:2408.00118) or after it alone ("reordered", OLMo 2, arXiv:2501.00656).
    """

    def __init__(self, config: ModelConfig, kind: str, rngs: nnx.Rngs, mixture: bool = False):
        first, last = config.norm_order != "reordered", config.norm_order in ("sandwich", "reordered")
        self.attention_norm = Norm(config, config.embed_dim, "norm", rngs) if first else None
        if kind in ("linear", "gated_linear"):
            self.attention = LinearAttention(config, kind, rngs)
        else:
            self.attention = KNNAttention(config, rngs) if kind == "knn" else SelfAttention(config, kind, rngs)
        self.attention_out_norm = Norm(config, config.embed_dim, "norm", rngs) if last else None
        cross = config.kind == "encoder_decoder"
        self.cross_norm = Norm(config, config.embed_dim, "norm", rngs) if cross else None
        self.cross = CrossAttention(config, rngs) if cross else None
        self.mlp_norm = Norm(config, config.embed_dim, "norm", rngs) if first else None
        self.mlp = None if mixture else MLP(config, rngs)
        self.moe = MoE(config, rngs) if mixture else None
        self.mlp_out_norm = Norm(config, config.embed_dim, "norm", rngs) if last else None
        self.attention_adapter = Bottleneck(config, rngs) if config.bottleneck_dim else None
        self.mlp_adapter = Bottleneck(config, rngs) if config.bottleneck_dim else None
        self.norm_first, self.norm_sum = config.norm_order in ("pre", "sandwich"), config.norm_order == "post"
        self.dropout_rate = config.residual_dropout

    def __call__(
        self, h: jax.Array, inputs: LayerInputs, cached: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any, Routing | None]:
        """h [B, T, D] -> ([B, T, D], cache, what the router of a mixture did); arguments as `SelfAttention`.

        With cross-attention the cache is (keys, values), and from the first call on the source's keys and values too.
        """
        keys = [fold_in(key, i) for i in range(3)]
        cached, held = (cached, None) if self.cross is None or cached is None else (cached[:2], cached[2:])
        with jax.named_scope("attention"):
            x = self.attention_norm(h) if self.norm_first else h
            remembered = cached
            if isinstance(cached, Hidden):
                cached = Hidden(self.attention_norm(cached.states)) if self.norm_first else cached
            out, cached = self.attention(x, inputs, cached, keys[0])
            if isinstance(cached, Hidden):
                cached = remembered.followed_by(h)
            out = out if self.attention_adapter is None else self.attention_adapter(out)
            out = residual(out) if self.attention_out_norm is None else self.attention_out_norm(residual(out))
            h = h + dropout(out, self.dropout_rate, keys[1])
            h = self.attention_norm(h) if self.norm_sum else h
        if self.cross is not None:
            with jax.named_scope("cross_attention"):
                x = self.cross_norm(h) if self.norm_first else h
                out, held = self.cross(x, inputs.place, inputs.source, held, fold_in(key, 3))
                h = h + dropout(residual(out), self.dropout_rate, fold_in(key, 4))
                h = self.cross_norm(h) if self.norm_sum else h
                cached = cached if cached is None else (*cached, *held)
        with jax.named_scope("mlp"):
            x, routing = self.mlp_norm(h) if self.norm_first else h, None
            if self.moe is not None:  # Generation drops no token, for the others of its row are not there.
                out, routing = self.moe(x, inputs.place.segments > 0, dropless=cached is not None)
            else:
                out = self.mlp(x)
            out = out if self.mlp_adapter is None else self.mlp_adapter(out)
            out = residual(out) if self.mlp_out_norm is None else self.mlp_out_norm(residual(out))
            h = h + dropout(out, self.dropout_rate, keys[2])
            h = self.mlp_norm(h) if self.norm_sum else h
        return residual(h), cached, routing
