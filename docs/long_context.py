"""Extends a small model to rows 4 and 16 times as long, and shows what that costs and gains; writes docs/attention.md.

    python docs/long_context.py [--compile]

Trains a model on rows of 128 tokens of the Python documentation, stretches its rotary positions to 512 and 2,048 by
every method of model/positions/rope.py, fine-tunes each for a few steps, and prints the perplexity at every distance
from the beginning of a row, before and after; draws docs/long_context.png. About fifteen minutes on two CPU cores.
--compile compiles configs/long_context.py for TPUs instead (libtpu is needed, TPUs are not).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from train.resolve import resolve

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import numpy as np

    from train.config import Experiment

SHORT, LONG = 128, (512, 2048)
METHODS = ("none", "linear", "ntk", "dynamic", "yarn")
BATCH_TOKENS = 2048
STEPS, FINE_TUNING = 800, 60
PERPLEXITIES = (20, 25, 30, 40, 50, 60)  # on the picture
EDGES = (0, 64, 128, 256, 512, 1024, 2048)


def experiment(context: int, method: str, steps: int, learning_rate: float) -> Experiment:
    """The small model with rows of `context`, its positions stretched from SHORT to them."""
    from model.config import ModelConfig
    from train.config import DataConfig, Experiment, OptimizerConfig, RunConfig

    model = ModelConfig(
        vocab_size=1024,
        layers=4,
        embed_dim=128,
        heads=4,
        norm="rmsnorm",
        attention_bias=False,
        mlp_bias=False,
        rope_scaling=method,
        rope_factor=context / SHORT,
        rope_original_context=SHORT,
    )
    found = resolve(
        Experiment(
            model=model,
            data=DataConfig(context=context, batch_size=BATCH_TOKENS // context, holdout=0.1),
            optimizer=OptimizerConfig(learning_rate=learning_rate, schedule="constant", warmup_steps=20),
            run=RunConfig(steps=steps),
        )
    )
    return dataclasses.replace(found, model=found.model.placed("cpu", "float32"))


def of_one_document(rows: Any) -> list[int]:
    """The rows that a single document fills."""
    return [i for i in range(len(rows)) if (row := rows[i])["segments"][-1] == 1 and row["loss_weights"][-1]]


def nll_by_position(found: Experiment, weights: Any, corpus: Any, limit: int = 12) -> np.ndarray:
    """[T] nats per token at every position of held-out rows, their mean."""
    import jax
    import numpy as np

    from model import kinds
    from model.place import Place
    from model.weights import bind

    graphdef, _, _ = kinds.build(found.model)

    @jax.jit
    def nll(batch: Any) -> jax.Array:
        model = bind(graphdef, weights)
        hidden, _ = model(batch["tokens"][None], Place(batch["segments"][None], batch["positions"][None]))
        logits = jax.nn.log_softmax(model.head(hidden[0]))
        return -jax.numpy.take_along_axis(logits, batch["targets"][:, None], 1)[:, 0]

    rows = corpus.held_out[0]
    chosen = of_one_document(rows)[:limit]
    return np.mean([nll(rows[i]) for i in chosen], 0)


def trained(found: Experiment, corpus: Any, weights: Any, mesh: Any) -> Any:
    """The weights after training from `weights`, or from nothing."""
    import jax

    from train.data import pipeline
    from train.program import make_program

    program = make_program(found, mesh)
    state = program.init(jax.random.key(0), {})
    if weights is not None:
        state = state._replace(weights=jax.tree.map(lambda w: w.copy(), weights))
    batches = pipeline.train_batches(corpus, found.data, 0)
    for _ in range(found.run.steps):
        state, metrics = program.step(state, next(batches), {})
    batches.close()
    print(f"context {found.data.context}, {found.model.rope_scaling}: loss {float(metrics['loss']):.3f}", flush=True)
    return state.weights


def buckets(nll: np.ndarray) -> list[float]:
    """Perplexity between each two of EDGES."""
    import numpy as np

    pairs = [(a, b) for a, b in itertools.pairwise(EDGES) if b <= len(nll)]
    return [float(np.exp(nll[a:b].mean())) for a, b in pairs]


def extend() -> str:
    """Trains, extends, draws; returns the table."""
    import jax
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from tpu.mesh import make_mesh
    from train.config import MeshConfig
    from train.data.corpus import load_corpus

    lines = ["| rows of | positions | " + " | ".join(f"{a}–{b}" for a, b in itertools.pairwise(EDGES)) + " |"]
    lines.append("|---" * (len(EDGES) + 1) + "|")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    figure, axes = plt.subplots(1, len(LONG), figsize=(11, 4), sharey=True)
    with jax.set_mesh(mesh):
        short = experiment(SHORT, "none", STEPS, 2e-3)
        corpus = load_corpus(short.data)
        weights = trained(short, corpus, None, mesh)
        for context, axis in zip(LONG, axes, strict=True):
            for method in METHODS:
                found = experiment(context, method, FINE_TUNING, 3e-4)
                corpus = load_corpus(found.data, tokenizer=corpus.tokenizer)
                before = nll_by_position(found, weights, corpus)
                tuned = trained(found, corpus, weights, mesh)
                for name, nll in (("", before), (", fine-tuned", nll_by_position(found, tuned, corpus))):
                    values = [f"{value:.1f}" for value in buckets(nll)]
                    values += ["—"] * (len(EDGES) - 1 - len(values))
                    lines.append(f"| {context:,} | {method}{name} | {' | '.join(values)} |")
                    print(lines[-1], flush=True)
                    middles = [np.sqrt(max(a, 16) * b) for a, b in itertools.pairwise(EDGES) if b <= context]
                    style = "-" if name else ":"
                    color = f"C{METHODS.index(method)}"
                    axis.plot(middles, buckets(nll), style, color=color, label=method + name)
            axis.axvline(SHORT, color="grey", linewidth=0.5)
            axis.set(xscale="log", yscale="log", xlabel="position", title=f"{SHORT} to {context:,} tokens")
            ends = [edge for edge in EDGES if 0 < edge <= context]
            axis.set_xticks(ends, [f"{edge:,}" for edge in ends])
            axis.set_yticks(PERPLEXITIES, [str(value) for value in PERPLEXITIES])
            axis.minorticks_off()
    axes[0].set_ylabel("perplexity")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "long_context.png", dpi=110)
    return "\n".join(lines)


def compile_for_tpus() -> str:
    """The memory of the training step at 512, 8k and 32k tokens on 16 TPU v5e, with and without what makes it fit."""
    lines = ["| context | attention | remat | fits 16 GiB | peak GiB per chip | step, s |", "|---|---|---|---|---|---|"]
    for context, attention, remat in (
        ("512", "auto", "none"),
        ("8k", "auto", "none"),
        ("8k", "auto", "full"),
        ("32k", "plain", "full"),
        ("32k", "chunked", "full"),
        ("32k", "auto", "full"),
    ):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", "tpu.compile", f"--config=configs/long_context.py:{context}"]
            command += ["--topology=v5e:2x4", "--config.mesh.fsdp=8", f"--config.model.attention={attention}"]
            command += [f"--config.model.remat={remat}", f"--json={file.name}"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if not pathlib.Path(file.name).stat().st_size:
                raise SystemExit(done.stderr)
            found = json.loads(pathlib.Path(file.name).read_text())
        name = "splash" if attention == "auto" else attention
        peak = f"{found['bytes_per_chip']['peak'] / 2**30:.1f}"
        step = f"{found['step_seconds']:.2f}" if found["step_seconds"] else "—"
        lines.append(f"| {context} | {name} | {remat} | {'yes' if found['fits'] else 'no'} | {peak} | {step} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Writes one of the two tables."""
    compiling = "--compile" in sys.argv
    mark, table = ("compile", compile_for_tpus()) if compiling else ("extension", extend())
    page = ROOT / "docs" / "attention.md"
    text, pattern = page.read_text(), rf"(<!-- {mark} -->\n).*?(<!-- end -->)"
    assert re.search(pattern, text, re.S), mark
    page.write_text(re.sub(pattern, lambda found: f"{found[1]}{table}\n{found[2]}", text, count=1, flags=re.S))


if __name__ == "__main__":
    main()
