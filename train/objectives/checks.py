"""What each objective asks of the model, the data and the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpu.errors import UserError
from train.objectives.table import OBJECTIVES

if TYPE_CHECKING:
    from train.config import Experiment


def check(experiment: Experiment) -> None:
    """Raises UserError where model, data and optimizer are not what the objective asks for."""
    model, objective, data = experiment.model, experiment.objective, experiment.data
    if objective.name not in OBJECTIVES:
        raise UserError(f"objective.name={objective.name!r}: valid: {', '.join(OBJECTIVES)}")
    kind, head = OBJECTIVES[objective.name]
    kinds = (kind, "encoder") if objective.name == "contrastive" else (kind,)
    for field, wanted in (("kind", kind), ("head", head)):
        if getattr(model, field) not in (kinds if field == "kind" else (head,)):
            raise UserError(
                f"model.{field}={getattr(model, field)!r}: objective.name={objective.name!r} trains "
                f"model.{field}={wanted!r}"
            )
    _check_images(experiment)
    if objective.name == "span" and model.labels != 2:
        raise UserError(f"model.labels={model.labels}: objective.name='span' needs 2, the first token and the last")
    if model.next_sentence and (model.token_types < 2 or data.context < 2):
        raise UserError(
            f"model.token_types={model.token_types}: model.next_sentence needs at least 2, and as large a data.context"
        )
    if objective.special_token >= model.vocab_size:
        raise UserError(
            f"objective.special_token={objective.special_token}: must be below model.vocab_size={model.vocab_size}"
        )
    last = data.context if objective.name != "span_corruption" else objective.spans(data.context)[1]
    if objective.name == "span_corruption" and (data.context < 2 or 0 <= objective.special_token < last - 1):
        raise UserError(
            f"objective.special_token={objective.special_token}: data.context={data.context} has {last} sentinels, "
            "which go down from it to at least 0"
        )


def _check_images(experiment: Experiment) -> None:
    model, objective, data = experiment.model, experiment.objective, experiment.data
    if (objective.name == "contrastive") != (model.fusion == "contrastive"):
        raise UserError(
            f"objective.name={objective.name!r}: model.fusion={model.fusion!r}; 'contrastive' goes with 'contrastive'"
        )
    if model.fusion not in ("none", "contrastive") and objective.name != "conversation":
        raise UserError(
            f"objective.name={objective.name!r}: model.fusion={model.fusion!r} reads images in conversations; give "
            "objective.name='conversation'"
        )
    if data.image_fit == "tiles" and objective.name in ("contrastive", "image_classification"):
        raise UserError(
            f"data.image_fit='tiles': objective.name={objective.name!r} takes one image a row; give squash, pad or crop"
        )
    if objective.name == "contrastive":
        if data.batch_size == 1:
            raise UserError(
                "data.batch_size=1: objective.name='contrastive' compares the rows of a batch; give 2 or more"
            )
        if experiment.optimizer.accumulation > 1 or experiment.optimizer.local_steps:
            raise UserError(
                f"optimizer.accumulation={experiment.optimizer.accumulation}: objective.name='contrastive' compares "
                "all rows of a batch with each other; give 1, and optimizer.local_steps=0"
            )
