"""Trains models that see on every task, with three seeds, and writes docs/sight.md's table.

    python docs/sight_table.py --workdir=runs/sight-table [--only=NAME,...] [--seeds=0,1,2] [--write]

What is trained already in the workdir is not trained again, and results.json there keeps what was measured; --write
puts it into docs/sight_results.json, in the place of what stood there of the same task and seed, and the table of all
that stands there into docs/sight.md. Needs scikit-learn for the digits. Run it from the repository's root.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "sight_results.json"
BEGIN, END = "<!-- table: docs/sight_table.py -->", "<!-- end of table -->"
ASKED = 2048  # held-out records of a task, of one kind where that is asked for: a standard error of one point at most
KNOWN = 16_384  # training questions that the best guess without looking is learned from: of fewer, it is no better yet
Results = dict[str, dict[str, dict[str, float]]]  # by task, seed and what was measured


class Task(NamedTuple):
    """What is measured of one model, and what it must reach."""

    title: str
    measure: Callable[[pathlib.Path, int], dict[str, float]]  # of the workdir and the seed: "score", "control", more
    target: float
    control: str  # what the control is
    guess: str = "best blind guess"  # what `measure` gives as "blind", which the control may exceed by three points


def trained(workdir: pathlib.Path, seed: int, fusion: str, stage: str) -> pathlib.Path:
    """The run of a stage of configs/sight.py, trained, with those before it, unless it is there."""
    run = workdir / f"seed{seed}" / (stage if stage == "text" else f"{fusion}-{stage}")
    flags = [f"--config=configs/sight.py:{fusion},{stage}", f"--config.run.seed={seed}"]
    if before := runpy.run_path(str(ROOT / "configs" / "sight.py"))["start"](fusion, stage):
        flags.append(f"--config.run.start=('{trained(workdir, seed, *before)}',)")
    return train(run, flags)


def train(run: pathlib.Path, flags: list[str]) -> pathlib.Path:
    """Runs train.pretrain in `run` unless it has finished there."""
    if not (run / "finished").exists():
        print(f"training {run}", flush=True)
        command = [sys.executable, "-m", "train.pretrain", f"--workdir={run}", *flags, "--config.run.tensorboard=False"]
        started = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode or "finished after" not in done.stdout:  # A signal ends it with status 0, to go on later.
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-300:]}{done.stderr}")
        (run / "finished").write_text(f"{time.monotonic() - started:.0f} s\n")
    return run


def held_out(source: str, kind: str = "all") -> list[Any]:
    """The first held-out records of a source, all or those of one kind."""
    from train.data.made import made

    records = (made.make(source, 0, "test", index) for index in itertools.count())
    return list(itertools.islice((record for record in records if kind in ("all", record.kind)), ASKED))


def asker(run: pathlib.Path) -> Callable[[list[Any]], list[str]]:
    """What asks the model of a run."""
    from train.evaluate import answers
    from train.restore import open_checkpoint

    opened = open_checkpoint(run)
    data, model = opened.experiment.data, opened.experiment.model
    return answers.replier(model, opened.weights, opened.tokenizer, data, max_tokens=data.context)


def blind(source: str, asked: list[Any]) -> dict[str, float]:
    """Accuracies of the best guesses without looking, learned from the training questions."""
    from train.data.made import made
    from train.evaluate import answers

    known = [made.make(source, 0, "train", index) for index in range(KNOWN)]
    return answers.accuracies(asked, answers.blind_guesses(known, asked))


def questions(fusion: str, kind: str) -> Callable[[pathlib.Path, int], dict[str, float]]:
    """Scene questions of one kind, or of all; the same with images shuffled; the best guess without looking. And of
    questions of all kinds, how many of each are right."""

    def measure(workdir: pathlib.Path, seed: int) -> dict[str, float]:
        from train.evaluate import answers

        source, ask = "scenes:question", asker(trained(workdir, seed, fusion, "questions"))
        asked = held_out(source, kind)
        found, shuffled = (answers.accuracies(asked, ask(of)) for of in (asked, answers.shuffled(asked)))
        every = found if kind == "all" else answers.accuracies(held_out(source), ask(held_out(source)))
        by_kind = {f"right {name}": share for name, share in every.items()}
        guessed = blind(source, asked)[kind]
        return {"score": found[kind], "control": shuffled[kind], "blind": guessed, **by_kind}

    return measure


def charts(workdir: pathlib.Path, seed: int) -> dict[str, float]:
    """Exact answers after a rationale; the same of an empty picture; how often the whole rationale is right."""
    from train.evaluate import answers

    asked, ask = held_out("charts:question"), asker(trained(workdir, seed, "merge", "charts"))
    said = ask(asked)
    empty = [record._replace(images=tuple(np.full_like(image, 255) for image in record.images)) for record in asked]
    found, without = answers.accuracies(asked, said), answers.accuracies(asked, ask(empty))
    guessed = blind("charts:question", asked)["all"]
    return {
        "score": found["all"],
        "control": without["all"],
        "blind": guessed,
        "whole rationale": answers.whole(asked, said)["all"],
    }


def compare(workdir: pathlib.Path, seed: int) -> dict[str, float]:
    """Questions about two pictures that are right both as they are and with the pictures swapped, where that flips the
    answer; the same with pictures shuffled."""
    from train.data.made.scenes import swapped
    from train.evaluate import answers

    asked, ask = held_out("scenes:compare"), asker(trained(workdir, seed, "cross", "compare"))
    asked = [record for record in asked if record.kind == "compare"]

    def both(records: list[Any]) -> float:
        turned = [swapped(record) for record in records]
        right = [
            [answers.answer(reply) == answers.truth(record) for reply, record in zip(ask(of), of, strict=True)]
            for of in (records, turned)
        ]
        return float(np.all(right, axis=0).mean())

    return {"score": both(asked), "control": both(answers.shuffled(asked))}


def clips(workdir: pathlib.Path, seed: int) -> dict[str, float]:
    """Exact descriptions of what moves where, and in which order, the worse of both; of one frame four times, how often
    the direction is right, which is one of four, and the order of two events."""
    from train.data.made.clips import DIRECTIONS
    from train.evaluate import answers

    asked, ask = held_out("clips:describe"), asker(trained(workdir, seed, "cross", "clips"))
    found = answers.accuracies(asked, ask(asked))
    still = [record._replace(images=(record.images[1],) * len(record.images)) for record in asked]
    single = answers.accuracies(asked, ask(still))
    return {
        "score": min(found["direction"], found["order"]),
        "control": single["direction"],
        "blind": 1 / len(DIRECTIONS),
        "order of one frame": single["order"],
        **{f"right {kind}": share for kind, share in found.items()},
    }


def retrieval(workdir: pathlib.Path, seed: int) -> dict[str, float]:
    """Recall@1 among 100 different captions, the worse of both directions; zero-shot names of a single thing."""
    from train.data.made import drawing, made
    from train.data.made.scenes import PLACES
    from train.evaluate.retrieval import class_vectors, embedders, recall_at, zero_shot
    from train.restore import open_checkpoint

    run = train(workdir / f"seed{seed}" / "clip", ["--config=configs/clip.py:scenes", f"--config.run.seed={seed}"])
    opened = open_checkpoint(run)
    see, read = embedders(opened.experiment.model, opened.weights, opened.tokenizer, opened.experiment.data.context)
    records = {}
    for index in range(1000):
        record = made.make("scenes:caption", 0, "test", index)
        records.setdefault(record.turns[-1].text, record.images[0])
    texts = list(records)[:100]
    images, captions = see(np.stack([records[text] for text in texts])), read(texts)
    alone = [(text, image) for text, image in records.items() if "," not in text]
    names = [drawing.named(colour, shape) for colour in drawing.COLOURS for shape in drawing.SHAPES]
    prompts = [f"{{}} {place}" for row in PLACES for place in row]
    chosen = zero_shot(see(np.stack([image for _, image in alone])), class_vectors(read, names, prompts))
    right = [names[number] in text for number, (text, _) in zip(chosen, alone, strict=True)]
    to_text, to_image = recall_at(1, images, captions), recall_at(1, captions, images)
    return {
        "score": min(to_text, to_image),
        "control": 0.01,
        "image to text": to_text,
        "text to image": to_image,
        f"zero-shot of {len(names)} kinds": float(np.mean(right)),
    }


def digits(workdir: pathlib.Path, seed: int) -> dict[str, float]:
    """Accuracy on the held-out fifth of scikit-learn's 1,797 digits."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = workdir / "digits"
    if not (folder / "digits.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        found, lines = load_digits(), []
        for number, (image, label) in enumerate(zip(found.images, found.target, strict=True)):
            Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(folder / f"{number}.png")
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": str(label)}]
            lines.append(json.dumps({"id": str(number), "image": f"{number}.png", "conversations": turns}))
        (folder / "digits.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--config=configs/vit.py:digits", f"--config.run.seed={seed}"]
    run = train(workdir / f"seed{seed}" / "vit", [*flags, f"--config.data.sources=('{folder}/*.jsonl',)"])
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"eval"' in line][-1]
    return {"score": last["eval"]["accuracy"], "control": 0.1}


TASKS = {
    "merge": Task("scene questions, `merge`, all", questions("merge", "all"), 0.95, "images shuffled"),
    "cross": Task("scene questions, `cross`, all", questions("cross", "all"), 0.95, "images shuffled"),
    "co": Task("scene questions, `co`, colours", questions("co", "colour"), 0.90, "images shuffled"),
    "tangled": Task("scene questions, `tangled`, colours", questions("tangled", "colour"), 0.90, "images shuffled"),
    "charts": Task("charts (`merge`), a rationale and the exact answer", charts, 0.90, "empty picture"),
    "clip": Task("CLIP, recall@1 of 100 captions, the worse way", retrieval, 0.90, "chance"),
    "digits": Task("ViT on 8 x 8 digits", digits, 0.97, "chance"),
    "compare": Task("two pictures (`cross`), right as they are and swapped", compare, 0.95, "images shuffled"),
    "clips": Task(
        "clips (`cross`), what moves where and in which order", clips, 0.90, "direction of one frame", "chance"
    ),
}


def measured(file: pathlib.Path) -> Results:
    """What a file of results holds; nothing where there is none."""
    return json.loads(file.read_text()) if file.exists() else {}


def keep(file: pathlib.Path, results: Results) -> None:
    """Adds results to a file, which it reads anew, so that several processes may measure side by side."""
    kept = measured(file)
    merged = {name: kept.get(name, {}) | results.get(name, {}) for name in TASKS if name in kept or name in results}
    file.write_text(json.dumps(merged, indent=1) + "\n")


def table(results: Results) -> str:
    """The measured tasks as a table of markdown. Shuffled images may help by three points over the best blind guess."""
    rows = ["| task | must reach | worst seed | all seeds | control | |", "|---|---|---|---|---|---|"]
    for name, task in TASKS.items():
        if not (seeds := results.get(name)):
            continue
        scores = [seeds[seed]["score"] for seed in sorted(seeds)]
        worst = max(seeds.values(), key=lambda found: found["control"] - found.get("blind", 0))
        beside = f"{task.control} {worst['control']:.1%}"
        if "blind" in worst:
            beside += f", {task.guess} {worst['blind']:.1%}"
        for more in sorted(set.intersection(*(set(found) for found in seeds.values())) - {"score", "control", "blind"}):
            if not more.startswith("right "):
                shares = sorted(found[more] for found in seeds.values())
                beside += f"; {more} {' to '.join(dict.fromkeys(f'{share:.1%}' for share in (shares[0], shares[-1])))}"
        within = "blind" not in worst or worst["control"] - worst["blind"] <= 0.03
        every = ", ".join(f"{score:.1%}" for score in scores)
        said = "reached" if within and min(scores) >= task.target else "**missed**"
        if len(scores) < 3:
            said += f" ({len(scores)} of 3 seeds)"
        rows.append(f"| {task.title} | {task.target:.0%} | {min(scores):.1%} | {every} | {beside} | {said} |")
    return "\n".join(rows)


def main() -> None:
    """Trains and measures what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--only", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    workdir = options.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / "results.json"
    for seed in map(int, options.seeds.split(",")):
        for name in options.only.split(","):
            if str(seed) in measured(file).get(name, {}):
                continue
            found = TASKS[name].measure(workdir, seed)
            keep(file, {name: {str(seed): found}})
            print(name, seed, json.dumps(found), flush=True)
    print(table(measured(file)))
    if options.write:
        keep(KEPT, measured(file))
        page = ROOT / "docs" / "sight.md"
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{table(measured(KEPT))}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
