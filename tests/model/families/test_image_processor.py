"""What files say of the preparation of images becomes data.image_fit and data.image_resample; the rest is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from model.config import VisionConfig
from model.families.image_processor import PROCESSORS, Preparation, of_directory, read
from model.families.known import FAMILIES
from model.fields.image import NORMALIZATIONS
from model.hub.import_model import import_model
from tests.peers.archives import unpacked
from tpu.errors import UserError

CASE = unpacked(Path(__file__).parents[2] / "peers" / "vision_cases") / "clip_0"
SIZE = {"height": 224, "width": 224}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP = {name: list(part) for name, part in zip(HALF, NORMALIZATIONS["clip"], strict=True)}
IMAGENET = {name: list(part) for name, part in zip(HALF, NORMALIZATIONS["imagenet"], strict=True)}
RESCALES = {"do_rescale": True, "rescale_factor": 0.00392156862745098}


def prepared(options: dict[str, Any], processor: str, normalization: str, side: int = 224) -> Preparation:
    return read(options, processor, VisionConfig(image_size=side, normalization=normalization), "")


# What files on the hub say, of old and of new processors, and what is made of it; nothing of them is lost.
FILES = {
    "clip": (
        "CLIP",
        "clip",
        CLIP | {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 224, "size": 224, "resample": 3},
        ("crop", "bicubic"),
    ),
    "llava": (
        "Llava",
        "clip",
        CLIP
        | RESCALES
        | {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "resample": 3}
        | {"crop_size": SIZE, "size": {"shortest_edge": 224}},
        ("crop", "bicubic"),
    ),
    "vit": ("ViT", "half", HALF | {"do_normalize": True, "do_resize": True, "size": 224}, ("squash", "bilinear")),
    "siglip": (
        "Siglip",
        "half",
        HALF | RESCALES | {"image_processor_type": "SiglipImageProcessor", "resample": 3, "size": SIZE},
        ("squash", "bicubic"),
    ),
    "siglip2": (
        "Siglip",
        "half",
        HALF | RESCALES | {"image_processor_type": "SiglipImageProcessor", "resample": 2, "size": SIZE},
        ("squash", "bilinear"),
    ),
    "gemma3": (
        "Gemma3",
        "half",
        HALF
        | RESCALES
        | {"image_processor_type": "Gemma3ImageProcessorFast", "do_pan_and_scan": None, "resample": 2, "size": SIZE},
        ("squash", "bilinear"),
    ),
    "idefics": (
        "Idefics",
        "clip",
        CLIP | {"image_processor_type": "IdeficsImageProcessor", "image_num_channels": 3, "image_size": 224},
        ("squash", "bicubic"),
    ),
    "convnext-384": (
        "ConvNext",
        "imagenet",
        IMAGENET | {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "resample": 2},
        ("squash", "bilinear"),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read(name):
    processor, normalization, options, (fit, resample) = FILES[name]
    found = prepared(options, processor, normalization, 384 if "384" in name else 224)
    assert (found.fit, found.resample, found.lost) == (fit, resample, ())


# What cannot be said here, beside the file that is read without loss.
LOST = {
    "resnet-50": (
        ("ConvNext", "imagenet"),
        IMAGENET
        | {"feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.875, "resample": 3, "size": 224},
        ("crop", "bicubic", "224 x 224 pixels cut out of the middle 256 x 256 (all of it is kept)"),
    ),
    "deit": (
        ("ViT", "half"),
        {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224, "do_center_crop": True},
        ("squash", "bicubic", "224 x 224 pixels cut out of the middle 256 x 256 (all of it is kept)"),
    ),
    "mean": (
        ("ViT", "half"),
        {"image_mean": [0.4, 0.5, 0.5]},
        (
            "squash",
            "bilinear",
            "image_mean=[0.4, 0.5, 0.5] image_std=[0.5, 0.5, 0.5] (model.vision.normalization='half')",
        ),
    ),
    "unnormalised": (
        ("ViT", "half"),
        {"do_normalize": False},
        ("squash", "bilinear", "do_normalize=False (model.vision.normalization='half')"),
    ),
    "other size": (
        ("Siglip", "half"),
        {"size": {"height": 256, "width": 224}},
        ("squash", "bicubic", "images of 256 x 224 pixels (224 x 224, model.vision.image_size)"),
    ),
    "padded": (("Llava", "clip"), {"do_pad": True}, ("pad", "bicubic", "do_pad=True with borders of its own (black)")),
    "uncut": (
        ("CLIP", "clip"),
        {"do_center_crop": False},
        ("crop", "bicubic", "do_center_crop=False (what sticks out is cut)"),
    ),
    "unread": (
        ("Siglip", "half"),
        {"size": {"longest_edge": 224}},
        ("squash", "bicubic", "size={'longest_edge': 224} (unread)"),
    ),
    "filter": (("ViT", "half"), {"resample": 1}, ("squash", "bicubic", "resample=1 (bicubic)")),
    "whole": (("ViT", "half"), {"do_resize": False}, ("squash", "bilinear", "do_resize=False (all are resized)")),
    "scaled": (
        ("ViT", "half"),
        {"rescale_factor": 0.5},
        ("squash", "bilinear", "rescale_factor=0.5 (values are divided by 255)"),
    ),
    "pieces": (
        ("Gemma3", "half"),
        {"do_pan_and_scan": True},
        ("squash", "bilinear", "do_pan_and_scan=True (one image of each)"),
    ),
    "unknown": (
        ("CLIP", "clip"),
        {"image_processor_type": "DonutImageProcessor"},
        ("crop", "bicubic", "image_processor_type='DonutImageProcessor' (read as CLIPImageProcessor)"),
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_what_cannot_be_said_is_named(name):
    (processor, normalization), options, (fit, resample, lost) = LOST[name]
    found = prepared(options, processor, normalization)
    assert (found.fit, found.resample, found.lost) == (fit, resample, (lost,))
    assert f"otherwise there: {lost}" in str(found)
    assert "\n" not in str(found)


@pytest.mark.parametrize("value", [True, "224", [], {}, -1, 0.5, {"height": "a", "width": 3}])
def test_no_file_is_too_strange_to_read(value):
    for name in ("size", "crop_size", "resample", "crop_pct", "image_mean", "do_pad", "image_processor_type"):
        for processor in PROCESSORS:
            assert prepared({name: value}, processor, "half").fit in ("squash", "crop", "pad", "native")


def test_where_it_is_said(tmp_path):
    vision = VisionConfig(image_size=224, normalization="clip")

    def written(name: str, options: Any) -> Preparation:
        (tmp_path / name).write_text(json.dumps(options))
        return of_directory(tmp_path, "CLIP", vision)

    wanted = "images as CLIPImageProcessor does by default: data.image_fit='crop' data.image_resample='bicubic'"
    assert str(of_directory(tmp_path, "CLIP", vision)) == wanted
    assert written("preprocessor_config.json", {"resample": 2}).resample == "bilinear"
    # Versions from 5 on write one file for all that prepares; before, it said nothing of images.
    assert written("processor_config.json", {"processor_class": "CLIPProcessor"}).resample == "bilinear"
    found = written("processor_config.json", {"image_processor": {"size": SIZE, "resample": 3}})
    assert (found.fit, found.resample, found.origin) == ("squash", "bicubic", "processor_config.json says")
    with pytest.raises(UserError, match=r"processor_config.json: not a JSON object"):
        written("processor_config.json", [])


def test_a_processor_that_keeps_sizes_says_its_bounds():
    vision = VisionConfig(image_size=224, patch_size=14, connector="merger", normalization="clip").resolved(8)
    found = read({"max_pixels": 1000}, "Qwen2VL", vision, "here")
    assert (found.fit, found.resample) == ("native", "bicubic")
    assert found.lost == ("min_pixels=3136 (784)", "max_pixels=1000 (200704, data.patches=1024)")
    assert read({"size": {"longest_edge": 9}}, "Qwen2VL", vision, "").lost[1].startswith("max_pixels=9 ")


def test_families_whose_images_rows_can_hold_name_a_processor():
    without = {family.model_type for family in FAMILIES if not family.image_processor}
    assert without.isdisjoint(
        {"clip", "siglip", "llava", "paligemma", "gemma3", "vit", "resnet", "idefics", "qwen2_vl"}
    )
    assert {family.image_processor for family in FAMILIES} - {""} <= PROCESSORS.keys()


def test_an_import_takes_it_over(tmp_path, capsys):
    def imported(name: str) -> tuple[str, str]:
        import_model(tmp_path / "peer", tmp_path / name, "auto")
        data = json.loads((tmp_path / name / "experiment.json").read_text())["experiment"]["data"]
        return data["image_fit"], data["image_resample"]

    shutil.copytree(CASE, tmp_path / "peer")
    assert imported("default") == ("crop", "bicubic")
    assert "images as CLIPImageProcessor does by default" in capsys.readouterr().out
    (tmp_path / "peer" / "preprocessor_config.json").write_text(json.dumps({"resample": 2, "crop_size": 5}))
    assert imported("said") == ("crop", "bilinear")
    assert "otherwise there: 5 x 5 pixels cut out of the middle" in capsys.readouterr().out
