"""`python -m tpu.compile` from end to end, with the real TPU compiler where libtpu is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tpu.compile import pod
from tpu.compile.hlo_counts import Kernel
from tpu.compile.report import attention_kernel_flops, out_of_memory
from tpu.errors import UserError
from train.config import DataConfig, Experiment, MeshConfig, OptimizerConfig, RunConfig
from train.resolve import resolve

ROOT = Path(__file__).resolve().parents[3]
LAYERS, EMBED, VOCAB, CONTEXT, BATCH = 3, 256, 512, 256, 16
WEIGHTS = 12 * LAYERS * EMBED**2 + VOCAB * EMBED  # matrices, and the table, which the head shares

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

CONFIG = f"""
from model.config import ModelConfig
from train.config import DataConfig, Experiment, MeshConfig, OptimizerConfig, RunConfig

def get_config():
    return Experiment(
        name="tiny",
        model=ModelConfig(
            vocab_size={VOCAB}, layers={LAYERS}, embed_dim={EMBED}, heads=2, attention_bias=False, mlp_bias=False
        ),
        data=DataConfig(tokenizer="bytes", context={CONTEXT}, batch_size={BATCH}),
        optimizer=OptimizerConfig(warmup_steps=10),
        mesh=MeshConfig(fsdp=-1),
        run=RunConfig(steps=100),
    )
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tpu.compile", *arguments]
    hidden = ("JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    clean = {k: v for k, v in os.environ.items() if k not in hidden} | environment
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean, timeout=600)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return path


def reported(config: Path, status: int, *arguments: str) -> tuple[dict[str, Any], str]:
    path = config.with_suffix(".json")
    done = run(f"--config={config}", f"--json={path}", *arguments)
    assert done.returncode == status, done.stderr
    assert done.stderr == ""
    return json.loads(path.read_text()), done.stdout


@needs_libtpu
def test_the_report_of_a_step_on_eight_chips(config):
    found, table = reported(config, 0, "--topology=v5e:2x4", "--config.mesh.tensor=2")
    assert (found["chips"], found["devices"], found["fits"], found["missing_bytes"]) == (8, 8, True, 0)
    assert {axis: size for axis, size in found["mesh"].items() if size > 1} == {"fsdp": 4, "tensor": 2}
    memory = found["bytes_per_chip"]
    assert memory["weights"] == pytest.approx(4 * WEIGHTS / 8, rel=0.02)  # norms not counted here
    assert memory["optimizer"] == pytest.approx(2 * memory["weights"], rel=0.01)
    assert memory["arguments"] == memory["weights"] + memory["optimizer"] + memory["ema"]
    assert memory["gradients"] == memory["weights"]
    assert memory["hbm"] == 16 * 2**30
    assert memory["arguments"] < memory["peak"] < 2**30
    # Six operations per weight and token: without rematerialisation nothing is done again but the chunk of logits.
    tokens = BATCH * CONTEXT
    assert found["matmul_flops_per_chip"] == pytest.approx(6 * WEIGHTS * tokens / 8, rel=0.05)
    assert found["model_flops"] == 6 * WEIGHTS * tokens + 12 * LAYERS * EMBED * CONTEXT * tokens
    assert {(kernel["count"], kernel["elements"]) for kernel in found["kernels"]} == {(LAYERS, 4 * CONTEXT * 128)}
    kinds = {(row["kind"], row["axis"]) for row in found["collectives"]}
    assert ("all-gather", "fsdp") in kinds
    assert {axis for _, axis in kinds} <= {"fsdp", "tensor", "fsdp+tensor"}
    assert all(row["count"] >= row["distinct"] > 0 and row["seconds"] >= 0 for row in found["collectives"])
    assert found["unknown_loops"] == memory["host"] == 0
    assert 0 < found["compiler_seconds"] < found["step_seconds"] < 1
    assert found["tokens_per_second"] == pytest.approx(tokens / found["step_seconds"])
    assert found["mfu"] == pytest.approx(found["model_flops"] / found["step_seconds"] / (8 * 197e12))
    assert found["run"]["chip_hours"] == pytest.approx(100 * found["step_seconds"] * 8 / 3600)
    assert "all-gather" in table
    assert "(estimate)" in table


@needs_libtpu
def test_attention_of_a_single_row_per_chip_is_counted(config):
    rows = {}
    for batch in (8, 16):
        found, _ = reported(config, 0, "--topology=v5e:2x4", f"--config.data.batch_size={batch}")
        rows[batch] = found["kernel_flops_per_chip"]
    assert rows[16] == 2 * rows[8] > 0


@needs_libtpu
def test_a_step_that_does_not_fit_says_by_how_much(config):
    big = ("--config.model.embed_dim=16384", "--config.model.heads=128", "--config.model.layers=8")
    found, table = reported(config, 1, "--topology=v5e:2x2", *big)
    memory = found["bytes_per_chip"]
    assert not found["fits"]
    assert memory["weights"] > 16 * 2**30
    assert found["missing_bytes"] == memory["peak"] - memory["hbm"] > 0
    assert found["largest"][0]["leaf"].endswith("mlp.down.kernel")
    assert found["largest"][0]["bytes"] == 4 * 8 * 4 * 16384**2 // 4
    assert found["largest_temporaries"]
    assert found["run"] is None
    assert "does NOT fit" in table
    assert found["suggestion"] in table


SCANNED = """
import json, sys
from tpu.compile import hlo, hlo_counts, pod
from tpu.chips import parse_topology
pod.prepare("v5e:2x4")
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from tpu.mesh import make_mesh
from train.config import MeshConfig

topology = parse_topology("v5e:2x4")
mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), pod.tpu_devices(topology, 1))
size, layers, rows = 1024, 6, 512

def loss(w, x):
    return (jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0].astype(jnp.float32) ** 2).sum()

def on(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

w = on((layers, size, size), None, "fsdp", "tensor")
gradient = jax.jit(jax.grad(loss), out_shardings=w.sharding)
with jax.set_mesh(mesh):
    compiled = pod.compile_and_read(gradient.lower(w, on((rows, size), "fsdp", None)), topology)
module = hlo.parse(compiled.text)
counts = hlo_counts.count(module, dict(mesh.shape))
print(json.dumps({
    "flops": counts.matmul_flops, "expected": 3 * layers * 2 * rows * size * size // 8, "cycles": counts.cycles,
    "unknown": counts.unknown_loops, "rows": [[r.kind, r.axis, r.count, r.bytes] for r in counts.collectives],
}))
"""


@needs_libtpu
def test_scanned_products_on_the_tpu_compiler():
    """Closed forms of FLOPs and collectives of a program whose loops carry no trip count in libtpu's text."""
    done = subprocess.run([sys.executable, "-c", SCANNED], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["flops"] == found["expected"]
    assert found["unknown"] == 0
    assert found["cycles"] / 1.5e9 > found["flops"] / 197e12  # no faster than the peak
    layer = 2 * 1024 * 1024
    totals: dict[tuple[str, str], int] = {}
    for kind, axis, count, size in found["rows"]:
        assert count % 6 == 0
        totals[kind, axis] = totals.get((kind, axis), 0) + size
    assert totals["all-gather", "fsdp"] == 2 * 6 * layer // 2  # the tensor half of a layer, forward and backward
    assert totals["reduce-scatter", "fsdp"] == 6 * layer // 2  # gradients


HALF_ON_HOST = """
from tpu.compile import pod
pod.prepare("v5e:2x2")
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from tpu.chips import parse_topology
from tpu.mesh import make_mesh
from train.config import MeshConfig

topology = parse_topology("v5e:2x2")
mesh = make_mesh(MeshConfig(fsdp=4), pod.tpu_devices(topology, 1))
device = NamedSharding(mesh, P("fsdp"))
host = device.with_memory_kind("pinned_host")
arrays = [jax.ShapeDtypeStruct((16, 2**20), jnp.float32, sharding=s) for s in (device, host)]
program = jax.jit(lambda x, y: (x + 1, y), out_shardings=(device, host), donate_argnums=(0, 1))
compiled = pod.compile_and_read(program.lower(*arrays), topology)
print(compiled.peak, compiled.host)
"""


@needs_libtpu
def test_what_lies_with_the_host_takes_no_memory_of_the_chip():
    done = subprocess.run([sys.executable, "-c", HALF_ON_HOST], cwd=ROOT, capture_output=True, text=True, check=True)
    peak, host = map(int, done.stdout.split())
    part = 16 * 2**20 * 4 // 4
    assert part <= peak < 1.1 * part
    assert host == part


@needs_libtpu
def test_what_is_offloaded_lies_with_the_host(config):
    """The optimizer's state, and the projections that the backward pass needs, in one program."""
    offload = ("--config.optimizer.offload=true", "--config.model.remat=offload_projections")
    found, table = reported(config, 0, "--topology=v5e:2x2", *offload)
    memory = found["bytes_per_chip"]
    assert memory["optimizer"] < 64  # counters
    assert memory["arguments"] == memory["weights"] + memory["optimizer"]
    projections = 3 * LAYERS * BATCH * CONTEXT * EMBED // 4  # queries, keys and values, of one chip's rows
    assert memory["host"] == pytest.approx(2 * memory["weights"] + 2 * projections, rel=0.01)  # bfloat16; padding
    assert all(row["leaf"].startswith("weights.") for row in found["largest"])
    assert "  host " in table


@needs_libtpu
@pytest.mark.slow
def test_a_step_of_local_sgd_is_the_mean_of_those_that_exchange_and_those_that_do_not(config):
    mesh = ("--topology=v5e:2x2", "--config.mesh.data=2", "--config.run.steps=128")
    every, table = reported(config, 0, *mesh, "--config.optimizer.local_steps=1")
    seldom, long_table = reported(config, 0, *mesh, "--config.optimizer.local_steps=64")
    assert (every["exchange_every"], seldom["exchange_every"]) == (1, 64)

    def along_data(found: dict[str, Any]) -> int:
        return sum(row["bytes"] for row in found["collectives"] if row["axis"] == "data")

    assert along_data(every) >= 4 * WEIGHTS // 2  # the change, in float32
    assert along_data(seldom) == pytest.approx(along_data(every), rel=0.05)  # of the step that exchanges
    exchanging = max(seldom["roofline"][part] for part in ("compute", "memory")) + seldom["roofline"]["exposed"]
    assert seldom["step_seconds"] < exchanging
    assert seldom["step_seconds"] < every["step_seconds"]
    assert ("one in 64 which exchanges" in long_table, "mean step" in long_table) == (True, True)
    assert ("exchanges" in table, "mean step" in table) == (False, False)


@needs_libtpu
@pytest.mark.slow
def test_slices_send_over_the_slow_network(config):
    found, _ = reported(config, 0, "--topology=v5e:2x2", "--slices=2", "--config.mesh.data=2")
    assert (found["chips"], found["slices"]) == (8, 2)
    between = [row for row in found["collectives"] if row["network"] == "dcn"]
    assert {row["axis"] for row in between} == {"data"}
    assert (
        sum(row["bytes"] for row in between) >= 2 * WEIGHTS // 4 // 2
    )  # at least the gradients of a chip, in bfloat16
    assert "data (dcn)" in found["roofline"]["network"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v7x:2x2x1", "v5e:1x1"])
def test_every_chip_compiles(config, topology):
    found, _ = reported(config, 0, f"--topology={topology}")
    assert found["fits"]
    assert found["devices"] == found["chips"] * (2 if topology.startswith("v7x") else 1)
    assert found["compiler_seconds"] > 0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["merge", "cross", "co", "tangled"])
def test_a_step_with_images_compiles(tmp_path, fusion):
    """The vision tower and the decoder in one step; several heads and rows long enough for the attention kernel."""
    shape = ("--config.data.context=256", "--config.data.batch_size=8", "--config.model.embed_dim=256")
    layout = ("--topology=v5e:2x2", "--config.mesh.fsdp=4", "--config.mesh.data=1")
    path = tmp_path / "found.json"
    done = run(f"--config=configs/sight.py:{fusion},questions", *shape, *layout, f"--json={path}")
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert found["fits"]
    text = run(f"--config=configs/sight.py:{fusion},text", *shape, *layout, f"--json={path}")
    assert text.returncode == 0, text.stderr
    alone = json.loads(path.read_text())
    counted = (found["model_flops"] - alone["model_flops"]) / found["chips"]
    assert found["matmul_flops_per_chip"] - alone["matmul_flops_per_chip"] > 0.5 * counted > 0  # some parts are frozen
    assert found["bytes_per_chip"]["weights"] > alone["bytes_per_chip"]["weights"]


@needs_libtpu
@pytest.mark.slow
def test_decode_reads_weights_and_cache(config):
    found, _ = reported(config, 0, "--topology=v5e:2x2", "--decode", "--rows=8", "--context=512")
    memory = found["bytes_per_chip"]
    assert memory["weights"] == pytest.approx(2 * WEIGHTS / 4, rel=0.02)  # bfloat16
    assert memory["cache"] == pytest.approx(2 * LAYERS * 8 * 512 * EMBED * 2 / 4, rel=0.02)
    assert found["tokens_per_second"] == pytest.approx(8 / found["step_seconds"])


def test_simulated_devices(config):
    found, table = reported(config, 0, "--topology=cpu:2", "--config.data.context=32", "--config.model.layers=1")
    assert (found["devices"], found["step_seconds"], found["run"]) == (2, None, None)
    memory = found["bytes_per_chip"]
    assert memory["peak"] >= memory["arguments"] + memory["temporary"]
    assert {row["axis"] for row in found["collectives"]} == {"fsdp"}
    assert (found["pipeline_bubble"], found["exchange_every"]) == (None, 1)
    assert "MFU" not in table
    assert "bubble" not in table


def test_the_bubble_of_a_pipeline_is_reported(config):
    stages, repeats, microbatches = 2, 3, 4
    model = {"layers": 6, "pipeline_repeats": repeats, "pipeline_microbatches": microbatches, "remat": "full"}
    changes = [f"--config.model.{field}={value}" for field, value in (model | {"compute_dtype": "float32"}).items()]
    mesh = (f"--config.mesh.stage={stages}", "--config.mesh.fsdp=1", "--config.data.context=16")
    found, table = reported(config, 0, f"--topology=cpu:{stages}", *mesh, *changes)
    assert found["pipeline_bubble"] == (stages - 1) / (microbatches * repeats + stages - 1)
    assert "pipeline bubble: each stage idles 7.69% of the time" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--topology=cpu:2", "--config.mesh.stage=2", "--config.mesh.fsdp=1", "--config.model.layers=2")
            + ("--config.model.compute_dtype=bfloat16",),
            "model.compute_dtype=bfloat16: XLA cannot compile it for CPUs with mesh.stage=2",
        ),
        ((), "--topology is missing"),
        (("--topology=v5p:3x3x3",), "no such slice; valid: v5p:2x2x1"),
        (("--topology=cpu:4", "--config.mesh.fsdp=2"), "mesh.fsdp=2 needs 2 devices: there are 4"),
        (("--topology=cpu:4", "--config.data.batch_size=6"), "data.batch_size=6"),
        (("--platform=gpu",), "jax finds no GPU here"),
        (("--topology=cpu:4", "--slices=2"), "only TPUs come in slices"),
        (("--topology=cpu:1", "--decode", "--context=4096", "--config.model.positions=learned"), "--context=4096"),
        (("--topology=cpu:1", "--json=nowhere/report.json"), "json=nowhere/report.json: its directory does not exist"),
    ],
)
def test_mistakes_are_one_line(config, arguments, message):
    done = run(f"--config={config}", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_without_libtpu_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(pod.importlib.util, "find_spec", lambda name: None)
    for name in ("JAX_PLATFORMS", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.setenv(name, os.environ.get(name, "cpu"))
    with pytest.raises(UserError, match="pip install libtpu"):
        pod.prepare("v5e:2x4")


def test_what_libtpu_says_when_memory_runs_out():
    first = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (21.12G) exceeds"
    )
    assert out_of_memory(first) == (int(21.12 * 2**30), None)
    second = "Ran out of memory in memory space hbm. Used 33.50M of 15.75G hbm. Exceeded hbm capacity by 6.40G."
    assert out_of_memory(second) == (None, int(33.5 * 2**20))
    assert out_of_memory("RESOURCE_EXHAUSTED") == (None, None)


def test_operations_of_attention_kernels():
    experiment = resolve(Experiment(data=DataConfig(), optimizer=OptimizerConfig(), mesh=MeshConfig(), run=RunConfig()))
    rows, heads, tokens, width = 2, 3, 64, 128
    elements = rows * heads * tokens * width
    kernels = [
        Kernel("splash_mha_fwd_residuals", elements, 5),
        Kernel("splash_mha_dkv", elements, 1),
        Kernel("cudnn$fmhaSoftmax", elements, 1),
        Kernel("cudnn$fmhaScaleBiasSoftmaxBackward", elements, 3),
        Kernel("x", 9, 9),
    ]
    products = 5 * 2 + 4 + 2 + 3 * 5
    pairs = tokens * (tokens + 1) // 2
    expected = products * 2 * rows * heads * width * pairs
    assert attention_kernel_flops(kernels, experiment.model, tokens) == expected
    local = dataclasses.replace(experiment.model, pattern=("local",), window=1)
    assert attention_kernel_flops(kernels, local, tokens) == products * 2 * elements
