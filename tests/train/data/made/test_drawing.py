"""Shapes, letters and splits: areas against formulas, the world's borders, and splits that never change."""

from __future__ import annotations

import numpy as np
import pytest

from tpu.errors import UserError
from train.data.made import drawing


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi * 0.93**2),
        ("square", 1.64**2),
        ("triangle", 1.75),
        ("cross", 4 * 0.3 * 0.92 * 2 - 0.6**2),
        ("diamond", 2 * 0.78),
        ("star", 10 * 0.5 * 0.46 * np.sin(np.pi / 5)),  # ten triangles with sides 1 and 0.46
    ],
)
@pytest.mark.parametrize("radius", [6.4, 9.0, 21.3])
def test_a_shape_covers_its_area(shape, area, radius):
    coverage = drawing.shape_coverage(shape, radius)
    assert coverage.shape == (2 * int(np.ceil(radius)),) * 2
    assert coverage.sum() == pytest.approx(area * radius**2, rel=0.04)  # it is sampled
    assert (coverage > 0).any(0).sum() <= 2 * np.ceil(radius)
    np.testing.assert_allclose(coverage, coverage[:, ::-1], atol=0.04)  # all are symmetric


def test_what_leaves_at_a_side_comes_in_at_the_other():
    ground = drawing.BACKGROUNDS[0]
    middle = drawing.canvas(64, ground)
    drawing.stamp(middle, "star", "red", ground, (0.5, 0.5), 0.13)
    assert (middle != ground).any(-1).sum() > 50
    for x, y in [(0.0, 0.5), (0.5, 0.98), (0.02, 0.03), (0.99, 0.99)]:
        image = drawing.canvas(64, ground)
        drawing.stamp(image, "star", "red", ground, (x, y), 0.13)
        moved = np.roll(middle, (round(y * 64) - 32, round(x * 64) - 32), (0, 1))
        np.testing.assert_array_equal(image, moved)


def test_glyphs_differ_and_text_covers_its_dots():
    glyphs = {name: rows.replace(" ", "") for name, rows in drawing._ROWS.items()}
    assert sorted(glyphs) == sorted("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    for a in glyphs:
        assert len(glyphs[a]) == 35
        assert all(sum(x != y for x, y in zip(glyphs[a], glyphs[b], strict=True)) >= 2 for b in glyphs if a != b)
    coverage = drawing.text_coverage("HI", 64, 3.3, 5.7, 1.6)
    assert coverage.sum() == pytest.approx((glyphs["H"] + glyphs["I"]).count("#") * 1.6**2, rel=1e-4)
    rows, columns = np.nonzero(coverage > 1e-6)
    assert (columns.min(), columns.max()) == (3, int(3.3 + drawing.text_width("HI") * 1.6))
    assert (rows.min(), rows.max()) == (5, int(5.7 + 7 * 1.6))


def test_a_split_holds_its_share_and_never_changes():
    splits = [drawing.split_of(f"thing {n}") for n in range(20_000)]
    assert splits.count("test") / len(splits) == pytest.approx(drawing.TEST_SHARE, abs=0.012)  # four deviations
    assert [drawing.split_of(f"thing {n}") for n in range(8)] == PINNED
    drawn = iter([None, "thing 0", None, "thing 1", "thing 2", "thing 3", "thing 4", "thing 5", "thing 6", "thing 7"])
    first = PINNED.index("test")
    assert drawing.fitting("test", lambda: next(drawn), str) == f"thing {first}"


def test_bad_arguments_are_named():
    for arguments, message in (
        ((0, "a", "valid", 0), "split='valid'.*train, test"),
        ((-1, "a", "train", 0), "seed=-1"),
        ((0, "a", "train", -2), "index=-2"),
    ):
        with pytest.raises(UserError, match=message):
            drawing.generator(*arguments)
    with pytest.raises(UserError, match=r"size=31: .* valid: 32"):
        drawing.canvas(31, (0, 0, 0))


# Data sets of earlier runs must keep their splits, so these are written down.
PINNED = ["train", "test", "train", "train", "train", "test", "train", "train"]
