"""Held-out loss, perplexity and bits per byte of a checkpoint, beside general-purpose compressors on the same bytes.

    python -m train.evaluate --checkpoint=runs/quickstart [--json=FILE]

The checkpoint is a run's workdir (its newest good step is taken) or one step directory; it brings its experiment and
tokenizer along. The held-out documents are read again from the experiment's sources.
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

from absl import flags

from train import entry

if __name__ == "__main__":
    flags.DEFINE(entry.PATH, "checkpoint", None, "workdir of a run, or one of its step directories")
    flags.DEFINE(entry.PATH, "base", None, "of an adapter's checkpoint: where its base lies now; default: where it was")
    flags.DEFINE_integer("batches", 0, "evaluate only so many batches; 0: all held-out documents", lower_bound=0)
    flags.DEFINE_boolean("ema", False, "evaluate the moving average of the weights")
    flags.DEFINE(entry.PATH, "json", None, "also write the figures to this file")
    flags.DEFINE(
        entry.PATH, "page", None, "of a model that sees: also write its answers to ten questions to this HTML file"
    )


def main() -> int:
    """Evaluates --checkpoint."""
    entry.need(checkpoint=entry.FLAGS.checkpoint)
    entry.need_writable(page=entry.FLAGS.page, json=entry.FLAGS.json)
    from train.restore import open_checkpoint

    field = "ema" if entry.FLAGS.ema else "weights"
    trained = open_checkpoint(pathlib.Path(entry.FLAGS.checkpoint), field, entry.FLAGS.base)
    from train.data import pipeline
    from train.data.corpus import log_left_out
    from train.evaluate.held_out import held_out_means
    from train.objectives.table import objective_of

    experiment, batches = trained.experiment, entry.FLAGS.batches
    data, objective = experiment.data, objective_of(experiment)
    if not data.holdout:
        raise entry.UserError("data.holdout=0.0: this experiment keeps no held-out documents to evaluate")
    layout = objective.layout(experiment)
    if entry.FLAGS.page and "given" not in layout:
        raise entry.UserError(f"page={entry.FLAGS.page}: only for a model that answers questions about images")
    corpus, start = objective.corpus(experiment, trained.tokenizer), time.monotonic()
    rows = pipeline.held_out_batches(corpus, data, layout, data.batch_size, batches)
    means = held_out_means(trained.evaluate, trained.weights, rows, trained.frozen(), trained.first_carried())
    figures = objective.figures(means, corpus)
    log_left_out(corpus.held_out)
    told = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
    print(f"checkpoint {trained.step_dir}, {experiment.objective.name}: {told}")
    figures_of_all: dict[str, Any] = {"eval": figures}
    if objective.report:
        limit = batches * data.batch_size
        report = objective.report(experiment, trained.weights, trained.tokenizer, corpus, figures, limit)
        print("\n".join(report.lines))
        figures_of_all |= report.figures
        if entry.FLAGS.page:
            entry.write_file("page", report.page())
            print(f"ten of them, with their pictures: {entry.FLAGS.page}")
    print(f"({time.monotonic() - start:.1f} s)")
    entry.write_json(figures_of_all)
    return 0


if __name__ == "__main__":
    entry.run(main)
