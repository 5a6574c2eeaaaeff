"""Prepares drawn pictures with transformers' image processors.

    python tests/peers/process_images.py --out=DIR

Needs transformers, nothing of Foursight. DIR/pictures.npz holds the pictures [H, W, 3] uint8; each directory of DIR
beside it is as `save_pretrained` leaves a processor, with pixels.npz: by the names of the pictures what it makes of
them, [1, 3, height, width] float32. The processors are those that work on Pillow: the only ones where there is no
torchvision, and the ones that these models were published with.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS = {
    "clip": CLIPImageProcessorPil(),
    "llava": LlavaImageProcessorPil(),
    "vit": ViTImageProcessorPil(),
    "siglip": SiglipImageProcessorPil(),
    "gemma3": Gemma3ImageProcessorPil(do_pan_and_scan=False),
    "idefics": IdeficsImageProcessorPil(),
    # All of the shorter side, which our crop keeps, and the filter that is not its default.
    "resnet": ConvNextImageProcessorPil(**IMAGENET, size={"shortest_edge": 224}, crop_pct=1.0, resample=2),
}
SIZES = {"wide": (301, 458), "high": (480, 320), "small": (100, 131), "square": (224, 224), "odd": (224, 227)}


def picture(height: int, width: int) -> np.ndarray:
    """Slopes, a disc with a hard edge, stripes that become finer, and noise: uint8 [height, width, 3]."""
    rows, columns = np.mgrid[:height, :width] / np.array([[[height]], [[width]]])
    disc = (rows - 0.4) ** 2 + (columns - 0.6) ** 2 < 0.06
    stripes = np.sin(60 * columns**2) > 0
    values = np.stack([rows, np.where(disc, 1.0, columns), np.where(stripes, 0.8, 0.1)], -1)
    noise = np.random.default_rng(height).normal(0, 0.05, values.shape)
    return np.clip(255 * (values + noise), 0, 255).astype(np.uint8)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Prepares drawn pictures with transformers' image processors.")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the directory to fill")
    out = parser.parse_args().out
    pictures = {name: picture(*sides) for name, sides in SIZES.items()}
    out.mkdir(exist_ok=True)
    np.savez(out / "pictures.npz", **pictures)
    for name, processor in PROCESSORS.items():
        processor.save_pretrained(out / name)
        made = {which: processor(image) for which, image in pictures.items()}
        pixels = {which: np.asarray(getattr(one, "pixel_values", one), np.float32) for which, one in made.items()}
        np.savez(out / name / "pixels.npz", **pixels)


if __name__ == "__main__":
    main()
