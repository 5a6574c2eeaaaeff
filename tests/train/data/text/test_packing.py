"""Packing against a plain reference that walks the documents token by token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.batch import text_layout
from train.data.text.packing import PackedRows

END = 9
DOCUMENTS = st.lists(st.lists(st.integers(0, 8), max_size=12), min_size=1, max_size=8)
DTYPES = {"tokens": "int32", "targets": "int32", "loss_weights": "float32", "segments": "int32", "positions": "int32"}


def reference(documents, context, keep_last):
    """(document, token, target) per stream position, cut into rows; None stands for padding."""
    stream = [(number, token) for number, document in enumerate(documents) for token in [END, *document]]
    following = [token for _, token in stream[1:]] + [END]
    entries = [(number, token, target) for (number, token), target in zip(stream, following, strict=True)]
    rows = [entries[start : start + context] for start in range(0, len(entries), context)]
    if len(rows[-1]) < context and not keep_last and len(rows) > 1:
        rows.pop()
    return [row + [None] * (context - len(row)) for row in rows]


@settings(deadline=None, max_examples=300)
@given(documents=DOCUMENTS, context=st.integers(1, 10), keep_last=st.booleans())
def test_rows_equal_the_reference(documents, context, keep_last):
    stream = np.array([t for document in documents for t in [END, *document]], np.uint16)
    rows = PackedRows(stream, context, END, keep_last)
    expected = reference(documents, context, keep_last)
    assert len(rows) == len(expected)
    for index, entries in enumerate(expected):
        row = rows[index]
        assert {name: str(row[name].dtype) for name in DTYPES} == DTYPES
        segment, previous, position = 0, None, 0
        for t, entry in enumerate(entries):
            found = tuple(row[name][t] for name in DTYPES)
            if entry is None:
                assert found == (END, END, 0.0, 0, 0)
                continue
            number, token, target = entry
            if number != previous:
                segment, previous, position = segment + 1, number, 0
            assert found == (token, target, 1.0, segment, position)
            position += 1


@settings(deadline=None, max_examples=100)
@given(documents=DOCUMENTS, context=st.integers(1, 10))
def test_a_beginning_of_its_own_opens_each_document_and_is_never_predicted(documents, context):
    begin = END - 1
    documents = [[token for token in document if token != begin] for document in documents]
    stream = np.array([t for document in documents for t in [begin, *document, END]], np.uint16)
    rows = PackedRows(stream, context, END, keep_last=True, beginning=begin)
    fields = ("tokens", "targets", "loss_weights")
    each = (zip(*(rows[i][name] for name in fields), strict=True) for i in range(len(rows)))
    pairs = [(int(t), int(y)) for row in each for t, y, w in row if w]
    assert pairs == [pair for document in documents for pair in itertools.pairwise([begin, *document, END])]
    for i in range(len(rows)):  # A document is one segment of a row, its end included.
        row = rows[i]
        opens = (row["tokens"] == begin) & (row["segments"] > 0)
        np.testing.assert_array_equal(
            np.diff(row["segments"], prepend=row["segments"][:1]) > 0, opens & (np.arange(context) > 0)
        )


@settings(deadline=None, max_examples=100)
@given(documents=DOCUMENTS, context=st.integers(1, 10))
def test_kept_rows_join_to_the_stream(documents, context):
    stream = np.array([t for document in documents for t in [END, *document]], np.uint16)
    rows = PackedRows(stream, context, END, keep_last=True)
    tokens = np.concatenate([rows[i]["tokens"][rows[i]["loss_weights"] > 0] for i in range(len(rows))])
    np.testing.assert_array_equal(tokens, stream)
    assert sum(rows[i]["loss_weights"].sum() for i in range(len(rows))) == len(stream)


def test_a_document_longer_than_a_row_goes_on():
    rows = PackedRows(np.array([END, 1, 2, 3, 4, 5, END, 6], np.uint16), 4, END, keep_last=False)
    assert len(rows) == 2
    assert rows[1]["tokens"].tolist() == [4, 5, END, 6]
    assert rows[1]["segments"].tolist() == [1, 1, 2, 2]
    assert rows[1]["positions"].tolist() == [0, 1, 0, 1]
    assert rows[0]["targets"].tolist() == [1, 2, 3, 4]


def test_positions_of_continuing_rows_go_on():
    stream = np.array([END, 1, 2, 3, 4, 5, END, 6, 7, 8, 3, END, 1], np.uint16)
    rows = PackedRows(stream, 4, END, keep_last=True, continuing=True)
    found = [rows[i]["positions"].tolist() for i in range(len(rows))]
    assert found == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 0], [1, 0, 0, 0]]
    plain = PackedRows(stream, 4, END, keep_last=True)
    for i in range(len(rows)):
        np.testing.assert_array_equal(rows[i]["segments"], plain[i]["segments"])


def test_the_largest_token_of_a_wide_stream_survives():
    rows = PackedRows(np.array([70_000, 2**31 - 1], np.uint32), 2, 70_000, keep_last=False)
    assert rows[0]["tokens"].tolist() == [70_000, 2**31 - 1]


@pytest.mark.parametrize("keep_last", [False, True])
def test_padding_is_what_the_end_of_a_short_row_is(keep_last):
    """But for its tokens, which nobody sees."""
    short = PackedRows(np.array([END], np.uint16), 6, END, keep_last)[0]
    for name, field in text_layout(1, 6, 10).items():
        assert str(short[name].dtype) == field.dtype
        if name not in ("tokens", "targets"):
            np.testing.assert_array_equal(short[name][1:], field.padding)
