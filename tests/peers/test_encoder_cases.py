"""BERT and T5 compute what transformers does: logits, loss, gradient norms, greedy sequences; exports are imports.

Recorded cases always, fresh ones where transformers is at hand; both are made by record_encoders.py. Gradients are
those of the training step's own loss.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model import kinds
from model.families import bert, t5
from model.families.causal import integers
from model.families.load import load, shapes
from model.families.mapping import export_specs, export_tensor
from model.hub.export_model import export_model
from model.hub.import_model import Opened, import_model
from model.safetensors import open_directory
from model.weights import bind
from tests.peers.archives import unpacked
from tests.peers.test_cases import error, one_of_each
from train.config import DataConfig, Experiment, ObjectiveConfig
from train.data.batch import Batch
from train.objectives.bound import Bound
from train.objectives.table import OBJECTIVES
from train.resolve import resolve

CASES = sorted(path.parent for path in unpacked(Path(__file__).parent / "cases").glob("*/case.npz"))
LABELS = ("labels", "next_sentence_label", "start_positions", "end_positions")
TOLERANCE = 1e-5


class Case:
    """A case, opened by the hub: experiment, graph, weights, arrays."""

    def __init__(self, path: Path, mesh: jax.sharding.Mesh):
        self.opened = Opened(path)
        self.architecture = self.opened.options["architectures"][0]
        with np.load(path / "case.npz") as file:
            self.arrays = {n: a.astype(np.int32) if a.dtype == np.int64 else a for n, a in file.items()}
        problems = {"regression": "regression", "multi_label_classification": "multi_label"}
        objective = problems.get(self.opened.options.get("problem_type"), self.opened.family.objective)
        loop = "unroll" if path.name.endswith("0") else "scan"
        model = dataclasses.replace(self.opened.model, layer_loop=loop, compute_dtype="float32")
        self.experiment = resolve(
            Experiment(
                model=dataclasses.replace(model, token_types=max(2, model.token_types))
                if model.next_sentence
                else model,
                objective=ObjectiveConfig(name=objective),
                data=DataConfig(tokenizer="bytes", bpe_vocab_size=1, context=8, batch_size=3),
            )
        )
        self.model = self.experiment.model = model.placed("cpu", "float32")
        self.graphdef, _, self.axes = kinds.build(self.model)
        self.weights = load(self.opened.weights, self.model, mesh)

    def inputs(self, *names: str) -> dict[str, np.ndarray]:
        """Those of the recorded arrays that are there."""
        return {name: self.arrays[name] for name in names if name in self.arrays}

    def errors(self, batch: Batch, outputs: Any) -> dict[str, float]:
        """How far `outputs(model)` and the gradient of the training loss of `batch` are from the record."""

        def loss(weights: Any) -> tuple[jax.Array, Any]:
            model, objective = bind(self.graphdef, weights), OBJECTIVES[self.experiment.objective.name]
            bound = {"model": Bound(model, self.axes, self.model)}
            sums = objective.sums(bound, batch, self.experiment, None, None)
            of_batch = objective.weights(batch)
            return sum(total / of_batch[name] for name, total in sums.trained.items()), outputs(model)

        (value, found), gradient = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(self.weights))
        logits = {name: array for name, array in self.arrays.items() if name.endswith("logits")}
        assert logits
        leaves = {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        }
        specs = export_specs(self.opened.family, shapes(self.model), self.model, np.dtype(np.float32))
        norms = {
            name: np.linalg.norm(export_tensor(*row, lambda path, index: leaves[path][index]))
            for name, row in specs.items()
        }
        recorded = {n.removeprefix("gradient:"): a for n, a in self.arrays.items() if n.startswith("gradient:")}
        idle = recorded.keys() - norms.keys()
        assert not any(recorded[name] for name in idle)
        largest = max(recorded.values())
        return {
            "logits": max(error(found[name], array) for name, array in logits.items()),
            "loss": max(error(array, self.arrays["loss"]) for array in (value, found["loss"])),
            # Relative, but for gradients that are nothing but rounding.
            "gradient_norms": max(
                abs(n - recorded[name]) / (recorded[name] + 1e-2 * largest) for name, n in norms.items()
            ),
            "wrong_tokens": 0.0,
        }


def compare(path: Path, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Errors of logits, loss and gradient norms, and whether generated tokens are wrong."""
    case = Case(path, mesh)
    if case.model.kind == "encoder":
        arrays, labels = integers(case.model, case.inputs(*bert.INPUTS)), case.inputs(*LABELS)
        return case.errors(
            bert_batch(case),
            lambda model: bert.outputs(case.architecture, model, arrays, dict(labels), case.opened.options),
        )
    arrays = t5.checked(case.model, case.inputs(*t5.INPUTS), case.opened.options)
    errors = case.errors(t5_batch(arrays), lambda model: t5.outputs(model, arrays))
    wanted = case.arrays["sequences"]
    source = {name: arrays[name] for name in ("input_ids", "attention_mask")}
    found = t5.greedy(case.model, case.weights, source, wanted.shape[1] - 1, case.opened.options)
    return errors | {"wrong_tokens": float(not np.array_equal(found, wanted))}


def assert_alike(found: dict[str, float]) -> None:
    assert max(found["logits"], found["loss"]) <= TOLERANCE, found
    assert found["gradient_norms"] <= 2e-5, found
    assert not found["wrong_tokens"], found


def bert_batch(case: Case) -> Batch:
    a, name = case.arrays, case.experiment.objective.name
    ids = a["input_ids"]
    rows, T = ids.shape
    weights = np.zeros(ids.shape, np.float32)
    if name in ("masked", "token_classification"):
        targets, weights = np.maximum(a["labels"], 0), (a["labels"] >= 0).astype(np.float32)
    elif name == "span":
        marks = [np.eye(T, dtype=np.float32)[a[f"{end}_positions"]] for end in ("start", "end")]
        targets, weights = np.stack(marks, -1), sum(marks) / 2
    else:
        weights[:, 0] = 1.0
        labels = a["labels"] if name == "multi_label" else a["labels"][:, None]
        targets = np.zeros((rows, T, labels.shape[1]), np.float32)
        targets[:, 0] = labels
        targets = targets[..., 0].astype(np.int32) if name == "classification" else targets
    following = a["next_sentence_label"][:, None] if "next_sentence_label" in a else None
    steps = np.broadcast_to(np.arange(T, dtype=np.int32), ids.shape)
    found = Batch(tokens=ids, targets=targets, loss_weights=weights, segments=a["attention_mask"], positions=steps)
    return found | {"token_types": a["token_type_ids"]} | ({} if following is None else {"next_sentence": following})


def t5_batch(arrays: dict[str, np.ndarray]) -> Batch:
    tokens, labels = arrays["decoder_input_ids"], arrays["labels"]
    return Batch(
        tokens=tokens,
        targets=np.maximum(labels, 0),
        loss_weights=(labels >= 0).astype(np.float32),
        segments=np.ones_like(tokens),
        positions=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        inputs=arrays["input_ids"],
        input_segments=arrays["attention_mask"],
    )


@pytest.mark.parametrize("path", one_of_each(CASES))
def test_recorded(path, one_device):
    with jax.set_mesh(one_device):
        assert_alike(compare(path, one_device))


def test_the_cases_differ_in_what_matters():
    options = [json.loads((path / "config.json").read_text()) for path in CASES]
    for field in ("hidden_act", "layer_norm_eps", "type_vocab_size", "feed_forward_proj", "layer_norm_epsilon"):
        assert len({o[field] for o in options if field in o}) == 3, field
    ours = [o for o in options if o["model_type"] == "t5"]
    assert any(o["num_heads"] * o["d_kv"] != o["d_model"] for o in ours)
    assert {o["scale_decoder_outputs"] for o in ours} == {True, False}


def export(path: Path, workdir: Path, target: Path) -> None:
    import_model(path, workdir, "auto")
    export_model(workdir, target, None, "auto", 10**9, "weights")


@pytest.mark.parametrize("path", one_of_each(CASES))
def test_export_gives_back_what_was_imported(path, tmp_path):
    export(path, tmp_path / "workdir", tmp_path / "exported")
    before, after = open_directory(path), open_directory(tmp_path / "exported")
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        assert np.array_equal(tensor.view(), after[tensor_name].view()), tensor_name
    assert Opened(tmp_path / "exported").model == Opened(path).model


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, peers: Callable[..., str], draws: int) -> list[Path]:
    """New models of each architecture."""
    out, seed = tmp_path_factory.mktemp("fresh"), time.time_ns() % 10**9
    print(f"seed {seed}")
    peers("record_encoders.py", f"--out={out}", f"--draws={draws}", f"--seed={seed}")
    return sorted(path.parent for path in unpacked(out).glob("*/case.npz"))


def test_fresh(fresh, one_device):
    with jax.set_mesh(one_device):
        for path in fresh:
            print(path.name)
            assert_alike(compare(path, one_device))


def test_exported_directories_load_in_transformers(fresh, peers, tmp_path):
    for path in fresh:
        export(path, tmp_path / path.name, path / "exported")
    errors = json.loads(peers("record_encoders.py", f"--check={fresh[0].parent}"))
    assert errors.keys() == {path.name for path in fresh}
    assert max(errors.values()) <= TOLERANCE, errors
