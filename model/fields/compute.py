"""How a model is computed: number formats, kernels, and what of the backward pass is saved."""

import dataclasses

from model.fields.limits import choice, number
from tpu.errors import UserError


@dataclasses.dataclass
class Compute:
    """Choices that change no weight's meaning; `ModelConfig.placed` decides every "auto"."""

    weight_dtype: str = choice("float32", "bfloat16")
    # auto: bfloat16 where the hardware multiplies it fast, else float32
    compute_dtype: str = choice("auto", "float32", "bfloat16", free=True)
    platform: str = choice("auto", "cpu", "gpu", "tpu", free=True)  # what it is compiled for; auto: where it runs
    # auto: what `attention_for` says
    attention: str = choice("auto", "plain", "chunked", "splash", "cudnn", free=True)
    context_parallel: str = choice("ring", "ulysses", free=True)  # how attention meets a sequence axis of the mesh
    layer_loop: str = choice("auto", "scan", "unroll", free=True)  # auto: unroll on CPU, scan elsewhere
    # what the backward pass finds saved (model.stack.REMAT)
    remat: str = choice(
        "none",
        "full",
        "dots",
        "dots_no_batch",
        "attention",
        "projections",
        "all_but_mlp",
        "offload_projections",
        free=True,
    )
    pipeline_repeats: int = number(
        1, at_least=1
    )  # times that a micro-batch passes the stages of the mesh; more: smaller bubble
    # parts of a batch that follow each other through the stages; 0: mesh.stage
    pipeline_microbatches: int = number(0, at_least=0, free=True)

    def check(self) -> None:
        """Raises UserError for a kernel that cannot compute this model."""
        if self.attention in ("splash", "cudnn"):
            platform = {"splash": "tpu", "cudnn": "gpu"}[self.attention]
            found, why = self.attention_for(platform, "bfloat16")
            if found != self.attention:
                raise UserError(f"model.attention={self.attention}: {why}; give model.attention=auto")

    @property
    def needs_whole_rows(self) -> str:
        """The first field for whose sake a row may not be cut along a mesh axis; "" where there is none."""
        kinds = [kind for kind in self.pattern if kind not in ("global", "local")]
        found = {
            f"model.pattern={self.pattern!r}": kinds,
            "model.positions=alibi": self.positions == "alibi",
            "model.attention_sinks=True": self.attention_sinks,
            f"model.memory={self.memory}": self.memory,
            f"model.vision.mask={self.vision.mask!r}": self.fusion == "merge" and self.vision.mask != "causal",
            f"model.fusion={self.fusion!r}": self.fusion in ("co", "tangled") or self.pairs,
        }
        return next((name for name, there in found.items() if there), "")

    def attention_for(self, platform: str, dtype: str) -> tuple[str, str]:
        """The implementation that "auto" stands for on a platform ("cpu", "gpu", "tpu"), and why.

        dtype: of the operands, where model.compute_dtype is "auto".
        """
        dtype = dtype if self.compute_dtype == "auto" else self.compute_dtype
        head_dim = self.head_dim or self.embed_dim // self.heads
        if platform == "cpu":
            return "chunked", "there are no flash kernels for CPUs"
        if self.positions == "alibi":
            return "chunked", "the flash kernels take no ALiBi bias that is not a matrix of all pairs"
        if self.fusion == "merge" and self.vision.mask != "causal":
            return "chunked", "the flash kernels hide what comes later, and model.vision.mask shows some of it"
        if self.memory:
            return "chunked", "the flash kernels want as many queries as keys, and model.memory adds keys"
        if platform == "tpu":
            return "splash", "a TPU, and splash has every mask of this model"
        for hinders, why in (
            (self.attention_softcap, "cuDNN has no model.attention_softcap"),
            (self.attention_sinks, "cuDNN through jax has no model.attention_sinks"),
            (dtype == "float32", "cuDNN takes operands of 16 bits, and model.compute_dtype is float32"),
            (
                head_dim % 8 or head_dim > 128,
                f"cuDNN wants a head_dim up to 128 that is a multiple of 8, not {head_dim}",
            ),
        ):
            if hinders:
                return "chunked", why
        return "cudnn", "an NVIDIA GPU, and cuDNN has every mask of this model"
