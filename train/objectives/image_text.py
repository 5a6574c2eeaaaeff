"""Labels of an image and a text together, by late fusion (`model.fusion.late`): classes, and whether the two match.

Classification answers a question about an image by one of a set of answers (VQA, arXiv:1505.00468). Matching tells a
text's own image from another (alignment prediction of ViLBERT, arXiv:1908.02265), here that of the next row of the
batch. ALBEF (arXiv:2107.07651, section 3.2) draws hard ones from the batch by a contrastive similarity, which is not
here.

Legend: B rows, L labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from model.fields.fusion import LATE
from tpu.errors import UserError
from train.data.batch import Batch, Layout, by_token
from train.data.chat.record import Conversation
from train.data.chat.rows import class_names, load, open_sources, question_row
from train.data.corpus import Corpus, conversation_tokenizer, record_corpus
from train.data.made import made
from train.objectives import contrastive
from train.objectives.objective import (
    Objective,
    Role,
    Sums,
    accuracy,
    check_model,
    check_one_image,
    check_whole_batch,
)

if TYPE_CHECKING:
    import jax

    from train.config import Experiment
    from train.data.text.tokenizer import Tokenizer
    from train.objectives.bound import Bound


def roles(experiment: Experiment) -> dict[str, Role]:
    """One encoder of texts with one of images."""
    return {"model": Role("pooled")}


def check(experiment: Experiment) -> None:
    """Raises UserError for a model without late fusion."""
    check_model(experiment, "encoder", "pooled")
    if (fusion := experiment.model.fusion) != LATE:
        raise UserError(
            f"model.fusion={fusion!r}: objective.name={experiment.objective.name!r} trains model.fusion={LATE!r}"
        )
    check_one_image(experiment)


def check_matching(experiment: Experiment) -> None:
    """Raises UserError for another model, and for batches of which a step would see less than all at once."""
    check(experiment)
    if experiment.model.labels != 2:
        raise UserError(
            f"model.labels={experiment.model.labels}: objective.name='image_text_matching' needs 2, whether an image "
            "and a text match or not"
        )
    check_whole_batch(experiment)


def corpus(experiment: Experiment, tokenizer: Tokenizer | None = None) -> Corpus:
    """Images with a question about each, and the name of its answer."""
    data, model = experiment.data, experiment.model
    tokenizer, sources = tokenizer or conversation_tokenizer(data, model), open_sources(data, model)
    names = class_names(sources, model.labels, data, made.answer)
    numbers = {name: number for number, name in enumerate(names)}

    def make(conversation: Conversation, counts: Counter[str]) -> Batch:
        return question_row(conversation, numbers, tokenizer, data, model, counts)

    return record_corpus(load(sources, data, make, names), data, tokenizer)


def layout(experiment: Experiment) -> Layout:
    """Texts, each with an image and, at its first token, a class."""
    data, found = experiment.data, contrastive.layout(experiment)
    return found | {"targets": by_token(data.batch_size, data.context, random=experiment.model.labels)}


def weights(batch: Batch) -> dict[str, jax.Array]:
    """Denominators: all rows, each of which weighs what its first token does."""
    return dict.fromkeys(("loss", "nll", "accuracy"), batch["loss_weights"][:, 0].sum())


def _vectors(model: Bound, batch: Batch, keys: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    from model.place import Place

    text = model.module.text(batch["tokens"], Place(batch["segments"], batch["positions"]), keys)
    return text, model.module.image(batch["images"][:, 0])


def sums(
    models: Mapping[str, Bound], batch: Batch, experiment: Experiment, keys: jax.Array | None, carried: Any
) -> Sums:
    """Cross-entropy of the class; a row weighs what its first token does."""
    import jax

    from train.losses.labels import label_sums

    model = models["model"]
    logits = model.module.logits(*_vectors(model, batch, keys))[:, None]  # [B, 1, L]
    with jax.named_scope("loss"):
        loss, correct = label_sums("classification", logits, batch["targets"][:, :1], batch["loss_weights"][:, :1])
    return Sums({"loss": loss}, {"nll": loss, "accuracy": correct})


def _pair_weights(batch: Batch) -> jax.Array:
    """Of each text with its own image and with the next row's, [B, 2]: the latter is no negative where the next row
    has the same text, or is padding."""
    import jax.numpy as jnp

    own, tokens = batch["loss_weights"][:, 0], batch["tokens"]
    differs = jnp.any(tokens != jnp.roll(tokens, -1, axis=0), axis=1)
    return jnp.stack([own, own * jnp.roll(own, -1) * differs], axis=1)


def matching_weights(batch: Batch) -> dict[str, jax.Array]:
    """Denominators: all pairs that count."""
    return dict.fromkeys(("loss", "nll", "accuracy"), _pair_weights(batch).sum())


def matching_sums(
    models: Mapping[str, Bound], batch: Batch, experiment: Experiment, keys: jax.Array | None, carried: Any
) -> Sums:
    """Cross-entropy of whether image and text match, label 1 for a text's own image and 0 for the next row's."""
    import jax
    import jax.numpy as jnp

    from train.losses.labels import label_sums

    module = models["model"].module
    text, image = _vectors(models["model"], batch, keys)
    pairs = module.logits(text, image), module.logits(text, jnp.roll(image, -1, axis=0))
    with jax.named_scope("loss"):
        logits, of_pairs = jnp.stack(pairs, axis=1), _pair_weights(batch)  # [B, 2, L], [B, 2]
        targets = jnp.broadcast_to(jnp.array([1, 0], jnp.int32), of_pairs.shape)
        loss, correct = label_sums("classification", logits, targets, of_pairs)
    return Sums({"loss": loss}, {"nll": loss, "accuracy": correct})


CLASSIFICATION = Objective(roles, check, corpus, layout, weights, sums, accuracy)
MATCHING = Objective(
    roles, check_matching, contrastive.corpus, contrastive.layout, matching_weights, matching_sums, accuracy
)
