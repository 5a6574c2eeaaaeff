"""The planner's arithmetic against closed forms, and the command with the real TPU compiler."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.config import ModelConfig
from tpu.errors import UserError
from tpu.plan import __main__ as plan
from tpu.plan.forecast import layer_weights, recomputed, saved_per_token
from train.budget.summary import summarize
from train.config import Experiment
from train.resolve import resolve

ROOT = Path(__file__).resolve().parents[3]

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def llama(remat: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=32, layers=2, embed_dim=64, heads=4, kv_heads=2, mlp_dim=96, activation="swiglu", remat=remat
    ).resolved()


def test_weights_of_a_layer_are_those_of_its_matrices():
    for activation in ("swiglu", "gelu"):
        shapes = {"embed_dim": 64, "heads": 4, "attention_bias": False, "mlp_bias": False, "activation": activation}
        counts = [
            summarize(resolve(Experiment(model=ModelConfig(vocab_size=4096, layers=n, **shapes))))["parameters"][
                "total"
            ]
            for n in (2, 3)
        ]
        norms = 2 * 2 * 64
        model = ModelConfig(vocab_size=4096, layers=2, **shapes).resolved()
        assert counts[1] - counts[0] - norms == layer_weights(model)


def test_what_is_saved_need_not_be_done_again():
    policies = ("full", "attention", "all_but_mlp", "projections", "none")
    saved = [saved_per_token(llama(remat), 1) for remat in policies]
    again = [recomputed(llama(remat)) for remat in policies]
    assert saved == sorted(set(saved))
    assert again == sorted(again, reverse=True)
    assert again[0] == pytest.approx(1 - 64 * 96 / layer_weights(llama("full")))
    assert again[-1] == 0


def test_every_candidate_uses_all_devices():
    experiment = resolve(Experiment(model=ModelConfig(layers=4, heads=4, embed_dim=64)))
    meshes = {
        tuple(v for k, v in c.items() if k.startswith("mesh.") and k != "mesh.zero")
        for c in plan._candidates(experiment, 8)
    }
    assert len(meshes) > 10
    for mesh in meshes:
        product = 1
        for size in mesh:
            product *= size
        assert product == 8


def test_an_impossible_override_is_named():
    with pytest.raises(UserError, match=r"mesh\.tensor=3: .*|model\.heads=6"):
        plan.overridden(resolve(Experiment()), {"mesh.tensor": 4})


CONFIG = """
from model.config import ModelConfig
from train.config import DataConfig, Experiment, OptimizerConfig, RunConfig

def get_config():
    model = ModelConfig(vocab_size=512, layers=2, embed_dim=256, heads=2, attention_bias=False, mlp_bias=False)
    data = DataConfig(tokenizer="bytes", context=256, batch_size=8)
    return Experiment("tiny", model, data, optimizer=OptimizerConfig(warmup_steps=2), run=RunConfig(steps=8))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "tiny.py"
    path.write_text(CONFIG)
    return path


def run(config: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"FOURSIGHT_CACHE": str(config.parent / "cache")}
    environment.pop("JAX_PLATFORMS", None)
    command = [sys.executable, "-m", "tpu.plan", f"--config={config}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)


@needs_libtpu
def test_a_plan_is_verified_kept_and_the_same_again(config):
    report = config.with_suffix(".json")
    arguments = ("--topology=v5e:2x2", "--verify=1", "--show=5", f"--json={report}")
    first = run(config, *arguments)
    assert first.returncode == 0, first.stderr
    rows = json.loads(report.read_text())
    assert [r["verified"] for r in rows] == [True] + [False] * 4
    assert rows[0]["fits"]
    assert rows[0]["compile_seconds"] > 0
    assert [r["step_seconds"] for r in rows[1:]] == sorted(r["step_seconds"] for r in rows[1:])
    pasted = first.stdout.splitlines()[-1]
    assert pasted == rows[0]["overrides"]
    overrides = dict(flag.removeprefix("--config.").split("=") for flag in pasted.split())
    sizes = [int(overrides[f"mesh.{axis}"]) for axis in ("data", "fsdp", "tensor", "sequence", "stage", "expert")]
    assert math.prod(sizes) == 4

    (kept,) = (config.parent / "cache" / "plans").glob("*.json")
    kept.write_text(kept.read_text().replace('"step_seconds": ', '"step_seconds": 1000'))
    again = run(config, *arguments)
    assert again.stdout.splitlines()[-1] == pasted
    assert json.loads(report.read_text())[0]["step_seconds"] >= 1000  # read from the cache, not compiled again


@needs_libtpu
def test_when_nothing_fits_the_line_says_what_would_do(config):
    done = run(config, "--topology=v5e:1x1", "--config.model.layers=8", "--config.model.embed_dim=8192", "--verify=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    found = re.search(
        r"nothing fits v5e:1x1: .* needs ([\d.]+) GiB a chip, ([\d.]+) GiB too many; (v5e:\S+) is", done.stderr
    )
    assert found, done.stderr
    assert float(found[1]) - float(found[2]) == pytest.approx(plan.SPARE * 16, abs=0.11)
    roomy = run(
        config,
        f"--topology={found[3]}",
        "--config.model.layers=8",
        "--config.model.embed_dim=8192",
        "--verify=0",
    )
    assert roomy.returncode == 0, roomy.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--topology is missing"),
        (("--topology=cpu:8",), "a plan is for TPUs"),
        (("--topology=v5p:3x3x3",), "no such slice; valid: v5p:2x2x1"),
    ],
)
def test_mistakes_are_one_line(config, arguments, message):
    done = run(config, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
