"""The shape of a model as one typed dataclass, flat for people, whose parts are files of model/fields/."""

import dataclasses
import types

from model.fields.attention import Attention
from model.fields.compute import Compute
from model.fields.experts import Experts
from model.fields.kind import Kind
from model.fields.limits import check_effects, check_fields
from model.fields.norms import Norms
from model.fields.positions import Positions
from model.fields.shape import Shape
from model.fields.sharing import Sharing
from model.fields.sight import Sight
from model.fields.vision import VisionConfig

__all__ = ["ModelConfig", "VisionConfig"]

PARTS = (Shape, Attention, Positions, Experts, Norms, Sharing, Kind, Sight, Compute)


@dataclasses.dataclass
class ModelConfig(*reversed(PARTS)):  # A dataclass takes the fields of its last base first.
    """A transformer, decoder-only unless `kind` says otherwise.

    Zero in a field marked "0:" means the value named there; `resolved` fills it in.
    """

    def resolved(self) -> "ModelConfig":
        """Returns a copy with every derived field filled in. Raises UserError for an impossible shape."""
        config = dataclasses.replace(self)
        check_fields(config, "model")
        for part in (Shape, Positions, Experts, Sight, Kind):
            part.derive(config)
        for part in (Shape, Positions, Attention, Sharing, Experts, Compute, Kind, Sight):
            part.check(config)
        tree = types.SimpleNamespace(model=config)
        check_effects(config, "model", tree)
        if config.vision.encoder != "none":
            check_effects(config.vision, "model.vision", tree)
        return config

    def placed(self, platform: str, fast_dtype: str) -> "ModelConfig":
        """Returns a copy in which every "auto" is decided for `platform` ("cpu", "gpu" or "tpu")."""
        platform = platform if self.platform == "auto" else self.platform
        return dataclasses.replace(
            self,
            platform=platform,
            compute_dtype=fast_dtype if self.compute_dtype == "auto" else self.compute_dtype,
            attention=self.attention_for(platform, fast_dtype)[0] if self.attention == "auto" else self.attention,
            layer_loop=("unroll" if platform == "cpu" else "scan") if self.layer_loop == "auto" else self.layer_loop,
        )
