"""Between our weights and a peer's files: one table per family, read in both directions.

Ours are stacked by group of layers and have a dimension for each thing (heads and head_dim apart); theirs are a tensor
per layer, of two dimensions at most. What differs is names and the order of dimensions, so each of their tensors is
seen as one of ours without a copy, and a slice of ours reads just that of theirs.

Legend: L groups of layers, E experts.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from model.config import ModelConfig
from model.safetensors import DTYPES, Joined, Spec, Tensor
from tpu.errors import UserError

MATRICES = ("kernel", "router")  # ends of paths of ours that a peer may hold transposed
PARAMETERS = {  # our name: theirs
    "kernel": "weight",
    "bias": "bias",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "variance": "running_var",
}
FLOATS = ("F32", "F16", "BF16")
NUMBER = r"_(\d+)(?=[._])"  # in a path of ours
STATISTIC, COUNTER = "running_var", "num_batches_tracked"


class Peer(NamedTuple):
    """Where a weight of ours is elsewhere.

    `name` may hold {layer} and {expert}. Of a kernel, `inputs` is how many of our dimensions are contracted, and
    `transposed` whether theirs is [outputs, inputs], as torch.nn.Linear has it. A weight that is `part` of `parts` lies
    with the others along the outputs. A `convolution` is [outputs, channels, rows, columns] there, and [rows, columns,
    channels, outputs] here. With a `rank` theirs has our shape but for ones in front, as many more or fewer as make
    that many dimensions.
    """

    name: str
    inputs: int = 1
    part: int = 0
    parts: int = 1
    transposed: bool = True
    convolution: bool = False
    rank: int | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """What connects ModelConfig and weights with the files of one family.

    Args:
      architectures: names in config.json, that which is written first; model_type: the other name there.
      paper: where the family is described.
      table: our module (or weight) -> their module (or weight). In our paths "layer" stands for any "layer_i", "gate"
        for any "gate_i"; {layer} counts those of a stack, the gates apart. Elsewhere "_#" stands for any "_i", and {0},
        {1} and so on for these numbers in their order.
      read: config.json -> ModelConfig, resolved. Raises UserError for what cannot be expressed here.
      write: ModelConfig -> config.json. What it cannot say is found by reading it again (`model.families.known`).
      run: what `python -m model.hub run` does with arrays, as `model.families.causal.run`.
      prefix: of all names that have it; files without it on any are taken too.
      ignored: pattern of tensors that are no weights.
      renamed: (pattern, replacement) pairs that make the names of other files of the family those of the table.
      fits: of several families with one architecture, whether a config.json is of this one.
      joined: tensors whose further rows are, in files that have it, in another tensor: that one's name by theirs.
      head: a tensor of the file that is there where the head is not tied, whatever config.json says; "": it knows.
      objective: what the model was made to learn (`train.objectives.table.OBJECTIVES`).
      image_processor: what prepares its images (`model.families.image_processor.PROCESSORS`); "": rows hold none.
    """

    architectures: tuple[str, ...]
    model_type: str
    paper: str
    table: dict[str, str | Peer]
    read: Callable[[dict[str, Any]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    run: Callable[..., dict[str, np.ndarray]]
    prefix: str = "model."
    ignored: str = r".*\.rotary_emb\.inv_freq"
    renamed: tuple[tuple[str, str], ...] = ()
    fits: Callable[[dict[str, Any]], bool] = lambda config: True
    joined: dict[str, str] = dataclasses.field(default_factory=dict)
    head: str = ""
    objective: str = "next_token"
    image_processor: str = ""


class Element(NamedTuple):
    """One tensor of theirs, or part of one, and the place in one of our stacked weights where it belongs."""

    peer: Peer  # its name filled in
    path: str
    index: tuple[int, ...]  # along the leading dimensions [L] or [L, E]
    shape: tuple[int, ...]  # of what lies there


def elements(family: Family, path: str, shape: tuple[int, ...], config: ModelConfig) -> list[Element]:
    """The elements of our weight `path`, such as "stack.groups.layer_0.mlp.up.kernel", in order of place.

    Args:
      shape: with L first where the path goes through groups. config: says what is in a group.
    """
    layer = re.search(r"\.groups\.(layer|gate)_(\d+)\.", path)
    name = re.sub(r"\.groups\.(layer|gate)_\d+\.", r".groups.\1.", path)
    peer, numbers = _peer(family, name), re.findall(NUMBER, name)
    lead = (1 if layer else 0) + ("{expert}" in peer.name)
    group = [0]  # what of this kind is in a group, by number
    if layer and not path.startswith("vision."):
        group = [i for i in range(len(config.pattern)) if layer[1] == "layer" or config.looks(i)]
    found = []
    for index in itertools.product(*(range(size) for size in shape[:lead])):
        values = {"layer": index[0] * len(group) + group.index(int(layer[2]))} if layer else {}
        values |= {"expert": index[-1]} if "{expert}" in peer.name else {}
        found.append(Element(peer._replace(name=peer.name.format(*numbers, **values)), path, index, shape[lead:]))
    return found


def _peer(family: Family, path: str) -> Peer:
    name = re.sub(NUMBER, "_#", path)
    if name in family.table:
        row = family.table[name]
        return Peer(row) if isinstance(row, str) else row
    module, _, parameter = name.rpartition(".")
    if module not in family.table:
        raise UserError(f"{family.architectures[0]} has no place for the weight {path}")
    row = family.table[module]
    row = Peer(row) if isinstance(row, str) else row
    return row._replace(name=f"{row.name}.{PARAMETERS[parameter]}")


def peer_shape(element: Element) -> tuple[int, ...]:
    """The shape of the whole tensor of theirs that an element is, or is part of."""
    shape, peer = element.shape, element.peer
    if peer.rank is not None:
        return (1,) * (peer.rank - len(shape)) + shape[max(0, len(shape) - peer.rank) :]
    if peer.convolution and element.path.endswith("kernel"):
        return (shape[-1], shape[-2], *shape[:-2])
    if element.path.endswith(MATRICES):
        size = lambda dims: int(np.prod(dims, dtype=np.int64))  # noqa: E731
        inputs, outputs = size(shape[: peer.inputs]), size(shape[peer.inputs :]) * peer.parts
        return (outputs, inputs) if peer.transposed else (inputs, outputs)
    if element.path.endswith("embedding"):
        return shape
    return (int(np.prod(shape, dtype=np.int64)) * peer.parts,)


def view(element: Element, theirs: np.ndarray) -> np.ndarray:
    """Their tensor (see `peer_shape`), seen as an element of ours; a view that shares its memory."""
    shape, peer = element.shape, element.peer
    if peer.convolution and element.path.endswith("kernel"):
        return theirs.transpose(*range(2, theirs.ndim), 1, 0)
    kernel = element.path.endswith(MATRICES) and peer.rank is None
    axis = 0 if kernel and peer.transposed else theirs.ndim - 1
    if peer.parts > 1:
        width = theirs.shape[axis] // peer.parts
        theirs = theirs[(slice(None),) * axis + (slice(peer.part * width, (peer.part + 1) * width),)]
    if not kernel or not peer.transposed:
        return theirs.reshape(shape)
    outputs = len(shape) - peer.inputs
    turned = theirs.reshape(*shape[peer.inputs :], *shape[: peer.inputs])
    return turned.transpose(*range(outputs, len(shape)), *range(outputs))


class PeerWeights:
    """A peer's tensors as ours, after every one of them has been accounted for.

    Args:
      tensors: of `model.safetensors.open_directory`.
      shapes: of our weights by path, L first where they are stacked.

    Raises UserError listing tensors that are missing, left over, of another shape or of no floating-point type.
    """

    def __init__(
        self, family: Family, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], config: ModelConfig
    ):
        tensors = _joined(tensors, family.joined)
        self._elements = {
            path: {element.index: element for element in elements(family, path, shape, config)}
            for path, shape in shapes.items()
        }
        tensors = _renamed(family, tensors)
        bare = family.prefix and not any(name.startswith(family.prefix) for name in tensors)
        cut = len(family.prefix) if bare else 0
        wanted: dict[str, Element] = {}
        for element in itertools.chain.from_iterable(of.values() for of in self._elements.values()):
            name = element.peer.name
            wanted[name[cut:] if name.startswith(family.prefix) else name] = element
        left_over = {n for n in tensors.keys() - wanted.keys() if not re.fullmatch(family.ignored, n)}
        if config.tied_head:
            left_over -= _tied_copies(tensors, wanted, left_over)
        _refuse("missing", wanted.keys() - tensors.keys())
        _refuse("not used by this architecture", left_over)
        for name, element in wanted.items():
            spec = tensors[name].spec
            if spec.shape != peer_shape(element):
                raise UserError(
                    f"tensor {name}: is {list(spec.shape)}, config.json asks for {list(peer_shape(element))}"
                )
            if spec.dtype not in [DTYPES[dtype] for dtype in FLOATS]:
                raise UserError(f"tensor {name}: is of type {spec.dtype}; weights must be one of {', '.join(FLOATS)}")
        self._tensors = {element.peer.name: tensors[name] for name, element in wanted.items()}

    @property
    def dtype(self) -> str:
        """The narrowest of float32 and bfloat16 that holds every tensor."""
        kinds = {tensor.spec.dtype for tensor in self._tensors.values()}
        return "bfloat16" if kinds == {DTYPES["BF16"]} else "float32"

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(tensor.spec.bytes for tensor in self._tensors.values())

    def lead(self, path: str) -> int:
        """How many leading dimensions of our weight `path` are one tensor each."""
        return len(next(iter(self._elements[path])))

    def read(self, path: str, where: tuple[int, ...], region: tuple[slice, ...] = ()) -> np.ndarray:
        """What lies at `where` along the leading dimensions of our weight `path`, of it the `region`; a copy."""
        element = self._elements[path][where]
        tensor = self._tensors[element.peer.name]
        return tensor.copy(view(element, tensor.view())[region])

    def pieces(self, path: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Our weight `path` in order, a tensor of theirs at a time."""
        for index in self._elements[path]:
            yield self.read(path, index).astype(dtype, copy=False)


def _joined(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor | Joined]:
    """The tensors, with those that `names` has made one."""
    found: dict[str, Tensor | Joined] = dict(tensors)
    for first, rest in names.items():
        both = tuple(tensors[name] for name in (first, rest) if name in tensors)
        if len(both) == 2 and len({(part.spec.dtype, part.spec.shape[1:]) for part in both}) == 1:
            found[first] = Joined(both)
            del found[rest]
    return found


def _renamed(family: Family, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of the family's table."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in family.renamed:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise UserError(f"tensor {name}: is there twice, under the names of two versions")
        found[name] = tensor
    return found


def _tied_copies(tensors: dict[str, Tensor | Joined], wanted: dict[str, Element], left_over: set[str]) -> set[str]:
    """Those left over that hold nothing but the token embedding again, as some files of tied models do."""
    table = next((tensors[n] for n, e in wanted.items() if e.path == "embedding.embedding" and n in tensors), None)
    same = lambda t: t.spec == table.spec and np.array_equal(t.view(), table.view())  # noqa: E731
    return {name for name in left_over if name.endswith("lm_head.weight") and table is not None and same(tensors[name])}


def _refuse(what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise UserError(f"{len(names)} tensors {what}: {', '.join(names[:20])}{more}")


def export_specs(
    family: Family, shapes: dict[str, tuple[int, ...]], config: ModelConfig, dtype: np.dtype
) -> dict[str, tuple[Spec, list[Element]]]:
    """Their tensors in the order of names of a model with our weights of these `shapes`, and what each is made of."""
    made_of: dict[str, list[Element]] = {}
    for path, shape in shapes.items():
        for element in elements(family, path, shape, config):
            made_of.setdefault(element.peer.name, []).append(element)
    specs = {name: (Spec(dtype, peer_shape(of[0])), of) for name, of in made_of.items()}
    # Beside its running statistics torch keeps the number of batches behind them, which nothing reads.
    counted = (name.removesuffix(STATISTIC) for name in made_of if name.endswith(f".{STATISTIC}"))
    specs |= {name + COUNTER: (Spec(np.dtype(np.int64), ()), []) for name in counted}
    return dict(sorted(specs.items()))


def export_tensor(spec: Spec, made_of: list[Element], read: Callable[[str, tuple[int, ...]], Any]) -> np.ndarray:
    """One tensor of theirs, 0 where it is made of nothing; `read(path, index)` gives what lies there in our weights."""
    theirs = np.zeros(spec.shape, spec.dtype)
    for element in made_of:
        view(element, theirs)[...] = read(element.path, element.index)
    return theirs
