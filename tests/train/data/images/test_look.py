"""Images of any kind become what the model takes: squares, tiles, frames with times, or packed at their own sizes."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.config import ModelConfig, VisionConfig
from tpu.errors import UserError
from train.config import DataConfig
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.images.look import look

VISION = VisionConfig(encoder="vit", image_size=16, patch_size=4, embed_dim=16, heads=2, positions="rope")
MODEL = ModelConfig(vocab_size=300, embed_dim=16, heads=2, fusion="merge", vision=VISION).resolved()
POOLING = dataclasses.replace(MODEL, vision=dataclasses.replace(VISION, connector="merger").resolved(16))
DATA = DataConfig(images=4)
NATIVE = DataConfig(image_fit="native", patches=64)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def about(*images: object, text: str | None = None) -> Conversation:
    text = IMAGE * len(images) + "what?" if text is None else text
    return Conversation("record 7", (Turn("user", text), Turn("assistant", "a")), images)


def gif(frames: list[np.ndarray], milliseconds: int) -> bytes:
    file = io.BytesIO()
    first, *rest = (Image.fromarray(frame).convert("P") for frame in frames)
    first.save(file, "GIF", save_all=True, append_images=rest, duration=milliseconds)
    return file.getvalue()


def test_squares():
    conversation, vectors, fields, _ = look(about(noise(16, 16), noise(40, 20)), DATA, MODEL)
    assert vectors == (16, 16)
    assert conversation.turns[0].text == f"{IMAGE}{IMAGE}what?"
    assert fields["images"].shape == (4, 16, 16, 3)
    assert fields["image_segments"].tolist() == [1, 1, 0, 0]
    np.testing.assert_array_equal(fields["images"][0], noise(16, 16))
    assert not fields["images"][2:].any()


@pytest.mark.parametrize("how", ["squash", "pad", "crop", "tiles", "native"])
def test_every_fit_resizes_with_the_filter_that_is_asked_for(how):
    image, found = noise(30, 45), {}
    for name in ("bicubic", "bilinear"):
        data = dataclasses.replace(DATA, image_fit=how, image_resample=name, images=8, patches=64)
        found[name] = look(about(image), data, MODEL).fields["images"]
        if how == "squash":
            wanted = Image.fromarray(image).resize((16, 16), getattr(Image.Resampling, name.upper()))
            np.testing.assert_array_equal(found[name][0], np.asarray(wanted))
    assert (found["bicubic"] != found["bilinear"]).any()


def test_one_channel_is_the_mean_of_three():
    grey = dataclasses.replace(MODEL, vision=dataclasses.replace(VISION, channels=1))
    images = look(about(noise(16, 16)), DATA, grey).fields["images"]
    assert images.shape == (4, 16, 16, 1)
    np.testing.assert_array_equal(images[0, ..., 0], noise(16, 16).mean(-1).round())


def test_other_fusions_give_the_text_no_vectors():
    model = ModelConfig(vocab_size=300, embed_dim=16, heads=2, fusion="cross", vision=VISION).resolved()
    assert look(about(noise(9, 9)), DATA, model).vectors == (0,)


def test_tiles_are_an_overview_and_the_parts():
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 32:] = 200
    data = dataclasses.replace(DATA, image_fit="tiles", images=5, max_tiles=4)
    conversation, vectors, fields, _ = look(about(image), data, MODEL)
    count = int(fields["image_segments"].sum())
    assert conversation.turns[0].text == IMAGE * count + "what?"
    assert vectors == (16,) * count
    assert count == 1 + 2  # one row of two tiles keeps all that 32 x 64 has
    left, right = fields["images"][1:3]
    assert not left[:, :12].any()  # Resampling reaches a few pixels across the border.
    assert (right[:, 4:] == 200).all()


def test_more_tiles_than_a_row_holds_are_refused():
    with pytest.raises(UserError, match=r"record 7: 5 images; a row holds data.images=4"):
        look(about(noise(40, 40)), dataclasses.replace(DATA, image_fit="tiles"), MODEL)


def test_the_tiles_of_a_frame_have_its_time():
    frames = [np.full((16, 32, 3), value, np.uint8) for value in (0, 200)]
    data = dataclasses.replace(DATA, image_fit="tiles", images=6, max_tiles=2, frames=2)
    conversation, _, _, _ = look(about(gif(frames, 500)), data, MODEL)
    assert conversation.turns[0].text == IMAGE * 6 + "what?"
    assert conversation.times == (0.0,) * 3 + (0.5,) * 3


def test_images_need_not_be_square():
    wide = dataclasses.replace(MODEL, vision=dataclasses.replace(VISION, image_width=32))
    _, vectors, fields, _ = look(about(noise(16, 32)), DATA, wide)
    assert vectors == (32,)
    np.testing.assert_array_equal(fields["images"][0], noise(16, 32))


def test_more_images_than_have_positions_are_refused():
    few = dataclasses.replace(MODEL, vision=dataclasses.replace(VISION, image_positions=2))
    with pytest.raises(UserError, match=r"record 7: 3 images; model.vision.image_positions=2 tells no more"):
        look(about(*[noise(4, 4)] * 3), DATA, few)


@pytest.mark.parametrize("how", ["squash", "native"])
def test_the_rows_and_columns_of_an_image_s_vectors_are_told(how):
    data = dataclasses.replace(NATIVE, image_fit=how)
    _, vectors, _, grids = look(about(noise(8, 24)), data, POOLING)
    assert grids == (((1, 3),) if how == "native" else ((2, 2),))
    assert vectors == (grids[0][0] * grids[0][1],)


def test_the_limit_of_megapixels_is_the_experiment_s():
    data = dataclasses.replace(DATA, max_megapixels=0.001)
    assert look(about(noise(20, 50)), data, MODEL).vectors == (16,)
    with pytest.raises(UserError, match=r"record 7, image 1: 20 x 51 pixels .* at most 0.001"):
        look(about(noise(20, 51)), data, MODEL)


def test_an_animated_file_becomes_frames_with_times():
    frames = [np.full((16, 16, 3), value, np.uint8) for value in (0, 100, 200)]
    data = dataclasses.replace(DATA, frames=3)
    conversation, _, fields, _ = look(about(gif(frames, 500)), data, MODEL)
    assert conversation.times == (0.0, 0.5, 1.0)
    assert conversation.turns[0].text == IMAGE * 3 + "what?"
    np.testing.assert_allclose(fields["images"][:3].mean((1, 2, 3)), [0, 100, 200], atol=3)


def test_still_images_stay_one_where_others_move():
    frames = [np.full((16, 16, 3), value, np.uint8) for value in (0, 200)]
    data = dataclasses.replace(DATA, frames=2)
    record = about(noise(16, 16), gif(frames, 100), text=f"a{IMAGE}b{IMAGE}c")
    conversation, _, fields, _ = look(record, data, MODEL)
    assert conversation.turns[0].text == f"a{IMAGE}b{IMAGE}{IMAGE}c"
    assert fields["image_segments"].tolist() == [1, 1, 1, 0]
    still = about(noise(16, 16))
    assert look(still, data, MODEL).conversation.times == ()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(10, 40), st.integers(10, 40)), min_size=1, max_size=4), st.booleans())
def test_native_sizes_are_packed_whole(sizes, pooling):
    model = POOLING if pooling else MODEL
    near = model.vision.shrink
    _, vectors, fields, _ = look(about(*(noise(*size) for size in sizes)), NATIVE, model)
    segments, positions = fields["image_segments"], fields["image_positions"]
    assert fields["images"].shape == (64, 4, 4, 3)
    for number, of_image in enumerate(vectors, start=1):
        here = positions[segments == number]
        rows, columns = here.max(0) + 1
        assert rows * columns == len(here) == of_image * near**2
        assert sorted(map(tuple, here)) == [(r, c) for r in range(rows) for c in range(columns)]
        groups = here.reshape(-1, near**2, 2) // near  # what becomes one vector lies together
        assert (groups == groups[:, :1]).all()
    assert (np.diff(segments[segments > 0]) >= 0).all()
    assert not fields["images"][segments == 0].any()


def test_native_pixels_are_where_their_positions_say():
    image = noise(16, 24)
    _, _, fields, _ = look(about(image), NATIVE, POOLING)
    for patch, (row, column), segment in zip(
        fields["images"], fields["image_positions"], fields["image_segments"], strict=True
    ):
        if segment:
            np.testing.assert_array_equal(patch, image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4])


def test_what_is_wrong_is_named():
    with pytest.raises(UserError, match=r"record 7, image 2.*no image"):
        look(about(noise(4, 4), b"not an image"), DATA, MODEL)
    with pytest.raises(UserError, match=r"record 7: 1 <image> in the text, 2 images"):
        look(about(noise(4, 4), noise(4, 4), text=f"{IMAGE}?"), DATA, MODEL)
    with pytest.raises(UserError, match=r"record 7: 5 images; a row holds data.images=4"):
        look(about(*[noise(4, 4)] * 5), DATA, MODEL)
    with pytest.raises(UserError, match=r"record 7, image 1: height=1 width=300: one side is more than 200 times"):
        look(about(noise(1, 300)), NATIVE, MODEL)
    large = dataclasses.replace(MODEL, vision=dataclasses.replace(VISION, image_size=32))
    with pytest.raises(UserError, match=r"record 7, image 1: 1 x 60000 pixels .* at most 40 megapixels: crop or split"):
        look(about(noise(1, 60_000)), dataclasses.replace(DATA, image_fit="crop"), large)
    with pytest.raises(UserError, match=r"record 7: its images take .* data.patches=3"):
        look(about(*[noise(16, 16)] * 4), dataclasses.replace(NATIVE, patches=3), MODEL)
