"""Fine-tunes a checkpoint on another corpus by every adapter and writes the tables of docs/adapters.md.

    python docs/adapters_table.py --base=runs/quickstart --corpus=FILE.txt --workdir=runs/adapters

Held-out bits per byte of the corpus, before and after; what is trained and kept; the base's own held-out figure at the
end. Then the parameters of GPT-2 with shared layers. Run it from the repository's root.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
KINDS = ("lora", "dora", "bottleneck", "prefix")  # The quick start's model has no biases.
SHARED = {
    "each its own": [],
    "groups of 3": ["--config.model.share_layers=groups", "--config.model.share_size=3"],
    "2 sets in turn": ["--config.model.share_layers=alternate", "--config.model.share_size=2"],
    "all one": ["--config.model.share_layers=all"],
    "all one, each with factors of rank 8": ["--config.model.share_layers=all", "--config.model.share_rank=8"],
}


def call(module: str, *arguments: str) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def bits(checkpoint: pathlib.Path) -> float:
    """Held-out bits per byte, over all held-out documents."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        call("train.evaluate", f"--checkpoint={checkpoint}", f"--json={file.name}")
        return json.load(file)["eval"]["bits_per_byte"]


def adapters(base: pathlib.Path, corpus: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    """The table with a row per kind."""
    lines = ["| adapter | trained | with optimizer, MiB | checkpoint, KiB | bits per byte of the corpus |"]
    lines.append("|---|---:|---:|---:|---:|")

    def finetune(kind: str, folder: pathlib.Path, *more: str) -> tuple[str, float]:
        flags = [f"--checkpoint={base}", f"--config=configs/adapter.py:{kind}", f"--workdir={folder}"]
        flags += [f"--config.data.sources=('{corpus}',)", "--config.data.holdout=0.1", *more]
        summary = call("train.finetune", *flags, "--dry_run")
        call("train.finetune", *flags)
        return summary, bits(folder)

    # A new adapter is its base to the last bit.
    still = ("--config.run.steps=1", "--config.optimizer.warmup_steps=0", "--config.optimizer.learning_rate=0")
    _, before = finetune("lora", workdir / "none", *still)
    lines.append(f"| none | | | | {before:.3f} |")
    for kind in KINDS:
        summary, after = finetune(kind, workdir / kind)
        trained = re.search(r"^trained +([\d,]+)", summary, re.M)[1]
        found = re.search(r"weights ([\d.]+ \w+), optimizer ([\d.]+ \w+)", summary)
        memory = sum(float(n) / (1024 if unit == "KiB" else 1) for n, unit in (part.split() for part in found.groups()))
        step = max((workdir / kind / "checkpoints").iterdir(), key=lambda path: int(path.name))
        size = sum(file.stat().st_size for file in step.rglob("*") if file.is_file()) / 1024
        lines.append(f"| {kind} | {trained} | {memory:.1f} | {size:,.0f} | **{after:.3f}** |")
        print(lines[-1], flush=True)
    return lines


def shared() -> list[str]:
    """The table of GPT-2's parameters."""
    lines = ["| 12 layers of GPT-2 124m | parameters |", "|---|---:|"]
    for name, flags in SHARED.items():
        summary = call("train.pretrain", "--config=configs/gpt2.py:124m", "--dry_run", *flags)
        lines.append(f"| {name} | {re.search(r'^parameters +([0-9,]+)', summary, re.M)[1]} |")
    return lines


def replace(page: str, mark: str, lines: list[str]) -> str:
    """The page with what stands between two marks replaced."""
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda found: found[1] + "\n".join(lines) + "\n" + found[2], page, count=1, flags=re.S)


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "corpus", "workdir"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    given = parser.parse_args()
    base, workdir = given.base.resolve(), given.workdir.resolve()
    page = ROOT / "docs" / "adapters.md"
    before = bits(base)
    lines = adapters(base, given.corpus.resolve(), workdir)
    lines += [
        "",
        f"The base on its own held-out documents: {before:.4f} before all this and {bits(base):.4f} after it.",
    ]
    text = replace(page.read_text(), "adapters", lines)
    page.write_text(replace(text, "shared", shared()))


if __name__ == "__main__":
    main()
