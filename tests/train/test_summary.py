"""The figures of an experiment against closed formulas written from the papers, for any model."""

from __future__ import annotations

import dataclasses

import jax
from hypothesis import given, settings
from hypothesis import strategies as st

from model import transformer
from model.config import ModelConfig
from train.config import DataConfig, Experiment, OptimizerConfig, RunConfig
from train.summary import flops_per_token, human_bytes, parameter_counts, print_summary, summarize


def count(config: ModelConfig) -> tuple[int, int]:
    """Weights in all and in the tables of tokens and positions, from the sizes alone."""
    d, f, k = config.embed_dim, config.mlp_dim, config.head_dim
    norm = d * (2 if config.norm == "layernorm" and config.norm_bias else 1)
    q, kv = config.heads * k, config.kv_heads * k
    attention = d * q + 2 * d * kv + q * d
    if config.attention_bias:
        attention += q + 2 * kv + d
    if config.qk_norm:
        attention += 2 * k
    inner = 2 if config.activation in ("swiglu", "geglu") else 1
    mlp = (inner + 1) * d * f + (inner * f + d if config.mlp_bias else 0)
    tables = config.vocab_size * d + (config.max_positions * d if config.positions == "learned" else 0)
    head = 0 if config.tied_head else config.vocab_size * d
    last_norm = norm if config.norm_order == "pre" else 0
    return config.layers * (attention + mlp + 2 * norm) + tables + head + last_norm, tables


def flops(config: ModelConfig, context: int) -> int:
    """6 per multiplying weight and 12 per head dimension and key seen: forward and, at twice that, backward."""
    d, f, k = config.embed_dim, config.mlp_dim, config.head_dim
    inner = 2 if config.activation in ("swiglu", "geglu") else 1
    per_layer = d * k * (2 * config.heads + 2 * config.kv_heads) + (inner + 1) * d * f
    total = 6 * (config.layers * per_layer + config.vocab_size * d)
    for layer in range(config.layers):
        local = config.pattern[layer % len(config.pattern)] == "local"
        total += 12 * config.heads * k * (min(config.window, context) if local else context)
    return total


@settings(max_examples=40)
@given(data=st.data())
def test_counts_and_operations_of_any_model(model_configs, data):
    config = data.draw(model_configs).placed("cpu", "float32")
    context = data.draw(st.integers(1, 12))
    _, weights, _ = transformer.build(config)
    total, embedding = count(config)
    counts = parameter_counts(weights)
    assert counts == {"total": total, "embedding": embedding, "non_embedding": total - embedding}
    assert flops_per_token(config, weights, context) == flops(config, context)


def test_operations_are_about_six_per_weight_and_token():
    config = ModelConfig(vocab_size=50, layers=4, embed_dim=128, heads=4).resolved().placed("cpu", "float32")
    counted = flops_per_token(config, transformer.build(config)[1], 1)
    assert 0.99 < counted / (6 * count(config)[0]) < 1.01


def test_the_summary_of_an_experiment(capsys):
    experiment = Experiment(
        model=ModelConfig(vocab_size=300, layers=2, embed_dim=8, heads=2, weight_dtype="bfloat16"),
        data=DataConfig(context=16, batch_size=3),
        optimizer=OptimizerConfig(ema_decay=0.9, warmup_steps=2),
        run=RunConfig(steps=10),
    ).resolved()
    figures = summarize(experiment)
    total, embedding = count(experiment.model)
    assert figures["parameters"]["total"] == total
    assert figures["parameters"]["embedding"] == embedding == 2400
    assert figures["tokens"] == 10 * 3 * 16
    assert figures["tokens_per_parameter"] == 480 / total
    assert figures["bytes"]["weights"] == 2 * total
    assert figures["bytes"]["ema"] == 4 * total
    assert figures["bytes"]["optimizer"] in (2 * 2 * total + 8, 2 * 4 * total + 8)  # two moments and two counters
    assert figures["experiment"]["model"] == dataclasses.asdict(experiment.model) | {"pattern": ["global"]}
    print_summary(experiment, figures)
    out = capsys.readouterr().out
    for field in ("model.embed_dim = 8", "optimizer.ema_decay = 0.9", "mesh.tensor = 1", "name = 'experiment'"):
        assert field in out.splitlines()
    for figure in (f"{total:,}", "2,400", f"{figures['flops_per_token']:,}", "480"):
        assert figure in out


def test_optimizer_bytes_follow_the_rule():
    def state(name: str) -> int:
        experiment = Experiment(model=ModelConfig(layers=2, embed_dim=192), optimizer=OptimizerConfig(name=name))
        return summarize(experiment.resolved())["bytes"]["optimizer"]

    sizes = {name: state(name) for name in ("adamw", "lion", "sgd", "muon", "adafactor")}
    assert sizes["adafactor"] < 0.6 * sizes["sgd"]
    assert abs(sizes["lion"] - sizes["sgd"]) <= 16
    assert sizes["sgd"] < sizes["muon"] < sizes["adamw"]
    assert abs(sizes["adamw"] - 2 * sizes["sgd"]) <= 16


def test_summarizing_allocates_nothing():
    before = len(jax.live_arrays())
    summarize(Experiment(model=ModelConfig(embed_dim=12288, heads=96, layers=96)).resolved())
    assert len(jax.live_arrays()) == before


def test_human_bytes():
    assert [human_bytes(n) for n in (5, 2048, 3 * 2**20, 1.5 * 2**30, 2**41)] == [
        "5 B",
        "2 KiB",
        "3 MiB",
        "1.5 GiB",
        "2 TiB",
    ]
