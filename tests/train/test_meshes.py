"""Every mesh computes what one device computes, and really divides the work.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import optax
import pytest

from model.config import ModelConfig
from tests.runs import random_state
from tpu.compile import hlo
from tpu.compile.hlo_counts import Counts, count
from tpu.mesh import make_mesh
from tpu.pipeline import bubble_fraction
from train.config import DataConfig, Experiment, MeshConfig, OptimizerConfig
from train.data.batch import Batch
from train.program import make_program
from train.resolve import resolve

ROWS, TOKENS, VOCAB = 16, 32, 20

BASE = Experiment(
    model=ModelConfig(
        vocab_size=VOCAB, layers=4, embed_dim=16, heads=4, kv_heads=2, activation="swiglu", layer_loop="scan"
    ),
    data=DataConfig(tokenizer="bytes", bpe_vocab_size=VOCAB, context=TOKENS, batch_size=ROWS),
    # Without momentum and clipping, its state is the last gradient.
    optimizer=OptimizerConfig(name="sgd", schedule="constant", warmup_steps=0, beta1=0.0, clip_norm=0.0),
)

DROPOUT = {"embedding_dropout": 0.2, "residual_dropout": 0.3, "attention_dropout": 0.1}

EXPERTS = {"layers": 2, "experts": 8, "mlp_bias": False, "mlp_dim": 32, "router_bias": True}
BALANCED = {"loss": {"balance_loss": 0.3, "router_z_loss": 0.1}}

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "data8": {"mesh": {"data": 8}},
    "fsdp8": {"mesh": {"fsdp": 8}},
    "tensor4": {"mesh": {"tensor": 4}},
    "sequence8": {"mesh": {"sequence": 8}},
    "expert8": {"mesh": {"expert": 8}},
    "stage4": {"mesh": {"stage": 4}},
    "fsdp4-tensor2": {"mesh": {"fsdp": 4, "tensor": 2}},
    "data2-fsdp2-sequence2": {"mesh": {"data": 2, "fsdp": 2, "sequence": 2}},
    "ulysses": {
        "mesh": {"fsdp": 4, "sequence": 2},
        "model": {"context_parallel": "ulysses", **DROPOUT},
    },
    "ulysses-chunked": {
        "mesh": {"data": 2, "tensor": 2, "sequence": 2},
        "model": {"context_parallel": "ulysses", "kv_heads": 4},
    },
    "stage2-fsdp4": {"mesh": {"stage": 2, "fsdp": 4}},
    "stage2-tensor2-data2": {"mesh": {"stage": 2, "tensor": 2, "data": 2}},
    "stage2-repeats2-sequence2-fsdp2": {
        "mesh": {"stage": 2, "sequence": 2, "fsdp": 2},
        "model": {"pipeline_repeats": 2, "pipeline_microbatches": 4, "remat": "full"},
    },
    "stage2-dropout": {
        "mesh": {"stage": 2, "fsdp": 2, "data": 2},
        "model": {"pipeline_microbatches": 4, "remat": "projections", **DROPOUT},
    },
    "stage4-repeats1-remat": {"mesh": {"stage": 4, "data": 2}, "model": {"remat": "attention"}},
    "fsdp2-expert2-tensor2-accumulation": {
        "mesh": {"fsdp": 2, "expert": 2, "tensor": 2},
        "optimizer": {"accumulation": 2},
        "model": DROPOUT,
    },
    "fsdp2-sequence2-tensor2-window": {
        "mesh": {"fsdp": 2, "sequence": 2, "tensor": 2},
        "model": {"pattern": ("local", "global"), "window": 5, "attention_softcap": 2.0},
    },
    "zero1": {"mesh": {"fsdp": 4, "tensor": 2, "zero": 1}},
    "zero2": {"mesh": {"fsdp": 4, "data": 2, "zero": 2}},
    "shared-alternate": {
        "mesh": {"fsdp": 4, "tensor": 2},
        "model": {"share_layers": "alternate", "share_size": 2, "share_rank": 2},
    },
    "shared-zero1": {"mesh": {"fsdp": 8, "zero": 1}, "model": {"share_layers": "all", "layer_loop": "unroll"}},
    "slices2": {"mesh": {"data": 2, "fsdp": 4, "slices": 2}},
    "slices2-stage": {"mesh": {"stage": 2, "fsdp": 4, "slices": 2, "slice_axis": "stage"}},
    "moe-expert4": {"mesh": {"expert": 4}, "model": EXPERTS, **BALANCED},
    "moe-expert2-fsdp4-accumulation": {
        "mesh": {"expert": 2, "fsdp": 4},
        "model": EXPERTS,
        "optimizer": {"accumulation": 2},
        **BALANCED,
    },
    "moe-expert4-tensor2-shared": {
        "mesh": {"expert": 4, "tensor": 2},
        "model": {**EXPERTS, "shared_experts": 1, "moe_every": 2, "router": "sigmoid", "remat": "projections"},
        **BALANCED,
    },
    "moe-data2-expert2-sequence2": {"mesh": {"data": 2, "expert": 2, "sequence": 2}, "model": EXPERTS, **BALANCED},
    "moe-capacity-fsdp2-expert2-tensor2": {
        "mesh": {"fsdp": 2, "expert": 2, "tensor": 2},
        "model": {**EXPERTS, "capacity_factor": 0.8, "activation": "gelu"},
        **BALANCED,
    },
    "moe-stage2-repeats2-expert2": {
        "mesh": {"stage": 2, "expert": 2},
        "model": {**EXPERTS, "layers": 4, "pipeline_repeats": 2, "pipeline_microbatches": 4, "remat": "full"},
        **BALANCED,
    },
    "untied-odd-vocab-few-kv-heads": {
        "mesh": {"fsdp": 2, "tensor": 4},
        "model": {"tied_head": False, "vocab_size": 21, "kv_heads": 1, "heads": 4},
        "data": {"bpe_vocab_size": 21},
    },
}


# Cases of fewer axes than others here have, or of the same axes in another order.
SLOW = {
    "data8",
    "fsdp8",
    "tensor4",
    "sequence8",
    "expert8",
    "stage4",
    "ulysses-chunked",
    "stage2-fsdp4",
    "shared-zero1",
}
SLOW |= {"stage2-tensor2-data2", "stage4-repeats1-remat", "slices2-stage", "moe-expert4", "moe-data2-expert2-sequence2"}
SLOW |= {"moe-expert2-fsdp4-accumulation"}


def cases(names: Iterable[str], slow: set[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in names]


def changed(branches: dict[str, dict[str, Any]]) -> Experiment:
    parts = {name: dataclasses.replace(getattr(BASE, name), **fields) for name, fields in branches.items()}
    experiment = resolve(dataclasses.replace(BASE, **parts))
    experiment.model = experiment.model.placed("cpu", "float32")
    return experiment


def packed_batch(vocab_size: int = VOCAB) -> Batch:
    """Up to four segments per row, loss weights between 0 and 3 that differ much from row to row."""
    rng = np.random.default_rng(0)
    segments = 1 + np.cumsum(rng.random((ROWS, TOKENS)) < 0.1, 1)
    steps = np.arange(TOKENS)[None]
    first = np.maximum.accumulate(np.where(np.diff(segments, prepend=0) > 0, steps, 0), 1)
    tokens = rng.integers(0, vocab_size, (ROWS, TOKENS + 1))
    ragged = rng.random((ROWS, TOKENS)) * (steps < rng.integers(1, TOKENS + 1, (ROWS, 1)))
    return Batch(
        tokens=tokens[:, :-1].astype(np.int32),
        targets=tokens[:, 1:].astype(np.int32),
        loss_weights=(ragged * rng.integers(1, 4, (ROWS, 1))).astype(np.float32),
        segments=segments.astype(np.int32),
        positions=(steps - first).astype(np.int32),
    )


def one_step(experiment: Experiment, mesh: jax.sharding.Mesh) -> tuple[Any, dict[str, float]]:
    """Gradient and metrics of a step from the start, on the host."""
    with jax.set_mesh(mesh):
        program = make_program(experiment, mesh)
        state, metrics = program.step(random_state(program), packed_batch(experiment.model.vocab_size), {})
        gradient = jax.tree.map(np.asarray, optax.tree.get(state.optimizer_state, "trace"))
        metrics["evaluated"] = program.evaluate(state.weights, packed_batch(experiment.model.vocab_size), {}).sums[
            "nll"
        ]
    return gradient, {name: value.item() for name, value in metrics.items()}


@functools.cache
def alone(case: str) -> tuple[Any, dict[str, float]]:
    """The step of one device, of which many cases have the same."""
    given = dataclasses.replace(changed(CASES[case]), mesh=MeshConfig())
    same = next(name for name in CASES if dataclasses.replace(changed(CASES[name]), mesh=MeshConfig()) == given)
    return one_step(given, make_mesh(given.mesh, jax.devices()[:1])) if same == case else alone(same)


@pytest.mark.parametrize("case", cases(CASES, SLOW))
def test_every_mesh_gives_the_loss_and_the_gradient_of_one_device(case):
    experiment = changed(CASES[case])
    wanted, wanted_metrics = alone(case)
    devices = jax.devices()[: math.prod(sizes(experiment).values())]
    found, metrics = one_step(experiment, make_mesh(experiment.mesh, devices))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        norm = np.linalg.norm(y.astype(np.float64))
        assert np.linalg.norm(x.astype(np.float64) - y) <= 1e-5 * norm, jax.tree_util.keystr(path)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-5)


def test_bfloat16_on_simulated_devices(one_device):
    """It compiles and is right, where XLA:CPU aborts on other sums in bfloat16 (those along stages, refused)."""
    experiment = changed(CASES["fsdp4-tensor2"])
    experiment.model = dataclasses.replace(experiment.model, compute_dtype="bfloat16")
    _, wanted = one_step(dataclasses.replace(experiment, mesh=MeshConfig()), one_device)
    _, metrics = one_step(experiment, make_mesh(experiment.mesh, jax.devices()))
    for name in ("loss", "grad_norm", "evaluated"):
        assert metrics[name] == pytest.approx(wanted[name], rel=0.01)


# That the work is really divided


def compiled(experiment: Experiment) -> Counts:
    """What the compiled step does on one device."""
    mesh = make_mesh(experiment.mesh, jax.devices()[: math.prod(sizes(experiment).values())])
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), packed_batch(experiment.model.vocab_size))
    with jax.set_mesh(mesh):
        program = make_program(experiment, mesh)
        text = program.step.lower(program.abstract_state, batch, {}).compile().as_text()
    return count(hlo.parse(text), dict(mesh.shape))


def sizes(experiment: Experiment) -> dict[str, int]:
    return experiment.mesh.sizes()


SHARDED = {"fsdp8", "tensor4", "expert8", "stage4", "fsdp4-tensor2", "stage2-tensor2-data2", "zero1", "zero2"}
SHARDED |= {"moe-expert4", "moe-capacity-fsdp2-expert2-tensor2"}


@pytest.mark.parametrize("case", sorted(SHARDED))
def test_no_part_of_the_state_is_quietly_copied(case):
    """Every weight matrix, and both its moments, take their share of a device's memory and no more."""
    model = CASES[case].get("model", {}) | {"kv_heads": 4}  # fewer than the devices along tensor would be copied
    experiment = changed(CASES[case] | {"optimizer": {"name": "adamw", "ema_decay": 0.9}, "model": model})
    mesh = make_mesh(experiment.mesh, jax.devices()[: math.prod(sizes(experiment).values())])
    with jax.set_mesh(mesh):
        state = make_program(experiment, mesh).abstract_state
    found = {
        name: shares(tree) for name, tree in state._asdict().items() if name in ("weights", "optimizer_state", "ema")
    }
    data, fsdp, expert = experiment.mesh.data, experiment.mesh.fsdp, experiment.mesh.expert
    in_parts = mesh.size // data
    for name, shared in found.items():
        whole = fsdp * expert if name == "weights" and experiment.mesh.zero < 3 else 1
        for path, share in shared.items():
            if "kernel" in path:
                assert share == in_parts // whole, (name, path)
            if path.endswith("['embedding']['embedding']"):
                assert share == in_parts // whole, (name, path)
    assert found["weights"].keys() == found["ema"].keys()


def shares(tree: Any) -> dict[str, int]:
    """Into how many different parts each leaf is cut."""
    return {
        jax.tree_util.keystr(path): math.prod(leaf.shape) // math.prod(leaf.sharding.shard_shape(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


TALK = {  # case: (kind, axis) pairs that must be there, and the axes along which there may be any
    "data8": ({("all-reduce", "data")}, {"data"}),
    "fsdp8": ({("all-gather", "fsdp"), ("all-to-all", "fsdp")}, {"fsdp"}),
    "tensor4": ({("all-gather", "tensor")}, {"tensor"}),
    "sequence8": ({("collective-permute", "sequence"), ("all-gather", "sequence")}, {"sequence"}),
    "stage4": ({("collective-permute", "stage")}, {"stage"}),
    "moe-expert4": ({("all-to-all", "expert"), ("reduce-scatter", "expert")}, {"expert"}),
    "moe-capacity-fsdp2-expert2-tensor2": ({("all-to-all", "expert")}, {"fsdp", "expert", "tensor"}),
    "ulysses-chunked": ({("all-to-all", "sequence")}, {"data", "tensor", "sequence"}),
}


@pytest.mark.parametrize("case", cases(TALK, {"data8", "moe-capacity-fsdp2-expert2-tensor2", "ulysses-chunked"}))
def test_devices_talk_along_the_axes_that_they_should(case):
    needed, allowed = TALK[case]
    model = CASES[case].get("model", {}) | {"kv_heads": 4 if case == "tensor4" else 0}
    counts = compiled(changed(CASES[case] | {"model": model}))
    found = {(c.kind, c.axis) for c in counts.collectives if c.group > 1}
    assert needed <= found
    assert {axis for _, joined in found for axis in joined.split("+")} <= allowed


@functools.cache
def products(layers: int, **piped: int) -> float:
    """The operations of matrix products in a step, on one device or in a pipeline of two."""
    fields = {"mesh": {"stage": 2}, "model": {**piped, "remat": "none", "layers": layers}}
    return compiled(changed(fields if piped else {"model": {"layers": layers}})).matmul_flops


@pytest.mark.parametrize(
    ("repeats", "microbatches"), [(1, 2), (2, 4), *(pytest.param(*c, marks=pytest.mark.slow) for c in [(2, 2), (1, 8)])]
)
def test_a_pipeline_ticks_as_often_as_its_formula_says(repeats, microbatches):
    """The products of all ticks, bubble included, over those that are needed: 1 / (1 - bubble)."""
    model = {"pipeline_repeats": repeats, "pipeline_microbatches": microbatches}
    # The difference of two depths is that of the layers alone; two stages share it.
    needed = (products(8) - products(4)) / 2
    bubble = 1 - needed / (products(8, **model) - products(4, **model))
    assert bubble == pytest.approx(bubble_fraction(2, repeats, microbatches), abs=1e-3)


POLICIES = ("full", "attention", "projections", "all_but_mlp", "dots", "dots_no_batch")


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("remat", cases(POLICIES, {"attention", "all_but_mlp", "dots_no_batch"}))
def test_every_remat_policy_gives_the_same_gradient_and_none_forgets_the_pipeline(remat, stages):
    experiment = changed({"model": {"remat": remat}, "mesh": {"stage": stages}})
    found, _ = one_step(experiment, make_mesh(experiment.mesh, jax.devices()[:stages]))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(alone("data8")[0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())
