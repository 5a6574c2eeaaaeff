"""Models that see, trained through the whole path: sources, stages, frozen weights, answers, commands."""

from __future__ import annotations

import dataclasses
import functools
import html
import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from model import kinds
from model.config import ModelConfig, VisionConfig
from model.vision.vit import resampled
from serve.classify import probabilities
from tests.runs import drawn, train_here
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.adapter.frozen import Frozen, open_frozen
from train.config import AdapterConfig, DataConfig, Experiment, MeshConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from train.data import pipeline
from train.data.made import made
from train.data.text.tokenizer import ByteTokenizer
from train.evaluate import answers
from train.evaluate.retrieval import class_vectors, embedders, recall_at, zero_shot
from train.evaluate.retrieval import figures as retrieval_figures
from train.evaluate.sight_report import figures, page
from train.finetune import on_base
from train.layout import weights_layout
from train.objectives.table import OBJECTIVES
from train.resolve import resolve
from train.restore import Trained, open_checkpoint
from train.starting_weights import positions_on_grid, taken_over
from train.step import frozen_mask

pytestmark = pytest.mark.usefixtures("one_processor")
ROOT = Path(__file__).parents[2]
VIT = {"encoder": "vit", "image_size": 32, "patch_size": 16, "layers": 1, "embed_dim": 16, "heads": 2}


def experiment(fusion: str = "merge", **branches: dict[str, Any]) -> Experiment:
    streams = {"connections": 1, "connection_heads": 2} if fusion in ("co", "tangled") else {}
    vision = VisionConfig(**VIT, **streams) if fusion != "none" else VisionConfig()
    base = Experiment(
        name="tiny",
        model=ModelConfig(vocab_size=257, layers=2, embed_dim=16, heads=2, fusion=fusion, vision=vision),
        data=DataConfig(sources=("scenes:question",), tokenizer="bytes", bpe_vocab_size=257, context=96, batch_size=8),
        objective=ObjectiveConfig(name="conversation"),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=1),
        run=RunConfig(steps=3, eval_every=0, eval_batches=1, save_every=0, log_every=1, tensorboard=False),
    )
    parts = {name: dataclasses.replace(getattr(base, name), **fields) for name, fields in branches.items()}
    return dataclasses.replace(base, **parts)


def trained(given: Experiment, workdir: Path) -> Path:
    assert train_here(resolve(given), workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def of_fusion(tmp_path_factory: pytest.TempPathFactory, one_processor: None) -> Callable[[str], Path]:
    """A function that gives the run of a fusion, trained when it is first asked for."""
    return functools.cache(lambda fusion: trained(experiment(fusion), tmp_path_factory.mktemp(fusion) / "run"))


@pytest.fixture(scope="module")
def merge(of_fusion: Callable[[str], Path]) -> Path:
    return of_fusion("merge")


def of_run(run: Trained) -> tuple[Any, ...]:
    return run.experiment, run.weights, run.tokenizer


def by_path(weights: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    }


def leaves(workdir: Path) -> dict[str, np.ndarray]:
    return by_path(open_checkpoint(workdir).weights)


def begun(given: Experiment, *start: Path) -> dict[str, np.ndarray]:
    """What a run with this `run.start` begins with, its own weights being random."""
    model, mesh = resolve(given).model, make_mesh(MeshConfig(), jax.devices())
    with jax.set_mesh(mesh):
        _, abstract, axes = kinds.build(model.placed("cpu", "float32"))
        abstract = weights_layout(abstract, axes, mesh, given)
        return by_path(taken_over(drawn(abstract), [str(path) for path in start], mesh, model.vision))


# Stages


@pytest.mark.parametrize("rule", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_frozen_weights_stay_bitwise_and_the_others_move(rule, merge, tmp_path):
    frozen = (r"^(embedding|stack|final_norm)\b",)
    given = experiment(optimizer={"name": rule, "frozen": frozen}, run={"start": (str(merge),)})
    before, after = leaves(merge), leaves(trained(given, tmp_path / "run"))
    for path, weight in after.items():
        still = path.startswith(("embedding", "stack", "final_norm"))
        assert np.array_equal(weight, before[path]) == still, path


def test_weights_are_taken_over_where_path_and_shape_agree(merge, tmp_path, capsys):
    words = {"data": {"sources": ("words:read",)}, "objective": {"name": "next_token"}, "run": {"steps": 1}}
    text = trained(experiment("none", **words), tmp_path / "text")
    other, started, seeing = leaves(text), begun(experiment(), text, merge), leaves(merge)
    for path, weight in started.items():
        wanted = other[path] if path in other else seeing[path]  # the first that has one
        assert np.array_equal(weight, wanted), path
    assert "starting with" in capsys.readouterr().out


def test_positions_are_resampled_for_images_of_another_size_and_what_does_not_fit_is_named(merge, capsys):
    given = experiment()
    larger = dataclasses.replace(given.model, vision=dataclasses.replace(given.model.vision, image_size=64))
    started = begun(dataclasses.replace(given, model=larger), merge)
    table = "vision.encoder.vit.position_embedding"
    before = leaves(merge)
    assert started[table].shape == (16, 16)
    np.testing.assert_allclose(started[table], resampled(before[table], (2, 2), (4, 4)), atol=1e-6)
    assert all(np.array_equal(weight, before[path]) for path, weight in started.items() if path != table)
    assert "positions of images resampled from 2 x 2 to 4 x 4 vectors" in capsys.readouterr().out
    narrow = dataclasses.replace(given.model, mlp_dim=24)
    other = begun(dataclasses.replace(given, model=narrow), merge)
    assert np.array_equal(other[table], before[table])
    said = capsys.readouterr().out
    assert "not taken for their shape: stack.groups.layer_0.mlp.down.kernel [2, 64, 16], here [2, 24, 16]" in said
    assert "mlp.down.bias" not in said
    assert "positions of images" not in said


def test_the_row_of_a_class_token_stays_and_a_grid_is_no_row_of_numbers():
    wide = VisionConfig(encoder="vit", image_size=16, image_width=48, patch_size=8, class_token=True)
    high = dataclasses.replace(wide, image_size=48, image_width=16)
    table = np.random.default_rng(0).normal(size=(1 + 2 * 6, 4)).astype(np.float32)
    found = np.asarray(positions_on_grid(table, wide, high))  # as many rows, in other places
    np.testing.assert_array_equal(found[0], table[0])
    np.testing.assert_allclose(found[1:], resampled(table[1:], (2, 6), (6, 2)), atol=1e-6)
    assert positions_on_grid(table, wide, dataclasses.replace(high, class_token=False)) is None


def test_a_text_model_is_refused_pictures(tmp_path):
    corpus = OBJECTIVES["conversation"].corpus(resolve(experiment("none")), None)
    with pytest.raises(UserError, match=r"none of the .* records can be read|could not be read|cannot see"):
        corpus.train[0][0]


def test_what_freezes_nothing_or_all_is_refused(one_device):
    weights = {"stack": {"kernel": 0}, "head": {"kernel": 0}}
    assert frozen_mask(weights, ("^stack",)) == {"stack": {"kernel": True}, "head": {"kernel": False}}
    with pytest.raises(UserError, match=r"optimizer.frozen: 'tower' is found in no weight"):
        frozen_mask(weights, ("tower",))
    with pytest.raises(UserError, match="freezes every weight"):
        frozen_mask(weights, ("kernel",))
    with pytest.raises(UserError, match="no regular expression"):
        resolve(experiment(optimizer={"frozen": ("(",)}))


@pytest.mark.parametrize(
    ("fusion", "kind"),
    [
        ("merge", "lora"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("merge", "prefix"), ("cross", "lora"))),
    ],
)
def test_adapters_train_on_what_sees(fusion, kind, of_fusion, tmp_path):
    base = of_fusion(fusion)
    size = {"prefix": {"prefix_tokens": 2}, "lora": {"rank": 2}}.get(kind, {})
    adapter = AdapterConfig(kind, ("attention|mlp",), **size)
    given = dataclasses.replace(experiment(fusion), model=ModelConfig(), adapter=adapter)
    before, opened = leaves(base), open_frozen(str(base))
    assert train_here(on_base(given, opened), tmp_path / "run", opened) == 0
    assert all(np.array_equal(weight, before[path]) for path, weight in leaves(base).items())
    after = leaves(tmp_path / "run")  # an adapter and its base, merged
    moved = {path for path, weight in after.items() if not np.array_equal(weight, before.get(path))}
    assert moved
    assert not any(path.startswith("vision") for path in moved)
    assert any("gate_0" in path for path in moved) == (fusion == "cross")
    asked = [made.make("scenes:question", 0, "test", index, 32) for index in range(4)]
    run = open_checkpoint(tmp_path / "run")
    assert len(answers.replier(run.experiment.model, run.weights, run.tokenizer, run.experiment.data, 3)(asked)) == 4


def test_an_adapter_sees_and_is_asked_as_its_base_unless_told_otherwise():
    looks = {"images": 3, "image_fit": "crop", "frames": 2, "max_tiles": 3, "patches": 99}
    says = {"user_format": "Q: {}\n", "assistant_format": "A: {}"}
    base = Frozen(Path("base"), "", resolve(experiment(data=looks | says)), ByteTokenizer())

    def adapted(**data: Any) -> DataConfig:
        given = dataclasses.replace(experiment(data=data), model=ModelConfig(), adapter=AdapterConfig("lora"))
        return on_base(given, base).data

    for name, value in (looks | says).items():
        assert getattr(adapted(), name) == value, name
    padded = adapted(image_fit="pad", max_megapixels=1.0)
    assert (padded.image_fit, padded.max_megapixels, padded.images) == ("pad", 1.0, 3)


# Rows


@pytest.mark.parametrize("source", [name for name in made.NAMES if not name.startswith(("charts", "words"))])
def test_what_is_made_here_becomes_batches(source):
    given = resolve(experiment(data={"sources": (source,), "context": 256, "images": 4}))
    corpus = OBJECTIVES["conversation"].corpus(given, None)
    batches = pipeline.train_batches(corpus, given.data, seed=0)
    batch = next(batches)
    batches.close()
    assert batch["images"].shape == (8, 4, 32, 32, 3)
    assert batch["images"].dtype == np.uint8
    counts = batch["image_segments"].sum(1)
    np.testing.assert_array_equal((batch["image_slots"] >= 0).sum(1), counts * given.model.vision.vectors)
    np.testing.assert_array_equal(batch["images_seen"].max(1), counts)
    learned = ByteTokenizer().decode([int(t) for t in batch["targets"][0][batch["loss_weights"][0] > 0] if t < 256])
    assert learned.isprintable()
    assert learned


def test_rows_depend_on_seed_and_step_alone():
    given = resolve(experiment())
    corpus = OBJECTIVES["conversation"].corpus(given, None)

    def batch(start: int, skip: int) -> Any:
        batches = pipeline.train_batches(corpus, given.data, 3, start)
        found = [next(batches) for _ in range(skip + 1)][-1]
        batches.close()
        return found

    for one, two in zip(batch(2, 0), batch(0, 2), strict=True):
        assert one is two is None or np.array_equal(one, two)


def test_bad_records_are_counted_left_out_and_too_many_refused(tmp_path, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(40):
        Image.fromarray(np.full((8, 8, 3), 6 * number, np.uint8)).save(folder / f"{number}.png")

    def write(bad: set[int]) -> DataConfig:
        lines = [
            json.dumps(
                {
                    "id": f"{number}",
                    "image": f"{number}.png",
                    "conversations": [
                        {"from": "human", "value": ("<image>" * (2 if number in bad else 1)) + "what?"},
                        {"from": "gpt", "value": "grey"},
                    ],
                }
            )
            for number in range(40)
        ]
        (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
        return dataclasses.replace(experiment().data, sources=(f"{folder}/a.jsonl",), holdout=0.0)

    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:40])
    given = resolve(experiment())
    corpus = OBJECTIVES["conversation"].corpus(dataclasses.replace(given, data=write({5, 7})), None)
    with caplog.at_level("WARNING"):
        rows = [corpus.train[0][index] for index in range(len(corpus.train[0]))]
    assert all(row["loss_weights"].sum() == 5 for row in rows)
    said = " ".join(caplog.messages)
    assert "2 <image> in the text and 1 images" in said
    assert "3.png" in said or "line 4" in said
    corpus = OBJECTIVES["conversation"].corpus(dataclasses.replace(given, data=write(set(range(20)))), None)
    with pytest.raises(UserError, match="max_bad_fraction"):
        list(map(corpus.train[0].__getitem__, range(len(corpus.train[0]))))


def test_one_bad_record_stops_neither_tokenizer_nor_training_nor_evaluation(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for number in range(60):
        Image.fromarray(np.full((8, 8, 3), 4 * number, np.uint8)).save(folder / f"{number}.png")
        turns = [("human", "<image>what?"), ("gpt", "grey"), ("human", "and now?"), ("gpt", "white")][: 2 + number % 3]
        if number % 10 == 7:
            turns[0] = ("human", "<image>" + "what? " * 40)
        turns = [{"from": role, "value": text} for role, text in turns]
        lines.append(json.dumps({"id": f"{number}", "image": f"{number}.png", "conversations": turns}))
    lines[3] = lines[3][:-9]
    for number in (5, 21, 40):
        (folder / f"{number}.png").unlink()
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    data = {"sources": (f"{folder}/a.jsonl",), "tokenizer": "bpe", "bpe_vocab_size": 300, "holdout": 0.5}
    given = experiment(data=data | {"context": 64}, model={"vocab_size": 300})
    found, said = figures(*of_run(open_checkpoint(trained(given, tmp_path / "run"))), 0)
    told = [line for line in caplog.messages if "rows made so far" in line]
    assert f"{folder}/a.jsonl, train: " in told[-1]
    assert re.search(r"\d (its images and questions take … tokens|image … cannot be read|not JSON)", told[-1])
    (of,) = found.values()
    assert of["count"] == len(said) > 10
    assert all(conversation.turns[-1].role == "assistant" for conversation, _ in said)
    assert all(len(conversation.turns[0].text) < 100 for conversation, _ in said)
    named = dataclasses.replace(resolve(given).data, sources=(f"{folder}/a.jsonl",))
    vision = VisionConfig(**VIT, pool="mean", connector="none")
    classes = ModelConfig(kind="vision", labels=2, vocab_size=300, embed_dim=16, heads=2, vision=vision).resolved()
    corpus = OBJECTIVES["image_classification"].corpus(
        dataclasses.replace(given, data=named, model=classes), ByteTokenizer()
    )
    assert corpus.labels == ("grey", "white")


# Answers


@pytest.mark.parametrize(
    "fusion", ["merge", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cross", "co", "tangled"))]
)
def test_answers_are_those_of_the_uncached_model(fusion, of_fusion):
    """What `replier` says, greedily through the cache, is the argmax of the plain forward pass, row by row."""
    run = open_checkpoint(of_fusion(fusion), compute_dtype="float32")
    data, model = run.experiment.data, run.experiment.model
    asked = [made.make("scenes:question", 0, "test", index, 32) for index in range(5)]
    said = answers.replier(model, run.weights, run.tokenizer, data, 3, rows=4)(asked)
    from model.place import Place
    from model.weights import bind
    from train.data.chat.rows import conversation_row

    @jax.jit
    def logits(weights: Any, batch: Any) -> jax.Array:
        seen = (batch[name] for name in ("images", "image_segments", "image_slots", "images_seen", "given"))
        place, bound = Place(batch["segments"], batch["positions"]), bind(run.graphdef, weights)
        return bound.head(bound(batch["tokens"], place, images=answers.Images(*seen))[0])[0]

    for conversation, reply in zip(asked, said, strict=True):
        text = ""
        for _ in range(3):
            turns = (conversation.turns[0], conversation.turns[1]._replace(text=text + "?"))
            row = conversation_row(conversation._replace(turns=turns), run.tokenizer, data, model, Counter())
            batch = jax.tree.map(lambda a: a[None], row)
            at = int(np.flatnonzero(row["loss_weights"])[0]) + len(text)
            token = int(np.argmax(logits(run.weights, batch)[at]))
            if token == run.tokenizer.end_of_document:
                break
            text += run.tokenizer.decode([token])
        assert reply == text or "\ufffd" in reply + text


def test_scores_and_controls():
    asked = [made.make("scenes:question", 0, "test", index, 32) for index in range(60)]
    right = [conversation.turns[-1].text for conversation in asked]
    assert set(answers.accuracies(asked, right).values()) == {1.0}
    assert answers.accuracies(asked, ["no idea"] * 60)["all"] == 0.0
    assert set(answers.whole(asked, right).values()) == {1.0}
    careless = [reply.rpartition("Answer: ")[2] for reply in right]  # right, without steps
    assert answers.accuracies(asked, careless)["all"] == 1.0
    found = answers.whole(asked, careless)
    assert (found["colour"], found["count"]) == (1.0, 0.0)
    mixed = answers.shuffled(asked)
    assert [c.turns for c in mixed] == [c.turns for c in asked]
    assert not any(np.array_equal(a.images[0], b.images[0]) for a, b in zip(mixed, asked, strict=True))
    known = [made.make("scenes:question", 0, "train", index, 32) for index in range(2000)]
    blind = answers.accuracies(asked, answers.blind_guesses(known, asked))
    assert blind["all"] < 0.6


def test_the_page_holds_all_that_it_shows(merge):
    found, said = figures(*of_run(open_checkpoint(merge)), 12)
    assert found["scenes:question"]["count"] == 12
    assert {"answers", "shuffled", "blind"} <= found["scenes:question"].keys()
    text = page("a <title>", found, said, 10)
    shown = [said[int(index)] for index in np.linspace(0, 11, 10)]
    right = [made.answer(reply) == answers.truth(conversation) for conversation, reply in shown]
    assert (text.count("class=right"), text.count("class=wrong")) == (right.count(True), right.count(False))
    assert all(html.escape(conversation.turns[0].text.replace("<image>", "")) in text for conversation, _ in shown)
    assert all(f"<b>{html.escape(reply) or '(nothing)'}</b>" in text for _, reply in shown)
    perfect = page("", found, [(conversation, conversation.turns[-1].text) for conversation, _ in said], 10)
    assert (perfect.count("class=right"), perfect.count("class=wrong")) == (10, 0)
    assert text.count("<img") == 10
    assert text.count("data:image/png;base64,") == 10
    assert "a &lt;title&gt;" in text
    assert "http" not in text


def test_the_page_shows_pictures_larger_than_is_usual():
    large = np.zeros((6400, 6400, 3), np.uint8)  # 41 megapixels, of which data.max_megapixels=50 lets a model see all
    asked = made.make("scenes:question", 0, "test", 0, 32)._replace(images=(large,))
    assert page("", {}, [(asked, "no idea")], 1).count("data:image/png;base64,") == 1


# Contrastive models and classes


def test_contrastive_training_and_retrieval(tmp_path):
    vision = VisionConfig(**VIT, pool="mean", connector="none", projection_dim=8)
    model = {"fusion": "contrastive", "vision": vision}
    data = {"sources": ("scenes:caption",), "batch_size": 8}
    given = experiment(model=model, data=data, objective={"name": "contrastive"}, run={"steps": 20})
    run = open_checkpoint(trained(given, tmp_path / "run"))
    see, read = embedders(run.experiment.model, run.weights, run.tokenizer, 96)
    records = [made.make("scenes:caption", 0, "test", index, 32) for index in range(6)]
    images, texts = see(np.stack([r.images[0] for r in records])), read([r.turns[-1].text for r in records])
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    assert len(np.unique(np.round(texts, 4), axis=0)) == 6
    assert recall_at(1, images, texts) <= recall_at(5, images, texts) <= recall_at(6, images, texts) == 1
    classes = class_vectors(read, ["circle", "star"], ["a {}", "a picture of a {}"])
    mean = (read(["a circle", "a star"]) + read(["a picture of a circle", "a picture of a star"])) / 2
    np.testing.assert_allclose(classes, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=0, atol=1e-6)
    (found,) = retrieval_figures(*of_run(run), 6).values()
    assert found["count"] == 6
    assert all(
        found[f"{way}, recall@{k}"] == recall_at(k, *of)
        for way, of, k in (("image to text", (images, texts), 1), ("text to image", (texts, images), 5))
    )
    path = tmp_path / "picture.png"
    Image.fromarray(records[0].images[0]).save(path)
    (of_image,) = probabilities(run, [str(path)], ["circle", "star"], ["a {}", "a picture of a {}"])
    logits = np.exp(run.weights["logit_scale"]) * (images[:1] @ classes.T)[0]
    wanted = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose([of_image["circle"], of_image["star"]], wanted, rtol=0, atol=1e-5)
    done = command(
        "serve.classify",
        f"--checkpoint={tmp_path / 'run'}",
        f"--image={path}",
        "--label=a star",
        "--label=a circle",
        f"--json={tmp_path / 'found.json'}",
    )
    assert done.returncode == 0, done.stderr
    (shares,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    first, second = sorted(shares, key=shares.get, reverse=True)
    assert [line.split("%  ")[1] for line in done.stdout.splitlines()[1:]] == [first, second]


@pytest.mark.slow
def test_a_vit_learns_to_read_digits(tmp_path):
    measure = runpy.run_path(str(ROOT / "docs" / "sight_table.py"))["digits"]
    found = measure(tmp_path, 0)
    assert found["score"] >= 0.97 > 0.2 > found["control"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image=a.png", "--label=a", "--label=a"], "label=a, a: give two classes or more"),
        (["--label=a", "--label=b"], "image: missing"),
        (["--image=a.png", "--label=a", "--label=b", "--template=a"], "template='a': must hold {} once"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(flags, words):
    done = command("serve.classify", "--checkpoint=somewhere", *flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_that_talks_compares_nothing(merge):
    with pytest.raises(UserError, match=r"model.fusion='merge': .* compares no pictures with texts"):
        probabilities(open_checkpoint(merge), ["a.png"], ["a", "b"], ["{}"])


def test_zero_shot_is_the_most_alike_class():
    classes = np.eye(3)[[2, 0, 1]]
    assert zero_shot(np.eye(3) + 0.1, classes).tolist() == [1, 2, 0]


def test_of_a_template_the_place_of_the_name_alone_is_replaced():
    read = []

    def of_texts(texts: list[str]) -> np.ndarray:
        read.extend(texts)
        return np.ones((len(texts), 2))

    class_vectors(of_texts, ["star", "{x}"], ["a {} {x}", "{ {}"])
    assert read == ["a star {x}", "a {x} {x}", "{ star", "{ {x}"]


def test_recall_counts_what_is_more_alike():
    queries = np.eye(3)
    assert recall_at(1, queries, np.ones((3, 3))) == 0.0  # All alike: nothing is found.
    assert recall_at(1, queries, np.full((3, 3), np.nan)) == 0.0
    assert recall_at(1, queries, queries) == 1.0
    assert recall_at(1, queries, np.roll(queries, 1, axis=0)) == 0.0
    half = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    assert recall_at(1, half, half[[1, 0, 2]]) == pytest.approx(1 / 3)


def test_contrastive_rows_cannot_be_split():
    vision = VisionConfig(**VIT, pool="mean", connector="none")
    model = {"fusion": "contrastive", "vision": vision}
    for field, branch in (
        ("optimizer.accumulation=2", {"optimizer": {"accumulation": 2}}),
        ("data.batch_size=1", {"data": {"batch_size": 1}}),
    ):
        with pytest.raises(UserError, match=field):
            resolve(experiment(model=model, objective={"name": "contrastive"}, **branch))


# Commands


def command(module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *flags], cwd=ROOT, capture_output=True, text=True)


def test_a_picture_on_the_command_line(merge, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(made.make("scenes:question", 0, "test", 0, 32).images[0]).save(path)
    flags = (f"--checkpoint={merge}", "--prompt=What?", "--max_tokens=3")
    done = command("serve.generate", *flags, f"--image={path}", f"--image={path}")
    assert done.returncode == 0, done.stderr
    for image, words in (
        (tmp_path / "nowhere.png", "no such file"),
        (ROOT / "setup.py", "no image"),
    ):
        done = command("serve.generate", *flags, f"--image={image}")
        assert done.returncode == 2
        assert words in done.stderr.splitlines()[-1]
    done = command("serve.generate", f"--checkpoint={merge}", "--prompt=<image><image>?", f"--image={path}")
    assert done.returncode == 2
    assert "2 <image> in it, and 1 --image" in done.stderr


@pytest.mark.parametrize(
    ("module", "flag"), [("train.evaluate", "page"), ("train.evaluate", "json"), ("serve.classify", "json")]
)
def test_a_file_that_has_no_directory_is_refused_before_the_work(module, flag):
    done = command(module, "--checkpoint=somewhere", f"--{flag}=nowhere/file")
    assert (done.returncode, done.stderr) == (2, f"error: {flag}=nowhere/file: its directory does not exist\n")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": {"fusion": "blend"}}, "model.fusion='blend': valid: none, merge, cross, co, tangled, contrastive"),
        ({"data": {"context": 3}}, "data.context=3: one image takes 4 tokens"),
        ({"data": {"image_fit": "native"}}, "data.image_fit='native': needs"),
        ({"data": {"image_fit": "stretch"}}, "data.image_fit='stretch': valid: squash"),
        ({"data": {"image_resample": "nearest"}}, "data.image_resample='nearest': valid: bicubic, bilinear"),
        ({"data": {"user_format": "Q"}}, "data.user_format='Q': must hold {} once"),
        ({"data": {"user_format": "<image>{}"}}, "<image> stands in the text of a turn, not here"),
        ({"data": {"max_megapixels": 0.0}}, "data.max_megapixels=0.0: must be positive"),
        (
            {"data": {"images": 3}, "model": {"vision": VisionConfig(**VIT, image_positions=2)}},
            "data.images=3: model.vision.image_positions=2 tells no more images of a row apart",
        ),
        ({"objective": {"name": "next_token"}}, "reads images in conversations"),
        ({"objective": {"name": "contrastive"}}, "'contrastive' goes with 'contrastive'"),
        ({"model": {"vision": VisionConfig()}}, "model.vision.encoder='none'"),
        ({"model": {"fusion": "none"}}, "images reach nothing; set model.fusion"),
        (
            {"model": {"fusion": "co"}, "mesh": {"data": 1, "stage": 2}},
            "mesh.stage=2: not with model.fusion='co', which runs its layers between connections",
        ),
        (
            {"model": {"fusion": "tangled"}, "mesh": {"data": 1, "stage": 2}},
            "mesh.stage=2: not with model.fusion='tangled', which runs its layers between connections",
        ),
    ],
)
def test_what_does_not_go_together_is_named(fields, words):
    with pytest.raises(UserError) as error:
        resolve(experiment(**fields))
    assert words in str(error.value)


NATIVE = VisionConfig(**VIT | {"image_size": 64, "patch_size": 4, "positions": "rope"}, connector="pixel_shuffle")


@pytest.mark.parametrize(("patches", "most"), [(63, 15), (64, 16), (256, 64)])
def test_rows_hold_what_packed_images_take_at_most(patches, most):
    """Whatever image_size is: 256 patches here, which packed images need not have and may have more of."""
    data = {"image_fit": "native", "patches": patches}
    resolve(experiment(model={"vision": NATIVE}, data=data | {"context": most + 1}))
    with pytest.raises(UserError, match=f"^data.context={most}: the images of a row take up to {most} tokens"):
        resolve(experiment(model={"vision": NATIVE}, data=data | {"context": most}))


def test_tiles_need_room_for_an_overview_and_a_part():
    data = {"image_fit": "tiles", "images": 2, "context": 9}
    resolve(experiment(data=data))
    with pytest.raises(UserError, match=r"^data.images=1: data.image_fit='tiles' makes at least 2 images of each"):
        resolve(experiment(data=data | {"images": 1}))
    with pytest.raises(UserError, match=r"^data.context=8: one image takes 8 tokens"):
        resolve(experiment(data=data | {"context": 8}))


@pytest.mark.parametrize("objective", ["contrastive", "image_classification"])
def test_tiles_are_refused_where_a_row_is_of_one_image(objective):
    vision = VisionConfig(**VIT, pool="mean", connector="none")
    classes = {"fusion": "none", "kind": "vision", "labels": 3}
    model = {"fusion": "contrastive"} if objective == "contrastive" else classes
    given = experiment(model=model | {"vision": vision}, objective={"name": objective}, data={"images": 2})
    resolve(given)
    given.data.image_fit = "tiles"
    with pytest.raises(UserError, match=f"^data.image_fit='tiles': objective.name='{objective}' takes one image a row"):
        resolve(given)


def test_an_unknown_source_is_named():
    given = resolve(experiment(data={"sources": ("scenes:poem",)}))
    with pytest.raises(UserError, match=r"scenes:poem.*scenes:caption"):
        OBJECTIVES["conversation"].corpus(given, None)
