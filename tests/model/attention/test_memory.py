"""The memory of earlier rows: rows in turn against one long row, what is forgotten, and what no gradient reaches.

Legend: B rows, T tokens, H heads, G kv_heads, N remembered keys, K head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kinds
from model.attention.memory import Memory, Pairs, empty_memory, recall, remember
from model.config import ModelConfig
from model.place import Place
from model.weights import bind

BASE = ModelConfig(vocab_size=20, layers=2, embed_dim=16, heads=4, kv_heads=2, init_std=0.3)
KINDS = {
    "rotary": {},
    "alibi": {"positions": "alibi"},
    "scanned": {"layer_loop": "scan"},
    "window": {"pattern": ("local", "global"), "window": 9},
    "sinks, qk_norm": {"attention_sinks": True, "qk_norm": True},
    "post-norm, softcap": {"norm_order": "post", "attention_softcap": 2.0},
    "plain": {"attention": "plain"},
    "linear": {"pattern": ("gated_linear", "linear")},
    "remat": {"remat": "full"},
}


@functools.cache
def model_of(**fields: Any) -> tuple[ModelConfig, Any, Any]:
    config = dataclasses.replace(BASE, **fields).resolved().placed("cpu", "float32")
    weights = jax.jit(lambda key: kinds.init(config, key))(jax.random.key(0))
    return config, kinds.build(config)[0], weights


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef: Any, weights: Any, tokens: Any, place: Place, memory: Memory | None = None) -> Any:
    return bind(graphdef, weights)(tokens, place, memory)


def tokens_and_place(lengths: list[list[int]], total: int) -> tuple[np.ndarray, Place]:
    """Rows of documents of the given lengths, then padding, up to `total` tokens."""
    tokens = np.random.default_rng(0).integers(0, 20, (len(lengths), total)).astype(np.int32)
    segments, positions = np.zeros((2, len(lengths), total), np.int32)
    for row, parts in enumerate(lengths):
        end = 0
        for number, length in enumerate(parts, 1):
            segments[row, end : end + length] = number
            positions[row, end : end + length] = np.arange(length)
            end += length
    return tokens, Place(segments, positions)


def in_turn(
    model: tuple[ModelConfig, Any, Any], tokens: np.ndarray, place: Place, size: int
) -> tuple[np.ndarray, list[Memory]]:
    """Hidden states [B, T, D] of rows of `size` tokens that follow each other, and the memory after each."""
    config, graphdef, weights = model
    memory, outs, memories = empty_memory(config, len(tokens)), [], []
    for start in range(0, tokens.shape[1], size):
        segments, positions = (a[:, start : start + size] for a in place[:2])
        # As batches number them: from 1 in every row.
        first = segments[:, :1]
        segments = np.where(segments > 0, segments - first + 1, 0)
        out, memory = forward(graphdef, weights, tokens[:, start : start + size], Place(segments, positions), memory)
        outs.append(out)
        memories.append(memory)
    return np.concatenate(outs, 1), memories


@pytest.mark.parametrize("name", KINDS)
def test_rows_in_turn_equal_one_long_row(name):
    """With room for everything, what layers see of earlier rows is what they would see in one row."""
    model = model_of(memory=48, **KINDS[name])
    tokens, place = tokens_and_place([[48], [7, 30, 4], [16, 16, 16]], 48)
    found, _ = in_turn(model, tokens, place, 12)
    _, graphdef, weights = model
    wanted, _ = forward(graphdef, weights, tokens, place)
    real = place.segments > 0
    # Sums of linear attention go on in another order; by processor they differ by 4e-5 of values up to 3.
    atol = 6e-5 if name == "linear" else 3e-5
    np.testing.assert_allclose(found[real], np.asarray(wanted)[real], atol=atol)


def test_a_short_memory_reaches_no_further():
    """One layer that sees 8 tokens before its row, against the mask that says so."""
    _, graphdef, weights = model = model_of(memory=8, layers=1, positions="alibi")
    tokens, place = tokens_and_place([[48]], 48)
    found, _ = in_turn(model, tokens, place, 12)
    for start in range(12, 48, 12):
        cut = slice(start - 8, start + 12)
        alone, _ = forward(graphdef, weights, tokens[:, cut], Place(*(a[:, cut] for a in place[:2])))
        np.testing.assert_allclose(found[:, start : start + 12], alone[:, 8:], atol=1e-5)
    whole, _ = forward(graphdef, weights, tokens, place)
    assert np.abs(found[:, 24:] - whole[:, 24:]).max() > 1e-2


@pytest.mark.parametrize("fields", [{"memory": 12}, {"pattern": ("knn",), "knn_memory": 12}])
def test_a_row_that_does_not_go_on_remembers_nothing(fields):
    """Another document, or a row that was left out between: as with an empty memory, and no NaN of the past."""
    config, graphdef, weights = model = model_of(**fields)
    tokens, place = tokens_and_place([[24], [24]], 24)
    _, memories = in_turn(model, tokens, place, 12)
    bad = jax.tree.map(lambda a: a * jnp.nan if a.dtype == jnp.float32 else a, memories[0])
    new = tokens[:, 12:]
    for start in (0, 13):
        positions = np.tile(np.arange(start, start + 12, dtype=np.int32), (2, 1))
        elsewhere = Place(np.ones((2, 12), np.int32), positions)
        wanted, _ = forward(graphdef, weights, new, elsewhere, empty_memory(config, 2))
        for memory in (memories[0], bad):
            found, _ = forward(graphdef, weights, new, elsewhere, memory)
            np.testing.assert_array_equal(found, wanted)


def test_what_is_kept_is_of_the_last_document_alone():
    tokens, place = tokens_and_place([[10], [6, 4], [7]], 10)
    _, memories = in_turn(model_of(memory=6), tokens, place, 10)
    np.testing.assert_array_equal(memories[0].place.segments, [[1] * 6, [0, 0, 1, 1, 1, 1], [0] * 6])
    np.testing.assert_array_equal(memories[0].place.positions[0], [4, 5, 6, 7, 8, 9])


def test_no_gradient_flows_into_the_row_before():
    config, graphdef, weights = model_of(memory=12)
    tokens, place = tokens_and_place([[24]], 24)
    first, second = (Place(*(a[:, cut] for a in place[:2])) for cut in (slice(0, 12), slice(12, 24)))

    def mixed(out: jax.Array) -> jax.Array:
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    def second_row(old: Any, new: Any) -> jax.Array:
        """The second row with weights `new`, after a first one with weights `old`."""
        _, memory = bind(graphdef, old)(tokens[:, :12], first, empty_memory(config, 1))
        return mixed(bind(graphdef, new)(tokens[:, 12:], second, memory)[0])

    of_old, of_new = jax.jit(jax.grad(second_row, (0, 1)))(weights, weights)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(of_old))
    # But keys are made of the memory anew, so that their weights learn from what lies beyond the row.
    without = jax.jit(jax.grad(lambda w: mixed(forward(graphdef, w, tokens[:, 12:], second)[0])))(weights)
    key = lambda g: np.asarray(g["stack"]["groups"]["layer_0"]["attention"]["key"]["kernel"])  # noqa: E731
    assert np.abs(key(of_new) - key(without)).max() > 1e-3


def test_knn_takes_the_nearest_and_one_softmax():
    """One layer by hand: what is stored, which keys are taken, and what they weigh."""
    fields = {"pattern": ("knn",), "layers": 1, "knn_memory": 20, "knn_neighbours": 3, "positions": "none"}
    _, _, weights = model = model_of(**fields)
    tokens, place = tokens_and_place([[24], [5, 19]], 24)
    found, memories = in_turn(model, tokens, place, 12)
    block = jax.tree.map(lambda w: np.asarray(w[0], np.float64), weights["stack"]["groups"]["layer_0"])
    h = np.asarray(weights["embedding"]["embedding"], np.float64)[tokens]

    def norm(h: np.ndarray, part: dict) -> np.ndarray:
        h = h - h.mean(-1, keepdims=True)
        return h / np.sqrt(np.square(h).mean(-1, keepdims=True) + 1e-5) * part["scale"] + part["bias"]

    def unit(a: np.ndarray) -> np.ndarray:
        return a / np.linalg.norm(a, axis=-1, keepdims=True)

    attention, x = block["attention"], norm(h, block["attention_norm"])
    q, k, v = (
        np.einsum("btd,dhk->bhtk", x, attention[n]["kernel"]) + attention[n]["bias"][:, None]
        for n in ("query", "key", "value")
    )
    q, k, v = unit(q) * 10.0, np.repeat(unit(k), 2, 1), np.repeat(v, 2, 1)
    out = np.zeros_like(q)
    for row in range(2):
        begin = 5 if row else 0  # the document of the second half
        for head in range(4):
            for t in range(12, 24):
                scores = k[row, head, begin : t + 1] @ q[row, head, t]
                near = np.arange(begin, t + 1) >= 12
                taken = near | (scores >= np.sort(scores[~near])[-3])
                weighs = np.where(taken, np.exp(scores), 0)
                out[row, head, t] = weighs @ v[row, head, begin : t + 1] / weighs.sum()
    h = h + np.einsum("bhtk,hkd->btd", out, attention["out"]["kernel"]) + attention["out"]["bias"]
    h = h + mlp(block, norm(h, block["mlp_norm"]))
    wanted = norm(h, jax.tree.map(np.asarray, weights["final_norm"]))
    np.testing.assert_allclose(found[:, 12:], wanted[:, 12:], atol=1e-4)
    stored: Pairs = memories[0].layers["layer_0"]
    np.testing.assert_allclose(stored.keys[:, 0, :, -12:], k[:, ::2, :12], atol=1e-5)


def mlp(block: dict, x: np.ndarray) -> np.ndarray:
    up = x @ block["mlp"]["up"]["kernel"] + block["mlp"]["up"]["bias"]
    up = np.asarray(jax.nn.gelu(jnp.asarray(up), approximate=True), np.float64)
    return up @ block["mlp"]["down"]["kernel"] + block["mlp"]["down"]["bias"]


def test_memory_is_newest_last_and_of_its_length():
    config, _, _ = model_of(memory=5)
    memory = empty_memory(config, 1)
    place = Place(np.ones((1, 3), np.int32), np.arange(3, dtype=np.int32)[None])
    for step in range(3):
        slots, layers = recall(memory, Place(place.segments, place.positions + 3 * step), unroll=True)
        hidden = jnp.full((1, 3, 16), 1.0 + step)
        layers = [{name: part.followed_by(hidden) for name, part in group.items()} for group in layers]
        memory = remember(slots, layers, 3)
    assert memory.place.positions.tolist() == [[4, 5, 6, 7, 8]]
    assert memory.layers["layer_0"].states[0, :, :, 0].tolist() == [[2, 2, 3, 3, 3]] * 2


def test_layers_without_a_memory_see_their_row_beside_those_that_have_one():
    """A pattern of "knn" and other layers, of which the former alone remember: with nothing in it, as without."""
    config, graphdef, weights = model_of(pattern=("knn", "global"), knn_memory=6)
    tokens, place = tokens_and_place([[9, 3], [12]], 12)
    found, memory = forward(graphdef, weights, tokens, place, empty_memory(config, 2))
    np.testing.assert_allclose(found, forward(graphdef, weights, tokens, place)[0], atol=1e-5)
    assert np.asarray(memory.layers["layer_0"].keys).any()
