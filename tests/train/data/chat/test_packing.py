"""Which conversations share a row, and what the row holds: each of them whole, once, and as it would be alone."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.config import ModelConfig, VisionConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment
from train.data.batch import Batch, text_layout
from train.data.chat import packing
from train.data.chat.packing import OPEN_ROWS, measure, together
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.chat.sources import JsonFiles
from train.data.corpus import Corpus
from train.data.pipeline import held_out_batches
from train.data.text.tokenizer import ByteTokenizer
from train.objectives.table import OBJECTIVES

VISION = VisionConfig("vit", image_size=16, patch_size=4, layers=1, embed_dim=8, heads=1, positions="rope")
SEES = ModelConfig(vocab_size=257, embed_dim=8, heads=1, fusion="merge", vision=VISION).resolved()
MERGER = dataclasses.replace(VISION, connector="merger").resolved(8)
READS = ModelConfig(vocab_size=257, embed_dim=8, heads=1).resolved()
DATA = DataConfig(tokenizer="bytes", context=32, holdout=0.0)


def written(folder: Path, answers: Sequence[str], images: Sequence[int] = ()) -> str:
    """A source of one question and one answer a record, the numbered records with a picture."""
    lines = []
    for number, answer in enumerate(answers):
        seen = {"image": f"{number}.png"} if number in images else {}
        asked = IMAGE * len(seen) + "q"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps(seen | {"conversations": turns}))
        if seen:
            Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "a.jsonl").write_text("\n".join(lines))
    return str(folder / "a.jsonl")


def corpus_of(source: str, model: ModelConfig = READS, **fields: object) -> Corpus:
    data = dataclasses.replace(DATA, sources=(source,), **fields)
    return OBJECTIVES["conversation"].corpus(Experiment(model=model, data=data), None)


def said(row: Batch) -> list[str]:
    """The text that each segment of a row learns."""
    learned = [
        row["targets"][(row["segments"] == s) & (row["loss_weights"] > 0)] for s in range(1, row["segments"].max() + 1)
    ]
    return ["".join(chr(token) for token in of if token < 256) for of in learned]


# Which share a row

sizes = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), max_size=200)


@given(sizes, st.integers(1, 20), st.integers(1, 3))
def test_each_is_in_one_row_and_rows_hold_what_they_have_room_for(taken, tokens, images):
    rows = together(taken, (tokens, images))
    assert sorted(number for row in rows for number in row) == list(range(len(taken)))
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    for row in rows:
        assert row == sorted(row)
        assert len(row) == 1 or all(np.sum([taken[n] for n in row], axis=0) <= (tokens, images))


def test_rows_are_nearly_full():
    taken = [(int(n), 0) for n in np.random.default_rng(0).integers(10, 300, 5000)]
    assert len(together(taken, (1024, 1))) * 1024 < 1.02 * sum(n for n, _ in taken)


def test_no_row_waits_for_ever():
    """The first has room for the last, but by then it is closed."""
    assert together([(6, 0), *[(10, 0)] * OPEN_ROWS, (4, 0)], (10, 1))[0] == [0]
    assert together([(6, 0), *[(10, 0)] * (OPEN_ROWS - 1), (4, 0)], (10, 1))[0] == [0, OPEN_ROWS]


def picture(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("fit", ["squash", "tiles", "native", "merger"])
@given(sides=st.lists(st.tuples(st.integers(4, 70), st.integers(4, 70)), max_size=3), text=st.text("ab", max_size=9))
def test_a_conversation_is_measured_as_it_turns_out(fit, sides, text):
    data = DataConfig(context=400, images=24, patches=256, max_tiles=6, image_fit="native" if fit == "merger" else fit)
    model = dataclasses.replace(SEES, vision=MERGER) if fit == "merger" else SEES
    turns = (Turn("user", IMAGE.join(text[:1] * (len(sides) + 1))), Turn("assistant", text))
    if turns[0].text.count(IMAGE) != len(sides):
        turns = (Turn("user", IMAGE * len(sides)), turns[1])
    record = Conversation("", turns, tuple(picture(*of) for of in sides))
    found = packing.part(record, ByteTokenizer(), data, model, Counter())
    taken = int((found.looked.fields["image_segments"] > 0).sum())
    assert measure(record, ByteTokenizer(), data, model) == (len(found.tokens.ids) - 1, taken)


# What the row holds


def test_rows_of_text_hold_every_conversation_once(tmp_path):
    answers = [f"{number:02d}" * (1 + number % 7) for number in range(30)] + ["x" * 50]
    (rows,) = corpus_of(written(tmp_path, answers)).train
    found = [text for row in map(rows.__getitem__, range(len(rows))) for text in said(row)]
    assert sorted(found) == sorted([*answers[:-1], "x" * 30])
    assert len(rows) < 20
    assert rows.left_out() == {"cut_conversations": 1}
    row = rows[0]
    starts = np.flatnonzero(row["positions"] == 0)[: row["segments"].max()]
    assert row["segments"].max() > 1
    assert (row["tokens"][starts] == ByteTokenizer().end_of_document).all()
    assert (np.diff(row["positions"])[np.diff(row["segments"]) == 0][: starts[1] - 1] == 1).all()


def test_images_stay_with_their_conversation(tmp_path):
    source = written(tmp_path, ["a", "b", "c", "d"], images=(0, 2, 3))
    (rows,) = corpus_of(source, SEES, context=64, images=2).train
    assert [said(row) for row in rows] == [["a", "b", "c"], ["d"]]
    row = rows[0]
    assert row["images"][:, 0, 0, 0].tolist() == [0, 2]  # the colour says which
    assert row["image_segments"].tolist() == [1, 3]
    assert [int(row["images_seen"][row["segments"] == s].max()) for s in (1, 2, 3)] == [1, 1, 2]
    slots = {s: row["image_slots"][(row["segments"] == s) & (row["image_slots"] >= 0)].tolist() for s in (1, 2, 3)}
    assert slots == {1: list(range(16)), 2: [], 3: list(range(16, 32))}
    assert [int(row["given"][row["segments"] == s].sum()) for s in (1, 2, 3)] == [19, 3, 19]


def test_patches_of_several_conversations_are_numbered_through(tmp_path):
    source = written(tmp_path, ["a", "b", "c"], images=(0, 1, 2))
    model = dataclasses.replace(SEES, vision=MERGER, rope_sections=(2, 1, 1))
    (rows,) = corpus_of(source, model, context=64, image_fit="native", patches=40).train
    assert [said(row) for row in rows] == [["a", "b"], ["c"]]
    assert np.bincount(rows[0]["image_segments"]).tolist() == [8, 16, 16]
    second = rows[0]["segments"] == 2
    assert rows[0]["image_slots"][second & (rows[0]["image_slots"] >= 0)].tolist() == [4, 5, 6, 7]
    # Turning begins anew: [end], 2 x 2 vectors of an image, then the text after its larger side.
    turned = rows[0]["rope_positions"][second]
    assert turned[:6].tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 2], [1, 2, 1], [1, 2, 2], [3, 3, 3]]


def test_records_made_here_and_labels_have_a_row_each():
    data = dataclasses.replace(DATA, sources=("scenes:question",), context=256, images=4)
    model = dataclasses.replace(SEES, vision=dataclasses.replace(VISION, image_size=32))
    rows = OBJECTIVES["conversation"].corpus(Experiment(model=model, data=data), None).train[0]
    assert len(rows) == 2**20
    assert rows[5]["segments"].max() == 1


# What goes wrong


def test_a_bad_record_leaves_the_others_of_its_row(tmp_path):
    source = written(tmp_path, ["a", "b", "c", "d"], images=(0, 1, 2, 3))
    (tmp_path / "1.png").unlink()
    (rows,) = corpus_of(source, SEES, context=64, images=2).train
    assert len(rows) == 2
    assert [said(rows[0]), said(rows[1])] == [["a"], ["c", "d"]]
    assert list(rows.left_out().values()) == [1]


def test_a_row_of_bad_records_is_another_row(tmp_path):
    source = written(tmp_path, ["a", "b", "c", "d"], images=(0, 1, 2, 3))
    for number in (0, 1):
        (tmp_path / f"{number}.png").unlink()
    (rows,) = corpus_of(source, SEES, context=64, images=2).train
    assert said(rows[0]) == said(rows[1]) == ["c", "d"]
    assert sum(rows.left_out().values()) == 2
    for number in (2, 3):
        (tmp_path / f"{number}.png").unlink()
    (rows,) = corpus_of(source, SEES, context=64, images=2).train
    with pytest.raises(UserError, match=r"none of the 4 records can be read; the last: .*png"):
        rows[0]


def test_pictures_that_grow_while_a_run_reads_them_are_told(tmp_path):
    source = written(tmp_path, ["a", "b"], images=(0, 1))
    (rows,) = corpus_of(source, SEES, context=64, image_fit="native", patches=64).train
    assert len(rows) == 1
    Image.new("RGB", (16, 48)).save(tmp_path / "1.png")
    with pytest.raises(UserError, match=r"its images have changed since data.sources was opened"):
        rows[0]


# What is kept


def test_sizes_are_found_once(tmp_path, monkeypatch):
    """The second time no record is measured; after a change of the text, all are."""
    source, measured = written(tmp_path, ["a", "b" * 9, "c"]), []

    def counting(*arguments: object) -> tuple[int, int]:
        measured.append(arguments[0])
        return measure(*arguments)

    monkeypatch.setattr(packing, "measure", counting)
    rows = [[said(row) for row in corpus_of(source).train[0]] for _ in range(2)]
    assert rows[0] == rows[1]
    assert len(measured) == 3
    written(tmp_path, ["a", "b" * 9, "cc"])
    corpus_of(source)
    assert len(measured) == 6
    corpus_of(source, assistant_format="{}!")
    assert len(measured) == 9


def test_a_text_is_measured_without_its_pictures(tmp_path, monkeypatch):
    source = written(tmp_path, ["a", "b"], images=(0, 1))

    def refuse(*_: object) -> Conversation:
        raise AssertionError

    monkeypatch.setattr(JsonFiles, "__getitem__", refuse)
    assert len(corpus_of(source, SEES, context=64, images=2).train[0]) == 1


def test_every_held_out_conversation_is_asked_once(tmp_path):
    answers = [f"{number:03d}" for number in range(40)]
    corpus = corpus_of(written(tmp_path, answers), holdout=0.5)
    data = dataclasses.replace(DATA, holdout=0.5)
    batches = list(held_out_batches(corpus, data, text_layout(4, data.context, 257), 4))
    learned = [said({name: array[row] for name, array in b.items()}) for b in batches for row in range(4)]
    found = [text for row in learned for text in row if text]  # the last batch is filled up
    trained = [text for rows in corpus.train for row in rows for text in said(row)]
    assert sorted(found + trained) == answers
    assert len(found) == corpus.report["sources"][0]["held_out"]["documents"]
    assert sum(b["loss_weights"].sum() for b in batches) == sum(len(text) + 1 for text in found)
