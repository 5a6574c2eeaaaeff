"""The command lines of Cloud TPU: how slices are asked for, watched and given back, and what their workers are told.

Only text is made here; `tpu.launch.supervise` runs it. Sources: the gcloud reference
(https://cloud.google.com/sdk/gcloud/reference/compute/tpus) and https://cloud.google.com/tpu/docs, pages "runtimes",
"queued-resources", "spot" and "request-using-flex-start".
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tpu.chips import CHIPS, shapes
from tpu.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = Path(tempfile.gettempdir()) / f"foursight-{os.getuid()}.tar.gz"


class Family(NamedTuple):
    """The accelerators of one chip: `v5p-128` is 64 chips, because Google counts the two cores of a v5p."""

    chip: str  # a key of tpu.chips.CHIPS
    cores: int  # that the accelerator's name counts, per chip
    runtime: str  # the image of a TPU VM; empty where there is none


FAMILIES = {
    "v4": Family("v4", 2, "tpu-ubuntu2204-base"),
    "v5litepod": Family("v5e", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Family("v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Family("v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Family("v7x", 2, ""),
}


def family(accelerator: str) -> Family:
    """The family of an accelerator such as "v5litepod-16". Raises UserError, with the valid names."""
    name, _, size = accelerator.partition("-")
    if name not in FAMILIES:
        known = ", ".join(f"{name}-N" for name in FAMILIES)
        raise UserError(f"--accelerator={accelerator}: no such accelerator; valid: {known}, as in v5litepod-16")
    found = FAMILIES[name]
    sizes = sorted({math.prod(shape) * found.cores for shape in shapes(CHIPS[found.chip])})
    if not size.isdecimal() or int(size) not in sizes:
        known = ", ".join(f"{name}-{n}" for n in sizes if n.bit_count() == 1)
        more = f" and other slices of up to {sizes[-1]}" if any(n.bit_count() > 1 for n in sizes) else ""
        raise UserError(f"--accelerator={accelerator}: no such slice; valid: {known}{more}")
    return found


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of Cloud TPU, and the gcloud commands about it.

    Raises UserError for an accelerator that does not exist or has no TPU VMs, for two ways of paying at once and for a
    start-up script that is not there.
    """

    name: str
    zone: str
    accelerator: str
    queued: bool  # a queued resource; otherwise a TPU VM, created at once or not at all
    project: str | None = None  # None: gcloud's own
    slices: int = 1
    spot: bool = False
    reserved: bool = False
    flex_start: str | None = None  # for how long at most, such as "4h"
    valid_until: str | None = None  # after how long of waiting to give up, such as "6h"
    startup_script: str | None = None  # a file
    extra: Sequence[str] = ()  # further flags of `create`

    def __post_init__(self) -> None:
        if not family(self.accelerator).runtime:
            raise UserError(
                f"--accelerator={self.accelerator}: TPU7x is rented on GKE only; "
                f"python -m tpu.launch gke --accelerator={self.accelerator} ..."
            )
        paid = {"--spot": self.spot, "--reserved": self.reserved, "--flex_start": bool(self.flex_start)}
        if sum(paid.values()) > 1:
            raise UserError(f"{' and '.join(name for name in paid if paid[name])}: give one of them")
        if self.startup_script and not Path(self.startup_script).is_file():
            raise UserError(f"--startup_script={self.startup_script}: no such file")

    @property
    def ready(self) -> str:
        """The state in which the workers can be reached."""
        return "ACTIVE" if self.queued else "READY"

    def create(self) -> list[str]:
        """Asks for it. A queued resource is waited for afterwards; a TPU VM is there when this returns."""
        runtime = family(self.accelerator).runtime
        flags = [f"--accelerator-type={self.accelerator}"]
        if self.queued:
            nodes = (f"--node-count={self.slices}", f"--node-prefix={self.name}")
            flags += [f"--runtime-version={runtime}", *(nodes if self.slices > 1 else (f"--node-id={self.name}",))]
        else:
            flags += [f"--version={runtime}"]
        flags += [flag for flag, given in (("--spot", self.spot), ("--reserved", self.reserved)) if given]
        if self.flex_start:
            flags += ["--provisioning-model=flex-start", f"--max-run-duration={self.flex_start}"]
        if self.valid_until:
            flags += [f"--valid-until-duration={self.valid_until}"]
        if self.startup_script:
            flags += [f"--metadata-from-file=startup-script={self.startup_script}"]
        return self._gcloud("create", self.name, *flags, *self.extra, alpha=bool(self.flex_start))

    def describe(self) -> list[str]:
        """Prints its state, one word."""
        return self._gcloud("describe", self.name, f"--format=value({'state.state' if self.queued else 'state'})")

    def failure(self) -> list[str]:
        """Prints why a queued resource has failed."""
        return self._gcloud("describe", self.name, "--format=value(state.failedData.error.message)")

    def delete(self) -> list[str]:
        """Gives it back, and returns when that is done, so that the name is free again."""
        return self._gcloud("delete", self.name, *(["--force"] if self.queued else []), "--quiet")

    def copy(self) -> list[str]:
        """Copies ARCHIVE into the home directory of every worker."""
        return self._gcloud("scp", str(ARCHIVE), f"{self.name}:{ARCHIVE.name}", *self._workers("all"))

    def ssh(self, script: str, worker: str = "all") -> list[str]:
        """Runs a script on every worker, or on worker "0" (of the first slice)."""
        return self._gcloud("ssh", self.name, *self._workers(worker), f"--command={script}")

    def _workers(self, worker: str) -> list[str]:
        return [*([f"--node={worker}"] if self.queued else []), f"--worker={worker}"]

    def _gcloud(self, verb: str, *arguments: str, alpha: bool = False) -> list[str]:
        group = "queued-resources" if self.queued else "tpu-vm"
        place = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return ["gcloud", *(["alpha"] if alpha else []), "compute", "tpus", group, verb, *arguments, *place]


@dataclasses.dataclass(frozen=True)
class Job:
    """A command on all workers, detached from the connection that starts it, and the scripts about it.

    On each worker ~/foursight holds the code and ~/foursight-env Python and the packages; ~/foursight.log is the
    output, ~/foursight.pid names the process and ~/foursight.status appears with its exit status.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    repository: str | None = None  # a URL to clone; None: the code of this checkout

    def pack(self) -> list[str] | None:
        """Packs the code of this checkout into ARCHIVE; None where the workers clone. Raises UserError without one."""
        if self.repository:
            return None
        if not (ROOT / "setup.py").is_file():
            raise UserError("this is not a checkout, so there is no code to copy; give --repository=URL to clone")
        parts = ("configs", "model", "serve", "tpu", "train", "setup.py", "pyproject.toml", "README.md")
        where = (f"--file={ARCHIVE}", f"--directory={ROOT}", "--exclude=__pycache__")
        return ["tar", "--create", "--gzip", *where, *parts]

    def install(self) -> str:
        """Puts the code in place and installs it. The images' own Python is 3.10, too old; uv brings another."""
        url = shlex.quote(self.repository or "")
        clone = f"if test -d foursight; then git -C foursight pull --ff-only; else git clone {url} foursight; fi"
        unpack = f"mkdir -p foursight && tar --extract --gzip --file={ARCHIVE.name} --directory=foursight"
        return " && ".join(
            (
                clone if self.repository else unpack,
                "if ! test -x .local/bin/uv; then curl -LsSf https://astral.sh/uv/install.sh | sh; fi",
                ".local/bin/uv venv --quiet --allow-existing --python 3.12 foursight-env",
                ".local/bin/uv pip install --quiet --python foursight-env --editable './foursight[tpu]'",
            )
        )

    def start(self) -> str:
        """Starts the command and returns at once."""
        exports = "".join(f" {name}={shlex.quote(value)}" for name, value in self.environment.items())
        kept = shlex.quote(f"{shlex.join(self.command)}; echo $? > ~/foursight.status")
        return (
            f'cd foursight && rm -f ~/foursight.status && export PATH="$HOME/foursight-env/bin:$PATH"{exports} && '
            f"{{ nohup bash -c {kept} > ~/foursight.log 2>&1 < /dev/null & echo $! > ~/foursight.pid; }}"
        )

    def follow(self) -> str:
        """Prints the output from its beginning until the command ends."""
        return 'tail --lines=+1 --follow --sleep-interval=0.2 --pid="$(cat foursight.pid)" foursight.log'

    def status(self) -> str:
        """Prints "running", the exit status of a command that has ended, or nothing."""
        return (
            "if test -e foursight.status; then cat foursight.status; "
            'elif test -e foursight.pid && kill -0 "$(cat foursight.pid)"; then echo running; fi'
        )


def script(request: Request, job: Job, delete: bool) -> list[str]:
    """The whole of it as lines for a shell: create, wait, install, start, follow, delete."""
    state = f'"$({shlex.join(request.describe())})"'
    pack = job.pack()
    again = ["# When it is pre-empted (PREEMPTED, SUSPENDED, FAILED): delete it and begin again."]
    return [
        shlex.join(request.create()),
        f"until test {state} = {request.ready}; do sleep 30; done",
        *([shlex.join(pack), shlex.join(request.copy())] if pack else []),
        shlex.join(request.ssh(job.install())),
        shlex.join(request.ssh(job.start())),
        shlex.join(request.ssh(job.follow(), worker="0")),
        shlex.join(request.ssh(job.status(), worker="0")),
        *(again if request.spot else []),
        *([] if delete else ["# When it is no longer needed:"]),
        ("" if delete else "# ") + shlex.join(request.delete()),
    ]


def refusal(output: str) -> str:
    """What gcloud said of why it would not, out of all that it printed."""
    message = re.search(r'"message": "((?:[^"\\]|\\.)*)"', output)
    if message:
        return message[1]
    found = output[output.find("ERROR:") :] if "ERROR:" in output else output.strip().rpartition("\n")[2]
    return " ".join(re.sub(r"^ERROR: (\(gcloud[^)]*\) )?", "", found).split()) or "it gave no reason"
