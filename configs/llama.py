"""Llama 2 (arXiv:2307.09288) and Llama 3 (arXiv:2407.21783) shapes: 2-7b, 2-70b, 3-8b, 3-70b.

python -m train.pretrain --config=configs/llama.py:3-8b --workdir=runs/llama --dry_run
"""

from model.config import ModelConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, OptimizerConfig, RunConfig

# vocab_size, layers, embed_dim, heads, kv_heads, mlp_dim, context, rope_theta, eps, tokens, learning rate
SIZES = {
    "2-7b": (32_000, 32, 4096, 32, 32, 11_008, 4096, 1e4, 1e-5, 2e12, 3e-4),
    "2-70b": (32_000, 80, 8192, 64, 8, 28_672, 4096, 1e4, 1e-5, 2e12, 1.5e-4),
    "3-8b": (128_256, 32, 4096, 32, 8, 14_336, 8192, 5e5, 1e-5, 15e12, 3e-4),
    "3-70b": (128_256, 80, 8192, 64, 8, 28_672, 8192, 5e5, 1e-5, 15e12, 1.5e-4),
}
BATCH_TOKENS = 4 * 2**20


def get_config(size: str = "2-7b") -> Experiment:
    """The experiment for one of SIZES."""
    if size not in SIZES:
        raise UserError(f"configs/llama.py:{size}: valid: {', '.join(SIZES)}")
    vocab_size, layers, embed_dim, heads, kv_heads, mlp_dim, context, theta, eps, tokens, learning_rate = SIZES[size]
    return Experiment(
        name=f"llama_{size}",
        model=ModelConfig(
            vocab_size=vocab_size,
            layers=layers,
            embed_dim=embed_dim,
            heads=heads,
            kv_heads=kv_heads,
            mlp_dim=mlp_dim,
            activation="swiglu",
            positions="rope",
            rope_theta=theta,
            norm="rmsnorm",
            norm_eps=eps,
            attention_bias=False,
            mlp_bias=False,
            tied_head=False,
            remat="full",
        ),
        data=DataConfig(tokenizer="bpe", context=context, batch_size=BATCH_TOKENS // context),
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=2000),
        run=RunConfig(steps=round(tokens / BATCH_TOKENS), eval_every=1000, eval_batches=100, save_every=1000),
    )
