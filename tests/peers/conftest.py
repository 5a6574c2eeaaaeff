"""What the comparisons with transformers share."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def peers() -> Callable[..., str]:
    """Runs a script of this directory, with arguments, in a Python that has torch and transformers: what it prints.

    Skips where there is none: neither this one nor that which FOURSIGHT_PEERS_PYTHON names.
    """
    python = os.environ.get("FOURSIGHT_PEERS_PYTHON")
    if not python and all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        python = sys.executable
    if not python:
        pytest.skip("torch and transformers are not installed, and FOURSIGHT_PEERS_PYTHON names no Python with them")

    def run(script: str, *arguments: str) -> str:
        done = subprocess.run([python, str(Path(__file__).parent / script), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.slow)])
def draws(request: pytest.FixtureRequest) -> int:
    """How many new models of each family are compared, beside the recorded ones."""
    return request.param
