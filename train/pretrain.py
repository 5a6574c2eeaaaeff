"""Trains a language model, an encoder or an encoder-decoder, or goes on with one: the same command does both.

    python -m train.pretrain --config=configs/quickstart.py --workdir=runs/a [--config.model.layers=12 ...]

The workdir receives experiment.json, metrics.jsonl, tensorboard/ and checkpoints/. SIGTERM and Ctrl-C save and leave
with status 0; the same command then goes on from there. --dry_run prints what the experiment amounts to and stops.

On several hosts the same command runs on each (see `tpu.distributed`), with the workdir where all of them see it.
Process 0 alone prints and writes figures; any number of hosts, and any mesh, goes on from where another stopped.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from absl import flags

from tpu import distributed, host
from tpu.errors import UserError
from train import entry
from train.config import Experiment

if TYPE_CHECKING:
    from train.adapter.frozen import Frozen

if __name__ == "__main__":
    entry.define_config()
    flags.DEFINE(
        entry.PATH, "workdir", None, "directory of the run; made where it does not exist, resumed where it does"
    )
    flags.DEFINE_boolean("dry_run", False, "print the resolved experiment and its figures, and stop")
    flags.DEFINE(entry.PATH, "json", None, "with --dry_run: also write the figures to this file")


def main() -> int:
    """Runs --config in --workdir."""
    return start(entry.experiment_from_flags())


def start(experiment: Experiment, base: Frozen | None = None) -> int:
    """Shows what the experiment amounts to (--dry_run), or trains it in --workdir; returns the exit status."""
    if entry.FLAGS.dry_run:
        entry.need_writable(json=entry.FLAGS.json)
        from train.budget.summary import print_summary, summarize

        figures = summarize(experiment)
        print_summary(experiment, figures)
        entry.write_json(figures)
        return 0
    entry.need(workdir=entry.FLAGS.workdir)
    if entry.FLAGS.json:
        raise UserError(f"json={entry.FLAGS.json}: only with --dry_run; a run's figures are in its metrics.jsonl")
    from train.signals import Stop
    from train.workdir import Workdir

    host.keep_freed_memory()
    distributed.initialize()
    if not distributed.leads():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        logging.getLogger("train").setLevel(logging.WARNING)
    with distributed.ended_by_errors(), Stop() as stop:
        workdir = Workdir(entry.FLAGS.workdir)
        from train.run import pretrain  # jax with it: a signal from here on saves and leaves

        return pretrain(experiment, workdir, stop, base)


if __name__ == "__main__":
    entry.run(main)
