"""Models that see, made from nothing on two CPU cores: four fusions of the same image encoder and the same small text.

    python -m train.pretrain --config=configs/sight.py:merge,captions --workdir=runs/merge-captions
    python -m train.pretrain --config=configs/sight.py:merge,questions --workdir=runs/merge \\
        --config.run.start="('runs/merge-captions',)"
    python -m train.evaluate --checkpoint=runs/merge --page=answers.html

The first argument is the fusion: merge, cross, co or tangled. The second is the stage: captions come first, because
training on questions from the start stalls. Pictures are made as they are needed (train.data.made).
"""

from model.config import ModelConfig
from model.vision_config import VisionConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, ObjectiveConfig, OptimizerConfig, RunConfig

FUSIONS = ("merge", "cross", "co", "tangled")
STAGES = {  # sources and their shares, images of a row, steps
    "captions": (("scenes:caption",), (1.0,), 1, 400),
    "questions": (("scenes:question", "scenes:caption"), (0.8, 0.2), 1, 800),
}


def get_config(argument: str = "merge,questions") -> Experiment:
    """1.6 to 3.6 million parameters; 64 pixels become 16 vectors."""
    fusion, _, stage = argument.partition(",")
    if fusion not in FUSIONS or stage not in STAGES:
        raise UserError(f"{argument!r}: valid: one of {', '.join(FUSIONS)}, a comma, one of {', '.join(STAGES)}")
    sources, weights, images, steps = STAGES[stage]
    return Experiment(
        name="sight",
        model=ModelConfig(
            vocab_size=512,
            layers=4,
            embed_dim=128,
            heads=4,
            norm="rmsnorm",
            attention_bias=False,
            mlp_bias=False,
            qk_norm=True,
            fusion=fusion,
            vision=VisionConfig(
                encoder="vit",
                image_size=64,
                patch_size=8,
                layers=3,
                embed_dim=128,
                heads=4,
                init="fan_in",
                connector="pixel_shuffle",
                image_positions=0 if fusion == "merge" else 4,
                connections=3,
            ),
        ),
        data=DataConfig(
            sources=sources, weights=weights, tokenizer="bpe", context=64, batch_size=64, holdout=0.05, images=images
        ),
        objective=ObjectiveConfig(name="conversation"),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=20, final_fraction=0.0),
        run=RunConfig(steps=steps, eval_every=200, eval_batches=4, save_every=0, log_every=100),
    )
