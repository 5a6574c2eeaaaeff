"""What must hold between an adapter and the rest of an experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpu.errors import UserError
from train.optimize.checks import check_patterns

if TYPE_CHECKING:
    from train.config import Experiment


def check(experiment: Experiment) -> None:
    """Raises UserError where an adapter does not go with how the experiment is trained."""
    adapter = experiment.adapter
    if not adapter.targets:
        raise UserError("adapter.targets=(): name at least one pattern, such as 'attention'")
    check_patterns("adapter.targets", adapter.targets)
    if adapter.kind != "none" and (experiment.optimizer.frozen or experiment.run.start):
        raise UserError(
            "optimizer.frozen, run.start: not with an adapter, whose base is frozen and given; leave them out"
        )
    if adapter.kind != "none" and experiment.optimizer.local_steps:
        raise UserError(
            f"optimizer.local_steps={experiment.optimizer.local_steps}: not with adapter.kind={adapter.kind!r}; give 0"
        )
