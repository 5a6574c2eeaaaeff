"""CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343): published shapes, and small ones for the pictures made here.

    python -m train.pretrain --config=configs/clip.py:scenes --workdir=runs/clip
    python -m train.pretrain --config=configs/clip.py:b32 --dry_run
    python -m train.pretrain --config=configs/clip.py:b32 --config.data.sources="shards-{000..099}.tar" ...

"scenes" learns the captions of scenes in minutes on two CPU cores (docs/sight.md); "scenes-siglip" does so with
SigLIP's loss. The others are the papers' shapes and batches.
"""

from model.config import ModelConfig, VisionConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, MeshConfig, ObjectiveConfig, OptimizerConfig, RunConfig

# image_size, patch_size, layers, embed_dim, heads of the images; embed_dim, heads of 12 layers of text; projection_dim
CLIP = {
    "b32": (224, 32, 12, 768, 12, 512, 8, 512),
    "b16": (224, 16, 12, 768, 12, 512, 8, 512),
    "l14": (224, 14, 24, 1024, 16, 768, 12, 768),
    "l14-336": (336, 14, 24, 1024, 16, 768, 12, 768),
}
SMALL = ("scenes", "scenes-siglip")
SIZES = (*SMALL, *CLIP)


def get_config(size: str = "scenes") -> Experiment:
    """The experiment of one of SIZES."""
    if size in SMALL:
        return _small(size)
    if size not in SIZES:
        raise UserError(f"configs/clip.py:{size}: valid: {', '.join(SIZES)}")
    image_size, patch_size, layers, width, heads, text_width, text_heads, projection_dim = CLIP[size]
    return Experiment(
        name=f"clip_{size}",
        model=ModelConfig(
            vocab_size=49_408,
            layers=12,
            embed_dim=text_width,
            heads=text_heads,
            activation="quick_gelu",
            positions="learned",
            max_positions=77,
            fusion="contrastive",
            vision=VisionConfig(
                encoder="vit",
                image_size=image_size,
                patch_size=patch_size,
                layers=layers,
                embed_dim=width,
                heads=heads,
                activation="quick_gelu",
                norm_eps=1e-5,
                normalization="clip",
                class_token=True,
                patch_bias=False,
                embedding_norm=True,
                pool="class",
                connector="none",
                projection_dim=projection_dim,
            ),
        ),
        data=DataConfig(context=77, batch_size=32_768),
        objective=ObjectiveConfig(name="contrastive"),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, beta2=0.98, eps=1e-6, weight_decay=0.2, warmup_steps=2000, final_fraction=0.0
        ),
        mesh=MeshConfig(fsdp=-1),
        run=RunConfig(steps=390_000, eval_every=5000, save_every=5000),
    )


def _small(size: str) -> Experiment:
    sigmoid = size == "scenes-siglip"
    return Experiment(
        name=f"clip_{size}",
        model=ModelConfig(
            vocab_size=512,
            layers=3,
            embed_dim=128,
            heads=4,
            kind="encoder" if sigmoid else "decoder",
            positions="learned",
            max_positions=48,
            fusion="contrastive",
            vision=VisionConfig(
                encoder="vit",
                image_size=64,
                patch_size=8,
                layers=3,
                embed_dim=128,
                heads=4,
                init="fan_in",
                pool="map",
                connector="none",
                similarity="sigmoid" if sigmoid else "softmax",
                text_pool="last" if sigmoid else "end",
                projection_dim=128,
            ),
        ),
        data=DataConfig(sources=("scenes:caption",), tokenizer="bpe", context=48, batch_size=128, holdout=0.03),
        objective=ObjectiveConfig(name="contrastive"),
        optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, warmup_steps=20, final_fraction=0.02),
        run=RunConfig(steps=1000, eval_every=250, eval_batches=4, save_every=0, log_every=50),
    )
