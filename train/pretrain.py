"""Trains a language model, an encoder or an encoder-decoder, or goes on with one: the same command does both.

    python -m train.pretrain --config=configs/quickstart.py --workdir=runs/a [--config.model.layers=12 ...]

The workdir receives experiment.json, metrics.jsonl, tensorboard/ and checkpoints/. SIGTERM and Ctrl-C save and leave
with status 0; the same command then goes on from there. --dry_run prints what the experiment amounts to and stops.

On several hosts the same command runs on each (see `tpu.distributed`), with the workdir where all of them see it.
Process 0 alone prints and writes figures; any number of hosts, and any mesh, goes on from where another stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from tpu import distributed, host
from tpu.errors import UserError
from train import entry
from train.config import Experiment, RunConfig
from train.tree import to_dict

if TYPE_CHECKING:
    from train.adapter.frozen import Base
    from train.data.batch import Batch
    from train.data.corpus import Corpus
    from train.data.text.tokenizer import Tokenizer
    from train.loop import Outcome
    from train.signals import Stop
    from train.workdir import Workdir

if __name__ == "__main__":
    entry.define_config()
    flags.DEFINE_string("workdir", None, "directory of the run; made where it does not exist, resumed where it does")
    flags.DEFINE_boolean("dry_run", False, "print the resolved experiment and its figures, and stop")
    flags.DEFINE_string("json", None, "with --dry_run: also write the figures to this file")


def main() -> int:
    """Runs --config in --workdir."""
    return start(entry.experiment_from_flags())


def start(experiment: Experiment, base: Base | None = None) -> int:
    """Shows what the experiment amounts to (--dry_run), or trains it in --workdir; returns the exit status."""
    if entry.FLAGS.dry_run:
        entry.need_directory(json=entry.FLAGS.json)
        from train.budget.summary import print_summary, summarize

        figures = summarize(experiment)
        print_summary(experiment, figures)
        if entry.FLAGS.json:
            pathlib.Path(entry.FLAGS.json).write_text(json.dumps(figures, indent=1))
        return 0
    entry.need(workdir=entry.FLAGS.workdir)
    from train.signals import Stop
    from train.workdir import Workdir

    host.keep_freed_memory()
    distributed.initialize()
    if not distributed.leads():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        logging.getLogger("train").setLevel(logging.WARNING)
    with distributed.ended_by_errors(), Stop() as stop:
        workdir = Workdir(entry.FLAGS.workdir)
        return pretrain(experiment, workdir, stop, base)


def pretrain(experiment: Experiment, workdir: Workdir, stop: Stop, base: Base | None = None) -> int:
    """Trains until `run.steps`, a signal or divergence; returns the exit status. `base` is what an adapter is trained
    on; its weights stay as they are, and are not saved."""
    import jax

    from tpu.mesh import make_mesh
    from tpu.watchdog import Watchdog
    from train import loop
    from train.budget.flops import flops_per_token, shown
    from train.budget.summary import parameter_counts
    from train.checkpoint import checkpoint
    from train.checkpoint.checkpoint import Checkpointer
    from train.data import pipeline
    from train.data.corpus import log_left_out
    from train.data.text import tokenizer
    from train.evaluate.held_out import held_out_figures
    from train.metrics import ConsoleProgress, MetricsWriter
    from train.starting_weights import taken_over, tokenizer_of
    from train.state import TrainState
    from train.step import abstract_batch, batch_layout, make_program
    from train.workdir import versions

    workdir.check_experiment(experiment)
    backend = host.start_backend()
    data, run = experiment.data, experiment.run
    model = experiment.model.placed(backend, host.fast_dtype(backend))
    placed = dataclasses.replace(experiment, model=model).on(len(jax.devices()))
    mesh = make_mesh(placed.mesh)
    layout = batch_layout(placed, mesh)
    rows = distributed.rows_here(layout.tokens, abstract_batch(placed).tokens.shape)

    def assembled(batches: Iterable[Batch]) -> Iterator[Batch]:
        return (distributed.assemble(batch, layout, rows, data.batch_size) for batch in batches)

    watchdog = Watchdog(run.watchdog_seconds)
    with jax.set_mesh(mesh):
        program = make_program(placed, mesh)
        if base:
            program = program.over(checkpoint.load_weights(base.step_dir, program.abstract_base))
        checkpointer = Checkpointer(workdir.path / "checkpoints", run)
        imported = distributed.decide(lambda: str(checkpoint.imported(checkpointer.directory) or ""))
        restored = None if imported else checkpointer.restore(program.abstract_state)
        if imported:
            step_dir = pathlib.Path(imported)
            print(f"starting from the weights imported to {workdir.path}")
            corpus = _load_corpus(experiment, tokenizer.from_dict(checkpoint.read_meta(step_dir)["tokenizer"]))
            weights = checkpoint.load_weights(step_dir, program.abstract_state.weights)
            state, first_step = program.init(jax.random.key(run.seed), weights), 0
        elif restored:
            state, saved_meta, first_step = restored
            if base:
                base.check(saved_meta, workdir.path)
            print(f"resuming from step {first_step} in {workdir.path}")
            corpus = _load_corpus(experiment, tokenizer.from_dict(saved_meta["tokenizer"]))
        else:
            corpus = _load_corpus(experiment, base.tokenizer if base else tokenizer_of(run.start))
            state, first_step = program.init(jax.random.key(run.seed)), 0
            if run.start:
                weights = taken_over(state.weights, run.start, mesh, model.vision)
                state = program.init(jax.random.key(run.seed), weights)
        special = experiment.objective.special_tokens(data.context)
        tokenizer.check_vocabulary(corpus.tokenizer, model.vocab_size, special)
        for change in workdir.write_experiment(experiment):
            print(f"changed since this workdir was last used: {change}")
        if first_step >= run.steps:
            print(f"already at step {first_step} of run.steps={run.steps}; raise --config.run.steps to go on")
            return 0

        def meta(step: int) -> dict[str, Any]:
            return {
                "experiment": to_dict(experiment),
                "versions": versions(),
                "tokenizer": corpus.tokenizer.to_dict(),
                "data_position": step,
                "corpus": corpus.report,
                **({"base": base.reference()} if base else {}),
            }

        def evaluate(state: TrainState) -> dict[str, float] | None:
            figures: dict[str, float] = {}
            for prefix, weights in (("", state.weights), ("ema_", state.ema)):
                if weights is None:
                    continue
                transform = pipeline.row_transform(experiment, corpus, held_out=True)
                batches = pipeline.held_out_batches(corpus, data, data.batch_size, run.eval_batches, rows, transform)
                name, memory = experiment.objective.name, program.empty_memory()
                found = held_out_figures(
                    program.evaluate, weights, assembled(batches), corpus, stop, watchdog, name, memory
                )
                if found is None:
                    return None
                figures |= {prefix + name: value for name, value in found.items()}
            log_left_out(corpus.held_out)
            return figures

        peak = host.measured_matmul_rate(model.compute_dtype) if distributed.leads() else 0.0
        counts, frozen = parameter_counts(program.abstract_state.weights), program.abstract_base
        on_base = f" on {parameter_counts(frozen)['total']:,} frozen ones" if base else ""
        devices = jax.devices()
        print(
            f"{experiment.name}: {counts['total']:,} parameters ({counts['non_embedding']:,} without embeddings)"
            f"{on_base}, "
            f"{len(devices)} {devices[0].device_kind} in {model.compute_dtype}, "
            f"measured matmul peak {peak / 1e9:,.0f} GFLOP/s each",
            flush=True,
        )
        if experiment.model.attention == "auto":
            kind, why = experiment.model.attention_for(model.platform, model.compute_dtype)
            print(f"attention: {kind}; {why}")
        rates = loop.Rates(
            tokens_per_step=data.batch_size * data.context,
            flops_per_token=flops_per_token(model, program.abstract_state.weights, data.context, frozen, shown(placed)),
            matmul_flops_per_second=peak * len(devices),
        )
        writer = MetricsWriter(workdir.path, first_step, run.tensorboard) if distributed.leads() else None
        console = ConsoleProgress(run.steps, first_step, run.log_every)
        transform = pipeline.row_transform(experiment, corpus)
        batches = pipeline.train_batches(corpus, data, run.seed, first_step, rows, transform)
        with watchdog:  # Of what comes after an error, too: it may wait for another process.
            try:
                outcome = loop.train(
                    state,
                    first_step,
                    program.step,
                    assembled(batches),
                    evaluate if corpus.held_out else lambda state: None,
                    meta,
                    checkpointer,
                    writer,
                    console,
                    stop,
                    watchdog,
                    run,
                    rates,
                )
            finally:
                console.close()
                if writer:
                    writer.close()
                batches.close()
                checkpointer.close()
    log_left_out(corpus.train)
    return _conclude(outcome, workdir, run)


def _load_corpus(experiment: Experiment, saved: Tokenizer | None = None) -> Corpus:
    """The corpus, with process 0's tokenizer. It reads before the others, which may then find its work in the cache.

    Raises UserError where the sources of two hosts differ.
    """
    from train.data.corpus import load_corpus
    from train.data.text import tokenizer

    data, asked = experiment.data, {"objective": experiment.objective.name, "model": experiment.model}
    loaded: list[Corpus] = []

    def load_first() -> dict[str, Any]:
        loaded.append(load_corpus(data, tokenizer=saved, **asked))
        return {"tokenizer": loaded[0].tokenizer.to_dict(), "report": loaded[0].report}

    first = distributed.decide(load_first)
    corpus = loaded[0] if loaded else load_corpus(data, tokenizer=tokenizer.from_dict(first["tokenizer"]), **asked)
    same = json.dumps(corpus.report) == json.dumps(first["report"])
    if unlike := [process for process, found in enumerate(distributed.gather(same)) if not found]:
        raise UserError(f"data.sources: process {unlike[0]} finds other documents there than process 0")
    return corpus


def _conclude(outcome: Outcome, workdir: Workdir, run: RunConfig) -> int:
    """Says how the run ended and what to do next; returns the exit status."""
    if not outcome.saved:
        print(f"error: the state at step {outcome.step} could not be saved; see above", file=sys.stderr)
        return 1
    if outcome.step == 0:
        print(f"{outcome.reason}: before the first step, so there is nothing to save (exit status 0)")
        return 0
    saved = f"step {outcome.step} is saved in {workdir.path / 'checkpoints'}"
    if outcome.reason == "diverged":
        print(
            f"error: {run.max_bad_steps} updates in a row had a loss or gradient that is not finite; stopped. {saved}, "
            "with the weights from before them; lower optimizer.learning_rate or look at the data",
            file=sys.stderr,
        )
        return 1
    if outcome.reason == "finished":
        print(f"finished after {outcome.seconds:.0f} s; {saved}")
    else:
        print(f"{outcome.reason}: {saved}; the same command goes on from there (exit status 0)")
    return 0


if __name__ == "__main__":
    entry.run(main)
