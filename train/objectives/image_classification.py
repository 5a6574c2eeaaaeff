"""The class of an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from train.data.batch import Batch, Layout, by_token, image_layout, text_layout
from train.data.chat.record import Conversation
from train.data.chat.rows import class_names, class_row, load, open_sources
from train.data.corpus import Corpus, conversation_tokenizer, record_corpus
from train.objectives.objective import (
    Objective,
    Role,
    Sums,
    accuracy,
    check_blind,
    check_model,
    check_one_image,
    token_weights,
)

if TYPE_CHECKING:
    import jax

    from train.config import Experiment
    from train.data.text.tokenizer import Tokenizer
    from train.objectives.bound import Bound


def roles(experiment: Experiment) -> dict[str, Role]:
    """One classifier of images."""
    return {"model": Role()}


def check(experiment: Experiment) -> None:
    """Raises UserError for a model that is no classifier of images."""
    check_model(experiment, "vision", "language")
    check_blind(experiment)
    check_one_image(experiment)


def corpus(experiment: Experiment, tokenizer: Tokenizer | None = None) -> Corpus:
    """Images, each with the name of its class."""
    data, model = experiment.data, experiment.model
    tokenizer, sources = tokenizer or conversation_tokenizer(data, model), open_sources(data, model)
    names = class_names(sources, model.labels, data)
    numbers = {name: number for number, name in enumerate(names)}

    def make(conversation: Conversation, counts: Counter[str]) -> Batch:
        return class_row(conversation, numbers, data, model)

    return record_corpus(load(sources, data, make, names), data, tokenizer)


def layout(experiment: Experiment) -> Layout:
    """Rows of one token, which stands for the image."""
    data, model = experiment.data, experiment.model
    found = text_layout(data.batch_size, 1, model.vocab_size) | image_layout(data.batch_size, 1, model, data)
    return found | {"targets": by_token(data.batch_size, 1, random=model.labels)}


def sums(
    models: Mapping[str, Bound], batch: Batch, experiment: Experiment, keys: jax.Array | None, carried: Any
) -> Sums:
    """Cross-entropy of the class; a row weighs what its only token does."""
    import jax

    from train.losses.labels import label_sums

    logits = models["model"](batch["images"][:, 0])[:, None]
    with jax.named_scope("loss"):
        targets, weights = batch["targets"][:, :1], batch["loss_weights"][:, :1]
        loss, correct = label_sums("classification", logits, targets, weights)
    return Sums({"loss": loss}, {"nll": loss, "accuracy": correct})


OBJECTIVE = Objective(roles, check, corpus, layout, token_weights, sums, accuracy)
