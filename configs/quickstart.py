"""The quick start: a GPT trained from nothing on the Python library reference and source that come with Python.

python -m train.pretrain --config=configs/quickstart.py --workdir=runs/quickstart
"""

from model.config import ModelConfig
from train.config import DataConfig, Experiment, OptimizerConfig, RunConfig


def get_config() -> Experiment:
    """About five minutes on two CPU cores."""
    return Experiment(
        name="quickstart",
        model=ModelConfig(
            vocab_size=4096,
            layers=6,
            embed_dim=384,
            heads=6,
            activation="gelu_tanh",
            positions="rope",
            norm="rmsnorm",
            attention_bias=False,
            mlp_bias=False,
            qk_norm=True,
        ),
        data=DataConfig(sources=("python_docs",), tokenizer="bpe", context=256, batch_size=12, holdout=0.03),
        optimizer=OptimizerConfig(name="adamw", learning_rate=2e-3, warmup_steps=50, final_fraction=0.0),
        run=RunConfig(steps=600, eval_every=200, eval_batches=8, save_every=200),
    )
