"""The loop that every training method shares: pull a batch, take a step, report, evaluate, save, stop.

It knows nothing of models: what a step is, how to evaluate and what a checkpoint's meta holds come from the caller.
The figures of a step are read after the next one has been dispatched, so that reading them never leaves a device idle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from tpu import distributed, host
from tpu.watchdog import Watchdog
from train.checkpoint.checkpoint import Checkpointer
from train.config import RunConfig
from train.metrics import ConsoleProgress, MetricsWriter
from train.signals import Stop
from train.stragglers import HostTime


@dataclasses.dataclass
class Outcome:
    """How a run of the loop ended."""

    state: Any
    step: int
    reason: str  # "finished", "SIGTERM", "SIGINT" or "diverged"
    saved: bool  # whether the state at `step` is in a complete checkpoint
    seconds: float


@dataclasses.dataclass
class Rates:
    """What turns a step's wall time into rates."""

    tokens_per_step: int
    flops_per_token: int
    matmul_flops_per_second: float  # measured peak of all devices together; 0 where it was not measured


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything around the steps of a run: what ends it, and where its figures and states go."""

    settings: RunConfig
    checkpointer: Checkpointer
    meta: Callable[[int], dict[str, Any]]  # what a checkpoint after so many steps holds beside the state
    writer: MetricsWriter | None  # None in a process that writes no figures
    console: ConsoleProgress
    stop: Stop
    watchdog: Watchdog
    rates: Rates


def train(
    run: Run,
    state: Any,
    first_step: int,
    step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]],
    batches: Callable[[Any, int], tuple[Any, Any]],
    evaluate: Callable[[Any], dict[str, float] | None],
) -> Outcome:
    """Takes steps from `first_step` to `run.steps`. Of several processes all come to the same end at the same step.

    Args:
      state: a pytree; donated to `step`.
      step: (state, batch) -> (state, metrics); the metrics are scalars, among them `loss`, `skipped` and
        `skipped_in_a_row`.
      batches: (state, steps taken) -> (state, batch). The state comes back as it is, unless its rows are made by the
        present weights: these are then part of it, and so of its checkpoints.
      evaluate: held-out figures of a state, among them `loss`; None where a signal cut it short.
    """
    settings, console = run.settings, run.console
    host_time, memory = HostTime(), host.FreedMemory()
    watch = _Watch(run, host_time)
    started = time.monotonic()
    pending: tuple[int, dict[str, jax.Array], float] | None = None
    last_saved, now = first_step, first_step
    reason = "finished"
    while now < settings.steps and not run.stop.asked():
        before = time.perf_counter()
        state, batch = batches(state, now)
        wait = time.perf_counter() - before
        with host_time.elsewhere():
            state, metrics = step(state, batch)
        now += 1
        host_time.step()
        run.watchdog.beat()
        if pending is not None and watch.report(*pending) >= settings.max_bad_steps:
            reason = "diverged"
        pending = (now, metrics, wait)
        save, ask = (_due(now, every, settings.steps) for every in (settings.save_every, settings.eval_every))
        if save or ask or now % settings.log_every == 0:
            if watch.report(*pending) >= settings.max_bad_steps:
                reason = "diverged"
            pending = None
        if reason == "diverged":
            break
        if distributed.several() and now % settings.log_every == 0 and (found := host_time.straggler()):
            console.say(f"step {now}: {found}")
        held_out = None
        if ask:
            with watch.paused():
                held_out = evaluate(state)
            if held_out is not None:
                if run.writer:
                    run.writer.write(now, {"eval": held_out})
                console.say(f"step {now}  held out: " + "  ".join(f"{k} {v:.4f}" for k, v in held_out.items()))
        if save:
            with watch.paused():
                run.checkpointer.save(now, state, run.meta(now), held_out)
            last_saved = now
        run.checkpointer.poll()
        if jax.default_backend() == "cpu":
            memory.after_step(other_work=save or ask)
    if pending is not None and watch.report(*pending) >= settings.max_bad_steps:
        reason = "diverged"
    if reason == "finished" and now < settings.steps:
        reason = run.stop.requested
    with watch.paused():
        if now > last_saved or reason == "diverged":
            run.checkpointer.save(now, state, run.meta(now))
        saved = run.checkpointer.wait()
    return Outcome(state, now, reason, saved, time.monotonic() - started)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


class _Watch:
    """Reads the figures of finished steps, derives rates, and tells of spikes and skipped updates."""

    def __init__(self, run: Run, host_time: HostTime):
        self._run, self._host_time = run, host_time
        self._last_end: float | None = None  # when the step before ended; None where the clock must start anew
        self._mean_loss: float | None = None
        self._seen = 0
        self._pause = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time counts for no step."""
        start = time.perf_counter()
        with self._run.watchdog.grace(), self._host_time.elsewhere():
            yield
        self._pause += time.perf_counter() - start

    def report(self, step: int, metrics: dict[str, jax.Array], wait: float) -> int:
        """Records one step's figures once they are there; returns the number of updates skipped in a row."""
        with self._host_time.elsewhere():
            values = {name: value.item() for name, value in metrics.items()}
        end = time.perf_counter()
        values["data_wait_seconds"] = wait
        if self._last_end is not None:
            seconds = max(end - self._last_end - self._pause, 1e-9)
            values["step_seconds"] = seconds
            values["tokens_per_second"] = self._run.rates.tokens_per_step / seconds
            if self._run.rates.matmul_flops_per_second:
                flops = values["tokens_per_second"] * self._run.rates.flops_per_token
                values["mfu"] = flops / self._run.rates.matmul_flops_per_second
        self._last_end, self._pause = end, 0.0
        values["host_bytes"] = host.resident_bytes()
        if device_bytes := host.device_bytes():
            values["device_bytes"] = device_bytes
        if values["skipped_in_a_row"]:
            self._run.console.say(
                f"step {step}: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}: not finite, update "
                f"skipped ({values['skipped_in_a_row']} in a row, {values['skipped']} in all)"
            )
        elif self._is_spike(values["loss"]):
            values["spike"] = 1
            self._run.console.say(f"step {step}: loss {values['loss']:.4f} spikes above its mean {self._mean_loss:.4f}")
        if self._run.writer:
            self._run.writer.write(step, values)
        self._run.console.update(step, values)
        return values["skipped_in_a_row"]

    def _is_spike(self, loss: float) -> bool:
        """Compares with a running mean over about 50 steps, after the first 20, and takes the loss into it.

        A spike enters the mean as the highest loss that is none, so that it does not hide the next one.
        """
        if not math.isfinite(loss):
            return False
        mean = loss if self._mean_loss is None else self._mean_loss
        highest, self._seen = self._run.settings.spike_factor * mean, self._seen + 1
        self._mean_loss = mean + max(0.02, 1 / self._seen) * (min(loss, highest) - mean)
        return self._seen > 20 and loss > highest
