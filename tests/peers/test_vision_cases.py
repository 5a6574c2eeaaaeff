"""Models that see compute what transformers does: all outputs, loss, gradient norms, greedy sequences; exports are
imports; published configurations have the published numbers of parameters.

Recorded cases always, fresh ones where transformers is at hand; both are made by record_vision.py.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from model import hub
from model.families.known import family_of
from model.load import load, shapes
from model.safetensors import Spec, open_directory, write_directory
from model.transformer import Weights
from tests.peers.test_cases import error, gradient_norms
from tpu.errors import UserError

HERE = Path(__file__).parent
FAMILIES = ("clip", "siglip")
CASES = sorted(p.parent for f in FAMILIES for p in (HERE / "vision_cases").glob(f"{f}_[0-9]/case.json"))
PARAMETERS = {
    "clip-b32": 151_277_313,
    "clip-b16": 149_620_737,
    "clip-l14": 427_616_513,
    "clip-l14-336": 427_944_193,
    "siglip-b16-224": 203_155_970,
    "siglip-so400m-14-384": 877_960_498,
}


@functools.cache
def opened(path: Path, mesh: jax.sharding.Mesh) -> tuple[hub.Opened, Any, Weights]:
    """The directory, its placed model and its weights."""
    directory = hub.Opened(path)
    loop = "unroll" if path.name.endswith("0") else "scan"
    model = dataclasses.replace(directory.model, compute_dtype="float32", layer_loop=loop).placed("cpu", "float32")
    return directory, model, load(directory.weights, model, mesh)


def of_family(directory: hub.Opened) -> ModuleType:
    """The module of the family's `run`, which has `checked(config, inputs, options)` too and, differentiable,
    `outputs(config, weights, checked)`."""
    run = directory.family.run
    return importlib.import_module(getattr(run, "func", run).__module__)


def arrays(path: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(path / f"{name}.npz") as file:
        return dict(file)


def compare(path: Path, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Errors of all recorded outputs, of loss and gradient norms, and whether generated tokens are wrong."""
    directory, model, weights = opened(path, mesh)
    case, wanted, inputs = json.loads((path / "case.json").read_text()), arrays(path, "outputs"), arrays(path, "inputs")
    module = of_family(directory)
    checked = module.checked(model, inputs, directory.generation)

    def compute(weights: Weights) -> tuple[jax.Array, dict[str, jax.Array]]:
        found = module.outputs(model, weights, checked)
        return found["loss"], found

    (loss, found), gradients = jax.jit(jax.value_and_grad(compute, has_aux=True))(weights)
    errors = {"loss": abs(float(loss) - case["loss"]) / (1 + abs(case["loss"])), "wrong_tokens": 0.0}
    said = wanted.pop("sequences", None)
    first = wanted.pop("first_logits", None)
    assert wanted.keys() <= found.keys()
    seen = inputs.get("attention_mask", np.ones(np.shape(inputs.get("input_ids", 0)))) != 0
    for name, array in wanted.items():
        mine = np.asarray(found[name]).reshape(array.shape)
        text = seen.ndim == 2 and array.shape[:2] == seen.shape
        errors[name] = error(mine[seen], array[seen]) if text else error(mine, array)
    norms, recorded = gradient_norms(directory, model, gradients), case["gradient_norms"]
    assert norms.keys() == recorded.keys()
    largest = max(recorded.values())
    # Relative, but for gradients that are nothing but rounding, such as those of keys' biases.
    errors["gradient_norms"] = max(abs(norms[n] - g) / max(g, 1e-3 * largest) for n, g in recorded.items())
    new_tokens, prompt = case.get("new_tokens", 0), arrays(path, "prompt") if said is not None else inputs
    ran = directory.family.run(model, weights, prompt, new_tokens, directory.generation)
    if said is not None:
        certain = prompt["input_ids"].shape[1] + case["certain_tokens"]
        errors["first_logits"] = error(ran["logits"][:, -1], first)
        errors["wrong_tokens"] = float(not np.array_equal(ran["sequences"][:, :certain], said[:, :certain]))
    else:
        assert {name: array.shape for name, array in ran.items() if name in wanted} == {
            name: array.shape for name, array in wanted.items()
        }
    return errors | {"tolerance": case["tolerance"]}


def assert_alike(found: dict[str, float]) -> None:
    print(json.dumps(found))
    assert found["gradient_norms"] <= 1e-3, found
    assert not found["wrong_tokens"], found
    limits = found.keys() - {"gradient_norms", "wrong_tokens", "tolerance"}
    assert max(found[name] for name in limits) <= found["tolerance"], found


def test_there_are_three_cases_of_each_family():
    assert sorted(path.name for path in CASES) == sorted(f"{family}_{i}" for family in FAMILIES for i in range(3))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_recorded(path, one_device):
    with jax.set_mesh(one_device):
        assert_alike(compare(path, one_device))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_export_gives_back_what_was_imported(path, tmp_path):
    hub.import_model(path, tmp_path / "workdir", "auto")
    hub.export_model(tmp_path / "workdir", tmp_path / "exported", None, "auto", 10**6, "weights")
    before, after = open_directory(path), open_directory(tmp_path / "exported")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.spec == after[name].spec
        assert np.array_equal(tensor.view(), after[name].view()), name
    one, two = hub.Opened(path), hub.Opened(tmp_path / "exported")
    assert one.model == two.model
    # What a model does not have and its text has: the ids of its ends.
    ids = ("eos_token_id", "bos_token_id", "pad_token_id")
    texts = [o.options.get("text_config", {}) for o in (one, two)]
    assert [texts[0].get(name) for name in ids] == [texts[1].get(name) for name in ids]


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_configurations_have_the_published_number_of_parameters(name):
    options = json.loads((HERE / "vision_configs" / f"{name}.json").read_text())
    family = family_of(options)
    model = family.read(options)
    assert sum(map(math.prod, shapes(model.placed("cpu", "float32")).values())) == PARAMETERS[name]
    assert family.read(family.write(model)) == model
