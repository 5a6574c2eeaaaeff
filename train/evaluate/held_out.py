"""Figures on held-out data, and what compressors need for the same bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from train.objectives.table import SCORED

if TYPE_CHECKING:
    from tpu.watchdog import Watchdog
    from train.data.batch import Batch
    from train.data.corpus import Corpus
    from train.signals import Stop


def held_out_figures(
    evaluate: Callable[..., dict[str, Any]],
    weights: Any,
    batches: Iterable[Batch],
    corpus: Corpus,
    stop: Stop | None = None,
    watchdog: Watchdog | None = None,
    objective: str = "next_token",
    memory: Any = None,
) -> dict[str, float] | None:
    """Loss (nats per token), perplexity and bits per byte over `batches`; None if a signal came before the end.

    Objectives whose head gives labels have loss and accuracy; others that do not predict every token, no bits per byte.

    Bits per byte divides all bits by the bytes of the held-out documents. Where `batches` are only some of them, their
    bytes are taken to be in proportion to their tokens.

    Args:
      evaluate: (weights, batch) -> sums `nll_sum`, `loss_tokens` and, of labels, `correct_sum`.
      watchdog: told of every batch.
      memory: an empty one, which goes from batch to batch, where the model remembers (`train.step.Program`).
    """
    totals: Counter[str] = Counter()
    pending: dict[str, Any] | None = None
    for batch in batches:
        if stop is not None and stop.asked():
            return None
        sums = evaluate(weights, batch) if memory is None else evaluate(weights, batch, memory)
        memory = sums.pop("memory", None)
        if watchdog is not None:
            watchdog.beat()
        if pending is not None:
            totals.update({name: float(value) for name, value in pending.items()})
        pending = sums
    if pending is not None:
        totals.update({name: float(value) for name, value in pending.items()})
    tokens = max(totals["loss_tokens"], 1.0)
    loss = totals["nll_sum"] / tokens
    if objective == "regression":
        return {"loss": loss}
    if objective in SCORED:
        return {"loss": loss, "accuracy": totals["correct_sum"] / tokens}
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if objective != "next_token":
        return figures
    bytes_per_token = corpus.held_out_bytes / max(corpus.held_out_tokens, 1)
    return figures | {"bits_per_byte": loss / math.log(2) / bytes_per_token}


def compressor_figures(documents: Iterable[str]) -> dict[str, float]:
    """Bits per byte of `xz -9 -e` and of `zlib` at its highest level on all documents together."""
    import lzma
    import zlib

    data = "".join(documents).encode()
    return {
        "xz": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
        "zlib": 8 * len(zlib.compress(data, 9)) / len(data),
    }
