"""Our speed beside PyTorch's, interleaved in one run, as a Markdown table.

In every round each contender runs once, one after the other, each in its own process: ours (`train.benchmark`), then
the PyTorch twin of `gpt_torch.py`, eager and compiled; for decoding ours, then `transformers`. The ratio is taken
inside a round and its median over rounds is reported, so that a machine whose speed drifts favours nobody. So are those
of the first step to the compiled twin's, and of peak memory to the smaller of both twins'. The share of the processor
that went to anything else is reported too: a busy machine slows OpenMP's threads more than XLA's, and figures taken on
one flatter us. The two sides may be different interpreters, since torch is no dependency of ours:

python tests/peers/compare_speed.py --torch_python=/path/to/an/environment/with/torch/and/transformers/bin/python
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TWIN = str(Path(__file__).with_name("gpt_torch.py"))
CASES = {
    "small": {"layers": 6, "embed_dim": 384, "heads": 6, "context": 256, "batch_size": 12, "vocab_size": 65},
    "124m": {"layers": 12, "embed_dim": 768, "heads": 12, "context": 512, "batch_size": 4, "vocab_size": 50257},
}
DECODE_BATCHES = (1, 8)
LONG_STEPS = 100  # with --long, beside the steps that warm up
CONFIG = "--config=configs/gpt2.py:124m"


def our_training(case: dict[str, int], dtype: str, steps: int, every: int) -> list[str]:
    """Arguments of our benchmark for the twin's shape: learned positions for just the context, as the twin has them."""
    model = {f: case[f] for f in ("layers", "embed_dim", "heads", "vocab_size")}
    model |= {"max_positions": case["context"], "compute_dtype": dtype}
    data = {"context": case["context"], "batch_size": case["batch_size"], "tokenizer": "bytes"}  # random tokens: unused
    overrides = [f"--config.model.{f}={v}" for f, v in model.items()] + [
        f"--config.data.{f}={v}" for f, v in data.items()
    ]
    return ["-m", "train.benchmark", CONFIG, *overrides, f"--steps={steps}", f"--every={every}"]


def our_decoding(batch_size: int) -> list[str]:
    """Arguments of our benchmark for 128 new tokens after 16, in float32, of five calls."""
    flags = {"config.model.compute_dtype": "float32", "rows": batch_size, "steps": 5}
    return ["-m", "train.benchmark", CONFIG, "--decode", *(f"--{name}={value}" for name, value in flags.items())]


def twin(mode: str, dtype: str, seconds: float, shape: dict[str, int]) -> list[str]:
    """Arguments of the PyTorch side."""
    flags = {"mode": mode, "dtype": dtype, "seconds": seconds, **shape}
    return [TWIN, *(f"--{name}={value}" for name, value in flags.items())]


def measure(label: str, python: str, arguments: list[str]) -> dict[str, Any]:
    """Runs one contender in its own process and returns what it wrote; ends the comparison where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        begin, others = time.perf_counter(), others_cpu_seconds()
        done = subprocess.run([python, *arguments, f"--json={path}"], cwd=ROOT, capture_output=True, text=True)
        wall = time.perf_counter() - begin
        if done.returncode:
            sys.exit(f"{label}: exit status {done.returncode}\n{(done.stderr or done.stdout)[-2000:]}")
        result = json.loads(path.read_text())
    result["others_share"] = max(0.0, others_cpu_seconds() - others) / (wall * (os.cpu_count() or 1))
    speed = result.get("decode_tokens_per_second") or result["tokens_per_second"]
    share = f"{result['others_share']:.0%} of the processor to others"
    print(f"{label}: {speed:,.1f} tokens/s, {wall:.0f} s, {share}", file=sys.stderr, flush=True)
    return result


def others_cpu_seconds() -> float:
    """Seconds of processor time that went to others than our finished children since boot; Linux only, else 0."""
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - children.ru_utime - children.ru_stime


def train_round(
    name: str, dtype: str, label: str, step_seconds: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One round of one case: `{"ours": …, "eager": …, "compile": …}`."""
    case, seconds = CASES[name], arguments.seconds
    if arguments.vocab_size and name == "124m":
        case = case | {"vocab_size": arguments.vocab_size}
    steps, every = max(4, round(seconds / step_seconds)), 0
    if arguments.long:
        steps, every, seconds = LONG_STEPS, LONG_STEPS // 4, math.inf
    results = {"ours": measure(f"{label} ours", arguments.python, our_training(case, dtype, steps, every))}
    shape = case | {"steps": steps, "every": every}
    for mode in ("eager", "compile"):
        results[mode] = measure(f"{label} {mode}", arguments.torch_python, twin(mode, dtype, seconds, shape))
    sizes = {contender: result["parameters"] for contender, result in results.items()}
    if len(set(sizes.values())) > 1:
        sys.exit(f"{label}: the contenders differ in parameters: {sizes}")
    return results


def decode_round(batch_size: int, label: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One round of decoding: `{"ours": …, "transformers": …}`."""
    theirs = twin("decode", "float32", arguments.seconds, {"batch_size": batch_size})
    return {
        "ours": measure(f"{label} ours", arguments.python, our_decoding(batch_size)),
        "transformers": measure(f"{label} transformers", arguments.torch_python, theirs),
    }


def guessed_step_seconds(case: dict[str, int], dtype: str) -> float:
    """Seconds of a step at 150 GFLOP/s in float32 and 300 in bfloat16; it only sets the length of the first round."""
    weights = 12 * case["layers"] * case["embed_dim"] ** 2 + case["vocab_size"] * case["embed_dim"]
    return 6 * weights * case["context"] * case["batch_size"] / (1.5e11 if dtype == "float32" else 3e11)


def ratios(rounds: list[dict[str, Any]], key: str) -> list[float]:
    """Per round, ours over the best of the others: the fastest, the smallest, of first steps the compiled one."""
    found = []
    for results in rounds:
        others = {name: result[key] for name, result in results.items() if name != "ours"}
        if key == "first_step_seconds":
            others = {name: value for name, value in others.items() if name == "compile"}
        found.append(results["ours"][key] / (min if key == "peak_host_bytes" else max)(others.values()))
    return found


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """The processor, and which code path its matrix library takes: MKL's generic one can be slow on AMD processors."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    code = (
        "import torch; a = torch.randn(512, 512); a @ a;"
        "print('torch', torch.__version__, 'MKL', torch.backends.mkl.is_available(),"
        " 'oneDNN', torch.backends.mkldnn.is_available(), torch.backends.cpu.get_cpu_capability())"
    )
    environment = os.environ | {"MKL_VERBOSE": "1"}
    done = subprocess.run([arguments.torch_python, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"--torch_python={arguments.torch_python}: no torch there\n{done.stderr[-500:]}")
    path = re.search(r"64 architecture (.*?), Lnx", done.stdout)
    return {
        "processor": fields.get("model name", platform.processor()),
        "family_and_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "cores": os.cpu_count(),
        "torch": done.stdout.splitlines()[-1],
        "mkl_path": path.group(1) if path else "not MKL",
    }


def table(rounds: dict[str, list[dict[str, Any]]], about: dict[str, Any]) -> str:
    """The Markdown table: medians over rounds, and ratios with their range."""
    shares = [result["others_share"] for results in rounds.values() for r in results for result in r.values()]
    rows = [
        f"{about['processor']} (family/model {about['family_and_model']}), {about['cores']} cores; {about['torch']}; "
        f"MKL dispatches for: {about['mkl_path']}; processor time taken by others: {statistics.median(shares):.0%} "
        f"(at most {max(shares):.0%})",
        "",
        "| case | rounds | contender | tokens/s | first step, s | peak memory, GB | matmul GFLOP/s "
        "| speed / best | first step / compile | memory / least |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, results in rounds.items():
        decodes = case.startswith("decode")
        key = "decode_tokens_per_second" if decodes else "tokens_per_second"
        compared = (key, *(() if decodes else ("first_step_seconds",)), "peak_host_bytes")
        beside = {name: _with_range(ratios(results, name)) for name in compared}
        for contender in results[0]:
            cells = [
                _median([r[contender].get(k) for r in results], scale, digits)
                for k, scale, digits in (
                    (key, 1, 1 if decodes else 0),
                    ("first_step_seconds", 1, 1),
                    ("peak_host_bytes", 1e-9, 2),
                    ("matmul_flops_per_second", 1e-9, 0),
                )
            ]
            for name in (key, "first_step_seconds", "peak_host_bytes"):
                cells.append(beside.get(name, "–") if contender == "ours" else "")
            rows.append(f"| {case} | {len(results)} | {contender} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _with_range(values: list[float]) -> str:
    return f"**{statistics.median(values):.2f}** ({min(values):.2f}–{max(values):.2f})"


def _median(values: list[float | None], scale: float, digits: int) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.median(known) * scale:,.{digits}f}" if known else "–"


def main() -> None:
    """Runs the rounds, prints the table and writes every figure to `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of ours")
    parser.add_argument("--torch_python", default=sys.executable, help="interpreter with torch and transformers")
    parser.add_argument("--cases", nargs="+", choices=(*CASES, "decode"), default=[*CASES, "decode"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="timed work per run")
    parser.add_argument(
        "--long", action="store_true", help="of training 100 steps, with an evaluation and a save after every 25"
    )
    parser.add_argument("--vocab_size", type=int, default=0, help="of 124m; 0: GPT-2's 50,257")
    parser.add_argument("--json", type=Path, help="file for every figure of every round")
    arguments = parser.parse_args()

    about = machine(arguments)
    rounds: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.cases:
        for dtype in ("float32", "bfloat16") if name in CASES else ():
            results = rounds[f"{name} {dtype}"] = []
            step_seconds = guessed_step_seconds(CASES[name], dtype)
            for i in range(arguments.rounds):
                label = f"{name} {dtype} {i + 1}/{arguments.rounds}"
                results.append(train_round(name, dtype, label, step_seconds, arguments))
                step_seconds = results[-1]["ours"]["step_seconds"]
        for batch_size in DECODE_BATCHES if name == "decode" else ():
            label = f"decode batch {batch_size}"
            rounds[label] = [
                decode_round(batch_size, f"{label} {i + 1}/{arguments.rounds}", arguments)
                for i in range(arguments.rounds)
            ]
    print(table(rounds, about))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
