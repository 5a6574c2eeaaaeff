"""GPT-2 (Language Models are Unsupervised Multitask Learners, 2019, table 2): 124m, 355m, 774m, 1558m.

    python -m train.pretrain --config=configs/gpt2.py:124m --workdir=runs/gpt2

The published sizes; batch and learning rate as the GPT-3 paper gives for the nearest size. Bring a corpus:
--config.data.sources=corpus/*.jsonl and GPT-2's tokenizer.json, or train a tokenizer of that size.
"""

from model.config import ModelConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, OptimizerConfig, RunConfig

# layers, embed_dim, heads, learning rate
SIZES = {
    "124m": (12, 768, 12, 6e-4),
    "355m": (24, 1024, 16, 3e-4),
    "774m": (36, 1280, 20, 2.5e-4),
    "1558m": (48, 1600, 25, 2e-4),
}


def get_config(size: str = "124m") -> Experiment:
    """The experiment for one of SIZES."""
    if size not in SIZES:
        raise UserError(f"configs/gpt2.py:{size}: valid: {', '.join(SIZES)}")
    layers, embed_dim, heads, learning_rate = SIZES[size]
    return Experiment(
        name=f"gpt2_{size}",
        model=ModelConfig(
            vocab_size=50257,
            layers=layers,
            embed_dim=embed_dim,
            heads=heads,
            positions="learned",
            max_positions=1024,
            activation="gelu_tanh",
            norm="layernorm",
            norm_eps=1e-5,
        ),
        data=DataConfig(tokenizer="bpe", context=1024, batch_size=512),
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=2000),
        run=RunConfig(steps=100_000, eval_every=1000, eval_batches=100, save_every=1000),
    )
