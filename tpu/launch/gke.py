"""The xpk command lines that run a container on TPU slices or GPU nodes of a GKE cluster.

Source: https://github.com/AI-Hypercomputer/xpk, docs/usage/workloads.md. Spot, reserved and flex-start capacity belong
to the cluster (`xpk cluster create`), not to the workload.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from tpu.errors import UserError
from tpu.launch.cloud_tpu import FAMILIES, family

# As xpk 1.16 names them: GPU, memory, number in a node.
GPUS = (
    *("l4-1", "l4-2", "l4-4", "l4-8", "a100-40gb-1", "a100-40gb-2", "a100-40gb-4", "a100-40gb-8"),
    *("h100-80gb-8", "h100-mega-80gb-8", "h200-141gb-8", "b200-8", "gb200-4"),
)
SAVE_SECONDS = 120  # between a pod's SIGTERM and its end


def chip(accelerator: str) -> str:
    """The chip of a TPU or GPU accelerator, a key of `SETS`. Raises UserError, with the valid names."""
    if accelerator in GPUS:
        return "gpu"
    if accelerator.partition("-")[0] not in FAMILIES:
        tpus = ", ".join(f"{name}-N" for name in FAMILIES)
        raise UserError(f"--accelerator={accelerator}: no such accelerator; valid: {tpus}, {', '.join(GPUS)}")
    return family(accelerator).chip


def create(
    command: Sequence[str],
    name: str,
    cluster: str,
    accelerator: str,
    image: str,
    count: int,
    restarts: int,
    environment: Mapping[str, str],
    place: Sequence[str],
    extra: Sequence[str] = (),
) -> list[str]:
    """Starts `command` in a container of `image` on every host.

    Args:
      count: slices of a TPU, nodes of a GPU.
      restarts: how often the whole gang is started again after a failure or a pre-emption.
      place: --zone and --project, where gcloud's own are not meant.
      extra: further flags of xpk.
    """
    on_gpu = chip(accelerator) == "gpu"
    return [
        *("xpk", "workload", "create", f"--cluster={cluster}", f"--workload={name}", *place),
        f"--docker-image={image}",
        f"--device-type={accelerator}" if on_gpu else f"--tpu-type={accelerator}",
        f"--num-nodes={count}" if on_gpu else f"--num-slices={count}",
        f"--max-restarts={restarts}",
        f"--termination-grace-period-seconds={SAVE_SECONDS}",
        *(f"--env={variable}={value}" for variable, value in environment.items()),
        *extra,
        f"--command={shlex.join(command)}",
    ]


def watch(name: str) -> list[str]:
    """Prints the output of the first host of the first slice."""
    first = ("jobset.sigs.k8s.io/job-index=0", "batch.kubernetes.io/job-completion-index=0")
    return ["kubectl", "logs", "--follow", f"--selector=jobset.sigs.k8s.io/jobset-name={name},{','.join(first)}"]


def delete(name: str, cluster: str, place: Sequence[str]) -> list[str]:
    """Ends the workload."""
    return ["xpk", "workload", "delete", f"--cluster={cluster}", f"--workload={name}", *place]
