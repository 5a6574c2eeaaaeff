"""The PyTorch twin is GPT-2: its size, that it learns, and the JSON it prints."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.peers import gpt_torch  # noqa: E402


def gpt2_parameters(layers: int, embed_dim: int, context: int, vocab_size: int) -> int:
    """GPT-2's count: matrices 12 D^2 and vectors 13 D per layer, the last norm, both tables."""
    return layers * (12 * embed_dim**2 + 13 * embed_dim) + 2 * embed_dim + (context + vocab_size) * embed_dim


@pytest.mark.parametrize(
    ("layers", "embed_dim", "heads", "context", "vocab_size"),
    [(12, 768, 12, 1024, 50257), (48, 1600, 25, 1024, 50257), (6, 384, 6, 256, 65)],
)
def test_parameter_count(layers, embed_dim, heads, context, vocab_size):
    with torch.device("meta"):
        model = gpt_torch.GPT(layers, embed_dim, heads, context, vocab_size)
    assert sum(w.numel() for w in model.parameters()) == gpt2_parameters(layers, embed_dim, context, vocab_size)


def test_published_sizes():
    assert gpt2_parameters(12, 768, 1024, 50257) == 124_439_808
    assert gpt2_parameters(48, 1600, 1024, 50257) == 1_557_611_200


def test_no_position_sees_the_future():
    torch.manual_seed(0)
    block = gpt_torch.Block(32, 4)
    h = torch.randn(2, 10, 32)  # [B, T, D]
    changed = h.clone()
    changed[:, 6:] += 1
    same = (block(h) - block(changed)).abs().amax(dim=(0, 2)) < 1e-6
    assert same.tolist() == [True] * 6 + [False] * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_a_batch(dtype):
    torch.manual_seed(0)
    model = gpt_torch.GPT(layers=2, embed_dim=32, heads=2, context=16, vocab_size=65)
    step = gpt_torch.make_step(model, gpt_torch.make_optimizer(model, learning_rate=1e-2), dtype, "eager")
    rows = torch.randint(65, (4, 17))
    losses = [step(rows[:, :-1], rows[:, 1:]) for _ in range(20)]
    assert losses[0] == pytest.approx(math.log(65), abs=0.15)
    assert losses[-1] < losses[0] - 1
    assert all(w.dtype == torch.float32 and w.grad is None for w in model.parameters())


def test_command_line(tmp_path: Path):
    shape = {"layers": 1, "embed_dim": 16, "heads": 2, "context": 8, "batch_size": 2, "vocab_size": 11}
    flags = [f"--{name}={value}" for name, value in (shape | {"steps": 3, "json": tmp_path / "r.json"}).items()]
    done = subprocess.run([sys.executable, gpt_torch.__file__, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "r.json").read_text())
    assert result["timed_steps"] == 3
    assert result["tokens_per_second"] == pytest.approx(16 / result["step_seconds"])
    assert result["first_step_seconds"] > result["step_seconds"]
    assert result["parameters"] == gpt2_parameters(1, 16, 8, 11)
