"""What transformers' image processors do with a picture, in our terms: data.image_fit and data.image_resample.

preprocessor_config.json says it, or the part image_processor of processor_config.json; where neither is there, it is
what the family's processor does by default. What has no counterpart here is named, never refused: it is of the data,
and the weights are right without it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from model.config import VisionConfig
from model.fields.image import NORMALIZATIONS
from model.safetensors import read_json
from tpu.errors import UserError


class Usual(NamedTuple):
    """What a processor does where its file does not say."""

    resample: int  # a number of Pillow's
    square: bool = True  # A size that is one number is of both sides; otherwise of the shorter one, the shape is kept.
    crops: bool = False


# By the names of their classes, without what all of these end in.
PROCESSORS = {
    "CLIP": Usual(3, square=False, crops=True),
    "Llava": Usual(3, square=False, crops=True),
    "Bit": Usual(3, square=False, crops=True),
    "ConvNext": Usual(3, square=False),  # ResNet's
    "ViT": Usual(2),
    "DeiT": Usual(3, crops=True),
    "Siglip": Usual(3),  # PaliGemma's too
    "Gemma3": Usual(2),
    "Idefics": Usual(3),
    "Qwen2VL": Usual(3),
}
NATIVE = ("Qwen2VL",)  # of these, which keep the sizes that images have
ENDING = r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$"
FILTERS = {"2": "bilinear", "3": "bicubic"}
PATCHES = 1024  # of all images of a row that keep their sizes, where a model is imported
SQUASHED = 384  # pixels from which ConvNext's processor keeps no shape
# What a file may ask for and nothing here does: what it says where it does not, and what is done here.
FLAGS = {
    "do_resize": (True, "all are resized"),
    "do_rescale": (True, "values are divided by 255"),
    "rescale_factor": (1 / 255, "values are divided by 255"),
    "do_pan_and_scan": (False, "one image of each"),
}


class Preparation(NamedTuple):
    """How the images of a model are prepared: `fit` and `resample` are data.image_fit and data.image_resample."""

    fit: str
    resample: str
    lost: tuple[str, ...]  # what the processor does otherwise and, in brackets, what is done here
    origin: str  # the file that says it, or the processor that does it by default

    def __str__(self) -> str:
        """One line for people."""
        but = f"; otherwise there: {'; '.join(self.lost)}" if self.lost else ""
        return f"images as {self.origin}: data.image_fit={self.fit!r} data.image_resample={self.resample!r}{but}"


def of_directory(directory: Path, processor: str, vision: VisionConfig) -> Preparation:
    """The preparation of the images of a directory whose family has this `processor`. Raises UserError for a file that
    is no JSON object."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if not (directory / name).is_file():
            continue
        options = read_json(directory / name)
        if not isinstance(options, dict):
            raise UserError(f"{directory / name}: not a JSON object")
        options = options.get("image_processor") if name == "processor_config.json" else options
        if isinstance(options, dict):
            return read(options, processor, vision, f"{name} says")
    return read({}, processor, vision, f"{processor}ImageProcessor does by default")


def read(options: dict[str, Any], processor: str, vision: VisionConfig, origin: str) -> Preparation:
    """The preparation that the options of a file from `origin` say; `processor`: of one that names none."""
    given = {name: value for name, value in options.items() if value is not None}
    kind = str(given.get("image_processor_type", given.get("feature_extractor_type", processor)))
    name = re.sub(ENDING, "", kind)
    usual = PROCESSORS.get(name, PROCESSORS[processor])
    number = str(given.get("resample", usual.resample))
    fit, lost = _native(given, vision) if name in NATIVE else _fit(given, name, usual, vision)
    if name not in PROCESSORS:
        lost.append(f"image_processor_type={kind!r} (read as {processor}ImageProcessor)")
    if number not in FILTERS:
        lost.append(f"resample={number} (bicubic)")
    wrong = {flag: here for flag, (value, here) in FLAGS.items() if given.get(flag, value) != value}
    lost += [f"{flag}={given[flag]!r} ({here})" for flag, here in wrong.items()]
    return Preparation(fit, FILTERS.get(number, "bicubic"), (*lost, *_normalization(given, vision)), origin)


def _fit(given: dict[str, Any], name: str, usual: Usual, vision: VisionConfig) -> tuple[str, list[str]]:
    """data.image_fit of a file's options, and what is done otherwise here."""
    size, crop = given.get("size", given.get("image_size")), given.get("crop_size")
    lost = [f"{n}={s!r} (unread)" for n, s in (("size", size), ("crop_size", crop)) if s and not _sides(s, True)]
    keeps, resized = _sides(size, usual.square) or (not usual.square, vision.sides)
    crops = given.get("do_center_crop", usual.crops)
    cut = (_sides(crop, True) or (True, vision.sides))[1] if crops else resized
    if name == "ConvNext" and keeps:
        keeps = resized[0] < SQUASHED
        cut = resized
        resized = tuple(int(side / _share(given)) for side in cut) if keeps else cut
    elif keeps and not crops:
        lost.append("do_center_crop=False (what sticks out is cut)")
    if cut != resized:
        lost.append(f"{_by(cut)} pixels cut out of the middle {_by(resized)} (all of it is kept)")
    if cut != vision.sides:
        lost.append(f"images of {_by(cut)} pixels ({_by(vision.sides)}, model.vision.image_size)")
    if given.get("do_pad"):
        return "pad", [*lost, "do_pad=True with borders of its own (black)"]
    return "crop" if keeps else "squash", lost


def _native(given: dict[str, Any], vision: VisionConfig) -> tuple[str, list[str]]:
    """As `_fit` of a processor that keeps sizes within bounds: ours are data.patches, and a vector."""
    size, side = given.get("size"), vision.patch_size
    size = size if isinstance(size, dict) else {}
    least = given.get("min_pixels", size.get("shortest_edge", 56**2))
    most = given.get("max_pixels", size.get("longest_edge", 28**2 * 1280))
    return "native", [
        f"min_pixels={least} ({(side * vision.shrink) ** 2})",
        f"max_pixels={most} ({PATCHES * side**2}, data.patches={PATCHES})",
    ]


def _share(given: dict[str, Any]) -> float:
    """Of ConvNext: what of a resized image's side is kept."""
    share = given.get("crop_pct")
    return share if isinstance(share, (int, float)) and share > 0 else 224 / 256


def _sides(size: Any, square: bool) -> tuple[bool, tuple[int, int]] | None:
    """Whether a size keeps the shape of an image, and the (height, width) of its middle then; None where it is no size.

    square: what one number means.
    """
    match size:
        case int(side) if side > 0:
            return not square, (side, side)
        case {"height": int(height), "width": int(width)} if min(height, width) > 0:
            return False, (height, width)
        case {"shortest_edge": int(side), **rest} if side > 0 and not rest:
            return True, (side, side)
    return None


def _by(sides: tuple[int, int]) -> str:
    return f"{sides[0]} x {sides[1]}"


def _normalization(given: dict[str, Any], vision: VisionConfig) -> list[str]:
    """Mean and deviation, where they are not those of the model."""
    ours = [list(part[: vision.channels]) for part in NORMALIZATIONS[vision.normalization]]
    names = ("image_mean", "image_std")
    if not given.get("do_normalize", True):
        theirs, told = [list(part[: vision.channels]) for part in NORMALIZATIONS["none"]], "do_normalize=False"
    else:
        theirs = [given.get(name, part) for name, part in zip(names, ours, strict=True)]
        told = " ".join(f"{name}={part}" for name, part in zip(names, theirs, strict=True))
    return [] if theirs == ours else [f"{told} (model.vision.normalization={vision.normalization!r})"]
