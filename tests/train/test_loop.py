"""The loop with a step that computes nothing: cadence, figures, faults, and what is left when it ends."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from tpu.watchdog import Watchdog
from train import loop
from train.checkpoint.checkpoint import Checkpointer
from train.config import RunConfig
from train.data.pipeline import stream
from train.metrics import ConsoleProgress, MetricsWriter
from train.signals import Stop


class Saves:
    """A Checkpointer that only remembers."""

    def __init__(self, works: bool = True):
        self.works, self.steps, self.losses, self.states = works, [], [], []

    def save(self, step: int, state: Any, meta: dict, metrics: dict | None = None) -> None:
        assert meta == {"data_position": step}
        self.steps.append(step)
        self.states.append(state)
        self.losses.append(metrics["loss"] if metrics else None)

    def poll(self) -> None:
        pass

    def wait(self) -> bool:
        return self.works


def run_loop(
    workdir: Path,
    run: RunConfig,
    *,
    losses: Callable[[int], float] = lambda step: 5.0,
    evaluate: Callable[[int], dict[str, float] | None] = lambda step: None,
    on_step: Callable[[int, Stop], None] = lambda step, stop: None,
    first_step: int = 0,
    batches: Callable[[Any, int], tuple[Any, Any]] | None = None,
    checkpointer: Any = None,
    wait: float = 0.0,
) -> loop.Outcome:
    """Runs it with a state that counts good steps and all steps; loss, evaluation and accidents are told by step."""
    skipped = skipped_in_a_row = 0
    seconds = iter([wait] * 1000)

    def step(state: dict[str, Any], batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
        nonlocal skipped, skipped_in_a_row
        assert batch == state["all"]
        loss = losses(batch + 1)
        bad = not math.isfinite(loss)
        skipped, skipped_in_a_row = skipped + bad, (skipped_in_a_row + 1) * bad
        on_step(batch + 1, stop)
        metrics = {
            "loss": jnp.float32(loss),
            "grad_norm": jnp.float32(loss),
            "learning_rate": jnp.float32(0.1),
            "skipped": jnp.int32(skipped),
            "skipped_in_a_row": jnp.int32(skipped_in_a_row),
        }
        return {"good": state["good"] + (not bad), "all": state["all"] + 1}, metrics

    def counted() -> Iterator[int]:
        for index in itertools.count(first_step):
            time.sleep(next(seconds))
            yield index

    def evaluate_state(state: dict[str, Any]) -> dict[str, float] | None:
        return evaluate(state["all"])

    writer = MetricsWriter(workdir, first_step, run.tensorboard)
    console = ConsoleProgress(run.steps, first_step, run.log_every)
    try:
        with Stop() as stop:
            rates = loop.Rates(tokens_per_step=100, flops_per_token=1000, matmul_flops_per_second=1e9)
            around = loop.Run(
                settings=run,
                checkpointer=checkpointer or Saves(),
                meta=lambda step: {"data_position": step},
                writer=writer,
                console=console,
                stop=stop,
                watchdog=Watchdog(0),
                rates=rates,
            )
            state = {"good": first_step, "all": first_step}
            return loop.train(around, state, first_step, step, batches or stream(counted()), evaluate_state)
    finally:
        console.close()
        writer.close()


def config(**fields: Any) -> RunConfig:
    return RunConfig(**{"steps": 10, "eval_every": 0, "save_every": 0, "log_every": 1, "tensorboard": False} | fields)


def lines(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def step_lines(workdir: Path) -> list[dict[str, Any]]:
    return [line for line in lines(workdir) if "eval" not in line]


# Cadence


@pytest.mark.parametrize(("every", "steps"), [(0, [10]), (3, [3, 6, 9, 10]), (5, [5, 10]), (20, [10])])
@pytest.mark.parametrize("log_every", [1, 4])
def test_saves_and_evaluations_come_when_due_and_at_the_end(tmp_path, every, steps, log_every):
    saves, seen = Saves(), []

    def evaluate(step: int) -> dict[str, float]:
        seen.append(step)
        return {"loss": 1.0 + step, "bits_per_byte": 2.0}

    run = config(eval_every=every, save_every=every, log_every=log_every)
    outcome = run_loop(tmp_path, run, evaluate=evaluate, checkpointer=saves)
    assert seen == saves.steps == steps
    assert saves.losses == [1.0 + step for step in steps]
    assert [state["all"] for state in saves.states] == steps
    assert (outcome.step, outcome.reason, outcome.saved) == (10, "finished", True)
    written = [line for line in lines(tmp_path) if "eval" in line]
    assert written == [{"step": s, "eval": {"loss": 1.0 + s, "bits_per_byte": 2.0}} for s in steps]
    assert [line["step"] for line in step_lines(tmp_path)] == list(range(1, 11))


def test_a_checkpoint_is_ranked_by_its_own_evaluation_only(tmp_path):
    """Evaluated at 2, 4, ..: the save at 3 has no figure of its own."""
    saves = Saves()
    run = config(eval_every=2, save_every=3, steps=12)
    run_loop(tmp_path, run, evaluate=lambda step: {"loss": float(step)}, checkpointer=saves)
    assert dict(zip(saves.steps, saves.losses, strict=True)) == {3: None, 6: 6.0, 9: None, 12: 12.0}


def test_a_resumed_run_goes_on_from_its_step(tmp_path):
    saves = Saves()
    outcome = run_loop(tmp_path, config(save_every=4), first_step=6, checkpointer=saves)
    assert saves.steps == [8, 10]
    assert outcome.step == 10
    assert [line["step"] for line in lines(tmp_path)] == [7, 8, 9, 10]


def test_lines_after_the_resumed_step_are_cut(tmp_path):
    run_loop(tmp_path, config(steps=9), evaluate=lambda step: {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # cut short by a kill
    run_loop(tmp_path, config(steps=8), first_step=5, losses=lambda step: 7.0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (s, 5.0 if s <= 5 else 7.0) for s in range(1, 9)
    ]


# Figures


def test_every_step_has_its_figures(tmp_path):
    run_loop(tmp_path, config(steps=5), wait=0.02)
    found = lines(tmp_path)
    always = {"step", "loss", "grad_norm", "learning_rate", "data_wait_seconds", "host_bytes", "skipped"}
    rates = {"step_seconds", "tokens_per_second", "mfu"}
    assert always <= found[0].keys()
    assert all(always | rates <= line.keys() for line in found[1:])
    for line in found[1:]:
        assert 0.02 <= line["data_wait_seconds"] < line["step_seconds"] * 1.5
        assert line["tokens_per_second"] == pytest.approx(100 / line["step_seconds"])
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * 1000 / 1e9)
        assert line["host_bytes"] > 10**7


def test_the_time_of_an_evaluation_is_no_steps_time(tmp_path):
    def evaluate(step: int) -> None:
        time.sleep(0.3)

    run_loop(tmp_path, config(steps=6, eval_every=2), evaluate=evaluate)
    seconds = [line["step_seconds"] for line in lines(tmp_path)[1:]]
    assert sorted(seconds)[-2] < 0.2  # one may be slow for reasons of the machine


def test_tensorboard_has_the_same_figures(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    def evaluate(step: int) -> dict[str, float]:
        return {"loss": 3.0, "perplexity": 20.0}

    run_loop(tmp_path, config(steps=4, tensorboard=True), evaluate=evaluate, losses=float)
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, at, scalars = path.read_bytes(), 0, []
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)  # then a checksum, the record, a checksum
        event = Event.FromString(content[at + 12 : at + 12 + size])
        scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        at += size + 16
    assert [(step, value) for tag, step, value in scalars if tag == "loss"] == [(s, float(s)) for s in range(1, 5)]
    assert ("eval/loss", 4, 3.0) in scalars
    assert ("eval/perplexity", 4, 20.0) in scalars
    written = {key for line in step_lines(tmp_path) for key in line} - {"step"}
    assert {tag for tag, _, _ in scalars} == written | {"eval/loss", "eval/perplexity"}


def test_without_a_terminal_the_console_gets_a_line_each_log_every(tmp_path, capsys):
    run_loop(tmp_path, config(steps=7, log_every=3, eval_every=6), evaluate=lambda step: {"loss": 1.25})
    out = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in out] == ["step 3/7", "step 6/7", "step 6", "step 7/7", "step 7"]
    for word in ("loss 5.0000", "lr 1.00e-01", "grad 5.00", "tokens/s", "MFU", "ETA 0:00"):
        assert word in out[1]
    assert out[2] == "step 6  held out: loss 1.2500"


def test_a_number_that_json_does_not_have_is_written_by_name(tmp_path):
    run_loop(tmp_path, config(steps=3), losses=lambda step: math.nan if step == 2 else math.inf if step == 3 else 1.0)
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, "nan", "inf"]


# Faults


@pytest.mark.parametrize("log_every", [1, 100])
def test_many_bad_steps_in_a_row_stop_the_run_with_a_checkpoint(tmp_path, capsys, log_every):
    checkpointer = Checkpointer(tmp_path / "checkpoints", RunConfig())
    bad = {2, 6, 7, 8, *range(10, 40)}
    run = config(steps=40, max_bad_steps=4, log_every=log_every)
    outcome = run_loop(tmp_path, run, losses=lambda step: math.nan if step in bad else 1.0, checkpointer=checkpointer)
    assert (outcome.reason, outcome.saved) == ("diverged", True)
    assert 13 <= outcome.step <= 14  # one step may have been under way
    assert checkpointer.restore({"good": 0, "all": 0}) == (
        {"good": 5, "all": outcome.step}, {"data_position": outcome.step}, outcome.step
    )  # fmt: skip
    assert checkpointer.close()
    said = [line for line in capsys.readouterr().out.splitlines() if "not finite, update skipped" in line]
    assert len(said) == 1 + 3 + 4 + (outcome.step - 13)
    assert "step 2: " in said[0]
    assert "(1 in a row, 1 in all)" in said[0]
    assert "(4 in a row, 8 in all)" in said[7]


def test_fewer_bad_steps_do_not(tmp_path):
    outcome = run_loop(tmp_path, config(max_bad_steps=3), losses=lambda step: math.nan if step % 3 else 1.0)
    assert (outcome.reason, outcome.step, outcome.state["good"]) == ("finished", 10, 3)


def test_divergence_is_not_hidden_by_a_signal(tmp_path):
    def on_step(step: int, stop: Stop) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = run_loop(tmp_path, config(max_bad_steps=4), losses=lambda step: math.nan, on_step=on_step)
    assert outcome.reason == "diverged"


def test_a_spike_is_marked_and_said(tmp_path, capsys):
    def loss(step: int) -> float:
        return {10: 9.0, 35: 4.4, 40: 5.5}.get(step, 3.0 + 0.1 * (step % 2))

    run_loop(tmp_path, config(steps=50), losses=loss)
    assert [line["step"] for line in lines(tmp_path) if line.get("spike")] == [40]  # 10 is too early, 35 too small
    said = [line for line in capsys.readouterr().out.splitlines() if "spikes" in line]
    assert len(said) == 1
    assert said[0].startswith("step 40: loss 5.5000 spikes above its mean 3.")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("at", [1, 5])
def test_a_signal_lets_the_step_end_saves_and_leaves(tmp_path, name, at):
    def on_step(step: int, stop: Stop) -> None:
        if step == at:
            os.kill(os.getpid(), getattr(signal, name))

    saves = Saves()
    outcome = run_loop(tmp_path, config(log_every=3), on_step=on_step, checkpointer=saves)
    assert (outcome.reason, outcome.step, outcome.saved, saves.steps) == (name, at, True, [at])
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, at + 1))


def test_a_signal_during_an_evaluation(tmp_path):
    def evaluate(step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    saves = Saves()
    outcome = run_loop(tmp_path, config(eval_every=4), evaluate=evaluate, checkpointer=saves)
    assert (outcome.reason, outcome.step, saves.steps) == ("SIGTERM", 4, [4])
    assert not [line for line in lines(tmp_path) if "eval" in line]


def test_a_signal_after_the_last_step_is_a_finished_run(tmp_path):
    def evaluate(step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    outcome = run_loop(tmp_path, config(), evaluate=evaluate)
    assert (outcome.reason, outcome.step) == ("finished", 10)


def test_what_could_not_be_saved_is_told(tmp_path):
    assert not run_loop(tmp_path, config(), checkpointer=Saves(works=False)).saved


def test_what_the_data_raises_comes_through(tmp_path):
    with pytest.raises(StopIteration):
        run_loop(tmp_path, config(steps=3), batches=stream(iter(())))


def test_a_batch_may_depend_on_the_state_and_change_it(tmp_path):
    """As rows made by the present weights do: the state that a batch comes with is the one stepped and saved."""
    asked, saves = [], Saves()

    def batches(state: dict[str, int], step: int) -> tuple[dict[str, int], int]:
        asked.append((step, state["all"]))
        return state | {"good": state["good"] + 10 * (step % 3 == 0)}, state["all"]

    outcome = run_loop(tmp_path, config(steps=7, save_every=3), batches=batches, checkpointer=saves)
    assert asked == [(step, step) for step in range(7)]
    assert outcome.state == {"good": 7 + 30, "all": 7}
    assert [state["good"] for state in saves.states] == [3 + 10, 6 + 20, 7 + 30]
