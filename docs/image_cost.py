"""What a batch with images costs beside one of text alone at equal FLOPs, as docs/performance.md's table.

    python docs/image_cost.py [--rounds=2]

The same text model (4 layers, width 256) with and without an image encoder (4 layers, width 256, 64 patches, 16
vectors) in one jitted training step of AdamW, timed by train.benchmark in processes that take turns. A batch with
images has more FLOPs, so what is compared is seconds per FLOP: 1.10 means that its FLOPs take a tenth longer than a
text's.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
CASES = {
    "text alone": "merge,text",
    "`merge`": "merge,questions",
    "`cross`": "cross,questions",
    "`co`": "co,questions",
    "`tangled`": "tangled,questions",
}
SHAPE = {"model.layers": 4, "model.embed_dim": 256, "model.heads": 4, "data.batch_size": 16}
SHAPE |= {"optimizer.name": "adamw", "optimizer.frozen": ()}  # Everything is trained, in co and tangled too.
SIGHT = {"model.vision.layers": 4, "model.vision.embed_dim": 256, "model.vision.heads": 4}
TOKENS = 80  # of a row; of merge 16 of them are the image's


def measure(argument: str) -> dict[str, float]:
    """Figures of one run of train.benchmark."""
    sees = argument != CASES["text alone"]
    overrides = SHAPE | {"data.context": TOKENS} | (SIGHT if sees else {})
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "figures.json"
        command = [sys.executable, "-m", "train.benchmark", f"--config=configs/sight.py:{argument}", *flags]
        subprocess.run([*command, "--steps=10", f"--json={file}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())


def main() -> None:
    """Measures every case in every round and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = [{name: measure(of) for name, of in CASES.items()} for _ in range(parser.parse_args().rounds)]
    print(f"{rounds[0]['text alone']['device']}, {rounds[0]['text alone']['compute_dtype']}, {len(rounds)} rounds\n")
    print("| batch | GFLOP per step | seconds per step | GFLOP/s | seconds per FLOP beside text alone (all rounds) |")
    print("|---|---|---|---|---|")
    for name in CASES:
        work = SHAPE["data.batch_size"] * TOKENS * rounds[0][name]["flops_per_token"]
        seconds = [found[name]["step_seconds"] for found in rounds]
        cost = [f["text alone"]["model_flops_per_second"] / f[name]["model_flops_per_second"] for f in rounds]
        spread = f"{statistics.median(cost):.2f} ({min(cost):.2f} to {max(cost):.2f})"
        median = statistics.median(seconds)
        print(f"| {name} | {work / 1e9:,.0f} | {median:.3f} | {work / median / 1e9:,.0f} | {spread} |")


if __name__ == "__main__":
    main()
