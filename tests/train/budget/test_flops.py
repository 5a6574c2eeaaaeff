"""Operations counted from shapes against the products in the compiled program, for models that see."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from model import kinds
from model.config import ModelConfig, VisionConfig
from tpu.compile import hlo
from tpu.compile.hlo_counts import count
from train.budget.flops import flops_per_token, shown
from train.config import DataConfig, Experiment, ObjectiveConfig
from train.resolve import resolve
from train.step import abstract_batch, make_program

ROWS = 2
VIT = {"encoder": "vit", "image_size": 32, "patch_size": 4, "layers": 3, "embed_dim": 48, "heads": 4}
POOLED = {"connector": "none", "projection_dim": 24}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "merge": ("conversation", {"fusion": "merge"}, {"connector": "mlp", "class_token": True}),
    "merge-shuffle": ("conversation", {"fusion": "merge", "layer_loop": "scan"}, {"connector": "pixel_shuffle"}),
    "merge-unused": ("conversation", {"fusion": "merge"}, {"unused_layers": 1}),
    "cross": ("conversation", {"fusion": "cross", "layer_loop": "scan"}, {"connector": "pixel_shuffle", "every": 2}),
    "cross-perceiver": (
        "conversation",
        {"fusion": "cross"},
        {"connector": "perceiver", "latents": 5, "connector_heads": 3, "connector_head_dim": 16},
    ),
    "co": ("conversation", {"fusion": "co"}, {"connector": "none", "connection_heads": 4, "connection_dim": 24}),
    "tangled": ("conversation", {"fusion": "tangled"}, {"connections": 1, "connection_heads": 4}),
    "tangled-paper": (
        "conversation",
        {"fusion": "tangled"},
        {"tangled": "paper", "actions": 16, "connector": "none", "connection_heads": 4},
    ),
    "clip": ("contrastive", {"fusion": "contrastive"}, {"pool": "class", "class_token": True, **POOLED}),
    "siglip": (
        "contrastive",
        {"fusion": "contrastive", "kind": "encoder"},
        {"pool": "map", "similarity": "sigmoid", "text_pool": "last", **POOLED},
    ),
    "classes": ("image_classification", {"kind": "vision", "labels": 3}, {"pool": "mean", "connector": "none"}),
}


def experiment_of(case: str) -> Experiment:
    objective, fields, vision = CASES[case]
    text = {"vocab_size": 257, "layers": 4, "embed_dim": 32, "heads": 4, "attention": "plain"}
    context = 1 if fields.get("kind") == "vision" else 160
    experiment = resolve(
        Experiment(
            model=ModelConfig(**text | fields, vision=VisionConfig(**VIT | vision)),
            data=DataConfig(tokenizer="bytes", bpe_vocab_size=257, context=context, batch_size=ROWS, images=2),
            objective=ObjectiveConfig(name=objective),
        )
    )
    experiment.model = experiment.model.placed("cpu", "float32")
    return experiment


@pytest.mark.parametrize("case", CASES)
def test_a_forward_pass_has_a_third_of_the_operations(case, one_device):
    experiment = experiment_of(case)
    with jax.set_mesh(one_device):
        program = make_program(experiment, one_device)
        lowered = jax.jit(program.evaluate).lower(program.abstract_state.weights, abstract_batch(experiment))
        compiled = count(hlo.parse(lowered.compile().as_text()), dict(one_device.shape)).matmul_flops
    _, weights, _ = kinds.build(experiment.model)
    per_token = flops_per_token(experiment.model, weights, experiment.data.context, shown=shown(experiment))
    # Not counted: a class token's patch that is none, what resizes and shares out actions, similarities of vectors.
    assert per_token * ROWS * experiment.data.context / 3 == pytest.approx(compiled, rel=0.02)
