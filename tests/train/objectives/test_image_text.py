"""Classes of an image with a text, and whether the two match: rows, loss, learning, what is refused.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import scipy.special

from model import kinds
from model.config import ModelConfig, VisionConfig
from model.place import Place
from model.weights import bind
from tests.model import float64
from tests.runs import train_here
from tpu.errors import UserError
from train.config import DataConfig, Experiment, ObjectiveConfig, OptimizerConfig, RunConfig
from train.data.batch import Batch
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.chat.rows import class_row, question_row
from train.data.made import made, scenes
from train.data.text.tokenizer import ByteTokenizer
from train.objectives.table import OBJECTIVES
from train.program import make_program
from train.resolve import resolve
from train.restore import open_checkpoint

CLASSES, MATCHES = "image_text_classification", "image_text_matching"
VIT = {"encoder": "vit", "image_size": 32, "patch_size": 16, "layers": 1, "embed_dim": 16, "heads": 2}


def experiment(task: str, combine: str = "average", **branches: dict[str, Any]) -> Experiment:
    matches = task == MATCHES
    vision = VisionConfig(**VIT, pool="mean", connector="none", combine=combine)
    text = {"vocab_size": 257, "layers": 1, "embed_dim": 16, "heads": 2, "positions": "learned", "max_positions": 64}
    text |= {"kind": "encoder", "head": "pooled", "labels": 2 if matches else 19, "init": "fan_in"}
    sources = ("scenes:caption",) if matches else ("scenes:question",)
    base = Experiment(
        name="tiny",
        model=ModelConfig(**text, fusion="late", vision=vision),
        data=DataConfig(sources=sources, tokenizer="bytes", bpe_vocab_size=257, context=64, batch_size=8),
        objective=ObjectiveConfig(name=task),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=1),
        run=RunConfig(steps=3, eval_every=0, eval_batches=8, save_every=0, log_every=1, tensorboard=False),
    )
    parts = {name: dataclasses.replace(getattr(base, name), **fields) for name, fields in branches.items()}
    return dataclasses.replace(base, **parts)


def placed(given: Experiment) -> Experiment:
    found = resolve(given)
    found.model = found.model.placed("cpu", "float32")
    return found


# Rows


def test_a_row_is_a_question_with_the_class_of_its_answer():
    corpus = OBJECTIVES[CLASSES].corpus(placed(experiment(CLASSES)), None)
    tokenizer, rows = corpus.tokenizer, corpus.train[0]
    for index in range(12):
        asked = made.make("scenes:question", 0, "train", index, 32)
        row, question = rows[index], asked.turns[0].text.replace(IMAGE, "")
        ids = row["tokens"][: row["segments"].sum()].tolist()
        assert tokenizer.decode(ids[1:-1]) == question[:62]
        assert corpus.labels[row["targets"][0]] == made.answer(asked.turns[-1].text)
        assert row["loss_weights"].tolist() == [1.0] + [0.0] * 63
        np.testing.assert_array_equal(row["images"][0], asked.images[0])


def test_every_answer_to_a_question_about_a_scene_is_listed():
    found = {made.answer(scenes.question(0, "train", index).answer) for index in range(1500)}
    assert found == set(made.ANSWERS["scenes:question"])
    found = {made.answer(scenes.dialogue(0, "train", index)[-1].answer) for index in range(200)}
    assert found <= set(made.ANSWERS["scenes:dialogue"])


def test_classes_of_files_are_answers_however_they_are_spelled(tmp_path):
    from PIL import Image

    lines = []
    for number, answer in enumerate(("Yes.", "yes", "It has none. Answer: no", "No")):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"id": f"{number}", "image": f"{number}.png", "conversations": turns}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    given = placed(experiment(CLASSES, data={"sources": (f"{tmp_path}/a.jsonl",), "holdout": 0.0}, model={"labels": 2}))
    corpus = OBJECTIVES[CLASSES].corpus(given, None)
    assert corpus.labels == ("no", "yes")
    assert [int(corpus.train[0][index]["targets"][0]) for index in range(4)] == [1, 1, 0, 0]


def test_a_record_without_a_question_or_of_no_class_is_named():
    given, image = placed(experiment(CLASSES)), np.zeros((32, 32, 3), np.uint8)
    more = ByteTokenizer(), given.data, given.model, Counter()
    told = Conversation("a", (Turn("assistant", "red"),), (image,))
    with pytest.raises(UserError, match=r"^a: the user says nothing"):
        question_row(told, {"red": 0}, *more)
    asked = told._replace(turns=(Turn("user", f"{IMAGE}What?"), *told.turns))
    with pytest.raises(UserError, match=r"^a: 'red' is none of the 1 classes"):
        question_row(asked, {"blue": 0}, *more)
    with pytest.raises(UserError, match=r"^a: 'red' is none of the 1 classes"):
        class_row(asked, {"blue": 0}, given.data, given.model)


# Loss


def batch_of(given: Experiment, rows: int) -> Batch:
    """The first rows of the training side."""
    (side,) = OBJECTIVES[given.objective.name].corpus(given, None).train
    made = [side[index] for index in range(rows)]
    return {field: np.stack([row[field] for row in made]) for field in made[0]}


def test_matching_is_the_cross_entropy_of_every_text_with_its_own_image_and_the_next(one_device):
    """But for a neighbour with the same text, and one that is padding."""
    given = placed(experiment(MATCHES))
    batch, model = batch_of(given, 8), given.model
    for field in ("tokens", "segments", "positions"):
        batch[field][3] = batch[field][2]
    for field in ("loss_weights", "segments", "images"):
        batch[field][6:] = 0
    graphdef, weights = float64.drawn(model, kinds.maker(model))
    loss, correct, count = 0.0, 0, 0
    of, place = bind(graphdef, weights), Place(batch["segments"], batch["positions"])
    texts, images = of.text(batch["tokens"], place), of.image(batch["images"][:, 0])
    for row in range(6):
        for other, label in ((row, 1), (row + 1, 0)):
            if label == 0 and row in (2, 5):  # The next has the same text, or is padding.
                continue
            logits = np.asarray(of.logits(texts[row : row + 1], images[other : other + 1]), np.float64)[0]
            loss += scipy.special.logsumexp(logits) - logits[label]
            correct, count = correct + (logits.argmax() == label), count + 1
    with jax.set_mesh(one_device):
        found = make_program(given, one_device).evaluate(weights, batch, {})
    assert count == 10
    assert {name: float(weight) for name, weight in found.weights.items()} == {"nll": count, "accuracy": count}
    np.testing.assert_allclose(found.sums["nll"], loss, rtol=1e-5)
    assert int(found.sums["accuracy"]) == correct


def test_the_last_text_has_the_first_image_as_its_other(one_device):
    given = placed(experiment(MATCHES, data={"batch_size": 2}))
    batch = batch_of(given, 2)
    batch["tokens"][1] = batch["tokens"][0]
    of_pairs = OBJECTIVES[MATCHES].weights
    assert float(of_pairs(batch)["loss"]) == 2
    batch["tokens"][1, 1] += 1
    assert float(of_pairs(batch)["loss"]) == 4


@pytest.mark.parametrize("combine", ["concatenation", "average"])
def test_matching_is_learned_by_heart(combine, one_device):
    """Which no sum of what text and image say by themselves can do; and the weights of the average move."""
    given = placed(experiment(MATCHES, combine, optimizer={"learning_rate": 4e-3, "weight_decay": 0.0}))
    batch = batch_of(given, 4)
    with jax.set_mesh(one_device):
        program = make_program(given, one_device)
        state = program.init(jax.random.key(0), {})
        for _ in range(200):
            state, metrics = program.step(state, batch, {})
            if metrics["loss"] < 0.2:  # a coin's: log 2
                break
    assert metrics["loss"] < 0.2
    assert metrics["accuracy"] == 1
    if combine == "average":
        assert np.abs(state.weights["image_gate"]).max() > 0.01


def test_questions_about_scenes_are_learned_and_a_run_goes_on(tmp_path: Path):
    """Better than the most frequent answer, on held-out scenes."""
    data = {"batch_size": 32}

    def run(steps: int) -> None:
        given = experiment(CLASSES, data=data, run={"steps": steps}, optimizer={"learning_rate": 5e-3})
        assert train_here(resolve(given), tmp_path / "run") == 0

    run(20)
    run(60)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (first, last) = (line["eval"] for line in lines if "eval" in line)
    answers = Counter(made.answer(scenes.question(0, "test", index).answer) for index in range(256))
    assert last["accuracy"] > answers.most_common(1)[0][1] / 256 + 0.02
    assert last["loss"] < first["loss"]
    assert open_checkpoint(tmp_path / "run").experiment.model.fusion == "late"


# What is refused


@pytest.mark.parametrize(
    ("objective", "branches", "message"),
    [
        (CLASSES, {"model": {"fusion": "none", "vision": VisionConfig()}}, "model.fusion='none': objective.name="),
        (CLASSES, {"model": {"head": "language", "labels": 0, "fusion": "none", "vision": VisionConfig()}}, "model.he"),
        (MATCHES, {"model": {"labels": 3}}, "model.labels=3: objective.name='image_text_matching' needs 2, whether"),
        (MATCHES, {"data": {"batch_size": 1}}, "data.batch_size=1: objective.name='image_text_matching' compares"),
        (MATCHES, {"optimizer": {"accumulation": 2}}, "optimizer.accumulation=2: objective.name='image_text_matching'"),
        (
            MATCHES,
            {"optimizer": {"local_steps": 3}, "mesh": {"data": 2}},
            "optimizer.accumulation=1: objective.name='image_text_matching' compares all rows of a batch with each "
            "other; give 1, and optimizer.local_steps=0",
        ),
        (CLASSES, {"data": {"image_fit": "tiles", "images": 2}}, "data.image_fit='tiles': objective.name='image_text_"),
        (
            CLASSES,
            {"objective": {"name": "classification"}},
            "objective.name='classification': model.fusion='late'; 'late' goes with 'image_text_classification' or "
            "'image_text_matching'",
        ),
        (CLASSES, {"objective": {"name": "conversation"}}, "model.kind='encoder': objective.name='conversation'"),
    ],
)
def test_what_does_not_go_together_is_named(objective, branches, message):
    with pytest.raises(UserError) as error:
        resolve(experiment(objective, **branches))
    assert str(error.value).startswith(message)


def test_micro_batches_are_refused_for_matching_alone():
    resolve(experiment(CLASSES, optimizer={"accumulation": 2}))
    resolve(experiment(CLASSES, optimizer={"local_steps": 3}, mesh={"data": 2}))


def test_more_answers_than_labels_are_an_error():
    with pytest.raises(UserError, match=r"^model\.labels=18: there are more classes: 0, 1, 2"):
        OBJECTIVES[CLASSES].corpus(placed(experiment(CLASSES, model={"labels": 18})), None)
