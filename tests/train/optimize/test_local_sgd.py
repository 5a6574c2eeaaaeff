"""Local SGD: against synchronous training, against replicas trained one by one, and what it sends in the compiled text.

Legend: R replicas, B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.config import ModelConfig
from tests.runs import terminated_at, train_here
from tpu.compile import hlo
from tpu.compile.hlo_counts import count
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.checkpoint.checkpoint import Checkpointer
from train.config import DataConfig, Experiment, MeshConfig, OptimizerConfig, RunConfig
from train.data.batch import Batch
from train.optimize.local_sgd import outer_update
from train.program import Program, make_program
from train.resolve import on, resolve
from train.restore import open_checkpoint
from train.state import TrainState

ROWS, TOKENS, VOCAB = 8, 16, 20
PLAIN = {"name": "sgd", "beta1": 0.0, "clip_norm": 0.0, "learning_rate": 0.3}
AVERAGE = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}

BASE = Experiment(
    model=ModelConfig(vocab_size=VOCAB, layers=2, embed_dim=16, heads=4, kv_heads=2, layer_loop="scan"),
    data=DataConfig(tokenizer="bytes", bpe_vocab_size=VOCAB, context=TOKENS, batch_size=ROWS),
    optimizer=OptimizerConfig(schedule="constant", warmup_steps=0),
    run=RunConfig(steps=240),
)


def changed(**branches: dict[str, Any]) -> Experiment:
    parts = {name: dataclasses.replace(getattr(BASE, name), **fields) for name, fields in branches.items()}
    experiment = resolve(dataclasses.replace(BASE, **parts))
    experiment.model = experiment.model.placed("cpu", "float32")
    return experiment


def made(experiment: Experiment) -> tuple[Program, jax.sharding.Mesh]:
    devices = math.prod(experiment.mesh.sizes().values())
    mesh = make_mesh(experiment.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        return make_program(experiment, mesh), mesh


def drawn_batch(seed: int, ragged: bool = False) -> Batch:
    """One segment per row; all loss weights 1, or else between 0 and 3 and very different from row to row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (ROWS, TOKENS + 1)).astype(np.int32)
    loss_weights = rng.random((ROWS, TOKENS)) * rng.integers(1, 4, (ROWS, 1)) if ragged else np.ones((ROWS, TOKENS))
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_weights=loss_weights.astype(np.float32),
        segments=np.ones((ROWS, TOKENS), np.int32),
        positions=np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (ROWS, TOKENS)),
    )


def share(batch: Batch, replica: int, replicas: int) -> Batch:
    rows = ROWS // replicas
    return jax.tree.map(lambda a: a[replica * rows : (replica + 1) * rows], batch)


def copied(tree: Any) -> Any:
    """On the host, for what is given to a step is donated."""
    return jax.tree.map(lambda a: np.array(jax.random.key_data(a) if _is_key(a) else a), tree)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(copied(a)), jax.tree.leaves(copied(b)), strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


def assert_close(found: Any, wanted: Any, tolerance: float) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def figures(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items()}


def trained(experiment: Experiment, batches: list[Batch]) -> tuple[TrainState, list[dict[str, float]]]:
    program, mesh = made(experiment)
    found = []
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(0), {})
        for batch in batches:
            state, metrics = program.step(state, batch, {})
            found.append(figures(metrics))
    return state, found


def of_replica(state: TrainState, replica: int) -> Any:
    return jax.tree.map(lambda w: w[replica], copied(state.optimizer_state.replicas.weights))


# What it computes


MESHES = {
    "data8": {"data": 8},
    "data2-fsdp2-tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data2-sequence2-tensor2": {"data": 2, "sequence": 2, "tensor": 2},
    "data2-stage2-fsdp2": {"data": 2, "stage": 2, "fsdp": 2},
    "data2-fsdp4-zero1": {"data": 2, "fsdp": 4, "zero": 1},
}


@pytest.fixture(scope="module")
def synchronous() -> tuple[Any, list[dict[str, float]]]:
    """Weights and metrics of plain SGD on one device."""
    state, metrics = trained(changed(optimizer=PLAIN), [drawn_batch(seed) for seed in range(4)])
    return copied(state.weights), metrics


@pytest.mark.parametrize("mesh", MESHES)
def test_one_local_step_of_plain_sgd_is_synchronous_training(synchronous, mesh):
    accumulation = 2 if mesh == "data2-fsdp2-tensor2" else 1
    optimizer = PLAIN | AVERAGE | {"local_steps": 1, "accumulation": accumulation}
    experiment = changed(mesh=MESHES[mesh], optimizer=optimizer)
    state, metrics = trained(experiment, [drawn_batch(seed) for seed in range(4)])
    assert_close(copied(state.weights), synchronous[0], 1e-6)
    for name in ("loss", "nll", "loss_tokens", "learning_rate", "skipped", "skipped_in_a_row"):
        assert [m[name] for m in metrics] == pytest.approx([m[name] for m in synchronous[1]], rel=1e-6), name


LOCAL = {"local_steps": 3, "learning_rate": 0.01, "clip_norm": 0.5}


def one_by_one(batches: list[Batch], replicas: int) -> tuple[list[Any], list[list[dict[str, float]]], Any]:
    """Algorithm 1 of the paper by one device and numpy.

    Returns the weights of each replica, each step's metrics of each, and the common weights.
    """
    optimizer = LOCAL | {"local_steps": 0}
    program, mesh = made(changed(data={"batch_size": ROWS // replicas}, optimizer=optimizer))
    outer = changed().optimizer
    metrics = []
    with jax.set_mesh(mesh):
        states = [program.init(jax.random.key(0), {}) for _ in range(replicas)]
        common = copied(states[0].weights)
        momentum = jax.tree.map(np.zeros_like, common)
        for number, batch in enumerate(batches, 1):
            metrics.append([])
            for r in range(replicas):
                states[r], found = program.step(states[r], share(batch, r, replicas), {})
                metrics[-1].append(figures(found))
            if number % LOCAL["local_steps"] == 0:
                ends = [copied(state.weights) for state in states]
                change = jax.tree.map(lambda w, *own: w - np.mean(own, 0), common, *ends)
                momentum = jax.tree.map(lambda m, g: outer.outer_momentum * m + g, momentum, change)
                common = jax.tree.map(
                    lambda w, m, g: w - outer.outer_learning_rate * (g + outer.outer_momentum * m),
                    *(common, momentum, change),
                )
                states = [state._replace(weights=jax.tree.map(jnp.asarray, common)) for state in states]
    return [copied(state.weights) for state in states], metrics, common


def test_replicas_are_runs_of_their_own_until_they_are_joined():
    """AdamW, clipping and Nesterov over two and two thirds rounds; loss weights that differ; a NaN in one share."""
    batches = [drawn_batch(seed, ragged=True) for seed in range(8)]
    batches[4]["loss_weights"][2, 3] = np.nan
    wanted, wanted_metrics, common = one_by_one(batches, 4)
    state, metrics = trained(changed(mesh={"data": 4, "fsdp": 2}, optimizer=LOCAL), batches)
    assert_close(copied(state.weights), common, 1e-5)
    for r in range(4):
        assert_close(of_replica(state, r), wanted[r], 1e-5)
    assert copied(state.optimizer_state.replicas.skipped).tolist() == [0, 1, 0, 0]
    for found, each in zip(metrics, wanted_metrics, strict=True):
        tokens = np.array([m["loss_tokens"] for m in each])
        for name in ("loss", "nll", "grad_norm", "update_ratio"):
            mean = (np.array([m[name] for m in each]) * tokens).sum() / tokens.sum()
            assert found[name] == pytest.approx(mean, rel=1e-4, nan_ok=True), name
        assert found["loss_tokens"] == pytest.approx(tokens.sum(), nan_ok=True)
    assert [math.isnan(m["loss"]) for m in metrics] == [step == 4 for step in range(8)]
    assert [(m["skipped"], m["skipped_in_a_row"]) for m in metrics] == [(0, 0)] * 4 + [(1, 1)] + [(1, 0)] * 3


def test_the_outer_update_is_that_of_optax():
    rng = np.random.default_rng(0)
    config = OptimizerConfig(outer_learning_rate=0.4, outer_momentum=0.8)
    rule = optax.sgd(0.4, momentum=0.8, nesterov=True)
    weights = wanted = {"a": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32), "b": jnp.ones(4)}
    momentum, state = jax.tree.map(jnp.zeros_like, weights), rule.init(weights)
    for _ in range(4):
        gradient = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), weights)
        weights, momentum = outer_update(weights, momentum, gradient, config)
        updates, state = rule.update(gradient, state)
        wanted = optax.apply_updates(wanted, updates)
        assert_close(weights, wanted, 1e-6)


@pytest.fixture(scope="module")
def program() -> tuple[Program, jax.sharding.Mesh]:
    return made(changed(mesh={"data": 4, "fsdp": 2}, optimizer=LOCAL))


def test_replicas_draw_dropout_of_their_own(program):
    """Replicas that read the same rows differ by nothing else."""
    batch = jax.tree.map(lambda a: np.concatenate([a[: ROWS // 4]] * 4), drawn_batch(0))
    program, mesh = program
    with jax.set_mesh(mesh):
        without, _ = program.step(program.init(jax.random.key(0), {}), batch, {})
    assert same_bits(of_replica(without, 0), of_replica(without, 1))
    experiment = changed(mesh={"data": 4, "fsdp": 2}, model={"residual_dropout": 0.5}, optimizer=LOCAL)
    state, _ = trained(experiment, [batch])
    assert not same_bits(of_replica(state, 0), of_replica(state, 1))


# Its state


def test_replicas_are_bitwise_equal_after_an_outer_step_and_differ_between(program):
    program, mesh = program
    equal, at_common = [], []
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(0), {})
        for step in range(6):
            before = copied(state.weights)
            state, _ = program.step(state, drawn_batch(step), {})
            equal.append([same_bits(of_replica(state, r), state.weights) for r in range(4)])
            at_common.append(same_bits(before, state.weights))
            for leaf in jax.tree.leaves(state.weights):  # The copies on different devices, too.
                parts = {str(s.index): np.asarray(s.data).tobytes() for s in leaf.addressable_shards}
                assert all(np.asarray(s.data).tobytes() == parts[str(s.index)] for s in leaf.addressable_shards)
    assert equal == [[False] * 4, [False] * 4, [True] * 4] * 2
    assert at_common == [True, True, False] * 2


def test_every_replica_lies_on_its_own_devices_and_the_outer_momentum_in_parts():
    experiment = changed(mesh={"data": 4, "fsdp": 2, "zero": 2}, optimizer=LOCAL)
    program, mesh = made(experiment)
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(0), {})
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract_state), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
    local = state.optimizer_state
    adam = optax.tree.get(local.replicas.optimizer_state, "mu")
    up = ("stack", "groups", "layer_0", "mlp", "up", "kernel")  # [layers, embed, mlp]
    shapes = []
    for leaf in (state.weights, local.momentum, local.replicas.weights, adam):
        for name in up:
            leaf = leaf[name]
        shapes.append({shard.data.shape for shard in leaf.addressable_shards})
    assert shapes == [{(2, 16, 64)}, {(2, 8, 64)}, {(1, 2, 16, 64)}, {(1, 2, 8, 64)}]
    assert_close(copied(local.replicas.weights), jax.tree.map(lambda w: np.stack([w] * 4), copied(state.weights)), 0)


def test_a_checkpoint_between_exchanges_loses_no_bit(program, tmp_path):
    program, mesh = program
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(0), {})
        checkpointer = Checkpointer(tmp_path, RunConfig())
        for step in range(7):
            if step == 4:
                checkpointer.save(step, state, {})
                assert checkpointer.wait()
            state, _ = program.step(state, drawn_batch(step), {})
        again, _, first = checkpointer.restore(program.abstract_state)
        for step in range(first, 7):
            again, _ = program.step(again, drawn_batch(step), {})
        checkpointer.close()
    assert first == 4
    assert same_bits(state, again)


# What it sends


@pytest.mark.parametrize("zero", [2, 3])
def test_replicas_talk_when_they_are_joined_and_send_their_parts_once(zero):
    mesh = {"data": 2, "fsdp": 4, "zero": zero}
    outside, inside = talk(changed(mesh=mesh, optimizer={"local_steps": 8}))
    synchronous, nothing = talk(changed(mesh=mesh))
    assert nothing == {}
    assert set(inside) - {("all-gather", "fsdp")} == {("all-reduce", "data")}  # ZeRO 2 gathers the new weights.
    program, _ = made(changed(mesh=mesh, optimizer={"local_steps": 8}))
    momentum = jax.tree.leaves(program.abstract_state.optimizer_state.momentum)
    assert inside["all-reduce", "data"] == sum(4 * math.prod(m.sharding.shard_shape(m.shape)) for m in momentum)
    along_data = {key: size for key, size in outside.items() if "data" in key[1]}
    assert set(along_data) == {("all-gather", "data")}
    assert along_data["all-gather", "data"] <= 2 * 8 * 4  # eight figures of either replica
    per_step = along_data["all-gather", "data"] + inside["all-reduce", "data"] / 8
    # The synchronous step sums the same gradient along data, alone or with fsdp.
    assert per_step <= sum(size for (_, axis), size in synchronous.items() if "data" in axis) / 8 + 64


def talk(experiment: Experiment) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
    """Bytes of one step's collectives by kind and axes, outside and inside of conditionals."""
    program, mesh = made(experiment)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), drawn_batch(0))
    with jax.set_mesh(mesh):
        module = hlo.parse(program.step.lower(program.abstract_state, batch, {}).compile().as_text())

    def sent(module: hlo.Module) -> dict[tuple[str, str], int]:
        found = count(module, dict(mesh.shape)).collectives
        return {(c.kind, c.axis): c.bytes for c in found if c.group > 1}

    instructions = [i for c in module.computations.values() for i in c.instructions.values()]
    branches = {name for i in instructions if i.opcode == "conditional" for name in i.called()}
    without = module.computations | {name: hlo.Computation(name) for name in branches}
    everywhere, outside = sent(module), sent(dataclasses.replace(module, computations=without))
    inside = {key: size - outside.get(key, 0) for key, size in everywhere.items() if size > outside.get(key, 0)}
    return outside, inside


# What it learns


def test_eight_local_steps_learn_about_as_well_as_synchronous_ones():
    """Counting, on rows never seen: the first token and the stride are drawn, the rest follows."""

    def counting(seed: int) -> Batch:
        rng = np.random.default_rng(seed)
        first, stride = rng.integers(0, VOCAB, (ROWS, 1)), rng.integers(1, 4, (ROWS, 1))
        tokens = ((first + stride * np.arange(TOKENS + 1)) % VOCAB).astype(np.int32)
        return drawn_batch(0) | {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}

    losses = {}
    for case, replicas, local_steps in (("synchronous", 4, 0), ("local", 4, 8), ("alone", 1, 0)):
        optimizer = {"learning_rate": 3e-3, "local_steps": local_steps}
        rows = ROWS if replicas > 1 else ROWS // 4
        experiment = changed(mesh={"data": replicas}, data={"batch_size": rows}, optimizer=optimizer)
        state, _ = trained(experiment, [share(counting(seed), 0, ROWS // rows) for seed in range(240)])
        program, mesh = made(experiment)
        with jax.set_mesh(mesh):
            batches = [share(counting(seed), 0, ROWS // rows) for seed in range(1000, 1016)]
            told = [program.evaluate(state.weights, batch, {}) for batch in batches]
        losses[case] = sum(float(t.sums["nll"]) for t in told) / sum(float(t.weights["nll"]) for t in told)
    assert losses["local"] < 1.1 * losses["synchronous"]
    assert losses["local"] < 0.7 * losses["alone"]  # what one replica learns from its share


# From end to end


def test_a_run_stopped_between_exchanges_goes_on_and_its_common_weights_are_served(tmp_path, micro):
    experiment = micro(mesh={"data": 2}, optimizer={"local_steps": 4, "accumulation": 1}, run={"eval_every": 4})
    assert train_here(experiment, tmp_path / "whole", devices=2) == 0
    with terminated_at(6):
        assert train_here(experiment, tmp_path / "parts", devices=2) == 0
    between = open_checkpoint(tmp_path / "parts")
    assert between.step_dir.name == "6"
    assert train_here(experiment, tmp_path / "parts", devices=2) == 0
    whole, parts = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "parts")
    assert whole.step_dir.name == parts.step_dir.name == "8"
    assert same_bits(whole.weights, parts.weights)
    assert not same_bits(between.weights, parts.weights)


# Mistakes


MISTAKES = [
    ({"optimizer": {"local_steps": -1}}, r"optimizer\.local_steps=-1: must be at least 0"),
    ({"optimizer": {"local_steps": 8}}, r"optimizer\.local_steps=8: .* mesh\.data=1; give mesh\.data above 1"),
    ({"optimizer": {"local_steps": 7}, "mesh": {"data": 2}}, r"run\.steps=240: not a multiple of .*local_steps=7"),
    (
        {"optimizer": {"local_steps": 8, "ema_decay": 0.9}, "mesh": {"data": 2}},
        r"optimizer\.ema_decay=0\.9: not with optimizer\.local_steps=8",
    ),
    (
        {"optimizer": {"local_steps": 8, "offload": True}, "mesh": {"data": 2}},
        r"optimizer\.offload=True: not with optimizer\.local_steps=8",
    ),
    ({"optimizer": {"outer_learning_rate": 0.0}}, r"optimizer\.outer_learning_rate=0\.0: must be positive"),
    ({"optimizer": {"outer_momentum": 1.0}}, r"optimizer\.outer_momentum=1\.0: .*below 1"),
]


@pytest.mark.parametrize(("branches", "message"), MISTAKES)
def test_a_mistake_is_named(branches, message):
    with pytest.raises(UserError, match=message):
        changed(**branches)


def test_a_mesh_that_is_decided_later_is_checked_then():
    experiment = changed(mesh={"data": -1}, optimizer={"local_steps": 8})
    assert on(experiment, 4, "cpu", "float32").mesh == MeshConfig(data=4)
    with pytest.raises(UserError, match=r"optimizer\.local_steps=8: .* mesh\.data=1"):
        on(experiment, 1, "cpu", "float32")
