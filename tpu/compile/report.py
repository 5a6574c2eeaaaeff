"""The report of a compiled program: memory, operations, seconds, what is sent, and what a whole run of it costs."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from model.config import ModelConfig
from tpu import rules
from tpu.chips import Chip, Topology, smallest
from tpu.compile import hlo
from tpu.compile.cost import run_cost
from tpu.compile.hlo_counts import Counts, Kernel, count
from tpu.compile.roofline import collective_seconds, roofline
from train.budget.flops import decoding_flops_per_token, flops_per_token
from train.budget.summary import held, human_bytes, pipeline_bubble
from train.config import Experiment

LARGEST = 8  # arguments, and temporary arrays, that a report names
# Products of size tokens x tokens x head_dim in an attention kernel, by a word of its name; the first that fits counts.
_PRODUCTS = {"mha_fwd": 2, "mha_dkv": 4, "mha_dq": 3, "SoftmaxBackward": 5, "Softmax": 2}


class Compiled(NamedTuple):
    """What came out of the compiler."""

    text: str  # the optimised module; "" where it did not come so far
    seconds: float
    fits: bool
    temporary: int | None  # bytes on one device beside the arguments; None where the compiler does not say
    peak: int | None  # bytes on one device at one time
    host: int = 0  # bytes in the host's memory, for one device


@dataclasses.dataclass
class Report:
    """What a program amounts to on a topology. "Per chip" is per device of jax: of a v7x, one of its two cores.

    The keys of `bytes_per_chip`: weights, optimizer and ema (train) or weights and cache (decode); arguments, all of
    these together; gradients, by their layout, a part of temporary; peak, the most at one time; hbm, what there is;
    host, what lies in the host's memory instead (`optimizer.offload`, `model.remat=offload_projections`).
    """

    name: str
    program: str  # train or decode
    topology: str
    slices: int
    chips: int
    devices: int
    mesh: dict[str, int]  # in the order of the mesh's dimensions
    fits: bool
    missing_bytes: int  # that a chip has too few
    suggestion: str | None  # the smallest slice that would do, where this does not
    bytes_per_chip: dict[str, int | None]
    largest: list[dict[str, Any]]  # leaf, bytes: the largest arguments on one chip
    largest_temporaries: list[dict[str, Any]]  # type, operation, bytes: the largest arrays made on the way
    matmul_flops_per_chip: int
    kernel_flops_per_chip: int  # of attention and of grouped products
    kernels: list[dict[str, Any]]
    model_flops: int  # of all chips, as train.budget.flops counts them
    compiler_seconds: float | None  # libtpu's estimated cycles over the clock; neither collectives nor kernels
    roofline: dict[str, Any] | None
    step_seconds: float | None  # the mean of all, where one in `exchange_every` differs
    tokens_per_second: float | None
    mfu: float | None
    exchange_every: int  # steps; above 1 (local SGD) counts and roofline, but its limit, are of a step that exchanges
    collectives: list[dict[str, Any]]
    unknown_loops: int  # loops of unknown length, counted as one pass
    compile_seconds: float
    pipeline_bubble: float | None  # share of the step that a stage idles, by its formula; None without stages
    run: dict[str, Any] | None  # the whole run's chip-hours, energy and price, where it fits


def make_report(
    program: str,
    experiment: Experiment,
    topology: Topology,
    mesh: Mesh,
    compiled: Compiled,
    parts: dict[str, Any],
    tokens: int,
    context: int,
) -> Report:
    """The report of a program.

    Args:
      program: "train", or "decode".
      experiment: as decided for the mesh.
      parts: the program's abstract arguments, laid out on the mesh, by what they are.
      tokens: that one call of the program reads, over all devices.
      context: tokens that the last of a row sees.
    """
    chip, slices, train = topology.chip, experiment.mesh.slices, program == "train"
    counts, arrangement = Counts(), (dict(mesh.shape), slices, experiment.mesh.slice_axis)
    if compiled.text:
        module = hlo.parse(compiled.text)
        counts = count(module, *arrangement)
    model_flops = flops_per_token(experiment) if train else decoding_flops_per_token(experiment, context)
    model_flops *= tokens
    gradients = {"gradients": _gradient_bytes(experiment, mesh)} if train else {}
    memory = _memory(compiled, chip, parts, gradients)
    fits = compiled.fits and (chip is None or memory["peak"] <= memory["hbm"])
    missing = 0 if fits else max(0, memory["peak"] - memory["hbm"])
    kernel_flops = attention_kernel_flops(counts.kernels, experiment.model, context)
    kernel_flops += sum(kernel.count * kernel.flops for kernel in counts.kernels)
    report = Report(
        name=experiment.name,
        program=program,
        topology=str(topology),
        slices=slices,
        chips=topology.chips * slices,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        fits=fits,
        missing_bytes=missing,
        suggestion=None if fits else _suggestion(memory, topology),
        bytes_per_chip=memory,
        largest=_largest(parts),
        largest_temporaries=[dataclasses.asdict(buffer) for buffer in counts.buffers[:LARGEST]],
        matmul_flops_per_chip=counts.matmul_flops,
        kernel_flops_per_chip=kernel_flops,
        kernels=[dataclasses.asdict(kernel) for kernel in counts.kernels],
        model_flops=model_flops,
        compiler_seconds=counts.cycles / chip.clock if counts.cycles else None,
        roofline=None,
        step_seconds=None,
        tokens_per_second=None,
        mfu=None,
        exchange_every=max(1, experiment.optimizer.local_steps) if train else 1,
        collectives=[dataclasses.asdict(row) for row in counts.collectives],
        unknown_loops=counts.unknown_loops,
        compile_seconds=compiled.seconds,
        pipeline_bubble=pipeline_bubble(experiment) if train else None,
        run=None,
    )
    if chip is not None and compiled.text:
        between = count(module, *arrangement, branch=min) if report.exchange_every > 1 else None
        _time(report, counts, between, topology, mesh, tokens)
        if train and fits:
            prices = json.loads(pathlib.Path(__file__).with_name("prices.json").read_bytes())
            report.run = run_cost(report.step_seconds, experiment.run.steps, chip, report.chips, prices)
    return report


def _memory(
    compiled: Compiled, chip: Chip | None, parts: dict[str, Any], gradients: dict[str, int]
) -> dict[str, int | None]:
    """Bytes of a device: of each part of the arguments, of the gradients where there are any, and what they come to."""
    memory: dict[str, int | None] = {name: _bytes(tree) for name, tree in parts.items()}
    memory["arguments"] = sum(memory.values())
    memory |= gradients
    memory["temporary"] = compiled.temporary
    memory["peak"] = memory["arguments"] + (compiled.temporary or 0) if compiled.peak is None else compiled.peak
    memory["hbm"] = chip.hbm_bytes // chip.devices if chip else None
    memory["host"] = compiled.host
    return memory


def _time(report: Report, counts: Counts, between: Counts | None, topology: Topology, mesh: Mesh, tokens: int) -> None:
    """Fills in what takes how long. `between` counts a step that does not exchange, where only some do."""
    seconds = roofline(counts, report.kernel_flops_per_chip, topology, mesh)
    report.roofline = dataclasses.asdict(seconds) | {"limit": seconds.limit}
    report.step_seconds = seconds.step
    if between is not None:
        usual = roofline(between, report.kernel_flops_per_chip, topology, mesh)
        report.step_seconds += (usual.step - seconds.step) * (1 - 1 / report.exchange_every)
        report.roofline["limit"] = usual.limit  # of most steps
    report.tokens_per_second = tokens / report.step_seconds
    report.mfu = report.model_flops / report.step_seconds / (topology.chip.peak_flops * report.chips)
    for row, counted in zip(report.collectives, counts.collectives, strict=True):
        row["seconds"] = collective_seconds(counted, topology, mesh)


def out_of_memory(message: str) -> tuple[int | None, int | None]:
    """The bytes of temporary memory, and of all, that libtpu says a program needs where it has too few."""
    temporary = re.search(r"required for HLO temporaries \(([\d.]+[KMGT]?)\)", message)
    used = re.search(r"Used ([\d.]+[KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return (_binary(temporary[1]) if temporary else None), (_binary(used[1]) if used else None)


def _binary(text: str) -> int:
    unit = text[-1] if text[-1].isalpha() else ""
    return int(float(text.removesuffix(unit)) * 1024 ** " KMGT".index(unit or " "))


def leaf_bytes(leaf: Any) -> int:
    """Bytes of an abstract array on one of its devices; 0 where it lies in the host's memory."""
    if leaf.sharding is not None and leaf.sharding.memory_kind == "pinned_host":
        return 0
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _bytes(tree: Any) -> int:
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _gradient_bytes(experiment: Experiment, mesh: Mesh) -> int:
    """Bytes of the gradient of what is trained, on one device: from ZeRO stage 2 on it lies in parts, as the
    optimizer's state does."""
    weights, axes, _ = held(experiment)
    layout = rules.tree_shardings(mesh, axes, weights, zero=1 if experiment.mesh.zero == 1 else 3)
    shapes = jax.tree.map(lambda w, s: math.prod(s.shard_shape(w.shape)) * w.dtype.itemsize, weights, layout)
    return sum(jax.tree.leaves(shapes))


def _largest(parts: dict[str, Any]) -> list[dict[str, Any]]:
    leaves = [
        {"leaf": name + "".join(f".{_key(key)}" for key in path), "bytes": leaf_bytes(leaf)}
        for name, tree in parts.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return sorted(leaves, key=lambda row: -row["bytes"])[:LARGEST]


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _suggestion(memory: dict[str, int], topology: Topology) -> str | None:
    """The smallest slice of these chips whose memory all chips' peaks together would fill, if they could be divided."""
    found = smallest(topology.chip, math.ceil(topology.chips * memory["peak"] / memory["hbm"]))
    return str(found) if found else None


def attention_kernel_flops(kernels: list[Kernel], model: ModelConfig, context: int) -> int:
    """Operations of attention kernels on one device, of the scores that mask and window leave.

    A kernel multiplies queries with keys, and scores with values; its backward pass repeats the first and multiplies
    for the gradients of scores, queries, keys and values, which splash does in two kernels ("dkv" and "dq").
    """
    with_kernels = [kind for kind in model.pattern if kind in ("global", "local")] or ["global"]
    seen = [min(model.window, context) if kind == "local" else context for kind in with_kernels]
    pairs = sum(width * (width + 1) / 2 + (context - width) * width for width in seen) / len(seen)  # of a row's tokens
    total = 0.0
    for kernel in kernels:
        products = next((count for word, count in _PRODUCTS.items() if word in kernel.name), 0)
        total += kernel.count * products * 2 * kernel.elements * pairs / context
    return int(total)


def print_report(report: Report) -> None:
    """Prints a report for a person."""
    slices = f"{report.slices} slices of " if report.slices > 1 else ""
    sizes = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1) or "one device"
    print(f"{report.name}, {report.program}, on {slices}{report.topology}: {report.chips} chips, {sizes}")
    memory = report.bytes_per_chip
    print("\nmemory of one chip")
    for name, size in memory.items():
        if size:
            print(f"  {name:<12} {human_bytes(size):>10}")
    if not report.fits:
        print(f"  does NOT fit: {human_bytes(report.missing_bytes)} missing on every chip")
        if report.suggestion:
            print(f"  the smallest slice with so much memory in all is {report.suggestion}")
    for row in report.largest[:3]:
        print(f"  {row['leaf']}: {human_bytes(row['bytes'])}")
    for row in report.largest_temporaries[:5]:
        print(f"  temporary {row['type']}: {human_bytes(row['bytes'])}, {row['operation']}")
    exchanges = f", that one in {report.exchange_every} which exchanges" if report.exchange_every > 1 else ""
    print(f"\none step of one chip{exchanges}")
    print(f"  matmul FLOPs {report.matmul_flops_per_chip:.4g}, kernels {report.kernel_flops_per_chip:.4g}")
    if report.compiler_seconds is not None:
        print(f"  the compiler's estimate of its computations: {report.compiler_seconds:.4g} s")
    if report.roofline is not None:
        print(f"  compute {report.roofline['compute']:.4g} s, memory {report.roofline['memory']:.4g} s (roofline)")
        for axis, seconds in report.roofline["network"].items():
            print(f"  network along {axis}: {seconds:.4g} s")
        print(f"  exposed network {report.roofline['exposed']:.4g} s")
        print("  expected" if report.fits else "  if it fitted:", end=" mean step" if exchanges else " step")
        print(f" {report.step_seconds:.4g} s, limited by {report.roofline['limit']}: ", end="")
        print(f"MFU {report.mfu:.1%}, {report.tokens_per_second:,.0f} tokens/s")
    if report.pipeline_bubble is not None:
        print(f"  pipeline bubble: each stage idles {report.pipeline_bubble:.2%} of the time, as counted above")
    if report.collectives:
        print(f"\n  {'collective':<19} {'along':<18} {'distinct':>8} {'executed':>8} {'bytes':>10}")
    for row in report.collectives:
        along = row["axis"] + (" (dcn)" if row["network"] == "dcn" else "")
        print(f"  {row['kind']:<19} {along:<18} {row['distinct']:>8} {row['count']:>8} {human_bytes(row['bytes']):>10}")
    if report.unknown_loops:
        print(f"  {report.unknown_loops} loops of unknown length are counted as one pass")
    if report.run is not None:
        run = report.run
        cost = "price not known"
        if run["cost"] is not None:
            cost = f"{run['cost']:,.0f} {run['currency']} (list prices of {run['prices_of']})"
        print(
            f"\nthe whole run, {run['steps']:,} steps: {run['days']:.3g} days, {run['chip_hours']:,.0f} chip-hours, "
            f"about {run['kwh_estimate']:,.0f} kWh (estimate), {cost}"
        )
    print(f"\ncompiled in {report.compile_seconds:.1f} s")
