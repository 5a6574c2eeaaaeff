"""Figures on held-out data, and what compressors need for the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpu.watchdog import Watchdog
    from train.data.batch import Batch
    from train.signals import Stop
    from train.state import Frozen, Told


def held_out_means(
    evaluate: Callable[..., Told],
    weights: Any,
    batches: Iterable[Batch],
    frozen: Frozen,
    carried: Any = None,
    stop: Stop | None = None,
    watchdog: Watchdog | None = None,
) -> dict[str, float] | None:
    """The means over `batches` of all that an objective tells of them; None if a signal came before the end.

    Args:
      evaluate: of `train.program.Program`.
      carried: what the first batch is given; it goes from batch to batch.
      watchdog: told of every batch.
    """
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    pending: Told | None = None

    def add(told: Told) -> None:
        sums.update({name: float(value) for name, value in told.sums.items()})
        counts.update({name: float(value) for name, value in told.weights.items()})

    for batch in batches:
        if stop is not None and stop.asked():
            return None
        told = evaluate(weights, batch, frozen, carried)
        carried = told.carried
        if watchdog is not None:
            watchdog.beat()
        if pending is not None:
            add(pending)
        pending = told
    if pending is not None:
        add(pending)
    return {name: total / max(counts[name], 1.0) for name, total in sums.items()}


def compressor_figures(documents: Iterable[str]) -> dict[str, float]:
    """Bits per byte of `xz -9 -e` and of `zlib` at its highest level on all documents together."""
    import lzma
    import zlib

    data = "".join(documents).encode()
    return {
        "xz": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
        "zlib": 8 * len(zlib.compress(data, 9)) / len(data),
    }
