"""The figures of an experiment against closed formulas written from the papers, for any model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import kinds
from model.config import ModelConfig, VisionConfig
from model.fields.shape import GATED
from tpu.mesh import make_mesh
from train.budget.flops import flops_per_token
from train.budget.summary import human_bytes, parameter_counts, print_summary, summarize
from train.config import DataConfig, Experiment, MeshConfig, OptimizerConfig, RunConfig
from train.program import make_program
from train.resolve import resolve
from train.tree import from_dict


def count(config: ModelConfig) -> tuple[int, int]:
    """Weights in all and in the tables of tokens and positions, from the sizes alone."""
    d, f, k = config.embed_dim, config.mlp_dim, config.head_dim
    norm = d * (2 if config.norm == "layernorm" and config.norm_bias else 1)
    q, kv = config.heads * k, config.kv_heads * k
    attention = d * q + 2 * d * kv + q * d
    if config.attention_bias:
        attention += q + 2 * kv + (d if config.attention_out_bias else 0)
    if config.qk_norm:
        attention += q + kv if config.qk_norm_over == "projection" else 2 * k
    inner = 2 if config.activation in GATED else 1
    mlp = (inner + 1) * d * f + (inner * f + d if config.mlp_bias else 0)
    tables = config.vocab_size * d + (config.max_positions * d if config.positions == "learned" else 0)
    head = 0 if config.tied_head else config.vocab_size * d
    last_norm = norm if config.norm_order != "post" else 0
    norms = (4 if config.norm_order == "sandwich" else 2) * norm
    return config.layers * (attention + mlp + norms) + tables + head + last_norm, tables


def flops(config: ModelConfig, context: int) -> int:
    """6 per multiplying weight and 12 per head dimension and key seen: forward and, at twice that, backward."""
    d, f, k = config.embed_dim, config.mlp_dim, config.head_dim
    inner = 2 if config.activation in GATED else 1
    per_layer = d * k * (2 * config.heads + 2 * config.kv_heads) + (inner + 1) * d * f
    total = 6 * (config.layers * per_layer + config.vocab_size * d)
    for layer in range(config.layers):
        local = config.pattern[layer % len(config.pattern)] == "local"
        total += 12 * config.heads * k * (min(config.window, context) if local else context)
    return total


@settings(max_examples=15)
@given(data=st.data())
def test_counts_and_operations_of_any_model(model_configs, data):
    config = data.draw(model_configs).placed("cpu", "float32")
    context = data.draw(st.integers(1, 12))
    _, weights, _ = kinds.build(config)
    total, embedding = count(config)
    counts = parameter_counts(weights)
    assert counts == {"total": total, "embedding": embedding, "non_embedding": total - embedding}
    found = Experiment(model=config, data=DataConfig(context=context, batch_size=1))
    assert flops_per_token(found) == flops(config, context)


def test_operations_are_about_six_per_weight_and_token():
    config = ModelConfig(vocab_size=50, layers=4, embed_dim=128, heads=4).resolved().placed("cpu", "float32")
    counted = flops_per_token(Experiment(model=config, data=DataConfig(context=1, batch_size=1)))
    assert 0.99 < counted / (6 * count(config)[0]) < 1.01


def test_fixed_statistics_are_no_parameters():
    vision = VisionConfig(encoder="resnet", pool="mean", connector="none", conv_norm="batch", widths=(8,), depths=(1,))
    config = ModelConfig(kind="vision", labels=3, vision=vision).resolved().placed("cpu", "float32")
    _, weights, _ = kinds.build(config)
    in_all = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights))
    norms = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights) if path[-1].key == "variance"]
    assert norms
    assert parameter_counts(weights)["total"] == in_all - 2 * sum(math.prod(leaf.shape) for leaf in norms)


def test_the_summary_of_an_experiment(capsys):
    experiment = resolve(
        Experiment(
            model=ModelConfig(vocab_size=300, layers=2, embed_dim=8, heads=2, weight_dtype="bfloat16"),
            data=DataConfig(context=16, batch_size=3),
            optimizer=OptimizerConfig(ema_decay=0.9, warmup_steps=2),
            run=RunConfig(steps=10),
        )
    )
    figures = summarize(experiment)
    total, embedding = count(experiment.model)
    assert figures["parameters"]["total"] == total
    assert figures["parameters"]["embedding"] == embedding == 2400
    assert figures["tokens"] == 10 * 3 * 16
    assert figures["tokens_per_parameter"] == 480 / total
    assert figures["bytes"]["weights"] == 2 * total
    assert figures["bytes"]["ema"] == 4 * total
    assert figures["bytes"]["optimizer"] in (2 * 2 * total + 8, 2 * 4 * total + 8)  # two moments and two counters
    assert from_dict(Experiment, figures["experiment"]) == experiment
    print_summary(experiment, figures)
    out = capsys.readouterr().out
    for field in ("model.embed_dim = 8", "optimizer.ema_decay = 0.9", "mesh.tensor = 1", "name = 'experiment'"):
        assert field in out.splitlines()
    for figure in (f"{total:,}", "2,400", f"{figures['flops_per_token']:,}", "480"):
        assert figure in out


def test_optimizer_bytes_follow_the_rule():
    def state(name: str) -> int:
        experiment = Experiment(model=ModelConfig(layers=2, embed_dim=192), optimizer=OptimizerConfig(name=name))
        return summarize(resolve(experiment))["bytes"]["optimizer"]

    sizes = {name: state(name) for name in ("adamw", "lion", "sgd", "muon", "adafactor")}
    assert sizes["adafactor"] < 0.6 * sizes["sgd"]
    assert abs(sizes["lion"] - sizes["sgd"]) <= 16
    assert sizes["sgd"] < sizes["muon"] < sizes["adamw"]
    assert abs(sizes["adamw"] - 2 * sizes["sgd"]) <= 16


def test_the_bubble_of_a_pipeline(capsys):
    def bubble(stages: int, repeats: int = 1, microbatches: int = 0) -> float | None:
        model = ModelConfig(layers=24, pipeline_repeats=repeats, pipeline_microbatches=microbatches)
        data = DataConfig(batch_size=48)
        return figures_of(Experiment(model=model, data=data, mesh=MeshConfig(stage=stages)))["pipeline_bubble"]

    def figures_of(experiment: Experiment) -> dict[str, Any]:
        figures = summarize(resolve(experiment))
        print_summary(experiment, figures)
        return figures

    for stages, repeats, microbatches in ((2, 1, 2), (4, 3, 8), (3, 2, 12)):
        capsys.readouterr()
        wanted = (stages - 1) / (microbatches * repeats + stages - 1)
        assert bubble(stages, repeats, microbatches) == wanted
        assert f"pipeline bubble     {wanted:.2%}" in capsys.readouterr().out
    assert bubble(4) == 3 / 7  # as many micro-batches as stages
    capsys.readouterr()
    assert (bubble(1), bubble(-1)) == (None, None)
    assert "bubble" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "weight_dtype"), [("adamw", "float32"), ("muon", "float32"), ("sgd", "bfloat16")])
def test_the_memory_is_that_of_the_state(name, weight_dtype):
    """Replicas of local SGD and its momentum, an average of the weights, or frozen weights, against the state of the
    program; what is frozen has no state of the optimizer."""
    frozen = {"frozen": (r"^embedding\b", r"\bmlp\b"), "ema_decay": 0.9}
    for replicas, optimizer in ((4, {"local_steps": 5}), (1, {"ema_decay": 0.9}), (1, frozen)):
        experiment = resolve(
            Experiment(
                model=ModelConfig(layers=2, embed_dim=16, heads=2, weight_dtype=weight_dtype),
                data=DataConfig(batch_size=4),
                optimizer=OptimizerConfig(name=name, **optimizer),
                mesh=MeshConfig(data=replicas),
            )
        )
        placed = dataclasses.replace(experiment, model=experiment.model.placed("cpu", "float32"))
        state = make_program(placed, make_mesh(placed.mesh, jax.devices()[:replicas])).abstract_state
        parts = {"weights": state.weights, "optimizer": state.optimizer_state, "ema": state.ema}
        found = summarize(experiment)
        found["bytes"]["weights"] += found["bytes"].pop("frozen", 0)
        for part, tree in parts.items():
            wanted = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
            assert found["bytes"][part] == wanted, part
    stays = parameter_counts({name: state.weights[name] for name in ("embedding",)})["total"] + 2 * 2 * 16 * 64
    assert found["parameters"]["frozen"] == stays + 2 * (64 + 16)  # and the biases of the mlp
    assert found["parameters"]["trained"] == found["parameters"]["total"] - found["parameters"]["frozen"]
    assert not any(
        "'mlp'" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.optimizer_state)
    )


def test_an_open_number_of_replicas_is_said(capsys):
    experiment = resolve(Experiment(optimizer=OptimizerConfig(local_steps=4), mesh=MeshConfig(data=-1)))
    two = dataclasses.replace(experiment, mesh=MeshConfig(data=2))
    figures = summarize(experiment)
    assert figures["bytes"] == summarize(two)["bytes"]
    print_summary(experiment, figures)
    assert "(of 2 replicas; mesh.data=-1 decides their number)" in capsys.readouterr().out
    print_summary(two, summarize(two))
    assert "replicas" not in capsys.readouterr().out


def test_summarizing_allocates_nothing():
    before = len(jax.live_arrays())
    summarize(resolve(Experiment(model=ModelConfig(embed_dim=12288, heads=96, layers=96))))
    assert len(jax.live_arrays()) == before


def test_human_bytes():
    assert [human_bytes(n) for n in (5, 2048, 3 * 2**20, 1.5 * 2**30, 2**41)] == [
        "5 B",
        "2 KiB",
        "3 MiB",
        "1.5 GiB",
        "2 TiB",
    ]
