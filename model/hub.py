"""Models from elsewhere, and ours for elsewhere: Hugging Face directories (config.json, safetensors, tokenizer files).

    python -m model.hub import --from=DIR --to=WORKDIR
    python -m model.hub export --checkpoint=WORKDIR --to=DIR
    python -m model.hub run --from=DIR --inputs=in.npz --out=out.npz [--new_tokens=N]

`import` makes a workdir that train.evaluate, serve.generate and train.pretrain take; WORKDIR/experiment.py is its
configuration. `export` writes a directory that transformers loads, with equal logits. `run` computes a model straight
from its directory on arrays that are named as transformers names them. What cannot be expressed is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from tpu.errors import UserError
from train import entry

if TYPE_CHECKING:
    import numpy as np

    from model.config import ModelConfig
    from model.families.mapping import Family
    from model.safetensors import Tensor
    from train.data.tokenizer import Tokenizer

# What each command reads, and of that what it cannot do without.
READS = {
    "import": {"from", "to", "dtype"},
    "export": {"checkpoint", "to", "ema", "family", "dtype", "shard_bytes"},
    "run": {"from", "inputs", "out", "new_tokens"},
}
NEEDS = {"import": ("from", "to"), "export": ("checkpoint", "to"), "run": ("from", "inputs", "out")}

if __name__ == "__main__":
    COMMAND = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    flags.DEFINE_string("from", None, "import, run: a directory with config.json and safetensors")
    flags.DEFINE_string("to", None, "import: the workdir to make; export: the directory to make")
    flags.DEFINE_string("checkpoint", None, "export: workdir of a run, or one of its step directories")
    flags.DEFINE_boolean("ema", False, "export: the moving average of the weights")
    flags.DEFINE_string(
        "family", None, "export: the model_type or architecture to write; default: as imported, or the first that fits"
    )
    flags.DEFINE_enum(
        "dtype", "auto", ["auto", "float32", "bfloat16"], "of the weights written; auto: as they are (float16: float32)"
    )
    flags.DEFINE_integer("shard_bytes", 5 * 10**9, "export: most bytes of one file", lower_bound=1)
    flags.DEFINE_string("inputs", None, "run: arrays to compute on, .npz")
    flags.DEFINE_string("out", None, "run: where to write the results, .npz")
    flags.DEFINE_integer("new_tokens", 0, "run: tokens to generate, each the most probable", lower_bound=0)

PEER = "peer"  # the files of a workdir that came with an import and that export hands on
HANDED_ON = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Options of config.json that a model does not have and that an export hands on from its import.
KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "boi_token_index",
    "eoi_token_index",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)


class Opened:
    """A peer's directory, with everything checked that can be checked before its weights are read.

    Raises UserError for a directory that is not one, an architecture or option not known, tensors that do not fit.
    """

    def __init__(self, directory: pathlib.Path):
        from model.families.known import family_of
        from model.families.mapping import PeerWeights
        from model.load import shapes
        from model.safetensors import open_directory, read_json
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
    from model.load import shapes
    from model.resnet import FIXED_STATISTICS
    from model.safetensors import DTYPES, Spec, whole_directory, write_file
    from train import checkpoint, manifest
    from train.config import DataConfig, Experiment, ObjectiveConfig
    from train.data.tokenizer import check_vocabulary, from_file
    from train.tree import to_dict
    from train.workdir import git_revision, versions, write_json

    opened = Opened(source)
    dtype = opened.weights.dtype if dtype == "auto" else dtype
    file = next((source / name for name in ("tokenizer.json", "tokenizer.model") if (source / name).is_file()), None)
    tokenizer: Tokenizer | None = from_file(str(file)) if file else None
    if tokenizer is not None:
        check_vocabulary(tokenizer, opened.model.vocab_size)
        beginning = opened.options.get("bos_token_id")
        if isinstance(beginning, int) and 0 <= beginning < tokenizer.vocab_size:
            tokenizer.beginning = beginning
    name = str((workdir / PEER / file.name).absolute()) if file else "bytes"
    data, images = DataConfig(tokenizer=name, context=row_length(opened.model)), None
    if opened.family.image_processor:
        images = image_processor.of_directory(source, opened.family.image_processor, opened.model.vision)
        data = dataclasses.replace(data, image_fit=images.fit, image_resample=images.resample)
    experiment = Experiment(
        name=source.resolve().name,
        model=dataclasses.replace(opened.model, weight_dtype=dtype),
        data=data,
        objective=ObjectiveConfig(name=opened.family.objective),
    ).resolved()
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
        (made / "experiment.py").write_text(_as_config_file(experiment, source))
        (made / PEER).mkdir()
        _hand_on(source, made / PEER)
        shutil.copyfile(source / "config.json", made / PEER / "config.json")
    # As published counts do, without what no training moves.
    count = sum(int(np.prod(shape)) for name, shape in sizes.items() if name.split(".")[-1] not in FIXED_STATISTICS)
    print(f"{opened.family.architectures[0]}: {count:,} parameters in {dtype}, from {source} to {workdir}")
    if images:
        print(images)
    if tokenizer is None:
        print(
            "no tokenizer.json or tokenizer.model there: evaluating, generating and training need one", file=sys.stderr
        )


def _as_config_file(experiment: Any, source: pathlib.Path) -> str:
    """The experiment as a file for --config."""
    branches = sorted(type(branch).__name__ for branch in vars(experiment).values() if dataclasses.is_dataclass(branch))
    return (
        f'"""What was imported from {source.resolve().name}: give it to train.pretrain as --config."""\n\n'
        "from model.vision_config import VisionConfig\n"
        f"from train.config import Experiment, {', '.join(branches)}\n\n\n"
        "def get_config() -> Experiment:\n"
        '    """The experiment of the imported model; override data, optimizer and run by flags."""\n'
        f"    return {experiment!r}\n"
    )


def _hand_on(source: pathlib.Path, target: pathlib.Path) -> None:
    for name in HANDED_ON:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def export_model(
    path: pathlib.Path, target: pathlib.Path, family_name: str | None, dtype: str, shard_bytes: int, field: str
) -> None:
    """Writes a checkpoint as a directory that transformers loads. Raises UserError for what it could not express."""
    import jax
    import numpy as np

    from model.families.known import describe, named, that_can_express
    from model.families.mapping import export_specs, export_tensor
    from model.kinds import build
    from model.safetensors import NAMES, read_json, whole_directory, write_directory
    from model.stack import joined
    from tpu import host, rules
    from tpu.mesh import make_mesh
    from train import checkpoint
    from train.config import Experiment, MeshConfig
    from train.tree import from_dict

    step_dir = checkpoint.find(path)
    meta = checkpoint.read_meta(step_dir)
    experiment = from_dict(Experiment, meta["experiment"])
    peer = step_dir.resolve().parent.parent / PEER
    imported = read_json(peer / "config.json") if (peer / "config.json").is_file() else {}
    model = experiment.model
    if model.positions != "learned":
        model = dataclasses.replace(model, max_positions=max(model.max_positions, experiment.data.context))
    chosen = family_name or (imported.get("architectures") or [imported.get("model_type")])[0]
    family = that_can_express(model, named(chosen)) if chosen else that_can_express(model)
    options = _with_kept(describe(family, model), imported)
    _, abstract, axes = build(model.placed(host.start_backend(), "float32"))
    layout = rules.tree_shardings(make_mesh(MeshConfig(), jax.devices()[:1]), axes, abstract)
    abstract = jax.tree.map(lambda w, s: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=s), abstract, layout)
    weights = checkpoint.load_weights(step_dir, abstract, field)
    if "stack" in weights:
        weights = weights | {"stack": joined(weights["stack"], model.pipeline_repeats)}
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    }
    numpy_dtype = np.dtype(jax.numpy.dtype(model.weight_dtype if dtype == "auto" else dtype))
    specs = export_specs(family, {n: leaf.shape for n, leaf in leaves.items()}, model, numpy_dtype)

    def pieces(name: str) -> Iterable[np.ndarray]:
        return [export_tensor(*specs[name], lambda path, index: np.asarray(leaves[path][index]))]

    options["dtype"] = options["torch_dtype"] = {"F32": "float32", "BF16": "bfloat16"}[NAMES[numpy_dtype]]
    with whole_directory(target) as made:
        _hand_on(peer, made)
        _write_tokenizer(meta["tokenizer"], made, options)
        (made / "config.json").write_text(json.dumps(options, indent=2, sort_keys=True) + "\n")
        write_directory(made, {name: spec for name, (spec, _) in specs.items()}, pieces, shard_bytes)
    print(f"{family.architectures[0]}: {len(specs)} tensors in {numpy_dtype}, from {step_dir} to {target}")


def _with_kept(options: dict[str, Any], imported: dict[str, Any]) -> dict[str, Any]:
    """The options with those of KEPT that were imported, in each section of config.json."""
    kept = {name: imported[name] for name in KEPT if name in imported}
    sections = [n for n, o in options.items() if isinstance(o, dict) and isinstance(imported.get(n), dict)]
    return kept | options | {name: _with_kept(options[name], imported[name]) for name in sections}


def _write_tokenizer(saved: dict[str, Any], made: pathlib.Path, options: dict[str, Any]) -> None:
    """Writes the checkpoint's tokenizer where none was handed on, and its end of document into the options."""
    if saved["kind"] != "tokenizer.json" or (made / "tokenizer.json").exists():
        return
    from train.data.tokenizer import from_dict

    tokenizer = from_dict(saved)
    (made / "tokenizer.json").write_text(saved["text"])
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.end_of_document_name}
    (made / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    for section in (options, options.get("text_config", {})):
        section["bos_token_id"] = section["eos_token_id"] = tokenizer.end_of_document


def run_model(source: pathlib.Path, inputs_file: pathlib.Path, out: pathlib.Path, new_tokens: int) -> None:
    """Computes a peer's model on arrays, in float32. Raises UserError for arrays that it does not take."""
    import jax
    import numpy as np

    from model.load import load
    from tpu import host
    from tpu.mesh import make_mesh
    from train.config import MeshConfig

    entry.need_directory(out=str(out))
    try:
        with np.load(inputs_file, allow_pickle=False) as file:
            inputs = dict(file)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"inputs={inputs_file}: not an .npz file of arrays ({error})") from error
    opened = Opened(source)
    jax.config.update("jax_default_matmul_precision", "highest")
    model = dataclasses.replace(opened.model, weight_dtype=opened.weights.dtype, compute_dtype="float32")
    model = model.placed(host.start_backend(), "float32")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        found = opened.family.run(model, load(opened.weights, model, mesh), inputs, new_tokens, opened.generation)
    with out.open("wb") as file:
        np.savez(file, **found)
    print(", ".join(f"{name} {list(value.shape)}" for name, value in found.items()))


def main() -> int:
    """Runs the command."""
    if COMMAND not in READS:
        raise UserError(f"command {COMMAND!r}: give one of {', '.join(READS)} before the flags")
    options = {flag.name: flag for flag in entry.FLAGS.flags_by_module_dict()[sys.argv[0]]}
    for name, flag in options.items():
        if flag.present and name not in READS[COMMAND]:
            readers = ", ".join(command for command, names in READS.items() if name in names)
            raise UserError(f"--{name} means nothing to {COMMAND}; it belongs to {readers}")
    given = {name: flag.value for name, flag in options.items()}
    entry.need(**{name: given[name] for name in NEEDS[COMMAND]})
    path = {name: pathlib.Path(given[name]) for name in NEEDS[COMMAND]}
    match COMMAND:
        case "import":
            import_model(path["from"], path["to"], given["dtype"])
        case "export":
            field = "ema" if given["ema"] else "weights"
            limits = given["dtype"], given["shard_bytes"]
            export_model(path["checkpoint"], path["to"], given["family"], *limits, field)
        case "run":
            run_model(path["from"], path["inputs"], path["out"], given["new_tokens"])
    return 0


if __name__ == "__main__":
    entry.run(main)
