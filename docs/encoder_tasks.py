"""Trains small encoders and encoder-decoders on tasks made of real text and writes docs/encoders.md's table.

    python docs/encoder_tasks.py --data=DIR --workdir=runs/encoders [--only=NAME,...]

DIR holds `gsm8k/train.jsonl` (github.com/openai/grade-school-math) and `bbh/bbh/*.json`
(github.com/suzgunmirac/BIG-Bench-Hard). Every task stands beside what a constant answer or a copy of the input gets.
Run it from the repository's root.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
CALCULATION = re.compile(r"<<([^<>]*)>>")
BEGIN, END = "<!-- table: docs/encoder_tasks.py -->", "<!-- end of table -->"


class Task(NamedTuple):
    """A task: its records, how it is trained, and what a trivial answer gets on the held-out ones."""

    title: str
    records: Callable[[pathlib.Path], Iterator[dict[str, Any]]]
    config: str
    options: dict[str, Any]
    figure: str  # what is measured: accuracy, loss, exact
    baseline: Callable[[list[Any]], tuple[str, float]]  # of the held-out labels
    threshold: float  # what the model must reach: at least, of a loss at most


def solutions(data: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Questions and worked solutions, calculations marked as <<48/2=24>>."""
    for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines():
        record = json.loads(line)
        yield record["question"], record["answer"].split("\n####")[0]


def kinds_of_question(data: pathlib.Path) -> Iterator[dict[str, Any]]:
    """BIG-Bench Hard: to which of 27 tasks a question belongs."""
    for path in sorted((data / "bbh" / "bbh").glob("*.json")):
        for example in json.loads(path.read_text())["examples"]:
            yield {"text": example["input"][:400], "label": path.stem}


def results(data: pathlib.Path) -> Iterator[dict[str, Any]]:
    """GSM8K: the numbers of a solution that a calculation gave, among all its characters."""
    for _, answer in solutions(data):
        text, spans = "", []
        for part, calculation in zip(*[iter([*CALCULATION.split(answer), ""])] * 2, strict=False):
            text += part
            number = re.match(r"[\d.,]*\d", answer[answer.find(f"<<{calculation}>>") + len(calculation) + 4 :])
            if calculation and number:
                spans.append([len(text), len(text) + len(number[0]), "result"])
        spans = [span for span in spans if span[1] <= len(text)]
        yield {"text": text, "label": spans}


def answers(data: pathlib.Path) -> Iterator[dict[str, Any]]:
    """GSM8K: three questions about a problem; which words are the answer depends on the question."""
    for number, (problem, _) in enumerate(solutions(data)):
        sentences = list(re.finditer(r"[^.?!]+[.?!]+", problem))
        figure = re.search(r"\d+", problem)
        if len(sentences) < 2 or not figure:
            continue
        first, last = sentences[0].span(), sentences[-1].span()
        asked = [("How does it begin?", first), ("What is asked?", (last[0] + 1, last[1]))]
        question, span = [*asked, ("Which number comes first?", figure.span())][number % 3]
        yield {"text": problem, "question": question, "label": list(span)}


def steps(data: pathlib.Path) -> Iterator[dict[str, Any]]:
    """GSM8K: how many calculations a solution holds, the marks taken out."""
    for _, answer in solutions(data):
        yield {"text": CALCULATION.sub("", answer), "label": len(CALCULATION.findall(answer))}


def operators(data: pathlib.Path) -> Iterator[dict[str, Any]]:
    """GSM8K: which of + - * / a sentence of a solution uses, the marks taken out."""
    names = {"plus": "+", "minus": "-", "times": "*", "over": "/"}
    for _, answer in solutions(data):
        for line in answer.split("\n"):
            used = "".join(CALCULATION.findall(line))
            if used and len(line) < 120:
                yield {"text": CALCULATION.sub("", line), "label": [n for n, sign in names.items() if sign in used]}


def calculations(data: pathlib.Path) -> Iterator[dict[str, Any]]:
    """GSM8K: from a sentence of a solution to the calculation in it, such as 48/2=24."""
    for _, answer in solutions(data):
        for line in answer.split("\n"):
            found = CALCULATION.findall(line)
            if len(found) == 1 and len(line) < 70 and len(found[0]) < 15:
                yield {"text": CALCULATION.sub("", line), "label": found[0]}


def texts(data: pathlib.Path) -> Iterator[dict[str, Any]]:
    """GSM8K: problems and solutions as plain text."""
    for problem, answer in solutions(data):
        yield {"text": problem + "\n" + CALCULATION.sub("", answer)}


def most_frequent(labels: list[Any]) -> tuple[str, float]:
    """The share of the most frequent label."""
    return "always the most frequent label", collections.Counter(labels).most_common(1)[0][1] / len(labels)


def mean(labels: list[float]) -> tuple[str, float]:
    """The squared error of the mean."""
    middle = sum(labels) / len(labels)
    return "always the mean", sum((label - middle) ** 2 for label in labels) / len(labels)


def each_label(labels: list[list[str]]) -> tuple[str, float]:
    """The share of right labels where each is always what it mostly is."""
    counts = collections.Counter(name for label in labels for name in label)
    names = ("plus", "minus", "times", "over")
    return "each label as it mostly is", sum(max(counts[n], len(labels) - counts[n]) for n in names) / 4 / len(labels)


TINY = {"run.eval_batches": 0, "run.eval_every": 0, "run.save_every": 0, "run.tensorboard": False, "data.holdout": 0.1}
TASKS = {
    "classification": Task(
        "kind of question, 27 classes (BIG-Bench Hard)",
        kinds_of_question,
        "configs/bert.py:tiny,classification",
        {"model.labels": 27, "data.context": 96, "run.steps": 200},
        "accuracy",
        most_frequent,
        0.9,
    ),
    "token_classification": Task(
        "numbers that were calculated (GSM8K)",
        results,
        "configs/bert.py:tiny,token_classification",
        {"data.context": 160, "model.positions": "rope", "run.steps": 300},
        "accuracy",
        lambda labels: ("no number", math.nan),
        0.97,
    ),
    "span": Task(
        "span that answers a question, exact (GSM8K)",
        answers,
        "configs/bert.py:tiny,span",
        {"data.pair_field": "question", "run.steps": 250},
        "accuracy",
        lambda labels: ("the right answer to one of the three questions", 1 / 3),
        0.8,
    ),
    "regression": Task(
        "number of calculations, squared error (GSM8K)",
        steps,
        "configs/bert.py:tiny,regression",
        {"model.labels": 1, "data.context": 160, "model.max_positions": 160, "run.steps": 150},
        "loss",
        mean,
        1.0,
    ),
    "multi_label": Task(
        "operators in a sentence, share right (GSM8K)",
        operators,
        "configs/bert.py:tiny,multi_label",
        {"model.labels": 4, "data.context": 48, "model.positions": "rope", "run.steps": 500},
        "accuracy",
        each_label,
        0.9,
    ),
    "masked": Task(
        "masked tokens, nats (GSM8K)",
        texts,
        "configs/bert.py:tiny",
        {"model.positions": "rope", "run.steps": 800},
        "loss",
        lambda labels: ("how often each token occurs", math.nan),
        4.0,
    ),
    "span_corruption": Task(
        "spans cut out, nats per token (GSM8K)",
        texts,
        "configs/t5.py:tiny",
        {"run.steps": 1500},
        "loss",
        lambda labels: ("how often each token occurs", math.nan),
        3.5,
    ),
    "sequence_to_sequence": Task(
        "sentence to its calculation, exact (GSM8K)",
        calculations,
        "configs/t5.py:tiny,sequence_to_sequence",
        {"data.tokenizer": "bytes", "data.bpe_vocab_size": 257, "model.vocab_size": 257, "data.context": 72}
        | {"data.target_context": 16, "run.steps": 2500, "optimizer.name": "muon", "optimizer.learning_rate": 5e-3},
        "exact",
        lambda labels: ("a copy of the sentence", 0.0),
        0.5,
    ),
}


def train(name: str, data: pathlib.Path, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains one task and measures it: a row of the table."""
    task = TASKS[name]
    folder = workdir / name
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "records.jsonl"
    if not source.exists():
        source.write_text("".join(json.dumps(record) + "\n" for record in task.records(data)))
    options = TINY | {"data.sources": (str(source),)} | task.options
    flags = [f"--config.{field}={value}" for field, value in options.items()]
    command = [sys.executable, "-m", "train.pretrain", f"--config={task.config}", f"--workdir={folder / 'run'}", *flags]
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True)
    seconds = time.monotonic() - start
    found, words, trivial = measure(task, name, folder / "run")
    return {
        "task": task.title,
        "objective": name,
        "steps": task.options["run.steps"],
        "found": found,
        "baseline": f"{trivial:.3f} ({words})",
        "threshold": task.threshold,
        "reached": found <= task.threshold if task.figure == "loss" else found >= task.threshold,
        "seconds": round(seconds),
    }


def measure(task: Task, name: str, run: pathlib.Path) -> tuple[float, str, float]:
    """The held-out figure of a run, what the baseline does, and what it gets."""
    import numpy as np

    from train.data import pipeline
    from train.evaluate.held_out import held_out_means
    from train.objectives.table import OBJECTIVES
    from train.restore import open_checkpoint

    trained = open_checkpoint(run)
    experiment = trained.experiment
    data = experiment.data
    objective = OBJECTIVES[name]
    corpus = objective.corpus(experiment, trained.tokenizer)
    batches = list(pipeline.held_out_batches(corpus, data, objective.layout(experiment), data.batch_size))
    if name == "sequence_to_sequence":
        return exact(trained, batches), *task.baseline([])
    means = held_out_means(trained.evaluate, trained.weights, batches, {})
    found = objective.figures(means, corpus)[task.figure]
    labels = [
        (target, row.tolist() if target.ndim else None)
        for batch in batches
        for targets, weights in zip(batch["targets"], batch["loss_weights"], strict=True)
        for target, row in zip(targets[weights > 0], targets[weights > 0], strict=True)
    ]
    if name in ("masked", "span_corruption"):
        counts = np.bincount([int(t) for t, _ in labels])
        share = counts[counts > 0] / counts.sum()
        return found, "how often each token occurs", float(-(share * np.log(share)).sum())
    if name == "token_classification":
        return found, "no number is a result", sum(int(t) == 0 for t, _ in labels) / len(labels)
    if name == "multi_label":
        names = corpus.labels
        return found, *task.baseline([[n for n, on in zip(names, row, strict=True) if on] for _, row in labels])
    values = [row[0] if row is not None else int(t) for t, row in labels]
    return found, *task.baseline(values)


def exact(trained: Any, batches: list[Any]) -> float:
    """The share of held-out targets that greedy generation gives exactly."""
    import numpy as np

    from model.generate.decode import decoding_weights, make_decoder
    from model.generate.generate import generate

    config, end = trained.experiment.model, trained.tokenizer.end_of_document
    decoder = make_decoder(config, trained.graphdef, trained.tokenizer.vocab_size, end)
    weights = decoding_weights(config, trained.weights)
    right = total = 0
    for batch in batches:
        lengths = batch["input_segments"].sum(1)
        written = generate(decoder, weights, batch["inputs"], lengths, batch["targets"].shape[1]).tokens
        there = batch["loss_weights"] > 0
        right += int(((np.asarray(written) == batch["targets"]) | ~there).all(1)[there.any(1)].sum())
        total += int(there.any(1).sum())
    return right / total


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = "| objective | task | steps | held out | trivial answer | threshold |\n|---|---|---:|---:|---:|---:|\n"
    line = "| `{objective}` | {task} | {steps} | **{found:.3f}** | {baseline} | {threshold} |\n"
    return head + "".join(line.format(**row) for row in rows)


def main() -> int:
    """Trains what --only names, and writes the table of all that was trained in the workdir."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--only", default=",".join(TASKS))
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    for name in arguments.only.split(","):
        row = train(name, arguments.data.resolve(), arguments.workdir.resolve())
        (arguments.workdir / f"{name}.json").write_text(json.dumps(row, indent=1))
        print(row, flush=True)
    files = [arguments.workdir / f"{name}.json" for name in TASKS]
    rows = [json.loads(file.read_text()) for file in files if file.exists()]
    page = ROOT / "docs" / "encoders.md"
    if page.exists():
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{table(rows)}{END}{rest.partition(END)[2]}")
    return 0 if all(row["reached"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
