"""Adapters on what is no decoder: they train, the base stays, and merged they are the same function."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.attention.attend import plain_attention
from model.attention.block_sparse_attention import sparse_mask
from model.attention.layer_inputs import LayerInputs
from model.attention.self_attention import SelfAttention
from model.config import ModelConfig
from model.generate.decode import decoding_weights, make_decoder
from model.place import Place, visible
from model.positions import alibi
from serve.completion import Request
from serve.engine import complete
from tests.runs import train_here
from tpu.errors import UserError
from train.adapter import peft
from train.adapter import weights as adapter_weights
from train.adapter.frozen import open_frozen
from train.benchmark import drawn_batch
from train.checkpoint import checkpoint
from train.config import AdapterConfig, DataConfig, Experiment, ObjectiveConfig, OptimizerConfig
from train.finetune import on_base
from train.program import make_program
from train.resolve import resolve
from train.restore import open_checkpoint

EVERY = (r"attention|mlp|cross",)
ADAPTERS = {
    "lora": AdapterConfig("lora", EVERY, rank=2),
    "dora": AdapterConfig("dora", EVERY, rank=2),
    "bottleneck": AdapterConfig("bottleneck", bottleneck_dim=4),
    "prefix": AdapterConfig("prefix", prefix_tokens=3),
    "bias": AdapterConfig("bias"),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("masked", {"kind": "encoder", "norm_order": "post", "positions": "learned", "max_positions": 16}),
    "t5": ("sequence_to_sequence", {"kind": "encoder_decoder", "decoder_layers": 1, "positions": "relative"}),
}


def experiment(model: str, adapter: AdapterConfig) -> Experiment:
    objective, fields = MODELS[model]
    sizes = {"vocab_size": 40, "layers": 1, "embed_dim": 16, "heads": 2}
    found = resolve(
        Experiment(
            model=ModelConfig(**sizes, **fields),
            data=DataConfig(tokenizer="bytes", bpe_vocab_size=39, context=8, batch_size=4),
            objective=ObjectiveConfig(name=objective),
            optimizer=OptimizerConfig(
                # A prefix has gates to open first.
                learning_rate=0.3 if adapter.kind == "prefix" else 3e-2,
                schedule="constant",
                warmup_steps=0,
            ),
            adapter=adapter,
        )
    )
    found.model = found.model.placed("cpu", "float32")
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_trains_and_merges(kind, model, one_device):
    given = experiment(model, ADAPTERS[kind])
    rows = drawn_batch(given)
    with jax.set_mesh(one_device):
        program = make_program(given, one_device)
        rng = np.random.default_rng(0)
        base = jax.tree.map(
            lambda w: jnp.asarray(0.3 * rng.normal(size=w.shape), w.dtype), program.abstract_frozen["model"]
        )
        before = jax.tree.map(np.array, base)
        frozen = {"model": base}
        state, losses = program.init(jax.random.key(0), frozen), []
        for _ in range(6):
            state, metrics = program.step(state, rows, frozen)
            losses.append(float(metrics["loss"]))
        unmerged = program.evaluate(state.weights, rows, frozen).sums["nll"]
        plain = make_program(dataclasses.replace(given, adapter=AdapterConfig()), one_device)
        merged = adapter_weights.merged(given.adapter, base, state.weights)
        assert jax.tree.structure(merged) == jax.tree.structure(plain.abstract_state.weights)
        found = plain.evaluate(merged, rows, {}).sums["nll"]
    assert losses[-1] < losses[0] - 2e-3
    jax.tree.map(np.testing.assert_array_equal, base, before)
    np.testing.assert_allclose(found, unmerged, rtol=1e-5)


def test_every_stack_has_targets():
    trained = adapter_weights.parts(ADAPTERS["lora"], experiment("t5", ADAPTERS["lora"]).model).trained
    assert trained.keys() == {"encoder", "decoder"}
    assert trained["decoder"]["groups"]["layer_0"].keys() == {"attention", "cross", "mlp"}
    with pytest.raises(UserError, match=r"'atn' is found in no .*decoder\.groups\.layer_0\.cross\.key, .*encoder\."):
        adapter_weights.parts(AdapterConfig("lora", ("atn",)), experiment("t5", ADAPTERS["lora"]).model)


@pytest.mark.parametrize(
    ("fields", "with_bias"),
    [
        ({"kind": "encoder"}, False),
        ({"kind": "encoder_decoder", "positions": "relative", "decoder_layers": 1}, True),
        ({"positions": "alibi"}, False),
        ({"attention_sinks": True, "attention_softcap": 2.0}, False),
        ({"pattern": ("sparse",), "sparse_block": 2, "sparse_newest": 1, "sparse_first": 1, "sparse_random": 0}, False),
    ],
)
def test_a_prefix_joins_whatever_attention_there_is(fields, with_bias):
    """With gates of one it is part of the softmax: the keys keep their masks, biases and sinks, it has none."""
    config = ModelConfig(embed_dim=8, heads=2, layers=1, prefix_tokens=3, **fields).resolved().placed("cpu", "float32")
    layer = SelfAttention(config, config.pattern[0], nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, node in nnx.iter_graph(layer):
        if isinstance(node, nnx.Param):
            node.set_value(jnp.asarray(rng.normal(size=node.get_value().shape), jnp.float32))
    layer.prefix.gate.set_value(jnp.ones(2))
    x = jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32)
    segments = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]])
    place = Place(segments, jnp.broadcast_to(jnp.arange(6), (2, 6)))
    bias = jnp.asarray(rng.normal(size=(1, 2, 6, 6)), jnp.float32) if with_bias else None
    found, _ = layer(x, LayerInputs(place, bias=bias))

    q, k, v = (one(x).swapaxes(1, 2) for one in (layer.query, layer.key, layer.value))
    mask = visible(place, place, 0, config.kind != "encoder")
    if layer.rules.sparse is not None:
        mask &= sparse_mask(layer.rules.sparse, place.positions, place.positions)
    bias = alibi.bias(2, place.positions, place.positions) if layer.rules.alibi else bias
    keys, values = (
        jnp.concatenate([jnp.broadcast_to(part.get_value().swapaxes(0, 1), (2, 2, 3, 4)), a], 2)
        for part, a in ((layer.prefix.keys, k), (layer.prefix.values, v))
    )
    mask = jnp.concatenate([jnp.ones((2, 6, 3), bool), mask], 2)
    bias = None if bias is None else jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (3, 0)))
    sinks = None if layer.sinks is None else layer.sinks.get_value()
    wanted = plain_attention(q * layer.scale, keys, values, mask, config.attention_softcap, bias=bias, sinks=sinks)
    np.testing.assert_allclose(found, layer.out(wanted.swapaxes(1, 2)), rtol=0, atol=2e-5)


def test_what_has_no_form_elsewhere_is_refused(tmp_path):
    given = experiment("bert", ADAPTERS["lora"])
    with pytest.raises(UserError, match=r"model.kind='encoder': only adapters of decoders"):
        peft.export(tmp_path / "bert", given.adapter, given.model, {}, {}, "")
    assert not (tmp_path / "bert").exists()
    seeing = ModelConfig(layers=2, embed_dim=16, heads=2, experts=2, experts_per_token=1, mlp_bias=False).resolved()
    adapter = AdapterConfig("lora", ("attention|moe",), rank=2)
    parts = adapter_weights.parts(adapter, seeing.placed("cpu", "float32"))
    arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), parts.trained)
    with pytest.raises(UserError, match=r"layer_0\.moe\.down: has no place in PEFT's layout; nothing was written"):
        peft.export(tmp_path / "experts", adapter, seeing, arrays, {}, "")
    assert not (tmp_path / "experts").exists()
    with pytest.raises(UserError, match=r"adapter.dropout=0.1: not in stack\.groups\.layer_0\.moe\."):
        adapter_weights.parts(dataclasses.replace(adapter, dropout=0.1), seeing.placed("cpu", "float32"))


@pytest.mark.parametrize("model", MODELS)
def test_commands_take_it(model, micro, tmp_path, one_processor):
    """A base is trained and adapted by the one command; opened, it is merged into it, and generates where it can."""
    objective, fields = MODELS[model]
    objective = "span_corruption" if model == "t5" else objective
    shape = fields | {"vocab_size": 280, "max_positions": 64, "layers": 1}
    branches = {"data": {"bpe_vocab_size": 257}, "objective": {"name": objective}}
    plain = {"run": {"steps": 2}, "optimizer": {"accumulation": 1}}
    given = micro(model=shape, **branches, **plain)

    def run(given: Experiment, name: str, base: Any = None) -> None:
        assert train_here(given, tmp_path / name, base) == 0
        assert "eval" in (tmp_path / name / "metrics.jsonl").read_text()

    run(given, "base")
    base = open_frozen(tmp_path / "base")
    adapter = ADAPTERS["prefix" if model == "bert" else "lora"]
    adapted = on_base(dataclasses.replace(given, model=ModelConfig(), adapter=adapter), base)
    run(adapted, "run", base)
    found = open_checkpoint(tmp_path / "run")
    assert found.experiment.model.kind == fields["kind"]
    rows = drawn_batch(found.experiment)
    with jax.set_mesh(found.mesh):
        program = make_program(found.experiment, found.mesh)
        below = checkpoint.load_weights(base.step_dir, program.abstract_frozen["model"])
        weights = checkpoint.load_weights(found.step_dir, program.abstract_state.weights)
        wanted = float(program.evaluate(weights, rows, {"model": below}).sums["nll"])
        found_sum = float(found.evaluate(found.weights, rows, found.frozen()).sums["nll"])
        assert found_sum == pytest.approx(wanted, rel=1e-2)  # perhaps in bfloat16
    if model == "t5":
        config = found.experiment.model
        decoder = make_decoder(config, found.graphdef, 257, 256)
        weights = decoding_weights(config, found.weights)
        (completion,) = complete(decoder, weights, config, found.tokenizer, [Request("abc", max_tokens=3)])
        assert completion.finish_reason in ("end", "length")
