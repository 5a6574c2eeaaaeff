"""A GPT of 124 million weights trained on 512 tokens, and extended to 8,192 and 32,768 by YaRN (arXiv:2309.00071).

    python -m train.pretrain --config=configs/long_context.py:512 --workdir=runs/512
    cp -r runs/512 runs/8k
    python -m train.pretrain --config=configs/long_context.py:8k --workdir=runs/8k

The longer ones go on from the shorter one's checkpoint: scaled rotary positions have no weights of their own. 400 steps
of fine-tuning at a constant low learning rate, as the paper's section 4.1 has it for the first extension.
"""

from model.config import ModelConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, OptimizerConfig, RunConfig

TRAINED, STEPS, EXTENSION = 512, 50_000, 400
SIZES = {"512": 512, "8k": 8192, "32k": 32_768}
BATCH_TOKENS = 2**18


def get_config(size: str = "8k") -> Experiment:
    """The experiment for one of SIZES."""
    if size not in SIZES:
        raise UserError(f"configs/long_context.py:{size}: valid: {', '.join(SIZES)}")
    tokens = SIZES[size]
    extended = tokens > TRAINED
    return Experiment(
        name=f"long_context_{size}",
        model=ModelConfig(
            vocab_size=50_304,
            layers=12,
            embed_dim=768,
            heads=12,
            activation="swiglu",
            mlp_dim=2048,
            norm="rmsnorm",
            positions="rope",
            rope_scaling="yarn" if extended else "none",
            rope_factor=tokens / TRAINED,
            rope_original_context=TRAINED,
            attention_bias=False,
            mlp_bias=False,
            remat="full" if extended else "none",
        ),
        data=DataConfig(tokenizer="bpe", context=tokens, batch_size=BATCH_TOKENS // tokens),
        optimizer=OptimizerConfig(
            learning_rate=2e-5 if extended else 6e-4,
            schedule="constant" if extended else "wsd",
            warmup_steps=20 if extended else 500,
            weight_decay=0.0 if extended else 0.1,
        ),
        run=RunConfig(steps=STEPS + EXTENSION * extended, eval_every=1000, eval_batches=20, save_every=1000),
    )
