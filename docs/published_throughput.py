"""Prints the planner's forecast beside throughput that was published for MaxText, with the error of each row.

    python docs/published_throughput.py

Arithmetic alone (`forecast`), no compiler; the topology's devices come from libtpu. Models and settings are those
of MaxText's configs/v5e/*.sh, configs/tpu/v5p/README.md and, for v4, MaxText/configs/1xv4-128.sh and 1xv4-384.sh with
base.yml as it stood beside them (context 1,024, ReLU, heads of 256, tied head).
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from train.resolve import resolve

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# (embed, heads, head_dim, mlp, layers, vocabulary, activation); below: name, topology, slices, these, rows per chip,
# context, remat, mesh, published MFU in %
SIXTEEN = (4096, 64, 128, 28672, 32, 32000, "swiglu")
THIRTY_TWO = (8192, 64, 128, 28672, 32, 32000, "swiglu")
SIXTY_FOUR = (8192, 64, 128, 28672, 64, 32000, "swiglu")
BIG = (8192, 128, 128, 57344, 64, 32000, "swiglu")
TWENTY_TWO = (6144, 24, 256, 24576, 48, 32768, "relu")
FIFTY_TWO = (12288, 32, 256, 49152, 32, 32768, "relu")
ONE, TWO = {"fsdp": 256}, {"fsdp": 16, "tensor": 16}
V5P = {"fsdp": 16, "tensor": 4}
ROWS: list[tuple[str, str, int, tuple[Any, ...], int, int, str, dict[str, int], float]] = [
    ("16B, v5e-256", "v5e:16x16", 1, SIXTEEN, 6, 2048, "full", ONE, 61.1),
    ("32B, v5e-256", "v5e:16x16", 1, THIRTY_TWO, 4, 2048, "full", ONE, 66.9),
    ("64B, v5e-256", "v5e:16x16", 1, SIXTY_FOUR, 2, 2048, "full", ONE, 59.9),
    ("128B, v5e-256", "v5e:16x16", 1, BIG, 1, 2048, "offload_projections", TWO, 56.1),
    ("16B, 32 x v5e-256", "v5e:16x16", 32, SIXTEEN, 6, 2048, "full", ONE, 54.7),
    ("32B, 32 x v5e-256", "v5e:16x16", 32, THIRTY_TWO, 4, 2048, "full", ONE, 60.4),
    ("64B, 32 x v5e-256", "v5e:16x16", 32, SIXTY_FOUR, 2, 2048, "full", ONE, 50.2),
    ("128B, 32 x v5e-256", "v5e:16x16", 32, BIG, 1, 2048, "offload_projections", TWO, 46.3),
    ("32B, v5p-128", "v5p:4x4x4", 1, THIRTY_TWO, 6, 2048, "projections", V5P, 71.5),
    ("64B, v5p-128", "v5p:4x4x4", 1, SIXTY_FOUR, 3, 2048, "projections", V5P, 70.3),
    ("22B, v4-128", "v4:4x4x4", 1, TWENTY_TWO, 16, 1024, "full", {"fsdp": 64}, 56.7),
    ("52B, v4-384", "v4:4x4x12", 1, FIFTY_TWO, 10, 1024, "full", {"fsdp": 192}, 56.0),
]


def experiment_of(shape: tuple[Any, ...], rows: int, context: int, remat: str, mesh: dict[str, int]) -> Any:
    """An experiment of that shape, with RMSNorm and rotary positions."""
    from model.config import ModelConfig
    from train.config import DataConfig, Experiment, MeshConfig

    embed_dim, heads, head_dim, mlp_dim, layers, vocab_size, activation = shape
    model = ModelConfig(
        vocab_size=vocab_size,
        layers=layers,
        embed_dim=embed_dim,
        heads=heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        activation=activation,
        norm="rmsnorm",
        attention_bias=False,
        mlp_bias=False,
        tied_head=activation == "relu",
        remat=remat,
    )
    data = DataConfig(bpe_vocab_size=vocab_size, batch_size=rows, context=context)
    return resolve(Experiment(model=model, data=data, mesh=MeshConfig(**mesh)))


def main() -> None:
    """Prints the table."""
    from tpu.compile.pod import prepare

    prepare("v5e:16x16")
    from tpu.chips import Topology, parse_topology
    from tpu.compile.pod import tpu_devices
    from tpu.mesh import make_mesh
    from tpu.plan.forecast import forecast
    from train.budget.flops import flops_per_token

    print("| row | published MFU | forecast MFU | error | forecast limit | GiB per chip |\n|---|---|---|---|---|---|")
    for name, topology, slices, shape, per_chip, context, remat, mesh, published in ROWS:
        found: Topology = parse_topology(topology)
        # The slices differ from one only by what passes between them: the forecast needs the devices of one.
        sizes = {**mesh, "data": slices, "slices": slices}
        experiment = experiment_of(shape, per_chip * found.chips * slices, context, remat, sizes)
        experiment.model = experiment.model.placed("tpu", "bfloat16")
        one = experiment_of(shape, per_chip * found.chips, context, remat, mesh)
        guess = forecast(experiment, found, make_mesh(one.mesh, tpu_devices(found, 1)))
        tokens = per_chip * context
        useful = flops_per_token(experiment) * tokens
        mfu = 100 * useful / (guess.step * found.chip.peak_flops)
        error = 100 * (mfu / published - 1)
        memory = (guess.arguments + guess.temporary) / 2**30
        print(f"| {name} | {published} % | {mfu:.1f} % | {error:+.0f} % | {guess.limit} | {memory:.1f} |")


if __name__ == "__main__":
    main()
