"""What can be done with a trained adapter: merge, export, import.

    python -m train.adapter merge --checkpoint=runs/lora --workdir=runs/merged
    python -m train.adapter export --checkpoint=runs/lora --to=DIR
    python -m train.adapter import --from=DIR --checkpoint=runs/base --workdir=runs/imported

merge writes base and adapter as one ordinary checkpoint, matrices in float32. export writes the layout of Hugging Face
PEFT (adapter_config.json and adapter_model.safetensors), import makes a checkpoint of it, over the base given.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

from absl import flags

from tpu.errors import UserError
from train import entry
from train.config import AdapterConfig, Experiment, RunConfig
from train.resolve import resolve
from train.tree import from_dict, to_dict

VERBS = ("merge", "export", "import")

if __name__ == "__main__":
    VERB = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    flags.DEFINE(entry.PATH, "checkpoint", None, "an adapter's checkpoint; with import: the base")
    flags.DEFINE(entry.PATH, "base", None, "where the adapter's base lies now; default: where it was")
    flags.DEFINE(entry.PATH, "workdir", None, "merge, import: directory of the new checkpoint")
    flags.DEFINE(entry.PATH, "to", None, "export: directory to write")
    flags.DEFINE(entry.PATH, "from", None, "import: directory that PEFT wrote")


def main() -> int:
    """Does what the word on the command line says."""
    options = entry.FLAGS
    if VERB not in VERBS:
        raise UserError(f"{VERB or 'no verb given'}: valid: {', '.join(VERBS)}, as in: python -m train.adapter merge")
    entry.need(checkpoint=options.checkpoint)
    checkpoint = pathlib.Path(options.checkpoint)
    if VERB == "merge":
        entry.need(workdir=options.workdir)
        merge(checkpoint, pathlib.Path(options.workdir), options.base)
    elif VERB == "export":
        entry.need(to=options.to)
        export(checkpoint, pathlib.Path(options.to), options.base)
    else:
        entry.need(workdir=options.workdir, **{"from": options["from"].value})
        import_peft(pathlib.Path(options["from"].value), checkpoint, pathlib.Path(options.workdir))
    return 0


def merge(path: pathlib.Path, workdir: pathlib.Path, base: str | None = None) -> None:
    """Writes the adapter's model, with the adapter in its weights, as step 0 of a new workdir."""
    from train.adapter.frozen import adapted_role, references
    from train.checkpoint.checkpoint import read_meta
    from train.restore import open_checkpoint

    trained = open_checkpoint(path, base=base)
    meta = read_meta(trained.step_dir)
    experiment = from_dict(Experiment, meta["experiment"])
    if experiment.adapter.kind == "none":
        raise UserError(f"checkpoint={trained.step_dir}: is no adapter; there is nothing to merge")
    import jax
    import jax.numpy as jnp

    from model.weights import dense, is_weight

    # Rounding to the base's number format would take from small changes what they are.
    model = dataclasses.replace(experiment.model, weight_dtype="float32")
    weights = jax.tree.map(lambda w: dense(w).astype(jnp.float32), trained.weights, is_leaf=is_weight)
    of_others = references(meta, experiment)
    del of_others[adapted_role(experiment)]
    meta = {name: value for name, value in meta.items() if name != "base"} | {"frozen": of_others}
    _write(workdir, weights, meta, dataclasses.replace(experiment, model=model, adapter=AdapterConfig()))


def export(path: pathlib.Path, to: pathlib.Path, base: str | None = None) -> None:
    """Writes the adapter in PEFT's layout."""
    from train.adapter import peft
    from train.adapter.frozen import adapted_role, find_frozen, references
    from train.adapter.weights import parts
    from train.checkpoint import checkpoint

    step_dir = checkpoint.find(path)
    meta = checkpoint.read_meta(step_dir)
    experiment = from_dict(Experiment, meta["experiment"])
    if experiment.adapter.kind == "none":
        raise UserError(f"checkpoint={step_dir}: is no adapter; there is nothing to export")
    below = find_frozen(references(meta, experiment)[adapted_role(experiment)], step_dir, base)
    config = experiment.model.placed("cpu", "float32")
    known = parts(experiment.adapter, config)
    trained = checkpoint.load_weights(step_dir, known.trained)
    frozen = checkpoint.load_weights(below.step_dir, known.base)
    peft.export(to, experiment.adapter, config, trained, frozen, str(below.step_dir))
    print(f"written to {to}: {peft.CONFIG}, {peft.TENSORS}")


def import_peft(source: pathlib.Path, path: pathlib.Path, workdir: pathlib.Path) -> None:
    """Writes an adapter that PEFT wrote as step 0 of a new workdir, over the base in `path`."""
    from model import kinds
    from train.adapter import peft
    from train.adapter.frozen import adapted_role, open_frozen
    from train.checkpoint import checkpoint

    base = open_frozen(path)
    config = base.experiment.model.placed("cpu", "float32")
    frozen = checkpoint.load_weights(base.step_dir, kinds.build(config)[1])
    adapter, trained = peft.load(source, config, frozen)
    of_base = {adapted_role(base.experiment): base.reference()}
    meta = checkpoint.read_meta(base.step_dir) | {"frozen": of_base}
    _write(workdir, trained, meta, resolve(dataclasses.replace(base.experiment, adapter=adapter)))


def _write(path: pathlib.Path, weights: Any, meta: dict[str, Any], experiment: Experiment) -> None:
    """Makes the workdir `path`, with these weights as step 0, as a whole or not at all."""
    from model.safetensors import whole_directory
    from train.checkpoint.checkpoint import Checkpointer
    from train.workdir import Workdir, versions

    meta = meta | {"experiment": to_dict(experiment), "versions": versions(), "data_position": 0}
    with whole_directory(path) as made:
        checkpointer = Checkpointer(made / "checkpoints", RunConfig())
        checkpointer.save(0, {"weights": weights}, meta)
        if not checkpointer.close():
            raise UserError(f"workdir={path}: the checkpoint could not be written")
        workdir = Workdir(made)
        workdir.write_experiment(experiment)
        workdir.close()
    print(f"written to {path}")


if __name__ == "__main__":
    entry.run(main)
