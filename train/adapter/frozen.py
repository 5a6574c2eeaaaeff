"""The checkpoint that an adapter is trained on: found, and recognised by the digest of its manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tpu.errors import UserError
from train.checkpoint import checkpoint, manifest
from train.config import AdapterConfig, Experiment
from train.data.text import tokenizer as tokenizers
from train.data.text.tokenizer import Tokenizer
from train.tree import from_dict


@dataclasses.dataclass(frozen=True)
class Base:
    """A step directory, and what it says of itself."""

    step_dir: Path
    digest: str
    experiment: Experiment
    tokenizer: Tokenizer

    def reference(self) -> dict[str, str]:
        """What a checkpoint of an adapter holds of its base."""
        return {"path": str(self.step_dir.resolve()), "digest": self.digest}

    def check(self, meta: dict[str, Any], path: Path) -> None:
        """Raises UserError where the adapter of `path`, whose meta is given, belongs to another base."""
        if meta["base"]["digest"] != self.digest:
            raise UserError(
                f"{path} holds an adapter on the checkpoint {meta['base']['path']} (manifest "
                f"{meta['base']['digest'][:12]}), and {self.step_dir} is another ({self.digest[:12]}); give that one"
            )


def open_base(path: str | Path) -> Base:
    """The base in a workdir (its newest good step) or step directory. Raises UserError where it is an adapter."""
    return _open(checkpoint.find(path))


def base_of(meta: dict[str, Any], step_dir: Path, elsewhere: str | Path | None = None) -> Base:
    """The base of the adapter in `step_dir`, whose meta is given: where it was, or in the directory `elsewhere`.

    Raises UserError where it is not there.
    """
    wanted = meta["base"]
    where = Path(elsewhere or wanted["path"])
    directory = where / "checkpoints" if (where / "checkpoints").is_dir() else where
    steps = [where] if (where / manifest.NAME).is_file() else [directory / str(s) for s in _steps(directory)]
    for step in steps:
        if manifest.digest(step) == wanted["digest"]:
            return _open(step)
    found = f"holds another checkpoint ({manifest.digest(steps[0])[:12]})" if steps else "holds no checkpoint"
    raise UserError(
        f"checkpoint {step_dir} is an adapter on {wanted['path']} (manifest {wanted['digest'][:12]}); {where} {found}; "
        "give --base=DIR, where that checkpoint lies now"
    )


def _open(step_dir: Path) -> Base:
    meta = checkpoint.read_meta(step_dir)
    experiment = from_dict(Experiment, meta["experiment"])
    if experiment.adapter != AdapterConfig():
        raise UserError(
            f"checkpoint={step_dir}: is an adapter itself; make a model of it with python -m train.adapter merge"
        )
    return Base(step_dir, manifest.digest(step_dir), experiment, tokenizers.from_dict(meta["tokenizer"]))


def _steps(directory: Path) -> list[int]:
    return manifest.complete_steps(directory)[::-1] if directory.is_dir() else []
