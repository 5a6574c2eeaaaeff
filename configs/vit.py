"""Vision transformers that name classes (arXiv:2010.11929): published shapes, and a small one for 8 x 8 digits.

    python -m train.pretrain --config=configs/vit.py:digits --workdir=runs/vit \\
        --config.data.sources=digits/*.jsonl
    python -m train.pretrain --config=configs/vit.py:b16 --dry_run

A record is an image and its class as the answer, as train.data.chat.sources reads them; the paper's batches and rates.
"""

from model.config import ModelConfig, VisionConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, MeshConfig, ObjectiveConfig, OptimizerConfig, RunConfig

# patch_size, layers, embed_dim, heads, mlp_dim
SIZES = {
    "ti16": (16, 12, 192, 3, 768),
    "s16": (16, 12, 384, 6, 1536),
    "b16": (16, 12, 768, 12, 3072),
    "b32": (32, 12, 768, 12, 3072),
    "l16": (16, 24, 1024, 16, 4096),
    "h14": (14, 32, 1280, 16, 5120),
    "digits": (2, 4, 64, 4, 256),
}


def get_config(size: str = "b16") -> Experiment:
    """The experiment for one of SIZES."""
    if size not in SIZES:
        raise UserError(f"configs/vit.py:{size}: valid: {', '.join(SIZES)}")
    patch_size, layers, embed_dim, heads, mlp_dim = SIZES[size]
    digits = size == "digits"
    vision = VisionConfig(
        encoder="vit",
        image_size=8 if digits else 224,
        channels=1 if digits else 3,
        patch_size=patch_size,
        layers=layers,
        embed_dim=embed_dim,
        heads=heads,
        mlp_dim=mlp_dim,
        class_token=True,
        pool="class",
        connector="none",
    )
    return Experiment(
        name=f"vit_{size}",
        model=ModelConfig(kind="vision", labels=10 if digits else 1000, vision=vision),
        data=DataConfig(
            tokenizer="bytes", context=1, batch_size=64 if digits else 4096, holdout=0.2 if digits else 0.05
        ),
        objective=ObjectiveConfig(name="image_classification"),
        optimizer=OptimizerConfig(
            learning_rate=2e-3 if digits else 3e-3,
            beta2=0.999,
            weight_decay=0.05 if digits else 0.3,
            warmup_steps=50 if digits else 10_000,
            final_fraction=0.0,
        ),
        mesh=MeshConfig() if digits else MeshConfig(fsdp=-1),
        run=RunConfig(
            steps=1500 if digits else 93_000, eval_every=500, save_every=0 if digits else 5000, log_every=100
        ),
    )
