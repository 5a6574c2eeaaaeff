"""BERT (arXiv:1810.04805, section 3): base, large, and tiny for a laptop; masked tokens, or a task on labelled records.

    python -m train.pretrain --config=configs/bert.py:tiny --workdir=runs/bert
    python -m train.pretrain --config=configs/bert.py:tiny,classification --workdir=runs/task
        --config.data.sources=reviews.jsonl --config.model.labels=2

The task is any objective of an encoder: classification, regression, multi_label, token_classification, span. Records
are lines such as {"text": "...", "label": "good"}; train/data/text/labelled.py says what a label is for each.
image_text_classification and image_text_matching read images too, through a ViT beside the text (late fusion).
"""

from model.config import ModelConfig, VisionConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, ObjectiveConfig, OptimizerConfig, RunConfig

# vocab_size, layers, embed_dim, heads, context, batch, steps, learning rate, dropout
SIZES = {
    "tiny": (1024, 2, 128, 4, 128, 32, 1000, 2e-3, 0.0),
    "base": (30_522, 12, 768, 12, 512, 256, 1_000_000, 1e-4, 0.1),
    "large": (30_522, 24, 1024, 16, 512, 256, 1_000_000, 1e-4, 0.1),
}
# objective.name and the model.head that it trains
TASKS = {
    "masked": "language",
    "classification": "pooled",
    "regression": "pooled",
    "multi_label": "pooled",
    "token_classification": "token",
    "span": "token",
    "image_text_classification": "pooled",
    "image_text_matching": "pooled",
}


def get_config(argument: str = "tiny") -> Experiment:
    """SIZE, or SIZE,TASK."""
    size, _, task = argument.partition(",")
    if size not in SIZES:
        raise UserError(f"configs/bert.py:{argument}: valid: {', '.join(SIZES)}")
    if task and task not in TASKS:
        raise UserError(f"configs/bert.py:{argument}: valid tasks: {', '.join(TASKS)}")
    vocab_size, layers, embed_dim, heads, context, batch_size, steps, learning_rate, dropout = SIZES[size]
    objective = task or "masked"
    head, sees = TASKS[objective], objective.startswith("image_text")
    layers_of_images = {"layers": layers, "embed_dim": embed_dim, "heads": heads}
    vision = VisionConfig("vit", **layers_of_images, pool="mean", connector="none") if sees else VisionConfig()
    return Experiment(
        name=f"bert_{size}",
        model=ModelConfig(
            kind="encoder",
            head=head,
            labels=0 if head == "language" else 2,
            vocab_size=vocab_size,
            layers=layers,
            embed_dim=embed_dim,
            heads=heads,
            positions="learned",
            max_positions=context,
            token_types=2,
            activation="gelu",
            norm="layernorm",
            norm_order="post",
            norm_eps=1e-12,
            init="normal",
            embedding_dropout=dropout,
            attention_dropout=dropout,
            residual_dropout=dropout,
            fusion="late" if sees else "none",
            vision=vision,
        ),
        data=DataConfig(tokenizer="bpe", context=context, batch_size=batch_size),
        objective=ObjectiveConfig(name=objective),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            schedule="linear",
            final_fraction=0.0,
            warmup_steps=steps // 100,
            beta2=0.999,
            eps=1e-6,
            weight_decay=0.01,
        ),
        run=RunConfig(steps=steps, eval_every=steps // 5, eval_batches=50, save_every=steps // 5),
    )
