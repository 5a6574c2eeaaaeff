"""Resizing against Pillow, against torch (recorded, and fresh where it is at hand), and by what any resize keeps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tpu.errors import UserError
from train.data.images.resize import METHODS, fit, padded_size, resize

SIDE = st.integers(1, 40)
METHOD = st.sampled_from(METHODS)
DTYPE = st.sampled_from([np.uint8, np.float32])
KERNELS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}

# F.interpolate(..., align_corners=False) of torch 2.13 on this image, by (method, antialias) and the size asked.
SMALL = np.array([[0, 10, 40, 20], [90, 30, 60, 5], [7, 80, 15, 100]], np.float32)[..., None] / 100
RECORDED = {
    ("bicubic", False, (2, 2)): [[0.1491541, 0.3281311], [0.532478, 0.478479]],
    ("bicubic", False, (4, 2)): [
        [-0.0176025, 0.3263305],
        [0.3820244, 0.3264351],
        [0.6049356, 0.4138657],
        [0.4904869, 0.5256142],
    ],
    ("bicubic", False, (5, 7)): [
        [-0.102989, -0.0478772, 0.0573759, 0.262075, 0.385137, 0.289549, 0.1978904],
        [0.4354867, 0.2952031, 0.1398803, 0.3416663, 0.5020366, 0.2448243, 0.0300823],
        [0.9595302, 0.6771046, 0.3204719, 0.4453126, 0.5823888, 0.2558582, -0.0045691],
        [0.4406122, 0.5298775, 0.6240401, 0.4686338, 0.3421138, 0.5073412, 0.6485395],
        [-0.0947759, 0.3281511, 0.8331646, 0.46552, 0.1288863, 0.7101901, 1.1888689],
    ],
    ("bicubic", True, (2, 2)): [[0.2829083, 0.2790433], [0.4854646, 0.509265]],
    ("bicubic", True, (4, 2)): [
        [0.0584634, 0.2864885],
        [0.4379889, 0.2731476],
        [0.5681154, 0.421047],
        [0.367265, 0.6374667],
    ],
    ("bicubic", True, (5, 7)): [
        [-0.0800481, -0.0332159, 0.0687714, 0.2553066, 0.386265, 0.2752069, 0.1975508],
        [0.3691038, 0.2778139, 0.1465205, 0.3303032, 0.4833748, 0.2343548, 0.0742743],
        [0.9475963, 0.7073137, 0.3179422, 0.446875, 0.584321, 0.2275835, 0.0063702],
        [0.3830008, 0.4836392, 0.6328057, 0.4682416, 0.3225972, 0.5442894, 0.6873065],
        [-0.0585129, 0.2857319, 0.822321, 0.4690566, 0.1371235, 0.7554828, 1.1475078],
    ],
    ("bilinear", False, (2, 2)): [[0.1875, 0.30625], [0.47625, 0.5125]],
    ("bilinear", False, (4, 2)): [[0.05, 0.3], [0.39375, 0.315625], [0.538125, 0.41875], [0.435, 0.575]],
    ("bilinear", True, (2, 2)): [[0.2875, 0.2901786], [0.4714286, 0.5]],
    ("bilinear", True, (4, 2)): [
        [0.1, 0.2714286],
        [0.4125, 0.3026786],
        [0.5228571, 0.4285714],
        [0.3942857, 0.6071429],
    ],
    ("nearest", True, (2, 2)): [[0.1, 0.2], [0.8, 1.0]],
    ("nearest", True, (5, 2)): [[0.1, 0.2], [0.1, 0.2], [0.3, 0.05], [0.8, 1.0], [0.8, 1.0]],
}


def image(height, width, channels=3, dtype=np.uint8, seed=0):
    """Noise, which no smoothness hides errors in."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return values if dtype == np.uint8 else (values / 255).astype(dtype)


def apart(array, H, W, method):
    """Without the rows and columns whose centre is on the border of two pixels, where "nearest" is how one rounds."""
    if method != "nearest":
        return array
    keep = [(2 * np.arange(out) + 1) * size % (2 * out) != 0 for size, out in zip((H, W), array.shape[:2], strict=True)]
    return array[keep[0]][:, keep[1]]


@pytest.mark.parametrize(("method", "antialias", "size"), RECORDED)
def test_floats_equal_torch_as_recorded(method, antialias, size):
    found = resize(SMALL, *size, method, antialias)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[..., 0], RECORDED[method, antialias, size], atol=1e-6)


def test_antialias_and_the_two_cubic_kernels_are_told_apart():
    # Enlarging, antialias only changes a from -0.75 to -0.5; the recorded cases above would catch either for the other.
    assert np.abs(resize(SMALL, 5, 7) - resize(SMALL, 5, 7, antialias=False)).max() > 0.02
    assert np.abs(resize(SMALL, 2, 2) - resize(SMALL, 2, 2, antialias=False)).max() > 0.02


SIZES = [(64, 48, 24, 31), (17, 33, 64, 20), (224, 300, 14, 14), (14, 14, 37, 23), (5, 1, 1, 9), (100, 100, 99, 101)]
TORCH = """
import torch
import torch.nn.functional as F
found = {}
for key, height, width, name, mode, antialias in zip(*(given[k] for k in ("key", "h", "w", "image", "mode", "aa"))):
    array = torch.from_numpy(given[str(name)]).permute(2, 0, 1)[None]
    more = {} if "nearest" in str(mode) else dict(align_corners=False, antialias=bool(antialias))
    out = F.interpolate(array, size=(int(height), int(width)), mode=str(mode), **more)
    found[str(key)] = out[0].permute(1, 2, 0).numpy()
"""


def test_floats_equal_torch_at_all_sizes(peer):
    cases = list(itertools.product(range(len(SIZES)), METHODS, (False, True)))
    images = {f"image{i}": image(H, W, dtype=np.float32, seed=i) for i, (H, W, _, _) in enumerate(SIZES)}
    found = peer(
        TORCH,
        key=np.arange(len(cases)).astype(str),
        h=np.array([SIZES[i][2] for i, _, _ in cases]),
        w=np.array([SIZES[i][3] for i, _, _ in cases]),
        image=np.array([f"image{i}" for i, _, _ in cases]),
        mode=np.array([{"nearest": "nearest-exact"}.get(method, method) for _, method, _ in cases]),
        aa=np.array([antialias for _, _, antialias in cases]),
        **images,
    )
    for key, (i, method, antialias) in enumerate(cases):
        ours = resize(images[f"image{i}"], *SIZES[i][2:], method, antialias)
        both = [apart(array, *SIZES[i][:2], method) for array in (ours, found[str(key)])]
        np.testing.assert_allclose(*both, atol=1e-5, rtol=0, err_msg=f"{SIZES[i]} {method} {antialias}")


@settings(max_examples=100)
@given(H=SIDE, W=SIDE, height=SIDE, width=SIDE, method=METHOD, seed=st.integers(0, 9))
def test_uint8_equals_pillow(H, W, height, width, method, seed):
    given = image(H, W, 3, seed=seed)
    wanted = np.asarray(Image.fromarray(given).resize((width, height), KERNELS[method]))
    found = resize(given, height, width, method)
    np.testing.assert_array_equal(apart(found, H, W, method), apart(wanted, H, W, method))


def test_nearest_takes_the_later_of_two_as_near():
    given = image(1, 2)
    np.testing.assert_array_equal(resize(given, 1, 7, "nearest")[0], given[0][[0, 0, 0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(resize(given, 1, 1, "nearest")[0], given[0][[1]])


@settings(max_examples=60)
@given(H=SIDE, W=SIDE, height=SIDE, width=SIDE, method=st.sampled_from(["bicubic", "bilinear"]))
def test_floats_and_bytes_are_the_same_resize(H, W, height, width, method):
    # Levels of 64 to 191 overshoot to no more than 32 to 223: Pillow clips nowhere, and rounds twice.
    given = image(H, W, 2) // 2 + 64
    floats = resize(given.astype(np.float32), height, width, method)
    assert np.abs(floats - resize(given, height, width, method)).max() <= 1.2


@settings(max_examples=60)
@given(
    H=SIDE,
    W=SIDE,
    height=SIDE,
    width=SIDE,
    method=METHOD,
    dtype=DTYPE,
    antialias=st.booleans(),
    level=st.integers(0, 255),
)
def test_a_constant_stays_constant(H, W, height, width, method, dtype, antialias, level):
    out = resize(np.full((H, W, 1), level, dtype), height, width, method, antialias)
    assert (out.shape, out.dtype) == ((height, width, 1), dtype)
    np.testing.assert_allclose(out, level, rtol=1e-5)


@settings(max_examples=60)
@given(H=SIDE, W=SIDE, C=st.integers(1, 5), method=METHOD, dtype=DTYPE, antialias=st.booleans())
def test_the_same_size_is_the_same_image(H, W, C, method, dtype, antialias):
    given = image(H, W, C, dtype)
    np.testing.assert_allclose(resize(given, H, W, method, antialias), given, atol=1e-6)


@settings(max_examples=40)
@given(H=SIDE, W=SIDE, height=SIDE, width=SIDE, method=METHOD, antialias=st.booleans())
def test_sides_and_channels_are_independent(H, W, height, width, method, antialias):
    given = image(H, W, 2, np.float32)
    whole = resize(given, height, width, method, antialias)
    turned = resize(given.swapaxes(0, 1), width, height, method, antialias).swapaxes(0, 1)
    np.testing.assert_allclose(turned, whole, atol=1e-5)
    np.testing.assert_allclose(resize(given[..., 1:], height, width, method, antialias), whole[..., 1:], atol=1e-6)


def test_uint8_without_antialias_is_rounded_and_clipped():
    edge = np.array([[0, 0, 255, 255]], np.uint8)[..., None]
    floats = resize(edge.astype(np.float32), 1, 12, antialias=False)
    assert floats.min() < -5
    assert floats.max() > 260
    out = resize(edge, 1, 12, antialias=False)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, np.clip(np.rint(floats), 0, 255))


# Fitting


def test_squash_is_a_resize():
    given = image(30, 50)
    np.testing.assert_array_equal(fit(given, 20, 20), resize(given, 20, 20))


@settings(max_examples=60)
@given(H=SIDE, W=SIDE, height=SIDE, width=SIDE, dtype=DTYPE)
@example(H=40, W=1, height=1, width=40, dtype=np.uint8)
def test_pad_keeps_the_whole_in_the_middle(H, W, height, width, dtype):
    given, fill = np.full((H, W, 3), 1, dtype), (7, 8, 9)
    out = fit(given, height, width, "pad", fill)
    assert (out.shape, out.dtype) == ((height, width, 3), dtype)
    inside = np.isclose(out, 1, atol=1e-5).all(-1)
    h, w = padded_size(H, W, height, width)
    assert inside.sum() == h * w
    assert h == height or w == width
    # No side is off by a pixel or more: H : W = h : w, rounded up.
    scale = min(height / H, width / W)
    assert H * scale - 1e-6 <= h < H * scale + 1 + 1e-6
    assert W * scale - 1e-6 <= w < W * scale + 1 + 1e-6
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert 0 <= (height - 1 - rows[-1]) - rows[0] <= 1
    assert 0 <= (width - 1 - columns[-1]) - columns[0] <= 1
    np.testing.assert_array_equal(out[~inside], np.broadcast_to(np.array(fill, dtype), out[~inside].shape))


@settings(max_examples=60)
@given(H=SIDE, W=SIDE, height=SIDE, width=SIDE, dtype=DTYPE)
def test_crop_fills_all_of_it(H, W, height, width, dtype):
    out = fit(np.full((H, W, 1), 3, dtype), height, width, "crop", fill=9)
    assert out.shape == (height, width, 1)
    np.testing.assert_allclose(out, 3, rtol=1e-5)


def test_crop_is_clips():
    # Shorter side to 4; of the longer, 4 * 11 // 6 = 7, the middle 4 from round(3 / 2) = 2.
    given = image(6, 11)
    pillow = Image.fromarray(given).resize((7, 4), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fit(given, 4, 4, "crop"), np.asarray(pillow)[:, 2:6])
    pillow = Image.fromarray(given.swapaxes(0, 1)).resize((4, 7), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fit(given.swapaxes(0, 1), 4, 4, "crop"), np.asarray(pillow)[2:6])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: resize(image(4, 4), 0, 4), "height=0 width=4"),
        (lambda: resize(image(4, 4), 4, 4, "lanczos"), "method='lanczos'.*bicubic, bilinear, nearest"),
        (lambda: resize(image(4, 4)[..., 0], 4, 4), r"uint8 \[4, 4\].*\[H, W, C\]"),
        (lambda: resize(image(4, 4).astype(np.float64), 4, 4), "float64.*uint8 or float32"),
        (lambda: resize(image(0, 4), 4, 4), r"\[0, 4, 3\]"),
        (lambda: fit(image(4, 4), 4, 4, "stretch"), "how='stretch'.*squash, pad, crop"),
        (lambda: fit(image(4, 4), 8, 4, "pad", (1, 2)), r"fill=\(1, 2\).*3 channels"),
    ],
)
def test_refusals_say_what_was_given_and_what_is_valid(call, words):
    with pytest.raises(UserError, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)
