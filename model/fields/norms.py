"""Norms, biases, dropout and first weights."""

import dataclasses

from model.fields.limits import choice, number

DROPOUTS = ("embedding_dropout", "attention_dropout", "residual_dropout")


@dataclasses.dataclass
class Norms:
    """What stands around the matrices of a layer, and how these are drawn."""

    norm: str = choice("layernorm", "rmsnorm")
    norm_eps: float = number(1e-5, above=0)
    # pre, post, sandwich (before and after each branch), reordered (after it; OLMo 2)
    norm_order: str = choice("pre", "post", "sandwich", "reordered")
    norm_unit_offset: bool = False  # norms multiply by 1 + scale (Gemma)
    attention_bias: bool = True
    attention_out_bias: bool = True  # False: attention_bias is of queries, keys and values only (Qwen2)
    mlp_bias: bool = True
    norm_bias: bool = True  # LayerNorm only
    logits_softcap: float = number(0.0, at_least=0)
    # alpha of NEFTune (model.neftune), in training: 5 to 15 in the paper; 0: no noise
    embedding_noise: float = number(
        0.0, at_least=0, free=True, of={"model.kind": ("decoder", "encoder", "encoder_decoder")}
    )
    embedding_dropout: float = number(0.0, at_least=0, below=1, free=True)
    attention_dropout: float = number(0.0, at_least=0, below=1, free=True)
    residual_dropout: float = number(0.0, at_least=0, below=1, free=True)
    init: str = choice("gpt2", "normal", "fan_in", "xavier")
    init_std: float = number(0.02, above=0)  # of "gpt2" and "normal"
