"""All objectives by the name that `objective.name` gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpu.errors import UserError
from train.objectives import (
    contrastive,
    conversation,
    image_classification,
    image_text,
    labels,
    masked,
    next_token,
    sequence_to_sequence,
    span_corruption,
)
from train.objectives.objective import Objective

if TYPE_CHECKING:
    from train.config import Experiment

OBJECTIVES: dict[str, Objective] = {
    "next_token": next_token.OBJECTIVE,
    "masked": masked.OBJECTIVE,
    "classification": labels.CLASSIFICATION,
    "regression": labels.REGRESSION,
    "multi_label": labels.MULTI_LABEL,
    "token_classification": labels.TOKEN_CLASSIFICATION,
    "span": labels.SPAN,
    "span_corruption": span_corruption.OBJECTIVE,
    "sequence_to_sequence": sequence_to_sequence.OBJECTIVE,
    "conversation": conversation.OBJECTIVE,
    "contrastive": contrastive.OBJECTIVE,
    "image_classification": image_classification.OBJECTIVE,
    "image_text_classification": image_text.CLASSIFICATION,
    "image_text_matching": image_text.MATCHING,
}


def objective_of(experiment: Experiment) -> Objective:
    """The objective that the experiment names. Raises UserError where there is none of that name."""
    name = experiment.objective.name
    if name not in OBJECTIVES:
        raise UserError(f"objective.name={name!r}: valid: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
