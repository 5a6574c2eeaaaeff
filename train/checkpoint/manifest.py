"""The manifest that makes a directory a complete checkpoint: size and SHA-256 per file, shape and dtype per leaf.

It is needed because Orbax restores a flipped bit without a word and casts dtypes silently. It is written last, so that
a step directory without one is what an interrupted save left behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tpu.errors import UserError
from train.workdir import write_json

NAME = "manifest.json"

log = logging.getLogger(__name__)


def write(step_dir: Path, step: int, leaves: dict[str, Any], metrics: dict[str, float]) -> None:
    """Writes the manifest of the files that are in `step_dir` now, and with it completes the step.

    `leaves` is `{path: {"shape": [...], "dtype": "float32"}}`. Raises OSError where it cannot be written.
    """
    files = {
        name: {"bytes": (step_dir / name).stat().st_size, "sha256": _sha256(step_dir / name)}
        for name in sorted(_files(step_dir))
    }
    manifest = {"step": step, "metrics": metrics, "leaves": leaves, "files": files}
    write_json(step_dir / NAME, {**manifest, "digest": _digest(manifest)})


def read(step_dir: Path) -> dict[str, Any]:
    """The manifest of a step. Raises UserError where it is missing or is not as it was written."""
    try:
        manifest = json.loads((step_dir / NAME).read_bytes())
        digest = manifest.pop("digest")
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {step_dir} is incomplete: it has no {NAME}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {step_dir} is damaged: {NAME} cannot be read") from error
    if digest != _digest(manifest):
        raise UserError(f"checkpoint {step_dir} is damaged: the contents of {NAME} are not as they were written")
    return manifest


def digest(step_dir: Path) -> str:
    """What identifies a step: SHA-256 of its manifest. Raises UserError as `read`."""
    return _digest(read(step_dir))


def verify(step_dir: Path, fields: Collection[str] | None = None) -> None:
    """Compares the files of a step with its manifest. Raises UserError naming the first that is wrong.

    Names and sizes are compared for all files; contents for all, or for those under the directories `fields` only.
    """
    files = read(step_dir)["files"]
    for name in sorted(_files(step_dir) ^ files.keys()):
        what = "is missing" if name in files else "is not in the manifest"
        raise UserError(f"checkpoint {step_dir} is damaged: {name} {what}")
    for name, file in files.items():
        size = (step_dir / name).stat().st_size
        if size != file["bytes"]:
            raise UserError(f"checkpoint {step_dir} is damaged: {name} has {size} bytes instead of {file['bytes']}")
        if (fields is None or name.split("/")[0] in fields) and _sha256(step_dir / name) != file["sha256"]:
            raise UserError(f"checkpoint {step_dir} is damaged: the contents of {name} are not as they were written")


def complete_steps(directory: Path) -> list[int]:
    """The steps in `directory` that have a manifest, ascending. Nothing is verified."""
    return sorted(int(p.parent.name) for p in directory.glob(f"*/{NAME}") if p.parent.name.isdecimal())


def newest_good(directory: Path, fields: Collection[str] | None = None) -> tuple[int | None, list[int]]:
    """The newest step that verifies (None if there is no step at all), and the damaged ones after it.

    The damaged ones are named in the log. Raises UserError, naming each and why, where there are only such.
    """
    damaged: dict[int, str] = {}
    for step in reversed(complete_steps(directory)):
        try:
            verify(directory / str(step), fields)
        except UserError as error:
            damaged[step] = str(error)
            log.warning("%s; trying the step before it", error)
        else:
            return step, list(damaged)
    if damaged:
        raise UserError(f"no good checkpoint: {'; '.join(damaged.values())}; restore a copy or give another --workdir")
    return None, []


def remove_incomplete(directory: Path) -> list[str]:
    """Removes, and returns the names of, steps without a manifest and Orbax's temporary directories."""
    names = [
        path.name
        for path in directory.iterdir()
        if ".orbax-checkpoint-tmp" in path.name or (path.name.isdecimal() and not (path / NAME).exists())
    ]
    for name in names:
        shutil.rmtree(directory / name, ignore_errors=True)
    return names


def remove(directory: Path, step: int) -> None:
    """Deletes a step, its manifest first: a deletion cut short leaves an incomplete step, not a damaged one."""
    (directory / str(step) / NAME).unlink(missing_ok=True)
    shutil.rmtree(directory / str(step), ignore_errors=True)


def _files(step_dir: Path) -> set[str]:
    return {p.relative_to(step_dir).as_posix() for p in step_dir.rglob("*") if p.is_file()} - {NAME}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
