"""A small GPT, 3 million weights: GPT-2's layer in miniature, for a laptop.

python -m train.pretrain --config=configs/gpt_mini.py --workdir=runs/mini
"""

from model.config import ModelConfig
from train.config import DataConfig, Experiment, OptimizerConfig, RunConfig


def get_config() -> Experiment:
    """Byte-level text, four layers."""
    return Experiment(
        name="gpt_mini",
        model=ModelConfig(vocab_size=257, layers=4, embed_dim=256, heads=4, positions="learned", max_positions=256),
        data=DataConfig(tokenizer="bytes", context=256, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        run=RunConfig(steps=2000, eval_every=500, eval_batches=20, save_every=500),
    )
