"""Which text goes with which image, among all of a batch: CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tpu.errors import UserError
from train.data.batch import Batch, Layout, image_layout, text_layout
from train.data.chat.record import Conversation
from train.data.chat.rows import caption_row, load, open_sources
from train.data.corpus import Corpus, conversation_tokenizer, record_corpus
from train.objectives.objective import (
    Objective,
    Report,
    Role,
    Sums,
    accuracy,
    check_model,
    check_one_image,
    check_whole_batch,
    token_weights,
)

if TYPE_CHECKING:
    import jax

    from train.config import Experiment
    from train.data.text.tokenizer import Tokenizer
    from train.objectives.bound import Bound


def roles(experiment: Experiment) -> dict[str, Role]:
    """One model of two towers."""
    return {"model": Role()}


def check(experiment: Experiment) -> None:
    """Raises UserError for another model, and for batches of which a step would see less than all at once."""
    check_model(experiment, "decoder", "language", also=("encoder",))
    model, name = experiment.model, experiment.objective.name
    if not model.pairs:
        raise UserError(f"objective.name={name!r}: model.fusion={model.fusion!r}; {name!r} goes with {name!r}")
    check_one_image(experiment)
    check_whole_batch(experiment)


def corpus(experiment: Experiment, tokenizer: Tokenizer | None = None) -> Corpus:
    """Images with a text about each."""
    data, model = experiment.data, experiment.model
    tokenizer = tokenizer or conversation_tokenizer(data, model)

    def make(conversation: Conversation, counts: Counter[str]) -> Batch:
        return caption_row(conversation, tokenizer, data, model, counts)

    return record_corpus(load(open_sources(data, model), data, make), data, tokenizer)


def layout(experiment: Experiment) -> Layout:
    """Texts, each with an image."""
    data, model = experiment.data, experiment.model
    return text_layout(data.batch_size, data.context, model.vocab_size) | image_layout(data.batch_size, 1, model, data)


def sums(
    models: Mapping[str, Bound], batch: Batch, experiment: Experiment, keys: jax.Array | None, carried: Any
) -> Sums:
    """The loss over all pairs of the batch's images and texts; a row weighs what its first token does."""
    import jax

    from model.place import Place
    from train.losses.contrastive import contrastive_sums

    model, place = models["model"].module, Place(batch["segments"], batch["positions"])
    logits = model.logits(model.images(batch["images"][:, 0]), model.texts(batch["tokens"], place))
    with jax.named_scope("loss"):
        similarity = experiment.model.vision.similarity
        loss, correct = contrastive_sums(logits, batch["loss_weights"][:, 0], similarity)
    return Sums({"loss": loss}, {"nll": loss, "accuracy": correct})


def report(
    experiment: Experiment, weights: Any, tokenizer: Tokenizer, corpus: Corpus, figures: dict[str, float], limit: int
) -> Report:
    """How often the right text is found for an image, and the right image for a text."""
    from train.evaluate import retrieval

    found = retrieval.figures(experiment, weights, tokenizer, limit)
    lines = [
        f"{source}, {of_source['count']} pairs of different texts: "
        + "  ".join(f"{key} {value:.1%}" for key, value in of_source.items() if key != "count")
        for source, of_source in found.items()
    ]
    return Report(lines, {"retrieval": found})


OBJECTIVE = Objective(roles, check, corpus, layout, token_weights, sums, accuracy, report=report)
