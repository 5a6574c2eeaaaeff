"""The contract of objectives carries what is to come: a preference with a frozen reference, a student of a teacher of
another shape, two models that are trained at once. Meshes, adapters and micro-batches change no loss and no gradient.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.config import ModelConfig
from model.place import Place
from tests.runs import drawn, random_state, train_here
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.adapter.frozen import load_frozen, open_frozen
from train.config import AdapterConfig, DataConfig, Experiment, MeshConfig, ObjectiveConfig, OptimizerConfig
from train.data.batch import Batch, Layout, text_layout
from train.data.corpus import Corpus
from train.gradients import sums_of
from train.objectives import next_token
from train.objectives.bound import Bound
from train.objectives.next_token import language_sums
from train.objectives.objective import Objective, Role, Sums, perplexity, token_weights
from train.objectives.roles import models
from train.objectives.table import OBJECTIVES
from train.program import Program, make_program
from train.resolve import resolve
from train.restore import open_checkpoint
from train.state import Plan, Told

ROWS, TOKENS, VOCAB, BETA = 8, 8, 20, 0.5
TEACHER = ModelConfig(vocab_size=VOCAB, layers=1, embed_dim=24, heads=2, mlp_dim=20).resolved()


# A preference (DPO, arXiv:2305.18290, equation 7), with a term of its own that keeps the chosen answer likely


def pair_layout(experiment: Experiment) -> Layout:
    rows, tokens, vocab_size = experiment.data.batch_size, experiment.data.context, experiment.model.vocab_size
    found = text_layout(rows, tokens, vocab_size)
    return found | {f"rejected_{name}": found[name] for name in ("tokens", "targets", "loss_weights")}


def pair_weights(batch: Batch) -> dict[str, jax.Array]:
    pairs = (batch["loss_weights"].sum(1) > 0).sum()
    return {"preference": pairs, "margin": pairs, "likelihood": batch["loss_weights"].sum()}


def answers(model: Bound, batch: Batch, rejected: str = "") -> jax.Array:
    """The log-probability of every answer: [B]."""
    hidden, _ = model(batch[f"{rejected}tokens"], Place(batch["segments"], batch["positions"]))
    log = jax.nn.log_softmax(model.head(hidden))
    each = jnp.take_along_axis(log, batch[f"{rejected}targets"][..., None], -1)[..., 0]
    return (each * batch[f"{rejected}loss_weights"]).sum(1)


def preference_sums(
    bound: Mapping[str, Bound], batch: Batch, experiment: Experiment, keys: jax.Array | None, carried: Any
) -> Sums:
    chosen = answers(bound["policy"], batch)
    ratios = [
        chosen - answers(bound["reference"], batch),
        answers(bound["policy"], batch, "rejected_") - answers(bound["reference"], batch, "rejected_"),
    ]
    there, margin = batch["loss_weights"].sum(1) > 0, ratios[0] - ratios[1]
    loss = jnp.where(there, jax.nn.softplus(-BETA * margin), 0.0).sum()
    return Sums({"preference": loss, "likelihood": -chosen.sum()}, {"preference": loss, "margin": margin.sum()})


def pairs(experiment: Experiment, tokenizer: Any) -> Corpus:
    """Rows of text, which are preferred to the same tokens the other way round."""
    found = next_token.corpus(experiment, tokenizer)

    def change(number: int, row: Batch) -> Batch:
        turned = {name: row[name][::-1].copy() for name in ("tokens", "targets", "loss_weights")}
        return row | {f"rejected_{name}": array for name, array in turned.items()}

    return dataclasses.replace(found, train_change=change, held_out_change=change)


PREFERENCE = Objective(
    roles=lambda experiment: {"policy": Role(), "reference": Role(trained=False, starts_from="run.start")},
    check=lambda experiment: None,
    corpus=pairs,
    layout=pair_layout,
    weights=pair_weights,
    sums=preference_sums,
    figures=lambda means, corpus: {"loss": means["preference"], "margin": means["margin"]},
)


# A student of a teacher of another shape (arXiv:1503.02531), which learns the text besides


def student_sums(
    bound: Mapping[str, Bound], batch: Batch, experiment: Experiment, keys: jax.Array | None, carried: Any
) -> Sums:
    place = Place(batch["segments"], batch["positions"])
    hidden = {name: model(batch["tokens"], place)[0] for name, model in bound.items()}
    known = jax.nn.log_softmax(bound["teacher"].head(hidden["teacher"]))
    found = jax.nn.log_softmax(bound["student"].head(hidden["student"]))
    divergence = (jnp.exp(known) * (known - found)).sum(-1)  # [B, T]
    there = batch["segments"] > 0
    loss, nll = language_sums(bound["student"], hidden["student"], batch, experiment)
    return Sums({"loss": loss, "divergence": jnp.where(there, divergence, 0.0).sum()}, {"nll": nll})


STUDENT = Objective(
    roles=lambda experiment: {"student": Role(), "teacher": Role(trained=False, model=TEACHER)},
    check=lambda experiment: None,
    corpus=next_token.corpus,
    layout=next_token.layout,
    weights=lambda batch: token_weights(batch) | {"divergence": (batch["segments"] > 0).sum()},
    sums=student_sums,
    figures=perplexity,
)


# Two models that are trained at once


def both_sums(
    bound: Mapping[str, Bound], batch: Batch, experiment: Experiment, keys: jax.Array | None, carried: Any
) -> Sums:
    each = {name: next_token.decoder_sums(model, batch, experiment, keys, None) for name, model in bound.items()}
    return Sums({name: sums.trained["loss"] for name, sums in each.items()}, {"nll": each["first"].told["nll"]})


BOTH = Objective(
    roles=lambda experiment: {"first": Role(), "second": Role(model=TEACHER)},
    check=lambda experiment: None,
    corpus=next_token.corpus,
    layout=next_token.layout,
    weights=lambda batch: {name: batch["loss_weights"].sum() for name in ("first", "second", "nll")},
    sums=both_sums,
    figures=perplexity,
)

TOYS = {"preference": PREFERENCE, "student": STUDENT, "both": BOTH}


@pytest.fixture(autouse=True)
def toys(monkeypatch) -> None:
    for name, objective in TOYS.items():
        monkeypatch.setitem(OBJECTIVES, name, objective)


def experiment_of(name: str, mesh: dict[str, int], adapter: str, accumulation: int) -> Experiment:
    given = Experiment(
        model=ModelConfig(vocab_size=VOCAB, layers=1, embed_dim=16, heads=4, kv_heads=2),
        data=DataConfig(tokenizer="bytes", bpe_vocab_size=1, context=TOKENS, batch_size=ROWS),
        objective=ObjectiveConfig(name=name),
        # Without momentum and clipping, its state is the last gradient.
        optimizer=OptimizerConfig(
            name="sgd", schedule="constant", warmup_steps=0, beta1=0.0, clip_norm=0.0, accumulation=accumulation
        ),
        mesh=MeshConfig(**mesh),
        adapter=AdapterConfig(adapter, ("attention", "mlp"), rank=2) if adapter == "lora" else AdapterConfig(),
    )
    found = resolve(given)
    found.model = found.model.placed("cpu", "float32")
    return found


def batch_of(experiment: Experiment) -> Batch:
    """Answers of very different lengths, and a row that is padding."""
    rng, steps = np.random.default_rng(0), np.arange(TOKENS, dtype=np.int32)[None]
    found = {}
    for name, field in OBJECTIVES[experiment.objective.name].layout(experiment).items():
        if name.endswith("loss_weights"):
            weights = (steps < rng.integers(1, TOKENS + 1, (ROWS, 1))) * rng.random((ROWS, TOKENS))
            found[name] = (weights * (np.arange(ROWS) != 5)[:, None]).astype(np.float32)
        elif name == "segments":
            found[name] = np.broadcast_to((np.arange(ROWS) != 5)[:, None], (ROWS, TOKENS)).astype(np.int32)
        elif name == "positions":
            found[name] = np.broadcast_to(steps, (ROWS, TOKENS))
        else:
            found[name] = rng.integers(0, VOCAB, field.shape).astype(field.dtype)
    return found


def one_step(experiment: Experiment) -> tuple[Any, dict[str, float], Program, Any]:
    """Gradient and figures of a step over random weights; the program, and the weights that it began with."""
    mesh = make_mesh(experiment.mesh, jax.devices()[: math.prod(experiment.mesh.sizes().values())])
    with jax.set_mesh(mesh):
        program = make_program(experiment, mesh)
        frozen = drawn(program.abstract_frozen, 1)
        state = random_state(program, 2)
        weights, before = jax.device_get((state.weights, frozen))
        whole = experiment.optimizer.accumulation == 1  # Evaluation knows no micro-batches.
        told = program.evaluate(state.weights, batch_of(experiment), frozen) if whole else Told({}, {})
        state, metrics = program.step(state, batch_of(experiment), frozen)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
    metrics |= {f"held-out {name}": total / told.weights[name] for name, total in told.sums.items()}
    gradient = jax.device_get(optax.tree.get(state.optimizer_state, "trace"))
    return gradient, {name: float(value) for name, value in metrics.items()}, program, (weights, before)


def plain_step(experiment: Experiment, weights: Any, frozen: Any) -> tuple[float, Any]:
    """Loss and gradient as one expression over the whole batch."""
    objective, batch = OBJECTIVES[experiment.objective.name], batch_of(experiment)
    plan = Plan(experiment, objective, models(experiment, objective.roles(experiment)), None, None, None)

    def loss(weights: Any) -> jax.Array:
        sums = sums_of(plan, weights, frozen, batch)
        return sum(total / objective.weights(batch)[name] for name, total in sums.trained.items())

    frozen = jax.tree.map(jnp.asarray, frozen)
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(weights))


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("name", TOYS)
def test_meshes_and_micro_batches_change_neither_loss_nor_gradient(name, adapter):
    if (name, adapter) == ("both", "lora"):
        with pytest.raises(UserError, match=r"^adapter.kind='lora': objective.name='both' trains 2 models, first, "):
            one_step(experiment_of(name, {}, adapter, 1))
        return
    wanted = None
    for mesh, accumulation in (({}, 1), ({"fsdp": 4, "tensor": 2}, 2)):
        gradient, figures, program, begun = one_step(experiment_of(name, mesh, adapter, accumulation))
        if wanted is None:
            loss, plain = plain_step(experiment_of(name, mesh, adapter, 1), *begun)
            assert figures["loss"] == pytest.approx(float(loss), rel=1e-5)
            wanted, first = plain, figures
        assert jax.tree.structure(gradient) == jax.tree.structure(wanted)
        for (path, x), y in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(wanted), strict=True):
            norm = np.linalg.norm(y)
            assert np.linalg.norm(x - y) <= 2e-5 * norm + 1e-8, (mesh, accumulation, jax.tree_util.keystr(path))
        assert figures == pytest.approx({name: first[name] for name in figures}, rel=2e-5, abs=2e-6)
    trained = {"preference": "policy", "student": "student"}.get(name)
    assert set(program.abstract_frozen) == (
        ({"reference"} if name == "preference" else {"teacher"} if name == "student" else set())
        | ({trained} if adapter == "lora" else set())
    )
    shapes = {leaf.shape for leaf in jax.tree.leaves(program.abstract_state)}
    assert ((VOCAB, TEACHER.embed_dim) in shapes) == (name == "both"), "frozen weights are no part of the state"


def test_a_policy_that_is_its_reference_prefers_nothing(one_device):
    """The loss of a pair is log 2, with an adapter that has learned nothing as without one."""
    for adapter in ("none", "lora"):
        experiment = experiment_of("preference", {}, adapter, 1)
        with jax.set_mesh(one_device):
            program = make_program(experiment, one_device)
            reference = drawn(program.abstract_frozen["reference"], 1)
            frozen = dict.fromkeys(program.abstract_frozen, reference)
            given = (jax.tree.map(jnp.copy, reference),) if adapter == "none" else ()
            state = program.init(jax.random.key(0), frozen, *given)
            told = program.evaluate(state.weights, batch_of(experiment), frozen)
        assert float(told.sums["preference"] / told.weights["preference"]) == pytest.approx(math.log(2), rel=1e-6)


def test_rows_of_a_rollout_are_handed_on_as_they_are(one_device, monkeypatch):
    """They are not cut into micro-batches, and the loss does not see them."""
    rows = {"tokens": jnp.arange(3 * TOKENS).reshape(3, TOKENS)}  # as many as no micro-batch divides

    def sums(bound: Any, batch: Batch, experiment: Experiment, keys: Any, carried: Any) -> Sums:
        assert carried is None
        return next_token.sums({"model": bound["model"]}, batch, experiment, keys, None)

    on_policy = next_token.OBJECTIVE._replace(sums=sums, collect=lambda: None, carried=lambda experiment: rows)
    monkeypatch.setitem(OBJECTIVES, "on_policy", on_policy)
    experiment = experiment_of("on_policy", {}, "none", 2)
    with jax.set_mesh(one_device):
        program = make_program(experiment, one_device)
        state = program.init(jax.random.key(0), {})
        state, metrics = program.step(state, batch_of(experiment), {})
    assert math.isfinite(metrics["loss"])
    np.testing.assert_array_equal(state.carried["tokens"], rows["tokens"])


def test_a_run_finds_its_reference_recognises_it_and_never_saves_it(micro, tmp_path):
    def run(path: Path, **changed: Any) -> None:
        assert train_here(micro(**changed), path) == 0

    run(tmp_path / "base", run={"steps": 2})
    preference = {"objective": {"name": "preference"}, "optimizer": {"accumulation": 1}}
    start = (str(tmp_path / "base"),)
    run(tmp_path / "dpo", **preference, run={"steps": 2, "start": start})
    run(tmp_path / "dpo", **preference, run={"steps": 3, "start": start})
    trained = open_checkpoint(tmp_path / "dpo")
    base = open_frozen(tmp_path / "base")
    (found,) = trained.frozen().values()
    (wanted,) = load_frozen({"": base}, {"": jax.tree.map(lambda w: w, found)}).values()
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    saved = {path.name for path in (tmp_path / "dpo" / "checkpoints" / "3").iterdir()}
    assert "frozen" not in saved
    run(tmp_path / "other", run={"steps": 3})
    with pytest.raises(UserError, match=r"dpo was trained with the checkpoint .*base.* and .*other.* is another"):
        run(tmp_path / "dpo", **preference, run={"steps": 4, "start": (str(tmp_path / "other"),)})
