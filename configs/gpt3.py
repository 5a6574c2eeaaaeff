"""GPT-3 (arXiv:2005.14165, table 2.1): 125m, 350m, 760m, 1.3b, 2.7b, 6.7b, 13b, 175b; 300 billion tokens each.

    python -m train.pretrain --config=configs/gpt3.py:175b --workdir=runs/gpt3 --dry_run

Rows as printed, but for one: 1.3b has 16 heads here. The table's 24 heads of 128 do not make its width of 2,048,
nor its count of weights. The width of the paper's alternating locally banded layers (section 2.1) is
unpublished, so all layers are dense unless the argument gives one: configs/gpt3.py:175b,band=256.
"""

from model.config import ModelConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, OptimizerConfig, RunConfig

# layers, embed_dim, heads, head_dim, batch in tokens, learning rate
SIZES = {
    "125m": (12, 768, 12, 64, 0.5e6, 6.0e-4),
    "350m": (24, 1024, 16, 64, 0.5e6, 3.0e-4),
    "760m": (24, 1536, 16, 96, 0.5e6, 2.5e-4),
    "1.3b": (24, 2048, 16, 128, 1e6, 2.0e-4),
    "2.7b": (32, 2560, 32, 80, 1e6, 1.6e-4),
    "6.7b": (32, 4096, 32, 128, 2e6, 1.2e-4),
    "13b": (40, 5140, 40, 128, 2e6, 1.0e-4),
    "175b": (96, 12288, 96, 128, 3.2e6, 0.6e-4),
}
CONTEXT = 2048
TOKENS = 300e9


def get_config(size: str = "125m") -> Experiment:
    """The experiment for one of SIZES, and, after ",band=", the keys that every second layer sees, itself included."""
    size, banded, band = size.partition(",band=")
    if size not in SIZES or (banded and not band.isdecimal()):
        raise UserError(f"configs/gpt3.py:{size}{banded}{band}: valid: {', '.join(SIZES)}, and these with ,band=256")
    layers, embed_dim, heads, head_dim, batch_tokens, learning_rate = SIZES[size]
    batch_size = round(batch_tokens / CONTEXT / 256) * 256
    tokens_per_step = batch_size * CONTEXT
    return Experiment(
        name=f"gpt3_{size}",
        model=ModelConfig(
            vocab_size=50257,
            layers=layers,
            embed_dim=embed_dim,
            heads=heads,
            head_dim=head_dim,
            positions="learned",
            max_positions=CONTEXT,
            pattern=("global", "local") if band else ("global",),
            window=int(band or 0),
            activation="gelu_tanh",
            norm="layernorm",
            remat="full",
        ),
        data=DataConfig(tokenizer="bpe", context=CONTEXT, batch_size=batch_size),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            warmup_steps=round(375e6 / tokens_per_step),
            weight_decay=0.1,
            beta2=0.95,
            final_fraction=0.1,
        ),
        run=RunConfig(steps=round(TOKENS / tokens_per_step), eval_every=1000, eval_batches=100, save_every=1000),
    )
