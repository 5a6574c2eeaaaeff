"""The one command trains every objective, resumes bitwise, evaluates; and learns small tasks made of real text."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.runs import terminated_at, train_here
from train.config import Experiment
from train.restore import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
RECORDS = {
    "classification": lambda i: "even" if i % 2 else "odd",
    "regression": lambda i: i / 40,
    "multi_label": lambda i: ["a"] * (i % 2) + ["b"] * (i % 3 == 0),
    "token_classification": lambda i: [[0, 2, "start"]],
    "span": lambda i: [1, 3],
    "sequence_to_sequence": lambda i: f"answer {i}",
}
BERT = {"kind": "encoder", "positions": "learned", "max_positions": 64, "norm_order": "post", "token_types": 2}
T5 = {"kind": "encoder_decoder", "positions": "relative", "norm": "rmsnorm", "query_scalar": 1.0}
# The objectives of encoders and of encoder-decoders, with the head that each trains.
HEADS = {
    "masked": (BERT, "language"),
    "classification": (BERT, "pooled"),
    "regression": (BERT, "pooled"),
    "multi_label": (BERT, "pooled"),
    "token_classification": (BERT, "token"),
    "span": (BERT, "token"),
    "span_corruption": (T5, "language"),
    "sequence_to_sequence": (T5, "language"),
}


def run(experiment: Experiment, path: Path) -> list[dict[str, Any]]:
    """Trains, and gives the lines of metrics.jsonl."""
    assert train_here(experiment, path) == 0
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def experiment_of(objective: str, micro: Callable[..., Experiment], folder: Path) -> Experiment:
    model, head = HEADS[objective]
    data: dict[str, Any] = {"bpe_vocab_size": 257}
    if objective in RECORDS:
        lines = [{"text": f"number {i} of many", "label": RECORDS[objective](i)} for i in range(40)]
        (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        data |= {"sources": (str(folder / "records.jsonl"),)}
    labels = 0 if head == "language" else 1 if objective == "regression" else 2
    shape = {"attention_bias": True, "mlp_bias": True, "vocab_size": 280, "head": head, "labels": labels, "layers": 1}
    return micro(model=model | shape, data=data, objective={"name": objective}, run={"steps": 4})


@pytest.mark.parametrize("objective", HEADS)
def test_every_objective_trains_and_is_evaluated(objective, micro, tmp_path):
    lines = run(experiment_of(objective, micro, tmp_path), tmp_path / "run")
    assert [line["step"] for line in lines[:-1]] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in lines[:-1])
    told = lines[-1]["eval"]
    assert ("accuracy" in told) == (HEADS[objective][1] != "language" and objective != "regression")


@pytest.mark.parametrize("objective", ["masked", "span_corruption"])
def test_a_run_resumes_bitwise(objective, micro, tmp_path):
    """What is hidden, and the order of the data, depend on seed and step alone."""
    experiment = experiment_of(objective, micro, tmp_path)
    run(experiment, tmp_path / "whole")
    with terminated_at(2):
        run(experiment, tmp_path / "parts")
    run(experiment, tmp_path / "parts")
    assert {p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()} >= {"2", "4"}
    states = [open_checkpoint(tmp_path / name / "checkpoints" / "4").weights for name in ("whole", "parts")]
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


# Real text; the tasks, thresholds and baselines are those of docs/encoder_tasks.py.


def tasks() -> Any:
    spec = importlib.util.spec_from_file_location("encoder_tasks", ROOT / "docs" / "encoder_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", tasks().TASKS)
def test_small_models_learn_real_tasks(name, tmp_path):
    folder = os.environ.get("FOURSIGHT_TASK_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FOURSIGHT_TASK_DATA names no folder with gsm8k/ and bbh/ (see docs/encoder_tasks.py)")
    assert tasks().train(name, Path(folder), tmp_path)["reached"]
