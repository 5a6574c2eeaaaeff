"""A run from its beginning to its end: weights and corpus to start from, what stands around the loop, and what is said
of how it ended."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from tpu import distributed, host
from tpu.errors import UserError
from tpu.mesh import make_mesh
from tpu.watchdog import Watchdog
from train import loop
from train.adapter.frozen import Frozen, adapted_role, frozen_roles, load_frozen, references
from train.budget.flops import flops_per_token
from train.budget.summary import held, parameter_counts
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import Checkpointer
from train.config import Experiment, RunConfig
from train.data import pipeline
from train.data.batch import Batch
from train.data.corpus import Corpus, log_left_out
from train.data.text import tokenizer
from train.data.text.tokenizer import Tokenizer
from train.evaluate.held_out import held_out_means
from train.layout import batch_layout, layout_of
from train.metrics import ConsoleProgress, MetricsWriter
from train.objectives.objective import Objective
from train.objectives.table import objective_of
from train.program import Program, make_program
from train.resolve import on
from train.signals import Stop
from train.starting_weights import taken_over, tokenizer_of
from train.state import Frozen as FrozenWeights
from train.state import Metrics, TrainState
from train.tree import to_dict
from train.workdir import Workdir, versions


def pretrain(experiment: Experiment, workdir: Workdir, stop: Stop, base: Frozen | None = None) -> int:
    """Trains until `run.steps`, a signal or divergence; returns the exit status. `base` is what an adapter is trained
    on; its weights stay as they are, and are not saved."""
    workdir.check_experiment(experiment)
    backend = host.start_backend()
    data, settings = experiment.data, experiment.run
    placed = on(experiment, len(jax.devices()), backend, host.fast_dtype(backend))
    model = placed.model
    mesh = make_mesh(placed.mesh)
    layout, fields, objective = batch_layout(placed, mesh), layout_of(placed), objective_of(placed)
    first = next(iter(fields))
    rows = distributed.rows_here(layout[first], fields[first].shape)

    def assembled(batches: Iterable[Batch]) -> Iterator[Batch]:
        return (distributed.assemble(batch, layout, rows, data.batch_size) for batch in batches)

    watchdog, flops = Watchdog(settings.watchdog_seconds), flops_per_token(placed)
    with jax.set_mesh(mesh):
        program, opened = make_program(placed, mesh), frozen_roles(experiment, base)
        frozen = load_frozen(opened, program.abstract_frozen)
        checkpointer = Checkpointer(workdir.path / "checkpoints", settings)
        state, first_step, corpus = begin(experiment, program, workdir.path, checkpointer, mesh, opened, frozen)
        tokenizer.check_vocabulary(corpus.tokenizer, model.vocab_size, objective.special_tokens(experiment))
        for change in workdir.write_experiment(experiment):
            print(f"changed since this workdir was last used: {change}")
        if first_step >= settings.steps:
            print(f"already at step {first_step} of run.steps={settings.steps}; raise --config.run.steps to go on")
            return 0
        if experiment.model.attention == "auto":
            kind, why = experiment.model.attention_for(model.platform, model.compute_dtype)
            print(f"attention: {kind}; {why}")

        def held_out() -> Iterator[Batch]:
            limit = settings.eval_batches
            return assembled(pipeline.held_out_batches(corpus, data, fields, data.batch_size, limit, rows))

        run = loop.Run(
            settings=settings,
            checkpointer=checkpointer,
            meta=_meta(experiment, corpus, opened),
            rates=_rates(placed, program, flops),
            writer=MetricsWriter(workdir.path, first_step, settings.tensorboard) if distributed.leads() else None,
            console=ConsoleProgress(settings.steps, first_step, settings.log_every),
            stop=stop,
            watchdog=watchdog,
        )
        evaluate = _evaluation(program, frozen, held_out, corpus, run, objective)
        batches = pipeline.train_batches(corpus, data, settings.seed, first_step, rows)

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            return program.step(state, batch, frozen)

        with watchdog:  # Of what comes after an error, too: it may wait for another process.
            try:
                batch = pipeline.stream(assembled(batches))
                outcome = loop.train(run, state, first_step, step, batch, evaluate)
            finally:
                run.console.close()
                if run.writer:
                    run.writer.close()
                batches.close()
                checkpointer.close()
    log_left_out(corpus.train)
    return _conclude(outcome, workdir, settings)


def begin(
    experiment: Experiment,
    program: Program,
    path: pathlib.Path,
    checkpointer: Checkpointer,
    mesh: Mesh,
    opened: Mapping[str, Frozen],
    frozen: FrozenWeights,
) -> tuple[TrainState, int, Corpus]:
    """The state that a run in the workdir `path` begins with, the steps it has taken, and the corpus.

    The state is one of three: of weights imported to the workdir, its newest good checkpoint, or fresh, with the
    weights of `run.start` where there are any. The tokenizer is that of the weights, where they have one.
    """
    key = jax.random.key(experiment.run.seed)
    imported = distributed.decide(lambda: str(checkpoint.imported(checkpointer.directory) or ""))
    if imported:
        step_dir = pathlib.Path(imported)
        print(f"starting from the weights imported to {path}")
        corpus = _load_corpus(experiment, tokenizer.from_dict(checkpoint.read_meta(step_dir)["tokenizer"]))
        weights = checkpoint.load_weights(step_dir, program.abstract_state.weights)
        return program.init(key, frozen, weights), 0, corpus
    if restored := checkpointer.restore(program.abstract_state):
        state, saved_meta, first_step = restored
        for name, wanted in references(saved_meta, experiment).items():
            opened[name].check(wanted, path)
        print(f"resuming from step {first_step} in {path}")
        corpus = _load_corpus(experiment, tokenizer.from_dict(saved_meta["tokenizer"]))
        for line in other_data(saved_meta, experiment, corpus):
            print(line)
        return state, first_step, corpus
    start, base = experiment.run.start, opened.get(adapted_role(experiment))
    corpus = _load_corpus(experiment, base.tokenizer if base else tokenizer_of(start))
    state = program.init(key, frozen)
    if start:
        state = program.init(key, frozen, taken_over(state.weights, start, mesh, experiment.model.vision))
    return state, 0, corpus


def other_data(saved: dict[str, Any], experiment: Experiment, corpus: Corpus) -> Iterator[str]:
    """What a run reads otherwise than the checkpoint whose meta is `saved` did, beside what the experiment says."""
    before = {source["source"]: source["digest"] for source in saved.get("corpus", {}).get("sources", ())}
    for source in corpus.report["sources"]:
        if source["digest"] != before.get(source["source"], source["digest"]):
            yield (
                f"data.sources: {source['source']} has changed since it was trained on (its documents, or when they "
                "were written): what follows is read from it as it is now"
            )
    if saved["experiment"]["data"]["batch_size"] != experiment.data.batch_size:
        yield (
            "data.batch_size has changed: the position in the data is counted in batches, so that some rows are read "
            "again or passed over"
        )


def _load_corpus(experiment: Experiment, saved: Tokenizer | None = None) -> Corpus:
    """The corpus, with process 0's tokenizer. It reads before the others, which may then find its work in the cache.

    Raises UserError where the sources of two hosts differ.
    """
    load_corpus = objective_of(experiment).corpus
    loaded: list[Corpus] = []

    def load_first() -> dict[str, Any]:
        loaded.append(load_corpus(experiment, saved))
        return {"tokenizer": loaded[0].tokenizer.to_dict(), "report": loaded[0].report}

    first = distributed.decide(load_first)
    corpus = loaded[0] if loaded else load_corpus(experiment, tokenizer.from_dict(first["tokenizer"]))
    same = json.dumps(corpus.report) == json.dumps(first["report"])
    if unlike := [process for process, found in enumerate(distributed.gather(same)) if not found]:
        raise UserError(f"data.sources: process {unlike[0]} finds other documents there than process 0")
    return corpus


def _meta(experiment: Experiment, corpus: Corpus, opened: Mapping[str, Frozen]) -> Callable[[int], dict[str, Any]]:
    """What a checkpoint holds beside the state, by its step."""
    return lambda step: {
        "experiment": to_dict(experiment),
        "versions": versions(),
        "tokenizer": corpus.tokenizer.to_dict(),
        "data_position": step,
        "corpus": corpus.report,
        **({"frozen": {name: found.reference() for name, found in opened.items()}} if opened else {}),
    }


def _evaluation(
    program: Program,
    frozen: FrozenWeights,
    batches: Callable[[], Iterable[Batch]],
    corpus: Corpus,
    run: loop.Run,
    objective: Objective,
) -> Callable[[TrainState], dict[str, float] | None]:
    """The held-out figures of a state, and, by names with "ema_" before them, of its moving average; None where a
    signal cut them short, and of a corpus that holds nothing out."""

    def evaluate(state: TrainState) -> dict[str, float] | None:
        if not corpus.held_out:
            return None
        figures: dict[str, float] = {}
        for prefix, weights in (("", state.weights), ("ema_", state.ema)):
            if weights is None:
                continue
            means = held_out_means(
                program.evaluate, weights, batches(), frozen, program.first_carried(), run.stop, run.watchdog
            )
            if means is None:
                return None
            figures |= {prefix + name: value for name, value in objective.figures(means, corpus).items()}
        log_left_out(corpus.held_out)
        return figures

    return evaluate


def _rates(experiment: Experiment, program: Program, flops: int) -> loop.Rates:
    """What a step costs, `flops` a token, and the peak that the devices reach, which is measured; says it, too."""
    model, data = experiment.model, experiment.data
    peak = host.measured_matmul_rate(model.compute_dtype) if distributed.leads() else 0.0
    counts, stays = parameter_counts(program.abstract_state.weights), parameter_counts(held(experiment).frozen)["total"]
    beside = f" on {stays:,} frozen ones" if program.abstract_frozen else ""
    if stays and not beside:
        beside = f", {stays:,} of them frozen"
    devices = jax.devices()
    print(
        f"{experiment.name}: {counts['total']:,} parameters ({counts['non_embedding']:,} without embeddings)"
        f"{beside}, {len(devices)} {devices[0].device_kind} in {model.compute_dtype}, "
        f"measured matmul peak {peak / 1e9:,.0f} GFLOP/s each",
        flush=True,
    )
    return loop.Rates(
        tokens_per_step=data.batch_size * data.context,
        flops_per_token=flops,
        matmul_flops_per_second=peak * len(devices),
    )


def _conclude(outcome: loop.Outcome, workdir: Workdir, run: RunConfig) -> int:
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
