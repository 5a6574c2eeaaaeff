"""Recorded cases lie in archives, one for each family: NAME.zip holds the directories of its cases.

Tests and the scripts that record import this file; the latter in a Python without Foursight.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import zipfile
from pathlib import Path


def pack(directories: list[Path], archive: Path) -> Path:
    """Writes directories without subdirectories into an archive; the same files always give the same bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(path for directory in directories for path in directory.iterdir()):
            entry = zipfile.ZipInfo(f"{path.parent.name}/{path.name}")
            file.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return archive


@functools.cache
def unpacked(room: Path) -> Path:
    """A directory with all cases of the archives in `room`; it is gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="foursight-cases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for archive in sorted(room.glob("*.zip")):
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    return folder
