"""The next token of packed documents: the language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from train.data.batch import Batch, Layout, text_layout
from train.data.corpus import Corpus, load_corpus
from train.objectives.objective import (
    Objective,
    Report,
    Role,
    Sums,
    check_blind,
    check_model,
    perplexity,
    token_weights,
)

if TYPE_CHECKING:
    import jax

    from train.config import Experiment
    from train.data.text.tokenizer import Tokenizer
    from train.objectives.bound import Bound


def roles(experiment: Experiment) -> dict[str, Role]:
    """One model, with a head over the vocabulary."""
    return {"model": Role()}


def check(experiment: Experiment) -> None:
    """Raises UserError for a model that is no decoder of text."""
    check_model(experiment, "decoder", "language")
    check_blind(experiment)


def corpus(experiment: Experiment, tokenizer: Tokenizer | None = None) -> Corpus:
    """Packed documents; their tokenizer is trained where it is not given."""
    return load_corpus(experiment.data, tokenizer=tokenizer)


def layout(experiment: Experiment) -> Layout:
    """Rows of tokens."""
    data = experiment.data
    return text_layout(data.batch_size, data.context, experiment.model.vocab_size)


def language_sums(model: Bound, hidden: jax.Array, batch: Batch, experiment: Experiment) -> tuple[jax.Array, jax.Array]:
    """Sums over all tokens of the loss that is trained and of the negative log-likelihood, from hidden [B, T, D]."""
    import jax

    from train.losses.cross_entropy import cross_entropy

    with jax.named_scope("loss"):
        targets = batch["targets"], batch["loss_weights"]
        return cross_entropy(*model.split_head(), hidden, *targets, experiment.loss)


def decoder_sums(
    model: Bound, batch: Batch, experiment: Experiment, keys: jax.Array | None, memory: Any, images: Any = None
) -> Sums:
    """The sums of a decoder, which may remember earlier rows and see `images` (`model.vision.images.Images`)."""
    from model.place import Place

    place = Place(batch["segments"], batch["positions"])
    turned = batch.get("rope_positions")
    hidden, memory, routings = model.module.routed(
        batch["tokens"], place, memory, keys, positions=turned, images=images
    )
    loss, nll = language_sums(model, hidden, batch, experiment)
    return Sums({"loss": loss}, {"nll": nll}, memory, routings)


def sums(
    models: Mapping[str, Bound], batch: Batch, experiment: Experiment, keys: jax.Array | None, carried: Any
) -> Sums:
    """Cross-entropy of every token."""
    return decoder_sums(models["model"], batch, experiment, keys, carried)


def memory(experiment: Experiment) -> Any:
    """What the first rows remember: nothing yet (`model.memory`), or None where the model never does."""
    if not experiment.model.remembers:
        return None
    from model.attention.memory import empty_memory

    return empty_memory(experiment.model, experiment.data.batch_size)


def figures(means: dict[str, float], corpus: Corpus) -> dict[str, float]:
    """Loss, perplexity, and the bits per byte of the held-out documents.

    Bits per byte divides all bits by the documents' bytes. Where only some batches were evaluated, their bytes are
    taken to be in proportion to their tokens.
    """
    import math

    bytes_per_token = corpus.held_out_bytes / max(corpus.held_out_tokens, 1)
    return perplexity(means, corpus) | {"bits_per_byte": means["nll"] / math.log(2) / bytes_per_token}


def report(
    experiment: Experiment, weights: Any, tokenizer: Tokenizer, corpus: Corpus, figures: dict[str, float], limit: int
) -> Report:
    """What general-purpose compressors need for the same bytes."""
    from train.data.corpus import held_out_documents
    from train.evaluate.held_out import compressor_figures

    compressed = compressor_figures(held_out_documents(experiment.data))
    rows = limit // experiment.data.batch_size or "all"
    bits = {f"this model ({rows} batches)": figures["bits_per_byte"], "xz -9e": compressed["xz"]}
    bits |= {"zlib -9": compressed["zlib"]}
    lines = [
        f"{corpus.held_out_bytes:,} held-out bytes, {corpus.held_out_tokens:,} tokens",
        f"loss {figures['loss']:.4f} nats per token, perplexity {figures['perplexity']:.2f}",
        "bits per byte on the same held-out bytes:",
        *(f"{'  ' + name:32}{value:.4f}" for name, value in bits.items()),
    ]
    return Report(lines, {"compressors": compressed, "held_out_bytes": corpus.held_out_bytes})


OBJECTIVE = Objective(roles, check, corpus, layout, token_weights, sums, figures, carried=memory, report=report)
