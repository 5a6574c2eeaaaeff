"""BERT's corruption of a row: masked tokens, and pairs of texts for next-sentence prediction (arXiv:1810.04805).

Legend: T tokens per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from train.data.batch import Batch


@dataclasses.dataclass(frozen=True)
class Masking:
    """(number of the row, row) -> the row to train on, a pure function of `seed` and its two arguments.

    Of every row the given share of its tokens, those that open and end documents aside, is to be predicted (section
    3.1): 80 % of them become the mask, 10 % any token, 10 % stay.
    """

    seed: int
    share: float
    mask_token: int
    vocab_size: int  # of the tokenizer
    end_of_document: int
    beginning: int
    partners: Sequence[Sequence[Batch]] = ()  # sources of halves; (): no next-sentence prediction

    def __call__(self, number: int, row: Batch) -> Batch:
        """A row of arrays [T]; with partners, [first half, second half], of which half of the second are another's."""
        rng = np.random.default_rng((self.seed, number))
        if self.partners:
            row = self._pair(rng, row)
        tokens = row["tokens"]
        may = np.flatnonzero((row["segments"] > 0) & ~np.isin(tokens, (self.end_of_document, self.beginning)))
        chosen = rng.choice(may, min(len(may), max(1, round(self.share * len(may)))), replace=False)
        kind = rng.random(len(chosen))
        corrupted = tokens.copy()
        corrupted[chosen[kind < 0.8]] = self.mask_token
        others = chosen[(kind >= 0.8) & (kind < 0.9)]
        corrupted[others] = rng.integers(0, self.vocab_size, len(others))
        weights = np.zeros(len(tokens), np.float32)
        weights[chosen] = 1.0
        return row | {"tokens": corrupted, "targets": tokens, "loss_weights": weights}

    def _pair(self, rng: np.random.Generator, row: Batch) -> Batch:
        """Both halves as one text of two types; `next_sentence` is 1 where the second half is that of another row."""
        T = len(row["tokens"])
        other = rng.random() < 0.5
        source = self.partners[int(rng.integers(len(self.partners)))]
        second = source[int(rng.integers(len(source)))] if other else row
        tokens = np.concatenate([row["tokens"][: T // 2], second["tokens"][T // 2 :]])
        there = np.concatenate([row["segments"][: T // 2], second["segments"][T // 2 :]]) > 0
        return row | {
            "tokens": tokens,
            "segments": there.astype(np.int32),
            "positions": np.arange(T, dtype=np.int32),
            "token_types": (np.arange(T) >= T // 2).astype(np.int32),
            "next_sentence": np.array([other], np.int32),
        }
