"""Where things are kept, and back ends that cannot start: a directory, or one line that says what to give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tpu import host
from tpu.errors import UserError
from train.config import DataConfig
from train.data.text.cache import cache_folder
from train.data.text.tokenizer import from_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_home(monkeypatch):
    """A user without HOME and without an entry in the passwords, as in many containers."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("FOURSIGHT_CACHE")


def test_all_that_is_kept_lies_in_one_place(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    for value, expected in (("~/kept", "/somewhere/kept"), ("/kept", "/kept"), ("", "/somewhere/.cache/foursight")):
        monkeypatch.setenv("FOURSIGHT_CACHE", value)
        assert host.cache_dir() == cache_folder(DataConfig()) == Path(expected)
    assert cache_folder(DataConfig(cache_dir="~/other")) == Path("/somewhere/other")


def test_without_a_home_programs_are_not_kept_and_tokens_need_a_place(no_home, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = jax.config.jax_compilation_cache_dir
    assert host.start_backend() == "cpu"
    assert jax.config.jax_compilation_cache_dir == before
    with pytest.raises(UserError, match=r"no home directory .* FOURSIGHT_CACHE"):
        cache_folder(DataConfig())
    assert cache_folder(DataConfig(cache_dir="/kept")) == Path("/kept")
    with pytest.raises(UserError, match="cannot be read"):
        from_file("~/tokenizer.json")


def test_a_cache_that_cannot_be_written_is_left_out(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOURSIGHT_CACHE", str(tmp_path / "file"))
    before = jax.config.jax_compilation_cache_dir
    assert host.start_backend() == "cpu"
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend\nand more"), AssertionError()])
def test_a_platform_that_cannot_start_is_one_line(monkeypatch, error):
    def fails() -> str:
        raise error

    monkeypatch.setattr(jax, "default_backend", fails)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match="JAX_PLATFORMS=cuda: jax cannot start there") as caught:
        host.start_backend()
    assert "\n" not in str(caught.value)


def test_a_platform_that_there_is_not():
    code = "from train import entry; from tpu import host; entry.run(lambda: host.start_backend() and 0)"
    environment = os.environ | {"JAX_PLATFORMS": "cpuu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: JAX_PLATFORMS=cpuu: jax cannot start there")


@pytest.mark.parametrize(
    ("capability", "found"), [("7.5", "float32"), ("6.1", "float32"), ("8.0", "bfloat16"), ("12.0", "bfloat16")]
)
def test_auto_takes_no_bfloat16_where_a_gpu_has_none(capability, found, monkeypatch):
    """cuDNN's flash attention, which auto takes for 16 bits, would not start there either."""
    gpu = type("Device", (), {"compute_capability": capability})()
    monkeypatch.setattr(jax, "devices", lambda backend: [gpu])
    assert host.fast_dtype("gpu") == found
