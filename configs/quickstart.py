"""The quick start: a GPT trained from nothing on the Python library reference and source that come with Python.

    python -m train.pretrain --config=configs/quickstart.py --workdir=runs/quickstart

Four layers of width 256 over 4,096 byte-pair tokens: 4.2 million parameters, 0.9 million tokens, at most six minutes
on two CPU cores. `python -m train.evaluate --checkpoint=runs/quickstart` compares the result with xz and zlib.
"""

from model.config import ModelConfig
from train.config import DataConfig, Experiment, OptimizerConfig, RunConfig


def get_config() -> Experiment:
    """Small rows and Muon (arXiv:2502.16982): the fastest way down in few tokens that we found."""
    return Experiment(
        name="quickstart",
        model=ModelConfig(
            vocab_size=4096,
            layers=4,
            embed_dim=256,
            heads=4,
            activation="gelu_tanh",
            positions="rope",
            norm="rmsnorm",
            attention_bias=False,
            mlp_bias=False,
            qk_norm=True,
        ),
        data=DataConfig(sources=("python_docs",), tokenizer="bpe", context=256, batch_size=8, holdout=0.03),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=30, final_fraction=0.0),
        run=RunConfig(steps=450, eval_every=150, eval_batches=8, save_every=150, log_every=20),
    )
