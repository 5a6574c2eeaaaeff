"""What the tests of data share: numbers from somebody else's implementation."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def peer(tmp_path: Path, peers_python: str) -> Callable[..., dict[str, np.ndarray]]:
    """Runs Python code that turns the arrays `given` into a dictionary `found`, where torch and transformers are.

    The results recorded in the tests are compared always.
    """

    def run(code: str, **given: np.ndarray) -> dict[str, np.ndarray]:
        np.savez(tmp_path / "given.npz", **given)
        begin = "import sys, numpy as np\ngiven = dict(np.load(sys.argv[1]))\n"
        command = [peers_python, "-c", f"{begin}{code}\nnp.savez(sys.argv[2], **found)"]
        command += [str(tmp_path / "given.npz"), str(tmp_path / "found.npz")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return dict(np.load(tmp_path / "found.npz"))

    return run
