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
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from model.hub.export_model import export_model
from model.hub.import_model import Opened, import_model
from tpu.errors import UserError
from train import entry

if TYPE_CHECKING:
    pass

# What each command reads, and of that what it cannot do without.
READS = {
    "import": {"from", "to", "dtype"},
    "export": {"checkpoint", "to", "ema", "family", "dtype", "shard_bytes"},
    "run": {"from", "inputs", "out", "new_tokens"},
}
NEEDS = {"import": ("from", "to"), "export": ("checkpoint", "to"), "run": ("from", "inputs", "out")}

if __name__ == "__main__":
    COMMAND = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    flags.DEFINE(entry.PATH, "from", None, "import, run: a directory with config.json and safetensors")
    flags.DEFINE(entry.PATH, "to", None, "import: the workdir to make; export: the directory to make")
    flags.DEFINE(entry.PATH, "checkpoint", None, "export: workdir of a run, or one of its step directories")
    flags.DEFINE_boolean("ema", False, "export: the moving average of the weights")
    flags.DEFINE_string(
        "family", None, "export: the model_type or architecture to write; default: as imported, or the first that fits"
    )
    flags.DEFINE_enum(
        "dtype", "auto", ["auto", "float32", "bfloat16"], "of the weights written; auto: as they are (float16: float32)"
    )
    flags.DEFINE_integer("shard_bytes", 5 * 10**9, "export: most bytes of one file", lower_bound=1)
    flags.DEFINE(entry.PATH, "inputs", None, "run: arrays to compute on, .npz")
    flags.DEFINE(entry.PATH, "out", None, "run: where to write the results, .npz")
    flags.DEFINE_integer("new_tokens", 0, "run: tokens to generate, each the most probable", lower_bound=0)


def run_model(source: pathlib.Path, inputs_file: pathlib.Path, out: pathlib.Path, new_tokens: int) -> None:
    """Computes a peer's model on arrays, in float32. Raises UserError for arrays that it does not take."""
    import jax
    import numpy as np

    from model.families.load import load
    from tpu import host
    from tpu.mesh import make_mesh
    from train.config import MeshConfig

    entry.need_writable(out=str(out))
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
    try:
        with out.open("wb") as file:
            np.savez(file, **found)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror})") from error
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
