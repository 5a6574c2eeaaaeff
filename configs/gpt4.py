"""GPT-4, an ESTIMATE that nobody has confirmed: 8k, 32k (contexts), and tiny, the same layer for a CPU.

    python -m tpu.compile --config=configs/gpt4.py:8k --topology=v5p:8x8x16

OpenAI has published no shape. The technical report (arXiv:2303.08774, section 2) says "a Transformer-style model" for
text and images, and gives no "architecture (including model size), hardware, training compute"; the announcement
(https://openai.com/index/gpt-4-research/) gives contexts of 8,192 and 32,768 tokens. These two numbers are all that is
known. The rest is a guess, after what the press has repeated since July 2023 without evidence that can be checked
(https://newsletter.semianalysis.com/p/gpt-4-architecture-infrastructure): 1.8 trillion
weights in 120 layers, 16 experts of which a token meets two, one key and value head, 13 trillion tokens. Width, heads,
vocabulary and the rates are ours, such that the sums come out near those. It is an experiment of that size to rehearse
on a pod, not an account of GPT-4. Images are not in it yet.
"""

from model.config import ModelConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, LossConfig, MeshConfig, OptimizerConfig, RunConfig

MESH = {"expert": 16, "fsdp": -1}
# vocab_size, layers, embed_dim, heads, kv_heads, mlp_dim, experts, context, rows, steps, learning rate, mesh
SIZES = {
    "8k": (100_352, 120, 10_240, 80, 1, 45_056, 16, 8192, 1024, 1_550_000, 5e-5, MESH),
    "32k": (100_352, 120, 10_240, 80, 1, 45_056, 16, 32_768, 256, 1_550_000, 5e-5, MESH | {"tensor": 4}),
    "tiny": (257, 4, 128, 4, 1, 256, 8, 256, 8, 1000, 1e-3, {}),
}


def get_config(size: str = "8k") -> Experiment:
    """The experiment for one of SIZES."""
    if size not in SIZES:
        raise UserError(f"configs/gpt4.py:{size}: valid: {', '.join(SIZES)}")
    vocab_size, layers, embed_dim, heads, kv_heads, mlp_dim, experts, context, rows, steps, rate, mesh = SIZES[size]
    tiny = size == "tiny"
    return Experiment(
        name=f"gpt4_{size}",
        model=ModelConfig(
            vocab_size=vocab_size,
            layers=layers,
            embed_dim=embed_dim,
            heads=heads,
            kv_heads=kv_heads,
            mlp_dim=mlp_dim,
            experts=experts,
            experts_per_token=2,
            capacity_factor=0.0 if tiny else 1.25,
            activation="gelu_tanh",
            positions="rope",
            norm="rmsnorm",
            attention_bias=False,
            mlp_bias=False,
            tied_head=False,
            remat="none" if tiny else "full",
        ),
        data=DataConfig(tokenizer="bytes" if tiny else "bpe", context=context, batch_size=rows),
        loss=LossConfig(balance_loss=0.01, router_z_loss=0.001),
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=100 if tiny else 2000),
        mesh=MeshConfig(**mesh),
        run=RunConfig(steps=steps, eval_every=250 if tiny else 1000, eval_batches=20, save_every=250 if tiny else 1000),
    )
