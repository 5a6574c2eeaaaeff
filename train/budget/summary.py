"""What an experiment amounts to before it runs: parameters, operations, tokens, memory. Touches no device."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from model import kinds
from model.config import ModelConfig
from model.vision.resnet import FIXED_STATISTICS
from model.weights import Weights, named, size
from tpu.pipeline import bubble_fraction
from train.adapter import weights as adapter_weights
from train.budget.flops import flops_per_token, met_by_token
from train.config import Experiment
from train.optimize.frozen import trained_part
from train.optimize.optimizer import optimizer, state_bytes
from train.optimize.schedule import schedule
from train.step import frozen_mask
from train.tree import to_dict

FEWEST_REPLICAS = 2  # of local SGD, taken where mesh.data=-1 leaves their number to the devices


def parameter_counts(weights: Any, config: ModelConfig | None = None) -> dict[str, int]:
    """Total, embedding (token and position tables) and non-embedding numbers of abstract or real weights.

    Fixed statistics of batch normalisation are not parameters. With the `config` of a mixture of experts also `active`:
    those that a token meets.
    """
    total = embedding = active = 0
    for path, weight in named(weights).items():
        if path[-1] in FIXED_STATISTICS:
            continue
        total += size(weight)
        active += size(weight) if config is None else met_by_token(path, size(weight), config)
        embedding += size(weight) if path[-1] == "embedding" else 0
    counts = {"total": total, "embedding": embedding, "non_embedding": total - embedding}
    return counts | {"active": active} if config is not None and config.experts else counts


def pipeline_bubble(experiment: Experiment) -> float | None:
    """The share of time that a stage of the pipeline idles; None without stages, and where their number is not known.

    The formula is that of `tpu.pipeline.bubble_fraction`, (S - 1) / (M R + S - 1).
    """
    model, stages = experiment.model, experiment.mesh.stage
    if stages in (-1, 1):
        return None
    return bubble_fraction(stages, model.pipeline_repeats, model.pipeline_microbatches or stages)


class Held(NamedTuple):
    """The abstract weights of a run: those that it trains, with their logical axes, and those that stay as they are."""

    trained: Weights
    axes: Any
    frozen: Weights  # {} where nothing is frozen


def held(experiment: Experiment) -> Held:
    """What is trained and what is frozen, by an adapter or by optimizer.frozen; the experiment's model is placed."""
    if experiment.adapter.kind != "none":
        base, _, trained, axes = adapter_weights.parts(experiment.adapter, experiment.model)
        return Held(trained, axes, base)
    _, weights, axes = kinds.build(experiment.model)
    if not experiment.optimizer.frozen:
        return Held(weights, axes, {})
    still = frozen_mask(weights, experiment.optimizer.frozen)
    moving = jax.tree.map(lambda frozen: not frozen, still)
    return Held(trained_part(weights, still), trained_part(axes, still), trained_part(weights, moving))


def trained_share(experiment: Experiment) -> float:
    """The share of the weights that have a gradient and a state of the optimizer."""
    trained, _, frozen = held(experiment)
    count = parameter_counts(trained)["total"]
    return count / (count + parameter_counts(frozen)["total"])


def summarize(experiment: Experiment) -> dict[str, Any]:
    """The figures of a resolved experiment, ready for JSON."""
    experiment = dataclasses.replace(experiment)
    asked, experiment.model = experiment.model, experiment.model.placed("cpu", "float32")
    trained, axes, frozen = held(experiment)
    counts, stays = (parameter_counts(weights, asked) for weights in (trained, frozen))
    if frozen:
        moves = counts["total"]
        counts = {name: count + stays[name] for name, count in counts.items()}
        counts |= {"trained": moves, "frozen": stays["total"]}
    rule = optimizer(experiment.optimizer, schedule(experiment.optimizer, experiment.run.steps), axes)
    tokens = experiment.run.steps * experiment.data.batch_size * experiment.data.context
    memory = {"frozen": tree_bytes(frozen)} if frozen else {}
    memory |= {"weights": tree_bytes(trained), "optimizer": state_bytes(rule, trained)}
    # An adapter's base is none of the state's weights; what optimizer.frozen names is.
    of_state = [trained] if experiment.adapter.kind != "none" else [trained, frozen]
    in_state = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(of_state))
    if experiment.optimizer.local_steps:
        # `train.optimize.local_sgd.LocalState`: replicas with two counters each, and momentum.
        replicas = max(FEWEST_REPLICAS, experiment.mesh.data)
        memory["optimizer"] = replicas * (sum(memory.values()) + 8) + 4 * in_state
    memory["ema"] = 4 * in_state if experiment.optimizer.ema_decay else 0
    return {
        "experiment": to_dict(dataclasses.replace(experiment, model=asked)),
        "parameters": counts,
        "flops_per_token": flops_per_token(experiment),
        "tokens": tokens,
        "tokens_per_parameter": tokens / counts["total"],
        "bytes": memory,
        "pipeline_bubble": pipeline_bubble(experiment),
    }


def tree_bytes(weights: Any) -> int:
    """Bytes of abstract or real weights."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))


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
    if "active" in counts:
        print(f"active              {counts['active']:,} of them for a token")
    if "trained" in counts:
        share = counts["trained"] / counts["total"]
        print(f"trained             {counts['trained']:,} ({share:.2%}), frozen {counts['frozen']:,}")
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
