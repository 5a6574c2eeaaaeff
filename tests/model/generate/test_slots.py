"""Rows that come and go against the same rows alone."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import kinds
from model.config import ModelConfig
from model.generate.decode import NO_TOKEN, decoding_weights, make_decoder, pad_prompts, row_keys
from model.generate.generate import generate
from model.generate.sampling import sampling_of
from model.generate.slots import end, put, vacant

VOCAB, END, SLOTS, PLACES, MOST, CHUNK = 31, 30, 64, 3, 12, 4
CONFIG = ModelConfig(vocab_size=VOCAB, layers=2, embed_dim=16, heads=4, kv_heads=2, init_std=0.3, max_positions=64)
CASES = {
    "unrolled": {"pattern": ("local", "global"), "window": 5},
    "scanned": {"pattern": ("gated_linear", "global"), "layer_loop": "scan"},
}
PROMPTS = [[END, *np.random.default_rng(i).integers(0, END, i % 9).tolist()] for i in range(6)]
SAMPLING = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1}


@functools.cache
def case(name):
    """Decoder, weights, each prompt as a row that was read alone, `put` compiled, and what each gets alone."""
    config = dataclasses.replace(CONFIG, **CASES[name]).resolved().placed("cpu", "float32")
    weights = kinds.init(config, jax.random.key(0))
    decoder = make_decoder(config, kinds.build(config)[0], VOCAB, END)
    weights = decoding_weights(config, weights)
    read, alone = [], []
    for number, prompt in enumerate(PROMPTS):
        tokens, lengths = pad_prompts([prompt], None)
        keys, limits = row_keys([5], [number]), np.full(1, MOST, np.int32)
        read.append(decoder.start(weights, tokens, lengths, sampling_of(1, **SAMPLING), keys, limits, SLOTS))
        alone.append(
            np.asarray(generate(decoder, weights, tokens, lengths, MOST, sampling_of(1, **SAMPLING), keys)[0])[0]
        )
    return decoder, weights, read, jax.jit(put), alone


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8)
@given(st.data())
def test_a_row_gets_the_same_tokens_alone_and_among_rows_that_come_and_go(name, data):
    decoder, weights, read, place, alone = case(name)
    rows = vacant(read[0][0], PLACES)
    held, found = [None] * PLACES, {}
    for _ in range(6):
        for at in range(PLACES):
            if not data.draw(st.integers(0, 2)):
                held[at] = number = data.draw(st.integers(0, len(PROMPTS) - 1))
                row, drawn, _ = read[number]
                rows, found[at] = place(rows, at, row), [np.asarray(drawn)[0]]
        rows, drawn, _ = decoder.decode(weights, rows, sampling_of(PLACES, **SAMPLING), CHUNK)
        for at, number in enumerate(held):
            if number is not None:
                found[at].append(np.asarray(drawn)[at])
                got = np.concatenate(found[at])[:MOST]
                np.testing.assert_array_equal(got, alone[number][: len(got)])


def test_vacant_places_and_ended_rows_draw_nothing():
    decoder, weights, read, place, alone = case("unrolled")
    number = next(i for i, tokens in enumerate(alone) if (tokens[:9] != NO_TOKEN).all())
    rows = place(vacant(read[0][0], PLACES), 1, read[number][0])
    rows, drawn, _ = decoder.decode(weights, rows, sampling_of(PLACES, **SAMPLING), CHUNK)
    assert ((np.asarray(drawn) == NO_TOKEN) == [[True], [False], [True]]).all()
    rows = end(rows, np.array([False, True, False]))
    _, drawn, _ = decoder.decode(weights, rows, sampling_of(PLACES, **SAMPLING), CHUNK)
    assert (np.asarray(drawn) == NO_TOKEN).all()
