"""What must hold between the images of an experiment, the model that sees them, and rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpu.errors import UserError
from train.data.chat.record import IMAGE

if TYPE_CHECKING:
    from train.config import Experiment


def check(experiment: Experiment) -> None:
    """Raises UserError where images, the model that sees them and rows do not go together."""
    model, data = experiment.model, experiment.data
    packs = model.fusion == "merge" and model.vision.encoder == "vit" and model.vision.stem == "patches"
    if data.image_fit == "native" and not (packs and model.vision.positions in ("rope", "sincos")):
        raise UserError(
            "data.image_fit='native': needs model.fusion='merge' and a vit on patches with model.vision.positions rope "
            "or sincos"
        )
    if data.image_fit == "native" and (model.vision.class_token or model.vision.connector == "perceiver"):
        raise UserError("data.image_fit='native': not with model.vision.class_token or connector='perceiver'")
    if 0 < model.vision.image_positions < data.images and model.fusion in ("merge", "cross", "co", "tangled"):
        raise UserError(
            f"data.images={data.images}: model.vision.image_positions={model.vision.image_positions} tells no more "
            "images of a row apart; give at least as many, or 0"
        )
    if data.image_fit in ("tiles", "native") and (model.vision.image_width or model.vision.patch_width):
        raise UserError(f"data.image_fit={data.image_fit!r}: not with model.vision.image_width or patch_width")
    for field in ("user_format", "assistant_format"):
        if getattr(data, field).count("{}") != 1:
            raise UserError(f"data.{field}={getattr(data, field)!r}: must hold {{}} once, where the text stands")
        if IMAGE in getattr(data, field):
            raise UserError(f"data.{field}={getattr(data, field)!r}: {IMAGE} stands in the text of a turn, not here")
    _check_room(experiment)


def _check_room(experiment: Experiment) -> None:
    """Raises UserError where a row holds too few images, or too few tokens for what they become."""
    model, data = experiment.model, experiment.data
    tiles = data.image_fit == "tiles" and model.vision.encoder != "none"
    if tiles and data.images < 2:
        raise UserError(
            f"data.images={data.images}: data.image_fit='tiles' makes at least 2 images of each, and up to 1 + "
            f"data.max_tiles = {1 + data.max_tiles}; give as many"
        )
    if model.fusion != "merge":
        return
    if data.image_fit == "native":
        most = data.patches // model.vision.shrink**2
        if data.context <= most:
            raise UserError(
                f"data.context={data.context}: the images of a row take up to {most} tokens; give more, or fewer "
                "data.patches"
            )
        return
    vectors = model.vision.vectors * (2 if tiles else 1)
    if data.context <= vectors:
        raise UserError(
            f"data.context={data.context}: one image takes {vectors} tokens; give more, or a larger "
            "model.vision.patch_size or a connector that makes fewer of them"
        )
