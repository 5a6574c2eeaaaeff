"""T5's corruption of a row: spans are cut out for the decoder to write (arXiv:1910.10683, section 3.1.4).

Each span leaves a sentinel in the encoder's row, and the decoder writes every sentinel with what it stands for:

    a b c d e f g   ->   encoder: a <X> d e <Y> g      decoder: <X> b c <Y> f, end

Legend: T tokens of the row, S of the encoder's, U of the decoder's.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from train.data.batch import Batch


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """(number of the row, row) -> the row to train on, a pure function of `seed` and its two arguments.

    `noise` tokens go, in `spans` spans, so all rows have the same shape: S = T - noise + spans, U = noise + spans + 1.
    Lengths of spans and of what lies between are drawn uniformly from all that add up. A row may hold several
    documents: the tokens keep their segments, so none is seen from another document.
    """

    seed: int
    noise: int
    spans: int
    first_sentinel: int  # the others go down from it
    start_token: int  # that the decoder begins with
    end_of_document: int

    def __call__(self, number: int, row: Batch) -> Batch:
        """A row of arrays [T] as decoder arrays [U] and encoder arrays [S]."""
        rng = np.random.default_rng((self.seed, number))
        kept, cut = (_lengths(rng, n, self.spans) for n in (len(row["tokens"]) - self.noise, self.noise))
        gone = np.repeat(np.tile([False, True], self.spans), np.stack([kept, cut], 1).ravel())  # [T]
        first = gone & ~np.concatenate([[False], gone[:-1]])
        sentinels = self.first_sentinel - np.arange(self.spans, dtype=np.int32)
        inputs = row["tokens"].copy()
        inputs[first] = sentinels
        before = np.cumsum(cut) - cut  # where each span begins among the tokens that went
        tokens, segments = row["tokens"][gone], row["segments"][gone]
        targets = np.append(np.insert(tokens, before, sentinels), self.end_of_document).astype(np.int32)
        segments = np.append(np.insert(segments, before, segments[before]), segments[-1]).astype(np.int32)
        begins = np.concatenate([[True], segments[1:] != segments[:-1]])
        return {
            "tokens": np.where(begins, self.start_token, np.roll(targets, 1)).astype(np.int32),
            "targets": targets,
            "loss_weights": (segments > 0).astype(np.float32),
            "segments": segments,
            "positions": np.arange(len(targets), dtype=np.int32),
            "inputs": inputs[~gone | first],
            "input_segments": row["segments"][~gone | first],
        }


def _lengths(rng: np.random.Generator, total: int, parts: int) -> np.ndarray:
    """`parts` positive integers that add up to `total`, every such sequence as likely as another."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
