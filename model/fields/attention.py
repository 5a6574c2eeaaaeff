"""What the layers see: attention and memory (docs/attention.md)."""

import dataclasses
import math

from model.fields.limits import choice, number
from tpu.errors import UserError

LAYERS = ("global", "local", "sparse", "linear", "gated_linear", "knn")  # what model.pattern is made of
SPARSE = {"model.pattern": ("sparse",)}


@dataclasses.dataclass
class Attention:
    """Kinds of layers, what scores are, and what is remembered from row to row."""

    pattern: tuple[str, ...] = ("global",)  # one repeating group of layers, of LAYERS
    window: int = number(0, at_least=0)  # keys a "local" layer sees, itself included
    attention_sinks: bool = False  # a learned logit per head that takes weight and has no value (gpt-oss)
    # 0: none; else cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118)
    attention_softcap: float = number(0.0, at_least=0)
    query_scalar: float = number(0.0, at_least=0)  # scores are divided by its square root; 0: head_dim
    qk_norm: bool = False  # RMSNorm of queries and keys (arXiv:2302.05442)
    qk_norm_over: str = choice("head_dim", "projection")  # projection: all heads at once (OLMo 2, arXiv:2501.00656)
    # tokens of a block of a "sparse" layer (model.attention.block_sparse_attention)
    sparse_block: int = number(64, at_least=1, of=SPARSE)
    sparse_newest: int = number(3, at_least=1, of=SPARSE)  # blocks it sees that end with the query's own
    sparse_first: int = number(1, at_least=0, of=SPARSE)  # blocks it sees at the beginning of the document
    sparse_random: int = number(2, at_least=0, of=SPARSE)  # older blocks it sees, drawn
    sparse_seed: int = number(0, at_least=0, of=SPARSE)
    # tokens before the row that layers see (Transformer-XL, model.attention.memory); needs data.contiguous
    memory: int = number(0, at_least=0)
    # tokens before the row among which "knn" layers look for their nearest neighbours
    knn_memory: int = number(0, at_least=0)
    knn_neighbours: int = number(32, at_least=1, of={"model.pattern": ("knn",)})  # of them, each query takes so many

    def check(self) -> None:
        """Raises UserError for layers and memories that do not go together."""
        if not self.pattern or any(kind not in LAYERS for kind in self.pattern):
            raise UserError(f"model.pattern={self.pattern!r}: a tuple of at least one of {', '.join(LAYERS)}")
        if self.layers % len(self.pattern):
            raise UserError(
                f"model.layers={self.layers}: not a multiple of the {len(self.pattern)} layers of "
                f"model.pattern={self.pattern!r}"
            )
        if "local" in self.pattern and self.window < 1:
            raise UserError(f"model.window={self.window}: a pattern with 'local' needs a window of at least 1")
        if ("knn" in self.pattern) != (self.knn_memory > 0):
            raise UserError(
                f"model.knn_memory={self.knn_memory}: above 0 where model.pattern holds 'knn', and 0 elsewhere"
            )
        remembers = "memory" if self.memory else "knn_memory" if self.knn_memory else ""
        if remembers and self.positions in ("learned", "sinusoidal"):
            raise UserError(
                f"model.{remembers}={getattr(self, remembers)}: needs positions that count from key to query; give "
                "model.positions=rope, alibi or none"
            )
        if remembers and "sparse" in self.pattern:
            raise UserError(f"model.{remembers}={getattr(self, remembers)}: not with 'sparse' layers in model.pattern")
        if "knn" in self.pattern and (self.attention_sinks or self.attention_softcap or self.attention_dropout):
            raise UserError("model.pattern: 'knn' layers have no attention_sinks, attention_softcap, attention_dropout")

    @property
    def remembers(self) -> bool:
        """Whether a training step hands a memory to the next one (`model.attention.memory`)."""
        return self.memory > 0 or self.knn_memory > 0

    def keys_seen(self, kind: str, context: int) -> int:
        """Keys that a query at the end of a row of `context` tokens meets in a layer of that kind.

        Linear layers meet a state instead, which costs as much as head_dim keys.
        """
        sparse = self.sparse_block * (self.sparse_newest + self.sparse_first + self.sparse_random)
        return {
            "global": context + self.memory,
            "local": min(context + self.memory, self.window),
            "sparse": min(context, sparse),
            "knn": context + self.knn_memory,
        }.get(kind, self.head_dim)


def repeated(pattern: tuple[str, ...], every: int) -> tuple[str, ...]:
    """A pattern as often as it takes for `every` to divide its length."""
    return pattern * (math.lcm(len(pattern), every) // max(1, len(pattern)))
