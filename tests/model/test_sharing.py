"""Layers that share weights: equal to layers of their own that are tied by hand, with fewer weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kinds
from model.adapters.lora import LoRA
from model.attention.cache import empty_cache
from model.config import ModelConfig
from model.generate.decode import decoding_weights
from model.place import Place
from model.weights import bind
from tpu.errors import UserError
from train.budget.summary import parameter_counts, summarize
from train.config import DataConfig, Experiment, MeshConfig
from train.resolve import resolve

LAYERS, ROWS, TOKENS = 4, 2, 7
OWN = ModelConfig(vocab_size=13, layers=LAYERS, embed_dim=12, heads=2, activation="swiglu", qk_norm=True)
# Which set each of four layers has.
SETS = {("all", 0): (0, 0, 0, 0), ("groups", 2): (0, 0, 1, 1), ("alternate", 2): (0, 1, 0, 1)}
CASES = [
    ("all", 0, 0, "scan"),
    ("all", 0, 3, "unroll"),
    ("groups", 2, 3, "scan"),
    ("alternate", 2, 3, "scan"),
    ("alternate", 2, 0, "unroll"),
]


def placed(**fields: Any) -> ModelConfig:
    return dataclasses.replace(OWN, **fields).resolved().placed("cpu", "float32")


def shared(share: str, size: int, rank: int = 0, loop: str = "scan") -> tuple[ModelConfig, Any]:
    config = placed(share_layers=share, share_size=size, share_rank=rank, layer_loop=loop)
    weights = kinds.init(config, jax.random.key(0))
    flat, structure = jax.tree.flatten(weights)
    rng = np.random.default_rng(1)
    return config, structure.unflatten([w + 0.3 * rng.normal(size=w.shape).astype(np.float32) for w in flat])


def tied(weights: Any, sets: tuple[int, ...]) -> Any:
    """The weights of a model without sharing: copies, with the low-rank factors multiplied out."""
    weights = jax.tree.map(lambda w: w, weights)
    deltas = weights["stack"].pop("deltas", {})
    own = jax.tree.map(lambda w: w[jnp.array(sets)], weights["stack"]["groups"])

    def add(own: Any, deltas: Any) -> Any:
        if "lora_a" in deltas:
            return LoRA(own, **deltas).dense()
        return {name: add(part, deltas[name]) if name in deltas else part for name, part in own.items()}

    weights["stack"]["groups"] = add(own, deltas)
    return weights


def inputs() -> tuple[jax.Array, Place]:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 13, (ROWS, TOKENS)))
    return tokens, Place(jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(TOKENS), tokens.shape))


def value(config: ModelConfig, weights: Any) -> tuple[jax.Array, jax.Array]:
    """A scalar that depends on all logits, and these."""
    tokens, place = inputs()
    model = bind(kinds.build(config)[0], weights)
    logits = model.head(model(tokens, place)[0])
    return jnp.sin(logits).sum(), logits


@pytest.mark.parametrize(("share", "size", "rank", "loop"), CASES)
def test_logits_and_gradients_are_those_of_tied_layers(share, size, rank, loop):
    config, weights = shared(share, size, rank, loop)
    sets, own = SETS[share, size], placed(layer_loop=loop)
    differentiate = lambda of: jax.jit(jax.grad(lambda w: of(w), has_aux=True))  # noqa: E731
    gradient, logits = differentiate(lambda w: value(config, w))(weights)
    wanted_gradient, wanted = differentiate(lambda w: value(own, tied(w, sets)))(weights)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)
    for (path, x), y in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(wanted_gradient), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * (1 + np.abs(y).max()), err_msg=jax.tree_util.keystr(path))
    if rank == 0:  # The sum over the layers of a set, of the gradients that these layers' own weights would have.
        apart = jax.jit(jax.grad(lambda w: value(own, w)[0]))(tied(weights, sets))["stack"]["groups"]
        sums = jax.tree.map(lambda g: jnp.zeros((max(sets) + 1, *g.shape[1:])).at[jnp.array(sets)].add(g), apart)
        for x, y in zip(jax.tree.leaves(gradient["stack"]["groups"]), jax.tree.leaves(sums), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * (1 + np.abs(y).max()))


@pytest.mark.parametrize(("share", "size", "rank", "loop"), CASES)
def test_every_layer_has_a_cache_of_its_own(share, size, rank, loop):
    config, weights = shared(share, size, rank, loop)
    tokens, place = inputs()
    prepared = decoding_weights(config, weights)
    graphdef = kinds.build(config)[0]

    @jax.jit
    def token(cache: Any, tokens: jax.Array, place: Place) -> tuple[Any, jax.Array]:
        model = bind(graphdef, prepared)
        hidden, cache = model(tokens, place, cache)
        return cache, model.head(hidden)

    cache, found = empty_cache(config, ROWS, TOKENS), []
    for t in range(TOKENS):
        cache, logits = token(cache, tokens[:, t : t + 1], jax.tree.map(lambda a: a[:, t : t + 1], place))
        found.append(logits[:, 0])
    np.testing.assert_allclose(jnp.stack(found, 1), value(config, weights)[1], rtol=0, atol=1e-5)
    keys = cache.layers["layer_0"][0] if loop == "scan" else jnp.stack([c["layer_0"][0] for c in cache.layers])
    assert len(keys) == LAYERS
    assert all(np.abs(keys[i] - keys[j]).max() > 1e-3 for i in range(LAYERS) for j in range(i))


def test_repetitions_of_a_pattern_share():
    config = placed(layers=6, pattern=("local", "global", "local"), window=3, share_layers="all")
    weights = kinds.build(config)[1]
    assert config.layer_sets() == 1
    assert {len(w) for w in jax.tree.leaves(weights["stack"])} == {1}
    assert weights["stack"]["groups"].keys() == {"layer_0", "layer_1", "layer_2"}


@pytest.mark.parametrize(("share", "size"), SETS)
def test_the_count_of_weights_falls_and_that_of_operations_does_not(share, size):
    def figures(**fields: Any) -> dict[str, Any]:
        model = dataclasses.replace(OWN, **fields)
        data = DataConfig(tokenizer="bytes", bpe_vocab_size=13, context=TOKENS)
        return summarize(resolve(Experiment(model=model, data=data)))

    own, less = figures(), figures(share_layers=share, share_size=size)
    layer = parameter_counts(kinds.build(placed())[1]["stack"])["total"] // LAYERS
    sets = len(set(SETS[share, size]))
    assert less["parameters"]["total"] == own["parameters"]["total"] - (LAYERS - sets) * layer
    assert less["flops_per_token"] == own["flops_per_token"]
    embed, mlp, rank = 12, 48, 3
    factors = LAYERS * rank * (4 * (embed + embed) + 3 * (embed + mlp))
    more = figures(share_layers=share, share_size=size, share_rank=rank)
    assert more["parameters"]["total"] == less["parameters"]["total"] + factors
    assert more["flops_per_token"] == less["flops_per_token"] + 6 * factors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share_layers": "half"}, "model.share_layers='half': valid: none, all, groups, alternate"),
        ({"share_layers": "groups", "share_size": 3}, "model.share_size=3: .* must divide the 4 .*valid: 1, 2, 4"),
        ({"share_layers": "alternate"}, "model.share_size=0: .* must divide the 4"),
        ({"share_layers": "all", "share_size": 2}, "model.share_size=2: has no effect with model.share_layers='all'"),
        ({"share_rank": 2}, "model.share_rank=2: needs shared layers"),
        ({"share_layers": "all", "share_rank": -1}, "model.share_rank=-1: must be at least 0"),
        ({"share_layers": "all", "pipeline_repeats": 2}, "model.pipeline_repeats=2: .*give 1"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(OWN, **fields).resolved()


def test_a_pipeline_is_refused():
    model = dataclasses.replace(OWN, share_layers="all", vocab_size=300)
    with pytest.raises(UserError, match=r"mesh.stage=2: .*model.share_layers='all'; give mesh.stage=1"):
        resolve(Experiment(model=model, mesh=MeshConfig(stage=2), data=DataConfig(bpe_vocab_size=300)))
