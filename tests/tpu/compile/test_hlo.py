"""What is counted in the text of a compiled program, against programs whose answer is known.

The programs are compiled for eight simulated CPU devices; those of the TPU compiler are in test_compile.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpu.compile import hlo, hlo_counts
from tpu.compile.hlo_collectives import device_groups
from tpu.compile.hlo_counts import Counts

L, M, K, N = 5, 16, 32, 24


def counted(function: Callable, *arguments: Any, mesh: jax.sharding.Mesh | None = None) -> Counts:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return hlo_counts.count(hlo.parse(text), dict(mesh.shape) if mesh else {"data": 1})


def mesh_of(**axes: int) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def test_products_in_nested_loops_count_as_often_as_they_run():
    def inner(h: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ jnp.full((K, K), 0.1)), None

    def outer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.scan(inner, h @ w, None, length=7)[0], None

    found = counted(lambda x, w: jax.lax.scan(outer, x, w)[0], jnp.ones((M, K)), jnp.ones((L, K, K)))
    assert found.matmul_flops == 2 * M * K * K * L * (1 + 7)
    assert found.unknown_loops == 0


def test_forward_and_backward_of_scanned_layers():
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, w)[0].sum()

    found = counted(jax.grad(loss), jnp.ones((L, K, K)), jnp.ones((M, K)))
    assert found.matmul_flops == 4 * L * 2 * M * K * K  # forward, again, and twice backward


@given(batch=st.integers(1, 4), m=st.integers(1, 9), k=st.integers(1, 9), n=st.integers(1, 9))
def test_batched_products(batch, m, k, n):
    line = (
        f"  ROOT %d = f32[{batch},{m},{n}]{{2,1,0}} dot(%a, %b), lhs_batch_dims={{0}}, lhs_contracting_dims={{2}}, "
        "rhs_batch_dims={0}, rhs_contracting_dims={1}"
    )
    text = "\n".join(
        [
            "HloModule m, num_partitions=1",
            "",
            "ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {",
            f"  %a = f32[{batch},{m},{k}]{{2,1,0}} parameter(0)",
            f"  %b = f32[{batch},{k},{n}]{{2,1,0}} parameter(1)",
            line,
            "}",
        ]
    )
    assert hlo_counts.count(hlo.parse(text), {"data": 1}).matmul_flops == 2 * batch * m * k * n


def convolution(left: str, right: str, out: str, attributes: str) -> int:
    text = f"""HloModule m, num_partitions=1

ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {attributes}
}}
"""
    return hlo_counts.count(hlo.parse(text), {"data": 1}).matmul_flops


def test_products_that_libtpu_writes_as_convolutions():
    assert (
        convolution("bf16[8,32]{1,0}", "bf16[32,16]{1,0}", "bf16[8,16]{1,0}", "dim_labels=bf_io->bf") == 2 * 8 * 32 * 16
    )
    # A batch of products: the batch is a dimension whose window meets one element for each output.
    batched = convolution(
        "bf16[12,8,32]{2,1,0}",
        "bf16[12,32,16]{2,1,0}",
        "bf16[12,8,16]{2,1,0}",
        "window={size=12 stride=11 pad=0_0 lhs_dilate=12}, dim_labels=0bf_0io->0bf",
    )
    assert batched == 2 * 12 * 8 * 32 * 16


def test_an_ordinary_convolution_leaves_out_its_padding():
    found = convolution(
        "f32[2,9,3]{2,1,0}",
        "f32[3,3,4]{2,1,0}",
        "f32[2,9,4]{2,1,0}",
        "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
    )
    assert found == 2 * 2 * 4 * 3 * (9 * 3 - 2)  # the first and the last output each miss one


@pytest.mark.parametrize(("form", "trips"), [("scan", 11), ("down", 4), ("steps", 5), ("two", 6)])
def test_trip_counts_from_the_condition_alone(form, trips):
    """As libtpu leaves them: without XLA's note of how often a loop runs."""

    def loop(x: jax.Array) -> jax.Array:
        if form == "scan":
            return jax.lax.fori_loop(0, 11, lambda i, h: h @ h, x)
        start, limit, step = {"down": (9, 1, -2), "steps": (3, 17, 3), "two": (0, 6, 1)}[form]

        def goes_on(carry: tuple) -> jax.Array:
            return (carry[0] > limit) if step < 0 else (carry[0] < limit) & (carry[0] < 100)

        return jax.lax.while_loop(goes_on, lambda c: (c[0] + step, c[1] @ c[1]), (start, x))[1]

    text = jax.jit(loop).lower(jnp.ones((M, M))).compile().as_text()
    stripped = text.replace("known_trip_count", "unknown")
    assert hlo_counts.count(hlo.parse(stripped), {"data": 1}).matmul_flops == trips * 2 * M**3


def test_a_loop_whose_length_is_data_counts_once_and_is_named():
    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda h: h.sum() < 100, lambda h: h @ h, x)

    found = counted(loop, jnp.ones((M, M)))
    assert (found.matmul_flops, found.unknown_loops) == (2 * M**3, 1)


@pytest.mark.parametrize(
    ("kind", "axes", "result"),
    [
        ("all-reduce", ("tensor",), M * K),
        ("all-reduce", ("data", "fsdp"), M * K),
        ("all-gather", ("fsdp",), 2 * M * K),
        ("reduce-scatter", ("data",), M * K),
        ("collective-permute", ("tensor",), M * K),
        ("all-to-all", ("fsdp",), M * K),
    ],
)
def test_collectives_in_a_loop(kind, axes, result):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)

    def exchange(h: jax.Array) -> jax.Array:
        axis = axes if len(axes) > 1 else axes[0]
        if kind == "all-reduce":
            return jax.lax.psum(h, axis)
        if kind == "all-gather":
            return jax.lax.all_gather(h, axis, tiled=True)[:M]
        if kind == "reduce-scatter":
            return jnp.tile(jax.lax.psum_scatter(h, axis, tiled=True), (2, 1))
        if kind == "all-to-all":
            return jax.lax.all_to_all(h, axis, 0, 0, tiled=True)
        return jax.lax.ppermute(h, axis, [(0, 1), (1, 0)])

    def body(h: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (jnp.tanh(exchange(h)), None), h, None, length=L)[0]

    manual = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found = counted(manual, jax.ShapeDtypeStruct((M, K), jnp.float32), mesh=mesh)
    assert [(row.kind, row.axis, row.group) for row in found.collectives] == [(kind, "+".join(axes), 2 ** len(axes))]
    (row,) = found.collectives
    assert (row.distinct, row.count, row.bytes, row.network) == (1, L, 4 * result * L, "ici")


def test_a_sharded_product_sends_along_its_axis():
    mesh = mesh_of(data=4, tensor=2)
    x = jax.ShapeDtypeStruct((M, K), jnp.float32, sharding=NamedSharding(mesh, P("data", "tensor")))
    w = jax.ShapeDtypeStruct((K, N), jnp.float32, sharding=NamedSharding(mesh, P("tensor", None)))
    found = counted(lambda x, w: x @ w, x, w, mesh=mesh)
    assert found.matmul_flops == 2 * M * K * N // 8
    assert [(r.kind, r.axis, r.count, r.bytes) for r in found.collectives] == [
        ("all-reduce", "tensor", 1, 4 * M // 4 * N)
    ]


@given(st.permutations(range(3)), st.sampled_from([0, 1, 2]))
def test_forms_of_groups_say_the_same(order, axis):
    """A list, an iota and axes of a mesh, each of the groups along one dimension of devices in any order."""
    sizes = [2, 3, 4]
    ids = np.arange(24).reshape(sizes).transpose(order)
    inner = [i for i in range(3) if i != axis] + [axis]
    expected = ids.transpose(inner).reshape(-1, ids.shape[axis])
    listed = ",".join("{" + ",".join(map(str, row)) + "}" for row in expected)
    turned = ",".join(str(order[i]) for i in inner)
    names = ",".join(f"'x{i}'={n}" for i, n in enumerate(ids.shape))
    for form in (
        f"replica_groups={{{listed}}}, more={{}}",
        f"replica_groups=[{len(expected)},{ids.shape[axis]}]<=[2,3,4]T({turned}), more={{}}",
        f"replica_groups=mesh[{names}], device_ids=([2,3,4]T({','.join(map(str, order))})) {{'x{axis}'}}, more={{}}",
    ):
        assert (device_groups("%c = f32[] all-reduce(%a), channel_id=1, " + form, 24) == expected).all()


def test_parts_of_axes_and_other_forms():
    line = "  %c = f32[] all-reduce(%a), replica_groups=mesh['x'=2,'y'=6] {'y':(2)3}, more={}"
    ids = np.arange(12).reshape(2, 2, 3)
    assert (device_groups(line, 12) == ids.reshape(4, 3)).all()
    assert (device_groups(line.replace("(2)3", "(1)2"), 12) == ids.transpose(0, 2, 1).reshape(6, 2)).all()
    assert device_groups("all-reduce(%a), replica_groups={}, to_apply=%add", 4).tolist() == [[0, 1, 2, 3]]
    pairs = "collective-permute(%a), channel_id=1, source_target_pairs={{0,1},{1,0}}"
    assert device_groups(pairs, 2).tolist() == [[0, 1], [1, 0]]
    assert device_groups("all-reduce(%a), replica_groups=something new", 4) is None
    assert device_groups("all-reduce(%a), replica_groups={{0},{1,2}}, x", 4) is None


ASYNC = """HloModule m, num_partitions=4

%start (p: bf16[8]) -> (bf16[8], bf16[32]) {
  %p = bf16[8]{0} parameter(0)
  %g0 = bf16[32]{0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %t = (bf16[8]{0}, bf16[32]{0}) tuple(%p, %g0)
}

%step (p: bf16[8], q: bf16[32]) -> bf16[32] {
  %p.1 = bf16[8]{0} parameter(0)
  %q = bf16[32]{0} parameter(1)
  ROOT %g1 = bf16[32]{0} all-gather(%p.1), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

%all-reduce-scatter.1 (p: bf16[32]) -> bf16[8] {
  %p.2 = bf16[32]{0} parameter(0)
  %r = bf16[32]{0} all-reduce(%p.2), channel_id=9, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %s = bf16[8]{0} dynamic-slice(%r, %z), dynamic_slice_sizes={8}
}

%body (c: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %c = (s32[], bf16[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %h = bf16[8]{0} get-tuple-element(%c), index=1
  %async = (bf16[8]{0}, bf16[32]{0}) fusion(%h), kind=kCustom, calls=%start
  %full = bf16[32]{0} get-tuple-element(%async), index=1
  %done = bf16[32]{0} fusion(%h, %full), kind=kCustom, calls=%step, backend_config={"estimated_cycles":"100"}
  %scattered = bf16[8]{0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.1
  %sent = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%scattered), source_target_pairs={{0,1},{1,2}}
  %moved = bf16[8]{0} collective-permute-done(%sent)
  ROOT %out = (s32[], bf16[8]{0}) tuple(%next, %moved)
}

%condition (c: (s32[], bf16[8])) -> pred[] {
  %c.1 = (s32[], bf16[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %limit = s32[] constant(6)
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[8]{0}) tuple(%zero, %x)
  %loop = (s32[], bf16[8]{0}) while(%init), condition=%condition, body=%body
  ROOT %y = bf16[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_forms_that_only_libtpu_writes():
    """One gather in three parts counts once, a fused all-reduce and slice is a reduce-scatter, a permute is halved."""
    found = hlo_counts.count(hlo.parse(ASYNC), {"fsdp": 4})
    rows = {row.kind: (row.distinct, row.count, row.bytes, row.blocking_bytes) for row in found.collectives}
    assert rows == {
        "all-gather": (1, 6, 6 * 64, 0),
        "reduce-scatter": (1, 6, 6 * 64, 6 * 64),
        "collective-permute": (1, 6, 6 * 16, 0),
    }
    assert found.cycles == 600
    assert {row.axis for row in found.collectives} == {"fsdp"}
    # A limit that no instruction fixes is not guessed.
    unknown = hlo_counts.count(hlo.parse(ASYNC.replace("constant(6)", "infeed()")), {"fsdp": 4})
    assert (unknown.unknown_loops, unknown.cycles) == (1, 100)


CONDITIONAL = """HloModule m, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%stay (p: (f32[8,8], f32[1024])) -> f32[8,8] {
  %p = (f32[8,8]{1,0}, f32[1024]{0}) parameter(0)
  %unused = f32[1024]{0} get-tuple-element(%p), index=1
  %x0 = f32[8,8]{1,0} get-tuple-element(%p), index=0
  ROOT %d0 = f32[8,8]{1,0} dot(%x0, %x0), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%join (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  %d1 = f32[8,8]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %d2 = f32[8,8]{1,0} dot(%d1, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = f32[8,8]{1,0} all-reduce(%d2), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add
}

ENTRY %main (x: f32[8,8], big: f32[1024], which: pred[]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %big = f32[1024]{0} parameter(1)
  %which = pred[] parameter(2)
  %both = (f32[8,8]{1,0}, f32[1024]{0}) tuple(%x, %big)
  %first = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %c = f32[8,8]{1,0} conditional(%which, %first, %both), TRUE, FALSE
}
"""


@pytest.mark.parametrize(
    "branches", ["true_computation=%join, false_computation=%stay", "branch_computations={%stay, %join}"]
)
def test_one_branch_of_a_conditional_counts(branches):
    """The one that does more, whatever it is given, or on demand the other."""
    module = hlo.parse(CONDITIONAL.replace("TRUE, FALSE", branches))
    more, less = (hlo_counts.count(module, {"data": 4}, branch=branch) for branch in (max, min))
    assert hlo_counts.count(module, {"data": 4}) == more
    assert (more.matmul_flops, less.matmul_flops) == (3 * 2 * 8**3, 2 * 2 * 8**3)
    assert ([row.bytes for row in more.collectives], less.collectives) == ([256], [])


def test_memory_traffic_counts_the_slice_of_a_stacked_array():
    text = """HloModule m, num_partitions=1

%slice (w: f32[10,100], i: s32[]) -> f32[100] {
  %w = f32[10,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,100]{1,0} dynamic-slice(%w, %i, %z), dynamic_slice_sizes={1,100}
  ROOT %r = f32[100]{0} bitcast(%s)
}

ENTRY %main (w: f32[10,100], i: s32[]) -> f32[100] {
  %w.1 = f32[10,100]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %f = f32[100]{0} fusion(%w.1, %i.1), kind=kLoop, calls=%slice
  %near = f32[100]{0:S(1)} copy(%f)
  ROOT %add = f32[100]{0} add(%near, %f)
}
"""
    found = hlo_counts.count(hlo.parse(text), {"data": 1})
    assert found.memory_bytes == (400 + 4 + 400) + 400 + (400 + 400)  # vector memory, S(1), is free
    assert [buffer.type for buffer in found.buffers] == ["f32[100]", "f32[100]"]


@pytest.mark.parametrize("text", ["", "no module", "HloModule m\n\n%f (a: f32[]) -> f32[] {\n}\n"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="not the text of an HLO module"):
        hlo.parse(text)


def test_sizes_of_types():
    kinds = "(f32[2,3]{1,0}, bf16[4]{0:T(8,128)(2,1)S(1)}, pred[5]{0}, s4[8]{0}, u32[], token[], f8e4m3fn[3]{0})"
    found = hlo.arrays(kinds)
    assert [array.bytes for array in found] == [24, 8, 5, 4, 4, 0, 3]
    assert [array.space for array in found] == [0, 1, 0, 0, 0, 0, 0]
    assert math.prod(found[0].shape) == 6
