"""Checkpoints written before files moved into rooms, by revision 92fdf30, are read by every command.

The archive holds three workdirs and their corpus: 60 steps of a model of two layers of width 16 with a moving average
of its weights (plain), of the same with a memory of earlier rows (memory), and 20 steps of a LoRA over the first
(lora). The numbers below are those which that revision gave.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ARCHIVE = Path(__file__).with_name("before_the_rooms.tar.xz")
HELD_OUT = {"plain": 2.7776786422729494, "memory": 2.7763238048553465, "lora": 2.7794050583704037}
# loss at the steps after the last one in the archive
WENT_ON = {
    "plain": [2.7828845977783203, 2.975444793701172, 2.84749174118042],
    "memory": [2.9554598331451416, 2.692929267883301, 2.7436165809631348],
}
# log-probabilities of the first four tokens that are written after "the list", the most probable ones
GREEDY = {
    "plain": [-1.66064, -1.6622, -1.66235, -1.66224],
    "memory": [-1.51844, -1.52036, -1.52102, -1.52089],
    "lora": [-1.66436, -1.66696, -1.66712, -1.66701],
}


@pytest.fixture
def there(tmp_path) -> Path:
    """A directory of its own with all that the archive holds."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def command(there: Path, module: str, *arguments: str) -> None:
    """Runs a command in that directory, where the corpus is."""
    if module == "train.evaluate" or module == "serve.generate":
        arguments = (*arguments, f"--json={there}/figures.json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=there, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def figures(there: Path) -> dict:
    return json.loads((there / "figures.json").read_text())


def of_base(name: str) -> tuple[str, ...]:
    """The flag that an adapter needs: its base no longer lies where it was."""
    return ("--base=plain",) if name == "lora" else ()


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "memory", "lora"])
def test_evaluated(there, name):
    command(there, "train.evaluate", f"--checkpoint={name}", *of_base(name))
    assert figures(there)["eval"]["loss"] == pytest.approx(HELD_OUT[name], rel=1e-5)


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "memory"])
def test_trained_on(there, name):
    (there / "config.py").write_text(
        "import json\nfrom train.config import Experiment\nfrom train.tree import from_dict\n\n\n"
        f"def get_config() -> Experiment:\n    saved = json.load(open('{name}/experiment.json'))\n"
        "    return from_dict(Experiment, saved['experiment'])\n"
    )
    command(there, "train.pretrain", "--config=config.py", f"--workdir={name}", "--config.run.steps=63")
    lines = map(json.loads, (there / name / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert [losses[step] for step in (61, 62, 63)] == pytest.approx(WENT_ON[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", GREEDY)
def test_generates(there, name):
    command(
        there, "serve.generate", f"--checkpoint={name}", *of_base(name), "--prompt=the list", "--max_tokens=4",
        "--temperature=0",
    )  # fmt: skip
    assert figures(there)["completions"][0]["logprobs"] == pytest.approx(GREEDY[name], abs=2e-5)


@pytest.mark.slow
def test_is_a_base_and_is_merged_and_exported(there):
    tune = ("--checkpoint=plain", f"--config={ROOT}/configs/adapter.py:lora", "--workdir=tuned")
    small = ("--config.run.steps=20", "--config.data.batch_size=2", "--config.data.context=32")
    command(there, "train.finetune", *tune, *small, "--config.data.sources=('text.jsonl',)")
    command(there, "train.adapter", "merge", "--checkpoint=lora", "--base=plain", "--workdir=merged")
    command(there, "train.evaluate", "--checkpoint=merged")
    assert figures(there)["eval"]["loss"] == pytest.approx(HELD_OUT["lora"], rel=1e-5)
    command(there, "train.adapter", "export", "--checkpoint=lora", "--base=plain", "--to=peft")
    assert (there / "peft" / "adapter_model.safetensors").is_file()
