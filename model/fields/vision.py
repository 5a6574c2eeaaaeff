"""How a model sees: the encoder of images, the connector behind it, and the fields of `model.fusion`."""

import dataclasses

from model.fields.connector import Connector
from model.fields.convolutions import Convolutions
from model.fields.fusion import Fusion
from model.fields.image import Image
from model.fields.limits import check_fields
from model.fields.vit import Vit

PARTS = (Image, Vit, Convolutions, Connector, Fusion)


@dataclasses.dataclass
class VisionConfig(*reversed(PARTS)):  # A dataclass takes the fields of its last base first.
    """The encoder of images, the connector behind it, and the fields of `model.fusion`."""

    def resolved(self, embed_dim: int) -> "VisionConfig":
        """Returns a copy with derived fields filled in, for a text of width `embed_dim`. Raises UserError."""
        vision = dataclasses.replace(self)
        check_fields(vision, "model.vision")
        if vision.encoder == "none":
            return vision
        vision.connector_dim = vision.connector_dim or embed_dim
        vision.connection_dim = vision.connection_dim or embed_dim
        Vit.derive(vision)
        Fusion.derive(vision)
        for part in (Convolutions, Fusion, Image, Vit, Connector):
            part.check(vision)
        return vision
