"""Several processes as one gang: start-up, agreement between them, their parts of a batch.

One process runs on every host (or several, on a host that only rehearses a gang). Every function here may be called by
a lone process too, which needs no start-up and never imports jax for it. Processes agree through the key-value store of
jax's coordinator, never through the accelerators, so that agreeing cannot wait behind a step.

A process that dies stops sending heartbeats: jax then ends the others within 100 seconds. `tpu.watchdog` ends a gang
whose processes all live and do nothing. Process 0 leads: it decides, and it alone writes what only one can write.

Legend: B rows of the global batch, L rows of it that this process holds.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib.util
import ipaddress
import itertools
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tpu import host
from tpu.errors import UserError

# What describes a gang where no cluster does; `tpu.launch.gang` sets them.
COORDINATOR, PROCESSES, PROCESS = "FOURSIGHT_COORDINATOR", "FOURSIGHT_PROCESSES", "FOURSIGHT_PROCESS"
HOSTS = "FOURSIGHT_HOSTS"  # 1: all processes run on one host, so that a loopback coordinator will do
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")

_FOREVER = 7 * 24 * 3600 * 1000  # milliseconds; a process that dies ends the wait of the others much sooner


class _Gang(NamedTuple):
    client: Any  # of jax's key-value store
    process: int
    processes: int


_gang: _Gang | None = None  # None: this process is alone
_agreements = itertools.count()


# Start-up


def cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` must be told; empty where it finds out by itself; None for a lone process.

    Looks, in this order, for FOURSIGHT_PROCESSES and its companions, a SLURM step of several tasks, an indexed
    Kubernetes job, and TPU chips (a Cloud TPU VM, whose metadata also tell of several slices). FOURSIGHT_PROCESSES=1
    says that the process is alone whatever surrounds it. Raises UserError for a description that cannot work.
    """
    if any(name in environment for name in (COORDINATOR, PROCESSES, PROCESS)):
        return _given(environment)
    if all(name in environment for name in _SLURM):
        return {} if environment["SLURM_NTASKS"] != "1" else None
    on_tpu = host.has_tpu_chips() and ("TPU_WORKER_HOSTNAMES" in environment or "TPU_SKIP_MDS_QUERY" not in environment)
    if not on_tpu and all(name in environment for name in _KUBERNETES):
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this is a pod of an indexed job, and the package kubernetes, which finds the other pods, is not "
                f"installed; pip install kubernetes, or set {PROCESSES}=1 for a pod that works alone"
            )
        return {}
    return {} if on_tpu else None


def _given(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments that the variables of ours stand for."""
    if environment.get(PROCESSES) == "1":
        return None
    for name in (COORDINATOR, PROCESSES, PROCESS):
        if not environment.get(name):
            raise UserError(f"{name} is not set: a gang needs {COORDINATOR} (host:port), {PROCESSES} and {PROCESS}")
    coordinator = environment[COORDINATOR]
    numbers = {}
    for name in (PROCESSES, PROCESS):
        if not environment[name].isdecimal():
            raise UserError(f"{name}={environment[name]}: must be a whole number")
        numbers[name] = int(environment[name])
    if numbers[PROCESS] >= numbers[PROCESSES]:
        raise UserError(f"{PROCESS}={numbers[PROCESS]}: must be below {PROCESSES}={numbers[PROCESSES]}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{COORDINATOR}={coordinator}: must be host:port, such as 10.0.0.1:8476")
    if environment.get(HOSTS) != "1" and _is_loopback(host):
        raise UserError(
            f"{COORDINATOR}={coordinator}: other hosts cannot reach a loopback address; give one of process 0's host "
            f"that they can, or set {HOSTS}=1 if all processes run on this host"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": numbers[PROCESSES],
        "process_id": numbers[PROCESS],
        "cluster_detection_method": "deactivate",
    }


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def initialize(timeout: int = 1800) -> None:
    """Joins the gang that the environment describes; does nothing in a lone process. Call it before jax computes.

    timeout: seconds for all processes to appear. A cold gang takes much longer than jax's own 300: machines boot,
    images are pulled. After it the process says what it waited for and exits with status 2. Raises UserError where the
    environment describes no gang that could be.
    """
    global _gang
    arguments = cluster(os.environ)
    if arguments is None:
        return
    import jax
    from jax._src import distributed  # The store has no public name; orbax takes it from here as well.

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax ends the process by abort() when its own time is up, and keeps Python from handling Ctrl-C until then.
    timer = threading.Timer(timeout, _give_up, (arguments, timeout))
    timer.daemon = True
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    timer.start()
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=timeout + 60, heartbeat_timeout_seconds=100, shutdown_timeout_seconds=60
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, interrupt)
    if jax.process_count() > 1:
        _gang = _Gang(distributed.global_state.client, jax.process_index(), jax.process_count())


def _give_up(arguments: dict[str, Any], timeout: int) -> None:
    where = f"{arguments['coordinator_address']} with " if arguments else ""
    which = f"process {arguments['process_id']} of {arguments['num_processes']}" if arguments else "this process"
    line = f"error: {which}: {where}all processes did not come together within {timeout} s; are all of them running?\n"
    os.write(2, line.encode())
    os._exit(2)


@contextlib.contextmanager
def ended_by_errors() -> Iterator[None]:
    """A context in which an unforeseen error ends a process of several at once, with status 1.

    Otherwise jax would wait, when the interpreter exits, for the others, which wait for this process.
    """
    try:
        yield
    except UserError:  # As a rule all raise it.
        raise
    except Exception:
        if _gang is None:
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


# Agreement


def several() -> bool:
    """Whether this process is one of several."""
    return _gang is not None


def leads() -> bool:
    """Whether this is process 0, or a lone one."""
    return _gang is None or _gang.process == 0


def decide(function: Callable[[], Any]) -> Any:
    """What `function` returns in process 0, in all; process 0 alone calls it. Its value must be what JSON can hold.

    A UserError that it raises is raised in all; what else it raises, in process 0, while the others raise
    RuntimeError. All processes must call `decide` and `gather` equally often and in the same order.
    """
    if _gang is None:
        return function()
    key = f"foursight/decided/{next(_agreements)}"
    if _gang.process:
        found = json.loads(_gang.client.blocking_key_value_get(key, _FOREVER))
        if "refused" in found:
            raise UserError(found["refused"])
        if "failed" in found:
            raise RuntimeError(f"process 0 failed: {found['failed']}")
        return found["value"]
    found = {"failed": "it was interrupted"}
    try:
        found = {"value": function()}
    except UserError as error:
        found = {"refused": str(error)}
        raise
    except Exception as error:
        found = {"failed": repr(error)}
        raise
    finally:
        _gang.client.key_value_set(key, json.dumps(found))
    return found["value"]


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order, in all of them; waits for the last. See `decide`."""
    if _gang is None:
        return [value]
    name = f"foursight/gathered/{next(_agreements)}"
    _gang.client.key_value_set(f"{name}/{_gang.process}", json.dumps(value))
    _gang.client.wait_at_barrier(name, _FOREVER)
    return [value for _, value in sorted(_told(name).items())]


def tell(name: str, value: Any) -> None:
    """Lets the other processes know a value, in place of what this one told by that name before. Waits for nobody."""
    if _gang is not None:
        _gang.client.key_value_set(f"foursight/told/{name}/{_gang.process}", json.dumps(value), allow_overwrite=True)


def told(name: str) -> dict[int, Any]:
    """What the processes have told by that name so far, by process. Waits for nobody."""
    return {} if _gang is None else _told(f"foursight/told/{name}")


def _told(folder: str) -> dict[int, Any]:
    found = _gang.client.key_value_dir_get(folder + "/")
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


def host_name() -> str:
    """What this host is called in the log."""
    return socket.gethostname()


# Batches


def rows_here(sharding: Any, shape: tuple[int, ...]) -> list[int]:
    """The rows of an array of this shape, laid out by this NamedSharding, of which some device here holds a part.

    They follow from the layout alone: processes that differ only along the tensor or stage axis have the same rows.
    """
    parts = sharding.addressable_devices_indices_map(shape).values()
    return sorted({row for part in parts for row in range(*part[0].indices(shape[0]))})


def assemble(batch: Any, layout: Any, rows: Sequence[int], batch_size: int) -> Any:
    """The global arrays [B, ...] of which this process has the rows `rows`, from a tree of numpy arrays [L, ...].

    layout: a tree of the same form, how each array lies.

    A lone process's arrays are returned as they are: the compiled step lays them out faster.
    """
    if _gang is None:
        return batch
    import jax

    def whole(local: Any, sharding: Any) -> Any:
        def part(index: tuple[slice, ...]) -> Any:
            start, stop, _ = index[0].indices(batch_size)
            first = bisect.bisect_left(rows, start)
            return local[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return jax.tree.map(whole, batch, layout)
