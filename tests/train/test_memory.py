"""Training with a memory: a copy from beyond the row, contiguous rows, resuming, meshes and micro-batches.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import jax
import numpy as np
import pytest

from model.config import ModelConfig
from model.place import Place
from model.weights import bind
from tests.runs import random_state, train_here
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.config import DataConfig, Experiment, MeshConfig, OptimizerConfig
from train.data import pipeline
from train.data.batch import Batch, text_layout
from train.data.corpus import load_corpus
from train.program import Program, make_program
from train.resolve import resolve
from train.state import TrainState

ROWS, TOKENS, PLACES, SYMBOLS = 32, 20, 8, 8
QUERY = 1 + PLACES * SYMBOLS  # after 0 and a token for every symbol at every place
ANSWER, FILLER = QUERY + PLACES, QUERY + PLACES + SYMBOLS


def document(rng: np.random.Generator) -> list[Batch]:
    """Three rows of each of B documents: 8 symbols in the first, which it asks for, and the third row asks for again.

    They lie 42 tokens before the third row's questions, and rows are of 20.
    """
    symbols = rng.integers(0, SYMBOLS, (ROWS, PLACES))
    tokens = np.full((ROWS, 3 * TOKENS), FILLER, np.int32)
    targets, weights = tokens.copy(), np.zeros(tokens.shape, np.float32)
    tokens[:, 0] = 0
    tokens[:, 1 : 1 + PLACES] = 1 + np.arange(PLACES) * SYMBOLS + symbols
    for start in (1 + PLACES, 2 * TOKENS + 3):
        asked = slice(start, start + PLACES)
        tokens[:, asked], targets[:, asked], weights[:, asked] = QUERY + np.arange(PLACES), ANSWER + symbols, 1.0
    segments = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(3 * TOKENS, dtype=np.int32), tokens.shape)
    whole = Batch(tokens=tokens, targets=targets, loss_weights=weights, segments=segments, positions=positions)
    return [jax.tree.map(lambda a: a[:, row * TOKENS : (row + 1) * TOKENS], whole) for row in range(3)]


def experiment(mesh: dict[str, int] | None = None, accumulation: int = 1, **model: Any) -> Experiment:
    fields = {"layers": 1, "embed_dim": 48, "heads": 2, "mlp_dim": 96, "init": "normal", "init_std": 0.2} | model
    found = resolve(
        Experiment(
            model=ModelConfig(vocab_size=FILLER + 1, **fields),
            data=DataConfig(
                tokenizer="bytes", bpe_vocab_size=FILLER + 1, context=TOKENS, batch_size=ROWS, contiguous=True
            ),
            optimizer=OptimizerConfig(
                learning_rate=3e-3, schedule="constant", warmup_steps=10, accumulation=accumulation, weight_decay=0.0
            ),
            mesh=MeshConfig(**(mesh or {})),
        )
    )
    return dataclasses.replace(found, model=found.model.placed("cpu", "float32"))


def accuracy_of_the_copy(program: Program, weights: Any, documents: int = 3, forget: bool = False) -> float:
    """Share of the symbols asked for in third rows that the most likely token is; forget: without what went before."""

    @jax.jit
    def likeliest(batch: Batch, memory: Any) -> tuple[jax.Array, Any]:
        model = bind(program.graphdef, weights)
        hidden, memory = model(batch["tokens"], Place(batch["segments"], batch["positions"]), memory)
        return model.head(hidden).argmax(-1), memory

    right, rng = [], np.random.default_rng(99)
    for _ in range(documents):
        memory = program.first_carried()
        for batch in document(rng):
            tokens, memory = likeliest(batch, program.first_carried() if forget else memory)
        right.append(np.asarray(tokens == batch["targets"])[batch["loss_weights"] > 0])
    return float(np.mean(right))


def train(program: Program, documents: int) -> TrainState:
    state, rng = program.init(jax.random.key(0), {}), np.random.default_rng(0)
    for _ in range(documents):
        for batch in document(rng):
            if batch["loss_weights"].any():
                state, _ = program.step(state, batch, {})
            elif state.carried:  # A row without a target: its memory alone matters.
                carried = program.evaluate(state.weights, batch, {}, state.carried).carried
                state = state._replace(carried=carried)
    return state


MEMORIES = {
    "Transformer-XL": {"memory": 2 * TOKENS},
    "kNN": {"pattern": ("knn",), "positions": "none", "knn_memory": 2 * TOKENS, "knn_neighbours": 4},
    "linear": {"pattern": ("linear",), "memory": 1},
    "gated linear": {"pattern": ("gated_linear",), "memory": 1},
}


@pytest.mark.parametrize("name", ["Transformer-XL", "kNN"])
def test_a_copy_from_beyond_the_row(name, one_device):
    """From chance, 1/8, to 95 % and more, and by the memory alone."""
    with jax.set_mesh(one_device):
        program = make_program(experiment(**MEMORIES[name]), one_device)
        weights = train(program, 110).weights
        assert accuracy_of_the_copy(program, weights) >= 0.95
        assert accuracy_of_the_copy(program, weights, forget=True) < 0.25
        assert accuracy_of_the_copy(program, program.init(jax.random.key(0), {}).weights) < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MEMORIES, "none"])
def test_a_copy_from_beyond_the_row_after_a_longer_run(name, one_device):
    with jax.set_mesh(one_device):
        program = make_program(experiment(**MEMORIES.get(name, {})), one_device)
        found = accuracy_of_the_copy(program, train(program, 300).weights, 20)
        print(f"{name}: {found:.3f} of the symbols")
        assert found < 0.2 if name == "none" else found >= 0.95


def steps(found: Experiment, mesh: jax.sharding.Mesh, count: int = 4) -> tuple[list[float], Any]:
    """Losses of some steps from one set of weights, and the memory after them."""
    with jax.set_mesh(mesh):
        program = make_program(found, mesh)
        state, losses, rng = random_state(program), [], np.random.default_rng(5)
        for batch in (document(rng) + document(rng))[:count]:
            batch = batch | {"loss_weights": np.ones_like(batch["loss_weights"])}
            state, metrics = program.step(state, batch, {})
            losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, state.carried)


MIXED = {"pattern": ("global", "knn", "gated_linear"), "layers": 3, "memory": 30, "knn_memory": 25}


@pytest.mark.parametrize("other", [{"accumulation": 4}, {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}])
def test_neither_micro_batches_nor_the_mesh_change_what_is_remembered(other, one_device):
    losses, memory = steps(experiment(**MIXED), one_device)
    found = experiment(**MIXED, **other)
    losses_of_other, memory_of_other = steps(found, make_mesh(found.mesh, jax.devices()[: 8 if "mesh" in other else 1]))
    np.testing.assert_allclose(losses_of_other, losses, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(memory_of_other), jax.tree.leaves(memory), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)
    assert any(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(memory.layers))


def test_a_step_that_is_left_out_leaves_the_memory(one_device):
    with jax.set_mesh(one_device):
        program = make_program(experiment(memory=8), one_device)
        state, rng = random_state(program), np.random.default_rng(0)
        first, second, _ = document(rng)
        state, _ = program.step(state, first, {})
        before = jax.tree.map(np.asarray, state.carried)
        bad = second | {"loss_weights": np.full_like(second["loss_weights"], np.nan)}
        state, metrics = program.step(state, bad, {})
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state.carried), before)


def contiguous(corpus_file: Any, **data: Any) -> DataConfig:
    fields = {"sources": (str(corpus_file),), "tokenizer": "bytes", "bpe_vocab_size": 257, "context": 64}
    return DataConfig(**fields, **{"batch_size": 4, "holdout": 0.2, "contiguous": True} | data)


def test_rows_go_on_from_batch_to_batch(corpus_file):
    """The tokens of a row of consecutive batches are a run of the stream, with its positions there."""
    data = contiguous(corpus_file)
    corpus = load_corpus(data)
    rows = len(corpus.train[0])
    lane = rows // 4
    batches = pipeline.train_batches(corpus, data, 3)
    found = [next(batches) for _ in range(2 * lane)]
    batches.close()
    seen: list[bytes] = []
    for epoch in (found[:lane], found[lane:]):
        seen.append(b"".join(sorted(row.tobytes() for batch in epoch for row in batch["tokens"])))
        breaks = 0
        for batch, after in itertools.pairwise(epoch):
            goes_on = (after["positions"][:, 0] == batch["positions"][:, -1] + 1) | (after["positions"][:, 0] == 0)
            joined = batch["targets"][:, -1] == after["tokens"][:, 0]
            breaks += int((~(goes_on & joined)).sum())
        assert breaks <= 1, "where the circle closes"
    assert seen[0] == seen[1], "an epoch is all of the rows"
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(found[:lane], found[lane:], strict=True))
    again = pipeline.train_batches(corpus, data, 3, start_step=lane + 2, rows=(1, 3))
    np.testing.assert_array_equal(next(again)["tokens"], found[lane + 2]["tokens"][[1, 3]])
    again.close()


def test_held_out_rows_go_on_and_are_all_there(corpus_file):
    data = contiguous(corpus_file)
    corpus = load_corpus(data)
    layout = text_layout(4, data.context, 257)
    batches = list(pipeline.held_out_batches(corpus, data, layout, 4))
    plain = list(pipeline.held_out_batches(corpus, dataclasses.replace(data, contiguous=False), layout, 4))
    rows = [sorted(row.tobytes() for batch in found for row in batch["tokens"]) for found in (batches, plain)]
    assert rows[0] == rows[1]
    for batch, after in itertools.pairwise(batches):
        real = after["loss_weights"][:, 0] > 0
        np.testing.assert_array_equal(batch["targets"][real, -1], after["tokens"][real, 0])


def test_pretraining_with_a_memory_resumes_bitwise(micro, tmp_path, capsys):
    """Eight steps at once, and four and four: the same loss, held-out loss and memory."""

    def run(name: str, count: int) -> list[dict[str, Any]]:
        found = micro(
            model={"memory": 32, "residual_dropout": 0.0},
            data={"contiguous": True},
            run={"steps": count, "save_every": 4},
        )
        assert train_here(found, tmp_path / name) == 0
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    whole = run("whole", 8)
    run("parts", 4)
    parts = run("parts", 8)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (whole, parts)]
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]
    evals = [[line["eval"]["loss"] for line in lines if "eval" in line][-1] for lines in (whole, parts)]
    assert evals[0] == evals[1]
    assert (tmp_path / "whole" / "checkpoints" / "8" / "carried").is_dir()
    assert "attention: chunked; there are no flash kernels for CPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("branches", "word"),
    [
        ({"model": {"memory": 8}}, "data.contiguous"),
        ({"data": {"contiguous": True}, "model": {"positions": "learned"}}, "data.contiguous"),
        ({"data": {"contiguous": True, "weights": (1.0,)}}, "data.weights"),
        (
            {"model": {"memory": 8}, "data": {"contiguous": True}, "optimizer": {"local_steps": 2}},
            "optimizer.local_steps",
        ),
        ({"model": {"memory": 8}, "data": {"contiguous": True}, "mesh": {"stage": 2}}, "mesh.stage"),
        ({"model": {"pattern": ("linear",)}, "mesh": {"sequence": 2}}, "model.pattern"),
        ({"model": {"positions": "alibi"}, "mesh": {"sequence": 2}}, "model.positions"),
    ],
)
def test_what_cannot_be_is_refused(branches, word, micro):
    with pytest.raises(UserError, match=word):
        micro(**branches)


def test_too_few_rows_for_the_lanes(corpus_file):
    with pytest.raises(UserError, match=r"data\.batch_size=4000"):
        load_corpus(contiguous(corpus_file, batch_size=4000))
