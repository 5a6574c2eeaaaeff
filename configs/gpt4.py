"""GPT-4, an ESTIMATE that nobody has confirmed: 8k, 32k (contexts), and tiny, the same layer for a CPU; with ",sight"
behind it the model sees.

    python -m tpu.compile --config=configs/gpt4.py:8k --topology=v5p:8x8x16
    python -m tpu.compile --config=configs/gpt4.py:8k,sight --topology=v5p:8x8x16

OpenAI has published no shape. The technical report (arXiv:2303.08774, section 2) says "a Transformer-style model" for
text and images, and gives no "architecture (including model size), hardware, training compute"; the announcement
(https://openai.com/index/gpt-4-research/) gives contexts of 8,192 and 32,768 tokens. These two numbers are all that is
known. The rest is a guess, after what the press has repeated since July 2023 without evidence that can be checked
(https://newsletter.semianalysis.com/p/gpt-4-architecture-infrastructure): 1.8 trillion
weights in 120 layers, 16 experts of which a token meets two, one key and value head, 13 trillion tokens. Width, heads,
vocabulary and the rates are ours, such that the sums come out near those. It is an experiment of that size to rehearse
on a pod, not an account of GPT-4. Of sight the report says only that images go in; the same press names an encoder of
its own with cross-attention, as Flamingo has (arXiv:2204.14198), so that is what is built here: a ViT of 1.8 billion
weights, 64 latents per image, and cross-attention before every eighth layer. Its sizes are ours.
"""

from model.config import ModelConfig, VisionConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, LossConfig, MeshConfig, ObjectiveConfig, OptimizerConfig, RunConfig

MESH = {"expert": 16, "fsdp": -1}
# vocab_size, layers, embed_dim, heads, kv_heads, mlp_dim, experts, context, rows, steps, learning rate, mesh
SIZES = {
    "8k": (100_352, 120, 10_240, 80, 1, 45_056, 16, 8192, 1024, 1_550_000, 5e-5, MESH),
    "32k": (100_352, 120, 10_240, 80, 1, 45_056, 16, 32_768, 256, 1_550_000, 5e-5, MESH | {"tensor": 4}),
    "tiny": (257, 4, 128, 4, 1, 256, 8, 256, 8, 1000, 1e-3, {}),
}
# image_size, patch_size, layers, embed_dim, heads, mlp_dim of the encoder; latents, heads and head_dim of the perceiver
SIGHTS = {"8k": (448, 14, 48, 1664, 16, 8192, 64, 16, 96), "tiny": (32, 8, 2, 32, 4, 64, 4, 2, 8)}
SIGHTS["32k"] = SIGHTS["8k"]


def get_config(argument: str = "8k") -> Experiment:
    """The experiment for one of SIZES, with sight where ",sight" follows."""
    size, _, sight = argument.partition(",")
    if size not in SIZES or sight not in ("", "sight"):
        raise UserError(f"configs/gpt4.py:{argument}: valid: {', '.join(SIZES)}, and each with ,sight behind it")
    vocab_size, layers, embed_dim, heads, kv_heads, mlp_dim, experts, context, rows, steps, rate, mesh = SIZES[size]
    tiny = size == "tiny"
    return Experiment(
        name=f"gpt4_{size}{'_sight' if sight else ''}",
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
            fusion="cross" if sight else "none",
            vision=_vision(size) if sight else VisionConfig(),
        ),
        data=DataConfig(tokenizer="bytes" if tiny else "bpe", context=context, batch_size=rows, images=4),
        objective=ObjectiveConfig(name="conversation" if sight else "next_token"),
        loss=LossConfig(balance_loss=0.01, router_z_loss=0.001),
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=100 if tiny else 2000),
        mesh=MeshConfig(**mesh),
        run=RunConfig(steps=steps, eval_every=250 if tiny else 1000, eval_batches=20, save_every=250 if tiny else 1000),
    )


def _vision(size: str) -> VisionConfig:
    image_size, patch_size, layers, embed_dim, heads, mlp_dim, latents, latent_heads, latent_dim = SIGHTS[size]
    return VisionConfig(
        encoder="vit",
        image_size=image_size,
        patch_size=patch_size,
        layers=layers,
        embed_dim=embed_dim,
        heads=heads,
        mlp_dim=mlp_dim,
        normalization="clip",
        connector="perceiver",
        latents=latents,
        connector_layers=6 if size != "tiny" else 1,
        connector_heads=latent_heads,
        connector_head_dim=latent_dim,
        image_positions=4,
        every=8 if size != "tiny" else 2,
    )
