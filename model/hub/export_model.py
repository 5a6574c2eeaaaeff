"""From a checkpoint to a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from model.hub.import_model import PEER, TOKENIZER_FILES, hand_on

if TYPE_CHECKING:
    import numpy as np


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
    from model.weights import dense
    from model.weights import named as by_names
    from tpu import host, rules
    from tpu.mesh import make_mesh
    from train.checkpoint import checkpoint
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
    leaves = {".".join(names): dense(weight) for names, weight in by_names(weights).items()}
    numpy_dtype = np.dtype(jax.numpy.dtype(model.weight_dtype if dtype == "auto" else dtype))
    specs = export_specs(family, {n: leaf.shape for n, leaf in leaves.items()}, model, numpy_dtype)

    def pieces(name: str) -> Iterable[np.ndarray]:
        return [export_tensor(*specs[name], lambda path, index: np.asarray(leaves[path][index]))]

    options["dtype"] = options["torch_dtype"] = {"F32": "float32", "BF16": "bfloat16"}[NAMES[numpy_dtype]]
    with whole_directory(target) as made:
        hand_on(peer, made)
        _write_tokenizer(meta["tokenizer"], made, options)
        (made / "config.json").write_text(json.dumps(options, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_directory(made, {name: spec for name, (spec, _) in specs.items()}, pieces, shard_bytes)
    print(f"{family.architectures[0]}: {len(specs)} tensors in {numpy_dtype}, from {step_dir} to {target}")


def _with_kept(options: dict[str, Any], imported: dict[str, Any]) -> dict[str, Any]:
    """The options with those of KEPT that were imported, in each section of config.json."""
    kept = {name: imported[name] for name in KEPT if name in imported}
    sections = [n for n, o in options.items() if isinstance(o, dict) and isinstance(imported.get(n), dict)]
    return kept | options | {name: _with_kept(options[name], imported[name]) for name in sections}


def _write_tokenizer(saved: dict[str, Any], made: pathlib.Path, options: dict[str, Any]) -> None:
    """Writes the checkpoint's tokenizer where none was handed on, and its end of document into the options."""
    if saved["kind"] == "none" or any((made / name).exists() for name in TOKENIZER_FILES):
        return
    from train.data.text.tokenizer import from_dict

    tokenizer = from_dict(saved)
    files = tokenizer.files()
    for name, content in files.items():
        (made / name).write_bytes(content)
    if "tokenizer_config.json" not in files:
        print(f"{', '.join(files)}: for the package sentencepiece; transformers has no class for it", file=sys.stderr)
    for section in (options, options.get("text_config", {})):
        section["bos_token_id"], section["eos_token_id"] = tokenizer.beginning, tokenizer.end_of_document
