"""Masked tokens, and whether a text follows another: BERT (arXiv:1810.04805, section 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tpu.errors import UserError
from train.data.batch import Batch, Field, Layout, by_token, text_layout
from train.data.corpus import HELD_OUT_SEED, Corpus, load_corpus
from train.data.text.masking import Masking
from train.objectives.next_token import language_sums
from train.objectives.objective import Objective, Role, Sums, check_blind, check_model, perplexity, token_weights

if TYPE_CHECKING:
    import jax

    from train.config import Experiment
    from train.data.text.tokenizer import Tokenizer
    from train.objectives.bound import Bound


def roles(experiment: Experiment) -> dict[str, Role]:
    """One encoder, with a head over the vocabulary."""
    return {"model": Role()}


def check(experiment: Experiment) -> None:
    """Raises UserError for a model that is no encoder of text, or cannot tell two texts apart."""
    check_model(experiment, "encoder", "language")
    check_blind(experiment)
    check_special_token(experiment)
    model = experiment.model
    if model.next_sentence and (model.token_types < 2 or experiment.data.context < 2):
        raise UserError(
            f"model.token_types={model.token_types}: model.next_sentence needs at least 2, and as large a data.context"
        )


def check_special_token(experiment: Experiment) -> None:
    """Raises UserError for a special token beyond the vocabulary."""
    given, vocab_size = experiment.objective.special_token, experiment.model.vocab_size
    if given >= vocab_size:
        raise UserError(f"objective.special_token={given}: must be below model.vocab_size={vocab_size}")


def first_special_token(experiment: Experiment) -> int:
    """The mask, or the first sentinel."""
    given = experiment.objective.special_token
    return experiment.model.vocab_size - 1 if given < 0 else given


def special_tokens(experiment: Experiment) -> int:
    """The mask, where it is the vocabulary's last."""
    return int(experiment.objective.special_token < 0)


def corpus(experiment: Experiment, tokenizer: Tokenizer | None = None) -> Corpus:
    """Packed documents, masked anew whenever they are read; in training, with model.next_sentence, as pairs."""
    model, found = experiment.model, load_corpus(experiment.data, tokenizer=tokenizer)
    fixed = experiment.objective.corruption, first_special_token(experiment)
    fixed += found.tokenizer.vocab_size, found.tokenizer.end_of_document, found.tokenizer.beginning
    training = Masking(experiment.run.seed, *fixed, partners=found.train if model.next_sentence else ())
    held_out = Masking(HELD_OUT_SEED, *fixed)

    def single(number: int, row: Batch) -> Batch:
        """A held-out row, which is never a pair: one text, followed by itself."""
        one = {"token_types": np.zeros_like(row["tokens"]), "next_sentence": np.zeros(1, np.int32)}
        return held_out(number, row) | (one if model.next_sentence else {})

    return dataclasses.replace(found, train_change=training, held_out_change=single)


def layout(experiment: Experiment) -> Layout:
    """Rows of tokens and, with model.next_sentence, of which text each is and whether the second follows the first."""
    rows, tokens = experiment.data.batch_size, experiment.data.context
    found = text_layout(rows, tokens, experiment.model.vocab_size)
    if experiment.model.next_sentence:
        found |= {"token_types": by_token(rows, tokens), "next_sentence": Field((rows, 1), "int32", ("batch",))}
    return found


def weights(batch: Batch) -> dict[str, jax.Array]:
    """Masked tokens, and rows."""
    import jax.numpy as jnp

    return token_weights(batch) | {"next_sentence": jnp.float32(batch["tokens"].shape[0])}


def sums(
    models: Mapping[str, Bound], batch: Batch, experiment: Experiment, keys: jax.Array | None, carried: Any
) -> Sums:
    """Cross-entropy of the masked tokens, and of whether the second text follows the first."""
    import jax.numpy as jnp

    from model.place import Place
    from train.losses.labels import label_sums

    model, place = models["model"], Place(batch["segments"], batch["positions"])
    hidden, _ = model(batch["tokens"], place, key=keys, token_types=batch.get("token_types"))
    trained = {}
    if "next_sentence" in batch:
        first = model.module.next_sentence(hidden[:, :1])  # [B, 1, 2]
        ones = jnp.ones(first.shape[:2])
        trained["next_sentence"], _ = label_sums("classification", first, batch["next_sentence"], ones)
    loss, nll = language_sums(model, hidden, batch, experiment)
    return Sums({"loss": loss} | trained, {"nll": nll})


OBJECTIVE = Objective(roles, check, corpus, layout, weights, sums, perplexity, special_tokens)
