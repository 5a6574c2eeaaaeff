"""Every set of flags is compiled with: TPU sets by libtpu without a TPU, the others by jaxlib's parser.

A flag that a compiler does not know aborts its process, so each set has a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpu.launch import xla_flags

ROOT = Path(__file__).resolve().parents[3]
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}

# Two layers whose weights and gradients lie in parts on all chips: gathered in the loop, reduced after it.
SHARDED_STEP = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding, PartitionSpec

devices = np.array(get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices)
mesh = Mesh(devices, ("fsdp",))

def lay(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

w = lay((2, 256, 256), jnp.float32, None, "fsdp")  # [layers, D, D]
x = lay((8 * devices.size, 256), jnp.bfloat16, "fsdp")  # [B, D]

def loss(w, x):
    def layer(h, w):
        h = jax.nn.gelu(h @ w.astype(h.dtype))
        return jax.lax.with_sharding_constraint(h, NamedSharding(mesh, PartitionSpec("fsdp"))), None
    return jnp.mean(jax.lax.scan(layer, x, w)[0].astype(jnp.float32) ** 2)

def step(w, x):
    return w - 0.1 * jax.grad(loss)(w, x)

text = jax.jit(step, donate_argnums=0, out_shardings=w.sharding).lower(w, x).compile().as_text()
print("collectives:", "all-gather" in text, "all-reduce" in text or "reduce-scatter" in text)
"""
PARSE = "import jax; print('devices:', len(jax.devices()))"


def compiled(chip: str, flags: str | None = None) -> subprocess.CompletedProcess[str]:
    """A process that compiles with the flags of a chip, or with other ones."""
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    offline = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    program = [SHARDED_STEP, TOPOLOGIES[chip]] if chip in TOPOLOGIES else [PARSE]
    environment = clean | offline | xla_flags.environment(chip, flags)
    command = [sys.executable, "-c", *program]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
CHIPS = [pytest.param(chip, marks=needs_libtpu if chip in TOPOLOGIES else ()) for chip in xla_flags.SETS]


@pytest.mark.parametrize("chip", CHIPS)
def test_every_set_compiles(chip):
    done = compiled(chip)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == ("collectives: True True" if chip in TOPOLOGIES else "devices: 1")


@pytest.mark.parametrize("chip", [pytest.param("v5e", marks=needs_libtpu), "gpu", "cpu"])
def test_a_wrong_flag_is_caught(chip):
    done = compiled(chip, "--xla_no_such_flag=true")
    assert done.returncode != 0
    assert "xla_no_such_flag" in done.stderr


def test_a_set_is_one_variable():
    assert xla_flags.environment("gpu") == {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true"}
    assert xla_flags.environment("v6e") == {}
    assert xla_flags.environment("gpu", "") == {}
    assert xla_flags.environment("v5p", " --xla_a=1 --xla_b=2 ") == {"LIBTPU_INIT_ARGS": "--xla_a=1 --xla_b=2"}
    assert xla_flags.environment("cpu", "--xla_a=1") == {"XLA_FLAGS": "--xla_a=1"}


def test_every_flag_has_a_reason_and_stands_once():
    for chip, flags in xla_flags.SETS.items():
        names = [flag.text.partition("=")[0] for flag in flags]
        assert len(set(names)) == len(names), chip
        assert all(name.startswith("--xla") for name in names), chip
        assert all(len(flag.reason.split()) > 3 for flag in flags), chip
