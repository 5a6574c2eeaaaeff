"""Finds the fastest layout of an experiment on a topology: arithmetic ranks, the real TPU compiler verifies the best.

    python -m tpu.plan --config=configs/gpt3.py:175b --topology=v5p:8x8x8 [--verify=3] [--json=FILE]

Searched are the mesh (data, fsdp, tensor, sequence, stage), ZeRO stage, rematerialisation, gradient accumulation and
the pipeline's micro-batches and repeats; the batch and everything else stay as the experiment has them. What the
compiler said is kept between runs. The last line printed is to be pasted behind train.pretrain.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from tpu import host
from tpu.chips import Topology, parse_topology, shapes
from tpu.errors import UserError
from train import entry
from train.config import Experiment
from train.resolve import on, resolve
from train.tree import to_dict

if TYPE_CHECKING:
    from tpu.plan.forecast import Forecast

if __name__ == "__main__":
    entry.define_config()
    flags.DEFINE_string("topology", None, "chips of one slice, such as v5p:8x8x8")
    flags.DEFINE_integer("slices", None, "slices, joined by a slow network; default: mesh.slices", lower_bound=1)
    flags.DEFINE_integer("verify", 3, "layouts to compile; 0: arithmetic alone", lower_bound=0)
    flags.DEFINE_integer("show", 10, "layouts to list", lower_bound=1)
    flags.DEFINE(entry.PATH, "json", None, "also write the ranked layouts to this file")

REMAT = ("none", "projections", "all_but_mlp", "attention", "full")
SPARE = 0.92  # of the memory: what arithmetic may fill
ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Layout:
    """One way of running the experiment, and what arithmetic says of it."""

    overrides: dict[str, Any]  # fields of the experiment, such as {"mesh.fsdp": 64}
    experiment: Experiment
    forecast: Forecast

    @property
    def bytes(self) -> int:
        """Bytes per device."""
        return self.forecast.arguments + self.forecast.temporary

    @property
    def flags(self) -> str:
        """The overrides as a line of flags."""
        return " ".join(f"--config.{field}={value}" for field, value in self.overrides.items())


def layouts(experiment: Experiment, topology: Topology, slices: int = 1) -> list[Layout]:
    """Every layout that the checks of the experiment allow on so many slices, the fastest by arithmetic first.

    Needs the environment of `tpu.compile.prepare`. Equal ones stand in the order of their overrides.
    """
    from tpu.plan.forecast import forecast
    from train.budget.summary import trained_share

    devices = _devices(topology, slices)
    trained = trained_share(dataclasses.replace(experiment, model=experiment.model.placed("tpu", "bfloat16")))
    found, meshes = [], {}
    for overrides in _candidates(experiment, topology.devices * slices):
        try:
            decided = on(overridden(experiment, overrides | {"mesh.slices": slices}), len(devices), "tpu", "bfloat16")
        except UserError:
            continue
        key = tuple(sorted(item for item in overrides.items() if item[0].startswith("mesh.")))
        if key not in meshes:
            meshes[key] = _mesh(decided, devices)
        if meshes[key] is not None:
            found.append(Layout(overrides, decided, forecast(decided, topology, meshes[key], trained)))
    return sorted(found, key=lambda layout: (layout.forecast.step, layout.flags))


def overridden(experiment: Experiment, overrides: dict[str, Any]) -> Experiment:
    """A resolved copy of the experiment with some fields replaced. Raises UserError where they do not fit."""
    branches: dict[str, dict[str, Any]] = {}
    for path, value in overrides.items():
        branch, field = path.split(".")
        branches.setdefault(branch, {})[field] = value
    parts = {name: dataclasses.replace(getattr(experiment, name), **fields) for name, fields in branches.items()}
    return resolve(dataclasses.replace(experiment, **parts))


def _candidates(experiment: Experiment, devices: int) -> Iterator[dict[str, Any]]:
    """Overrides to try; the checks of the experiment throw out what does not divide."""
    model, accumulation = experiment.model, experiment.optimizer.accumulation
    tensors = [n for n in _divisors(devices) if n <= 16 and model.heads % n == 0]
    sequences = [n for n in _divisors(devices) if n == 1 or (n <= 32 and experiment.data.context // n >= 1024)]
    groups = model.layers // len(model.pattern)
    stages = [n for n in _divisors(devices) if n <= 16 and groups % n == 0]
    for tensor, sequence, stage in itertools.product(tensors, sequences, stages):
        if devices % (tensor * sequence * stage):
            continue
        rest = devices // (tensor * sequence * stage)
        for fsdp in _divisors(rest):
            mesh = {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor, "sequence": sequence, "stage": stage}
            mesh = {f"mesh.{axis}": size for axis, size in mesh.items()} | {"mesh.expert": 1}
            # Under a pipeline every tick would add to the gradient of all weights that ZeRO stage 1 keeps whole.
            for zero, remat, parts in itertools.product(
                (3, 1) if fsdp > 1 and stage == 1 else (3,), REMAT, [n * accumulation for n in (1, 2, 4, 8)]
            ):
                layout = mesh | {"mesh.zero": zero, "model.remat": remat, "optimizer.accumulation": parts}
                if stage == 1:
                    yield layout
                    continue
                for repeats, rows in itertools.product((1, 2, 4), (1, 2, 4, 8)):
                    pipeline = {"model.pipeline_repeats": repeats, "model.pipeline_microbatches": rows * stage}
                    yield layout | pipeline


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _devices(topology: Topology, slices: int) -> list[Any]:
    from tpu.compile.pod import tpu_devices

    return tpu_devices(topology, slices)


def _mesh(experiment: Experiment, devices: list[Any]) -> Any:
    """The jax mesh, or None where its sizes cannot be laid on the torus."""
    from tpu.mesh import make_mesh

    try:
        return make_mesh(experiment.mesh, devices)
    except (NotImplementedError, ValueError):
        return None


def verified(layout: Layout, arguments: list[str], topology: Topology, slices: int) -> dict[str, Any]:
    """What `tpu.compile` reports of a layout, from the cache where it was asked before.

    Args:
      arguments: the `--config` flags that gave the experiment.
    """
    digest = hashlib.sha256()
    for path in sorted(p for room in ("model", "train", "tpu") for p in (ROOT / room).rglob("*.py")):
        digest.update(path.read_bytes())
    versions = [importlib.metadata.version(package) for package in ("jax", "flax", "libtpu")]
    libtpu = os.environ.get("TPU_LIBRARY_PATH", "")
    digest.update(json.dumps([to_dict(layout.experiment), str(topology), slices, versions, libtpu]).encode())
    kept = host.cache_dir() / "plans" / f"{digest.hexdigest()[:32]}.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            report = pathlib.Path(folder) / "report.json"
            command = [sys.executable, "-m", "tpu.compile", *arguments, f"--topology={topology}", f"--slices={slices}"]
            command += [*layout.flags.split(), f"--json={report}"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=os.getcwd())
            if not report.exists():
                raise UserError(f"tpu.compile {layout.flags}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
            report.replace(kept)
    return json.loads(kept.read_bytes())


def row(layout: Layout, topology: Topology, slices: int, flops: int) -> dict[str, Any]:
    """What arithmetic says of a layout, under the names that `tpu.compile --json` uses.

    flops: of the model for a token (`train.budget.flops`), whatever the layout.
    """
    found, experiment = layout.forecast, layout.experiment
    chip = topology.chip
    tokens = experiment.data.batch_size * experiment.data.context
    useful = flops * tokens
    hbm = chip.hbm_bytes // chip.devices
    return {
        "overrides": layout.flags,
        "verified": False,
        "chips": topology.chips * slices,
        "fits": layout.bytes <= SPARE * hbm,
        "bytes_per_chip": {
            "arguments": found.arguments,
            "temporary": found.temporary,
            "peak": layout.bytes,
            "hbm": hbm,
        },
        "matmul_flops_per_chip": found.flops,
        "collectives": [dataclasses.asdict(collective) for collective in found.collectives],
        "step_seconds": found.step,
        "mfu": useful / (found.step * topology.chips * slices * chip.peak_flops),
        "limit": found.limit,
        "compile_seconds": None,
    }


def smallest_that_does(experiment: Experiment, topology: Topology) -> Topology | None:
    """The smallest larger slice of the same chip on which, by arithmetic, some layout fits."""
    chip = topology.chip
    for shape in shapes(chip):
        larger = Topology(chip, shape)
        if larger.chips > topology.chips and any(fits(layout, larger) for layout in layouts(experiment, larger)):
            return larger
    return None


def fits(layout: Layout, topology: Topology) -> bool:
    """Whether arithmetic says that a layout fits the memory."""
    return layout.bytes <= SPARE * topology.chip.hbm_bytes / topology.chip.devices


def main() -> int:
    """Plans --config on --topology."""
    options = entry.FLAGS
    experiment = entry.experiment_from_flags()
    entry.need(topology=options.topology)
    entry.need_writable(json=options.json)
    topology = parse_topology(options.topology)
    if topology.chip is None:
        raise UserError(f"--topology={options.topology}: a plan is for TPUs, such as v5p:8x8x8")
    from tpu.compile.pod import prepare

    prepare(options.topology)
    slices = options.slices or experiment.mesh.slices
    everything = layouts(experiment, topology, slices)
    if not everything:
        raise UserError(
            f"no mesh of {topology.devices * slices} devices divides this experiment; change data.batch_size="
            f"{experiment.data.batch_size} to a multiple of a divisor of the devices"
        )
    fitting = [layout for layout in everything if fits(layout, topology)]
    if not fitting:
        least = min(everything, key=lambda layout: layout.bytes)
        hbm = topology.chip.hbm_bytes / topology.chip.devices
        larger = smallest_that_does(experiment, topology)
        raise UserError(
            f"nothing fits {topology}: the leanest layout ({least.flags}) needs {least.bytes / 2**30:.1f} GiB a chip, "
            f"{(least.bytes - SPARE * hbm) / 2**30:.1f} GiB too many; "
            + (f"{larger} is the smallest that would do" if larger else "no larger slice of this chip would do")
        )
    print(f"{len(everything):,} layouts, {len(fitting):,} of which fit by arithmetic")
    if everything[0].forecast.step < fitting[0].forecast.step:
        first = everything[0]
        print(
            f"the fastest by arithmetic, {first.forecast.step:.2f} s a step, does not fit: {_short(first.flags)} needs "
            f"{first.bytes / 2**30:.1f} GiB a chip"
        )
    rows = _ranked(fitting, topology, slices)
    _print(rows[: options.show], experiment)
    entry.write_json(rows[: max(options.show, options.verify)])
    return 0


def _ranked(fitting: list[Layout], topology: Topology, slices: int) -> list[dict[str, Any]]:
    """Rows of all layouts: those that the compiler confirms first, fastest first, then the others by arithmetic.

    A layout that the compiler finds too large makes room for the next, up to twice `--verify` in all.
    """
    from train.budget.flops import flops_per_token

    wanted, tried = entry.FLAGS.verify, 0
    arguments = [a for a in sys.argv[1:] if a.startswith(("--config", "-config"))]
    checked: list[dict[str, Any]] = []
    distinct = _distinct(fitting)
    while tried < min(2 * wanted, len(distinct)) and sum(r["fits"] for r in checked) < wanted:
        layout = distinct[tried]
        tried += 1
        print(f"compiling {tried}: {layout.flags}", flush=True)
        report = verified(layout, arguments, topology, slices)
        limit = _limit(report)
        checked.append(report | {"overrides": layout.flags, "verified": True, "limit": limit})
    done = {r["overrides"] for r in checked}
    checked.sort(key=lambda r: (not r["fits"], r["step_seconds"] or float("inf"), r["overrides"]))
    flops = flops_per_token(distinct[0].experiment)
    shown = [layout for layout in distinct[: 4 * entry.FLAGS.show] if layout.flags not in done]
    rest = [row(layout, topology, slices, flops) for layout in shown]
    return [r for r in checked if r["fits"]] + rest + [r for r in checked if not r["fits"]]


def _distinct(fitting: list[Layout]) -> list[Layout]:
    """The fastest layout of every mesh, and behind them all others: what is compiled should differ."""
    first: dict[Any, Layout] = {}
    for layout in fitting:
        first.setdefault(dataclasses.astuple(layout.experiment.mesh), layout)
    leaders = {id(layout) for layout in first.values()}
    return [*first.values(), *(layout for layout in fitting if id(layout) not in leaders)]


def _limit(report: dict[str, Any]) -> str:
    if not report["roofline"]:
        return "memory capacity"
    parts = {name: report["roofline"][name] for name in ("compute", "memory")}
    parts |= {f"{axis} network": seconds for axis, seconds in report["roofline"]["network"].items()}
    return max(parts, key=parts.get)


def _print(rows: list[dict[str, Any]], experiment: Experiment) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "compiled", "fits", "GiB per chip", "step, s", "MFU", "limited by", "layout")
    for number, found in enumerate(rows, 1):
        memory, step, mfu = found["bytes_per_chip"], found["step_seconds"], found["mfu"]
        table.add_row(
            str(number),
            "yes" if found["verified"] else "no",
            "yes" if found["fits"] else "no",
            f"{memory['peak'] / 2**30:.1f} of {memory['hbm'] / 2**30:.0f}",
            f"{step:.2f}" if step else "",
            f"{100 * mfu:.0f} %" if mfu else "",
            found["limit"],
            _short(found["overrides"]),
        )
    Console(width=160 if not sys.stdout.isatty() else None).print(table)
    print(f"for train.pretrain:\n{rows[0]['overrides']}")


def _short(overrides: str) -> str:
    """Overrides without what is at its default, for the table."""
    words = (word.removeprefix("--config.").split(".", 1)[1] for word in overrides.split())
    return " ".join(word for word in words if not word.endswith(("=1", "zero=3")))


if __name__ == "__main__":
    entry.run(main)
