"""The manifest that makes a directory a complete checkpoint: size and SHA-256 per file, shape and dtype per leaf.

It is needed because Orbax restores a flipped bit without a word and casts dtypes silently. It is written last. It also
proves whose a directory is: what is deleted is what a manifest lists, or what lies where an empty file STEP.saving,
made before the first byte of that step, says that a save began. Anything else in the directory is left as it is.
"""

from __future__ import annotations

import contextlib
import errno
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
SAVING = ".saving"  # STEP.saving lies beside a step from before its first byte until its manifest is written
TEMPORARY = ".orbax-checkpoint-tmp"  # after a step's name until Orbax has written all of it
REMOVING = NAME + ".removing"  # the manifest's name while the files that it lists are deleted

log = logging.getLogger(__name__)


def begin(directory: Path, step: int) -> None:
    """Marks that `step` is about to be saved. Raises OSError where that cannot be, or where another's files are."""
    if found := _remains(directory, step):
        raise FileExistsError(errno.EEXIST, f"{found[0].name} is there already and was not written by this run")
    (directory / f"{step}{SAVING}").touch()


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
    step_dir.with_name(f"{step_dir.name}{SAVING}").unlink(missing_ok=True)


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
    Files whose names begin with a dot are the system's (.DS_Store, ._name, .nfs0000): they are not looked at.
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


def check_free(directory: Path) -> None:
    """Raises UserError where a directory without a manifest stands in the way of steps that are still to be saved."""
    newest = max(complete_steps(directory), default=-1)
    for path in sorted(directory.iterdir()):
        step = path.name.partition(TEMPORARY)[0]
        if step.isdecimal() and int(step) > newest:
            raise UserError(
                f"{path}: has no {NAME}, so it is not known to be a step of this run, and a step could come to lie "
                "there; move it elsewhere, or give another --workdir"
            )


def remove_incomplete(directory: Path) -> list[str]:
    """Removes what saves that were begun and never completed left, ends deletions cut short, and returns the names."""
    names = []
    for marker in sorted(directory.glob(f"*{SAVING}")):
        step = marker.name.removesuffix(SAVING)
        if not step.isdecimal():
            continue
        if not (directory / step / NAME).exists():
            for path in _remains(directory, int(step)):
                shutil.rmtree(path, ignore_errors=True)
                names.append(path.name)
        marker.unlink()
    for half in sorted(directory.glob(f"*/{REMOVING}")):
        names.append(half.parent.name)
        _remove_listed(half.parent)
    return names


def remove(directory: Path, step: int) -> None:
    """Deletes of a step the files that its manifest lists; a damaged one, and what else lies there, stays.

    The manifest loses its name first: a deletion cut short leaves an incomplete step, not a damaged one.
    """
    step_dir = directory / str(step)
    with contextlib.suppress(UserError):
        read(step_dir)
        (step_dir / NAME).rename(step_dir / REMOVING)
        _remove_listed(step_dir)


def _remove_listed(step_dir: Path) -> None:
    for name in json.loads((step_dir / REMOVING).read_bytes())["files"]:
        (step_dir / name).unlink(missing_ok=True)
    for path in sorted(step_dir.rglob("*"), reverse=True):  # A directory comes after what is in it.
        if path.is_dir():
            _remove_empty(path)
    (step_dir / REMOVING).unlink()
    _remove_empty(step_dir)


def _remove_empty(directory: Path) -> None:
    """Removes a directory that holds nothing but files of the system's."""
    if all(_hides(path.name) and path.is_file() for path in directory.iterdir()):
        shutil.rmtree(directory, ignore_errors=True)


def _remains(directory: Path, step: int) -> list[Path]:
    """What lies where a step is saved, before it has a manifest."""
    step_dir = directory / str(step)
    here = [step_dir] if step_dir.exists() and not (step_dir / NAME).exists() else []
    return [*here, *sorted(directory.glob(f"{step}{TEMPORARY}*"))]


def _files(step_dir: Path) -> set[str]:
    names = (path.relative_to(step_dir) for path in step_dir.rglob("*") if path.is_file())
    return {name.as_posix() for name in names if not any(map(_hides, name.parts))} - {NAME}


def _hides(name: str) -> bool:
    return name.startswith(".")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
