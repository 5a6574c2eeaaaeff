"""Models that see, from nothing on two CPU cores: four fusions of one image encoder and one small text, in stages.

    python -m train.pretrain --config=configs/sight.py:cross,text --workdir=runs/s/text
    python -m train.pretrain --config=configs/sight.py:cross,captions --workdir=runs/s/captions \\
        --config.run.start=runs/s/text
    python -m train.pretrain --config=configs/sight.py:cross,questions --workdir=runs/s/questions \\
        --config.run.start=runs/s/captions
    python -m train.evaluate --checkpoint=runs/s/questions --page=answers.html

The first argument is the fusion: merge, cross, co or tangled. The second is the stage; `start` says from which other it
goes on, because training on questions from the start stalls; the text learns to say and to reason about what it will
see. co and tangled go on from the text and the image encoder that cross has trained on captions, and the encoder stays
as it is: ViLBERT and ActBERT, too, look through a detector that was trained before. Pictures are made as they are
needed (made). `python docs/sight_table.py` trains and measures all of them; docs/sight.md says what has been
reached.
"""

from model.config import ModelConfig, VisionConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, ObjectiveConfig, OptimizerConfig, RunConfig

STREAMS = ("co", "tangled")
FUSIONS = ("merge", "cross", *STREAMS)
TEXTS = ("scenes:caption", "scenes:question", "scenes:compare", "charts:caption", "charts:question", "clips:describe")
# Sources and their shares of rows, tokens of a row, images of a row, rows, steps
STAGES = {
    "text": (("python_docs", *TEXTS), (0.2, 0.12, 0.2, 0.16, 0.08, 0.16, 0.08), 128, 1, 16, 1000),
    "captions": (("scenes:caption",), (1.0,), 64, 1, 32, 1200),
    "questions": (("scenes:dialogue", "scenes:caption", "scenes:question"), (0.6, 0.2, 0.2), 112, 1, 32, 1600),
    "compare": (("scenes:compare",), (1.0,), 144, 2, 32, 1200),
    "chart_captions": (("charts:caption",), (1.0,), 64, 1, 32, 1500),
    "charts": (("charts:question",), (1.0,), 80, 1, 32, 1500),
    "clips": (("clips:describe",), (1.0,), 144, 4, 16, 2000),
}
STARTS = {
    "captions": "text",
    "questions": "captions",
    "compare": "questions",
    "chart_captions": "text",
    "charts": "chart_captions",
    "clips": "compare",
}


def start(fusion: str, stage: str) -> tuple[str, str] | None:
    """The fusion and the stage whose weights a stage starts with; None for the text, which starts from nothing."""
    if stage == "captions" and fusion in STREAMS:
        return "cross", stage
    return (fusion, STARTS[stage]) if stage in STARTS else None


def get_config(argument: str = "merge,questions") -> Experiment:
    """A text of four layers of width 128 and an image encoder of two; 64 pixels become 16 vectors."""
    fusion, _, stage = argument.partition(",")
    if fusion not in FUSIONS or stage not in STAGES:
        raise UserError(f"{argument!r}: valid: one of {', '.join(FUSIONS)}, a comma, one of {', '.join(STAGES)}")
    sources, weights, context, images, rows, steps = STAGES[stage]
    if fusion != "merge" and stage != "text":
        context -= 16 * images  # Images stand between the tokens.
    text = stage == "text"
    return Experiment(
        name="sight",
        model=ModelConfig(
            vocab_size=1024,
            layers=4,
            embed_dim=128,
            heads=4,
            norm="rmsnorm",
            attention_bias=False,
            mlp_bias=False,
            qk_norm=True,
            fusion="none" if text else fusion,
            vision=VisionConfig() if text else _vision(fusion),
        ),
        data=DataConfig(
            sources=sources,
            weights=weights,
            tokenizer="bpe",
            context=context,
            batch_size=rows,
            holdout=0.03,
            images=images,
        ),
        objective=ObjectiveConfig(name="next_token" if text else "conversation"),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=1e-2,
            warmup_steps=20,
            final_fraction=0.02,
            frozen=(r"^vision\b",) if fusion in STREAMS and not text else (),
        ),
        run=RunConfig(steps=steps, eval_every=500, eval_batches=4, save_every=0, log_every=100),
    )


def _vision(fusion: str) -> VisionConfig:
    streams = {"connections": 3, "connection_heads": 4} if fusion in STREAMS else {}
    if fusion == "tangled":  # One action is all that a token would find of an image, whatever it looks for.
        streams |= {"actions": 16, "tangled": "paper"}
    return VisionConfig(
        encoder="vit",
        image_size=64,
        patch_size=8,
        layers=2,
        embed_dim=128,
        heads=4,
        init="fan_in",
        connector="pixel_shuffle",
        image_positions=0 if fusion == "merge" else 4,
        qk_norm=fusion != "merge",
        **streams,
    )
