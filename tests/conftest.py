"""What the tests share: caches of their own, eight simulated devices, small models, a micro experiment and its corpus.

Here and in the processes that tests start jax compiles without most optimisations and without the emitters of fusions,
which takes a tenth of the time; a fixture, `as_users_compile`, gives a process what users have. Compiled programs are
kept on disk between runs of the tests, and in memory until their file ends; tokens and tokenizers are not kept.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import getpass
import importlib.util
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before jax is imported, and inherited by the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{tempfile.gettempdir()}/foursight-compiled-{getpass.getuser()}"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    # Bytecode lies apart from the sources then; without it every process that a test starts compiles a second more.
    os.environ["PYTHONPYCACHEPREFIX"] = f"{os.environ['JAX_COMPILATION_CACHE_DIR']}/bytecode"
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]
if "PYTEST_XDIST_WORKER" not in os.environ:  # Workers have the environment of the first process, and share its cache.
    os.environ["FOURSIGHT_CACHE"] = tempfile.mkdtemp(prefix="foursight-tests-")
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    # Eight simulated devices that meet on a busy machine may wait for each other for longer than the 40 seconds after
    # which XLA ends the process.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_call_terminate_timeout_seconds=600 "
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )

import hypothesis
import jax
from hypothesis import strategies as st

from model.config import ModelConfig
from train.config import DataConfig, Experiment, MeshConfig, OptimizerConfig, RunConfig
from train.resolve import resolve

jax.config.update("jax_num_cpu_devices", 8)
gc.set_threshold(50_000, 20, 50)  # What is traced is many small objects that stay: a tenth of the time went to looking.
# The same examples in every run, so that a failure is there again and compiled programs are found again.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow what slow.txt names: long cases whose kind a shorter case covers."""
    slow = set(Path(__file__).with_name("slow.txt").read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in slow:
            item.add_marker("slow")


def pytest_unconfigure() -> None:
    """Removes this session's caches."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["FOURSIGHT_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _memory_returned(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lets go of what a file compiled and cached when it ends; a process would grow past 6 GB."""
    yield
    for value in vars(request.module).values():
        if isinstance(value, functools._lru_cache_wrapper) and value.__module__ == request.module.__name__:
            value.cache_clear()
    if runs := sys.modules.get("tests.runs"):
        runs.PROGRAMS.clear()
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def as_users_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the test starts compile as users' do."""
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def peers_python() -> str:
    """A Python that has torch and transformers: that which FOURSIGHT_PEERS_PYTHON names, or this one.

    Skips where there is none.
    """
    if python := os.environ.get("FOURSIGHT_PEERS_PYTHON"):
        return python
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pytest.skip("torch and transformers are not installed, and FOURSIGHT_PEERS_PYTHON names no Python with them")
    return sys.executable


@pytest.fixture(scope="module")
def strict_promotion() -> Iterator[None]:
    """Arrays of other ranks or number formats do not quietly become alike."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def one_device() -> jax.sharding.Mesh:
    """The mesh of the first device alone."""
    from tpu.mesh import make_mesh

    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def one_processor() -> Iterator[None]:
    """While it is asked for, jax finds one device, and nothing measures how fast that is."""
    from tpu import host

    device = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: device)
        patch.setattr(host, "measured_matmul_rate", lambda dtype: 1e9)
        yield


@pytest.fixture(scope="session")
def model_configs() -> st.SearchStrategy[ModelConfig]:
    """Small resolved models over everything that a ModelConfig can say about what is computed."""

    @st.composite
    def configs(draw: st.DrawFn) -> ModelConfig:
        kv_heads, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (3, 1)]))
        pattern = draw(st.sampled_from([("global",), ("local",), ("local", "global"), ("global", "local", "local")]))
        return ModelConfig(
            vocab_size=draw(st.integers(3, 40)),
            layers=len(pattern) * draw(st.integers(1, 2)),
            embed_dim=draw(st.sampled_from([4, 12, 18])),
            heads=kv_heads * group,
            kv_heads=kv_heads,
            head_dim=draw(st.sampled_from([2, 6])),
            mlp_dim=draw(st.sampled_from([0, 5])),
            activation=draw(st.sampled_from(["gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_erf", "reglu"])),
            pattern=pattern,
            window=draw(st.integers(1, 5)),
            positions=draw(st.sampled_from(["rope", "learned", "sinusoidal", "none"])),
            max_positions=draw(st.integers(12, 20)),
            rope_theta=draw(st.sampled_from([100.0, 1e4])),
            norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
            rope_interleaved=draw(st.booleans()),
            query_scalar=draw(st.sampled_from([0.0, 7.0])),
            norm_unit_offset=draw(st.booleans()),
            norm_eps=draw(st.sampled_from([1e-6, 1e-1])),
            norm_order=draw(st.sampled_from(["pre", "post", "sandwich", "reordered"])),
            qk_norm=draw(st.booleans()),
            qk_norm_over=draw(st.sampled_from(["head_dim", "projection"])),
            attention_out_bias=draw(st.booleans()),
            scale_embedding=draw(st.booleans()),
            attention_bias=draw(st.booleans()),
            mlp_bias=draw(st.booleans()),
            norm_bias=draw(st.booleans()),
            tied_head=draw(st.booleans()),
            attention_softcap=draw(st.sampled_from([0.0, 1.5])),
            logits_softcap=draw(st.sampled_from([0.0, 2.0])),
            layer_loop=draw(st.sampled_from(["scan", "unroll"])),
            attention=draw(st.sampled_from(["plain", "chunked"])),
        ).resolved()

    return configs()


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty short documents of made-up words, as JSON lines."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(60)]
    documents = [" ".join(rng.choices(words, k=rng.randint(20, 120))) for _ in range(80)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="session")
def micro(corpus_file: Path) -> Callable[..., Experiment]:
    """A function that gives an experiment of seconds, with the fields of a branch that it is told replaced."""
    experiment = Experiment(
        name="micro",
        model=ModelConfig(
            vocab_size=257, layers=2, embed_dim=32, heads=2, attention_bias=False, mlp_bias=False, residual_dropout=0.1
        ),
        data=DataConfig(
            sources=(str(corpus_file),), tokenizer="bytes", bpe_vocab_size=257, context=64, batch_size=4, holdout=0.2
        ),
        # A schedule that does not depend on the length of the run, for then the compiled step does not either.
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=2, accumulation=2),
        run=RunConfig(steps=8, eval_every=0, eval_batches=2, save_every=0, log_every=1, tensorboard=False),
    )

    def changed(**branches: dict[str, Any]) -> Experiment:
        parts = {name: dataclasses.replace(getattr(experiment, name), **fields) for name, fields in branches.items()}
        return resolve(dataclasses.replace(experiment, **parts))

    return changed
