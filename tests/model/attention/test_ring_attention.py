"""Ring attention on simulated devices against the plain reference on one, and what its compiled form holds and sends.

Legend: N devices of the ring, B rows, T tokens, H heads, G kv_heads, K head_dim.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, PartitionSpec

from model.attention import ring_attention as ring
from model.attention.attend import plain_attention
from model.attention.ring_attention import ring_attention, zigzag
from model.place import Place, visible
from tpu import rules
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.config import MeshConfig

ROWS = ("batch", "activation_heads", "sequence", "head_dim")
CASES = [  # mesh, heads, kv_heads, tokens, window, softcap, documents per row, largest tile
    ({"sequence": 2}, 4, 2, 48, 0, 0.0, 1, 512),
    ({"sequence": 2}, 2, 2, 40, 7, 0.0, 3, 5),
    ({"sequence": 4}, 4, 1, 64, 0, 1.5, 4, 4),
    ({"sequence": 4}, 3, 3, 96, 32, 0.0, 2, 6),
    ({"sequence": 8}, 4, 2, 64, 0, 0.0, 3, 2),
    ({"sequence": 8}, 2, 1, 64, 5, 2.0, 2, 512),
    ({"sequence": 8}, 2, 1, 48, 1, 0.0, 2, 512),
    ({"data": 2, "tensor": 2, "sequence": 2}, 4, 2, 48, 0, 0.0, 3, 512),
    ({"fsdp": 2, "tensor": 2, "sequence": 2}, 4, 1, 40, 11, 1.5, 2, 5),
    ({"tensor": 4, "sequence": 2}, 8, 2, 24, 0, 0.0, 2, 3),
    ({"tensor": 2, "sequence": 4}, 3, 1, 24, 0, 0.0, 2, 512),  # heads that the axis does not divide
]


def on(**sizes: int) -> Mesh:
    return make_mesh(MeshConfig(**sizes), jax.devices()[: np.prod(list(sizes.values()))])


def place(starts: np.ndarray, padding: int = 0) -> Place:
    """Of rows whose documents begin where `starts` [B, T] is true and whose last tokens are padding."""
    steps = np.arange(starts.shape[1])
    segments, positions = np.cumsum(starts, 1), steps - np.maximum.accumulate(np.where(starts, steps, 0), 1)
    padded = steps >= starts.shape[1] - padding
    return Place(*(np.where(padded, 0, a).astype(np.int32) for a in (segments, positions)))


def inputs(heads: int, kv_heads: int, tokens: int, documents: int) -> tuple[Any, ...]:
    """q [B, H, T, K], k and v [B, G, T, K], segments and positions [B, T], and what the result is weighted with."""
    rng = np.random.default_rng(tokens)
    q, k, v, weights = (
        rng.normal(size=(2, n, tokens, 8)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads)
    )
    starts = np.zeros((2, tokens), bool)
    starts[:, 0] = True
    for row in starts:
        row[rng.choice(tokens, documents - 1, replace=False)] = True
    return q * 8**-0.5, k, v, *place(starts)[:2], weights


def with_gradients(attention: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """The result, and the gradients for q, k and v of its weighted sum."""

    def run(q, k, v, segments, positions, weights):
        def weighted(q, k, v):
            out = attention(q, k, v, segments, positions)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        (_, out), gradients = jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    return run


def plain(q, k, v, segments, positions, window=0, softcap=0.0):
    here = Place(segments, positions)
    return plain_attention(q, k, v, visible(here, here, window), softcap)


def dealt(arrays: tuple[Any, ...], parts: int) -> list[Any]:
    """Arrays [B, ., T, .] and [B, T] in zig-zag order."""
    order = zigzag(arrays[0].shape[2], parts)
    return [a[:, order] if a.ndim == 2 else a[:, :, order] for a in arrays]


def laid_out(mesh: Mesh, arrays: list[Any]) -> list[Any]:
    """Every array as the model would lay it out."""
    axes = [("batch", "sequence") if a.ndim == 2 else ROWS for a in arrays]
    return [jax.device_put(a, rules.sharding(mesh, n, a.shape)) for a, n in zip(arrays, axes, strict=True)]


def assert_close(found: tuple[jax.Array, ...], expected: tuple[jax.Array, ...], parts: int, atol: float = 1e-5) -> None:
    for x, y in zip(found, dealt(expected, parts), strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=0, atol=atol * max(1.0, np.abs(y).max()))


# The order


@given(st.integers(1, 9), st.integers(1, 7))
def test_zigzag_gives_every_device_as_many_visible_keys(parts, chunk):
    order = zigzag(2 * parts * chunk, parts)
    np.testing.assert_array_equal(order[np.argsort(order)], np.arange(order.size))
    assert len(set((order + 1).reshape(parts, -1).sum(1))) == 1
    assert (np.diff(order.reshape(parts, 2, chunk), axis=2) == 1).all()  # two runs of the text each
    assert list(order.reshape(parts, 2, chunk)[:, 0, 0]) == [i * chunk for i in range(parts)]


def test_tokens_that_cannot_be_dealt_are_named():
    with pytest.raises(UserError, match="20 tokens along a ring of 4 devices: needs a multiple of 8"):
        zigzag(20, 4)
    with jax.set_mesh(on(sequence=4)), pytest.raises(UserError, match="needs a multiple of 8"):
        ring_attention(*inputs(2, 1, 20, 1)[:5])


def test_any_other_order_is_wrong():
    arrays = inputs(2, 1, 32, 1)
    expected = plain(*arrays[:5])
    with jax.set_mesh(on(sequence=4)):
        found = jax.jit(ring_attention)(*arrays[:5])
    assert np.abs(found - expected).max() > 0.1


# The numbers


@pytest.mark.parametrize(("sizes", "heads", "kv_heads", "tokens", "window", "softcap", "documents", "tile"), CASES)
def test_ring_equals_plain(monkeypatch, sizes, heads, kv_heads, tokens, window, softcap, documents, tile):
    monkeypatch.setattr(ring, "LARGEST_TILE", tile)
    arrays = inputs(heads, kv_heads, tokens, documents)
    rule = {"window": window, "softcap": softcap}
    expected = jax.jit(with_gradients(functools.partial(plain, **rule)))(*arrays)
    mesh = on(**sizes)
    with jax.set_mesh(mesh):
        run = jax.jit(with_gradients(functools.partial(ring_attention, **rule)))
        found = run(*laid_out(mesh, dealt(arrays, sizes["sequence"])))
    assert_close(found, expected, sizes["sequence"])
    assert found[0].sharding.is_equivalent_to(rules.sharding(mesh, ROWS, found[0].shape), 4)
    assert window == 1 or np.abs(expected[1]).max() > 0.01  # a single key leaves q nothing to choose


@functools.cache
def both(window: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    ring_run, plain_run = (with_gradients(functools.partial(f, window=window)) for f in (ring_attention, plain))
    return jax.jit(ring_run), jax.jit(plain_run)


@settings(max_examples=25)
@given(st.data(), st.sampled_from([0, 7]), st.integers(0, 12))
def test_ring_equals_plain_for_any_packing(data, window, padding):
    """Documents of any lengths; what padding gets is of no interest and weighs nothing."""
    arrays = inputs(2, 1, 32, 1)
    starts = np.array(data.draw(st.lists(st.lists(st.booleans(), min_size=32, max_size=32), min_size=2, max_size=2)))
    starts[:, 0] = True
    real = (np.arange(32) < 32 - padding).astype(np.float32)[:, None]
    arrays = (*arrays[:3], *place(starts, padding)[:2], arrays[5] * real)
    ring_run, plain_run = both(window)
    expected = plain_run(*arrays)
    with jax.set_mesh(on(sequence=4)):
        found = ring_run(*dealt(arrays, 4))
    assert_close((found[0] * real[zigzag(32, 4)], *found[1:]), (expected[0] * real, *expected[1:]), 4)


def test_bfloat16():
    arrays = inputs(4, 2, 64, 3)
    rough = [jnp.asarray(a, jnp.bfloat16) for a in arrays[:3]]
    expected = jax.jit(with_gradients(plain))(*arrays)
    with jax.set_mesh(on(sequence=4)):
        found = jax.jit(with_gradients(ring_attention))(*dealt((*rough, *arrays[3:]), 4))
    assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
    assert_close(found, expected, 4, atol=0.02)


@pytest.mark.parametrize("mesh", [None, {"data": 2}])
def test_without_a_ring(mesh):
    arrays = inputs(2, 1, 32, 2)
    np.testing.assert_array_equal(zigzag(32, 1), np.arange(32))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(on(**mesh)):
        found = jax.jit(with_gradients(ring_attention))(*arrays)
    assert_close(found, jax.jit(with_gradients(plain))(*arrays), 1)


def test_inside_a_pipeline():
    """Nested in a `shard_map` over the stages, scanned and rematerialised, gradients of weights included."""
    x, _, _, segments, positions, weights = inputs(4, 2, 32, 3)
    scales = np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32)

    def layer(attention, x, scale, segments, positions):
        return x + attention(x * scale[0], x[:, ::2] * scale[1], x[:, 1::2], segments, positions)

    def pipelined(x, scales, segments, positions):
        cut, whole = PartitionSpec("stage"), PartitionSpec()

        def stages(scales, x, segments, positions):
            stage = jax.checkpoint(lambda x: layer(ring_attention, x, scales[0], segments, positions))

            def tick(x, t):
                mine = jnp.where(t == jax.lax.axis_index("stage"), stage(x), x)
                return jax.lax.ppermute(mine, "stage", [(0, 1), (1, 0)]), None

            return jax.lax.scan(tick, x, jnp.arange(2))[0][None]

        run = jax.shard_map(
            stages, axis_names={"stage"}, in_specs=(cut, whole, whole, whole), out_specs=cut, check_vma=False
        )
        return run(scales, x, segments, positions)[0]

    def stacked(x, scales, segments, positions):
        return functools.reduce(lambda x, scale: layer(plain, x, scale, segments, positions), scales, x)

    def run(model, x, segments, positions, weights):
        def weighted(x, scales):
            return jnp.sum(model(x, scales, segments, positions) * weights)

        return jax.jit(jax.value_and_grad(weighted, (0, 1)))(x, scales)

    value, (d_x, d_scales) = run(stacked, x, segments, positions, weights)
    with jax.set_mesh(on(stage=2, sequence=2, tensor=2)):
        found, (found_x, found_scales) = run(pipelined, *dealt((x, segments, positions, weights), 2))
    np.testing.assert_allclose(found, value, rtol=1e-5)
    assert_close((found_x,), (d_x,), 2)
    np.testing.assert_allclose(found_scales, d_scales, rtol=0, atol=1e-5 * np.abs(d_scales).max())


# What is computed, sent and held


def equations(jaxpr: Any, times: int = 1):
    """Every equation of a jaxpr, and how often it runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, times * equation.params.get("length", 1))


def counted(function: Callable[..., Any], *arguments: Any) -> collections.Counter[str]:
    """How often each primitive runs on one device, and "flops" of its matrix products; traced anew in every call."""
    found: collections.Counter[str] = collections.Counter()
    for equation, times in equations(jax.make_jaxpr(lambda *a: function(*a))(*arguments).jaxpr):
        found[equation.primitive.name] += times
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            depth = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
            found["flops"] += 2 * int(depth * np.prod(equation.outvars[0].aval.shape)) * times
    return found


@pytest.mark.parametrize(("parts", "tile"), [(2, 512), (2, 4), (4, 4), (8, 2)])
def test_every_device_does_an_equal_share_of_the_visible_half(monkeypatch, parts, tile):
    """One program without branches for all, and in it no more products than the causal half cut into tiles has."""
    monkeypatch.setattr(ring, "LARGEST_TILE", tile)
    b, h, t, width = 2, 4, 64, 8
    arrays = inputs(h, 2, t, 1)
    in_chunk = max(1, t // (2 * parts) // tile)
    half = t * t / 2 * (1 + 1 / (2 * parts * in_chunk))  # scores, those above the diagonal in its tiles included
    with jax.set_mesh(on(sequence=parts)):
        forward = counted(ring_attention, *arrays[:5])
        backward = counted(with_gradients(ring_attention), *arrays)
    assert forward["cond"] == backward["cond"] == 0
    assert forward["flops"] * parts == 2 * 2 * b * h * width * half
    assert backward["flops"] * parts == (2 + 5) * 2 * b * h * width * half


def hops(parts: int, window: int) -> tuple[int, int]:
    """Transfers of the forward pass, and of it with the backward pass."""
    arrays = inputs(2, 1, 64, 1)
    attention = functools.partial(ring_attention, window=window)
    with jax.set_mesh(on(sequence=parts)):
        return tuple(
            counted(f, *a)["ppermute"] for f, a in ((attention, arrays[:5]), (with_gradients(attention), arrays))
        )


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_keys_travel_once_around(parts):
    """Four arrays (keys, values, two of their place) to N - 1 devices in either pass, two gradients through all."""
    assert hops(parts, 0) == (4 * (parts - 1), 8 * (parts - 1) + 2 * parts)


@pytest.mark.parametrize(
    ("window", "blocks"),
    [(1, 0), (2, 2), (5, 2), (6, 4), (13, 6), (14, 7), (64, 7)],  # chunks of 4 on 8 devices
)
def test_keys_that_no_window_reaches_are_jumped_over(window, blocks):
    forward, both_passes = hops(8, window)
    assert forward == 4 * blocks
    assert both_passes == 8 * blocks + 2 * (blocks + (blocks > 0))


def test_a_window_skips_tiles(monkeypatch):
    """A tile out of reach is not computed: its keys may be anything."""
    monkeypatch.setattr(ring, "LARGEST_TILE", 4)
    arrays = inputs(2, 1, 64, 1)
    expected = plain(*arrays[:5], window=5)
    broken = arrays[2].copy()
    broken[:, :, :4] = np.inf  # values that inf * 0 would spread to every query whose tile meets them
    with jax.set_mesh(on(sequence=2)):
        run = jax.jit(functools.partial(ring_attention, window=5))
        found = run(*dealt((*arrays[:2], broken, *arrays[3:5]), 2))
    found = np.asarray(found)[:, :, np.argsort(zigzag(64, 2))]
    np.testing.assert_allclose(found[:, :, 8:], expected[:, :, 8:], atol=1e-5)
    assert not np.isfinite(found[:, :, :4]).any()


def test_a_saved_result_is_not_computed_again():
    """A rematerialisation policy that saves "attention" saves all that the backward pass needs of the ring."""
    arrays = inputs(2, 1, 32, 1)
    found = []
    with jax.set_mesh(on(sequence=4)):
        for names in ((), ("attention",)):
            policy = jax.checkpoint_policies.save_only_these_names(*names)
            attention = jax.checkpoint(lambda q, k, v, s, p: 2.0 * ring_attention(2.0 * q, k, v, s, p), policy=policy)
            found.append(counted(with_gradients(attention), *arrays)["ppermute"])
    assert found == [3 * 4 * 3 + 2 * 4, 2 * 4 * 3 + 2 * 4]


COLLECTIVES = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("


def compiled(mesh: Mesh, arrays: list[Any]) -> jax.stages.Compiled:
    """With the gradients laid out as their arrays are."""
    out = (arrays[0].sharding, *(a.sharding for a in arrays[:3]))
    with jax.set_mesh(mesh):
        return jax.jit(with_gradients(ring_attention), out_shardings=out).lower(*arrays).compile()


def test_nothing_is_sent_but_around_the_ring():
    mesh = on(data=2, tensor=2, sequence=2)
    text = compiled(mesh, laid_out(mesh, dealt(inputs(4, 2, 32, 2), 2))).as_text()
    assert set(re.findall(COLLECTIVES, text)) == {"collective-permute"}


def test_shared_key_heads_are_summed_once(monkeypatch):
    """With fewer kv_heads than devices along the heads: gradients are reduced, but not once for each tile."""
    monkeypatch.setattr(ring, "LARGEST_TILE", 2)
    mesh = on(tensor=4, sequence=2)
    text = compiled(mesh, laid_out(mesh, dealt(inputs(8, 2, 32, 2), 2))).as_text()
    assert "all-reduce" in text
    loops, entry = text.split("ENTRY ")
    assert " while(" in entry
    assert set(re.findall(COLLECTIVES, loops)) == set()


@pytest.fixture
def uncached():
    """Without the cache of compiled programs, which cannot read those of devices that are not here."""
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


@pytest.mark.usefixtures("uncached")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")
def test_a_long_row_on_tpu(monkeypatch):
    """131,072 tokens on eight v5e chips: no scores but a tile's in memory, and transfers run during the products."""
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = make_mesh(MeshConfig(sequence=8), devices)
    tokens, heads, kv_heads, width = 131072, 8, 2, 128

    def abstract(shape: tuple[int, ...], axes: tuple[str, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(mesh, axes, shape))

    rows = [abstract((1, n, tokens, width), ROWS, jnp.bfloat16) for n in (heads, kv_heads, kv_heads, heads)]
    here = abstract((1, tokens), ("batch", "sequence"), jnp.int32)
    program = compiled(mesh, [*rows[:3], here, here, rows[3]])
    local = tokens // 8
    queries = heads * local * width * 4  # bytes in float32; scores would be local / width as many
    assert program.memory_analysis().temp_size_in_bytes < 3 * queries
    text = program.as_text()
    assert set(re.findall(COLLECTIVES, text)) == {"collective-permute"}
    spans = transfers(text)
    assert len(spans) == 18
    assert sum(" while(" in span for span in spans) >= 14


def transfers(text: str) -> list[str]:
    """What lies between the start and the end of every collective-permute of a scheduled program."""
    names = re.findall(r"%(collective-permute-start\S*) = ", text)
    return [text.split(f"%{name} = ")[1].split(f"collective-permute-done(%{name})")[0] for name in names]
