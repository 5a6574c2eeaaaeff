"""Writes every attention's error, cache and speed to docs/models.md, and growth with length to docs/attention.md.

    python docs/attention_table.py [--quick | --compile]

Takes about twenty minutes on two CPU cores; --quick leaves out the rows of 8,192 tokens and more. --compile compiles
training steps with block-sparse and with dense attention for a TPU instead (libtpu is needed, a TPU is not). The tables
replace those between the marks.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from model import kinds
from model.attention.attend import Rules, attend, plain_attention
from model.attention.block_sparse_attention import SparsePattern, block_sparse_attention
from model.attention.linear_attention import linear_attention
from model.config import ModelConfig
from model.generate.prefill import advance, prefill
from model.place import Place, visible
from model.weights import Weights, bind

PAGE, KINDS_PAGE = (pathlib.Path(__file__).with_name(name) for name in ("attention.md", "models.md"))
SHAPE = {"vocab_size": 512, "layers": 2, "embed_dim": 128, "heads": 4, "attention_bias": False, "mlp_bias": False}
SPARSE = {"pattern": ("sparse",), "sparse_block": 64}
# name, file, paper, what the model is given
KINDS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("dense", "chunked_attention.py", "1706.03762", {}),
    ("sliding window (256)", "chunked_attention.py", "2004.05150", {"pattern": ("local",), "window": 256}),
    ("dense and banded in turn (GPT-3)", "stack.py", "2005.14165", {"pattern": ("global", "local"), "window": 256}),
    ("block-sparse", "block_sparse_attention.py", "2007.14062", SPARSE),
    (
        "first tokens and a window (StreamingLLM)",
        "block_sparse_attention.py",
        "2309.17453",
        SPARSE | {"sparse_random": 0, "sparse_newest": 4},
    ),
    ("linear", "linear_attention.py", "2006.16236", {"pattern": ("linear",)}),
    ("gated linear", "linear_attention.py", "2307.08621, 2312.06635", {"pattern": ("gated_linear",)}),
    ("ALiBi", "alibi.py", "2108.12409", {"positions": "alibi"}),
    ("sinks", "attention.py", "2508.10925", {"attention_sinks": True}),
    ("soft-cap", "attention.py", "2408.00118", {"attention_softcap": 30.0}),
    ("QK-norm", "block.py", "2302.05442", {"qk_norm": True}),
    ("kNN (no memory given)", "knn_attention.py", "2203.08913", {"pattern": ("knn",), "knn_memory": 64}),
]


SPEEDS = ((512, 4), (8192, 1))  # tokens of a row, rows


def placed(fields: dict[str, Any]) -> ModelConfig:
    """The small model that the table measures."""
    return ModelConfig(**(SHAPE | fields)).resolved().placed("cpu", "float32")


def drawn(config: ModelConfig) -> tuple[Any, Weights]:
    """Graph and random weights."""
    weights = jax.jit(lambda key: kinds.init(config, key))(jax.random.key(0))
    return kinds.build(config)[0], jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, weights)


def rows_of_documents(tokens: int) -> Place:
    """Two rows: one document, and three."""
    cuts = np.stack([np.zeros(tokens, int), np.searchsorted([tokens // 5, tokens // 2], np.arange(tokens), "right")])
    starts = np.array([[0, 0, 0], [0, tokens // 5, tokens // 2]])
    positions = np.arange(tokens) - np.take_along_axis(starts, cuts, 1)
    return Place((cuts + 1).astype(np.int32), positions.astype(np.int32))


def reference_error(fields: dict[str, Any]) -> float:
    """Largest difference of outputs and gradients from the plain form, divided by 1 + the largest wanted value.

    Linear kinds are compared with their sums written out, the others with all scores at once and the mask.
    """
    config, place = placed(fields), rows_of_documents(300)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 4, 300, 32)).astype(np.float32) for _ in range(3))
    kind = config.pattern[-1]

    def run(plain: bool) -> Callable[..., jax.Array]:
        if kind in ("linear", "gated_linear"):
            decay = -0.1 * np.abs(rng.normal(size=(2, 4, 300))).astype(np.float32) * (kind == "gated_linear")
            return lambda q, k, v: _linear(q, k, v, decay, place.segments, plain, kind)
        options: dict[str, Any] = {
            "window": config.window if kind == "local" else 0,
            "softcap": config.attention_softcap,
            "alibi": config.positions == "alibi",
            "sinks": jnp.linspace(-1.0, 1.0, 4) if config.attention_sinks else None,
        }
        if kind == "sparse":
            sizes = (config.sparse_newest, config.sparse_first, config.sparse_random, config.sparse_seed)
            options["sparse"] = SparsePattern(16, *sizes)
        name = "plain" if plain else "chunked"
        rules = Rules(name, same=True, **options)
        return lambda q, k, v: attend(q * 32**-0.5, k, v, place, place, rules)

    def all_of(function: Callable[..., jax.Array]) -> list[jax.Array]:
        def mixed(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = function(*inputs)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(mixed, (0, 1, 2), has_aux=True))(q, k, v)
        return [out, *gradients]

    rng_state = rng.bit_generator.state
    found = all_of(run(False))
    rng.bit_generator.state = rng_state
    wanted = all_of(run(True))
    return max(float(jnp.abs(a - b).max() / (1 + jnp.abs(b).max())) for a, b in zip(found, wanted, strict=True))


def _linear(q: Any, k: Any, v: Any, decay: Any, segments: Any, plain: bool, kind: str) -> jax.Array:
    if kind == "linear":
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1))], -1)
    if plain:
        fade = jnp.cumsum(decay, -1)
        mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(q.shape[2], dtype=bool)
        weights = jnp.exp(jnp.where(mask[:, None], fade[..., :, None] - fade[..., None, :], -jnp.inf))
        out = jnp.einsum("bhts,bhsv->bhtv", jnp.einsum("bhtk,bhsk->bhts", q, k) * weights, v)
    else:
        out = linear_attention(q[:, :, None], k, v, decay, segments)[0][:, :, 0]
    return out[..., :-1] / out[..., -1:] if kind == "linear" else out


def decode_error(fields: dict[str, Any]) -> float:
    """Largest difference of a model's logits, by its cache token for token and by full forward passes, relative too."""
    config = placed(fields | {name: size for name, size in (("sparse_block", 8), ("window", 9)) if name in fields})
    graphdef, weights = drawn(config)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 96)).astype(np.int32)
    place = Place(np.ones_like(tokens), np.broadcast_to(np.arange(96, dtype=np.int32), tokens.shape))
    model = bind(graphdef, weights)
    wanted = jax.jit(lambda t: model.head(model(t, place)[0]))(tokens)
    cache, logits = jax.jit(lambda t: prefill(model, config, t, np.full(2, 64), 96)[:2])(tokens[:, :64])
    step = jax.jit(lambda cache, t, p: advance(model, cache, t, p))
    found = [logits]
    for i in range(64, 95):
        cache, logits = step(cache, tokens[:, i], np.full(2, i, np.int32))
        found.append(logits)
    wanted = wanted[:, 63:95]
    return float(jnp.abs(jnp.stack(found, 1) - wanted).max() / (1 + jnp.abs(wanted).max()))


def tokens_per_second(fields: dict[str, Any], context: int, rows: int) -> float:
    """Of forward and backward passes through a layer, without the head, the better of two after one that compiles."""
    config = placed(fields)
    graphdef, weights = drawn(config)
    tokens = np.random.default_rng(0).integers(0, 512, (rows, context)).astype(np.int32)
    place = Place(np.ones_like(tokens), np.broadcast_to(np.arange(context, dtype=np.int32), tokens.shape))

    @jax.jit
    def step(weights: Weights, place: Place) -> Weights:
        more = {"inputs": tokens, "input_segments": place.segments} if config.kind == "encoder_decoder" else {}
        return jax.grad(lambda w: jnp.square(bind(graphdef, w)(tokens, place, **more)[0]).mean())(weights)

    jax.block_until_ready(step(weights, place))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(step(weights, place))
        seconds.append(time.perf_counter() - start)
    return rows * context * config.layers / min(seconds)


def growth(tokens: int, dense: bool) -> tuple[float, int]:
    """Seconds of a forward and backward pass of one attention on a row of so many tokens, and its temporary bytes."""
    place = Place(np.ones((1, tokens), np.int32), np.arange(tokens, dtype=np.int32)[None])
    q, k, v = (np.random.default_rng(0).normal(size=(1, 4, tokens, 32)).astype(np.float32) for _ in range(3))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, place: Place) -> jax.Array:
        if dense:
            return jnp.square(plain_attention(q, k, v, visible(place, place, 0))).sum()
        return jnp.square(block_sparse_attention(q, k, v, *place, SparsePattern(64, 3, 1, 2, 0))).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v, place).compile()
    jax.block_until_ready(compiled(q, k, v, place))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(compiled(q, k, v, place))
        seconds.append(time.perf_counter() - start)
    return min(seconds), compiled.memory_analysis().temp_size_in_bytes


def kinds_table(quick: bool) -> str:
    """The table with a row per kind."""
    lines = [
        "| kind | file in model/ | arXiv | error against the reference | cache against full forward "
        "| tokens/s at 512 | at 8,192 | `--config.model.…` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    dense: dict[int, float] = {}
    for name, file, paper, fields in KINDS:
        speeds = []
        for context, rows in SPEEDS[:1] if quick else SPEEDS:
            speed = tokens_per_second(fields, context, rows)
            dense.setdefault(context, speed)
            speeds.append(f"{speed / dense[context]:.2f}")
        speeds += ["—"] * (2 - len(speeds))
        errors = f"{reference_error(fields):.0e} | {decode_error(fields):.0e}"
        flags = " ".join(f"{field}={value}".replace(" ", "") for field, value in fields.items())
        flags = f"`{flags}`" if flags else "—"
        lines.append(f"| {name} | `{file}` | {paper} | {errors} | {' | '.join(speeds)} | {flags} |")
        print(lines[-1], flush=True)
    rates = ", ".join(f"{speed:,.0f} at {context:,}" for context, speed in dense.items())
    return "\n".join(lines) + f"\n\nTokens per second of a layer are relative to dense: {rates}."


def growth_table(quick: bool) -> str:
    """The table of block-sparse attention against length."""
    lines = ["| tokens | block-sparse, s | MiB | dense, s | MiB |", "|---|---|---|---|---|"]
    for tokens in (2048, 4096) if quick else (2048, 4096, 8192, 16384):
        seconds, size = growth(tokens, dense=False)
        other = "— | —"
        if tokens <= 4096:
            dense_seconds, dense_size = growth(tokens, dense=True)
            other = f"{dense_seconds:.2f} | {dense_size / 2**20:,.0f}"
        lines.append(f"| {tokens:,} | {seconds:.2f} | {size / 2**20:,.0f} | {other} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def compiled_growth_table() -> str:
    """The table of training steps with block-sparse and with dense attention for TPU v5e, by `tpu.compile`."""
    lines = ["| tokens of a row | block-sparse, TFLOP | peak GiB | dense, TFLOP | peak GiB |", "|---|---|---|---|---|"]
    for tokens in (2048, 4096, 8192, 16384):
        cells = []
        for pattern in ("sparse", "global"):
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [sys.executable, "-m", "tpu.compile", "--config=configs/long_context.py:512"]
                command += ["--topology=v5e:2x4", "--config.mesh.data=8", "--config.data.batch_size=8"]
                command += [f"--config.data.context={tokens}", f"--config.model.pattern=('{pattern}',)"]
                command += ["--config.model.remat=full", f"--json={file.name}"]
                done = subprocess.run(command, cwd=PAGE.parents[1], capture_output=True, text=True)
                if not pathlib.Path(file.name).stat().st_size:
                    raise SystemExit(done.stderr)
                found = json.loads(pathlib.Path(file.name).read_text())
            cells += [
                f"{(found['matmul_flops_per_chip'] + found['kernel_flops_per_chip']) / 1e12:.2f}",
                f"{found['bytes_per_chip']['peak'] / 2**30:.2f}",
            ]
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def replace(page: str, mark: str, table: str) -> str:
    """The page with what stands between two marks replaced."""
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- end -->)"
    assert re.search(pattern, page, re.S), mark
    return re.sub(pattern, lambda found: f"{found[1]}{table}\n{found[2]}", page, count=1, flags=re.S)


def main() -> None:
    """Measures, prints, and writes the page."""
    quick = "--quick" in sys.argv
    if "--compile" in sys.argv:
        PAGE.write_text(replace(PAGE.read_text(), "compiled growth", compiled_growth_table()))
        return
    PAGE.write_text(replace(PAGE.read_text(), "growth", growth_table(quick)))
    KINDS_PAGE.write_text(replace(KINDS_PAGE.read_text(), "kinds", kinds_table(quick)))


if __name__ == "__main__":
    main()
