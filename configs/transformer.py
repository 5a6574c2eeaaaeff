"""The original Transformer (arXiv:1706.03762, table 3): base and big, from text to text.

    python -m train.pretrain --config=configs/transformer.py:base --workdir=runs/translate
        --config.data.sources=pairs.jsonl

Pairs are lines such as {"text": "...", "label": "..."}. The learning rate falls as a cosine, not as 1 / sqrt(step).
"""

from model.config import ModelConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, LossConfig, ObjectiveConfig, OptimizerConfig, RunConfig

# embed_dim, heads, mlp_dim, dropout, steps
SIZES = {"base": (512, 8, 2048, 0.1, 100_000), "big": (1024, 16, 4096, 0.3, 300_000)}


def get_config(size: str = "base") -> Experiment:
    """The experiment for one of SIZES."""
    if size not in SIZES:
        raise UserError(f"configs/transformer.py:{size}: valid: {', '.join(SIZES)}")
    embed_dim, heads, mlp_dim, dropout, steps = SIZES[size]
    return Experiment(
        name=f"transformer_{size}",
        model=ModelConfig(
            kind="encoder_decoder",
            vocab_size=37_000,
            layers=6,
            embed_dim=embed_dim,
            heads=heads,
            mlp_dim=mlp_dim,
            activation="relu",
            positions="sinusoidal",
            norm="layernorm",
            norm_order="post",
            attention_bias=False,
            scale_embedding=True,
            init="xavier",
            init_std=embed_dim**-0.5,
            embedding_dropout=dropout,
            residual_dropout=dropout,
        ),
        data=DataConfig(tokenizer="bpe", context=128, batch_size=256),
        objective=ObjectiveConfig(name="sequence_to_sequence"),
        loss=LossConfig(label_smoothing=0.1),
        optimizer=OptimizerConfig(learning_rate=7e-4, warmup_steps=4000, beta2=0.98, eps=1e-9, weight_decay=0.0),
        run=RunConfig(steps=steps, eval_every=5000, eval_batches=50, save_every=5000),
    )
