"""The batch script with which SLURM runs a command on GPUs: one task per GPU, every task seeing all GPUs of its node.

jax finds the other tasks and its own GPU by itself. `--gpus-per-task` is not used: it hides from each task the GPUs of
the others, and with them the fast way to them (https://github.com/jax-ml/jax/issues/23452, issue 28194).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence


def batch_script(
    command: Sequence[str],
    name: str,
    nodes: int,
    gpus_per_node: int,
    cpus_per_task: int,
    environment: Mapping[str, str],
    extra: Sequence[str] = (),
) -> str:
    """The text of the script. Every step is told to end 120 seconds before the time limit, time enough to save.

    Jobs of one name run one after the other, so that submitting it several times makes a chain, each going on where the
    one before it ended.

    Args:
      environment: variables to export.
      extra: further options of sbatch, such as "--time=24:00:00".
    """
    options = (
        f"--job-name={name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={gpus_per_node}",
        f"--gpus-per-node={gpus_per_node}",
        f"--cpus-per-task={cpus_per_task}",
        "--signal=TERM@120",
        "--requeue",
        "--dependency=singleton",
        "--open-mode=append",
        f"--output={name}-%j.log",
        *extra,
    )
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), ""]
    lines += [f"export {variable}={shlex.quote(value)}" for variable, value in environment.items()]
    # srun does not take over --cpus-per-task.
    lines += [f"srun --cpus-per-task={cpus_per_task} --kill-on-bad-exit=1 {shlex.join(command)}"]
    return "\n".join(lines) + "\n"
