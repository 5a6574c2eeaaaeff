"""Packing: a stream of tokens, document after document, cut into rows of one length.

The stream is `[end_of_document, t1 .. tn]` for every document: the end-of-document token stands before a document and,
being next in the stream, is what the last token of the document before has to predict. Where a document is opened by
another token (imported models have one), it is `[beginning, t1 .. tn, end_of_document]`, and nothing is to be predicted
after its end. Rows are consecutive cuts of
the stream, so no token is lost between documents and only the last row can be short; a document that crosses a cut
goes on in the next row as a segment of its own, with positions from 0 or, where rows are `continuing`, with those that
follow.

Legend: S tokens in the stream, T tokens per row.
"""

from __future__ import annotations

import numpy as np

from train.data.batch import Batch


class PackedRows:
    """The rows of a stream, by index: `rows[i]` is a Batch of arrays [T], made when asked for.

    stream: [S] unsigned integers, S > 0, memory-mapped or not. The short last row is padded (segment, weight and
    position 0) where `keep_last` is set or it is the only one, and left out otherwise.
    continuing: count positions from the beginning of a document, also where that lies in an earlier row.
    beginning: what opens a document, if it is not end_of_document.
    """

    def __init__(
        self,
        stream: np.ndarray,
        context: int,
        end_of_document: int,
        keep_last: bool,
        continuing: bool = False,
        beginning: int | None = None,
    ):
        self.context = context
        self.end_of_document = end_of_document
        self.beginning = end_of_document if beginning is None else beginning
        self._stream = stream
        self._openings = np.flatnonzero(stream == self.beginning) if continuing else None
        self._rows = -(-len(stream) // context) if keep_last else max(1, len(stream) // context)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Batch:
        T = self.context
        # One token more than the row: targets are the tokens that follow. Past the stream's end: end of document.
        window = np.full(T + 1, self.end_of_document, np.int32)  # [T + 1]
        part = self._stream[row * T : (row + 1) * T + 1]
        window[: len(part)] = part
        valid = np.arange(T) < len(self._stream) - row * T  # [T]
        tokens, targets = window[:T], window[1:]
        starts = tokens == self.beginning
        learned = valid & ((self.beginning == self.end_of_document) | (tokens != self.end_of_document))
        starts[0] = True
        steps = np.arange(T, dtype=np.int32)
        segment_starts = np.maximum.accumulate(np.where(starts, steps, 0))
        segments = np.cumsum(starts, dtype=np.int32)
        positions = steps - segment_starts
        if self._openings is not None:
            opening = self._openings[np.searchsorted(self._openings, row * T, side="right") - 1]
            positions += np.where(segments == 1, row * T - opening, 0).astype(np.int32)
        return {
            "tokens": tokens,
            "targets": targets,
            "loss_weights": learned.astype(np.float32),
            "segments": np.where(valid, segments, 0),
            "positions": np.where(valid, positions, 0),
        }
