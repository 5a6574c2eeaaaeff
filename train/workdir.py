"""The workdir of a run: who holds it, which experiment it belongs to, and the versions that ran it."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import secrets
import socket
import subprocess
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.fields.limits import marked
from tpu import distributed
from tpu.errors import UserError
from train.config import Experiment
from train.tree import differences, from_dict, to_dict

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Workdir:
    """A directory held by this process, or its gang, alone, from construction until `close` or the end of the process.

    The `lock` file names the holder as `{"pid": ..., "host": ...}`. What locks is flock(2), which ends with the
    process however that ends, so a file left by a dead process is no obstacle. Of several processes, the first holds
    it for all. Raises UserError where another process holds the directory, or where it cannot be created or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        distributed.decide(self._hold)

    def _hold(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._lock, 0)
            os.write(self._lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except BlockingIOError:
            holder = _holder(os.read(self._lock, 1024))
            os.close(self._lock)
            raise UserError(f"workdir={self.path}: in use by {holder}; stop it or give another --workdir") from None
        except OSError as error:
            raise UserError(
                f"workdir={self.path}: {error.strerror}; give --workdir a directory that can be created and written"
            ) from error

    def close(self) -> None:
        """Lets the next process have the directory. The lock file stays: removing it would race with that process."""
        if self._lock is not None:
            os.close(self._lock)

    def check_experiment(self, experiment: Experiment) -> None:
        """Raises UserError where the workdir belongs to an experiment with another model."""
        distributed.decide(lambda: self._changes(experiment) and None)

    def write_experiment(self, experiment: Experiment) -> list[str]:
        """Writes `experiment.json` (resolved tree, versions, git revision), replacing an earlier one atomically.

        Process 0 alone does. Returns the differences from the earlier one as `field: value there, value here`, for the
        log. Raises UserError where that one has another model, or where the file cannot be read or written.
        """
        return distributed.decide(lambda: self._write_experiment(experiment))

    def _write_experiment(self, experiment: Experiment) -> list[str]:
        path, changed = self.path / "experiment.json", self._changes(experiment)
        tree = {"experiment": to_dict(experiment), "versions": versions(), "git_revision": git_revision()}
        try:
            write_json(path, tree)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        return changed

    def _changes(self, experiment: Experiment) -> list[str]:
        known = (self.path / "experiment.json").exists()
        return check_same_model(read_experiment(self.path), experiment) if known else []


def _holder(content: bytes) -> str:
    # Empty for the instant between the other process's flock and its write.
    if not content:
        return "another process"
    holder = json.loads(content)
    return f"process {holder['pid']} on {holder['host']}"


def read_experiment(path: str | Path) -> Experiment:
    """The experiment that a workdir belongs to, equal to the one that was written. Raises UserError if unreadable."""
    file = Path(path) / "experiment.json"
    try:
        tree = json.loads(file.read_bytes())["experiment"]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give the workdir of a run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the description of an experiment; remove it or give another --workdir") from error
    return from_dict(Experiment, tree)


def check_same_model(old: Experiment, new: Experiment) -> list[str]:
    """The differences between two resolved experiments of one model, as `field: old value, new value`.

    Raises UserError listing the fields of the model that differ and are not `free`: the weights of one would not be
    weights of the other.
    """
    rows = differences(old, new)
    allowed = tuple(f"model.{field}:" for field in marked(ModelConfig, "free"))
    refused = [row for row in rows if row.startswith("model.") and not row.startswith(allowed)]
    if refused:
        raise UserError(f"the workdir holds another model ({'; '.join(refused)}: there, here); use another --workdir")
    return rows


def versions() -> dict[str, str]:
    """Versions of Python and of those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision(root: Path = ROOT) -> str | None:
    """The commit checked out at `root`, with "+dirty" where tracked files are modified.

    None where git is absent or `root` is not the top of a repository: an installed copy that happens to lie inside
    some other repository has no revision.
    """
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root.resolve():
            return None
        return _git(root, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+dirty")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def write_json(path: Path, tree: Any) -> None:
    """Writes `tree` so that `path` holds either all of it or what it held before, whenever the process dies."""
    write_whole(path, json.dumps(tree, indent=1))


def write_whole(path: Path, text: str) -> None:
    """As `write_json`, for text. It is written first under a name that nothing had before. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
