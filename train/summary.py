"""What an experiment amounts to before it runs: parameters, operations, tokens, memory. Touches no device."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from model import transformer
from model.config import ModelConfig
from tpu.pipeline import bubble_fraction
from train.config import Experiment, to_dict
from train.optimizer import optimizer, state_bytes
from train.schedule import schedule

FEWEST_REPLICAS = 2  # of local SGD, taken where mesh.data=-1 leaves their number to the devices


def parameter_counts(weights: Any) -> dict[str, int]:
    """Total, embedding (token and position tables) and non-embedding numbers of abstract or real weights."""
    total = embedding = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        size = math.prod(leaf.shape)
        total += size
        embedding += size if path[-1].key == "embedding" else 0
    return {"total": total, "embedding": embedding, "non_embedding": total - embedding}


def flops_per_token(config: ModelConfig, weights: Any, context: int) -> int:
    """Floating-point operations of one training step per token, counted as PaLM does (arXiv:2204.02311, appendix B).

    Six per weight that multiplies an activation (the head's table counts, looked-up tables do not), and for attention
    12 * layers * heads * head_dim * context, not halved for causality; a local layer counts its window. Operations
    done again by rematerialisation do not count.
    """
    kernels = sum(
        math.prod(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(weights) if path[-1].key == "kernel"
    )
    if config.tied_head:
        kernels += config.vocab_size * config.embed_dim
    seen = [min(context, config.window) if kind == "local" else context for kind in config.pattern]
    keys = sum(seen) * config.layers // len(config.pattern)
    return 6 * kernels + 12 * config.heads * config.head_dim * keys


def pipeline_bubble(experiment: Experiment) -> float | None:
    """The share of time that a stage of the pipeline idles; None without stages, and where their number is not known.

    The formula is that of `tpu.pipeline.bubble_fraction`, (S - 1) / (M R + S - 1).
    """
    model, stages = experiment.model, experiment.mesh.stage
    if stages in (-1, 1):
        return None
    return bubble_fraction(stages, model.pipeline_repeats, model.pipeline_microbatches or stages)


def summarize(experiment: Experiment) -> dict[str, Any]:
    """The figures of a resolved experiment, ready for JSON."""
    config = experiment.model.placed("cpu", "float32")
    _, weights, axes = transformer.build(config)
    counts = parameter_counts(weights)
    rule = optimizer(experiment.optimizer, schedule(experiment.optimizer, experiment.run.steps), axes)
    tokens = experiment.run.steps * experiment.data.batch_size * experiment.data.context
    weight_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    optimizer_bytes = state_bytes(rule, weights)
    if experiment.optimizer.local_steps:  # `train.local_sgd.LocalState`: replicas with two counters each, and momentum
        replicas = max(FEWEST_REPLICAS, experiment.mesh.data)
        optimizer_bytes = replicas * (weight_bytes + optimizer_bytes + 8) + 4 * counts["total"]
    return {
        "experiment": to_dict(experiment),
        "parameters": counts,
        "flops_per_token": flops_per_token(config, weights, experiment.data.context),
        "tokens": tokens,
        "tokens_per_parameter": tokens / counts["total"],
        "bytes": {
            "weights": weight_bytes,
            "optimizer": optimizer_bytes,
            "ema": 4 * counts["total"] if experiment.optimizer.ema_decay else 0,
        },
        "pipeline_bubble": pipeline_bubble(experiment),
    }


def print_summary(experiment: Experiment, figures: dict[str, Any]) -> None:
    """Prints the resolved tree and the figures for a person."""
    for branch in dataclasses.fields(experiment):
        value = getattr(experiment, branch.name)
        if not dataclasses.is_dataclass(value):
            print(f"{branch.name} = {value!r}")
            continue
        for field in dataclasses.fields(value):
            print(f"{branch.name}.{field.name} = {getattr(value, field.name)!r}")
    counts, memory = figures["parameters"], figures["bytes"]
    print(
        f"\nparameters          {counts['total']:,} "
        f"(embedding {counts['embedding']:,}, non-embedding {counts['non_embedding']:,})"
    )
    print(f"FLOPs per token     {figures['flops_per_token']:,} (forward and backward)")
    print(f"tokens              {figures['tokens']:,} ({figures['tokens_per_parameter']:.1f} per parameter)")
    print(f"FLOPs in all        {figures['flops_per_token'] * figures['tokens']:.3g}")
    parts = ", ".join(f"{name} {human_bytes(count)}" for name, count in memory.items() if count)
    print(f"memory              {human_bytes(sum(memory.values()))}: {parts}")
    if experiment.optimizer.local_steps and experiment.mesh.data == -1:
        print(f"                    (of {FEWEST_REPLICAS} replicas; mesh.data=-1 decides their number)")
    if figures["pipeline_bubble"] is not None:
        print(f"pipeline bubble     {figures['pipeline_bubble']:.2%} of the time of each stage")


def human_bytes(count: float) -> str:
    """A number of bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
