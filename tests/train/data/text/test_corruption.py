"""Masking and span corruption: their shares, their determinism, and that nothing is lost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from train.config import DataConfig, Experiment, ObjectiveConfig
from train.data.batch import Batch
from train.data.text.masking import Masking
from train.data.text.packing import PackedRows
from train.data.text.span_corruption import SpanCorruption
from train.objectives.span_corruption import spans

END, VOCAB, MASK, CONTEXT = 0, 900, 999, 64
RNG = np.random.default_rng(0)
STREAM = np.where(RNG.random(64 * 200) < 0.03, END, RNG.integers(1, VOCAB, 64 * 200)).astype(np.uint16)
PACKED = PackedRows(STREAM, CONTEXT, END, keep_last=True)
ROWS = [PACKED[i] for i in range(len(PACKED))]
SHORT = PackedRows(STREAM[:40], CONTEXT, END, keep_last=True)[0]  # 24 tokens of padding
MASKING = Masking(seed=7, share=0.15, mask_token=MASK, vocab_size=VOCAB, end_of_document=END, beginning=END)


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_of_the_chosen_80_percent_are_masked_10_random_10_kept():
    chosen = masked = kept = eligible = 0
    for number, row in enumerate(ROWS):
        found = MASKING(number, row)
        np.testing.assert_array_equal(found["targets"], row["tokens"])
        there = found["loss_weights"] > 0
        np.testing.assert_array_equal(found["tokens"][~there], row["tokens"][~there])
        assert not (row["tokens"][there] == END).any()
        eligible += (row["tokens"] != END).sum()
        chosen += there.sum()
        masked += (found["tokens"][there] == MASK).sum()
        kept += (found["tokens"][there] == row["tokens"][there]).sum()
    assert chosen / eligible == pytest.approx(0.15, abs=0.005)
    # Four standard deviations of the binomial; a random token is the right one once in 900.
    assert masked / chosen == pytest.approx(0.8, abs=4 * (0.16 / chosen) ** 0.5)
    assert kept / chosen == pytest.approx(0.1, abs=4 * (0.09 / chosen) ** 0.5 + 0.001)


def test_a_corrupted_row_is_a_function_of_seed_and_number():
    for corrupt in (MASKING, SPANS):
        again = dataclasses.replace(corrupt)
        assert same(corrupt(3, ROWS[3]), again(3, ROWS[3]))
        assert not same(corrupt(3, ROWS[3]), corrupt(4, ROWS[3]))
        assert not same(corrupt(3, ROWS[3]), dataclasses.replace(corrupt, seed=8)(3, ROWS[3]))


def test_padding_is_neither_masked_nor_to_be_predicted():
    found = MASKING(0, SHORT)
    assert found["loss_weights"][:40].sum() > 0
    assert found["loss_weights"][40:].sum() == 0
    assert (found["tokens"][40:] == SHORT["tokens"][40:]).all()


def test_next_sentences_are_right_half_of_the_time():
    pairs = dataclasses.replace(MASKING, partners=(ROWS,))
    wrong = 0
    for number, row in enumerate(ROWS):
        found = pairs(number, row)
        np.testing.assert_array_equal(found["targets"][:32], row["tokens"][:32])
        follows = np.array_equal(found["targets"][32:], row["tokens"][32:])
        assert follows or found["next_sentence"][0] == 1  # A stranger may be the row itself, by chance.
        wrong += int(found["next_sentence"][0])
        assert found["token_types"].tolist() == [0] * 32 + [1] * 32
        assert (found["segments"] == 1).all()
    assert wrong / len(ROWS) == pytest.approx(0.5, abs=0.15)


NOISE, COUNT = spans(Experiment(data=DataConfig(context=CONTEXT), objective=ObjectiveConfig(name="span_corruption")))
SPANS = SpanCorruption(seed=7, noise=NOISE, spans=COUNT, first_sentinel=MASK, start_token=END, end_of_document=END)


def restored(found: Batch) -> list[int]:
    """The row's tokens, from what the encoder reads and the decoder writes."""
    spans: dict[int, list[int]] = {}
    for token in found["targets"][:-1]:
        if token > MASK - COUNT:
            spans[int(token)] = []
            last = spans[int(token)]
        else:
            last.append(int(token))
    return [t for token in found["inputs"] for t in spans.get(int(token), [int(token)])]


def test_encoder_and_decoder_hold_the_row_between_them():
    assert (NOISE, COUNT) == (10, 3)
    for number, row in enumerate(ROWS):
        found = SPANS(number, row)
        assert restored(found) == row["tokens"].tolist()
        assert len(found["inputs"]) == CONTEXT - NOISE + COUNT
        assert len(found["targets"]) == NOISE + COUNT + 1
        assert found["targets"][-1] == END
        sentinels = [t for t in found["inputs"] if t > MASK - COUNT]
        assert sentinels == [MASK - i for i in range(COUNT)]


def test_the_decoder_reads_what_it_has_written_of_the_document():
    found = SPANS(5, ROWS[5])
    for i, token in enumerate(found["tokens"]):
        new = i == 0 or found["segments"][i] != found["segments"][i - 1]
        assert token == (END if new else found["targets"][i - 1])


def test_tokens_keep_their_segments():
    for number, row in enumerate(ROWS):
        found = SPANS(number, row)
        marked = sorted(zip(found["inputs"], found["input_segments"], strict=True))
        marked += zip(found["targets"][:-1], found["segments"][:-1], strict=True)
        plain = sorted((int(t), int(s)) for t, s in marked if t <= MASK - COUNT)
        assert plain == sorted((int(t), int(s)) for t, s in zip(row["tokens"], row["segments"], strict=True))


def test_spans_start_everywhere_and_padding_weighs_nothing():
    starts = set()
    for number in range(400):
        found = SPANS(number, ROWS[0])
        starts.add(int(np.argmax(found["inputs"] > MASK - COUNT)))
    assert len(starts) > CONTEXT // 2
    found = SPANS(0, SHORT)
    np.testing.assert_array_equal(found["loss_weights"] > 0, found["segments"] > 0)
    assert 0 < found["loss_weights"].sum() < len(found["targets"])
