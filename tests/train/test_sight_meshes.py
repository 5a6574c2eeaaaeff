"""Models that see compute on eight devices what they compute on one.

Legend: B rows, T tokens, N images of a row.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import numpy as np
import optax
import pytest

from model.config import ModelConfig, VisionConfig
from tests.runs import random_state
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.config import DataConfig, Experiment, MeshConfig, ObjectiveConfig, OptimizerConfig
from train.data.batch import Batch
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.chat.rows import caption_row, class_row, conversation_row, question_row
from train.data.text.tokenizer import ByteTokenizer
from train.program import make_program
from train.resolve import resolve

ROWS, TOKENS = 16, 32
TEXT = {"vocab_size": 257, "layers": 2, "embed_dim": 16, "heads": 4}
VIT = {"encoder": "vit", "image_size": 8, "patch_size": 4, "layers": 2, "embed_dim": 16, "heads": 4}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "merge": ("conversation", {"fusion": "merge", "layer_loop": "scan"}, {"connector": "mlp"}),
    "merge-prefix": ("conversation", {"fusion": "merge"}, {"mask": "prefix"}),
    "cross": (
        "conversation",
        {"fusion": "cross", "layers": 4, "layer_loop": "scan"},
        {"every": 2, "connector": "perceiver", "latents": 3, "connector_heads": 2, "connector_head_dim": 4},
    ),
    "cross-last": ("conversation", {"fusion": "cross"}, {"sees": "last", "image_positions": 2}),
    "co": ("conversation", {"fusion": "co"}, {"connections": 1, "connection_heads": 4}),
    "tangled": ("conversation", {"fusion": "tangled"}, {"connections": 1, "connection_heads": 4}),
    "clip": (
        "contrastive",
        {"fusion": "contrastive"},
        {"pool": "class", "class_token": True, "connector": "none", "projection_dim": 8},
    ),
    "siglip": (
        "contrastive",
        {"fusion": "contrastive", "kind": "encoder"},
        {"pool": "map", "similarity": "sigmoid", "text_pool": "last", "connector": "none", "projection_dim": 16},
    ),
    "questions": (
        "image_text_classification",
        {"fusion": "late", "kind": "encoder", "head": "pooled", "labels": 3},
        {"pool": "map", "connector": "none"},
    ),
    "matching": (
        "image_text_matching",
        {"fusion": "late", "kind": "encoder", "head": "pooled", "labels": 2, "positions": "learned"},
        {"pool": "mean", "connector": "none", "combine": "average"},
    ),
    "classes": ("image_classification", {"kind": "vision", "labels": 3}, {"pool": "mean", "connector": "none"}),
}
MESHES = {
    "fsdp2-tensor2-sequence2": {"fsdp": 2, "tensor": 2, "sequence": 2},
    "data2-fsdp4": {"data": 2, "fsdp": 4},
    "fsdp4-tensor2": {"fsdp": 4, "tensor": 2},
    "stage2-fsdp2-tensor2": {"stage": 2, "fsdp": 2, "tensor": 2},
}
DIVIDED = [
    *((case, "fsdp2-tensor2-sequence2") for case in ("merge", "cross")),
    *((case, "stage2-fsdp2-tensor2") for case in ("merge", "cross")),
    *((case, "fsdp4-tensor2") for case in ("merge-prefix", "co", "tangled", "clip", "classes")),
    *((case, "fsdp4-tensor2") for case in ("questions", "matching")),
    *((case, "data2-fsdp4") for case in ("clip", "siglip")),
]


def experiment_of(case: str, mesh: dict[str, int]) -> Experiment:
    objective, fields, vision = CASES[case]
    experiment = resolve(
        Experiment(
            model=ModelConfig(
                **{"vocab_size": 257, "layers": 2, "embed_dim": 16, "heads": 4, **fields},
                vision=VisionConfig(**VIT | vision),
            ),
            data=DataConfig(tokenizer="bytes", bpe_vocab_size=257, context=TOKENS, batch_size=ROWS, images=2),
            objective=ObjectiveConfig(name=objective),
            # Without momentum and clipping, its state is the last gradient.
            optimizer=OptimizerConfig(name="sgd", schedule="constant", warmup_steps=0, beta1=0.0, clip_norm=0.0),
            mesh=MeshConfig(**mesh),
        )
    )
    experiment.model = experiment.model.placed("cpu", "float32")
    return experiment


def rows(experiment: Experiment) -> Batch:
    """Rows with none, one and two images."""
    rng, tokenizer, name = np.random.default_rng(0), ByteTokenizer(), experiment.objective.name

    def row(number: int) -> Batch:
        count = number % 3 if name == "conversation" else 1
        images = tuple(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(count))
        answer = "abc"[number % 3] * (1 + number % 5)
        record = Conversation(f"{number}", (Turn("user", IMAGE * count + "q"), Turn("assistant", answer)), images)
        if name == "image_classification":
            return class_row(record, {answer: number % 3}, experiment.data, experiment.model)
        if name == "image_text_classification":
            return question_row(record, {answer: number % 3}, tokenizer, experiment.data, experiment.model, Counter())
        make = conversation_row if name == "conversation" else caption_row
        return make(record, tokenizer, experiment.data, experiment.model, Counter())

    made = [row(number) for number in range(ROWS)]
    return {field: np.stack([row[field] for row in made]) for field in made[0]}


def one_step(experiment: Experiment, mesh: jax.sharding.Mesh) -> tuple[Any, dict[str, float]]:
    """Gradient and metrics of a step from drawn weights, on the host."""
    batch = rows(experiment)
    with jax.set_mesh(mesh):
        program = make_program(experiment, mesh)
        state = random_state(program, scale=0.2)
        evaluated = {name: float(value) for name, value in program.evaluate(state.weights, batch, {}).sums.items()}
        state, metrics = program.step(state, batch, {})
        gradient = jax.tree.map(np.asarray, optax.tree.get(state.optimizer_state, "trace"))
    return gradient, {name: value.item() for name, value in metrics.items()} | evaluated


@pytest.mark.parametrize(("case", "mesh"), DIVIDED)
def test_every_mesh_gives_the_loss_and_the_gradient_of_one_device(case, mesh, one_device):
    experiment = experiment_of(case, MESHES[mesh])
    wanted, wanted_metrics = one_step(dataclasses.replace(experiment, mesh=MeshConfig()), one_device)
    found, metrics = one_step(experiment, make_mesh(experiment.mesh, jax.devices()))
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(wanted))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        # Gradients of keys' biases are rounding alone.
        norm = max(np.linalg.norm(y.astype(np.float64)), 1e-2 * largest)
        assert np.linalg.norm(x.astype(np.float64) - y) <= 2e-5 * norm, jax.tree_util.keystr(path)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-5)


@pytest.mark.parametrize("case", ["merge-prefix", "co", "tangled", "clip"])
def test_what_needs_whole_rows_is_not_cut(case):
    with pytest.raises(UserError, match=r"mesh.sequence=2"):
        experiment_of(case, {"sequence": 2})


def test_micro_batches_give_the_same_step(one_device):
    experiment = experiment_of("cross", {})
    wanted, wanted_metrics = one_step(experiment, one_device)
    optimizer = dataclasses.replace(experiment.optimizer, accumulation=4)
    found, metrics = one_step(dataclasses.replace(experiment, optimizer=optimizer), one_device)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(1e-3, np.abs(y).max()))
    assert metrics["loss"] == pytest.approx(wanted_metrics["loss"], rel=1e-5)
