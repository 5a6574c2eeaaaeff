"""Reading over bad records: among millions some are damaged, and a run should neither end by one nor hide many."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tpu.errors import UserError

log = logging.getLogger(__name__)

TOLERATED = 10  # bad records, however few were read, where any are allowed


class Skipping:
    """Records by index, where a good record stands in for a bad one.

    Which one that is follows from the index and the records alone: a run that resumes reads what it would have read.
    It is looked for far away, for bad records lie together (a lost folder, a broken shard), and at another place for
    every index, so that none is read more often than the others. The counts begin anew in every process.
    """

    def __init__(self, read: Callable[[int], Any], length: int, max_bad_fraction: float = 0.01):
        """read: gives one of `length` records, or raises UserError for a bad one; max_bad_fraction: of those read."""
        self.reasons: Counter[str] = Counter()  # bad records by what is wrong with them
        self._read, self._length, self._max_bad_fraction = read, length, max_bad_fraction
        self._bad: set[int] = set()
        self._reads, self._last = 0, ""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        """The record of `index`, or of the first good one on a walk from there that comes to all.

        Raises UserError as `get`, and where there is no good one.
        """
        if not 0 <= index < self._length:
            raise IndexError(index)
        for candidate in walk(index, self._length):
            if (record := self.get(candidate)) is not None:
                return record
        raise self.none_good()

    def get(self, index: int) -> Any | None:
        """The record of `index` alone; None where it is bad. Raises UserError where more records are bad than
        `max_bad_fraction` of those read, and more than TOLERATED, at the first where the fraction is 0."""
        try:
            record = self._read(index)
        except UserError as error:
            self._count(index, str(error))
            return None
        with self._lock:
            self._reads += 1
        return record

    def none_good(self) -> UserError:
        """What is to be raised where all records are bad."""
        return UserError(f"none of the {self._length} records can be read; the last: {self._last}")

    def _count(self, index: int, message: str) -> None:
        with self._lock:
            self._reads, self._last = self._reads + 1, message
            if index not in self._bad:
                self._bad.add(index)
                self.reasons[_reason(message)] += 1
                log.warning("bad record, read over: %s", message)
            read = min(self._reads, self._length)  # A record that an epoch reads again is still one record.
            if len(self._bad) > (max(TOLERATED, self._max_bad_fraction * read) if self._max_bad_fraction else 0):
                raise UserError(
                    f"max_bad_fraction={self._max_bad_fraction}: {len(self._bad)} of {read} records are bad "
                    f"({_listed(self.reasons)}); mend them or allow more; the last: {message}"
                )


def walk(index: int, length: int) -> Iterator[int]:
    """All numbers below `length` from `index` on, in steps of about its golden section: they spread, and reach all."""
    stride = round(length * (math.sqrt(5) - 1) / 2)
    while math.gcd(stride, length) > 1:
        stride += 1
    return ((index + step * stride) % length for step in range(length))


def _reason(message: str) -> str:
    """What is wrong, without where: the message after its place, up to what explains it, numbers and names left out."""
    what = message.partition(": ")[2] or message
    what = re.split(r" \(|; ", what)[0]
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", what)


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
