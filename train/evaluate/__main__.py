"""Held-out loss, perplexity and bits per byte of a checkpoint, beside general-purpose compressors on the same bytes.

    python -m train.evaluate --checkpoint=runs/quickstart [--json=FILE]

The checkpoint is a run's workdir (its newest good step is taken) or one step directory; it brings its experiment and
tokenizer along. The held-out documents are read again from the experiment's sources.
"""

from __future__ import annotations

import pathlib
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from train import entry
from train.evaluate.held_out import compressor_figures, held_out_figures

if TYPE_CHECKING:
    pass

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
    from train.data.corpus import held_out_documents, load_corpus, log_left_out

    data = trained.experiment.data
    if not data.holdout:
        raise entry.UserError("data.holdout=0.0: this experiment keeps no held-out documents to evaluate")
    experiment, name = trained.experiment, trained.experiment.objective.name
    if entry.FLAGS.page and (name != "conversation" or experiment.model.fusion == "none"):
        raise entry.UserError(f"page={entry.FLAGS.page}: only for a model that answers questions about images")
    corpus = load_corpus(data, tokenizer=trained.tokenizer, objective=name, model=experiment.model)
    start = time.monotonic()
    transform = pipeline.row_transform(experiment, corpus, held_out=True)
    batches = pipeline.held_out_batches(corpus, data, data.batch_size, entry.FLAGS.batches, transform=transform)
    memory = trained.empty_memory()
    figures = held_out_figures(trained.evaluate, trained.weights, batches, corpus, objective=name, memory=memory)
    log_left_out(corpus.held_out)
    if name != "next_token":
        print(f"checkpoint {trained.step_dir}, {name}: " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()))
        report: dict[str, Any] = {"eval": figures}
        if name == "conversation" and experiment.model.fusion != "none":
            from train.evaluate import sight_report

            report["answers"], said = sight_report.figures(trained, entry.FLAGS.batches * data.batch_size)
            print("\n".join(sight_report.lines(report["answers"])))
            if entry.FLAGS.page:
                page = sight_report.page(experiment.name, report["answers"], said, 10)
                entry.write_file("page", page)
                print(f"ten of them, with their pictures: {entry.FLAGS.page}")
        if name == "contrastive":
            from train.evaluate import retrieval

            report["retrieval"] = retrieval.figures(trained, entry.FLAGS.batches * data.batch_size)
            for source, of_source in report["retrieval"].items():
                recalls = "  ".join(f"{key} {value:.1%}" for key, value in of_source.items() if key != "count")
                print(f"{source}, {of_source['count']} pairs of different texts: {recalls}")
        entry.write_json(report)
        return 0
    compressed = compressor_figures(held_out_documents(data))
    print(f"checkpoint {trained.step_dir}: {corpus.held_out_bytes:,} held-out bytes, {corpus.held_out_tokens:,} tokens")
    print(f"loss {figures['loss']:.4f} nats per token, perplexity {figures['perplexity']:.2f}")
    print("bits per byte on the same held-out bytes:")
    for name, value in (
        (f"  this model ({entry.FLAGS.batches or 'all'} batches)", figures["bits_per_byte"]),
        ("  xz -9e", compressed["xz"]),
        ("  zlib -9", compressed["zlib"]),
    ):
        print(f"{name:32}{value:.4f}")
    print(f"({time.monotonic() - start:.1f} s)")
    entry.write_json({"eval": figures, "compressors": compressed, "held_out_bytes": corpus.held_out_bytes})
    return 0


if __name__ == "__main__":
    entry.run(main)
