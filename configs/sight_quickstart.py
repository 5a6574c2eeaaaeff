"""From nothing to a model that answers questions about pictures, on two CPU cores: make sight.

    python -m train.pretrain --config=configs/sight_quickstart.py:text --workdir=runs/sight/text
    python -m train.pretrain --config=configs/sight_quickstart.py:align --workdir=runs/sight/align \\
        --config.run.start=runs/sight/text
    ... and so with captions, from align, and questions, from captions; then
    python -m train.evaluate --checkpoint=runs/sight/questions --page=runs/sight/answers.html

The recipe of LLaVA (arXiv:2304.08485, section 4.2): a language model first, as the quick start's, here on what is said
about pictures too; then, with the language model frozen, the image encoder and the gated cross-attention to it; then
all of it on captions, and on questions last. Pictures are made as they are needed (train.data.made.made).
"""

from model.config import ModelConfig, VisionConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, ObjectiveConfig, OptimizerConfig, RunConfig

# Sources and their shares of rows, tokens of a row, rows, steps, what is frozen
STAGES = {
    "text": (("python_docs", "scenes:caption", "scenes:question"), (0.3, 0.2, 0.5), 128, 16, 400, ()),
    "align": (("scenes:caption",), (1.0,), 48, 32, 150, (r"^(embedding|final_norm|head)\b", r"^stack\.groups\.layer_")),
    "captions": (("scenes:caption",), (1.0,), 48, 32, 1000, ()),
    "questions": (("scenes:dialogue", "scenes:caption", "scenes:question"), (0.6, 0.2, 0.2), 96, 32, 800, ()),
}


def get_config(stage: str = "questions") -> Experiment:
    """A text of four layers of width 128 and an image encoder of two; 64 pixels become 16 vectors."""
    if stage not in STAGES:
        raise UserError(f"{stage!r}: valid: {', '.join(STAGES)}")
    sources, weights, context, rows, steps, frozen = STAGES[stage]
    text = stage == "text"
    return Experiment(
        name="sight_quickstart",
        model=ModelConfig(
            vocab_size=1024,
            layers=4,
            embed_dim=128,
            heads=4,
            norm="rmsnorm",
            attention_bias=False,
            mlp_bias=False,
            qk_norm=True,
            fusion="none" if text else "cross",
            vision=VisionConfig()
            if text
            else VisionConfig(
                encoder="vit",
                image_size=64,
                patch_size=8,
                layers=2,
                embed_dim=128,
                heads=4,
                init="fan_in",
                connector="pixel_shuffle",
                image_positions=4,
                qk_norm=True,
            ),
        ),
        data=DataConfig(
            sources=sources, weights=weights, tokenizer="bpe", context=context, batch_size=rows, holdout=0.03
        ),
        objective=ObjectiveConfig(name="next_token" if text else "conversation"),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=1e-2,
            warmup_steps=20,
            final_fraction=0.02,
            frozen=frozen,
        ),
        run=RunConfig(steps=steps, eval_every=500, eval_batches=4, save_every=0, log_every=100),
    )
