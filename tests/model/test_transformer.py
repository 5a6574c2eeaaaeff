"""The transformer against a plain float64 reference, and every way of computing it against every other.

Legend: B rows, T tokens, D embed_dim, H heads, G kv_heads, K head_dim, V vocab_size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from model import kinds
from model.config import ModelConfig
from model.dropout import row_keys
from model.fields.shape import GATED
from model.place import Place
from model.weights import bind

pytestmark = pytest.mark.usefixtures("strict_promotion")
SMALL = ModelConfig(
    vocab_size=23,
    layers=4,
    embed_dim=12,
    heads=4,
    kv_heads=2,
    head_dim=6,
    pattern=("local", "global"),
    window=3,
    residual_dropout=0.2,
    attention_dropout=0.2,
    embedding_dropout=0.2,
).resolved()


def small(**fields: Any) -> ModelConfig:
    """SMALL without dropout, with these fields, for CPU in float32."""
    plain = {"residual_dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    return dataclasses.replace(SMALL, **plain | fields).placed("cpu", "float32")


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Weights of a size that keeps activations near 1, biases and norms included."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.normal(size=leaf.shape)
        kind = path[-1].key
        one = 0 if config.norm_unit_offset else 1
        scaled = one + 0.3 * values if kind == "scale" else values * (0.3 if kind == "bias" else 0.5)
        return jnp.asarray(scaled, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, kinds.build(config)[1])


def random_rows(config: ModelConfig, seed: int = 0, rows: int = 2, tokens: int = 11) -> tuple[np.ndarray, Place]:
    """Tokens [B, T] in segments of random lengths, with positions from 0 in each."""
    rng = np.random.default_rng(seed)
    starts = rng.random((rows, tokens)) < 0.25
    starts[:, 0] = True
    begin = np.maximum.accumulate(np.where(starts, np.arange(tokens), 0), 1)
    place = Place(np.cumsum(starts, 1).astype(np.int32), (np.arange(tokens) - begin).astype(np.int32))
    return rng.integers(0, config.vocab_size, (rows, tokens)).astype(np.int32), place


def logits(config: ModelConfig, weights: Any, tokens: Any, place: Place, key: jax.Array | None = None) -> jax.Array:
    model = bind(kinds.build(config)[0], weights)
    hidden, cache = model(tokens, place, key=key)
    assert cache is None
    return model.head(hidden)


def value_and_gradient(config: ModelConfig, weights: Any, tokens: Any, place: Place, key: Any = None) -> Any:
    """A scalar of all logits, and its gradient for all weights."""
    mix = np.random.default_rng(9).normal(size=(*tokens.shape, config.vocab_size)).astype(np.float32)
    return jax.jit(jax.value_and_grad(lambda w: jnp.mean(mix * logits(config, w, tokens, place, key))))(weights)


def assert_close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest element of each array."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(
            x, y, rtol=0, atol=tolerance * max(1e-3, np.abs(y).max()), err_msg=jax.tree_util.keystr(path)
        )


# The reference: one row and one head at a time, straight from the papers, in float64.


def reference_logits(config: ModelConfig, weights: Any, tokens: np.ndarray, place: Place) -> np.ndarray:
    """[B, T, V] float64."""
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), weights)
    table = weights["embedding"]["embedding"]
    rows = []
    for row, segments, positions in zip(tokens, place.segments, place.positions, strict=True):
        h = table[row] * (np.sqrt(config.embed_dim) if config.scale_embedding else 1)
        if config.positions == "learned":
            h = h + weights["position_embedding"]["embedding"][positions]
        if config.positions == "sinusoidal":
            h = h + np.stack([_sinusoid(p, config.embed_dim) for p in positions])
        for layer in range(config.layers):
            group, kind = divmod(layer, len(config.pattern))
            w = jax.tree.map(lambda a, group=group: a[group], weights["stack"]["groups"][f"layer_{kind}"])
            window = config.window if config.pattern[kind] == "local" else len(row)
            branches = (("attention", lambda x: _attention(config, w["attention"], x, segments, positions, window)),)
            branches += (("mlp", lambda x: _mlp(config, w["mlp"], x)),)
            for name, branch in branches:
                x = h
                if config.norm_order in ("pre", "sandwich"):
                    x = _norm(config, config.norm, h, w[f"{name}_norm"])
                x = branch(x)
                if config.norm_order in ("sandwich", "reordered"):
                    x = _norm(config, config.norm, x, w[f"{name}_out_norm"])
                h = h + x
                if config.norm_order == "post":
                    h = _norm(config, config.norm, h, w[f"{name}_norm"])
        if config.norm_order != "post":
            h = _norm(config, config.norm, h, weights["final_norm"])
        out = h @ (table.T if config.tied_head else weights["head"]["linear"]["kernel"])
        cap = config.logits_softcap
        rows.append(cap * np.tanh(out / cap) if cap else out)
    return np.stack(rows)


def _sinusoid(position: int, size: int) -> np.ndarray:
    angles = [position / 10_000 ** (2 * (i // 2) / size) for i in range(size)]
    return np.array([np.cos(a) if i % 2 else np.sin(a) for i, a in enumerate(angles)])


def _norm(config: ModelConfig, kind: str, x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    if kind == "layernorm":
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
    else:
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
    assert ("bias" in w and w["bias"] is not None) == (kind == "layernorm" and config.norm_bias)
    return y * (w["scale"] + config.norm_unit_offset) + (
        w.get("bias") if kind == "layernorm" and config.norm_bias else 0
    )


def _affine(x: np.ndarray, w: dict[str, np.ndarray], inputs: int, bias: bool) -> np.ndarray:
    """x [T, ...inputs] -> [T, ...outputs]."""
    assert (w.get("bias") is not None) == bias
    return np.tensordot(x, w["kernel"], inputs) + (w["bias"] if bias else 0)


def _attention(config, w, x, segments, positions, window) -> np.ndarray:
    q, k, v = (_affine(x, w[name], 1, config.attention_bias) for name in ("query", "key", "value"))  # [T, heads, K]
    if config.qk_norm:
        whole = config.qk_norm_over == "projection"
        flat = [a.reshape(len(x), -1) if whole else a for a in (q, k)]
        q = _norm(config, "rmsnorm", flat[0], w["query_norm"]).reshape(q.shape)
        k = _norm(config, "rmsnorm", flat[1], w["key_norm"]).reshape(k.shape)
    if config.positions == "rope":
        q, k = _rotate(config, q, positions), _rotate(config, k, positions)
    out = np.zeros_like(q)
    for t in range(len(x)):
        seen = [s for s in range(len(x)) if segments[s] == segments[t] and 0 <= positions[t] - positions[s] < window]
        for head in range(config.heads):
            kv = head // (config.heads // config.kv_heads)
            scores = np.array([q[t, head] @ k[s, kv] for s in seen]) / np.sqrt(config.query_scalar or config.head_dim)
            if config.attention_softcap:
                scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
            share = np.exp(scores - scores.max())
            out[t, head] = (share / share.sum()) @ v[seen, kv]
    return _affine(out, w["out"], 2, config.attention_bias and config.attention_out_bias)


def _rotate(config: ModelConfig, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Pairs (i, i + K/2), or (2i, 2i + 1), as complex numbers, turned by position * theta^(-2i/K)."""
    half = config.head_dim // 2
    angles = positions[:, None] * config.rope_theta ** (-2 * np.arange(half) / config.head_dim)
    pairs = x[..., ::2] + 1j * x[..., 1::2] if config.rope_interleaved else x[..., :half] + 1j * x[..., half:]
    turned = pairs * np.exp(1j * angles)[:, None]
    if config.rope_interleaved:
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    return np.concatenate([turned.real, turned.imag], -1)


def _mlp(config: ModelConfig, w: Any, x: np.ndarray) -> np.ndarray:
    def gelu_tanh(z: np.ndarray) -> np.ndarray:
        return z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    activate = {
        "gelu": lambda z: z / 2 * (1 + scipy.special.erf(z / np.sqrt(2))),
        "gelu_tanh": gelu_tanh,
        "relu": lambda z: np.maximum(z, 0),
        "swiglu": lambda z: z / (1 + np.exp(-z)),
        "geglu": gelu_tanh,
        "geglu_erf": lambda z: z / 2 * (1 + scipy.special.erf(z / np.sqrt(2))),
        "reglu": lambda z: np.maximum(z, 0),
    }[config.activation]
    up = _affine(x, w["up"], 1, config.mlp_bias)
    if config.activation in GATED:
        up = activate(_affine(x, w["gate"], 1, config.mlp_bias)) * up
    else:
        up = activate(up)
    return _affine(up, w["down"], 1, config.mlp_bias)


@settings(max_examples=24, phases=[Phase.generate])  # every example compiles: none are spent on a smaller one
@given(data=st.data())
def test_logits_equal_the_reference(model_configs, data):
    config = data.draw(model_configs).placed(data.draw(st.sampled_from(["cpu", "gpu"])), "float32")
    seed = data.draw(st.integers(0, 99))
    weights, (tokens, place) = random_weights(config, seed), random_rows(config, seed)
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(lambda w, t, p: logits(config, w, t, p))(weights, tokens, place)
    assert found.dtype == jnp.float32
    assert_close(found, reference_logits(config, weights, tokens, place), 2e-5)


def test_a_packed_row_gives_what_its_documents_give_alone():
    config = small(positions="learned")
    weights, (tokens, place) = random_weights(config), random_rows(config, seed=1, rows=1, tokens=16)
    forward = jax.jit(lambda t, p: logits(config, weights, t, p))
    packed = forward(tokens, place)
    assert len(np.unique(place.segments)) > 2
    for segment in np.unique(place.segments):
        at = place.segments[0] == segment
        alone = np.zeros_like(tokens)
        alone[0, : at.sum()] = tokens[0, at]
        steps = np.arange(16, dtype=np.int32)[None]
        single = Place((steps < at.sum()).astype(np.int32), np.where(steps < at.sum(), steps, 0).astype(np.int32))
        assert_close(forward(alone, single)[0, : at.sum()], packed[0, at])


def test_a_later_token_changes_nothing_before_it():
    config = small()
    weights, (tokens, _) = random_weights(config), random_rows(config)
    place = Place(np.ones_like(tokens), np.broadcast_to(np.arange(11, dtype=np.int32), tokens.shape))
    forward = jax.jit(lambda t: logits(config, weights, t, place))
    other = tokens.copy()
    other[:, 7] = (other[:, 7] + 1) % config.vocab_size
    before, after = forward(tokens), forward(other)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before - after)[:, 7:].max(axis=(0, 2)).min() > 1e-4


WAYS = [
    {"layer_loop": "scan"},
    {"layer_loop": "scan", "remat": "full"},
    {"layer_loop": "scan", "remat": "dots"},
    {"layer_loop": "scan", "remat": "dots_no_batch"},
    {"layer_loop": "unroll", "remat": "full"},
    {"layer_loop": "unroll", "platform": "gpu"},
]


@pytest.fixture(scope="module")
def unrolled() -> Any:
    """Weights, rows, and the value and gradient with dropout on, unrolled and without rematerialisation."""
    config = SMALL.placed("cpu", "float32")
    weights, (tokens, place) = random_weights(config), random_rows(config)
    return (
        weights,
        tokens,
        place,
        value_and_gradient(config, weights, tokens, place, row_keys(jax.random.key(1), tokens.shape[0])),
    )


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
def test_all_ways_of_computing_agree(unrolled, way):
    """The layers in a scan or unrolled, any rematerialisation, the products in the form for CPU or the plain one."""
    weights, tokens, place, wanted = unrolled
    config = dataclasses.replace(SMALL, **way).placed("cpu", "float32")
    assert_close(
        value_and_gradient(config, weights, tokens, place, row_keys(jax.random.key(1), tokens.shape[0])), wanted
    )


@jax.numpy_dtype_promotion("standard")  # Biases of float32 meet products of bfloat16.
def test_bfloat16_stays_near_float32():
    config = small(tied_head=False)
    weights, (tokens, place) = random_weights(config), random_rows(config)
    exact = value_and_gradient(config, weights, tokens, place)
    for fields in ({"compute_dtype": "bfloat16"}, {"compute_dtype": "bfloat16", "weight_dtype": "bfloat16"}):
        rough = dataclasses.replace(config, **fields)
        cast = jax.tree.map(lambda w, f=fields: w.astype(f.get("weight_dtype", "float32")), weights)
        found = value_and_gradient(rough, cast, tokens, place)
        assert found[0].dtype == jnp.float32
        assert {g.dtype for g in jax.tree.leaves(found[1])} == {jnp.dtype(rough.weight_dtype)}
        assert_close(found, exact, 0.1)
