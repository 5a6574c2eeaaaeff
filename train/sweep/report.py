"""What a sweep found: the table on the console, the JSON report, the plot."""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import Any

from train.sweep.space import Choice, Integers, Log, Space, short_names
from train.sweep.trial import STATES, Trial


def ranked(trials: list[Trial]) -> list[Trial]:
    """Finished trials from the best on, then pruned ones, then the others in the order of STATES."""

    def key(trial: Trial) -> tuple[int, float]:
        value = trial.value()
        return STATES.index(trial.record.state), math.inf if value is None or math.isnan(value) else value

    return sorted(trials, key=key)


def rows(trials: list[Trial]) -> list[dict[str, Any]]:
    """One object for each trial, ready for JSON; "objective" is null where there is no finite value."""
    return [
        {
            "trial": trial.name,
            "overrides": trial.record.overrides,
            "state": trial.record.state,
            "objective": value if value is not None and math.isfinite(value) else None,
            "step": trial.figures.step,
            "seconds": trial.record.seconds,
            "failures": trial.record.failures,
            "reason": trial.record.reason,
        }
        for trial in trials
        for value in [trial.value()]
    ]


def print_table(trials: list[Trial], space: Space, objective: str, count_from: int) -> None:
    """Prints the trials in the order given, counted, and why some failed or are invalid."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", objective, "step", "state", "seconds"):
        table.add_column(column, justify="left" if column == "state" else "right", no_wrap=True)
    for name in short_names(space).values():
        table.add_column(name, justify="right", overflow="fold")
    for place, row in enumerate(rows(trials), count_from):
        table.add_row(
            str(place),
            "" if row["objective"] is None else f"{row['objective']:.5g}",
            str(row["step"] or ""),
            row["state"],
            f"{row['seconds']:.0f}" if row["seconds"] else "",
            *(str(row["overrides"][field]) for field in space),
        )
    Console(markup=False, highlight=False).print(table)
    reasons = collections.Counter(f"{t.record.state}: {t.record.reason}" for t in trials if t.record.reason)
    for reason, count in reasons.items():
        print(f"{count} {reason}")


def plot(trials: list[Trial], space: Space, objective: str, path: Path) -> str:
    """Draws the objective against each field and against the training step; returns a line that says so, or why not.

    Args:
      trials: best first. Those that ended with a value are drawn; pruned ones as rings, at their last value.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: the package matplotlib is not installed; pip install -e '.[plot]'"
    ended = [
        t for t in trials if t.record.state in ("finished", "pruned") and math.isfinite(t.figures.value or math.nan)
    ]
    if not ended:
        return "no plot: no trial has ended with a value"
    columns = min(3, len(space) + 1)
    lines = math.ceil((len(space) + 1) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for field, axis in zip(space, axes, strict=False):
        _draw_field(axis, field, space[field], ended)
    _draw_curves(axes[len(space)], ended)
    for axis in axes[len(space) + 1 :]:
        axis.set_visible(False)
    for row in range(lines):
        axes[row * columns].set_ylabel(objective)
    best = f"{ended[0].name}: {objective} {ended[0].figures.value:.5g}"
    figure.suptitle(f"black, the best of {len(ended)}: {best}; rings were pruned", fontsize=9)
    figure.savefig(path, dpi=130)
    return f"plot: {path}"


def _draw_field(axis: Any, field: str, values: Any, ended: list[Trial]) -> None:
    """A point for each trial; the best one is filled in black."""
    for place, trial in reversed(list(enumerate(ended))):
        value = trial.record.overrides[field]
        x = values.values.index(value) if isinstance(values, Choice) else value
        pruned = trial.record.state == "pruned"
        color = "black" if place == 0 else "tab:blue"
        axis.scatter(x, trial.figures.value, s=28, facecolor="none" if pruned else color, edgecolor=color, alpha=0.8)
    if isinstance(values, Choice):
        axis.set_xticks(range(len(values.values)), [str(value) for value in values.values])
        axis.set_xlim(-0.5, len(values.values) - 0.5)
    if isinstance(values, Integers):
        axis.xaxis.get_major_locator().set_params(integer=True)
    if isinstance(values, Log):
        axis.set_xscale("log")
    axis.set_xlabel(field)
    axis.grid(alpha=0.3)


def _draw_curves(axis: Any, ended: list[Trial]) -> None:
    for place, trial in reversed(list(enumerate(ended))):
        curve = trial.figures.curve
        style = {"color": "black", "linewidth": 1.6} if place == 0 else {"color": "tab:blue", "linewidth": 0.8}
        axis.plot(curve.keys(), curve.values(), marker=".", alpha=0.8, **style)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
