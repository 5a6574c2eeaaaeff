"""The router's losses against closed forms, over micro-batches, and what balancing does to a run.

Legend: B rows, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.config import ModelConfig
from model.moe import Routing
from tpu.errors import UserError
from train.config import DataConfig, Experiment, LossConfig, MeshConfig, OptimizerConfig, RunConfig
from train.data.batch import Batch
from train.optimize.balance import balance_figures, balance_loss, loads, rebalanced, router_z_loss
from train.program import make_program
from train.resolve import resolve
from train.state import TrainState

ROWS, TOKENS, VOCAB = 32, 16, 20


def routing(logits: np.ndarray, chosen: np.ndarray) -> dict[str, Routing]:
    """The sums for one mixture: logits [N, E], chosen [N, E]."""
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    sums = chosen.sum(0), shares.sum(0), (np.log(np.exp(logits).sum(-1)) ** 2).sum(), -(shares * np.log(shares)).sum()
    return {"layer_0": Routing(*(jnp.asarray(s, jnp.float32)[None] for s in (*sums, 0.0, len(logits))))}


def test_both_losses_have_their_closed_forms():
    uniform = routing(np.full((6, 4), 1.0), np.eye(4)[[0, 1, 2, 3, 0, 1]])
    assert balance_loss(uniform, loads(uniform), jnp.float32(6)) == pytest.approx(1)
    assert router_z_loss(uniform, jnp.float32(6)) == pytest.approx((1 + np.log(4)) ** 2)
    assert balance_figures(uniform)["router_entropy"] == pytest.approx(np.log(4))
    assert balance_figures(uniform)["expert_load"] == pytest.approx(2 / 1.5)
    one = routing(np.array([[30.0, 0, 0, 0]] * 6), np.eye(4)[[0] * 6])
    assert balance_loss(one, loads(one), jnp.float32(6)) == pytest.approx(4)
    assert router_z_loss(one, jnp.float32(6)) == pytest.approx(900)
    assert balance_figures(one)["expert_load"] == pytest.approx(4)
    rng = np.random.default_rng(0)
    logits, chosen = rng.normal(size=(50, 4)), rng.random((50, 4)) < 0.5
    some = routing(logits, chosen)
    share, mean = chosen.sum(0) / chosen.sum(), (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean(0)
    assert balance_loss(some, loads(some), jnp.float32(50)) == pytest.approx(4 * (share * mean).sum(), rel=1e-5)


def test_the_bias_moves_against_the_load():
    found = {"layer_1": Routing(jnp.array([[6.0, 0, 3, 3], [1, 1, 1, 9]]), *[jnp.zeros(2)] * 5)}
    old = {"stack": {"groups": {"layer_1": {"moe": {"balance_bias": jnp.full((2, 4), 0.5), "router": 1}}}}}
    new = rebalanced(old | {"head": 2}, old, found, 0.1)
    assert new["head"] == 2
    moe = new["stack"]["groups"]["layer_1"]["moe"]
    np.testing.assert_allclose(moe["balance_bias"], [[0.4, 0.6, 0.5, 0.5], [0.6, 0.6, 0.6, 0.4]])
    assert moe["router"] == 1


def experiment(model: dict[str, Any] | None = None, **branches: dict[str, Any]) -> Experiment:
    shape = {"vocab_size": VOCAB, "layers": 2, "embed_dim": 16, "heads": 2, "mlp_dim": 24, "mlp_bias": False}
    optimizer = {"name": "sgd", "schedule": "constant", "warmup_steps": 0, "beta1": 0.0, "clip_norm": 0.0}
    found = resolve(
        Experiment(
            model=ModelConfig(**shape, experts=8, layer_loop="scan", **(model or {})),
            data=DataConfig(tokenizer="bytes", bpe_vocab_size=VOCAB, context=TOKENS, batch_size=ROWS),
            optimizer=OptimizerConfig(**optimizer | branches.get("optimizer", {})),
            loss=LossConfig(**branches.get("loss", {})),
        )
    )
    found.model = found.model.placed("cpu", "float32")
    return found


def batch(seed: int) -> Batch:
    """Skewed tokens, two segments, and padding at the end of each row."""
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.geometric(0.3, (ROWS, TOKENS + 1)), VOCAB - 1).astype(np.int32)
    steps = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (ROWS, TOKENS))
    real = steps < rng.integers(TOKENS // 2, TOKENS, (ROWS, 1))
    return Batch(
        tokens=np.where(real, tokens[:, :-1], 0),
        targets=tokens[:, 1:],
        loss_weights=(real * rng.integers(1, 4, (ROWS, 1))).astype(np.float32),
        segments=np.where(real, 1 + (steps >= 5), 0).astype(np.int32),
        positions=np.where(steps >= 5, steps - 5, steps),
    )


def with_decided_routers(state: TrainState) -> TrainState:
    """Routers that clearly prefer some experts, as small random ones do not."""
    routers = lambda path, w: 30 * w if path[-1].key == "router" else w  # noqa: E731
    return state._replace(weights=jax.tree_util.tree_map_with_path(routers, state.weights))


def one_step(found: Experiment, mesh: jax.sharding.Mesh, rows: Batch) -> tuple[TrainState, dict[str, float]]:
    with jax.set_mesh(mesh):
        program = make_program(found, mesh)
        state, metrics = program.step(with_decided_routers(program.init(jax.random.key(0), {})), rows, {})
    return state, {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize("model", [{}, {"capacity_factor": 0.9}])
def test_micro_batches_change_no_loss_no_gradient_and_no_figure(model, one_device):
    weights = {"balance_loss": 0.5, "router_z_loss": 0.1}
    model = {**model, "router_bias": True}
    whole, figures = one_step(experiment(model, loss=weights), one_device, batch(0))
    parts, same = one_step(experiment(model, loss=weights, optimizer={"accumulation": 4}), one_device, batch(0))
    assert figures == pytest.approx(same, rel=1e-5)
    assert 0 < figures["dropped_share"] < 0.5 if model.get("capacity_factor") else figures["dropped_share"] == 0
    for a, b in zip(jax.tree.leaves(whole.weights), jax.tree.leaves(parts.weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    added = 0.5 * figures["balance_loss"] + 0.1 * figures["router_z_loss"]
    assert figures["loss"] == pytest.approx(figures["nll"] + added, rel=1e-5)
    assert 1 < figures["expert_load"] < 4


def test_the_bias_of_a_frozen_router_stays(one_device):
    found = experiment({"router_bias": True}, optimizer={"frozen": (r"^stack\b",)})
    with jax.set_mesh(one_device):
        program = make_program(found, one_device)
        state = program.init(jax.random.key(0), {})
        before = jax.tree.map(np.asarray, state.weights)
        after = jax.tree.map(np.asarray, program.step(state, batch(0), {})[0].weights)
    for a, b in zip(jax.tree.leaves(before["stack"]), jax.tree.leaves(after["stack"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(before["embedding"]["embedding"], after["embedding"]["embedding"])


def test_padding_counts_nowhere(one_device):
    """Other tokens in the padding change nothing at all."""
    rows = batch(1)
    other = rows | {"tokens": np.where(rows["segments"] > 0, rows["tokens"], 7)}
    found = experiment({"capacity_factor": 1.0}, loss={"balance_loss": 0.5, "router_z_loss": 0.1})
    (one, figures), (two, same) = one_step(found, one_device, rows), one_step(found, one_device, other)
    assert figures == pytest.approx(same, rel=1e-6)
    gradients = (optax.tree.get(state.optimizer_state, "trace") for state in (one, two))
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def chain(seed: int) -> Batch:
    """Tokens that mostly follow from the one before."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (ROWS, TOKENS + 1)).astype(np.int32)
    for t in range(TOKENS):
        tokens[:, t + 1] = np.where(rng.random(ROWS) < 0.8, (3 * tokens[:, t] + 1) % VOCAB, tokens[:, t + 1])
    ones = np.ones((ROWS, TOKENS), np.int32)
    steps = ones.cumsum(1, dtype=np.int32) - 1
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_weights=ones.astype(np.float32),
        segments=ones,
        positions=steps,
    )


def run(found: Experiment, mesh: jax.sharding.Mesh, steps: int) -> tuple[dict[str, float], TrainState]:
    """Means of the figures of the last ten steps, and the last state."""
    with jax.set_mesh(mesh):
        program = make_program(found, mesh)
        state, figures = with_decided_routers(program.init(jax.random.key(1), {})), []
        for step in range(steps):
            state, metrics = program.step(state, chain(step), {})
            figures.append({name: value.item() for name, value in metrics.items()})
    assert figures[0]["nll"] > 2.9
    return {name: float(np.mean([f[name] for f in figures[-10:]])) for name in figures[0]}, state


def test_balancing_evens_the_load_of_a_run_that_learns(one_device):
    """Against the same run without it: by the loss, and by the bias alone."""
    adam = {"name": "adamw", "beta1": 0.9, "learning_rate": 1e-2}
    rate = {"router_bias_rate": 0.005, "no_decay": (), "weight_decay": 0.5}
    alone, _ = run(experiment(optimizer=adam), one_device, 60)
    by_loss, _ = run(experiment(optimizer=adam, loss={"balance_loss": 0.1}), one_device, 60)
    by_bias, state = run(experiment({"router_bias": True, "router": "sigmoid"}, optimizer=adam | rate), one_device, 60)
    for figures in (alone, by_loss, by_bias):
        assert figures["nll"] < 1.6
    assert by_loss["expert_load"] - 1 < 0.8 * (alone["expert_load"] - 1)
    assert by_bias["expert_load"] - 1 < 0.8 * (alone["expert_load"] - 1)
    assert by_loss["balance_loss"] < alone["balance_loss"]
    bias = np.asarray(state.weights["stack"]["groups"]["layer_0"]["moe"]["balance_bias"])
    steps = bias / 0.005  # Moved by whole steps and nothing else, weight decay least of all.
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-2)
    assert np.abs(bias).max() > 0


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ({"mesh": {"expert": 3}, "data": {"batch_size": 12}}, "model.experts=8: not a multiple of mesh.expert = 3"),
        ({"mesh": {"tensor": 2}, "model": {"expert_dim": 25}}, "model.expert_dim=25: not a multiple of mesh.tensor"),
        (
            {"mesh": {"sequence": 2}, "model": {"capacity_factor": 1.0}},
            "model.capacity_factor=1.0: counts the tokens of whole rows, and mesh.sequence=2 cuts them",
        ),
        ({"model": {"experts": 0}, "loss": {"balance_loss": 0.1}}, "loss.balance_loss=0.1: has no effect"),
        ({"loss": {"router_z_loss": -1.0}}, "loss.router_z_loss=-1.0: must be at least 0"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(branches, message):
    base = Experiment(
        model=ModelConfig(vocab_size=300, layers=2, embed_dim=24, heads=2, experts=8, mlp_bias=False),
        data=DataConfig(context=24, batch_size=8),
        run=RunConfig(steps=200),
        mesh=MeshConfig(),
    )
    parts = {name: dataclasses.replace(getattr(base, name), **fields) for name, fields in branches.items()}
    with pytest.raises(UserError) as raised:
        resolve(dataclasses.replace(base, **parts))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
