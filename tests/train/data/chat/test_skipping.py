"""Reading over bad records: what stands in is fixed, few are borne, many end the run with their reasons."""

from __future__ import annotations

import logging
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu.errors import UserError
from train.data.chat.skipping import TOLERATED, Skipping


def faulty(bad, length: int, fraction: float = 0.01) -> Skipping:
    """Records that are their index, but for bad ones."""

    def read(index: int) -> int:
        if index in bad:
            raise UserError(f"a.jsonl, line {index + 1}: image 'x{index}.jpg' cannot be read (why: {index})")
        return index

    return Skipping(read, length, fraction)


@given(length=st.integers(1, 40), data=st.data())
def test_a_good_record_stands_in_whatever_was_read_before(length, data):
    indices = st.integers(0, length - 1)
    bad = data.draw(st.sets(indices, max_size=min(length - 1, TOLERATED)))
    order = data.draw(st.lists(indices, max_size=80))
    records = faulty(bad, length)
    assert len(records) == length
    for index in order:
        found = records[index]
        assert found not in bad
        assert found == index or index in bad
        assert found == faulty(bad, length)[index]
    assert sum(records.reasons.values()) <= len(bad)


@given(length=st.integers(1, 200), good=st.integers(0, 199))
def test_every_index_finds_the_only_good_record(length, good):
    good %= length
    records = faulty(set(range(length)) - {good}, length, 1.0)
    assert {records[index] for index in range(length)} == {good}


def test_bad_records_that_lie_together_have_their_stand_ins_apart():
    length, bad = 4000, range(1000, 1030)
    order = random.Random(0).sample(range(length), length)
    records = faulty(bad, length)  # 0.75 % in all, and nowhere more than was allowed
    read = Counter(records[index] for index in order)
    assert sum(records.reasons.values()) == len(bad)
    assert len(read) == length - len(bad)
    assert max(read.values()) == 2
    stands_in = sorted(records[index] for index in bad)
    assert min(min(abs(found - index) for index in bad) for found in stands_in) > length // 4


def test_bad_records_are_logged_once_and_counted_by_reason(caplog):
    records = faulty({3, 4}, 10)
    with caplog.at_level(logging.WARNING, logger="train.data.chat.skipping"):
        assert [records[i] in (3, 4) for i in (3, 4, 3, 2)] == [False] * 4
    assert [r.getMessage().split(":")[1].strip() for r in caplog.records] == ["a.jsonl, line 4", "a.jsonl, line 5"]
    assert records.reasons == {"image … cannot be read": 2}


def test_few_bad_records_are_borne_epoch_after_epoch():
    records = faulty(range(TOLERATED), 20)
    for _ in range(50):
        assert min(records[i] for i in range(20)) == TOLERATED


def test_one_more_ends_the_run():
    records = faulty(range(0, 40, 2), 40)
    for index in range(2 * TOLERATED):
        records[index]
    message = (
        rf"max_bad_fraction=0.01: {TOLERATED + 1} of \d+ records are bad \(11 image … cannot be read\); mend them or "
        r"allow more; the last: a\.jsonl, line 21: image 'x20.jpg'"
    )
    with pytest.raises(UserError, match=message):
        records[2 * TOLERATED]


def test_none_is_allowed_where_the_fraction_is_zero():
    records = faulty({3}, 10, 0.0)
    assert records[2] == 2
    with pytest.raises(UserError, match=r"max_bad_fraction=0.0: 1 of 2 records are bad"):
        records[3]


def test_the_fraction_is_of_what_has_been_read():
    length = 4000
    records = faulty(range(99, length, 100), length)  # one in a hundred, which is allowed
    read = [records[i] for i in range(length)]
    assert [i for i in range(length) if read[i] != i] == [*range(99, length, 100)]
    assert records.reasons == {"image … cannot be read": length // 100}
    records = faulty(range(49, length, 50), length)
    with pytest.raises(UserError, match=r"max_bad_fraction=0.01: 11 of 5[4-6][0-9] records"):
        [records[i] for i in range(length)]
    records = faulty(range(49, length, 50), length, 0.02)
    assert len([records[i] for i in range(length)]) == length


def test_nothing_but_bad_records_is_an_error():
    with pytest.raises(UserError, match=r"none of the 3 records can be read; the last: a.jsonl, line [123]: image"):
        faulty(range(3), 3)[1]


def test_other_errors_and_indices_pass():
    def broken(index: int) -> int:
        return 1 // index

    with pytest.raises(ZeroDivisionError):
        Skipping(broken, 5)[0]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            Skipping(broken, 5)[index]
