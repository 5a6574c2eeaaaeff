"""What a layer's cache holds and gives: every token of a row, or, as a ring, those of its window.

Legend: B rows, T tokens, G kv_heads, K head_dim, S slots.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.cache import empty_cache, extend, write_slots
from model.config import ModelConfig
from model.place import Place

SLOTS, ROWS = 24, 2


def test_local_layers_hold_no_more_than_their_window():
    config = ModelConfig(layers=6, embed_dim=16, heads=4, kv_heads=2, pattern=("local", "local", "global"), window=5)
    for loop, lead in (("scan", (2,)), ("unroll", ())):
        placed = dataclasses.replace(config, layer_loop=loop).resolved().placed("cpu", "float32")
        layers = empty_cache(placed, 3, 64).layers
        group = layers if loop == "scan" else layers[0]
        assert [a.shape for a in group["layer_0"]] == [(*lead, 3, 2, 5, 4)] * 2
        assert [a.shape for a in group["layer_2"]] == [(*lead, 3, 2, 64, 4)] * 2
        short = empty_cache(placed, 3, 4).layers
        group = short if loop == "scan" else short[0]
        assert {a.shape[-2] for a in jax.tree.leaves(group)} == {4}, "no more than there are slots"


@functools.partial(jax.jit, static_argnames=("window", "opens"))
def read(cached, slots, k, place, window, opens):
    slots = write_slots(slots, place)
    return *extend(cached, k, k + 0.5, place, None if opens else slots, window), slots


@pytest.mark.parametrize("window", [0, 1, 4, 7])
@settings(max_examples=10)
@given(data=st.data())
def test_every_token_finds_those_before_it_however_the_row_is_cut(window, data):
    """Rows of several lengths, read in parts that padding ends, and one by one after that."""
    lengths = np.array([data.draw(st.integers(1, 17)) for _ in range(ROWS)])
    shape = (ROWS, 1, min(window, SLOTS) or SLOTS, 1)
    cached, slots = (np.zeros(shape, np.float32),) * 2, empty_slots()
    widths = data.draw(st.lists(st.sampled_from([1, 3, 8]), min_size=1, max_size=5))
    at = np.zeros(ROWS, int)
    start = 0
    for width in widths:
        if start + width > 17:
            break
        at[:] = start
        cached, slots = step(cached, slots, at, np.clip(lengths - start, 0, width), width, window, start == 0)
        start += width
    at = np.minimum(lengths, start)
    for _ in range(3):
        cached, slots = step(cached, slots, at, np.ones(ROWS, int), 1, window, False)
        at = at + 1


def empty_slots() -> Place:
    return Place(np.zeros((ROWS, SLOTS), np.int32), np.broadcast_to(np.arange(SLOTS, dtype=np.int32), (ROWS, SLOTS)))


def step(cached, slots, first, real, width, window, opens):
    """Reads `width` tokens from the positions `first` on, of which `real` are none of padding; a token's key is 1 +
    its position, that of padding -1. Checks what each of them finds."""
    positions = (first[:, None] + np.arange(width)).astype(np.int32)
    segments = (np.arange(width) < real[:, None]).astype(np.int32)
    values = np.where(segments > 0, 1 + positions, -1).astype(np.float32)[:, None, :, None]
    k, v, keys, cached, slots = read(cached, slots, values, Place(segments, positions), window, opens)
    for b in range(ROWS):
        there = np.asarray(keys.segments[b]) == 1
        for position in positions[b][segments[b] > 0]:
            distance = position - np.asarray(keys.positions[b])
            seen = there & (distance >= 0) & (distance < (window or SLOTS))
            wanted = np.arange(max(0, position - window + 1) if window else 0, position + 1)
            np.testing.assert_array_equal(np.sort(np.asarray(k)[b, 0, seen, 0]), 1 + wanted)
            np.testing.assert_array_equal(np.asarray(v)[b, 0, seen, 0], np.asarray(k)[b, 0, seen, 0] + 0.5)
    return cached, slots
