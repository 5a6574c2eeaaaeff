"""Words: the text against the dots that are read from the pixels, splits, lengths."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tpu.errors import UserError
from train.data.made import words
from train.data.made.drawing import _ROWS


def read(image: np.ndarray, dot: float) -> str:
    """The text in a picture [S, S, 3] whose font has dots of `dot` pixels: its ink's box is cut into a grid of dots."""
    ground = image[0, 0].astype(float)
    there = np.abs(image - ground).sum(-1)
    there /= there.max()
    # Edges of the box to a part of a pixel: a border pixel is as dark as it is covered.
    rows, columns = there.max(1), there.max(0)
    top, left = (np.nonzero(edge)[0][0] + 1 - edge[np.nonzero(edge)[0][0]] for edge in (rows, columns))
    width = (np.nonzero(columns)[0][-1] + columns[np.nonzero(columns)[0][-1]] - left) / dot
    text = ""
    for start in range(0, round(width) + 1, 6):
        cells = [[int(top + (y + 0.5) * dot), int(left + (start + x + 0.5) * dot)] for y in range(7) for x in range(5)]
        bits = [y < len(image) and x < len(image) and there[y, x] > 0.5 for y, x in cells]
        distance = {
            name: sum((c == "#") != bit for c, bit in zip(r.replace(" ", ""), bits, strict=True))
            for name, r in _ROWS.items()
        }
        name = min(distance, key=distance.__getitem__)
        text += name if distance[name] == 0 else "?"
    return text


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_text_is_what_the_picture_says(split):
    read_off = 0
    for index in range(150):
        record = words.make("read", 6, split, index, 256)
        (image,) = record.images
        assert image.shape == (256, 256, 3)
        text, word = record.turns[1].text, words.word(6, split, index)
        first, last = text[0], text[-1]
        if _ROWS[first].replace(" ", "")[::5].count("#") and _ROWS[last].replace(" ", "")[4::5].count("#"):
            assert read(image, word.dot * 256) == text  # glyphs that do not fill their box at the ends are left out
            read_off += 1
    assert read_off > 90


def test_texts_fit_and_are_dark_enough():
    for index in range(300):
        word = words.word(0, "train", index)
        image = words.draw(word, 64)
        ground = np.array(word.background)
        for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
            assert (edge == ground).all()
        assert word.dot * 64 > 1.3
        assert np.abs(np.array(word.ink) - ground).sum() > 250


def test_words_and_numbers_of_all_lengths():
    texts = [words.word(0, "train", n).text for n in range(4_000)]
    lengths = Counter(len(text) for text in texts)
    assert set(lengths) == {2, 3, 4, 5, 6}
    assert min(lengths.values()) > 600
    assert all(text.isalpha() or text.isdigit() for text in texts)
    assert sum(text.isdigit() for text in texts) / len(texts) == pytest.approx(0.5, abs=0.04)
    assert set("".join(texts)) == set(words.LETTERS + words.DIGITS)


def test_no_text_is_in_both_splits():
    train = {words.word(0, "train", n).text for n in range(2_500)}
    test = {words.word(1, "test", n).text for n in range(2_500)}
    assert not train & test
    assert set("".join(test)) == set(words.LETTERS + words.DIGITS)


def test_bad_arguments_are_named():
    for arguments, message in (
        (("caption", 0, "train", 0), "task='caption'.*read"),
        (("read", 0, "valid", 0), "split='valid'"),
        (("read", 0, "train", 0, 63), "size=63: .* valid: 64"),
    ):
        with pytest.raises(UserError, match=message):
            words.make(*arguments)
