"""A weight that is no array in the place of every matrix of every kind of model: int8 with a scale for every output.

Everything that a tool does with weights it does with these: the same loss as the matrices that they stand for, cached
decoding, LoRA over them, counts, operations, layouts on a mesh, checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kinds
from model import weights as model_weights
from model.adapters.dora import DoRA
from model.adapters.lora import LoRA
from model.config import ModelConfig, VisionConfig
from model.generate.decode import advance, decoding_weights, prefill, prefill_decoder
from model.linear import look_up, matmul
from model.place import Place
from model.weights import MATRICES, Weight, axes_of, bind, dense, inputs, is_weight, map_matrices, named, names, size
from tpu import rules
from tpu.mesh import make_mesh
from train.adapter import weights as adapter_weights
from train.benchmark import drawn_batch
from train.budget.summary import parameter_counts, summarize
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import Checkpointer
from train.config import (
    AdapterConfig,
    DataConfig,
    Experiment,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
)
from train.program import make_program
from train.resolve import resolve


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass
class Int8:
    """A matrix as int8, with a float32 scale for each of its outputs, or for each row of a table."""

    values: jax.Array
    scale: jax.Array  # of the same shape, but 1 along what is contracted

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def matmul(
        self, x: jax.Array, contract: int, dtype: str, platform: str, result: str, transposed: bool = False
    ) -> jax.Array:
        y = matmul(x, self.values.astype(dtype), contract, dtype, platform, transposed)
        return (y * (self.scale[:, 0] if transposed else self.scale.reshape(self.scale.shape[contract:]))).astype(
            result
        )

    def rows(self, indices: jax.Array) -> jax.Array:
        return self.values[indices].astype(jnp.float32) * self.scale[indices]

    def dense(self) -> jax.Array:
        return self.values.astype(jnp.float32) * self.scale

    def axes(self, names: tuple[str, ...]) -> Int8:
        return Int8(names, tuple("norm" if n == 1 else name for n, name in zip(self.scale.shape, names, strict=True)))


def quantized(weights: Any, axes: Any) -> Any:
    """Every matrix as int8."""

    def quantize(path: tuple, weight: jax.Array, of: tuple[str, ...]) -> Any:
        if names(path)[-1] not in MATRICES:
            return weight
        contracted = (weight.ndim - 1,) if names(path)[-1] == "embedding" else tuple(inputs(of))
        scale = jnp.maximum(jnp.abs(weight).max(contracted, keepdims=True), 1e-6).astype(jnp.float32) / 127
        return Int8(jnp.round(weight / scale).astype(jnp.int8), scale)

    return jax.tree_util.tree_map_with_path(quantize, weights, axes)


VIT = {"encoder": "vit", "image_size": 8, "patch_size": 4, "layers": 2, "embed_dim": 16, "heads": 2}
TEXT = {"vocab_size": 261, "layers": 2, "embed_dim": 16, "heads": 4, "mlp_dim": 24, "attention": "plain"}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("next_token", {"positions": "learned", "max_positions": 16, "tied_head": False}, {}),
    "tied": ("next_token", {"kv_heads": 2, "tied_head": True, "layer_loop": "unroll"}, {}),
    "experts": (
        "next_token",
        {"experts": 4, "experts_per_token": 2, "expert_dim": 8, "shared_experts": 1, "mlp_bias": False},
        {},
    ),
    "shared": ("next_token", {"layers": 4, "share_layers": "alternate", "share_size": 2, "share_rank": 2}, {}),
    "bert": ("masked", {"kind": "encoder", "norm_order": "post", "positions": "learned", "token_types": 2}, {}),
    "t5": ("sequence_to_sequence", {"kind": "encoder_decoder", "decoder_layers": 2, "positions": "relative"}, {}),
    "sight": ("conversation", {"fusion": "merge"}, {**VIT, "connector": "mlp"}),
    "late": (
        "image_text_classification",
        {"fusion": "late", "kind": "encoder", "head": "pooled", "labels": 3},
        {**VIT, "pool": "map", "combine": "average"},
    ),
    "convolutions": (
        "image_classification",
        {"kind": "vision", "labels": 3},
        {"encoder": "resnet", "image_size": 16, "widths": (8, 16), "depths": (1, 1), "block": "basic", "pool": "mean"},
    ),
}
DECODES = ("dense", "tied", "experts", "shared", "t5")
ADAPTED = tuple(name for name in MODELS if name != "convolutions")  # which has no layers in groups
LORA = AdapterConfig("lora", (r"attention|mlp|cross|moe",), rank=2, alpha=4.0)


def experiment_of(name: str, adapter: AdapterConfig | None = None, mesh: dict[str, int] | None = None) -> Experiment:
    objective, fields, vision = MODELS[name]
    vision = {"connector": "none"} | vision if vision else vision
    context = 1 if fields.get("kind") == "vision" else 16
    found = resolve(
        Experiment(
            model=ModelConfig(**TEXT | fields, vision=VisionConfig(**vision)),
            data=DataConfig(tokenizer="bytes", bpe_vocab_size=257, context=context, batch_size=8),
            objective=ObjectiveConfig(name=objective),
            optimizer=OptimizerConfig(name="adamw", learning_rate=5e-2, schedule="constant", warmup_steps=0),
            mesh=MeshConfig(**mesh or {}),
            adapter=adapter or AdapterConfig(),
        )
    )
    found.model = found.model.placed("cpu", "float32")
    return found


@functools.cache
def drawn(name: str) -> tuple[ModelConfig, Any, Any]:
    """A model's config, its logical axes and random int8 weights, of which no vector is at its start."""
    config = experiment_of(name).model
    _, abstract, axes = model_weights.build(config, kinds.maker(config))
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda w: jnp.asarray(0.3 * rng.normal(size=w.shape), w.dtype), abstract)
    return config, axes, quantized(weights, axes)


def as_arrays(weights: Any) -> Any:
    return jax.tree.map(dense, weights, is_leaf=is_weight)


@contextlib.contextmanager
def int8() -> Iterator[None]:
    """Every tool finds int8 weights in the place of the matrices."""
    build, init = kinds.build, kinds.init

    def build_int8(config: ModelConfig) -> tuple[Any, Any, Any]:
        graphdef, abstract, axes = build(config)
        return graphdef, jax.eval_shape(lambda w: quantized(w, axes), abstract), axes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "build", build_int8)
        patch.setattr(kinds, "init", lambda config, key: quantized(init(config, key), build(config)[2]))
        yield


def evaluated(experiment: Experiment, weights: Any) -> dict[str, float]:
    mesh = make_mesh(experiment.mesh, jax.devices()[: math.prod(experiment.mesh.sizes().values())])
    with jax.set_mesh(mesh):
        program = make_program(experiment, mesh)
        abstract = program.abstract_state.weights
        assert jax.tree.structure(abstract) == jax.tree.structure(weights)
        weights = jax.device_put(weights, jax.tree.map(lambda leaf: leaf.sharding, abstract))
        return {
            name: float(value) for name, value in program.evaluate(weights, drawn_batch(experiment), {}).sums.items()
        }


@functools.cache
def wanted(name: str) -> float:
    """The loss of the arrays that the int8 weights stand for."""
    return evaluated(experiment_of(name), as_arrays(drawn(name)[2]))["nll"]


# The contract


def stacked(kind: str) -> Any:
    """Three layers of a table [5, 4], which is a matrix too."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    table = {"k": draw(3, 5, 4)}
    table = quantized({"kernel": table["k"]}, {"kernel": ("layers", "embed", "mlp")})["kernel"]
    low_rank = LoRA(table, draw(3, 5, 2), draw(3, 2, 4), scale=0.7)
    return {"int8": table, "lora": low_rank, "dora": DoRA(low_rank, draw(3, 4))}[kind]


@pytest.mark.parametrize("kind", ["int8", "lora", "dora"])
def test_a_weight_multiplies_as_the_array_that_it_stands_for(kind):
    weight = stacked(kind)
    assert isinstance(weight, Weight)
    assert (weight.shape, weight.dense().shape, size(weight)) == ((3, 5, 4), (3, 5, 4), 60)
    rng = np.random.default_rng(1)
    x, back = (jnp.asarray(rng.normal(size=(2, n)), jnp.float32) for n in (5, 4))
    indices = jnp.array([[0, 4], [2, 2]])
    for layer in range(3):
        one = jax.tree.map(lambda part, layer=layer: part[layer], weight)
        array = weight.dense()[layer]
        np.testing.assert_allclose(one.dense(), array, rtol=0, atol=1e-6)
        np.testing.assert_allclose(matmul(x, one, 1, "float32", "cpu"), x @ array, rtol=0, atol=1e-5)
        if kind != "int8":  # whose scale here is that of columns
            found = matmul(back, _by_row(one), 1, "float32", "cpu", transposed=True)
            np.testing.assert_allclose(found, back @ _by_row(one).dense().T, rtol=0, atol=1e-5)
        by_row = _by_row(one)
        np.testing.assert_allclose(look_up(by_row, indices), by_row.dense()[indices], rtol=0, atol=1e-6)


def _by_row(weight: Any) -> Any:
    """The same with an int8 table whose scales are those of rows, inmost."""
    if isinstance(weight, DoRA):
        return DoRA(_by_row(weight.low_rank), weight.magnitude)
    if isinstance(weight, LoRA):
        return dataclasses.replace(weight, kernel=_by_row(weight.kernel))
    return quantized({"embedding": weight.dense()}, {"embedding": ("vocab", "table_embed")})["embedding"]


@pytest.mark.parametrize("kind", ["int8", "lora", "dora"])
def test_axes_of_parts_are_as_many_as_their_dimensions(kind):
    weight = stacked(kind)
    axes = weight.axes(("layers", "embed", "mlp"))
    shapes = jax.tree.map(lambda names, part: len(names) == part.ndim, axes, weight, is_leaf=_is_axes)
    assert all(jax.tree.leaves(shapes))
    assert axes_of({"w": weight, "b": jnp.ones(3)}, {"w": ("layers", "embed", "mlp"), "b": ("norm",)})["b"] == ("norm",)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def test_inputs_of_matrices():
    for axes, wanted in (
        (("embed", "mlp"), (0, 1)),
        (("layers", "embed", "heads", "head_dim"), (1, 2)),
        (("repeats", "layers", "heads", "head_dim", "embed"), (2, 4)),
        (("layers", "experts", "mlp", "embed"), (2, 3)),
        (("taps", "taps", "channels", "embed"), (0, 3)),
        (("heads", "head_dim", "heads", "head_dim"), (0, 2)),
    ):
        assert (inputs(axes).start, inputs(axes).stop) == wanted


def test_names_are_spelled_one_way():
    weights = {"a": {"kernel": Int8(jnp.zeros((2, 3), jnp.int8), jnp.ones((1, 3)))}, "b": [jnp.ones(2)]}
    assert set(named(weights)) == {("a", "kernel"), ("b", "0")}
    paths = [names(path) for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
    assert paths == [("a", "kernel", "values"), ("a", "kernel", "scale"), ("b", "0")]
    changed = map_matrices(lambda w: w.shape, weights)
    assert changed["a"]["kernel"] == (2, 3)
    assert isinstance(changed["b"][0], jax.Array)


# In every matrix


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_no_array_and_the_loss_is_that_of_arrays(name):
    _, axes, weights = drawn(name)
    for path, weight in named(weights).items():
        assert isinstance(weight, Int8) == (path[-1] in MATRICES)
    counts = parameter_counts(weights, experiment_of(name).model)
    assert counts == parameter_counts(as_arrays(weights), experiment_of(name).model)
    assert jax.tree.structure(axes_of(weights, axes), is_leaf=_is_axes) == jax.tree.structure(weights)
    loss = wanted(name)
    with int8():
        np.testing.assert_allclose(evaluated(experiment_of(name), weights)["nll"], loss, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "convolutions"])
def test_on_eight_devices_the_loss_is_the_same(name):
    mesh = {"fsdp": 2, "expert": 2, "tensor": 2} if name == "experts" else {"fsdp": 4, "tensor": 2}
    given = experiment_of(name, mesh=mesh)
    loss = wanted(name)
    with int8():
        np.testing.assert_allclose(evaluated(given, drawn(name)[2])["nll"], loss, rtol=1e-5)
    devices = make_mesh(given.mesh, jax.devices())
    layout = rules.tree_shardings(devices, drawn(name)[1], drawn(name)[2])
    for path, weight in named(drawn(name)[2]).items():
        found = functools.reduce(lambda tree, part: tree[part], path, layout)
        if is_weight(weight) and "up" in path and "stack" in path:
            assert math.prod(found.values.shard_shape(weight.shape)) == math.prod(weight.shape) // 8
            assert math.prod(found.scale.shard_shape(weight.scale.shape)) < math.prod(weight.scale.shape)


@pytest.mark.parametrize("name", DECODES)
def test_cached_decoding_is_the_full_forward(name):
    config, _, weights = drawn(name)
    graphdef, _, _ = kinds.build(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 8)))
    place = Place(jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(8), tokens.shape))
    model, arrays = bind(graphdef, decoding_weights(config, weights)), bind(graphdef, as_arrays(weights))
    if name == "t5":
        extra = {"inputs": tokens, "input_segments": place.segments}
        full = arrays.head(arrays(tokens, place, **extra)[0])
        lengths = jnp.array([8, 8])
        cache, _, source = prefill_decoder(model, config, tokens, lengths, 8, int(tokens[0, 0]))
        steps = range(1, 8)
        full = arrays.head(arrays(tokens.at[:, 0].set(tokens[0, 0]), place, **extra)[0])
    else:
        full = arrays.head(arrays(tokens, place)[0])
        cache, found, source = prefill(model, config, tokens[:, :5], jnp.array([5, 5]), 8)
        np.testing.assert_allclose(found, full[:, 4], rtol=0, atol=2e-5 * np.abs(full).max())
        steps = range(5, 8)
    step = jax.jit(lambda cache, *a: advance(bind(graphdef, decoding_weights(config, weights)), cache, *a, source))
    for t in steps:
        cache, found = step(cache, tokens[:, t], jnp.array([t, t]))
        np.testing.assert_allclose(found, full[:, t], rtol=0, atol=2e-5 * np.abs(full).max())


@pytest.mark.parametrize("name", ADAPTED)
def test_lora_over_it_trains_and_merges(name, one_device):
    """The loss falls, the base stays bitwise, and merged into what the base stands for it is the same function."""
    _, _, base = drawn(name)
    given = experiment_of(name, LORA)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(base)]
    with int8(), jax.set_mesh(one_device):
        program = make_program(given, one_device)
        state = program.init(jax.random.key(0), {"model": base})
        losses = []
        for _ in range(8):
            state, metrics = program.step(state, drawn_batch(given), {"model": base})
            losses.append(float(metrics["nll"]))
        unmerged = float(program.evaluate(state.weights, drawn_batch(given), {"model": base}).sums["nll"])
        figures = summarize(given)
    assert losses[-1] < losses[0] - 0.02
    for leaf, old in zip(jax.tree.leaves(base), before, strict=True):
        np.testing.assert_array_equal(leaf, old)
    merged = adapter_weights.merged(given.adapter, base, state.weights)
    changed = [path for path, weight in named(merged).items() if not is_weight(weight) and path[-1] in MATRICES]
    assert changed
    merged = evaluated(experiment_of(name), as_arrays(merged))["nll"]
    np.testing.assert_allclose(merged, unmerged, rtol=1e-4)
    assert abs(merged - wanted(name)) > 2e-3 * wanted(name)  # twenty times what they may differ by
    plain = summarize(given)
    assert figures["flops_per_token"] == plain["flops_per_token"]
    assert figures["parameters"] == plain["parameters"]
    assert figures["bytes"]["frozen"] < 0.6 * plain["bytes"]["frozen"]


@pytest.mark.parametrize("name", ["tied", "experts"])
def test_a_checkpoint_holds_it(name, tmp_path: Path):
    _, _, weights = drawn(name)
    checkpointer = Checkpointer(tmp_path, RunConfig())
    checkpointer.save(0, {"weights": weights}, {})
    assert checkpointer.close()
    abstract = jax.eval_shape(lambda w: w, weights)
    found = checkpoint.load_weights(tmp_path / "0", abstract)
    assert jax.tree.structure(found) == jax.tree.structure(weights)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(weights), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
