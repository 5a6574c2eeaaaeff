"""The mesh and the table from logical axes to mesh axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from tpu import rules
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.config import MeshConfig


def test_all_axes_are_there_in_order_with_their_sizes():
    mesh = make_mesh(MeshConfig(data=2, tensor=2, stage=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1, "expert": 1, "stage": 2}
    assert mesh.axis_names == rules.MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_a_product_that_is_not_the_number_of_devices_is_named():
    with pytest.raises(UserError, match=r"mesh\.data=2 \* mesh\.tensor=3 needs 6 devices: there are 8"):
        make_mesh(MeshConfig(data=2, tensor=3))
    with pytest.raises(UserError, match=r"mesh needs 1 devices: there are 8"):
        make_mesh(MeshConfig())
    assert make_mesh(MeshConfig(), jax.devices()[3:4]).devices.item() == jax.devices()[3]


@given(st.lists(st.sampled_from(sorted(rules.RULES)), max_size=5))
def test_no_mesh_axis_cuts_two_dimensions(axes):
    """Of the axes that a dimension may be cut along, the earlier dimensions take theirs first."""
    taken = []
    for name, found in zip(axes, rules.partition_spec(tuple(axes)), strict=True):
        found = () if found is None else (found,) if isinstance(found, str) else found
        assert found == tuple(axis for axis in rules.RULES[name] if axis not in taken)
        taken += found


def test_the_table_knows_only_mesh_axes():
    assert {axis for axes in rules.RULES.values() for axis in axes} <= set(rules.MESH_AXES)
    spread = ("fsdp", "expert", "sequence")
    assert rules.partition_spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(
        "stage", spread, "tensor", None
    )
    assert rules.partition_spec(("batch", "embed")) == PartitionSpec(("data", "fsdp", "expert"), "sequence")
    with pytest.raises(KeyError, match="nonsense"):
        rules.partition_spec(("nonsense",))


def test_constraints_apply_under_a_mesh_and_only_there(one_device):
    x = jnp.zeros((8, 4))
    assert rules.constrain(x, "batch", "activation_mlp") is x
    with jax.set_mesh(one_device):
        assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: rules.constrain(x, "batch", "mlp"))(x))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda x: rules.constrain(x, "batch", "activation_mlp"))(x)
    assert found.sharding.is_equivalent_to(rules.sharding(mesh, ("batch", "activation_mlp")), 2)
    assert {shard.data.shape for shard in found.addressable_shards} == {(2, 2)}


def test_shardings_of_a_tree():
    mesh = make_mesh(MeshConfig(fsdp=8))
    axes = {"a": ("embed", "mlp"), "b": {"c": ("norm",)}}
    weights = {"a": jax.ShapeDtypeStruct((16, 3), "float32"), "b": {"c": jax.ShapeDtypeStruct((5,), "float32")}}
    found = rules.tree_shardings(mesh, axes, weights)
    assert found == {"a": rules.sharding(mesh, ("embed", "mlp"), (16, 3)), "b": {"c": rules.sharding(mesh, ("norm",))}}
    assert found["a"].shard_shape((16, 3)) == (2, 3)
    for stage in (1, 2):
        assert rules.tree_shardings(mesh, axes, weights, stage)["a"].is_fully_replicated


def test_an_axis_that_does_not_divide_is_left_out_from_the_end():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    assert rules.partition_spec(("table_embed", "vocab"), mesh, (8, 3)) == PartitionSpec(
        ("fsdp", "expert", "tensor"), None
    )
    assert rules.partition_spec(("table_embed",), mesh, (12,)) == PartitionSpec(("fsdp", "expert"))
    assert rules.partition_spec(("kv_heads",), mesh, (3,)) == PartitionSpec(None)


@pytest.mark.parametrize("axis", ["data", "fsdp", "stage"])
def test_slices_lie_outermost_along_their_axis(axis):
    mesh = make_mesh(MeshConfig(**{axis: 4, "tensor": 2, "slices": 2, "slice_axis": axis}))
    along = np.moveaxis(mesh.devices, rules.MESH_AXES.index(axis), 0)
    ids = np.vectorize(lambda device: device.id)(along)
    assert set(ids[:2].flat) == set(range(4))
    assert set(ids[2:].flat) == set(range(4, 8))


def test_what_remains_of_the_devices():
    assert MeshConfig(data=2, fsdp=-1).filled(8).fsdp == 4
    assert MeshConfig(data=2).filled(8) == MeshConfig(data=2)
    with pytest.raises(UserError, match=r"mesh\.data=3 = 3: does not divide the 8 devices"):
        MeshConfig(data=3, fsdp=-1).filled(8)
