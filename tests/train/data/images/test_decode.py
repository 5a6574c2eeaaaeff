"""Images in: every mode and format against known pixels, and what is broken, too large or hostile is refused."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from tpu.errors import UserError
from train.data.images.decode import Limits, decode, frames

LOSSLESS = ("PNG", "BMP", "TIFF", "WEBP")
FORMATS = (*LOSSLESS, "GIF", "JPEG")


def picture(height=24, width=36, channels=3):
    """Smooth, so that JPEG keeps it to a few levels, and different in every direction and channel."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) * 255 // max(height + width - 2, 1)]
    planes.append(255 - planes[0] // 2)
    return np.stack(planes[:channels], axis=-1).astype(np.uint8)


def saved(image, kind="PNG", **options):
    """The bytes of a file of a numpy array, or of an image of Pillow."""
    stream = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}) | options)
    return stream.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, pixels, more=b""):
    """A PNG whose header says what it is told to."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def refusal(*arguments, call=decode, **more):
    """What the refusal says; anything but one line of a UserError, and any warning, fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = outcome(call, *arguments, **more)
    assert isinstance(message, str)
    return message


def outcome(call, *arguments, **more):
    """What the call returns, or the one line of its UserError."""
    try:
        return call(*arguments, **more)
    except UserError as error:
        message = str(error)
    assert message.startswith(more.get("name", "image"))
    assert "\n" not in message
    return message


# Formats, modes, sources


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_come_back_exactly(kind):
    out = decode(saved(picture(), kind))
    assert (out.dtype, out.flags.writeable) == (np.uint8, True)
    np.testing.assert_array_equal(out, picture())


def test_jpeg_comes_back_nearly():
    assert np.abs(decode(saved(picture(), "JPEG", quality=95)).astype(int) - picture()).max() < 12


def test_gif_keeps_the_colours_of_its_palette():
    few = picture() // 128 * 128
    np.testing.assert_array_equal(decode(saved(few, "GIF")), few)


def test_all_sources_are_alike(tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(saved(picture()))
    for source in (path, str(path), path.read_bytes(), Image.open(path), Image.fromarray(picture()), picture()):
        np.testing.assert_array_equal(decode(source), picture())


@settings(max_examples=60)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "PA"]),
    kind=st.sampled_from([None, "PNG", "TIFF", "WEBP", "BMP", "JPEG", "GIF"]),
)
def test_every_mode_and_size_becomes_rgb(height, width, mode, kind):
    if mode == "I;16":
        image = Image.fromarray(picture(height, width)[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(picture(height, width, 4)).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    if kind is None:
        source = image
    else:
        try:
            source = saved(image, kind)
        except (OSError, ValueError):  # Pillow writes no such file.
            return
    out = decode(source)
    assert (out.shape, out.dtype) == ((height, width, 3), np.uint8)
    # Colour at the resolution of the mode; the opacity of RGBA and LA goes from 255 to 128.
    if kind not in ("JPEG", "GIF", "WEBP") and mode in ("RGB", "YCbCr", "CMYK", "HSV"):
        assert np.abs(out.astype(int) - picture(height, width)).max() <= 12


def test_one_bit_is_black_and_white():
    bits = picture()[..., 0] > 100
    np.testing.assert_array_equal(
        decode(saved(Image.fromarray(bits), "PNG")), np.where(bits, 255, 0)[..., None] + [0] * 3
    )


def test_alpha_lies_over_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 128], [0, 0, 0, 1]]], np.uint8)
    wanted = np.rint(rgba[..., :3] * (rgba[..., 3:] / 255) + 255 * (1 - rgba[..., 3:] / 255))
    for source in (rgba, Image.fromarray(rgba), *(saved(rgba, kind, exact=True) for kind in ("PNG", "TIFF", "WEBP"))):
        np.testing.assert_array_equal(decode(source), wanted)
    grey = np.array([[[40, 255], [40, 0], [40, 51]]], np.uint8)
    wanted = [[[40] * 3, [255] * 3, [212] * 3]]
    palette = Image.frombytes("PA", (3, 1), bytes([1, 255, 1, 0, 1, 51]))
    palette.putpalette(bytes([0, 0, 0, 40, 40, 40]))
    for image in (Image.fromarray(grey, "LA"), palette):
        np.testing.assert_array_equal(decode(image), wanted)
    np.testing.assert_array_equal(decode(saved(Image.fromarray(grey, "LA"))), wanted)


def test_every_colour_at_every_opacity_is_rounded():
    colour, alpha = np.mgrid[:256, :256]
    wanted = np.rint((colour * alpha + 255.0 * (255 - alpha)) / 255)
    rgba = np.stack([colour, colour, colour, alpha], axis=-1).astype(np.uint8)
    np.testing.assert_array_equal(decode(rgba), wanted[..., None] + [0] * 3)


@pytest.mark.parametrize(("clear", "opacity"), [(1, (255, 0, 255)), (bytes([255, 51, 0]), (255, 51, 0))])
def test_palettes_have_transparency(clear, opacity):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    colours = np.array([[200, 100, 0], [0, 50, 100], [9, 8, 7]])
    image.putpalette(colours.astype(np.uint8).tobytes())
    share = np.array(opacity)[:, None] / 255
    np.testing.assert_array_equal(
        decode(saved(image, transparency=clear)), [np.rint(colours * share + 255 * (1 - share))]
    )


def test_the_clear_colour_of_rgb_and_grey_is_white():
    np.testing.assert_array_equal(
        decode(saved(np.array([[[1, 2, 3], [3, 2, 1]]], np.uint8), transparency=(1, 2, 3))), [[[255] * 3, [3, 2, 1]]]
    )
    wide = chunk(b"tRNS", struct.pack(">H", 1000))
    pixels = zlib.compress(b"\0" + struct.pack(">HHH", 999, 1000, 65535))
    np.testing.assert_array_equal(decode(png(3, 1, 16, 0, pixels, wide))[0, :, 0], [4, 255, 255])


RAMP = np.arange(65536).reshape(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "I;16", "I;16B", "I", "TIFF of 32 bits"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    image = Image.fromarray(RAMP.astype(np.uint16))
    source = {
        "PNG": lambda: saved(image, "PNG"),
        "TIFF": lambda: saved(image, "TIFF"),
        "I;16": lambda: image,
        "I;16B": lambda: Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes()),
        "I": lambda: Image.fromarray(RAMP.astype(np.int32)),
        "TIFF of 32 bits": lambda: saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    }[kind]()
    out = decode(source)
    np.testing.assert_array_equal(out, np.rint(RAMP / 257)[..., None] + [0] * 3)


def test_twelve_bits_are_scaled_too():
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 8 * 12 + 4), (278, 1), (279, 3)]
    tags = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in entries)
    tiff = b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + b"\0\0\0\0" + b"\xff\xf8\x00"
    assert decode(tiff)[0, :, 0].tolist() == [255, round(0x800 / 4095 * 255)]


def test_values_without_a_scale_are_refused():
    assert "0 to 65536; at most 0 to 65535" in refusal(Image.fromarray(np.array([[0, 65536]], np.int32)))
    assert "-1 to 0" in refusal(saved(Image.fromarray(np.array([[0, -1]], np.int32)), "TIFF"), name="image 7")
    assert "float" in refusal(Image.fromarray(np.ones((2, 2), np.float32)))


@pytest.mark.parametrize("kind", [None, "TIFF", "JPEG"])
def test_cmyk_comes_back(kind):
    # JPEG stores what Adobe does, inverted: read without that, white is black.
    cmyk = Image.fromarray(picture()).convert("CMYK")
    out = decode(cmyk if kind is None else saved(cmyk, kind, **({"quality": 95} if kind == "JPEG" else {})))
    assert (kind == "JPEG") == (kind is not None and b"Adobe" in saved(cmyk, kind))
    assert np.abs(out.astype(int) - picture()).max() <= (16 if kind == "JPEG" else 1)
    inked = Image.fromarray(
        np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 0], [0, 102, 0, 51]]], np.uint8), "CMYK"
    )
    wanted = [[[255, 255, 255], [0, 0, 0], [0, 255, 255], [204, 122, 204]]]
    assert np.abs(decode(saved(inked, "TIFF")).astype(int) - wanted).max() <= 1


# What is shown for an EXIF orientation, as numpy has it: what the camera stored turned back (EXIF 2.3, tag 0x0112).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "packed TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_stand_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "packed TIFF": {"compression": "tiff_lzw"}}.get(kind, {})
    kind = kind.split()[-1]
    out = decode(saved(picture(16, 32), kind, exif=exif, **options))
    wanted = UPRIGHT[orientation](picture(16, 32))
    assert out.shape == wanted.shape
    assert np.abs(out.astype(int) - wanted).max() <= (4 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"garbage", b"II*\0\xff\xff\xff\xff", b"", b"II*\0\x08\0\0\0\xff\xff\x12\1"])
def test_broken_exif_breaks_no_image(kind, exif):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(saved(picture(), kind, exif=b"Exif\0\0" + exif)).shape == picture().shape


def test_sixteen_bits_stand_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    out = decode(saved(Image.fromarray(RAMP[:3].astype(np.uint16)), "PNG", exif=exif))
    np.testing.assert_array_equal(out[..., 0], np.rot90(np.rint(RAMP[:3] / 257), -1))


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3), (5, 4, 4)])
def test_arrays_are_checked_and_converted_alike(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mode = {(): "L", (1,): "L", (3,): "RGB", (4,): "RGBA"}[shape[2:]]
    np.testing.assert_array_equal(decode(array), decode(Image.frombytes(mode, (4, 5), array.tobytes())))


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 2, 3)), np.zeros((2, 2, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((1, 2, 2, 3), np.uint8)],
)
def test_other_arrays_are_refused(array):
    message = refusal(array, name="image 3 of b.jsonl:5")
    assert message.startswith(f"image 3 of b.jsonl:5: an array {array.dtype} {list(array.shape)}; valid: uint8 [H, W]")


# Refusals


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "broken.png").write_bytes(saved(picture())[:100])
    for call in (decode, lambda source: frames(source, 2)):
        missing = refusal(tmp_path / "none.png", call=call)
        assert missing.startswith(f"image '{tmp_path}/none.png': cannot be opened: No such file")
        assert refusal(str(tmp_path / "broken.png"), call=call).startswith(
            f"image '{tmp_path}/broken.png': not a whole PNG"
        )
    assert "Is a directory" in refusal(str(tmp_path))
    assert "null byte" in refusal("a\0b")
    assert len(refusal("base64," + "\n" * 10000)) < 300
    assert "/empty.png': no image that can be read" in refusal(tmp_path / "empty.png", name="image 3 of x.jsonl:1")
    assert refusal(7).startswith("image: is int; valid: bytes, a path")
    assert refusal(None).startswith("image: is NoneType")


@pytest.mark.parametrize("kind", ["PPM", "ICO", "PCX", "TGA", "EPS", "PDF", "JPEG2000"])
def test_other_formats_are_refused(kind):
    message = refusal(saved(picture(), kind), name="image 1")
    assert message.startswith("image 1: no image that can be read")
    assert message.endswith("valid: PNG, JPEG, WEBP, GIF, BMP, TIFF")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of TIFF: tags that are cut off
def test_truncated_files_are_refused_or_whole(kind):
    whole = saved(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8), kind)
    pixels, refused = decode(whole), 0
    for size in [*range(0, len(whole), 64), len(whole) - 1]:
        out = outcome(decode, whole[:size], name="image 5")
        if isinstance(out, str):
            refused += 1
        else:
            np.testing.assert_array_equal(out, pixels)  # Only what follows the pixels was missing.
    assert refused >= len(whole) // 64 - 2


@settings(max_examples=300)
@given(
    kind=st.sampled_from(FORMATS),
    wrong=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=8),
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of TIFF: tags that are cut off
def test_broken_bytes_give_an_image_or_a_refusal(kind, wrong):
    file = bytearray(saved(picture(), kind))
    for place, value in wrong:
        file[place % len(file)] = value
    for found in (outcome(decode, bytes(file)), outcome(frames, bytes(file), 2)):
        for image in [] if isinstance(found, str) else found[0] if isinstance(found, tuple) else [found]:
            assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)


@settings(max_examples=100)
@given(
    head=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"RIFFaaaaWEBPVP8 "])
)
def test_garbage_is_refused(head):
    garbage = np.random.default_rng(len(head)).integers(0, 256, 300, np.uint8).tobytes()
    assert refusal(head + garbage).startswith("image: no")


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_refused(size):
    assert refusal(png(*size, 8, 2, zlib.compress(b""))).startswith("image: ")
    assert "there are none" in refusal(np.zeros((*size, 3), np.uint8))
    assert "there are none" in refusal(Image.new("RGB", size))


HUGE = {
    "PNG": lambda w, h: png(w, h, 8, 2, b""),
    "BMP": lambda w, h: b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, w, h, 1, 24, 0, 0, 0, 0, 0, 0),
    "GIF": lambda w, h: b"GIF89a" + struct.pack("<HHBBB", w, h, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2L\1\0;",
    "GIF's frame": lambda w, h: b"GIF89a\1\0\1\0\0\0\0," + struct.pack("<HHHH", 0, 0, w, h) + b"\0\2\2L\1\0;",
    "JPEG": lambda w, h: (
        b"\xff\xd8\xff\xc0"
        + struct.pack(">HBHHB", 17, 8, h, w, 3)
        + b"\1\x11\0\2\x11\0\3\x11\0\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0\x3f\0"
    ),
    "TIFF": lambda w, h: (
        b"II*\0\x08\0\0\0\x08\0"
        + b"".join(
            struct.pack("<HHII", tag, 4, 1, value)
            for tag, value in [(256, w), (257, h), (258, 8), (259, 1), (262, 1), (273, 8), (278, h), (279, 9)]
        )
        + b"\0\0\0\0"
    ),
    "WEBP": lambda w, h: (
        lambda body: b"RIFF" + struct.pack("<I", len(body)) + body
    )(b"WEBPVP8L" + struct.pack("<IBI", 10, 0x2F, (w - 1) | (h - 1) << 14) + b"\0" * 5),
}  # fmt: skip


@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize("side", [7000, 11000, 60000])  # below, between and above where Pillow warns and refuses
def test_headers_that_ask_for_too_much_are_refused_unread(kind, side, monkeypatch):
    if kind == "WEBP":
        side = min(side, 16384)  # the format's most
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("its pixels were read"))
    tracemalloc.start()
    message = refusal(HUGE[kind](side, side), name="image of a.jsonl:4")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert message.startswith("image of a.jsonl:4: ")
    assert "at most 40 (data.max_megapixels)" in message
    if (kind, side) != ("WEBP", 16384) and (kind, side) != ("GIF's frame", 60000):  # Pillow's own refusal
        assert f"{side} x {side} pixels (height x width) are {side * side / 1e6:.8g} megapixels" in message


def test_sides_that_no_image_has_are_refused():
    message = refusal(png(100000, 100000, 8, 2, zlib.compress(b"\0" * 1000)))
    assert (
        message
        == "image: 100000 x 100000 pixels (height x width) are 10000 megapixels; at most 40 (data.max_megapixels)"
    )
    # A strip is within all other limits, and takes Pillow minutes.
    assert refusal(png(6, 65536, 8, 0, b"")) == "image: 65536 x 6 pixels (height x width); a side is at most 65535"
    assert decode(np.zeros((1, 65535, 3), np.uint8)).shape == (1, 65535, 3)


def test_the_limit_is_the_callers():
    image = picture(20, 30)
    for source in (image, saved(image), Image.fromarray(image)):
        assert decode(source, Limits(megapixels=0.0006)).shape == (20, 30, 3)
        message = refusal(source, Limits(megapixels=0.00059))
        assert (
            message
            == "image: 20 x 30 pixels (height x width) are 0.0006 megapixels; at most 0.00059 (data.max_megapixels)"
        )
    large = saved(Image.new("1", (13400, 13400)))  # 179.56 megapixels: more than Pillow's own limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(large).endswith("at most 40 (data.max_megapixels)")
        assert "cut" not in refusal(large, Limits(megapixels=179))


def test_bombs_do_not_go_off():
    # A real file of 55 kB and 3600 megapixels.
    compressor = zlib.compressobj(9)
    pixels = b"".join(compressor.compress(b"\0" * 7501) for _ in range(6000)) + compressor.flush()
    assert len(pixels) < 60000
    assert "60000 x 60000" in refusal(png(60000, 60000, 1, 0, pixels))
    # More pixels in the stream than the header says are left unread.
    assert decode(png(10, 10, 1, 0, pixels)).shape == (10, 10, 3)
    # Text and profiles that inflate to 64 MB.
    text = zlib.compress(b"\0" * 64_000_000)
    for name in (b"zTXt", b"iCCP"):
        tracemalloc.start()
        bomb = png(1, 1, 8, 0, zlib.compress(b"\0\7"), chunk(name, b"a\0\0" + text))
        out = outcome(decode, bomb)
        assert out.startswith("image: not a whole PNG") if isinstance(out, str) else out.tolist() == [[[7, 7, 7]]]
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()


def test_the_readers_of_other_formats_are_never_asked(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Image.open would try every format"))
    decode(saved(picture()))
    refusal(saved(picture(), "PPM"))


def test_threads_leave_the_warning_filters_as_they_were():
    from concurrent.futures import ThreadPoolExecutor

    before, file = list(warnings.filters), saved(picture(4, 4), "GIF")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: decode(file), range(200)))
    assert list(warnings.filters) == before


# Frames

COLOURS = [np.full((6, 8, 3), level, np.uint8) for level in (0, 50, 100, 150, 200)]


def animation(kind, durations, images=COLOURS, **options):
    first, *rest = [Image.fromarray(image) for image in images[: len(durations)]]
    return saved(first, kind, save_all=True, append_images=rest, duration=durations, **options)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_frames_come_with_their_times(kind):
    file = animation(kind, [100, 200, 300, 400, 500])
    found, times = frames(file, 5)
    # The instants nearest which frames are taken are 0, .25, .5, .75 and 1 s; frames begin at 0, .1, .3, .6 and 1 s.
    assert [int(image[0, 0, 0]) for image in found] == [0, 100, 150, 150, 200]
    assert times == pytest.approx([0, 0.3, 0.6, 0.6, 1.0])
    np.testing.assert_array_equal(decode(file), COLOURS[0])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
@pytest.mark.parametrize(("count", "wanted"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4])])
def test_frames_are_spread_evenly(kind, count, wanted, tmp_path):
    path = tmp_path / "moving"
    path.write_bytes(animation(kind, [40] * 5))
    found, times = frames(path, count)
    assert [int(image[0, 0, 0]) for image in found] == [50 * index for index in wanted]
    assert times == pytest.approx([0.04 * index for index in wanted])


def test_few_frames_are_repeated():
    found, times = frames(animation("GIF", [100, 100]), 4)
    assert [int(image[0, 0, 0]) for image in found] == [0, 0, 50, 50]
    assert times == pytest.approx([0, 0, 0.1, 0.1])


@pytest.mark.parametrize("source", [picture(), saved(picture()), saved(picture(), "WEBP"), Image.fromarray(picture())])
def test_a_still_image_repeats_itself(source):
    found, times = frames(source, 3)
    assert times == [0.0, 0.0, 0.0]
    for image in found:
        np.testing.assert_array_equal(image, picture())


def test_pages_are_not_frames():
    pages = saved(Image.fromarray(COLOURS[1]), "TIFF", save_all=True, append_images=[Image.fromarray(COLOURS[2])])
    assert [int(image[0, 0, 0]) for image in frames(pages, 2)[0]] == [50, 50]


def test_a_frame_without_a_duration_lasts_a_tenth_of_a_second():
    assert frames(animation("GIF", [0, 0, 0]), 3)[1] == pytest.approx([0, 0.1, 0.2])


def test_the_still_picture_of_an_animated_png_is_no_frame():
    file = animation("PNG", [100, 100, 100], default_image=True)
    found, times = frames(file, 2)
    assert [int(image[0, 0, 0]) for image in found] == [50, 100]
    assert times == pytest.approx([0, 0.1])
    np.testing.assert_array_equal(decode(file), COLOURS[0])


def test_clear_parts_of_frames_show_what_is_below():
    top = Image.new("RGBA", (2, 1), (9, 9, 9, 255))
    top.putpixel((1, 0), (0, 0, 0, 0))
    file = saved(top, "WEBP", save_all=True, append_images=[top], duration=100)
    assert frames(file, 2)[0][1].tolist() == [[[9, 9, 9], [255, 255, 255]]]


def test_frames_refuse(tmp_path):
    file = animation("GIF", [100] * 5)
    assert "count=0 frames" in refusal(file, 0, call=frames)
    message = refusal(file, 2, Limits(animation_megapixels=0.0002), name="clip 2", call=frames)
    most = "at most 0.0002 in all"
    assert message == f"clip 2: 5 frames of 4.8e-05 megapixels are 0.00024; {most}"
    assert frames(file, 2, Limits(animation_megapixels=0.00024))[1] == pytest.approx([0, 0.4])
    assert "megapixels" in refusal(file, 2, Limits(megapixels=1e-5), call=frames)
    assert refusal(b"GIF89a", 2, call=frames).startswith("image: not a whole GIF")


def test_a_frame_larger_than_the_file_says_is_refused():
    # The second frame of a GIF of 1 x 1 says 11000 x 11000, between where Pillow warns and where it refuses.
    frame = b",\0\0\0\0%s\0\2\2L\1\0"
    header = b"GIF89a\1\0\1\0\x80\0\0\1\2\3\4\5\6"
    file = header + frame % struct.pack("<HH", 1, 1) + frame % struct.pack("<HH", 11000, 11000) + b";"
    assert decode(file).shape == (1, 1, 3)
    assert "11000 x 11000 pixels" in refusal(file, 2, call=frames)
