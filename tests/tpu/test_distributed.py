"""How processes find each other, agree, and divide a batch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpu import distributed, host
from tpu.distributed import cluster
from tpu.errors import UserError
from tpu.launch import gang

ROOT = Path(__file__).resolve().parents[2]
GIVEN = {"FOURSIGHT_COORDINATOR": "10.0.0.1:8476", "FOURSIGHT_PROCESSES": "4", "FOURSIGHT_PROCESS": "3"}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"
}  # fmt: skip


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# Who is part of a gang


def test_a_lone_process_is_left_alone():
    code = "import sys; from tpu import distributed as d; d.initialize(); "
    code += "print(d.several(), d.leads(), d.decide(lambda: 5), d.gather('x'), 'jax' in sys.modules)"
    done = python(code)
    assert done.stdout == "False True 5 ['x'] False\n"


def test_the_description_is_taken_from_our_variables():
    assert cluster(GIVEN | SLURM) == {
        "coordinator_address": "10.0.0.1:8476",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (SLURM, {}),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # a batch script, before srun
        (SLURM | {"FOURSIGHT_PROCESSES": "1"}, None),
        (GIVEN | {"FOURSIGHT_PROCESSES": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.2"}, None),
    ],
)
def test_clusters_are_recognised(environment, found):
    assert cluster(environment) == found


@pytest.mark.parametrize("package", [True, False])
def test_an_indexed_kubernetes_job_needs_its_package(monkeypatch, package):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object() if package else None)
    environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.2", "JOB_COMPLETION_INDEX": "1"}
    if package:
        assert cluster(environment) == {}
    else:
        with pytest.raises(UserError, match=r"pip install kubernetes, or set FOURSIGHT_PROCESSES=1"):
            cluster(environment)


def test_tpu_chips_are_recognised(monkeypatch):
    monkeypatch.setattr(host, "has_tpu_chips", lambda: True)
    assert cluster({}) == {}
    assert cluster({"TPU_SKIP_MDS_QUERY": "1"}) is None
    assert cluster({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}) == {}
    assert cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.2", "JOB_COMPLETION_INDEX": "1"}) == {}  # GKE: jax knows it


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"FOURSIGHT_COORDINATOR": ""}, r"FOURSIGHT_COORDINATOR is not set: a gang needs"),
        ({"FOURSIGHT_PROCESS": ""}, r"FOURSIGHT_PROCESS is not set"),
        ({"FOURSIGHT_PROCESSES": "four"}, r"FOURSIGHT_PROCESSES=four: must be a whole number"),
        ({"FOURSIGHT_PROCESS": "4"}, r"FOURSIGHT_PROCESS=4: must be below FOURSIGHT_PROCESSES=4"),
        ({"FOURSIGHT_COORDINATOR": "10.0.0.1"}, r"must be host:port"),
        ({"FOURSIGHT_COORDINATOR": "localhost:1"}, r"other hosts cannot reach a loopback address"),
        ({"FOURSIGHT_COORDINATOR": "127.0.1.1:1"}, r"other hosts cannot reach a loopback address"),
        ({"FOURSIGHT_COORDINATOR": "[::1]:1"}, r"other hosts cannot reach a loopback address"),
    ],
)
def test_what_cannot_be_a_gang_is_refused(changed, message):
    with pytest.raises(UserError, match=message):
        cluster(GIVEN | changed)


def test_on_one_host_a_loopback_coordinator_will_do():
    found = cluster(GIVEN | {"FOURSIGHT_COORDINATOR": "localhost:1", "FOURSIGHT_HOSTS": "1"})
    assert found["coordinator_address"] == "localhost:1"


@pytest.mark.parametrize("process", ["0", "1"])
def test_a_gang_that_does_not_come_together_is_given_up(process):
    """Process 0 waits for the other, process 1 for the coordinator."""
    variables = {"FOURSIGHT_COORDINATOR": f"127.0.0.1:{gang._free_port()}", "FOURSIGHT_HOSTS": "1"}
    variables |= {"FOURSIGHT_PROCESSES": "2", "FOURSIGHT_PROCESS": process}
    done = python("from tpu import distributed, host; distributed.initialize(timeout=1)", **variables)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: process {process} of 2: 127.0.0.1:")
    assert line.endswith("all processes did not come together within 1 s; are all of them running?")


# Agreement


AGREE = """
    import sys
    from tpu import distributed, host
    from tpu.errors import UserError
    distributed.initialize()
    import jax
    mine = jax.process_index()
    assert distributed.several() and distributed.leads() == (mine == 0)
    assert jax.config.jax_cpu_collectives_implementation == "gloo"
    assert distributed.decide(lambda: [mine, "zero"]) == [0, "zero"]
    def refuse():
        assert mine == 0
        raise UserError("not so")
    for _ in range(2):
        try:
            distributed.decide(refuse)
        except UserError as error:
            assert str(error) == "not so"
        else:
            sys.exit("nothing was raised")
    try:
        distributed.decide(lambda: 1 // 0)
    except ZeroDivisionError:
        assert mine == 0
    except RuntimeError as error:
        assert mine and str(error).startswith("process 0 failed: ZeroDivisionError")
    distributed.tell("seconds", 5.0)
    distributed.tell("seconds", float(mine))
    assert distributed.gather({"from": mine}) == [{"from": 0}, {"from": 1}, {"from": 2}]
    assert distributed.told("seconds") == {0: 0.0, 1: 1.0, 2: 2.0}
    assert distributed.gather(None) == [None] * 3
    print("agreed")
"""


def test_processes_agree(capfd):
    assert gang.run([sys.executable, "-c", textwrap.dedent(AGREE)], 3) == 0
    captured = capfd.readouterr()
    assert "agreed\n" in captured.out
    assert all(f"[process {index}] agreed\n" in captured.err for index in (1, 2))


# Batches


@pytest.fixture
def mesh() -> Mesh:
    axes = ("data", "tensor", "sequence")
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3)


class HeldBy:
    """A layout of which only some devices are here."""

    def __init__(self, layout: NamedSharding, devices: set[Any]):
        self.layout, self.devices = layout, devices

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[Any, Any]:
        return {d: i for d, i in self.layout.devices_indices_map(shape).items() if d in self.devices}


@pytest.mark.parametrize(
    ("spec", "held", "rows"),
    [
        (P("data"), [0, 1, 2, 3], [0, 1, 2, 3]),
        (P("data"), [4, 5, 6, 7], [4, 5, 6, 7]),
        (P("data"), [0, 1], [0, 1, 2, 3]),  # the process beside it, along "tensor", has the same rows
        (P("data"), [2, 3], [0, 1, 2, 3]),
        (P(("data", "sequence")), [1, 3, 4, 6], [2, 3, 4, 5]),
        (P(("data", "sequence")), [1, 5], [2, 3, 6, 7]),  # rows apart from each other
        (P("data", "sequence"), [1], [0, 1, 2, 3]),  # half of each row
        (P(), [3], list(range(8))),
    ],
)
def test_a_process_holds_the_rows_that_the_layout_gives_it(mesh, monkeypatch, spec, held, rows):
    layout = NamedSharding(mesh, spec)
    devices = {mesh.devices.flat[i] for i in held}
    assert distributed.rows_here(HeldBy(layout, devices), (8, 6)) == rows
    whole = np.arange(48, dtype=np.int32).reshape(8, 6)
    made = {}

    def from_callback(shape, sharding, part):
        found = {d: part(index) for d, index in HeldBy(layout, devices).addressable_devices_indices_map(shape).items()}
        made.update(found)
        return shape

    monkeypatch.setattr(distributed, "_gang", distributed._Gang(None, 0, 2))
    monkeypatch.setattr(jax, "make_array_from_callback", from_callback)
    assert distributed.assemble({"tokens": whole[rows]}, {"tokens": layout}, rows, 8) == {"tokens": (8, 6)}
    for device, index in layout.devices_indices_map((8, 6)).items():
        if device in devices:
            np.testing.assert_array_equal(made.pop(device), whole[index])
    assert not made


def test_assembled_rows_are_the_global_batch(mesh, monkeypatch):
    layout = NamedSharding(mesh, P(("data", "tensor"), "sequence"))
    whole = np.random.default_rng(0).normal(size=(8, 6, 3))
    assert distributed.assemble(whole, layout, range(8), 8) is whole
    monkeypatch.setattr(distributed, "_gang", distributed._Gang(None, 0, 2))
    found = distributed.assemble(whole.astype(np.float32), layout, range(8), 8)
    assert found.sharding == layout
    np.testing.assert_array_equal(found, whole.astype(np.float32))
