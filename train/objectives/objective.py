"""The contract of an objective: its models, its rows, its loss and its figures, all in one file of its own.

No other file asks which objective runs. Sharding, the padding of the last batch, random batches, ring order and
micro-batches follow from `layout`; the step (`train.step`) is the same for all. A file of this room imports no jax
before `sums` is called, for it is read where data are made and experiments are checked.

Legend: B rows of a batch, or of the part of it that a micro-batch is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from model.config import ModelConfig
from model.fields.fusion import CONTRASTIVE, LATE
from tpu.errors import UserError
from train.data.batch import Batch, Layout

if TYPE_CHECKING:
    import jax

    from train.config import Experiment
    from train.data.corpus import Corpus
    from train.data.text.tokenizer import Tokenizer
    from train.objectives.bound import Bound


class Role(NamedTuple):
    """One of the models that an objective computes with."""

    head: str = "language"  # language, pooled, token (`ModelConfig.head`)
    trained: bool = True  # else frozen: an argument of the step, never saved
    starts_from: str = ""  # frozen: the field of the experiment that names its checkpoint, such as "data.reference"
    model: ModelConfig | None = None  # its shape, resolved; None: the experiment's model


class Sums(NamedTuple):
    """Sums over rows, never means: micro-batches, packing and meshes then change nothing. Float32 scalars."""

    trained: Mapping[str, jax.Array]  # terms of the loss; the step divides each by the same name of `weights`
    told: Mapping[str, jax.Array] = {}  # behind the figures of training and evaluation, divided likewise
    carried: Any = None  # for the next step: what is remembered of these rows
    routings: Mapping[str, Any] = {}  # what the routers of the first trained model did (`train.optimize.balance`)


class Report(NamedTuple):
    """What train.evaluate adds to the held-out figures."""

    lines: list[str]  # for the terminal
    figures: dict[str, Any]  # for --json
    page: Callable[[], str] | None = None  # for --page


class Objective(NamedTuple):
    """What is learned, from which rows, by which loss.

    `roles` are named. Weights of a state are those of the one model that is trained, or, where several are, a
    dictionary by role. Frozen weights are always a dictionary by role; the base of an adapter has the name of the role
    that it is adapted for.

    `sums` takes the bound models by role, the batch, the experiment, [B] keys for dropout or None, and what the step
    before handed on, or None.
    """

    roles: Callable[[Experiment], dict[str, Role]]
    check: Callable[[Experiment], None]  # raises UserError for what it asks of other sections
    corpus: Callable[[Experiment, Tokenizer | None], Corpus]  # records -> rows of both sides
    layout: Callable[[Experiment], Layout]
    # Denominators by name, from the batch alone. The first is what the batch weighs beside others (`loss_tokens`);
    # "routed", where there are experts: the tokens that are no padding.
    weights: Callable[[Batch], dict[str, jax.Array]]
    sums: Callable[[Mapping[str, Bound], Batch, Experiment, jax.Array | None, Any], Sums]
    figures: Callable[[dict[str, float], Corpus], dict[str, float]]  # held-out, from the means of what is told
    special_tokens: Callable[[Experiment], int] = lambda experiment: 0  # last ids that the tokenizer must leave free
    # What the first step finds in `state.carried`: arrays whose first dimension are rows, cut as the batch is.
    carried: Callable[[Experiment], Any] = lambda experiment: None
    # On-policy: rows from the present policy (`train.align.rollout`). They lie in `state.carried`, which the step then
    # hands on as it is.
    collect: Callable[..., Any] | None = None
    # (experiment, weights, tokenizer, corpus, figures, limit of rows) -> what train.evaluate adds
    report: Callable[..., Report] | None = None
    talks: bool = False  # whether rows are turns of a conversation


def check_model(experiment: Experiment, kind: str, head: str, also: tuple[str, ...] = ()) -> None:
    """Raises UserError where the experiment's model is not of this kind, or one of `also`, or has another head."""
    model, name = experiment.model, experiment.objective.name
    for field, wanted, allowed in (("kind", kind, (kind, *also)), ("head", head, (head,))):
        if getattr(model, field) not in allowed:
            raise UserError(
                f"model.{field}={getattr(model, field)!r}: objective.name={name!r} trains model.{field}={wanted!r}"
            )


# Fusions whose rows are an image and a text each, and the objectives that have such rows.
OF_PAIRS = {CONTRASTIVE: ("contrastive",), LATE: ("image_text_classification", "image_text_matching")}


def check_blind(experiment: Experiment) -> None:
    """Raises UserError where the model reads images, which the rows of this objective have not."""
    fusion, name = experiment.model.fusion, experiment.objective.name
    if fusion == "none":
        return
    if fusion in OF_PAIRS:
        valid = " or ".join(map(repr, OF_PAIRS[fusion]))
        raise UserError(f"objective.name={name!r}: model.fusion={fusion!r}; {fusion!r} goes with {valid}")
    raise UserError(
        f"objective.name={name!r}: model.fusion={fusion!r} reads images in conversations; give "
        "objective.name='conversation'"
    )


def check_one_image(experiment: Experiment) -> None:
    """Raises UserError where an image would become several, and rows take one."""
    if experiment.data.image_fit == "tiles" and experiment.model.vision.encoder != "none":
        raise UserError(
            f"data.image_fit='tiles': objective.name={experiment.objective.name!r} takes one image a row; give squash, "
            "pad or crop"
        )


def check_whole_batch(experiment: Experiment) -> None:
    """Raises UserError where a step would see less than all rows of a batch at once, which are compared."""
    data, optimizer, name = experiment.data, experiment.optimizer, experiment.objective.name
    if data.batch_size == 1:
        raise UserError(f"data.batch_size=1: objective.name={name!r} compares the rows of a batch; give 2 or more")
    if optimizer.accumulation > 1 or optimizer.local_steps:
        raise UserError(
            f"optimizer.accumulation={optimizer.accumulation}: objective.name={name!r} compares all rows of a batch "
            "with each other; give 1, and optimizer.local_steps=0"
        )


def perplexity(means: dict[str, float], corpus: Corpus) -> dict[str, float]:
    """Held-out figures of an objective that predicts tokens: loss (nats per token) and perplexity."""
    import math

    return {"loss": means["nll"], "perplexity": math.exp(min(means["nll"], 700.0))}


def accuracy(means: dict[str, float], corpus: Corpus) -> dict[str, float]:
    """Held-out figures of an objective whose answers are right or wrong."""
    return {"loss": means["nll"], "accuracy": means["accuracy"]}


def token_weights(batch: Batch) -> dict[str, jax.Array]:
    """Denominators of an objective that weighs tokens by `loss_weights`."""
    total = batch["loss_weights"].sum()
    return {"loss": total, "nll": total, "accuracy": total, "routed": (batch["segments"] > 0).sum()}
