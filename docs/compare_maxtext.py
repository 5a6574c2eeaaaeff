"""Prints our compiled step beside MaxText's, row by row: the same model, batch, context, mesh and rematerialisation.

    python docs/compare_maxtext.py [--rows=1,3,3p] [--json=FILE]

Rows 5p and 8p are rows 5 and 8 in the layout that tpu.plan chose for them.

MaxText's figures are those of its v0.2.4 (2026-08-22) compiled the same way, with jax 0.10.2 and libtpu 0.0.51; install
that libtpu to compare. A row takes one to three minutes of two cores and up to 10 GB.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

from absl import app, flags

from train.resolve import resolve

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Row: configuration, topology, overrides, and MaxText's GiB of temporaries, FLOPs, seconds, GiB of all collectives and
# of the reduce-scatters among them.
ROWS: dict[str, tuple[str, str, dict[str, Any], tuple[float, ...]]] = {
    "1": (
        "llama.py:3-8b",
        "v5e:16x16",
        {"mesh.fsdp": 256, "data.batch_size": 512, "data.context": 4096, "model.remat": "full"},
        (6.07, 4.524e14, 3.09, 26 + 15 + 0.1, 0.0),
    ),
    "3": (
        "llama.py:2-70b",
        "v5e:16x16",
        {"mesh.fsdp": 256, "data.batch_size": 512, "data.context": 2048, "model.remat": "full"},
        (10.48, 2.100e15, 14.19, 251 + 133.5, 0.0),
    ),
    "5": (
        "llama.py:2-70b",
        "v5p:4x8x8",
        {"mesh.fsdp": 256, "data.batch_size": 1024, "data.context": 4096, "model.remat": "all_but_mlp"},
        (73.64, 8.003e15, 22.32, 256 + 128.5, 0.0),
    ),
    "8": (
        "gpt3.py:175b",
        "v5p:8x8x8",
        {"mesh.fsdp": 64, "mesh.tensor": 8, "data.batch_size": 2048, "data.context": 2048, "model.remat": "full"},
        (29.56, 1.051e16, 31.92, 3580.5 + 658.7 + 40.7 + 0.4, 40.7),
    ),
    "10": (
        "gpt3.py:175b",
        "v5p:8x8x8",
        {
            "mesh.stage": 8,
            "mesh.fsdp": 64,
            "data.batch_size": 2048,
            "data.context": 2048,
            "model.remat": "full",
            "model.pipeline_microbatches": 32,
        },
        (53.48, 1.279e16, 34.15, 1651.8 + 460.7 + 342.3 + 7.7 + 0.6, 460.7),
    ),
}

# The overrides that tpu.plan printed for these rows.
PLANNED: dict[str, dict[str, Any]] = {
    "5": {"mesh.data": 2, "mesh.fsdp": 64, "mesh.tensor": 2, "model.remat": "projections", "optimizer.accumulation": 4},
    "8": {"mesh.fsdp": 256, "mesh.tensor": 2, "model.remat": "projections", "optimizer.accumulation": 4},
}
for _row, _overrides in PLANNED.items():
    _path, _topology, _given, _theirs = ROWS[_row]
    ROWS[_row + "p"] = (_path, _topology, _given | _overrides, _theirs)

FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_list("rows", list(ROWS), f"rows to compile, of {', '.join(ROWS)}")
    flags.DEFINE_string("json", None, "also write all reports to this file")
    flags.DEFINE_string("compile", None, "a row to compile in this process; used by the script itself")


def experiment_of(row: str) -> Any:
    """The experiment of a row. GPT-3's vocabulary is padded to 50,304, as MaxText's is."""
    from tpu.plan.__main__ import overridden

    path, argument = ROWS[row][0].split(":")
    spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    overrides = dict(ROWS[row][2])
    if path == "gpt3.py":
        overrides |= {"model.vocab_size": 50304, "data.bpe_vocab_size": 50304}
    return overridden(resolve(module.get_config(argument)), overrides)


def compiled(row: str) -> dict[str, Any]:
    """The report of a row, compiled in a process of its own, which gives its memory back."""
    command = [sys.executable, __file__, f"--compile={row}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(_: list[str]) -> None:
    """Prints the table."""
    sys.path.insert(0, str(ROOT))
    if FLAGS.compile:
        from tpu.compile.pod import compile_step, prepare

        prepare(ROWS[FLAGS.compile][1])
        print(json.dumps(dataclasses.asdict(compile_step(experiment_of(FLAGS.compile), ROWS[FLAGS.compile][1]))))
        return
    print(f"libtpu {importlib.metadata.version('libtpu')}, jax {importlib.metadata.version('jax')}\n")
    print(
        "| row | | temporaries, GiB | peak, GiB | matmul FLOPs | estimate, s | collectives, GiB | "
        "reduce-scattered, GiB | step, s | compile, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    reports = {}
    for row in FLAGS.rows:
        report = reports[row] = compiled(row)
        temporary, products, seconds, moved, theirs = ROWS[row][3]
        memory = report["bytes_per_chip"]
        ours = sum(c["bytes"] for c in report["collectives"]) / 2**30
        scattered = sum(c["bytes"] for c in report["collectives"] if c["kind"] == "reduce-scatter") / 2**30
        print(f"| {row} | MaxText | {temporary} | | {products:.4g} | {seconds} | {moved:.1f} | {theirs} | | |")
        print(
            f"| {row} | ours | {memory['temporary'] / 2**30:.2f} | {memory['peak'] / 2**30:.2f} | "
            f"{report['matmul_flops_per_chip']:.4g} | {report['compiler_seconds']:.2f} | {ours:.1f} | "
            f"{scattered:.1f} | {report['step_seconds']:.1f} | {report['compile_seconds']:.0f} |",
            flush=True,
        )
    if FLAGS.json:
        pathlib.Path(FLAGS.json).write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    app.run(main)
