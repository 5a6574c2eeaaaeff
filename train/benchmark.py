"""Speed of an experiment on this machine: training by default, generation with --decode. Data are random tokens.

    python -m train.benchmark --config=configs/gpt2.py:124m --config.data.batch_size=4 --json=speed.json
    python -m train.benchmark --config=configs/gpt2.py:124m --decode --config.model.compute_dtype=float32

Needs neither Grain nor tensorflow-datasets.
"""

from __future__ import annotations

import contextlib
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from tpu import host
from train import entry
from train.config import Experiment
from train.resolve import on

if TYPE_CHECKING:
    import numpy as np

    from train.data.batch import Batch, Field
    from train.program import Program
    from train.state import TrainState

WARM_UP_STEPS = 5  # On CPU the first steps still fault in the memory that later ones reuse.

if __name__ == "__main__":
    entry.define_config()
    flags.DEFINE_integer("steps", 20, "steps to time, after five that warm up", lower_bound=1)
    flags.DEFINE_integer("every", 0, "evaluate and save after so many steps; 0: never", lower_bound=0)
    flags.DEFINE_boolean("decode", False, "time generation instead of training")
    flags.DEFINE_integer("rows", 1, "with --decode: sequences generated at a time", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 16, "with --decode: tokens of the prompt", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 128, "with --decode: tokens to generate", lower_bound=1)
    flags.DEFINE(entry.PATH, "json", None, "also write the figures to this file")


def main() -> int:
    """Measures --config."""
    experiment = entry.experiment_from_flags()
    entry.need_writable(json=entry.FLAGS.json)
    started = time.perf_counter()
    host.keep_freed_memory()
    backend = host.start_backend(compilation_cache=False)
    import jax

    experiment = on(experiment, jax.device_count(), backend, host.fast_dtype(backend))
    figures = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "compute_dtype": experiment.model.compute_dtype,
    }
    if entry.FLAGS.decode:
        figures |= decode_figures(
            experiment, entry.FLAGS.rows, entry.FLAGS.prompt_tokens, entry.FLAGS.new_tokens, entry.FLAGS.steps
        )
    else:
        figures |= training_figures(experiment, entry.FLAGS.steps, started, entry.FLAGS.every)
    rate = figures["matmul_flops_per_second"] = host.measured_matmul_rate(experiment.model.compute_dtype)
    if not entry.FLAGS.decode:
        figures["mfu"] = figures["model_flops_per_second"] / (rate * jax.device_count())
    figures["peak_host_bytes"] = host.peak_host_bytes()
    figures["peak_device_bytes"] = host.device_bytes(peak=True)
    for name, value in figures.items():
        print(f"{name:26}{value:,.4g}" if isinstance(value, float) else f"{name:26}{value}")
    entry.write_json(figures)
    return 0


def drawn_batch(experiment: Experiment) -> Batch:
    """A batch of random tokens and labels, in which nothing is padding; numpy arrays."""
    import numpy as np

    from train.layout import layout_of

    rng = np.random.default_rng(0)

    def draw(field: Field) -> np.ndarray:
        if field.random == "ones":
            return np.ones(field.shape, field.dtype)
        if field.random == "steps":
            return np.broadcast_to(np.arange(field.shape[1], dtype=field.dtype), field.shape)
        return rng.integers(0, field.random, field.shape).astype(field.dtype)

    return {name: draw(field) for name, field in layout_of(experiment).items()}


def training_figures(experiment: Experiment, steps: int, started: float, every: int = 0) -> dict[str, Any]:
    """Seconds to the end of the first step since `started`, and the median over `steps` later ones.

    After every `every` steps (0: never) the batch is evaluated and the state saved, to a folder that is then deleted.
    """
    import jax

    from tpu.mesh import make_mesh
    from train.budget.flops import flops_per_token
    from train.budget.summary import parameter_counts
    from train.program import make_program

    rows, tokens = experiment.data.batch_size, experiment.data.context
    batch = drawn_batch(experiment)
    mesh = make_mesh(experiment.mesh)
    seconds, memory = [], host.FreedMemory()
    with jax.set_mesh(mesh), _other_work(experiment) as other_work:
        program = make_program(experiment, mesh)
        state = program.init(jax.random.key(experiment.run.seed), {})
        for number in range(1, steps + WARM_UP_STEPS + 1):
            before = time.perf_counter()
            state, metrics = program.step(state, batch, {})
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - before)
            if number == 1:
                first = time.perf_counter() - started
            if other := every > 0 and number % every == 0:
                other_work(number, program, state, batch)
            memory.after_step(other)
    weights = program.abstract_state.weights
    flops = flops_per_token(experiment)
    step_seconds = statistics.median(seconds[WARM_UP_STEPS:])
    return {
        "parameters": parameter_counts(weights)["total"],
        "loss": float(metrics["loss"]),
        "first_step_seconds": first,
        "step_seconds": step_seconds,
        "tokens_per_second": rows * tokens / step_seconds,
        "flops_per_token": flops,
        "model_flops_per_second": rows * tokens * flops / step_seconds,
    }


@contextlib.contextmanager
def _other_work(experiment: Experiment) -> Iterator[Callable[[int, Program, TrainState, Batch], None]]:
    """What a run does between steps: evaluates, and saves to a folder that is deleted at the end."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as at_the_end:
        saving = []

        def evaluate_and_save(number: int, program: Program, state: TrainState, batch: Batch) -> None:
            if not saving:
                from train.checkpoint.checkpoint import Checkpointer  # Its import is no part of the first step.

                saving.append(Checkpointer(pathlib.Path(folder), experiment.run))
                at_the_end.callback(saving[0].close)
            float(next(iter(program.evaluate(state.weights, batch, {}, state.carried).sums.values())))
            saving[0].save(number, state, {})

        yield evaluate_and_save


def decode_figures(
    experiment: Experiment, rows: int, prompt_length: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Greedy generation by random weights: tokens per second of all rows together, the prompt's pass included.

    Medians over `repeats` generations, after one that compiles.
    """
    import jax
    import numpy as np

    from model import kinds
    from model.generate.decode import decoding_weights, make_decoder, pad_prompts
    from model.generate.generate import generate

    config = experiment.model
    config.check_context(prompt_length + new_tokens, "prompt_tokens + new_tokens")
    graphdef, _, _ = kinds.build(config)
    weights = jax.jit(lambda key: kinds.init(config, key))(jax.random.key(experiment.run.seed))
    weights = decoding_weights(config, weights)
    # No token ends a row: the end of the document is a number that is never drawn.
    decoder = make_decoder(config, graphdef, config.vocab_size, end_of_document=config.vocab_size)
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, (rows, prompt_length))
    tokens, lengths = pad_prompts(drawn.tolist(), None)
    seconds = []
    for _ in range(repeats + 1):
        before = time.perf_counter()
        jax.block_until_ready(generate(decoder, weights, tokens, lengths, new_tokens))
        seconds.append(time.perf_counter() - before)
    return {
        "rows": rows,
        "prompt_tokens": prompt_length,
        "new_tokens": new_tokens,
        "first_call_seconds": seconds[0],
        "decode_tokens_per_second": rows * new_tokens / statistics.median(seconds[1:]),
    }


if __name__ == "__main__":
    entry.run(main)
