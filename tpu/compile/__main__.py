"""Compiles the real training step for a pod without one: whether it fits, how long it takes, what it sends.

    python -m tpu.compile --config=configs/llama.py:8b --topology=v5p:4x4x4 --config.mesh.fsdp=-1 [--json=FILE]

The TPU compiler comes with libtpu (pip install libtpu) and needs no TPU. --decode compiles the generation of one token
instead. --topology=cpu:8 compiles for that many simulated CPU devices, --platform=gpu for the GPUs of this machine.
The exit status is 0 where the program fits, 1 where it does not.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from absl import flags

from tpu.compile.pod import compile_decode, compile_step, prepare
from tpu.errors import UserError
from train import entry

if TYPE_CHECKING:
    pass

if __name__ == "__main__":
    entry.define_config()
    flags.DEFINE_string("topology", None, "chips of one slice, such as v5p:8x8x8, or simulated devices, such as cpu:8")
    flags.DEFINE_integer("slices", None, "slices, joined by a slow network; default: mesh.slices", lower_bound=1)
    flags.DEFINE_enum("platform", "tpu", ["tpu", "gpu"], "gpu: the GPUs of this machine, instead of --topology")
    flags.DEFINE_boolean("decode", False, "compile the generation of one token instead of the training step")
    flags.DEFINE_integer("rows", 8, "with --decode: rows generated at a time", lower_bound=1)
    flags.DEFINE_integer("context", None, "with --decode: slots of the cache; default: data.context", lower_bound=1)
    flags.DEFINE(entry.PATH, "json", None, "also write the report to this file")


def main() -> int:
    """Compiles --config for --topology; the exit status is 0 where it fits, 1 where it does not."""
    options = entry.FLAGS
    experiment = entry.experiment_from_flags()
    topology = "gpu" if options.platform == "gpu" else options.topology
    entry.need(topology=topology)
    entry.need_writable(json=options.json)
    prepare(topology)
    slices = options.slices or experiment.mesh.slices
    if slices > 1 and topology.startswith(("gpu", "cpu")):
        raise UserError(f"--slices={slices}: only TPUs come in slices; give --slices=1")
    if options.decode:
        context = options.context or experiment.data.context
        report = compile_decode(experiment, topology, slices, options.rows, context)
    else:
        report = compile_step(experiment, topology, slices)
    from tpu.compile.report import print_report

    print_report(report)
    entry.write_json(dataclasses.asdict(report))
    return 0 if report.fits else 1


if __name__ == "__main__":
    entry.run(main)
