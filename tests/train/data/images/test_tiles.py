"""Native resolution, packing and tiles: as transformers, recorded and fresh where it is at hand, and by properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu.errors import UserError
from train.data.images.resize import fit, padded_size
from train.data.images.tiles import best_grid, patches, smart_resize, tiles

SIDE = st.integers(1, 6000)
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]  # LLaVA-NeXT's, with tiles of 336
WIDE = (256 * 784, 1280 * 784)

# smart_resize of transformers 5.23, models/qwen2_vl: with the bounds of the paper, and with WIDE.
SMART = {
    (28, 28): ((56, 56), (448, 448)),
    (1, 1): ((56, 56), (448, 448)),
    (14, 14): ((56, 56), (448, 448)),  # 14 / 28 rounds to even, 0
    (42, 42): ((56, 56), (448, 448)),  # and 42 / 28 to 2
    (70, 98): ((56, 112), (392, 532)),
    (224, 224): ((224, 224), (448, 448)),
    (480, 640): ((476, 644), (476, 644)),
    (1080, 1920): ((1092, 1932), (728, 1316)),
    (3000, 4000): ((2996, 4004), (840, 1148)),
    (6000, 8000): ((3080, 4116), (840, 1148)),
    (9, 1800): ((28, 812), (56, 6356)),
    (1800, 9): ((812, 28), (6356, 56)),
    (13, 500): ((28, 364), (84, 2800)),
    (56, 55): ((56, 56), (476, 448)),
    (4000, 20): ((4004, 28), (6356, 56)),
}
# select_best_resolution and get_patch_output_size of transformers 5.23: the grid, and the image's size inside it.
BEST = {
    (100, 100): ((1, 2), (336, 336)),
    (336, 336): ((1, 2), (336, 336)),
    (500, 500): ((2, 2), (672, 672)),
    (480, 640): ((2, 2), (504, 672)),
    (300, 900): ((1, 3), (336, 1008)),
    (900, 300): ((3, 1), (1008, 336)),
    (2000, 1000): ((2, 1), (672, 336)),
    (672, 1008): ((2, 2), (448, 672)),
    (1, 1): ((1, 2), (336, 336)),
    (400, 336): ((2, 1), (400, 336)),
    (5000, 4000): ((2, 2), (672, 538)),
}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# Native resolution


@pytest.mark.parametrize("size", SMART)
def test_smart_resize_equals_transformers_as_recorded(size):
    assert (smart_resize(*size), smart_resize(*size, 28, *WIDE)) == SMART[size]


SMART_PEER = """
import ast, math, pathlib, transformers
path = pathlib.Path(transformers.__file__).parent / "models/qwen2_vl/image_processing_qwen2_vl.py"
[definition] = [n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == "smart_resize"]
names = {"math": math}
exec(ast.unparse(definition), names)  # The module itself needs torchvision.
found = {"sizes": [names["smart_resize"](*(int(x) for x in row)) for row in given["rows"]]}
"""


def test_smart_resize_equals_transformers_at_any_size(peer):
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(3000):
        factor = int(draw.choice([1, 14, 28, 32]))
        least, most = sorted(int(x) for x in 10 ** draw.uniform(3, 7.5, 2))
        h, w = (int(x) for x in 10 ** draw.uniform(0, 4, 2))
        if max(h, w) <= 200 * min(h, w):
            rows.append((h, w, factor, least, most))
    found = peer(SMART_PEER, rows=np.array(rows))["sizes"]
    assert [smart_resize(*row) for row in rows] == [tuple(size) for size in found.tolist()]


@settings(max_examples=300)
@given(height=SIDE, width=SIDE, factor=st.sampled_from([14, 28, 32]))
def test_smart_resize_divides_and_stays_within_bounds(height, width, factor):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(UserError, match=f"height={height} width={width}.*200 times"):
            smart_resize(height, width, factor)
        return
    h, w = smart_resize(height, width, factor)
    assert h % factor == w % factor == 0
    assert 4 * 28 * 28 <= h * w <= 16384 * 28 * 28
    assert min(h, w) >= factor
    if factor / 2 < min(height, width):  # The shape is kept up to rounding each side.
        assert (h - factor) / (w + factor) <= height / width <= (h + factor) / max(w - factor, 1e-9)


def test_smart_resize_takes_a_ratio_of_200():
    assert smart_resize(20, 4000) == (28, 4004)
    with pytest.raises(UserError, match="more than 200"):
        smart_resize(20, 4001)


@pytest.mark.parametrize("given", [(0, 5), (5, 0), (-1, 5), (5, 5, 0), (5, 5, 28, 9, 8), (5, 5, 28, 0, 8)])
def test_smart_resize_refuses_what_has_no_answer(given):
    with pytest.raises(UserError, match="must be at least 1"):
        smart_resize(*given)


# Patches


def test_patches_lie_row_by_row():
    image = noise(6, 9, 2)
    array, grid = patches(image, 3)
    assert grid == (2, 3)
    assert array.shape == (6, 18)
    np.testing.assert_array_equal(array[4], image[3:6, 3:6].reshape(-1))


@settings(max_examples=50)
@given(
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    patch=st.integers(1, 5),
    channels=st.integers(1, 4),
    dtype=st.sampled_from([np.uint8, np.float32]),
)
def test_patches_lose_nothing(h, w, patch, channels, dtype):
    image = noise(h * patch, w * patch, channels).astype(dtype)
    array, grid = patches(image, patch)
    assert array.dtype == dtype
    back = array.reshape(*grid, patch, patch, -1).swapaxes(1, 2).reshape(image.shape)
    np.testing.assert_array_equal(back, image)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: patches(noise(6, 8, 3), 4), r"patch=4.*\[6, 8, 3\]"),
        (lambda: patches(noise(6, 8), 2), r"patch=2.*\[6, 8\]"),
        (lambda: patches(noise(0, 8, 3), 2), r"\[0, 8, 3\]"),
        (lambda: patches(noise(6, 8, 3), 0), "patch=0"),
    ],
)
def test_patches_refuse_what_does_not_divide(call, words):
    with pytest.raises(UserError, match=words):
        call()


# Tiles


@pytest.mark.parametrize("size", BEST)
def test_the_best_grid_equals_transformers_as_recorded(size):
    grid, inside = BEST[size]
    assert best_grid(*size, GRIDS, 336) == grid
    assert padded_size(*size, grid[0] * 336, grid[1] * 336) == inside


BEST_PEER = """
from transformers import image_processing_utils as u
u.get_image_size = lambda size, channel_dim: size  # It would need Pillow.
tile, grids = int(given["tile"]), given["grids"].tolist()
sizes, targets = given["sizes"].tolist(), [(r * tile, c * tile) for r, c in grids]
best = [u.select_best_resolution(size, targets) for size in sizes]
inside = [u.get_patch_output_size(size, target, None) for size, target in zip(sizes, best)]
found = {"best": np.array(best) // tile, "inside": np.array(inside)}
"""


@pytest.mark.parametrize(("tile", "grids"), [(336, GRIDS), (384, [(r, c) for r in range(1, 7) for c in range(1, 7)])])
def test_the_best_grid_equals_transformers_at_any_size(peer, tile, grids):
    sizes = (10 ** np.random.default_rng(1).uniform(0, 3.8, (500, 2))).astype(int)
    found = peer(BEST_PEER, sizes=sizes, tile=np.array(tile), grids=np.array(grids))
    for (h, w), best, inside in zip(sizes.tolist(), found["best"].tolist(), found["inside"].tolist(), strict=True):
        assert best_grid(h, w, grids, tile) == tuple(best)
        assert padded_size(h, w, best[0] * tile, best[1] * tile) == tuple(inside)


@settings(max_examples=100)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_no_grid_keeps_more_pixels(height, width):
    def kept(grid):
        scale = min(grid[0] * 336 / height, grid[1] * 336 / width)
        return min(int(height * scale) * int(width * scale), height * width)

    best = best_grid(height, width, GRIDS[::-1], 336)
    assert kept(best) == max(kept(grid) for grid in GRIDS)
    assert best[0] * best[1] == min(r * c for r, c in GRIDS if kept((r, c)) == kept(best))


@settings(max_examples=30)
@given(height=st.integers(1, 60), width=st.integers(1, 60))
def test_tiles_put_together_are_the_padded_image(height, width):
    image = noise(height, width, 3)
    whole, *parts = tiles(image, 16, GRIDS, fill=(1, 2, 3))
    rows, columns = best_grid(height, width, GRIDS, 16)
    assert len(parts) == rows * columns
    np.testing.assert_array_equal(whole, fit(image, 16, 16))
    together = np.concatenate(
        [np.concatenate(parts[r * columns : (r + 1) * columns], axis=1) for r in range(rows)], axis=0
    )
    np.testing.assert_array_equal(together, fit(image, rows * 16, columns * 16, "pad", (1, 2, 3)))


@pytest.mark.parametrize("given", [(5, 5, [], 16), (5, 5, [(0, 1)], 16), (0, 5, GRIDS, 16), (5, 5, GRIDS, 0)])
def test_best_grid_refuses_what_has_no_answer(given):
    with pytest.raises(UserError, match=r"height=\d width=5 grids=.*at least 1"):
        best_grid(*given)
