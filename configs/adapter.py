"""Fine-tuning by an adapter: lora, dora, bottleneck, prefix, bias. Model and tokenizer come from the base.

    python -m train.finetune --checkpoint=runs/quickstart --config=configs/adapter.py:lora --workdir=runs/lora \\
        --config.data.sources=corpus/*.jsonl

Bring a corpus. Learning rates are those at which each did well on the quick start's model (docs/adapters.md).
"""

from tpu.errors import UserError
from train.config import AdapterConfig, DataConfig, Experiment, OptimizerConfig, RunConfig

# learning rate
SIZES = {"lora": 3e-3, "dora": 3e-3, "bottleneck": 1e-3, "prefix": 1e-2, "bias": 1e-3}


def get_config(size: str = "lora") -> Experiment:
    """The experiment for a kind of adapter, one of SIZES; lora and dora on every matrix of the layers."""
    if size not in SIZES:
        raise UserError(f"configs/adapter.py:{size}: valid: {', '.join(SIZES)}")
    return Experiment(
        name=f"adapter_{size}",
        data=DataConfig(context=256, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=SIZES[size], warmup_steps=10, weight_decay=0.0, final_fraction=0.0),
        run=RunConfig(steps=200, eval_every=100, eval_batches=8, save_every=100, log_every=20),
        adapter=AdapterConfig(kind=size, targets=(r"attention|mlp",)),
    )
