"""From a Hugging Face directory to a checkpoint."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from model.safetensors import read_json
from tpu.errors import UserError
from train.resolve import resolve

if TYPE_CHECKING:
    import numpy as np

    from model.config import ModelConfig
    from model.families.mapping import Family
    from model.safetensors import Tensor
    from train.data.text.tokenizer import Tokenizer


PEER = "peer"  # the files of a workdir that came with an import and that export hands on


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")  # of which any is a whole tokenizer

HANDED_ON = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Opened:
    """A peer's directory, with everything checked that can be checked before its weights are read.

    Raises UserError for a directory that is not one, an architecture or option not known, tensors that do not fit.
    """

    def __init__(self, directory: pathlib.Path):
        from model.families.known import family_of
        from model.families.load import shapes
        from model.families.mapping import PeerWeights
        from model.safetensors import open_directory
        from train.tree import check_types

        if not directory.is_dir():
            raise UserError(f"from={directory}: no such directory")
        self.directory = directory
        self.options: dict[str, Any] = read_json(directory / "config.json")
        self.family: Family = family_of(self.options)
        self.model: ModelConfig = self.family.read(self.options)
        generation = directory / "generation_config.json"
        self.generation = self.options | (read_json(generation) if generation.is_file() else {})
        check_types(self.model, "model.")
        tensors: dict[str, Tensor] = open_directory(directory)
        if self.family.head:
            self.model = dataclasses.replace(self.model, tied_head=self.family.head not in tensors)
        self.weights = PeerWeights(self.family, tensors, shapes(self.model.placed("cpu", "float32")), self.model)

    def ends(self) -> list[int | str]:
        """What ends a document or an answer, as the directory's files name it, the plainest first."""
        described = self.directory / "tokenizer_config.json"
        token = read_json(described).get("eos_token") if described.is_file() else None
        token = token.get("content") if isinstance(token, dict) else token
        sections = (self.options, self.options.get("text_config"), self.generation)
        found = [section.get("eos_token_id") for section in sections if isinstance(section, dict)]
        found = [end for given in found for end in (given if isinstance(given, list) else [given])]
        return [end for end in dict.fromkeys([*found, token]) if isinstance(end, (int, str))]

    def beginning(self, tokenizer: Tokenizer) -> int | None:
        """What opens a document, where the files say so; of BERT it is the token that stands for the whole text."""
        from train.data.text.tokenizer import JsonTokenizer

        for section in (self.options, self.options.get("text_config"), self.generation):
            if isinstance(section, dict) and isinstance(found := section.get("bos_token_id"), int):
                return found
        named = self.model.kind == "encoder" and isinstance(tokenizer, JsonTokenizer)
        return tokenizer.id_of("[CLS]") if named else None


def row_length(model: ModelConfig) -> int:
    """Tokens of a row of an imported model: 1,024, or an image's and 256 more where those are more, if it can."""
    of_image = model.vision.vectors if model.fusion == "merge" else 0
    return min(model.max_positions, max(1024, of_image + 256))


def import_model(source: pathlib.Path, workdir: pathlib.Path, dtype: str) -> None:
    """Makes a workdir whose checkpoint, at step 0, holds the weights of a peer's directory and nothing else.

    Weights go from file to file, a tensor at a time. Raises UserError where that cannot be; nothing is left then.
    """
    import numpy as np

    from model.families import image_processor
    from model.families.load import shapes
    from model.safetensors import DTYPES, Spec, whole_directory, write_file
    from model.vision.resnet import FIXED_STATISTICS
    from train.checkpoint import checkpoint, manifest
    from train.config import DataConfig, Experiment, ObjectiveConfig
    from train.data.text.tokenizer import check_vocabulary, from_file
    from train.tree import to_dict
    from train.workdir import git_revision, versions, write_json

    opened = Opened(source)
    dtype = opened.weights.dtype if dtype == "auto" else dtype
    file = next((source / name for name in TOKENIZER_FILES if (source / name).is_file()), None)
    tokenizer: Tokenizer | None = from_file(str(file), opened.ends()) if file else None
    if tokenizer is not None:
        check_vocabulary(tokenizer, opened.model.vocab_size)
        beginning = opened.beginning(tokenizer)
        if beginning is not None and 0 <= beginning < tokenizer.vocab_size:
            tokenizer.beginning = beginning
    name = str((workdir / PEER / file.name).absolute()) if file else "bytes"
    data, images = DataConfig(tokenizer=name, context=row_length(opened.model)), None
    if opened.family.image_processor:
        images = image_processor.of_directory(source, opened.family.image_processor, opened.model.vision)
        data = dataclasses.replace(data, image_fit=images.fit, image_resample=images.resample)
        if images.fit == "native":
            data = dataclasses.replace(data, patches=image_processor.PATCHES)
    experiment = resolve(
        Experiment(
            name=source.resolve().name,
            model=dataclasses.replace(opened.model, weight_dtype=dtype),
            data=data,
            objective=ObjectiveConfig(name=opened.family.objective),
        )
    )
    numpy_dtype = np.dtype("float32") if dtype == "float32" else DTYPES["BF16"]
    sizes = shapes(experiment.model.placed("cpu", "float32"))
    specs = {f"weights.{path}": Spec(numpy_dtype, shape) for path, shape in sizes.items()}

    def pieces(name: str) -> Iterator[np.ndarray]:
        return opened.weights.pieces(name.removeprefix("weights."), numpy_dtype)

    with whole_directory(workdir) as made:
        step = made / "checkpoints" / "0"
        (step / "weights").mkdir(parents=True)
        write_file(step / "weights" / checkpoint.WEIGHTS_FILE, specs, pieces)
        meta = {
            "experiment": to_dict(experiment),
            "versions": versions(),
            "tokenizer": tokenizer.to_dict() if tokenizer else {"kind": "none"},
            "data_position": 0,
        }
        (step / "meta").mkdir()
        write_json(step / "meta" / "metadata", meta)
        leaves = {n: {"shape": list(spec.shape), "dtype": str(spec.dtype)} for n, spec in specs.items()}
        manifest.write(step, 0, leaves, {})
        tree = {"experiment": to_dict(experiment), "versions": versions(), "git_revision": git_revision()}
        write_json(made / "experiment.json", tree)
        (made / "experiment.py").write_text(_as_config_file(experiment, source), encoding="utf-8")
        (made / PEER).mkdir()
        hand_on(source, made / PEER)
        shutil.copyfile(source / "config.json", made / PEER / "config.json")
    # As published counts do, without what no training moves.
    count = sum(int(np.prod(shape)) for name, shape in sizes.items() if name.split(".")[-1] not in FIXED_STATISTICS)
    print(f"{opened.family.architectures[0]}: {count:,} parameters in {dtype}, from {source} to {workdir}")
    if images:
        print(images)
    if tokenizer is None:
        print(
            f"none of {', '.join(TOKENIZER_FILES)} there: evaluating, generating and training need one", file=sys.stderr
        )


def _as_config_file(experiment: Any, source: pathlib.Path) -> str:
    """The experiment as a file for --config."""
    branches = sorted(type(branch).__name__ for branch in vars(experiment).values() if dataclasses.is_dataclass(branch))
    return (
        f'"""What was imported from {source.resolve().name}: give it to train.pretrain as --config."""\n\n'
        "from model.config import VisionConfig\n"
        f"from train.config import Experiment, {', '.join(branches)}\n\n\n"
        "def get_config() -> Experiment:\n"
        '    """The experiment of the imported model; override data, optimizer and run by flags."""\n'
        f"    return {experiment!r}\n"
    )


def hand_on(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies to `target` the files of `source` that are handed on as they are."""
    for name in HANDED_ON:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
