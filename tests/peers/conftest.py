"""What the comparisons with transformers share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def peers(peers_python: str) -> Callable[..., str]:
    """Runs a script of this directory, with arguments, in a Python that has torch and transformers: what it prints."""

    def run(script: str, *arguments: str) -> str:
        command = [peers_python, str(Path(__file__).parent / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.slow)])
def draws(request: pytest.FixtureRequest) -> int:
    """How many new models of each family are compared, beside the recorded ones."""
    return request.param
