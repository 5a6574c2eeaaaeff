"""Spans that were cut out of a text: T5 (arXiv:1910.10683, section 3.1.4)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tpu.errors import UserError
from train.data.batch import Layout, encoder_layout, text_layout
from train.data.corpus import HELD_OUT_SEED, Corpus, load_corpus
from train.data.text.span_corruption import SpanCorruption
from train.objectives import sequence_to_sequence
from train.objectives.masked import check_special_token, first_special_token
from train.objectives.objective import Objective, check_blind, check_model, perplexity, token_weights

if TYPE_CHECKING:
    from train.config import Experiment
    from train.data.text.tokenizer import Tokenizer


def spans(experiment: Experiment) -> tuple[int, int]:
    """How many tokens of a row are cut out, and in how many spans."""
    objective, context = experiment.objective, experiment.data.context
    noise = min(max(round(context * objective.corruption), 1), context - 1)
    return noise, min(max(round(noise / objective.span_length), 1), noise, context - noise)


def special_tokens(experiment: Experiment) -> int:
    """The sentinels, where they are the vocabulary's last."""
    return 0 if experiment.objective.special_token >= 0 else spans(experiment)[1]


def check(experiment: Experiment) -> None:
    """Raises UserError for another model, and where there are more spans than ids for sentinels."""
    check_model(experiment, "encoder_decoder", "language")
    check_blind(experiment)
    check_special_token(experiment)
    objective, context, last = experiment.objective, experiment.data.context, spans(experiment)[1]
    if context < 2 or 0 <= objective.special_token < last - 1:
        raise UserError(
            f"objective.special_token={objective.special_token}: data.context={context} has {last} sentinels, "
            "which go down from it to at least 0"
        )


def corpus(experiment: Experiment, tokenizer: Tokenizer | None = None) -> Corpus:
    """Packed documents, cut anew whenever they are read."""
    found, model = load_corpus(experiment.data, tokenizer=tokenizer), experiment.model
    end = found.tokenizer.end_of_document
    start = end if model.start_token < 0 else model.start_token
    fixed = *spans(experiment), first_special_token(experiment), start, end
    return dataclasses.replace(
        found,
        train_change=SpanCorruption(experiment.run.seed, *fixed),
        held_out_change=SpanCorruption(HELD_OUT_SEED, *fixed),
    )


def layout(experiment: Experiment) -> Layout:
    """What is left of a row, for the encoder, and what was cut out, for the decoder to write."""
    (noise, count), rows, vocab_size = spans(experiment), experiment.data.batch_size, experiment.model.vocab_size
    left = experiment.data.context - noise + count
    return text_layout(rows, noise + count + 1, vocab_size) | encoder_layout(rows, left, vocab_size)


OBJECTIVE = Objective(
    sequence_to_sequence.roles,
    check,
    corpus,
    layout,
    token_weights,
    sequence_to_sequence.sums,
    perplexity,
    special_tokens,
)
