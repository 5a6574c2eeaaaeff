"""Rollouts: rows that the present policy writes, which the next steps learn from.

Every so many steps the policy answers prompts, the objective makes rows of the answers (rewards, advantages), and the
rows go into `TrainState.carried`. Each step takes its minibatch from there. Prompts, draws and minibatches follow from
the seed and the step alone, and the rows are in the checkpoint: a run that resumes inside a rollout is, to the bit, the
run that was not interrupted.

Legend: R rows of a rollout, B of a minibatch, P tokens of the longest prompt, N of an answer at most, T of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from model.generate.decode import NO_TOKEN, decoding_weights, make_decoder, row_keys
from model.generate.generate import generate
from model.generate.sampling import sampling_of
from model.weights import Weights
from tpu import distributed
from tpu.errors import UserError
from train.adapter import weights as adapter_weights
from train.config import Experiment
from train.data.batch import Batch
from train.layout import batch_layout
from train.objectives.roles import by_role
from train.objectives.table import objective_of
from train.program import Program
from train.state import Frozen, TrainState

Prompts = Callable[[int], tuple[np.ndarray, np.ndarray]]  # a rollout's number -> tokens [R, P] and lengths [R], int32


class Writing(NamedTuple):
    """How the policy writes."""

    max_tokens: int  # N
    vocab_size: int  # tokens that may be drawn
    end_of_document: int
    temperature: float = 1.0


def on_policy(
    experiment: Experiment, program: Program, frozen: Frozen, prompts: Prompts, updates: int, writing: Writing
) -> Callable[[TrainState, int], tuple[TrainState, Batch]]:
    """The batches of an on-policy objective as `train.loop` asks for them: (state, step) -> (state, minibatch).

    Where `updates` divides the step, the first trained role of the objective answers the prompts of that rollout, and
    `collect(experiment, written, state, frozen)` makes the rows [R, ...] that are carried; `written` is what `rows_of`
    gives, as numpy arrays. R rows are shuffled and dealt in R / B minibatches, as often as the steps of a rollout ask.

    Call the function inside `with jax.set_mesh(mesh)`. Raises UserError where B does not divide R, and in one of
    several processes.
    """
    if distributed.several():
        raise UserError("on-policy objectives run in one process, of any number of devices")
    objective, size, seed = objective_of(experiment), experiment.data.batch_size, experiment.run.seed
    role, policy = next((name, model) for name, model in program.models.items() if model.trained is not None)
    decoder = make_decoder(policy.config, policy.graphdef, writing.vocab_size, writing.end_of_document)
    lies = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.carried)
    rows = len(jax.tree.leaves(program.abstract_state.carried)[0])
    if rows % size:
        raise UserError(f"data.batch_size={size}: does not divide the {rows} rows of a rollout")

    @jax.jit
    def whole(trained: Weights, frozen: Weights) -> Weights:
        return adapter_weights.merged(policy.adapter, frozen, trained)

    def taken(carried: Batch, numbers: jax.Array) -> Batch:
        return jax.tree.map(lambda array: array[numbers], carried)

    taken = jax.jit(taken, out_shardings=batch_layout(experiment, jax.tree.leaves(lies)[0].mesh))

    def batches(state: TrainState, step: int) -> tuple[TrainState, Batch]:
        rollout, update = divmod(step, updates)
        if update == 0:
            weights = by_role(program.models, state.weights)[role]
            weights = decoding_weights(policy.config, whole(weights, frozen[role]) if policy.adapter else weights)
            tokens, lengths = prompts(rollout)
            keys = row_keys([seed] * rows, range(rollout * rows, (rollout + 1) * rows))
            sampling = sampling_of(rows, temperature=writing.temperature)
            drawn = generate(decoder, weights, tokens, lengths, writing.max_tokens, sampling, keys)
            written = rows_of(tokens, lengths, *map(np.asarray, drawn), experiment.data.context)
            collected = objective.collect(experiment, written, state, frozen)
            state = state._replace(carried=jax.device_put(collected, lies))
        return state, taken(state.carried, minibatch(seed, rollout, update, rows, size))

    return batches


def minibatch(seed: int, rollout: int, update: int, rows: int, size: int) -> np.ndarray:
    """The rows, by number, that an update of a rollout learns from, [size]; each comes once before any comes again."""
    again, part = divmod(update, rows // size)
    order = np.random.default_rng((seed, rollout, again)).permutation(rows)
    return order[part * size : (part + 1) * size]


def rows_of(
    tokens: np.ndarray, lengths: np.ndarray, drawn: np.ndarray, log_probabilities: np.ndarray, context: int
) -> dict[str, np.ndarray]:
    """Prompts with their answers as rows [R, T] to learn from: the fields of `text_layout`, of which the drawn tokens
    have weight 1, and the `log_probabilities` with which they were drawn, where they are targets.

    Raises UserError where T is too short for them.
    """
    rows, most = len(tokens), int((lengths + (drawn != NO_TOKEN).sum(1)).max()) - 1
    if most > context:
        raise UserError(f"data.context={context}: prompts with their answers take up to {most} tokens")
    found = {name: np.zeros((rows, context), np.int32) for name in ("tokens", "targets", "segments", "positions")}
    found |= {name: np.zeros((rows, context), np.float32) for name in ("loss_weights", "log_probabilities")}
    for row in range(rows):
        length, answer = int(lengths[row]), drawn[row][drawn[row] != NO_TOKEN]
        text = np.concatenate([tokens[row, :length], answer])
        count, learned = len(text) - 1, slice(length - 1, length - 1 + len(answer))
        found["tokens"][row, :count], found["targets"][row, :count] = text[:-1], text[1:]
        found["segments"][row, :count], found["positions"][row, :count] = 1, np.arange(count)
        found["loss_weights"][row, learned] = 1
        found["log_probabilities"][row, learned] = log_probabilities[row, : len(answer)]
    return found
