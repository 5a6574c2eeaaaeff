"""A recorded model that sees: opened by the hub, its arrays, and how far what it computes is from what is recorded.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from model.families.load import load
from model.hub.import_model import Opened
from model.weights import Weights
from tests.peers.archives import unpacked
from tests.peers.test_cases import error, gradient_norms

CASES = unpacked(Path(__file__).parent / "vision_cases")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of a ResNet; no gradient reaches them


def module_of(directory: Opened) -> ModuleType:
    """The module of the family's `run`, which has `checked(config, inputs, options)` too and, differentiable,
    `outputs(config, weights, checked)`."""
    run = directory.family.run
    return importlib.import_module(getattr(run, "func", run).__module__)


class Case:
    """A case: the directory, its placed model, weights and arrays, and what is to come of them."""

    def __init__(self, path: Path, mesh: jax.sharding.Mesh):
        self.record: dict[str, Any] = json.loads((path / "case.json").read_text())
        self.opened = Opened(path)
        self.module = module_of(self.opened)
        loop = "unroll" if path.name.endswith("0") else "scan"
        model = dataclasses.replace(self.opened.model, compute_dtype="float32", layer_loop=loop)
        self.model = model.placed("cpu", "float32")
        self.weights: Weights = load(self.opened.weights, self.model, mesh)
        self.wanted = arrays(path, "outputs")
        self.arrays = {name: arrays(path, name) for name in ("inputs", "prompt")}

    def checked(self, name: str = "inputs", **changed: np.ndarray) -> dict[str, Any]:
        """The arrays of that name, some of them changed, as the model takes them."""
        return self.module.checked(self.model, self.arrays[name] | changed, self.opened.generation)


def arrays(path: Path, name: str) -> dict[str, np.ndarray]:
    """Those of NAME.npz, if it is there."""
    file = path / f"{name}.npz"
    return dict(np.load(file)) if file.exists() else {}


@functools.cache
def opened(path: Path, mesh: jax.sharding.Mesh) -> Case:
    """The case in that directory."""
    return Case(path, mesh)


def compare(path: Path, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Errors of all recorded outputs, of the loss and of gradient norms, and whether generated tokens are wrong."""
    case = opened(path, mesh)
    record, inputs = case.record, case.checked()

    def compute(weights: Weights) -> tuple[jax.Array, dict[str, jax.Array]]:
        found = case.module.outputs(case.model, weights, inputs)
        return found["loss"], found

    (loss, found), gradients = jax.jit(jax.value_and_grad(compute, has_aux=True))(case.weights)
    errors = {"loss": abs(float(loss) - record["loss"]) / (1 + abs(record["loss"])), "wrong_tokens": 0.0}
    of_forward = {name: array for name, array in case.wanted.items() if name not in ("sequences", "first_logits")}
    mask = case.arrays["inputs"].get("attention_mask")
    for name, array in of_forward.items():
        mine = np.asarray(found[name]).reshape(array.shape)
        seen = ... if mask is None or array.shape[:2] != mask.shape else mask != 0
        errors[name] = error(mine[seen], array[seen])
    norms, recorded = gradient_norms(case.opened, case.model, gradients), record["gradient_norms"]
    assert {name for name in norms if not name.endswith(STATISTICS)} == recorded.keys()
    assert not any(norm for name, norm in norms.items() if name.endswith(STATISTICS))
    largest = max(recorded.values())
    # Relative, but for gradients that are nothing but rounding, such as those of keys' biases.
    errors["gradient_norms"] = max(abs(norms[n] - g) / max(g, 1e-3 * largest) for n, g in recorded.items())
    speaks = "sequences" in case.wanted
    prompt = case.arrays["prompt" if speaks else "inputs"]
    run = case.opened.family.run
    ran = run(case.model, case.weights, prompt, record.get("new_tokens", 0), case.opened.generation)
    if speaks:
        certain = prompt["input_ids"].shape[1] + record["certain_tokens"]
        errors["first_logits"] = error(ran["logits"][:, -1], case.wanted["first_logits"])
        said = case.wanted["sequences"]
        errors["wrong_tokens"] = float(not np.array_equal(ran["sequences"][:, :certain], said[:, :certain]))
    else:
        assert all(ran[name].shape == array.shape for name, array in of_forward.items())
    return errors | {"tolerance": record["tolerance"]}


def assert_alike(found: dict[str, float]) -> None:
    """What `compare` found is within the case's tolerance."""
    print(json.dumps(found))
    assert found["gradient_norms"] <= 1e-3, found
    assert not found["wrong_tokens"], found
    limits = found.keys() - {"gradient_norms", "wrong_tokens", "tolerance"}
    assert max(found[name] for name in limits) <= found["tolerance"], found
