"""Adapters: at the start the base to the bit, merged equal to unmerged, on every mesh the same, the base untouched."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import kinds
from model.adapters.prefix import Prefix
from model.attention.attend import plain_attention
from model.config import ModelConfig
from model.generate.decode import decoding_weights
from model.generate.prefill import advance, prefill
from model.place import Place
from model.weights import bind
from tests.runs import drawn, random_state, train_here
from tpu.compile import hlo
from tpu.compile.hlo_counts import count
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.adapter import __main__ as tool
from train.adapter import weights as adapter_weights
from train.adapter.frozen import open_frozen
from train.budget.summary import summarize
from train.checkpoint import checkpoint, manifest
from train.config import AdapterConfig, DataConfig, Experiment, MeshConfig, OptimizerConfig
from train.data.batch import Batch
from train.finetune import on_base
from train.program import make_program
from train.resolve import resolve
from train.restore import open_checkpoint

ROOT = Path(__file__).resolve().parents[3]
ROWS, TOKENS, VOCAB = 8, 16, 20
MODEL = ModelConfig(
    vocab_size=VOCAB, layers=2, embed_dim=16, heads=4, kv_heads=2, activation="swiglu", layer_loop="scan"
)
EVERY = (r"attention|mlp",)
KINDS = {
    "lora": AdapterConfig("lora", EVERY, rank=3),
    "rslora": AdapterConfig("lora", EVERY, rank=3, rslora=True, dropout=0.3),
    "dora": AdapterConfig("dora", EVERY, rank=3),
    "bottleneck": AdapterConfig("bottleneck", bottleneck_dim=5),
    "prefix": AdapterConfig("prefix", prefix_tokens=3),
    "bias": AdapterConfig("bias"),
}


def experiment(adapter: AdapterConfig, mesh: dict[str, int] | None = None, **model: Any) -> Experiment:
    found = resolve(
        Experiment(
            model=dataclasses.replace(MODEL, **model),
            data=DataConfig(tokenizer="bytes", bpe_vocab_size=VOCAB, context=TOKENS, batch_size=ROWS),
            # Without momentum and clipping, its state is the last gradient.
            optimizer=OptimizerConfig(name="sgd", schedule="constant", warmup_steps=0, beta1=0.0, clip_norm=0.0),
            mesh=MeshConfig(**mesh or {}),
            adapter=adapter,
        )
    )
    found.model = found.model.placed("cpu", "float32")
    return found


def noise(tree: Any, seed: int = 0, scale: float = 0.3) -> Any:
    flat, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([(w + scale * rng.normal(size=w.shape)).astype(w.dtype) for w in flat])


@functools.cache
def first(kind: str, **model: Any) -> tuple[ModelConfig, Any, Any]:
    """A model's config, random base weights and the adapter's first ones."""
    adapter, config = KINDS[kind], experiment(KINDS[kind], **model).model
    base = noise(kinds.init(adapter_weights.base_model(adapter, config), jax.random.key(0)))
    return config, base, jax.jit(lambda base: adapter_weights.init(adapter, config, jax.random.key(1), base))(base)


def batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (ROWS, TOKENS + 1)).astype(np.int32)
    segments = (1 + (np.arange(TOKENS) >= 6) * np.ones((ROWS, 1))).astype(np.int32)
    positions = np.where(segments == 2, np.arange(TOKENS) - 6, np.arange(TOKENS)).astype(np.int32)
    weights = rng.random((ROWS, TOKENS)).astype(np.float32)
    return Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], loss_weights=weights, segments=segments, positions=positions
    )


def logits(config: ModelConfig, weights: Any) -> jax.Array:
    given = batch()
    model = bind(kinds.build(config)[0], weights)
    return model.head(model(given["tokens"], Place(given["segments"], given["positions"]))[0])


def combined_logits(kind: str, config: ModelConfig) -> Callable[[Any, Any], jax.Array]:
    return jax.jit(lambda base, trained: logits(config, adapter_weights.combined(KINDS[kind], base, trained)))


def close(found: Any, wanted: Any) -> None:
    assert np.abs(wanted).max() > 0.1
    assert (np.abs(found - wanted) / (1 + np.abs(wanted).max())).max() <= 1e-5


# What is computed


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_it_is_the_base(kind):
    """To the rounding of two programs whose operations the compiler joins otherwise."""
    config, base, trained = first(kind)
    alone = jax.jit(lambda base: logits(adapter_weights.base_model(KINDS[kind], config), base))(base)
    np.testing.assert_allclose(combined_logits(kind, config)(base, trained), alone, rtol=0, atol=1e-5)
    moved = np.abs(combined_logits(kind, config)(base, noise(trained)) - alone).max()
    assert moved > 0.05  # and not because it does nothing


@pytest.mark.parametrize(
    ("kind", "weight_dtype"),
    [*((kind, "float32") for kind in KINDS), ("dora", "bfloat16")]
    + [pytest.param(kind, "bfloat16", marks=pytest.mark.slow) for kind in KINDS if kind != "dora"],
)
def test_merged_equals_unmerged(kind, weight_dtype):
    config, base, trained = first(kind, weight_dtype=weight_dtype)
    trained = noise(trained, scale=0.1)
    merged = adapter_weights.merged(KINDS[kind], base, trained)
    assert {type(leaf) for leaf in jax.tree.leaves(merged)} <= {jax.Array, type(jnp.zeros(1)), np.ndarray}
    unmerged = combined_logits(kind, config)(base, trained)
    close(jax.jit(lambda w: logits(config, w))(merged), unmerged)


def test_dora_is_its_formula():
    """m V / |V|, V = W + s A B, for a matrix of every shape; the gradient takes |V| for a constant."""
    adapter = dataclasses.replace(KINDS["dora"], alpha=6.0)
    _, base, trained = first("dora")
    trained = noise(trained)
    block = base["stack"]["groups"]["layer_0"]["attention"]
    change = trained["stack"]["groups"]["layer_0"]["attention"]
    merged = adapter_weights.merged(adapter, base, trained)["stack"]["groups"]["layer_0"]["attention"]
    for name, inputs in (("query", 1), ("out", 2)):
        w, (a, b, m) = block[name]["kernel"], (change[name]["kernel"][k] for k in ("lora_a", "lora_b", "magnitude"))
        for layer in range(2):
            i = math.prod(w.shape[1 : 1 + inputs])
            v = w[layer].reshape(i, -1) + 2.0 * a[layer].reshape(i, -1) @ b[layer].reshape(3, -1)
            m_here = m[layer].reshape(-1) + np.linalg.norm(w[layer].reshape(i, -1), axis=0)
            wanted = m_here * v / np.linalg.norm(v, axis=0)
            np.testing.assert_allclose(merged[name]["kernel"][layer].reshape(i, -1), wanted, rtol=0, atol=1e-5)

    def plain(b: jax.Array, lengths: jax.Array | None) -> jax.Array:
        v = w[0].reshape(16, -1) + 2.0 * a[0].reshape(16, -1) @ b.reshape(3, -1)
        lengths = jnp.linalg.norm(v, axis=0) if lengths is None else lengths
        old = jnp.linalg.norm(w[0].reshape(16, -1), axis=0)
        return jnp.sin(x.reshape(5, 16) @ ((old + m[0].reshape(-1)) * v / lengths)).sum()

    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4, 4)), jnp.float32)

    def kernel(b: jax.Array) -> Any:
        factors = {"lora_a": a[0], "lora_b": b, "magnitude": m[0]}
        return adapter_weights.combined(adapter, {"k": w[0]}, {"k": factors})["k"]

    found = jax.grad(lambda b: jnp.sin(kernel(b).matmul(x, 2, "float32", "cpu", "float32")).sum())(b[0])
    v = w[0].reshape(16, -1) + 2.0 * a[0].reshape(16, -1) @ b[0].reshape(3, -1)
    fixed = jax.grad(plain)(b[0], jnp.linalg.norm(v, axis=0))
    np.testing.assert_allclose(found, fixed, rtol=0, atol=1e-4)
    assert np.abs(found - jax.grad(lambda b: plain(b, None))(b[0])).max() > 0.1


def test_the_scale_of_lora():
    assert adapter_weights.lora_scale(AdapterConfig(rank=16, alpha=8.0)) == 0.5
    assert adapter_weights.lora_scale(AdapterConfig(rank=16, alpha=8.0, rslora=True)) == 2.0


def test_a_prefix_whose_gates_are_one_is_part_of_the_softmax():
    """As the paper has it: its keys and values stand before the others, seen by all; with soft-cap and groups."""
    for softcap in (0.0, 2.0):
        config = experiment(KINDS["prefix"], attention_softcap=softcap).model
        prefix = Prefix(config, nnx_rngs())
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.normal(size=(2, n, 5, 4)), jnp.float32) for n in (4, 2, 2))
        mask = jnp.tril(jnp.ones((2, 5, 5), bool))
        keys, values = (jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32) for _ in range(2))
        prefix.keys.set_value(keys), prefix.values.set_value(values)
        out = plain_attention(q, k, v, mask, softcap)
        np.testing.assert_array_equal(prefix(out, q, k, mask), out)
        prefix.gate.set_value(-jnp.ones(4))  # never below zero
        np.testing.assert_array_equal(prefix(out, q, k, mask), out)
        prefix.gate.set_value(jnp.ones(4))
        longer = [
            jnp.concatenate([jnp.broadcast_to(p.swapaxes(0, 1), (2, 2, 3, 4)), a], 2)
            for p, a in ((keys, k), (values, v))
        ]
        seen = jnp.concatenate([jnp.ones((2, 5, 3), bool), mask], 2)
        wanted = plain_attention(q, *longer, seen, softcap)
        np.testing.assert_allclose(prefix(out, q, k, mask), wanted, rtol=0, atol=1e-6)


def nnx_rngs() -> Any:
    from flax import nnx

    return nnx.Rngs(0)


@pytest.mark.parametrize("kind", ["lora", "dora", "bottleneck", "prefix"])
def test_decoding_equals_the_full_forward(kind):
    """Unmerged, through the cache, token by token."""
    config, base, trained = first(kind, layer_loop="unroll")
    weights = adapter_weights.combined(KINDS[kind], base, noise(trained))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 8)))
    graphdef = kinds.build(config)[0]
    place = Place(jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(8), tokens.shape))
    model = bind(graphdef, weights)
    full = model.head(model(tokens, place)[0])
    bound = bind(graphdef, decoding_weights(config, weights))
    cache, found, _ = prefill(bound, config, tokens[:, :5], jnp.array([5, 5]), 8)
    np.testing.assert_allclose(found, full[:, 4], rtol=0, atol=1e-5)
    for t in (5, 6, 7):
        cache, found = advance(bound, cache, tokens[:, t], jnp.array([t, t]))
        np.testing.assert_allclose(found, full[:, t], rtol=0, atol=1e-5)


def test_adapters_and_shared_layers():
    """LoRA on layers that share weights and have deltas of their own: an adapter on what is adapted already."""
    model = {"layers": 4, "share_layers": "alternate", "share_size": 2, "share_rank": 2}
    wanted = None
    for loop in ("scan", "unroll"):
        config, base, trained = first("lora", layer_loop=loop, **model)
        found = combined_logits("lora", config)(base, noise(trained))
        assert {len(leaf) for leaf in jax.tree.leaves(trained)} == {2}
        merged = jax.jit(lambda w, c=config: logits(c, w))(adapter_weights.merged(KINDS["lora"], base, noise(trained)))
        close(merged, found)
        wanted = found if wanted is None else wanted
        close(found, wanted)


# The step


def one_step(given: Experiment, seed: int = 0) -> tuple[Any, dict[str, float], Any]:
    """Gradient and metrics of a step over random weights, and the base after it."""
    mesh = make_mesh(given.mesh, jax.devices()[: math.prod(given.mesh.filled(8).__dict__[a] for a in AXES)])
    with jax.set_mesh(mesh):
        program = make_program(given, mesh)
        frozen, state = drawn(program.abstract_frozen, seed), random_state(program, seed + 1)
        state, metrics = program.step(state, batch(), frozen)
        metrics["evaluated"] = program.evaluate(state.weights, batch(), frozen).sums["nll"]
        gradient = jax.tree.map(np.asarray, optax.tree.get(state.optimizer_state, "trace"))
        return gradient, {name: float(value) for name, value in metrics.items()}, jax.tree.map(np.asarray, frozen)


AXES = ("data", "fsdp", "tensor", "sequence", "expert", "stage")
MESHES = {
    "fsdp4-tensor2": {"fsdp": 4, "tensor": 2},
    "fsdp8-zero1": {"fsdp": 8, "zero": 1},
    "data2-sequence2-tensor2": {"data": 2, "sequence": 2, "tensor": 2},
}


@functools.cache
def alone(kind: str, **changed: float) -> tuple[Any, dict[str, float], Any]:
    return one_step(experiment(dataclasses.replace(KINDS[kind], **changed)))


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [(kind, "fsdp4-tensor2") for kind in ("rslora", "dora", "prefix", "bottleneck")]
    + [("rslora", "data2-sequence2-tensor2")]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("rslora", "fsdp8-zero1"), ("dora", "fsdp8-zero1"))],
)
def test_every_mesh_gives_the_gradient_of_one_device(kind, mesh):
    dropout = 0.0 if MESHES[mesh].get("sequence") else KINDS[kind].dropout
    adapter = dataclasses.replace(KINDS[kind], dropout=dropout)
    wanted, figures, _ = alone(kind, dropout=dropout)
    found, there, _ = one_step(experiment(adapter, MESHES[mesh]))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert np.abs(y).max() > 0, path
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-5 * np.abs(y).max(), err_msg=jax.tree_util.keystr(path))
    for name in ("loss", "evaluated", "grad_norm"):
        np.testing.assert_allclose(there[name], figures[name], rtol=2e-5)


def test_a_pipeline_gives_the_gradient_of_one_device():
    wanted, figures, _ = alone("dora", dropout=0.0)
    found, there, _ = one_step(experiment(KINDS["dora"], {"stage": 2, "fsdp": 2}))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-5 * np.abs(y).max())
    np.testing.assert_allclose(there["loss"], figures["loss"], rtol=1e-5)


def test_leaves_lie_in_parts_as_their_axes_say():
    given = experiment(KINDS["lora"], {"fsdp": 4, "tensor": 2})
    mesh = make_mesh(given.mesh, jax.devices())
    with jax.set_mesh(mesh):
        program = make_program(given, mesh)
    block = program.abstract_state.weights["stack"]["groups"]["layer_0"]
    parts = lambda leaf: math.prod(leaf.shape) // math.prod(leaf.sharding.shard_shape(leaf.shape))  # noqa: E731
    found = {f"{m}.{f}": parts(block["mlp"][m]["kernel"][f]) for m in ("up", "down") for f in ("lora_a", "lora_b")}
    assert found == {"up.lora_a": 4, "up.lora_b": 2, "down.lora_a": 2, "down.lora_b": 4}
    base = program.abstract_frozen["model"]["stack"]["groups"]["layer_0"]
    assert parts(base["mlp"]["up"]["kernel"]) == 8


def test_micro_batches_change_nothing_and_dropout_drops():
    given = experiment(KINDS["rslora"])
    parted = dataclasses.replace(given, optimizer=dataclasses.replace(given.optimizer, accumulation=4))
    (wanted, whole, _), (found, _, _) = alone("rslora", dropout=KINDS["rslora"].dropout), one_step(parted)
    _, plain, _ = alone("rslora", dropout=0.0)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-5 * np.abs(y).max())
    assert abs(whole["loss"] - plain["loss"]) > 1e-3
    assert whole["evaluated"] != pytest.approx(0)


@pytest.mark.parametrize("mesh", [{}, pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow)])
def test_no_gradient_is_computed_for_frozen_matrices(mesh):
    """Of the three products of a matrix, forward, for its input and for itself, the last is left out."""
    found = []
    for adapter in (AdapterConfig(), AdapterConfig("lora", EVERY, rank=1)):
        given = experiment(adapter, mesh, embed_dim=64)
        mesh_here = make_mesh(given.mesh, jax.devices()[: math.prod(mesh.values())])
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch())
        with jax.set_mesh(mesh_here):
            program = make_program(given, mesh_here)
            text = program.step.lower(program.abstract_state, shapes, program.abstract_frozen).compile().as_text()
        found.append(count(hlo.parse(text), dict(mesh_here.shape)).matmul_flops)
    assert 0.63 < found[1] / found[0] < 0.78


def test_the_summary_counts_what_is_trained():
    given = experiment(KINDS["lora"])
    given.optimizer.name = "adamw"
    figures = summarize(given)
    base = sum(math.prod(w.shape) for w in jax.tree.leaves(kinds.build(given.model)[1]))
    rank, d, mlp, h, g = 3, 16, 64, 16, 8
    trained = 2 * rank * ((d + h) * 2 + (d + g) * 2 + (d + mlp) * 3)
    assert figures["parameters"]["trained"] == trained
    assert figures["parameters"]["frozen"] == base
    assert figures["parameters"]["total"] == base + trained
    assert figures["bytes"]["frozen"] == 4 * base
    assert figures["bytes"]["weights"] == 4 * trained
    assert 8 * trained <= figures["bytes"]["optimizer"] < 8 * trained + 64


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("attn",)}, r"'attn' is found in no weight matrix; there are .*layer_0\.attention\.key, "),
        ({"targets": ("(",)}, r"adapter.targets: '\(' is no regular expression"),
        ({"targets": ()}, r"adapter.targets=\(\): name at least one"),
        ({"rank": 0}, "adapter.rank=0: must be at least 1"),
        ({"alpha": 0.0}, "adapter.alpha=0.0: must be positive"),
        ({"dropout": 1.0}, "adapter.dropout=1.0: must be at least 0 and below 1"),
        ({"kind": "ia3"}, "adapter.kind='ia3': valid: none, lora, dora, bottleneck, prefix, bias"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        summarize(experiment(dataclasses.replace(KINDS["lora"], **fields)))


def test_biases_where_there_are_none():
    model = {"norm": "rmsnorm", "attention_bias": False, "mlp_bias": False}
    with pytest.raises(UserError, match="the model has no biases to train"):
        summarize(experiment(KINDS["bias"], **model))


# Runs


def run(given: Experiment, path: Path, base: Any = None) -> None:
    assert train_here(given, path, base) == 0


@pytest.fixture(scope="module")
def trained_base(micro, one_processor, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "base"
    run(micro(run={"steps": 4}), path)
    return path


@pytest.fixture(scope="module")
def finetuned(micro, trained_base) -> Callable[..., Experiment]:
    """The experiment of an adapter over the base, with fields of its branches replaced."""

    def experiment_of(kind: str = "lora", **branches: dict[str, Any]) -> Experiment:
        given = micro(**branches)
        # As flags leave it: not resolved.
        given = dataclasses.replace(given, model=ModelConfig(**branches.get("model", {})), adapter=KINDS[kind])
        return on_base(given, open_frozen(trained_base))

    return experiment_of


def files(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name != "lock"
    }


def weights_of(path: Path) -> Any:
    step_dir = checkpoint.find(path)
    saved = manifest.read(step_dir)["leaves"]
    abstract = {
        p.removeprefix("weights."): jax.ShapeDtypeStruct(tuple(v["shape"]), v["dtype"])
        for p, v in saved.items()
        if p.startswith("weights.")
    }
    return checkpoint.load_weights(step_dir, abstract)


def test_a_run_leaves_its_base_alone_and_is_small(trained_base, finetuned, tmp_path, one_device):
    before = files(trained_base)
    base = open_frozen(trained_base)
    given = finetuned("lora", run={"steps": 6})
    run(given, tmp_path / "lora", base)
    assert files(trained_base) == before
    leaves = manifest.read(checkpoint.find(tmp_path / "lora"))["leaves"]
    large = [path for path, leaf in leaves.items() if math.prod(leaf["shape"]) >= 257 * 32]
    assert large == []
    assert {path.split(".")[-1] for path in leaves if path.startswith(("weights", "optimizer"))} <= {
        "lora_a",
        "lora_b",
        "count",
    }
    meta = checkpoint.read_meta(checkpoint.find(tmp_path / "lora"))
    assert meta["frozen"]["model"] == {"path": str(base.step_dir.resolve()), "digest": manifest.digest(base.step_dir)}
    opened, old = open_checkpoint(tmp_path / "lora"), open_checkpoint(trained_base)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), opened.weights, old.weights)
    assert {jax.tree_util.keystr(p[-1:]) for p, m in jax.tree.leaves_with_path(moved) if m} == {"['kernel']"}


def test_stopped_and_resumed_is_the_uninterrupted_run_to_the_bit(trained_base, finetuned, tmp_path):
    base = open_frozen(trained_base)
    run(finetuned("rslora", run={"steps": 5}), tmp_path / "whole", base)
    run(finetuned("rslora", run={"steps": 2}), tmp_path / "parts", base)
    run(finetuned("rslora", run={"steps": 5}), tmp_path / "parts", base)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for path, leaf in whole.items():
        np.testing.assert_array_equal(leaf, parts[path])


@pytest.mark.parametrize("kind", ["dora", "prefix"])
def test_merged_is_an_ordinary_checkpoint(kind, trained_base, finetuned, tmp_path):
    run(finetuned(kind, run={"steps": 3}), tmp_path / "run", open_frozen(trained_base))
    tool.merge(tmp_path / "run", tmp_path / "merged")
    meta = checkpoint.read_meta(checkpoint.find(tmp_path / "merged"))
    assert not meta["frozen"]
    assert meta["experiment"]["adapter"]["kind"] == "none"
    one, two = open_checkpoint(tmp_path / "run"), open_checkpoint(tmp_path / "merged")
    for x, y in zip(jax.tree.leaves(one.weights), jax.tree.leaves(two.weights), strict=True):
        np.testing.assert_array_equal(x, y)
    again = open_frozen(tmp_path / "merged")  # which may be the base of another
    assert again.experiment.adapter == AdapterConfig()
    with pytest.raises(UserError, match="is no adapter; there is nothing to merge"):
        tool.merge(tmp_path / "merged", tmp_path / "twice")
    with pytest.raises(UserError, match=r"merged: exists already"):
        tool.merge(tmp_path / "run", tmp_path / "merged")
    with pytest.raises(UserError, match=r"is an adapter itself; .* train.adapter merge"):
        open_frozen(tmp_path / "run")
    if kind == "prefix":
        with pytest.raises(UserError, match=r"adapter.kind='prefix': only 'lora' and 'dora'"):
            tool.export(tmp_path / "run", tmp_path / "peft")
        with pytest.raises(UserError, match=r"the base has such adapters already \(model.prefix_tokens=3\)"):
            on_base(Experiment(adapter=KINDS["prefix"]), again)


def test_exported_and_imported(trained_base, finetuned, tmp_path):
    run(finetuned("lora", run={"steps": 3}), tmp_path / "run", open_frozen(trained_base))
    tool.export(tmp_path / "run", tmp_path / "peft")
    tool.import_peft(tmp_path / "peft", trained_base, tmp_path / "imported")
    one, two = open_checkpoint(tmp_path / "run"), open_checkpoint(tmp_path / "imported")
    for x, y in zip(jax.tree.leaves(one.weights), jax.tree.leaves(two.weights), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def test_an_adapter_knows_its_base(trained_base, finetuned, micro, tmp_path):
    run(finetuned("lora", run={"steps": 2}), tmp_path / "run", open_frozen(trained_base))
    run(micro(run={"steps": 1, "seed": 1}), tmp_path / "other")
    with pytest.raises(UserError, match=r"run was trained with the checkpoint .* and .*other.* is another"):
        run(finetuned("lora", run={"steps": 3}), tmp_path / "run", open_frozen(tmp_path / "other"))
    with pytest.raises(UserError, match=r"holds another checkpoint \(.*give --base=DIR"):
        open_checkpoint(tmp_path / "run", base=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"holds no checkpoint; give --base=DIR"):
        open_checkpoint(tmp_path / "run", base=str(tmp_path / "nowhere"))
    assert open_checkpoint(tmp_path / "run", base=str(trained_base)).weights
    with pytest.raises(UserError, match="is no adapter, and has no base; leave it out"):
        open_checkpoint(trained_base, base=str(trained_base))


def test_the_base_decides_on_model_and_tokenizer(finetuned, trained_base):
    assert finetuned(model={"attention_dropout": 0.2}).model.attention_dropout == 0.2
    assert finetuned(model={"embed_dim": 32}).model.embed_dim == 32
    with pytest.raises(UserError, match=r"model.embed_dim=64: the base decides, and has 32"):
        finetuned(model={"embed_dim": 64})
    base = open_frozen(trained_base)
    with pytest.raises(UserError, match=r"data.tokenizer='other.json': the base decides, and has 'bytes'"):
        on_base(Experiment(data=DataConfig(tokenizer="other.json"), adapter=KINDS["lora"]), base)
    with pytest.raises(UserError, match=r"adapter.kind='none': nothing to train; valid: lora"):
        on_base(Experiment(), base)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_commands(trained_base, corpus_file, tmp_path):
    """As people type them: what goes wrong is one line and status 2; training, evaluation and generation go through."""
    lora = ("--config=configs/adapter.py:lora", f"--checkpoint={trained_base}")
    for arguments, message in (
        (("train.finetune", lora[0]), "error: --checkpoint is missing"),
        (("train.finetune", *lora), "error: --workdir is missing"),
        (("train.pretrain", lora[0], "--workdir=x"), "error: adapter.kind='lora': an adapter needs a base; use"),
        (
            ("train.finetune", *lora, "--dry_run", "--config.adapter.targets=('attn',)"),
            "error: adapter.targets: 'attn'",
        ),
        (("train.adapter", "melt"), "error: melt: valid: merge, export, import"),
    ):
        done = command(*arguments)
        assert (done.returncode, done.stderr.splitlines()[-1][: len(message)]) == (2, message)
    shape = (f"--config.data.sources=('{corpus_file}',)", "--config.data.context=64", "--config.data.batch_size=4")
    shape += ("--config.data.holdout=0.2", "--config.run.steps=12", "--config.run.eval_every=0")
    run_dir = f"--workdir={tmp_path / 'run'}"
    done = command("train.finetune", *lora, run_dir, *shape)
    assert done.returncode == 0, done.stderr
    assert "on 33," in done.stdout or "frozen ones" in done.stdout
    done = command("train.evaluate", f"--checkpoint={tmp_path / 'run'}", f"--json={tmp_path / 'figures.json'}")
    assert done.returncode == 0, done.stderr
    held_out = [
        row["eval"]["loss"] for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()) if "eval" in row
    ]
    found = json.loads((tmp_path / "figures.json").read_text())["eval"]["loss"]
    assert found == pytest.approx(held_out[-1], abs=0.02)
    done = command("serve.generate", f"--checkpoint={tmp_path / 'run'}", "--max_tokens=5")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rslora"])
def test_it_learns_another_corpus_and_the_base_keeps_its_own(kind, one_processor, tmp_path, micro, one_device):
    """A model of one language learns another, whose words have other letters, by a few weights."""
    texts = {"one": "the quick brown fox jumps over the lazy dog ", "two": "zyx wvu tsr qpo nml kji hgf edc ba "}
    for name, text in texts.items():
        rng = np.random.default_rng(0)
        words = text.split()
        rows = [" ".join(rng.choice(words, 40)) for _ in range(80)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    first = {"sources": (str(tmp_path / "one.jsonl"),)}
    model = {"attention_bias": True, "mlp_bias": True, "residual_dropout": 0.0}
    run(micro(model=model, data=first, run={"steps": 300}), tmp_path / "base")
    base = open_frozen(tmp_path / "base")
    other = micro(
        data={"sources": (str(tmp_path / "two.jsonl"),)}, run={"steps": 300}, optimizer={"learning_rate": 1e-2}
    )
    given = on_base(dataclasses.replace(other, model=ModelConfig(), adapter=KINDS[kind]), base)
    untouched = files(tmp_path / "base")
    run(given, tmp_path / "run", base)
    held_out = [
        row["eval"]["loss"] for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()) if "eval" in row
    ]
    run(dataclasses.replace(given, run=dataclasses.replace(given.run, steps=1)), tmp_path / "start", base)
    start = [
        row["eval"]["loss"] for row in map(json.loads, (tmp_path / "start" / "metrics.jsonl").open()) if "eval" in row
    ]
    print(kind, "base", start[-1], "adapted", held_out[-1])
    assert held_out[-1] < 0.8 * start[-1]
    assert files(tmp_path / "base") == untouched
