"""Writes the tables of families in docs/models.md from the recorded cases in tests/peers.

    python docs/models_table.py            # models of text, and their speed
    python docs/models_table.py --sight    # models that see

Computes every case as the tests do; needs neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from attention_table import SPEEDS, tokens_per_second  # noqa: E402

from model.config import ModelConfig  # noqa: E402
from model.families.known import family_of  # noqa: E402
from model.families.mapping import Family  # noqa: E402
from tests.peers import test_cases, test_encoder_cases, vision_case  # noqa: E402
from tpu.mesh import make_mesh  # noqa: E402
from train.config import MeshConfig  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: written by docs/models_table.py -->", "<!-- end of families -->"
HEAD = (
    "| architecture | file | paper | draws | logits | loss | gradient norms | greedy tokens, cached "
    "| tokens/s at 512 | at 8,192 | command |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)
SIGHT_BEGIN, SIGHT_END = "<!-- families that see: docs/models_table.py --sight -->", "<!-- end of families that see -->"
SIGHT_HEAD = (
    "| architecture | file | paper | draws | outputs | loss | gradient norms | greedy tokens, cached | command |",
    "|---|---|---|---|---|---|---|---|---|",
)
SIZES = ("vocab_size", "layers", "embed_dim", "heads", "kv_heads", "head_dim", "mlp_dim", "expert_dim", "query_scalar")


@functools.cache
def dense(context: int, rows: int) -> float:
    """Tokens per second of a dense layer."""
    return tokens_per_second({}, context, rows)


def speeds(model: ModelConfig) -> list[str]:
    """Tokens per second of a layer, of width 128 but otherwise as the model's, relative to dense."""
    fields = {name: value for name, value in dataclasses.asdict(model).items() if name not in SIZES}
    groups = math.lcm(2, len(model.pattern))
    fields |= {"layers": groups, "decoder_layers": groups * (model.kind == "encoder_decoder")}
    fields |= {"window": 256 * ("local" in model.pattern), "max_positions": 8192}
    allowed = SPEEDS if model.kind == "decoder" else SPEEDS[:1]
    found = [tokens_per_second(fields, *size) / dense(*size) for size in allowed]
    return [f"{ratio:.2f}" for ratio in found] + ["—"] * (len(SPEEDS) - len(found))


def row(family: Family, model: ModelConfig, found: list[dict[str, float]], tokens: int) -> str:
    """One line: the largest error of each kind over all draws."""
    worst = {name: max(errors[name] for errors in found) for name in found[0]}
    file = getattr(family.read, "func", family.read).__module__.replace(".", "/") + ".py"
    said = "differ" if worst["wrong_tokens"] else f"{tokens} of {tokens} equal" if tokens else "—"
    figures = " | ".join(f"{worst[name]:.0e}" for name in ("logits", "loss", "gradient_norms"))
    encodes, name = model.kind != "decoder", family.architectures[0]
    tests = (
        f"test_encoder_cases.py -k {name}" if encodes else f"test_cases.py -k {family.model_type.removesuffix('_text')}"
    )
    cells = [name, f"[{file}](../{file})", family.paper, str(len(found)), figures, said, *speeds(model)]
    return f"| {' | '.join(cells)} | `pytest tests/peers/{tests}` |"


def sight_rows() -> list[str]:
    """One line for each family of tests/peers/vision_cases."""
    mesh, found = make_mesh(MeshConfig(), jax.devices()[:1]), {}
    for path in sorted(file.parent for file in vision_case.CASES.glob("*/case.json")):
        with jax.set_mesh(mesh):
            found.setdefault(path.name[:-2], []).append(
                (vision_case.opened(path, mesh), vision_case.compare(path, mesh))
            )
        print(path.name, found[path.name[:-2]][-1][1], flush=True)
    rows = []
    for name, draws in found.items():
        cases, errors = zip(*draws, strict=True)
        family = cases[0].opened.family
        file = getattr(family.read, "func", family.read).__module__.replace(".", "/") + ".py"
        apart = ("loss", "gradient_norms", "wrong_tokens", "tolerance")
        outputs = max(value for of in errors for key, value in of.items() if key not in apart)
        loss, gradients = (max(of[key] for of in errors) for key in ("loss", "gradient_norms"))
        tokens = sum(case.record.get("certain_tokens", 0) for case in cases)
        wrong = any(of["wrong_tokens"] for of in errors)
        said = "differ" if wrong else f"{tokens} of {tokens} equal" if tokens else "—"
        cells = [family.architectures[0], f"[{file}](../{file})", family.paper, str(len(draws))]
        cells += [f"{outputs:.0e}", f"{loss:.0e}", f"{gradients:.0e}", said]
        rows.append(f"| {' | '.join(cells)} | `pytest tests/peers/test_vision_cases.py -k {name}` |")
    return rows


def write(begin: str, lines: list[str], end: str) -> None:
    """Puts the lines between the marks in the page."""
    before, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(before + "\n".join([begin, *lines, end]) + rest.partition(end)[2])


def main() -> None:
    """Computes all cases and writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sight", action="store_true", help="the table of models that see")
    if parser.parse_args().sight:
        return write(SIGHT_BEGIN, [*SIGHT_HEAD, *sight_rows()], SIGHT_END)
    found: dict[str, list[dict[str, float]]] = {}
    families: dict[str, Family] = {}
    models: dict[str, ModelConfig] = {}
    tokens: dict[str, int] = {}
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for path in [*test_cases.CASES, *test_encoder_cases.CASES]:
        options = json.loads((path / "config.json").read_text())
        family = family_of(options)
        name, encodes = family.architectures[0], path in test_encoder_cases.CASES
        with jax.set_mesh(mesh):
            errors = (test_encoder_cases if encodes else test_cases).compare(path, mesh)
        print(path.name, errors)
        families[name] = family
        models[name] = family.read(options).placed("cpu", "float32")
        found.setdefault(name, []).append(errors)
        if not encodes:
            tokens[name] = tokens.get(name, 0) + json.loads((path / "case.json").read_text())["certain_tokens"]
        elif models[name].kind == "encoder_decoder":
            tokens[name] = tokens.get(name, 0) + np.load(path / "case.npz")["sequences"].shape[1] - 1
    rows = []
    for name, family in families.items():
        rows.append(row(family, models[name], found[name], tokens.get(name, 0)))
        print(rows[-1], flush=True)
    write(BEGIN, [*HEAD, *rows], END)


if __name__ == "__main__":
    main()
