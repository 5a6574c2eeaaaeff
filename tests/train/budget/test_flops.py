"""Operations counted before anything runs against the products in compiled programs, and against closed forms."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

from model.config import ModelConfig, VisionConfig
from tpu.compile import hlo
from tpu.compile.hlo_counts import count
from train.budget.flops import decoding_flops_per_token, flops_per_token, operations
from train.budget.products import weight_products
from train.config import AdapterConfig, DataConfig, Experiment, ObjectiveConfig, OptimizerConfig
from train.layout import abstract_batch
from train.program import make_program
from train.resolve import resolve

ROWS = 2
VIT = {"encoder": "vit", "image_size": 32, "patch_size": 4, "layers": 3, "embed_dim": 48, "heads": 4}
MEAN = {"pool": "mean", "connector": "none"}
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
    "late": (
        "image_text_classification",
        {"fusion": "late", "kind": "encoder", "head": "pooled", "labels": 5},
        MEAN,
    ),
    "late-matching": (
        "image_text_matching",
        {"fusion": "late", "kind": "encoder", "head": "pooled", "labels": 2},
        {"pool": "map", "connector": "none", "combine": "average"},
    ),
    "bert": ("masked", {"kind": "encoder", "positions": "learned", "token_types": 2}, {}),
    "t5": ("span_corruption", {"kind": "encoder_decoder", "decoder_layers": 4, "positions": "relative"}, {}),
    "shared": ("next_token", {"share_layers": "alternate", "share_size": 2, "share_rank": 2}, {}),
    "cnn": ("image_classification", {"kind": "vision", "labels": 3}, {"encoder": "cnn", "widths": (8, 16), **MEAN}),
    "resnet": (
        "image_classification",
        {"kind": "vision", "labels": 3},
        {"encoder": "resnet", "widths": (8, 16), "depths": (1, 2), **MEAN},
    ),
    "classes": ("image_classification", {"kind": "vision", "labels": 3}, MEAN),
}


def experiment_of(case: str) -> Experiment:
    objective, fields, vision = CASES[case]
    if "fusion" in fields or fields.get("kind") == "vision":
        vision = ({"encoder": vision["encoder"], "image_size": 32} if "encoder" in vision else VIT) | vision
    text = {"vocab_size": 257, "layers": 4, "embed_dim": 32, "heads": 4, "attention": "plain"}
    context = 1 if fields.get("kind") == "vision" else 160
    experiment = resolve(
        Experiment(
            model=ModelConfig(**text | fields, vision=VisionConfig(**vision)),
            data=DataConfig(tokenizer="bytes", bpe_vocab_size=257, context=context, batch_size=ROWS, images=2),
            objective=ObjectiveConfig(name=objective),
        )
    )
    experiment.model = experiment.model.placed("cpu", "float32")
    return experiment


def compiled(experiment: Experiment, mesh: jax.sharding.Mesh, trains: bool) -> int:
    """The operations of the products in the compiled step or evaluation of a batch."""
    with jax.set_mesh(mesh):
        program = make_program(experiment, mesh)
        state, batch = program.abstract_state, abstract_batch(experiment)
        if trains:
            lowered = program.step.lower(state, batch, program.abstract_frozen)
        else:
            lowered = jax.jit(program.evaluate).lower(state.weights, batch, program.abstract_frozen)
        return count(hlo.parse(lowered.compile().as_text()), dict(mesh.shape)).matmul_flops


@pytest.mark.parametrize("case", CASES)
def test_a_forward_pass_is_counted(case, one_device):
    experiment = experiment_of(case)
    # Not counted: a class token's patch that is none, what resizes and shares out actions, similarities of vectors.
    found = operations(experiment).forward * ROWS
    assert found == pytest.approx(compiled(experiment, one_device, trains=False), rel=0.02)


TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "everything": ("merge", {}),
    "the text alone": ("merge", {"optimizer": OptimizerConfig(frozen=(r"^vision\b",))}),
    "the connector alone": ("cross", {"optimizer": OptimizerConfig(frozen=(r"^vision\.encoder\b", "^stack", "^emb"))}),
    "factors": ("merge", {"adapter": AdapterConfig("lora", ("attention|mlp",), rank=2)}),
    "an encoder and factors": ("bert", {"adapter": AdapterConfig("lora", ("attention|mlp",), rank=2)}),
    "both halves": ("t5", {}),
    "convolutions": ("resnet", {}),
    "layers that share": ("shared", {}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_a_step_is_counted_with_the_gradients_that_it_needs(case, one_device):
    name, branches = TRAINED[case]
    experiment = dataclasses.replace(experiment_of(name), **branches)
    found = sum(operations(experiment)) * ROWS
    assert found == pytest.approx(compiled(experiment, one_device, trains=True), rel=0.02)
    assert flops_per_token(experiment) == round(found / ROWS / experiment.data.context)


def test_experts_count_for_the_tokens_that_meet_them():
    """Whatever their capacity; the router counts too."""
    fields = {
        "experts": 8,
        "experts_per_token": 2,
        "expert_dim": 24,
        "shared_experts": 1,
        "tied_head": False,
        "mlp_bias": False,
    }
    for capacity in (0.0, 1.0):
        found = flops_per_token(text_of(**fields, capacity_factor=capacity))
        embed, heads, layers = 32, 32, 4
        matrices = 4 * embed * heads + (2 + 1) * 2 * embed * 24 + embed * 8
        assert found == 6 * (layers * matrices + embed * 257) + 12 * layers * heads * 160


def test_drawing_a_token_is_a_third_of_training_on_it():
    for fields in ({}, {"kv_heads": 2, "tied_head": False, "pattern": ("local", "global"), "window": 16}):
        experiment = text_of(**fields)
        assert decoding_flops_per_token(experiment, 160) == flops_per_token(experiment) // 3
    halves = experiment_of("t5")
    matrices = 4 * (2 * 4 * 32 * 32 + 2 * 32 * 128) - 4 * 2 * 32 * 32  # keys and values of what was read are there
    assert decoding_flops_per_token(halves, 160) == 2 * (matrices + 32 * 257) + 4 * 4 * 32 * 160


def text_of(**fields: Any) -> Experiment:
    model = {"vocab_size": 257, "layers": 4, "embed_dim": 32, "heads": 4, **fields}
    return resolve(
        Experiment(model=ModelConfig(**model), data=DataConfig(tokenizer="bytes", bpe_vocab_size=257, context=160))
    )


def test_a_loop_of_unknown_length_is_not_guessed():
    def forward(weights: Any, x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ weights["kernel"], x)

    square = jax.ShapeDtypeStruct((2, 2), "float32")
    with pytest.raises(NotImplementedError, match="unknown length"):
        weight_products(forward, {"kernel": square}, {"kernel": True}, square)


def test_what_a_value_comes_from_is_followed():
    """A matrix converted, scaled and turned is one; of two activations there is no product; branches do not add up."""

    def forward(weights: Any, x: jax.Array) -> jax.Array:
        w = (weights["kernel"]["values"].astype("float32") * weights["kernel"]["scale"]).T
        y = jax.lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: (x @ w) @ w.T @ w, x)
        return (y @ y.T) @ jax.lax.stop_gradient(x @ w)

    weights = {
        "kernel": {"values": jax.ShapeDtypeStruct((5, 3), "int8"), "scale": jax.ShapeDtypeStruct((5, 1), "float32")}
    }
    for trained, backward in ((True, 3 * 60 + 2 * 60 + 60), (False, 0)):
        marks = {"kernel": {"values": False, "scale": trained}}
        found = weight_products(forward, weights, marks, jax.ShapeDtypeStruct((2, 3), "float32"))
        assert found.forward == 4 * 60
        assert found.backward == backward
        assert found.attends == {True: False, False: trained}
