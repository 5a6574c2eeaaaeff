"""T5 (arXiv:1910.10683): small, base, large, 3b, 11b; 1.1-small to 1.1-xxl (gated, head of its own); tiny for a laptop.

    python -m train.pretrain --config=configs/t5.py:tiny --workdir=runs/t5
    python -m train.pretrain --config=configs/t5.py:tiny,sequence_to_sequence --workdir=runs/task
        --config.data.sources=pairs.jsonl --config.data.target_context=32

Without a task the model learns to write spans that were cut out of text. Pairs are lines such as {"text": "...",
"label": "..."}; `python -m serve.generate --checkpoint=runs/task --prompt="..."` writes the label of a text.
"""

from model.config import ModelConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, ObjectiveConfig, OptimizerConfig, RunConfig

# layers of each half, embed_dim, heads, head_dim, mlp_dim (the paper's section 3.7; 1.1: its published checkpoints)
SIZES = {
    "tiny": (2, 128, 4, 32, 256),
    "small": (6, 512, 8, 64, 2048),
    "base": (12, 768, 12, 64, 3072),
    "large": (24, 1024, 16, 64, 4096),
    "3b": (24, 1024, 32, 128, 16_384),
    "11b": (24, 1024, 128, 128, 65_536),
    "1.1-small": (8, 512, 6, 64, 1024),
    "1.1-base": (12, 768, 12, 64, 2048),
    "1.1-large": (24, 1024, 16, 64, 2816),
    "1.1-xl": (24, 2048, 32, 64, 5120),
    "1.1-xxl": (24, 4096, 64, 64, 10_240),
}
TASKS = ("span_corruption", "sequence_to_sequence")


def get_config(argument: str = "tiny") -> Experiment:
    """SIZE, or SIZE,TASK."""
    size, _, task = argument.partition(",")
    if size not in SIZES:
        raise UserError(f"configs/t5.py:{argument}: valid: {', '.join(SIZES)}")
    if task and task not in TASKS:
        raise UserError(f"configs/t5.py:{argument}: valid tasks: {', '.join(TASKS)}")
    layers, embed_dim, heads, head_dim, mlp_dim = SIZES[size]
    tiny, gated = size == "tiny", size == "tiny" or size.startswith("1.1")
    context, steps = (128, 1000) if tiny else (512, 2**19)
    return Experiment(
        name=f"t5_{size}",
        model=ModelConfig(
            kind="encoder_decoder",
            vocab_size=1024 if tiny else 32_128,
            layers=layers,
            embed_dim=embed_dim,
            heads=heads,
            head_dim=head_dim,
            mlp_dim=mlp_dim,
            activation="geglu" if gated else "relu",
            positions="relative",
            norm="rmsnorm",
            norm_eps=1e-6,
            attention_bias=False,
            mlp_bias=False,
            query_scalar=1.0,
            tied_head=not gated,
            output_scale=1.0 if gated else embed_dim**-0.5,
            init="fan_in",
            init_std=1.0,
        ),
        data=DataConfig(tokenizer="bpe", context=context, batch_size=32 if tiny else 128),
        objective=ObjectiveConfig(name=task or "span_corruption"),
        optimizer=OptimizerConfig(
            name="adamw" if tiny else "adafactor",
            learning_rate=2e-3 if tiny else 1e-2,
            warmup_steps=steps // 50,
            weight_decay=0.0,
        ),
        run=RunConfig(steps=steps, eval_every=steps // 5, eval_batches=50, save_every=steps // 5),
    )
