"""The PyTorch side of the speed comparison: GPT-2 training, and decoding by `transformers`, on random tokens.

The twin is GPT-2 (Radford et al. 2019) written as a PyTorch user would write it for speed, with one training step that
does what ours does: forward, backward, clipping by the global norm, AdamW. Nothing of PyTorch is tuned beyond that.
Legend: B rows, T tokens per row, D embed_dim, H heads, V vocab_size.

python tests/peers/gpt_torch.py --layers 6 --embed_dim 384 --heads 6 --context 256 --batch_size 12 --vocab_size 65
"""

from __future__ import annotations

# ruff: noqa: E402 (the import of torch is part of the time to the first step)
import time

STARTED = time.perf_counter()

import argparse
import contextlib
import json
import math
import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

WARM_UP_STEPS = 2  # after the first


class Block(nn.Module):
    """One pre-LayerNorm layer: causal attention, then a tanh-GELU MLP four times as wide."""

    def __init__(self, embed_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.attention_out = nn.Linear(embed_dim, embed_dim)
        self.mlp_norm = nn.LayerNorm(embed_dim)
        self.mlp_in = nn.Linear(embed_dim, 4 * embed_dim)
        self.mlp_out = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, D]."""
        qkv = self.qkv(self.attention_norm(h)).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, H, D/H]
        q, k, v = qkv.transpose(1, 3).unbind(2)  # [B, H, T, D/H] each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return h + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(h)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 with learned positions and the head tied to the embedding."""

    def __init__(self, layers: int, embed_dim: int, heads: int, context: int, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.positions = nn.Embedding(context, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(embed_dim)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of `targets` [B, T] after `tokens` [B, T]."""
        h = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            h = block(h)
        logits = F.linear(self.norm(h), self.embedding.weight)  # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimizer(model: GPT, learning_rate: float = 3e-4) -> torch.optim.Optimizer:
    """AdamW, which decays the matrices of the layers."""
    matrices = [w for n, w in model.named_parameters() if w.dim() == 2 and n.startswith("blocks")]
    others = [w for n, w in model.named_parameters() if w.dim() < 2 or not n.startswith("blocks")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def make_step(model: GPT, optimizer: torch.optim.Optimizer, dtype: str, mode: str) -> Callable[..., float]:
    """Returns `step(tokens, targets) -> loss`, which updates `model` in place. Weights stay float32 in either dtype."""
    loss_of = torch.compile(model) if mode == "compile" else model
    weights = list(model.parameters())
    cast = torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> float:
        with cast:
            loss = loss_of(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def evaluate_and_save(model: GPT, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> None:
    """What a run does between steps: the loss of a batch without gradients, and a checkpoint, which is deleted."""
    with torch.inference_mode():
        model(rows[:, :-1], rows[:, 1:])
    with tempfile.TemporaryFile() as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)


def measure_training(arguments: argparse.Namespace) -> dict[str, float]:
    """Times steps on fresh random tokens: the median after warm-up, and the time from start to the end of the first."""
    torch.manual_seed(0)
    model = GPT(arguments.layers, arguments.embed_dim, arguments.heads, arguments.context, arguments.vocab_size)
    optimizer = make_optimizer(model)
    step = make_step(model, optimizer, arguments.dtype, arguments.mode)
    shape = (arguments.batch_size, arguments.context + 1)
    seconds, losses = [], []
    while len(seconds) <= WARM_UP_STEPS or (
        len(seconds) <= WARM_UP_STEPS + arguments.steps and sum(seconds[1 + WARM_UP_STEPS :]) < arguments.seconds
    ):
        rows = torch.randint(arguments.vocab_size, shape)
        begin = time.perf_counter()
        losses.append(step(rows[:, :-1], rows[:, 1:]))
        seconds.append(time.perf_counter() - begin)
        if len(seconds) == 1:
            first_step_seconds = time.perf_counter() - STARTED
        if arguments.every and len(seconds) % arguments.every == 0:
            evaluate_and_save(model, optimizer, rows)
    timed = seconds[1 + WARM_UP_STEPS :]
    return {
        "step_seconds": statistics.median(timed),
        "tokens_per_second": arguments.batch_size * arguments.context / statistics.median(timed),
        "first_step_seconds": first_step_seconds,
        "timed_steps": len(timed),
        "loss": losses[-1],
        "parameters": sum(w.numel() for w in model.parameters()),
    }


def measure_decoding(arguments: argparse.Namespace) -> dict[str, float]:
    """Times greedy `transformers` generation with its KV cache: the median of whole calls, prompt included."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=arguments.layers, n_embd=arguments.embed_dim, n_head=arguments.heads, vocab_size=arguments.vocab_size
    )
    model = GPT2LMHeadModel(config).eval().to(getattr(torch, arguments.dtype))
    prompt = torch.randint(arguments.vocab_size - 1, (arguments.batch_size, arguments.prompt_tokens))
    new, seconds = arguments.new_tokens, []
    while len(seconds) < 2 or (len(seconds) <= arguments.steps and sum(seconds[1:]) < arguments.seconds):
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )
        seconds.append(time.perf_counter() - begin)
    return {
        "decode_tokens_per_second": arguments.batch_size * new / statistics.median(seconds[1:]),
        "timed_calls": len(seconds) - 1,
    }


def matmul_flops_per_second(dtype: str, size: int = 2048) -> float:
    """The best of ten square products, so that a reader sees which path the library takes on this processor."""
    a = torch.randn(size, size, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def main() -> None:
    """Parses the flags, measures, prints the result as JSON and writes it where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--embed_dim", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--mode", choices=("eager", "compile", "decode"), default="eager")
    parser.add_argument("--steps", type=int, default=50, help="most steps (decode: calls) to time")
    parser.add_argument("--seconds", type=float, default=20.0, help="stop after this much timed work")
    parser.add_argument("--every", type=int, default=0, help="evaluate and save after so many steps; 0: never")
    parser.add_argument("--prompt_tokens", type=int, default=16, help="of --mode decode")
    parser.add_argument("--new_tokens", type=int, default=128, help="of --mode decode")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()

    result = measure_decoding(arguments) if arguments.mode == "decode" else measure_training(arguments)
    result |= {
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "matmul_flops_per_second": matmul_flops_per_second(arguments.dtype),
        "mode": arguments.mode,
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
    }
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
