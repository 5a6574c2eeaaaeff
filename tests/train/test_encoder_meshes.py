"""Encoders and encoder-decoders on eight devices compute what one device computes.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest

from model.config import ModelConfig
from tests.runs import random_state
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.config import DataConfig, Experiment, MeshConfig, ObjectiveConfig, OptimizerConfig
from train.data.batch import Batch
from train.data.text.masking import Masking
from train.data.text.packing import PackedRows
from train.data.text.span_corruption import SpanCorruption
from train.data.text.tokenizer import ByteTokenizer
from train.objectives.span_corruption import spans
from train.objectives.table import OBJECTIVES
from train.program import make_program
from train.resolve import resolve

ROWS, TOKENS, VOCAB = 16, 32, 20
BERT = {"kind": "encoder", "positions": "learned", "max_positions": TOKENS, "norm_order": "post", "token_types": 2}
T5 = {"kind": "encoder_decoder", "positions": "relative", "norm": "rmsnorm", "query_scalar": 1.0, "mlp_bias": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("masked", BERT | {"next_sentence": True, "layer_loop": "scan"}),
    "bert-dropout-stage": (
        "masked",
        BERT | {"residual_dropout": 0.3, "embedding_dropout": 0.2, "attention_dropout": 0.1},
    ),
    "classes": ("classification", BERT | {"head": "pooled", "labels": 3}),
    "span": ("span", BERT | {"head": "token", "labels": 2}),
    "t5": ("span_corruption", T5 | {"decoder_layers": 3, "activation": "geglu", "layer_loop": "scan"}),
    "t5-untied": ("span_corruption", T5 | {"tied_head": False, "residual_dropout": 0.3}),
}
MESHES = {"fsdp4-tensor2": {"fsdp": 4, "tensor": 2}, "stage2": {"stage": 2, "fsdp": 2, "tensor": 2}}


def experiment_of(case: str, mesh: dict[str, int]) -> Experiment:
    objective, fields = CASES[case]
    experiment = resolve(
        Experiment(
            model=ModelConfig(vocab_size=VOCAB, layers=2, embed_dim=16, heads=4, **fields),
            data=DataConfig(tokenizer="bytes", bpe_vocab_size=1, context=TOKENS, batch_size=ROWS),
            objective=ObjectiveConfig(name=objective),
            # Without momentum and clipping, its state is the last gradient.
            optimizer=OptimizerConfig(
                name="sgd", schedule="constant", warmup_steps=0, beta1=0.0, clip_norm=0.0, accumulation=2
            ),
            mesh=MeshConfig(**mesh),
        )
    )
    experiment.model = experiment.model.placed("cpu", "float32")
    return experiment


def batch_of(experiment: Experiment) -> Batch:
    rng = np.random.default_rng(0)
    stream = np.where(rng.random(ROWS * TOKENS - 9) < 0.1, 0, rng.integers(1, 15, ROWS * TOKENS - 9)).astype(np.uint16)
    rows = PackedRows(stream, TOKENS, 0, keep_last=True)
    name = experiment.objective.name
    if name == "span_corruption":
        change = SpanCorruption(0, *spans(experiment), VOCAB - 1, 0, 0)
    else:
        change = Masking(0, 0.3, VOCAB - 1, 15, 0, 0, (rows,) if experiment.model.next_sentence else ())
    batch = [change(i, rows[i]) for i in range(ROWS)]
    batch = {field: np.stack([row[field] for row in batch]) for field in batch[0]}
    first = np.zeros((ROWS, TOKENS), np.float32)
    first[:, 0] = rng.integers(1, 4, ROWS)
    if name == "classification":
        return batch | {"targets": rng.integers(0, 3, (ROWS, TOKENS)).astype(np.int32), "loss_weights": first}
    if name == "span":
        marks = np.eye(TOKENS, dtype=np.float32)[rng.integers(0, TOKENS, (ROWS, 2))].swapaxes(1, 2)
        return batch | {"targets": marks, "loss_weights": marks.mean(-1)}
    return batch


def one_step(experiment: Experiment, mesh: jax.sharding.Mesh) -> tuple[Any, dict[str, float]]:
    batch = batch_of(experiment)
    with jax.set_mesh(mesh):
        program = make_program(experiment, mesh)
        state, metrics = program.step(random_state(program), batch, {})
        gradient = jax.tree.map(np.asarray, optax.tree.get(state.optimizer_state, "trace"))
        figures = {f"held-out {name}": value for name, value in program.evaluate(state.weights, batch, {}).sums.items()}
    return gradient, {name: float(value) for name, value in (metrics | figures).items()}


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_give_the_loss_and_the_gradient_of_one(case, one_device):
    sizes = MESHES["stage2" if case.endswith("stage") else "fsdp4-tensor2"]
    wanted, wanted_metrics = one_step(experiment_of(case, {}), one_device)
    experiment = experiment_of(case, sizes)
    found, metrics = one_step(experiment, make_mesh(experiment.mesh))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        norm = np.linalg.norm(y.astype(np.float64))
        # A key's bias has no gradient but for rounding.
        assert np.linalg.norm(x.astype(np.float64) - y) <= 1e-5 * norm + 3e-7, jax.tree_util.keystr(path)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-5)
    assert metrics["grad_norm"] > 0.01


@pytest.mark.parametrize(("case", "mesh"), [("bert", {"sequence": 2}), ("t5", {"sequence": 2}), ("t5", {"stage": 2})])
def test_a_mesh_that_a_kind_does_not_have_is_refused(case, mesh):
    with pytest.raises(UserError, match=r"^mesh\.(sequence|stage)=2: not with model.kind="):
        experiment_of(case, mesh)


# Labelled records


def rows_of(tmp_path, objective: str, lines: list[str], labels: int = 3, **fields) -> Any:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(lines))
    given = Experiment(
        model=ModelConfig(vocab_size=257, labels=labels),
        data=DataConfig(sources=(str(path),), tokenizer="bytes", context=16, holdout=0.0, **fields),
        objective=ObjectiveConfig(name=objective),
    )
    return OBJECTIVES[objective].corpus(given, ByteTokenizer())


def test_a_records_label_is_put_where_the_loss_looks(tmp_path):
    found = rows_of(tmp_path, "classification", ['{"text": "good", "label": "b"}', '{"text": "bad", "label": "a"}'])
    assert found.labels == ("a", "b")
    row = found.train[0][0]
    assert row["tokens"].tolist() == [256, *b"good"] + [0] * 11
    assert (row["targets"][0], row["loss_weights"].tolist()) == (1, [1.0] + [0.0] * 15)
    assert row["segments"].tolist() == [1] * 5 + [0] * 11


def test_spans_are_found_by_characters_and_second_texts_have_their_type(tmp_path):
    line = '{"text": "aé cd ef", "question": "q?", "label": [3, 5]}'
    row = rows_of(tmp_path, "span", [line], pair_field="question").train[0][0]
    assert bytes(row["tokens"][1:10].tolist()).decode() == "aé cd ef"
    assert np.argwhere(row["targets"]).tolist() == [[5, 0], [6, 1]]  # é is two bytes
    assert row["loss_weights"][[5, 6]].tolist() == [0.5, 0.5]
    assert row["tokens"][10:13].tolist() == [256, *b"q?"]
    assert row["token_types"].tolist() == [0] * 10 + [1] * 3 + [0] * 3
    names = rows_of(tmp_path, "token_classification", ['{"text": "to Rome now", "label": [[3, 7, "place"]]}'])
    assert names.labels == ("", "place")
    assert names.train[0][0]["targets"].tolist() == [0] * 4 + [1] * 4 + [0] * 8


def test_an_answer_that_is_cut_off_weighs_nothing_and_is_counted(tmp_path):
    found = rows_of(tmp_path, "span", ['{"text": "0123456789abcdefgh", "label": [12, 17]}'])
    assert found.train[0][0]["loss_weights"].sum() == 0
    assert found.report["sources"][0]["passed_over"] == {"cut_records": 1, "cut_answers": 1}


def test_targets_are_shifted_by_one(tmp_path):
    row = rows_of(tmp_path, "sequence_to_sequence", ['{"text": "in", "label": "out"}'], target_context=6).train[0][0]
    assert row["inputs"].tolist()[:3] == [256, *b"in"]
    assert row["targets"].tolist() == [*b"out", 256, 0, 0]
    assert row["tokens"].tolist() == [256, *b"out", 0, 0]
    assert row["loss_weights"].tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("objective", "line", "message"),
    [
        ("classification", '{"text": "x", "label": 3}', "needs a name"),
        ("regression", '{"text": "x", "label": "3"}', "needs a number"),
        ("span", '{"text": "x", "label": [0, 2]}', "in characters of the text"),
        ("multi_label", '{"text": "x", "label": "a"}', "needs a list of names"),
        ("classification", '{"text": "x"}', "no field 'label'"),
    ],
)
def test_a_record_that_is_not_as_it_should_be_is_named(tmp_path, objective, line, message):
    with pytest.raises(UserError, match=rf"records.jsonl, line 2: .*{message}"):
        rows_of(tmp_path, objective, [f'{{"text": "x", "label": {GOOD[objective]}}}', line])


GOOD = {"classification": '"a"', "regression": "1", "span": "[0, 1]", "multi_label": '["a"]'}


def test_more_labels_than_the_model_has_are_an_error(tmp_path):
    lines = [f'{{"text": "x", "label": "{name}"}}' for name in "abcd"]
    with pytest.raises(UserError, match=r"^model\.labels=3: the records have 4: a, b, c, d"):
        rows_of(tmp_path, "classification", lines)


def test_dataclasses_of_objectives_resolve():
    experiment = experiment_of("bert", {})
    wrong = dataclasses.replace(experiment, objective=ObjectiveConfig(name="span"))
    with pytest.raises(UserError, match=r"trains model\.head='token'"):
        resolve(wrong)
