"""The training step: what a batch's split, a mesh, a bad number or a key may change, and what not.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.config import ModelConfig
from model.weights import bind
from tpu.mesh import make_mesh
from train.config import DataConfig, Experiment, LossConfig, MeshConfig, OptimizerConfig
from train.data.batch import Batch
from train.program import Program, make_program
from train.resolve import resolve
from train.state import TrainState

ROWS, TOKENS, VOCAB = 12, 8, 20

BASE = Experiment(
    model=ModelConfig(vocab_size=VOCAB, layers=2, embed_dim=8, heads=4, kv_heads=2, layer_loop="scan"),
    data=DataConfig(tokenizer="bytes", bpe_vocab_size=VOCAB, context=TOKENS, batch_size=ROWS),
    # Without momentum and clipping, its state is the last gradient.
    optimizer=OptimizerConfig(name="sgd", schedule="constant", warmup_steps=0, beta1=0.0, clip_norm=0.0),
)


def changed(**branches: dict[str, Any]) -> Experiment:
    parts = {name: dataclasses.replace(getattr(BASE, name), **fields) for name, fields in branches.items()}
    experiment = resolve(dataclasses.replace(BASE, **parts))
    experiment.model = experiment.model.placed("cpu", "float32")
    return experiment


def start(program: Program, seed: int = 0) -> TrainState:
    """A state with random weights, laid out as the program wants it; the optimizer's state is zero, as its own is."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = 0.4 * rng.normal(size=leaf.shape)
        return jax.device_put(jnp.asarray(values, leaf.dtype), leaf.sharding)

    def zero(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    abstract = program.abstract_state
    return TrainState(
        step=zero(abstract.step),
        weights=jax.tree.map(draw, abstract.weights),
        optimizer_state=jax.tree.map(zero, abstract.optimizer_state),
        ema=jax.tree.map(draw, abstract.ema),
        key=jax.device_put(jax.random.key(7), abstract.key.sharding),
        skipped=zero(abstract.skipped),
        skipped_in_a_row=zero(abstract.skipped_in_a_row),
    )


def random_batch(seed: int = 0) -> Batch:
    """Two segments per row, loss weights between 0 and 3 that differ much from row to row."""
    rng = np.random.default_rng(seed)
    cut = rng.integers(1, TOKENS, (ROWS, 1))
    steps = np.arange(TOKENS)[None]
    tokens = rng.integers(0, VOCAB, (ROWS, TOKENS + 1)).astype(np.int32)
    ragged = (
        rng.random((ROWS, TOKENS)) * (steps < rng.integers(1, TOKENS + 1, (ROWS, 1))) * rng.integers(1, 4, (ROWS, 1))
    )
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_weights=ragged.astype(np.float32),
        segments=(1 + (steps >= cut)).astype(np.int32),
        positions=np.where(steps < cut, steps, steps - cut).astype(np.int32),
    )


def copied(tree: Any) -> Any:
    """On the host, for what is given to a step is donated."""
    return jax.tree.map(lambda leaf: np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf), tree)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def assert_close(found: Any, wanted: Any, tolerance: float) -> None:
    """Equal to `tolerance` of the largest element of all arrays."""
    largest = max(np.abs(y).max() for y in jax.tree.leaves(wanted))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path))


def assert_same_bits(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(copied(a)), jax.tree.leaves(copied(b)), strict=True):
        assert x.tobytes() == y.tobytes()


def gradient_and_metrics(experiment: Experiment, mesh: jax.sharding.Mesh, batch: Batch) -> tuple[Any, dict[str, float]]:
    """Of one step from the start."""
    with jax.set_mesh(mesh):
        program = make_program(experiment, mesh)
        state, metrics = program.step(start(program), batch, {})
    gradient = copied(optax.tree.get(state.optimizer_state, "trace"))
    return gradient, {name: value.item() for name, value in metrics.items()}


@pytest.fixture(scope="module")
def whole(one_device) -> tuple[Any, dict[str, float]]:
    return gradient_and_metrics(changed(), one_device, random_batch())


# What never changes the gradient


@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_micro_batches_give_the_gradient_of_the_batch(one_device, whole, accumulation):
    experiment = changed(optimizer={"accumulation": accumulation})
    gradient, metrics = gradient_and_metrics(experiment, one_device, random_batch())
    assert_close(gradient, whole[0], 1e-6)
    assert metrics == pytest.approx(whole[1], rel=1e-6)


def test_the_gradient_is_that_of_the_weighted_mean(one_device, whole):
    """By the definition, with a whole batch's logits."""
    from model.place import Place

    batch = random_batch()
    with jax.set_mesh(one_device):
        program = make_program(changed(), one_device)
        weights = start(program).weights

        def mean(weights: Any) -> jax.Array:
            model = bind(program.graphdef, weights)
            logits = model.head(model(batch["tokens"], Place(batch["segments"], batch["positions"]))[0])
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
            return jnp.sum(nll * batch["loss_weights"]) / batch["loss_weights"].sum()

        loss, gradient = jax.jit(jax.value_and_grad(mean))(weights)
    assert whole[1]["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert whole[1]["nll"] == pytest.approx(float(loss), rel=1e-6)
    assert whole[1]["loss_tokens"] == pytest.approx(float(batch["loss_weights"].sum()))
    assert_close(whole[0], gradient, 1e-6)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient)))
    assert whole[1]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_weights_and_moments_are_cut_along_the_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    experiment = changed(mesh={"data": 2, "fsdp": 2, "tensor": 2}, optimizer={"name": "adamw", "ema_decay": 0.5})
    with jax.set_mesh(mesh):
        program = make_program(experiment, mesh)
        state, _ = program.step(start(program), random_batch(), {})
    adam = state.optimizer_state[0]
    for tree in (state.weights, adam.mu, adam.nu, state.ema):
        up = tree["stack"]["groups"]["layer_0"]["mlp"]["up"]["kernel"]  # [layers, embed, mlp]
        assert {shard.data.shape for shard in up.addressable_shards} == {(2, 4, 16)}
        embedding = tree["embedding"]["embedding"]  # [vocab, embed]
        assert {shard.data.shape for shard in embedding.addressable_shards} == {(VOCAB, 2)}


# Numbers that are not finite


@pytest.fixture(scope="module")
def adam(one_device) -> Program:
    """A program whose every part of the state moves."""
    optimizer = {"name": "adamw", "learning_rate": 0.01, "schedule": "linear", "warmup_steps": 4, "ema_decay": 0.9}
    with jax.set_mesh(one_device):
        return make_program(changed(optimizer=optimizer, model={"residual_dropout": 0.3}), one_device)


def with_bad_loss_weight(state: TrainState, value: float) -> tuple[TrainState, Batch]:
    batch = random_batch()
    batch["loss_weights"][3, 0] = value
    return state, batch


def with_bad_weight(state: TrainState, value: float) -> tuple[TrainState, Batch]:
    scale = state.weights["final_norm"]["scale"]
    weights = state.weights | {"final_norm": state.weights["final_norm"] | {"scale": scale.at[0].set(value)}}
    return state._replace(weights=weights), random_batch()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("harm", [with_bad_loss_weight, with_bad_weight])
def test_a_bad_number_skips_the_update_and_is_counted(one_device, adam, harm, value):
    with jax.set_mesh(one_device):
        state, _ = adam.step(start(adam), random_batch(1), {})
        state, batch = harm(state, value)
        before = copied(state)
        for bad in (1, 2):
            state, metrics = adam.step(state, batch, {})
            assert not np.isfinite(metrics["loss"])
            assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (bad, bad)
    for field in ("weights", "optimizer_state", "ema", "key"):
        assert_same_bits(getattr(state, field), getattr(before, field))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (3, 2, 2)


def test_a_gradient_too_large_to_measure_is_skipped(one_device, adam):
    """The loss is finite here; the norm of its gradient is not."""
    with jax.set_mesh(one_device):
        state = start(adam)
        # Logits of about 1e17, from a table of 1e-6: its gradient is about 1e23, and the square of that is infinite.
        norm, table = state.weights["final_norm"], state.weights["embedding"]["embedding"]
        huge = norm | {"scale": norm["scale"] * 1e23}
        weights = state.weights | {"final_norm": huge, "embedding": {"embedding": table * 1e-6}}
        state = state._replace(weights=weights)
        before = copied(state.weights)
        state, metrics = adam.step(state, random_batch(), {})
    assert 1e15 < metrics["loss"] < np.inf
    assert not np.isfinite(metrics["grad_norm"])
    assert int(metrics["skipped"]) == 1
    assert_same_bits(state.weights, before)


def test_a_good_step_ends_the_row_and_the_schedule_counts_good_steps(one_device, adam):
    good, bad = random_batch(), with_bad_loss_weight(None, np.nan)[1]
    rates, rows = [], []
    with jax.set_mesh(one_device):
        state = start(adam)
        for batch in (good, bad, bad, good, bad, good):
            state, metrics = adam.step(state, batch, {})
            rates.append(metrics["learning_rate"].item())
            rows.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
    assert rows == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 0)]
    np.testing.assert_allclose(rates, [0.0025, 0.005, 0.005, 0.005, 0.0075, 0.0075], rtol=1e-6)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (6, 3, 0)


# Keys, metrics, evaluation


def test_dropout_draws_anew_each_step_and_the_same_again(one_device, adam):
    def losses(steps: int, key: int) -> list[float]:
        state, found = start(adam)._replace(key=jax.random.key(key)), []
        for step in range(steps):
            state = state._replace(step=jnp.int32(step), weights=start(adam).weights)
            state, metrics = adam.step(state, random_batch(), {})
            found.append(metrics["loss"].item())
        return found

    with jax.set_mesh(one_device):
        first = losses(3, 0)
        assert len(set(first)) == 3
        assert losses(3, 0) == first
        assert losses(1, 1) != first[:1]


def test_the_metrics_of_an_adamw_step(one_device, adam):
    with jax.set_mesh(one_device):
        state = start(adam)
        before = copied(state.weights)
        state, metrics = adam.step(state, random_batch(), {})
        moved = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.weights)
    size = [np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree))) for tree in (moved, before)]
    assert metrics["update_ratio"] == pytest.approx(size[0] / size[1], rel=1e-4)
    assert all(value.shape == () for value in metrics.values())
    rise = (state.ema["final_norm"]["scale"] - start(adam).ema["final_norm"]["scale"]) / 0.9  # 1 - (1 + 0) / (10 + 0)
    np.testing.assert_allclose(
        rise, state.weights["final_norm"]["scale"] - start(adam).ema["final_norm"]["scale"], rtol=1e-4
    )


def test_evaluation_is_the_plain_likelihood_without_dropout(one_device, whole):
    experiment = changed(model={"residual_dropout": 0.5}, loss={"label_smoothing": 0.3, "z_loss": 0.1})
    with jax.set_mesh(one_device):
        program = make_program(experiment, one_device)
        told = program.evaluate(start(program).weights, random_batch(), {})
    assert told.sums["nll"] / told.weights["nll"] == pytest.approx(whole[1]["nll"], rel=1e-6)


def test_a_batch_without_anything_to_learn_is_no_division_by_zero(one_device, whole):
    batch = random_batch() | {"loss_weights": np.zeros((ROWS, TOKENS), np.float32)}
    gradient, metrics = gradient_and_metrics(changed(), one_device, batch)
    assert metrics["loss"] == 0
    assert metrics["skipped"] == 0
    assert {float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)} == {0.0}


def test_a_small_sum_of_weights_is_still_divided_by(one_device, whole):
    """Halving all weights again and again never changes the loss."""
    batch = random_batch()
    batch = batch | {"loss_weights": batch["loss_weights"] * np.float32(2.0**-10)}
    gradient, metrics = gradient_and_metrics(changed(), one_device, batch)
    assert metrics["loss"] == pytest.approx(whole[1]["loss"], rel=1e-6)
    assert_close(gradient, whole[0], 1e-6)


def test_the_state_is_donated_and_logits_are_never_whole(one_device):
    experiment = changed(model={"vocab_size": 501}, loss=dataclasses.asdict(LossConfig(chunk_tokens=ROWS)))
    with jax.set_mesh(one_device):
        program = make_program(experiment, one_device)
        text = program.step.lower(program.abstract_state, random_batch(), {}).as_text()
    sizes = {int(np.prod([int(n) for n in dims.split("x")])) for dims in re.findall(r"tensor<([\dx]+)xf32>", text)}
    assert ROWS * 501 in sizes
    assert ROWS * TOKENS * 501 not in sizes
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(program.abstract_state))


def test_init_draws_what_abstract_state_describes(one_device):
    optimizer = {"name": "muon", "ema_decay": 0.5}
    with jax.set_mesh(one_device):
        program = make_program(changed(optimizer=optimizer, model={"layers": 1}), one_device)
        state = program.init(jax.random.key(0), {})
    assert jax.tree.structure(state) == jax.tree.structure(program.abstract_state)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract_state), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
    assert_same_bits(state.ema, state.weights)
    assert (int(state.step), int(state.skipped)) == (0, 0)
