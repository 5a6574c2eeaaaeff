"""Starts a command where the chips are: on this machine, on Cloud TPU, on GKE, on SLURM.

    python -m tpu.launch TARGET [flags] -- COMMAND

    local             several processes on this machine, started again from the last checkpoint when one dies
    tpu-vm            a Cloud TPU slice, created at once or refused
    queued-resource   one or several Cloud TPU slices, waited for; spot ones are made anew when they are pre-empted
    gke               a container on TPU slices or GPU nodes of a GKE cluster, through xpk
    slurm             a batch job with one task per GPU

--dry_run prints every command as it could be pasted, and runs none. docs/launch.md has an example of each.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from tpu.errors import UserError
from tpu.launch import cloud_tpu, gke, slurm, xla_flags
from train import entry

if __name__ == "__main__":
    flags.DEFINE_boolean("dry_run", False, "all: print what would be run, and run nothing")
    flags.DEFINE_string("name", "foursight", "all but local: of the slice, the workload or the job")
    flags.DEFINE_string(
        "xla_flags", None, "all: in place of the chip's own set (tpu/launch/xla_flags.py); empty for none"
    )
    flags.DEFINE_integer(
        "restarts", 10, "local, gke, and with --spot: how often to start again after a loss", lower_bound=0
    )
    flags.DEFINE_integer("processes", 1, "local: in the gang", lower_bound=1)
    flags.DEFINE_string("accelerator", None, "tpu-vm, queued-resource, gke: such as v5litepod-16; gke: or h100-80gb-8")
    flags.DEFINE_string("zone", None, "tpu-vm, queued-resource, gke: such as us-east5-b")
    flags.DEFINE_string("project", None, "tpu-vm, queued-resource, gke: not given: gcloud's own")
    flags.DEFINE_integer("slices", 1, "queued-resource, gke: of the TPU", lower_bound=1)
    flags.DEFINE_boolean("spot", False, "tpu-vm, queued-resource: cheap, and may be taken away at any time")
    flags.DEFINE_boolean("reserved", False, "tpu-vm, queued-resource: out of your reservation")
    flags.DEFINE_string("flex_start", None, "queued-resource: flex-start, for at most so long, such as 4h")
    flags.DEFINE_string("valid_until", None, "queued-resource: give up waiting after so long, such as 6h")
    flags.DEFINE(
        entry.PATH, "startup_script", None, "tpu-vm, queued-resource: file that each worker runs as root at boot"
    )
    flags.DEFINE_string("repository", None, "tpu-vm, queued-resource: clone this instead of copying this checkout")
    flags.DEFINE_boolean("delete", False, "tpu-vm, queued-resource: give the slice back at the end, and on Ctrl-C")
    flags.DEFINE_float("poll_seconds", 30, "tpu-vm, queued-resource: between two looks at the state", lower_bound=0.01)
    flags.DEFINE_string("cluster", None, "gke: its name")
    flags.DEFINE_string("image", None, "gke: container image with Foursight and its packages")
    flags.DEFINE_integer("nodes", 1, "slurm; gke with GPUs", lower_bound=1)
    flags.DEFINE_integer("gpus_per_node", 8, "slurm", lower_bound=1)
    flags.DEFINE_integer("cpus_per_task", 8, "slurm: cores for each GPU's process", lower_bound=1)
    flags.DEFINE_string("extra", "", "all but local: further flags of gcloud's create, xpk or sbatch, in one string")

CLOUD = {"name", "accelerator", "zone", "project", "spot", "reserved", "startup_script", "repository", "delete"}
CLOUD |= {"restarts", "poll_seconds", "extra"}
# What each target reads beside --dry_run and --xla_flags, and what it cannot do without.
READS = {
    "local": {"processes", "restarts"},
    "tpu-vm": CLOUD,
    "queued-resource": CLOUD | {"slices", "flex_start", "valid_until"},
    "gke": {"name", "accelerator", "zone", "project", "slices", "nodes", "cluster", "image", "restarts", "extra"},
    "slurm": {"name", "nodes", "gpus_per_node", "cpus_per_task", "extra"},
}
NEEDS = {"tpu-vm": ("accelerator", "zone"), "gke": ("cluster", "accelerator", "image")}
NEEDS["queued-resource"] = NEEDS["tpu-vm"]


def take_words(arguments: list[str]) -> tuple[str, list[str]]:
    """Removes the target and all from `--` on from the arguments of the process, so that flags remain; returns both.

    Either is empty where it is missing.
    """
    at = arguments.index("--") if "--" in arguments else len(arguments)
    command = arguments[at + 1 :]
    del arguments[at:]
    target = arguments.pop(1) if len(arguments) > 1 and not arguments[1].startswith("-") else ""
    return target, command


if __name__ == "__main__":
    TARGET, COMMAND = take_words(sys.argv)


def main() -> int:
    """Starts COMMAND on TARGET."""
    if TARGET not in READS:
        given = f"{TARGET}: no such target" if TARGET else "no target given"
        raise UserError(f"{given}; valid: {', '.join(READS)}, as in: python -m tpu.launch TARGET [flags] -- COMMAND")
    _check_flags(TARGET)
    if not COMMAND:
        raise UserError("no command given; put it last, after --, as in: -- python -m train.pretrain --config=...")
    _check_workdir(TARGET, COMMAND)
    launchers: dict[str, Callable[[Sequence[str]], int]] = {"local": _local, "gke": _gke, "slurm": _slurm}
    return launchers.get(TARGET, _cloud_tpu)(COMMAND)


def _check_flags(target: str) -> None:
    """Raises UserError for a flag that the target does not read and for one that it needs and that is missing."""
    ours = entry.FLAGS.flags_by_module_dict()[sys.argv[0]]
    for flag in ours:
        if flag.present and flag.name not in READS[target] | {"dry_run", "xla_flags"}:
            readers = [name for name, names in READS.items() if flag.name in names]
            raise UserError(f"--{flag.name} means nothing to {target}; it belongs to {', '.join(readers)}")
    entry.need(**{name: entry.FLAGS[name].value for name in NEEDS.get(target, ())})
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", entry.FLAGS.name):
        raise UserError(f"--name={entry.FLAGS.name}: must be letters a-z, digits, hyphens; a letter first, 40 at most")


def _check_workdir(target: str, command: Sequence[str]) -> None:
    """Raises UserError for a workdir that is no path; warns of one that a pre-empted machine takes with it."""
    match = re.search(r"--workdir[= ](\S+)", " ".join(command))
    if not match:
        return
    if "://" in match[1]:
        raise UserError(f"--workdir={match[1]}: must be a path; mount a share on every worker (docs/launch.md)")
    lost = target == "gke" or (target in ("tpu-vm", "queued-resource") and entry.FLAGS.spot)
    own_disk = not match[1].startswith("/") or match[1].startswith(("/home/", "/root/", "/tmp/", "/var/"))
    if lost and own_disk:
        print(
            f"warning: --workdir={match[1]} lies on the machine's own disk, which is lost with it: after a pre-emption "
            "training would begin from nothing. Give a path on a share mounted on every worker (docs/launch.md)",
            file=sys.stderr,
        )


def _local(command: Sequence[str]) -> int:
    """A gang on this machine."""
    from tpu import distributed
    from tpu.launch import gang

    environment = xla_flags.environment("cpu", entry.FLAGS.xla_flags)
    if entry.FLAGS.dry_run:
        described = {distributed.COORDINATOR: "127.0.0.1:8476", distributed.PROCESSES: str(entry.FLAGS.processes)}
        described |= {distributed.HOSTS: "1"} | environment
        for index in range(entry.FLAGS.processes):
            variables = described | {distributed.PROCESS: str(index)}
            print(*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command), "&")
        print("wait")
        return 0
    _need_program(command[0], "give a command that can be run here")
    return gang.run(command, entry.FLAGS.processes, entry.FLAGS.restarts, environment)


def _cloud_tpu(command: Sequence[str]) -> int:
    """A TPU VM or a queued resource, seen through to the end."""
    from tpu.launch.supervise import supervise

    given = entry.FLAGS
    if given["restarts"].present and not given.spot:
        raise UserError("--restarts means nothing without --spot: only spot slices are made anew")
    request = cloud_tpu.Request(
        name=given.name,
        zone=given.zone,
        accelerator=given.accelerator,
        queued=TARGET == "queued-resource",
        project=given.project,
        slices=given.slices,
        spot=given.spot,
        reserved=given.reserved,
        flex_start=given.flex_start,
        valid_until=given.valid_until,
        startup_script=given.startup_script,
        extra=shlex.split(given.extra),
    )
    environment = xla_flags.environment(cloud_tpu.family(given.accelerator).chip, given.xla_flags)
    job = cloud_tpu.Job(command, environment, given.repository)
    if given.dry_run:
        print(*cloud_tpu.script(request, job, given.delete), sep="\n")
        return 0
    _need_program("gcloud", "install it from https://cloud.google.com/sdk/docs/install")
    return supervise(request, job, given.restarts, given.poll_seconds, given.delete)


def _gke(command: Sequence[str]) -> int:
    """A workload on a GKE cluster."""
    given = entry.FLAGS
    chip = gke.chip(given.accelerator)
    idle = "slices" if chip == "gpu" else "nodes"
    if given[idle].present:
        raise UserError(f"--{idle} means nothing to --accelerator={given.accelerator}")
    place = [f"--{name}={given[name].value}" for name in ("zone", "project") if given[name].value]
    create = gke.create(
        command,
        given.name,
        given.cluster,
        given.accelerator,
        given.image,
        given.nodes if chip == "gpu" else given.slices,
        given.restarts,
        xla_flags.environment(chip, given.xla_flags),
        place,
        shlex.split(given.extra),
    )
    later = {"its output": gke.watch(given.name), "to end it": gke.delete(given.name, given.cluster, place)}
    return _submit(create, "xpk", "pip install xpk", later)


def _slurm(command: Sequence[str]) -> int:
    """A batch job, its script kept in NAME.sbatch."""
    given = entry.FLAGS
    environment = xla_flags.environment("gpu", given.xla_flags)
    counts = (given.nodes, given.gpus_per_node, given.cpus_per_task)
    text = slurm.batch_script(command, given.name, *counts, environment, shlex.split(given.extra))
    file = Path(f"{given.name}.sbatch")
    if given.dry_run:
        print(f"cat > {file} <<'END_OF_SCRIPT'\n{text}END_OF_SCRIPT")
    else:
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"name={given.name}: {file} cannot be written ({error.strerror})") from error
    later = {"its output": ["tail", "-F", f"{given.name}-JOB.log"], "to end it": ["scancel", f"--name={given.name}"]}
    return _submit(["sbatch", str(file)], "sbatch", "start this on a login node of the cluster", later)


def _submit(command: Sequence[str], program: str, remedy: str, later: dict[str, Sequence[str]]) -> int:
    """Hands a job to a queue, and says what can be done with it then. Raises UserError where it is refused."""
    if entry.FLAGS.dry_run:
        print(shlex.join(command))
    else:
        _need_program(program, remedy)
        if status := subprocess.run(command).returncode:
            raise UserError(f"{program} refused, with status {status}; see above. It was given: {shlex.join(command)}")
    for what, line in later.items():
        print(f"# {what}: {shlex.join(line)}")
    return 0


def _need_program(program: str, remedy: str) -> None:
    if shutil.which(program) is None:
        raise UserError(f"{program} is not on PATH; {remedy}")


if __name__ == "__main__":
    entry.run(main)
