"""Pictures reach an imported model as transformers' image processor would prepare them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model.config import ModelConfig, VisionConfig
from model.families.image_processor import of_directory
from model.families.known import named
from model.vision.images import normalized
from train.config import DataConfig
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.images.look import look

NORMALIZATIONS = {"clip": "clip", "llava": "clip", "idefics": "clip", "resnet": "imagenet"}


@pytest.fixture(scope="module")
def processed(tmp_path_factory: pytest.TempPathFactory, peers: Callable[..., str]) -> Path:
    """What process_images.py makes."""
    out = tmp_path_factory.mktemp("images")
    peers("process_images.py", f"--out={out}")
    return out


def errors(name: str, directory: Path, **fields: str) -> dict[str, float]:
    """Largest differences of normalised pixels, by picture; `fields` of DataConfig in place of those that are read."""
    vision = VisionConfig(encoder="vit", image_size=224, normalization=NORMALIZATIONS.get(name, "half"))
    model = ModelConfig(fusion="merge", vision=vision).resolved()
    found = of_directory(directory / name, named(name)[0].image_processor, vision)
    assert found.lost == ()
    assert found.origin == "preprocessor_config.json says"
    data = DataConfig(**{"image_fit": found.fit, "image_resample": found.resample} | fields)
    turns, differences = (Turn("user", IMAGE), Turn("assistant", "")), {}
    with np.load(directory / "pictures.npz") as pictures, np.load(directory / name / "pixels.npz") as wanted:
        assert pictures.files == wanted.files
        for which in pictures.files:
            images = look(Conversation(which, turns, (pictures[which],)), data, model).fields["images"]
            ours, theirs = np.asarray(normalized(images, vision.normalization))[0], wanted[which][0].transpose(1, 2, 0)
            if data.image_fit == "crop" and which == "odd":
                # Of three columns too many torchvision, as CLIP's own code, cuts two on the left, transformers one.
                ours, theirs = ours[:, :-1], theirs[:, 1:]
            differences[which] = float(np.abs(ours - theirs).max())
    print(name, data.image_fit, data.image_resample, differences)
    return differences


@pytest.mark.parametrize("name", ["clip", "llava", "vit", "siglip", "gemma3", "idefics", "resnet"])
def test_pixels_are_those_of_the_processor(name, processed):
    assert max(errors(name, processed).values()) < 2e-6


def test_another_fit_and_another_filter_are_seen(processed):
    assert errors("clip", processed, image_fit="squash")["wide"] > 1
    assert errors("vit", processed, image_resample="bicubic")["wide"] > 0.1
