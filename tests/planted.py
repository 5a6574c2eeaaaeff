"""Plants ten faults, one at a time, in a copy of the code, and shows which of the nearby default tests catches each.

    python tests/planted.py [--only=wrong_mask,lost_segment]

Not run by pytest: it takes some minutes. First the tests must pass without a fault. A fault is found by a piece of
code, wherever that lies; where no file or more than one holds it, the table says so, and the piece is to be renewed
here. Exits with 1 unless every fault is caught.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("model", "serve", "tpu", "train")


class Fault(NamedTuple):
    """What is written in place of a piece of code, and the tests (arguments of pytest) that are to see it."""

    right: str
    wrong: str
    tests: tuple[str, ...]


ATTENTION = ("tests/model/attention/test_attention.py",)
TRANSFORMER = ("tests/model/test_transformer.py", "-k", "reference or packed or later")
CROSS_ENTROPY = ("tests/train/test_meshes.py", "-k", "gradient and (data8 or fsdp4-tensor2)")
CHECKPOINT = ("tests/train/checkpoint/test_checkpoint.py", "-k", "damaged or flipped")

FAULTS = {
    # A token sees the next one.
    "wrong_mask": Fault("seen = distance >= 0", "seen = distance >= -1", ATTENTION),
    # A document sees the others of its row.
    "lost_segment": Fault(
        "return together & seen & (distance < window) if window else together & seen",
        "return seen & (distance < window) if window else seen",
        ATTENTION,
    ),
    "swapped_gate": Fault("together(x, self.gate, self.up)", "together(x, self.up, self.gate)", TRANSFORMER),
    # Scores of self-attention grow with the size of heads.
    "wrong_scale": Fault("q = q * self.scale", "q = q * 1.0", TRANSFORMER),
    # Each device keeps the loss of its own rows.
    "unreduced_shard": Fault(
        "return *jax.lax.psum((loss, nll), spread.axes), d_weights, d_hidden",
        "return loss, nll, d_weights, d_hidden",
        CROSS_ENTROPY,
    ),
    # Generation reads what the slot held before.
    "stale_cache_slot": Fault(
        "return put(cached[0], k), put(cached[1], v)",
        "return put(cached[0], k), cached[1]",
        ("tests/model/generate/test_decode.py", "-k", "every_position or repeated_full"),
    ),
    "off_by_one_schedule": Fault(
        "rest = steps - config.warmup_steps",
        "rest = steps - config.warmup_steps + 1",
        ("tests/train/optimize/test_schedule.py",),
    ),
    # The short last row of held-out text.
    "dropped_row": Fault(
        "self._rows = -(-len(stream) // context) if keep_last",
        "self._rows = max(1, len(stream) // context) if keep_last",
        ("tests/train/data/text/test_packing.py",),
    ),
    # Activations in bfloat16 where float32 is said.
    "silent_cast": Fault(
        "ACTIVATIONS[activation](h.astype(jnp.float32))",
        "ACTIVATIONS[activation](h.astype(jnp.bfloat16)).astype(jnp.float32)",
        TRANSFORMER,
    ),
    # A checkpoint's files are taken for what the manifest says.
    "wrong_digest": Fault('_sha256(step_dir / name) != file["sha256"]', '_sha256(step_dir / name) == ""', CHECKPOINT),
}


def holders(root: Path, text: str) -> list[Path]:
    """The files of the packages that hold a piece of code."""
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return [path for path in files if text in path.read_text()]


def failures(root: Path, tests: tuple[str, ...]) -> tuple[int, list[str]]:
    """pytest's exit status and the names of the tests that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no", *tests]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.returncode, re.findall(r"^(?:FAILED|ERROR) \S*::(\S+)", done.stdout, re.MULTILINE)


def tried(root: Path, fault: Fault) -> str:
    """What came of it: "caught by NAME" or why not."""
    found = holders(root, fault.right)
    if len(found) != 1 or found[0].read_text().count(fault.right) != 1:
        return f"not planted: the code is in {len(found)} files; renew it in tests/planted.py"
    text = found[0].read_text()
    found[0].write_text(text.replace(fault.right, fault.wrong))
    status, names = failures(root, fault.tests)
    found[0].write_text(text)
    if status != 1 or not names:
        return f"NOT CAUGHT (pytest's status {status})"
    return f"caught by {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def main() -> None:
    """Copies, plants, tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAULTS), help="names of faults, with commas")
    chosen = {name: FAULTS[name] for name in parser.parse_args().only.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "foursight"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "*.egg-info"))
        for tests in dict.fromkeys(fault.tests for fault in chosen.values()):
            status, names = failures(root, tests)
            if status:
                sys.exit(f"without a fault, pytest {' '.join(tests)} ends with status {status}: {', '.join(names)}")
        found = {}
        for name, fault in chosen.items():
            found[name] = tried(root, fault)
            print(f"| {name} | {' '.join(fault.tests)} | {found[name]} |", flush=True)
    sys.exit(any(not told.startswith("caught") for told in found.values()))


if __name__ == "__main__":
    main()
