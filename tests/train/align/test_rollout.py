"""On-policy learning: rows that the policy writes lie in the state, so that a run resumes inside a rollout to the bit;
and a policy that is paid for a token learns to write it.

Legend: R rows of a rollout, B of a minibatch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.generate.decode import NO_TOKEN
from model.place import Place
from tpu.errors import UserError
from tpu.mesh import make_mesh
from tpu.watchdog import Watchdog
from train import loop
from train.align.rollout import Writing, minibatch, on_policy, rows_of
from train.checkpoint.checkpoint import Checkpointer
from train.config import AdapterConfig, DataConfig, Experiment, MeshConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from train.data.batch import Batch, Field, Layout, by_token, text_layout
from train.metrics import ConsoleProgress
from train.objectives import next_token
from train.objectives.bound import Bound
from train.objectives.objective import Objective, Role, Sums
from train.objectives.table import OBJECTIVES
from train.program import make_program
from train.resolve import resolve
from train.signals import Stop

B, R, T, VOCAB, END, PAID = 8, 16, 16, 20, 0, 3
UPDATES = 4  # two passes over a rollout
WRITING = Writing(max_tokens=6, vocab_size=VOCAB, end_of_document=END)


# PPO's clipped objective (arXiv:1707.06347, equation 7) without a value function: paid by the token


def layout(experiment: Experiment, rows: int = B) -> Layout:
    found = text_layout(rows, experiment.data.context, experiment.model.vocab_size)
    more = {"log_probabilities": by_token(rows, experiment.data.context, "float32")}
    return found | more | {"advantages": Field((rows,), "float32", ("batch",))}


def sums(
    bound: Mapping[str, Bound], batch: Batch, experiment: Experiment, keys: jax.Array | None, carried: Any
) -> Sums:
    policy = bound["policy"]
    hidden, _ = policy(batch["tokens"], Place(batch["segments"], batch["positions"]), key=keys)
    log = jax.nn.log_softmax(policy.head(hidden))
    each = jnp.take_along_axis(log, batch["targets"][..., None], -1)[..., 0]  # [B, T]
    ratio, gain = jnp.exp(each - batch["log_probabilities"]), batch["advantages"][:, None]
    loss = -jnp.minimum(ratio * gain, jnp.clip(ratio, 0.8, 1.2) * gain) * batch["loss_weights"]
    return Sums({"policy": loss.sum()}, {"ratio": (ratio * batch["loss_weights"]).sum()})


def pay(written: Batch) -> np.ndarray:
    """[R], for each of the rows the paid tokens in its answer."""
    return ((written["targets"] == PAID) * written["loss_weights"]).sum(1)


def collect(experiment: Experiment, written: Batch, state: Any, frozen: Any) -> Batch:
    reward = pay(written)
    return written | {"advantages": ((reward - reward.mean()) / (reward.std() + 1e-6)).astype(np.float32)}


OBJECTIVE = Objective(
    roles=lambda experiment: {"policy": Role()},
    check=lambda experiment: None,
    corpus=next_token.corpus,
    layout=layout,
    weights=lambda batch: dict.fromkeys(("policy", "ratio"), batch["loss_weights"].sum()),
    sums=sums,
    figures=lambda means, corpus: {"loss": means["policy"]},
    carried=lambda experiment: {n: jnp.zeros(f.shape, f.dtype) for n, f in layout(experiment, R).items()},
    collect=collect,
)


@pytest.fixture(autouse=True)
def toy(monkeypatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "paid", OBJECTIVE)


def experiment_of(mesh: dict[str, int], adapter: str = "none", accumulation: int = 1, steps: int = 6) -> Experiment:
    found = resolve(
        Experiment(
            model=ModelConfig(vocab_size=VOCAB, layers=1, embed_dim=16, heads=4, kv_heads=2, residual_dropout=0.1),
            data=DataConfig(tokenizer="bytes", bpe_vocab_size=1, context=T, batch_size=B),
            objective=ObjectiveConfig(name="paid"),
            optimizer=OptimizerConfig(
                learning_rate=0.02, schedule="constant", warmup_steps=0, accumulation=accumulation, weight_decay=0.0
            ),
            run=RunConfig(steps=steps, eval_every=0, save_every=0, log_every=100, tensorboard=False),
            mesh=MeshConfig(**mesh),
            adapter=AdapterConfig("lora", ("attention", "mlp"), rank=2) if adapter == "lora" else AdapterConfig(),
        )
    )
    found.model = found.model.placed("cpu", "float32")
    return found


class Prompts:
    """Beginnings of two or three tokens; remembers of which rollouts it was asked, and what was paid for the last."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, rollout: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(rollout)
        rng = np.random.default_rng(rollout)
        tokens = rng.integers(1, VOCAB, (R, 3)).astype(np.int32)
        tokens[:, 0] = END
        return tokens, rng.integers(2, 4, R).astype(np.int32)


def run(path: Path, experiment: Experiment, prompts: Prompts) -> tuple[dict[str, np.ndarray], list[float]]:
    """Trains in `path` from where it is to `run.steps`, as train.run does: every leaf of the last state, and losses."""
    mesh, losses = make_mesh(experiment.mesh, jax.devices()[: math.prod(experiment.mesh.sizes().values())]), []
    with jax.set_mesh(mesh), Stop() as stop:
        program = make_program(experiment, mesh)
        rng = np.random.default_rng(0)
        frozen = jax.tree.map(
            lambda leaf: jax.device_put(0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding),
            program.abstract_frozen,
        )
        checkpointer = Checkpointer(path / "checkpoints", experiment.run)
        restored = checkpointer.restore(program.abstract_state)
        state, _, first_step = restored or (program.init(jax.random.key(0), frozen), {}, 0)

        def step(state: Any, batch: Batch) -> Any:
            state, metrics = program.step(state, batch, frozen)
            losses.append(float(metrics["loss"]))
            return state, metrics

        around = loop.Run(
            settings=experiment.run,
            checkpointer=checkpointer,
            meta=lambda step: {"data_position": step},
            writer=None,
            console=ConsoleProgress(experiment.run.steps, first_step, 100),
            stop=stop,
            watchdog=Watchdog(0),
            rates=loop.Rates(1, 1, 0.0),
        )
        batches = on_policy(experiment, program, frozen, prompts, UPDATES, WRITING)
        outcome = loop.train(around, state, first_step, step, batches, lambda state: None)
        checkpointer.close()
        state = outcome.state._replace(key=jax.random.key_data(outcome.state.key))
    return {jax.tree_util.keystr(at): np.asarray(leaf) for at, leaf in jax.tree.leaves_with_path(state)}, losses


CASES = [("one", "none", 1), ("one", "lora", 2), ("several", "none", 2), ("several", "lora", 1)]
SLOW = [("one", "none", 2), ("one", "lora", 1), ("several", "none", 1), ("several", "lora", 2)]


@pytest.mark.parametrize(
    ("devices", "adapter", "accumulation"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_run_resumes_inside_a_rollout_to_the_bit(tmp_path, devices, adapter, accumulation):
    mesh = {} if devices == "one" else {"fsdp": 4, "tensor": 2}
    asked = [Prompts() for _ in range(3)]
    whole, losses = run(tmp_path / "whole", experiment_of(mesh, adapter, accumulation), asked[0])
    begun, first = run(tmp_path / "parts", experiment_of(mesh, adapter, accumulation, steps=3), asked[1])
    parts, second = run(tmp_path / "parts", experiment_of(mesh, adapter, accumulation), asked[2])
    assert [prompts.asked for prompts in asked] == [[0, 1], [0], [1]]
    assert first + second == losses
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name].tobytes() != parts[name].tobytes()] == []
    moved = [name for name in begun if name.startswith(".weights") and begun[name].tobytes() != whole[name].tobytes()]
    assert moved
    assert begun[".carried['tokens']"].tobytes() != whole[".carried['tokens']"].tobytes()
    assert whole[".carried['loss_weights']"].any()


def test_what_is_paid_for_is_learned(tmp_path):
    """From about a twentieth of the tokens to most of them."""
    prompts, paid = Prompts(), []

    def watched(experiment: Experiment, written: Batch, state: Any, frozen: Any) -> Batch:
        paid.append(float(pay(written).sum() / written["loss_weights"].sum()))
        return collect(experiment, written, state, frozen)

    OBJECTIVES["paid"] = OBJECTIVE._replace(collect=watched)
    run(tmp_path, experiment_of({}, steps=UPDATES * 25), prompts)
    assert prompts.asked == list(range(25))
    assert paid[0] < 0.3
    assert paid[-1] > 0.6


# What a rollout is made of


def test_rows_hold_prompt_and_answer_and_learn_the_answer():
    drawn = np.array([[5, 6, END], [7, NO_TOKEN, NO_TOKEN]], np.int32)
    prompts, lengths = np.array([[END, 1, 2], [END, 4, 0]], np.int32), np.array([3, 2], np.int32)
    chances = -np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    rows = rows_of(prompts, lengths, drawn, chances, 6)
    assert rows["tokens"].tolist() == [[END, 1, 2, 5, 6, 0], [END, 4, 0, 0, 0, 0]]
    assert rows["targets"].tolist() == [[1, 2, 5, 6, END, 0], [4, 7, 0, 0, 0, 0]]
    assert rows["loss_weights"].tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert rows["log_probabilities"].tolist() == [[0, 0, -1, -2, -3, 0], [0, -4, 0, 0, 0, 0]]
    assert rows["segments"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    with pytest.raises(UserError, match=r"data.context=4: prompts with their answers take up to 5 tokens"):
        rows_of(prompts, lengths, drawn, chances, 4)


def test_every_row_comes_once_before_any_comes_again():
    passes = [[minibatch(7, 2, update, R, B) for update in pair] for pair in ((0, 1), (2, 3))]
    assert [sorted(np.concatenate(one)) for one in passes] == [list(range(R))] * 2
    assert not np.array_equal(passes[0], passes[1])
    assert not np.array_equal(minibatch(7, 2, 0, R, B), minibatch(7, 3, 0, R, B))


def test_the_first_step_of_a_rollout_finds_the_policy_that_wrote_it(one_device):
    """Of the very tokens, through the cache and merged, the probabilities are the step's: the ratio is 1."""
    experiment = experiment_of({}, "lora")
    experiment.model.residual_dropout = 0.0
    with jax.set_mesh(one_device):
        program = make_program(experiment, one_device)
        frozen = jax.tree.map(
            lambda leaf: 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), program.abstract_frozen
        )
        state = program.init(jax.random.key(0), frozen)
        state = state._replace(weights=jax.tree.map(lambda w: w + 0.1, state.weights))
        state, batch = on_policy(experiment, program, frozen, Prompts(), UPDATES, WRITING)(state, 0)
        _, metrics = program.step(state, batch, frozen)
    assert float(metrics["ratio"]) == pytest.approx(1.0, abs=1e-5)


def test_minibatches_that_do_not_divide_a_rollout_are_refused(one_device):
    experiment = experiment_of({})
    with jax.set_mesh(one_device):
        program = make_program(experiment, one_device)
        experiment.data.batch_size = 5
        with pytest.raises(UserError, match=r"data.batch_size=5: does not divide the 16 rows of a rollout"):
            on_policy(experiment, program, {}, Prompts(), UPDATES, WRITING)
