"""Checkpoints whose weights an experiment uses and never changes: the base of an adapter, a reference, a teacher, a
reward model. Each is found where it was, or elsewhere, and recognised by its manifest's digest; none is saved again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.weights import Weights
from tpu.errors import UserError
from train.checkpoint import checkpoint, manifest
from train.config import AdapterConfig, Experiment
from train.data.text import tokenizer as tokenizers
from train.data.text.tokenizer import Tokenizer
from train.objectives.table import objective_of
from train.tree import from_dict


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A step directory, and what it says of itself."""

    step_dir: Path
    digest: str
    experiment: Experiment
    tokenizer: Tokenizer

    def reference(self) -> dict[str, str]:
        """What a checkpoint holds of one that it was trained with."""
        return {"path": str(self.step_dir.resolve()), "digest": self.digest}

    def check(self, wanted: dict[str, str], path: Path) -> None:
        """Raises UserError where `path` was trained with another, whose `reference` is given."""
        if wanted["digest"] != self.digest:
            raise UserError(
                f"{path} was trained with the checkpoint {wanted['path']} (manifest "
                f"{wanted['digest'][:12]}), and {self.step_dir} is another ({self.digest[:12]}); give that one"
            )


def adapted_role(experiment: Experiment) -> str:
    """The name under which the base of an adapter is frozen: that of the role that is trained."""
    roles = objective_of(experiment).roles(experiment)
    return next(name for name, role in roles.items() if role.trained)


def references(meta: dict[str, Any], experiment: Experiment) -> dict[str, dict[str, str]]:
    """The `reference` of every checkpoint that the one with this meta was trained with, by role."""
    if "base" in meta:  # as it was written before objectives had roles
        return {adapted_role(experiment): meta["base"]}
    return meta.get("frozen", {})


def open_frozen(path: str | Path) -> Frozen:
    """The checkpoint in a workdir (its newest good step) or step directory. Raises UserError where it is an adapter."""
    return _open(checkpoint.find(path))


def find_frozen(wanted: dict[str, str], step_dir: Path, elsewhere: str | Path | None = None) -> Frozen:
    """What `step_dir` was trained with, by its `reference`: where it was, or in the directory `elsewhere`.

    Raises UserError where it is not there.
    """
    where = Path(elsewhere or wanted["path"])
    directory = where / "checkpoints" if (where / "checkpoints").is_dir() else where
    steps = [where] if (where / manifest.NAME).is_file() else [directory / str(s) for s in _steps(directory)]
    for step in steps:
        if manifest.digest(step) == wanted["digest"]:
            return _open(step)
    found = f"holds another checkpoint ({manifest.digest(steps[0])[:12]})" if steps else "holds no checkpoint"
    raise UserError(
        f"checkpoint {step_dir} was trained with {wanted['path']} (manifest {wanted['digest'][:12]}); {where} {found}; "
        "give --base=DIR, where that checkpoint lies now"
    )


def frozen_roles(experiment: Experiment, base: Frozen | None = None) -> dict[str, Frozen]:
    """Every frozen role's checkpoint: that which the experiment names, and `base` for the adapter.

    Raises UserError for a field that names none.
    """
    found = {adapted_role(experiment): base} if base else {}
    for name, role in objective_of(experiment).roles(experiment).items():
        if role.trained:
            continue
        path: Any = experiment
        for part in role.starts_from.split("."):
            path = getattr(path, part)
        if not path:
            raise UserError(f"{role.starts_from}={path!r}: name the checkpoint of the {name}")
        found[name] = open_frozen(path[0] if isinstance(path, tuple) else path)
    return found


def load_frozen(found: Mapping[str, Frozen], abstract: Mapping[str, Weights]) -> dict[str, Weights]:
    """The weights of every frozen role, as `train.program.Program.abstract_frozen` has them."""
    return {name: checkpoint.load_weights(found[name].step_dir, weights) for name, weights in abstract.items()}


def _open(step_dir: Path) -> Frozen:
    meta = checkpoint.read_meta(step_dir)
    experiment = from_dict(Experiment, meta["experiment"])
    if experiment.adapter != AdapterConfig():
        raise UserError(
            f"checkpoint={step_dir}: is an adapter itself; make a model of it with python -m train.adapter merge"
        )
    return Frozen(step_dir, manifest.digest(step_dir), experiment, tokenizers.from_dict(meta["tokenizer"]))


def _steps(directory: Path) -> list[int]:
    return manifest.complete_steps(directory)[::-1] if directory.is_dir() else []
