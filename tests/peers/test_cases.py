"""Models of other people give the same numbers here: recorded cases always, fresh ones where transformers is at hand.

Fresh cases, with new seeds, need torch and transformers: in this environment, or in that of the Python that
FOURSIGHT_PEERS_PYTHON names.

Legend: B rows, T tokens, V vocab_size.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model.families import causal
from model.families.load import load, shapes
from model.families.mapping import export_specs, export_tensor
from model.hub.export_model import export_model
from model.hub.import_model import Opened, import_model
from model.kinds import build
from model.safetensors import open_directory
from model.weights import Weights, bind
from tests.peers.archives import unpacked

CASES = sorted(path.parent for path in unpacked(Path(__file__).parent / "cases").glob("*/case.json"))


def one_of_each(cases: list[Path]) -> list[Any]:
    """Parameters of a test: one draw of each family, the next family's the next draw, so that each way of padding and
    of rotating comes up; the others are slow."""
    families = sorted({path.name[:-1] for path in cases})
    chosen = {f"{family}{i % 3}" for i, family in enumerate(families)}
    marks = {True: [], False: [pytest.mark.slow]}
    return [pytest.param(path, id=path.name, marks=marks[path.name in chosen]) for path in cases]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """max|a - b| / (1 + max|b|)."""
    return float(np.abs(found - wanted).max() / (1 + np.abs(wanted).max()))


@functools.cache
def opened(path: Path, mesh: jax.sharding.Mesh) -> tuple[Opened, Any, Weights]:
    """The directory, its placed model and its weights."""
    directory = Opened(path)
    loop = "unroll" if path.name.endswith("0") else "scan"
    model = dataclasses.replace(directory.model, layer_loop=loop, compute_dtype="float32").placed("cpu", "float32")
    return directory, model, load(directory.weights, model, mesh)


def gradient_norms(directory: Opened, model: Any, gradients: Weights) -> dict[str, float]:
    """Norms by the names of the peer's tensors."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
    }
    specs = export_specs(directory.family, shapes(model), model, np.dtype(np.float32))
    tensors = {n: export_tensor(*row, lambda path, index: leaves[path][index]) for n, row in specs.items()}
    return {name: float(np.linalg.norm(tensor.astype(np.float64))) for name, tensor in tensors.items()}


def compare(path: Path, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Errors of logits, hidden states, loss and gradient norms, and how many generated tokens are wrong."""
    directory, model, weights = opened(path, mesh)
    case, wanted = json.loads((path / "case.json").read_text()), np.load(path / "outputs.npz")
    inputs, prompt = (dict(np.load(path / f"{name}.npz")) for name in ("inputs", "prompt"))
    graph = build(model)[0]

    def compute(weights: Weights) -> tuple[jax.Array, dict[str, jax.Array]]:
        found = causal.outputs(bind(graph, weights), causal.checked(model, inputs))
        return found["loss"], found

    (loss, found), gradients = jax.jit(jax.value_and_grad(compute, has_aux=True))(weights)
    seen = inputs.get("attention_mask", np.ones_like(inputs["input_ids"])) != 0
    norms, recorded = gradient_norms(directory, model, gradients), case["gradient_norms"]
    assert norms.keys() == recorded.keys()
    largest = max(recorded.values())
    said = causal.greedy(model, weights, causal.checked(model, prompt), case["new_tokens"], directory.generation)
    both = (a[:, : prompt["input_ids"].shape[1] + case["certain_tokens"]] for a in (said, wanted["sequences"]))
    return {
        "logits": error(np.asarray(found["logits"])[seen], wanted["logits"][seen]),
        "last_hidden_state": error(np.asarray(found["last_hidden_state"])[seen], wanted["last_hidden_state"][seen]),
        "loss": abs(float(loss) - case["loss"]) / (1 + abs(case["loss"])),
        # Relative, but for gradients that are nothing but rounding, such as those of keys' biases.
        "gradient_norms": max(abs(norms[n] - g) / max(g, 1e-3 * largest) for n, g in recorded.items()),
        "wrong_tokens": float(not np.array_equal(*both)),
        "tolerance": case["tolerance"],
    }


def assert_alike(found: dict[str, float]) -> None:
    assert max(found["logits"], found["last_hidden_state"], found["loss"]) <= found["tolerance"], found
    assert found["gradient_norms"] <= 1e-3, found
    assert not found["wrong_tokens"], found


def test_there_are_three_cases_of_each_family():
    families = [json.loads((path / "case.json").read_text())["family"] for path in CASES]
    assert set(families) >= {"gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2"} | {
        "mixtral",
        "qwen3_moe",
    }
    assert all(families.count(family) >= 3 for family in families)


@pytest.mark.parametrize("path", one_of_each(CASES))
def test_recorded(path, one_device):
    with jax.set_mesh(one_device):
        assert_alike(compare(path, one_device))


@pytest.mark.parametrize("path", one_of_each(CASES))
def test_export_gives_back_what_was_imported(path, tmp_path):
    import_model(path, tmp_path / "workdir", "auto")
    export_model(tmp_path / "workdir", tmp_path / "exported", None, "auto", 5000, "weights")
    before, after = open_directory(path), open_directory(tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors.index.json").exists()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.spec == after[name].spec
        assert np.array_equal(tensor.view(), after[name].view()), name
    assert Opened(tmp_path / "exported").model == Opened(path).model


# Fresh ones


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, peers: Callable[..., str], draws: int) -> list[Path]:
    """New models: of one family, which is drawn too, or several of all."""
    out, seed = tmp_path_factory.mktemp("fresh"), time.time_ns() % 10**9
    known = sorted({path.name.rpartition("_")[0] for path in CASES})
    families = random.Random(seed).sample(known, 1) if draws == 1 else known
    print(f"seed {seed}: {', '.join(families)}")
    peers("record_cases.py", f"--out={out}", f"--draws={draws}", f"--seed={seed}", f"--families={','.join(families)}")
    return sorted(path.parent for path in unpacked(out).glob("*/case.json"))


def test_fresh(fresh, one_device):
    with jax.set_mesh(one_device):
        for path in fresh:
            print(path.name)
            assert_alike(compare(path, one_device))


def test_exported_directories_load_in_transformers(fresh, peers, tmp_path):
    for path in fresh:
        import_model(path, tmp_path / path.name, "auto")
        export_model(tmp_path / path.name, path / "exported", None, "auto", 20_000, "weights")
    errors = json.loads(peers("record_cases.py", f"--check={fresh[0].parent}"))
    assert errors.keys() == {path.name for path in fresh}
    assert max(errors.values()) <= 1e-6, errors
