"""The data path: sources → documents → tokens → packed rows → batches, of which a process makes its own rows only.

A training batch is a pure function of (seed, step), so the only state of the data is the step: a run resumes at any
step, on any number of hosts, with the batches it would have seen.

Legend: B rows per global batch, L those of them that this process makes, T tokens per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from train.config import DataConfig
from train.data.batch import Batch, Layout
from train.data.corpus import Corpus


class _Selected:
    """The given rows of every global batch, one batch after the other, as Grain reads them."""

    def __init__(self, stream: Any, batch_size: int, rows: Sequence[int]) -> None:
        self._stream, self._batch_size, self._rows = stream, batch_size, rows

    def __len__(self) -> int:
        return len(self._stream) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        step, row = divmod(int(index), len(self._rows))
        return self._stream[step * self._batch_size + self._rows[row]]


class _Lanes:
    """Rows of `rows`, one of every batch following that of the batch before, as Grain reads them.

    The rows lie in a circle, cut into `batch_size` lanes of one length; each epoch begins to cut it elsewhere. What
    does not divide into lanes is left out at the end of the circle.
    """

    def __init__(self, rows: Sequence[Batch], batch_size: int, seed: int) -> None:
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._length = len(rows) // batch_size  # rows of a lane

    def __len__(self) -> int:
        return 2**48

    def __getitem__(self, index: int) -> Batch:
        step, lane = divmod(int(index), self._batch_size)
        epoch, row = divmod(step, self._length)
        circle = self._batch_size * self._length
        begin = np.random.default_rng((self._seed, epoch)).integers(circle) if epoch else 0
        return self._rows[(int(begin) + lane * self._length + row) % circle]


class _Joined:
    """The rows of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Sequence[Batch]]) -> None:
        self._sources, self._ends = sources, np.cumsum([len(rows) for rows in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> Batch:
        source = int(np.searchsorted(self._ends, row, side="right"))
        return self._sources[source][row - (int(self._ends[source - 1]) if source else 0)]


def train_batches(
    corpus: Corpus, data: DataConfig, seed: int, start_step: int = 0, rows: Sequence[int] = ()
) -> Iterator[Batch]:
    """An endless iterator of training batches [L, T] from `start_step` on, made ahead in a thread.

    Every source is shuffled anew in each of its epochs and gives data.weights of the rows (by default in proportion to
    its rows). With data.contiguous rows keep their order instead, and row b of a batch goes on where row b of the batch
    before ended. `close()` stops the thread; what fails in it is raised by `next`.

    rows: which rows of each global batch to make (see `tpu.distributed.rows_here`), ascending; none given: all.
    """
    import grain

    if data.contiguous:
        stream = grain.MapDataset.source(_Lanes(_Joined(corpus.train), data.batch_size, seed))
    else:
        sources = [
            grain.MapDataset.source(rows).seed((seed + index) % 2**32).shuffle().repeat()
            for index, rows in enumerate(corpus.train)
        ]
        weights = data.weights or [len(rows) for rows in corpus.train]
        # Grain 0.2 overflows on batches of one row of an endless mixture; no run reaches this many.
        stream = grain.MapDataset.mix(sources, weights)[: 2**48]
    if corpus.train_change is not None:
        stream = stream.map_with_index(corpus.train_change)
    if rows:
        stream = grain.MapDataset.source(_Selected(stream, data.batch_size, rows))
    batches = stream.batch(len(rows) or data.batch_size)[start_step:]
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch)))


def stream(batches: Iterator[Any]) -> Callable[[Any, int], tuple[Any, Any]]:
    """The batches of an iterator as the loop asks for them: (state, step) -> the state as it is, and the next one."""
    return lambda state, step: (state, next(batches))


def held_out_batches(
    corpus: Corpus, data: DataConfig, layout: Layout, batch_size: int, limit: int = 0, rows: Sequence[int] = ()
) -> Iterator[Batch]:
    """Yields the held-out rows in order as batches of `batch_size` rows, the last filled up with what `layout` says.

    With data.contiguous the rows are cut into `batch_size` runs of one length, the last filled up, and row b of every
    batch comes from run b.
    rows: as in `train_batches`; the batches are [L, T] then, and [batch_size, T] without.
    limit: at most so many batches; 0: all. With a limit, bits per byte must count bytes as
    `held_out_bytes / held_out_tokens` per token of weight 1, for the bytes of single rows are not known.
    """
    if not corpus.held_out:
        return
    stream, change = _Joined(corpus.held_out), corpus.held_out_change or (lambda number, row: row)
    padding = {name: np.full(field.shape[1:], field.padding, field.dtype) for name, field in layout.items()}
    batches = -(-len(stream) // batch_size)
    for step in range(min(batches, limit or batches)):
        numbers = [step * batch_size + row for row in rows or range(batch_size)]
        places = [row * batches + step for row in rows or range(batch_size)] if data.contiguous else numbers
        made = [
            change(number, stream[place]) if place < len(stream) else padding
            for number, place in zip(numbers, places, strict=True)
        ]
        yield {name: np.stack([row[name] for row in made]) for name in layout}
