"""Sources of conversations as rows: what they hold is known without their images, and what was left out is told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from PIL import Image

from model.config import ModelConfig, VisionConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment
from train.data import pipeline
from train.data.chat.record import IMAGE, Conversation, Side, Turn
from train.data.chat.rows import ConversationSource, class_names, open_source
from train.data.corpus import load_corpus, log_left_out
from train.objectives.table import OBJECTIVES

DATA = DataConfig(holdout=0.0)


def written(folder: Path, answers: Sequence[str]) -> str:
    """A source whose pictures are not there."""
    turns = [[{"from": "human", "value": IMAGE}, {"from": "gpt", "value": answer}] for answer in answers]
    lines = [json.dumps({"image": f"{number}.png", "conversations": said}) for number, said in enumerate(turns)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return str(folder / "a.jsonl")


# Classes


def test_names_of_classes_are_read_without_pictures(tmp_path):
    source = open_source(written(tmp_path, ["b", "a", "b", "c"] * 20), DATA, 8)
    assert class_names([source], 3, DATA) == ("a", "b", "c")
    with pytest.raises(UserError, match=r"^model.labels=2: there are more classes: a, b, c"):
        class_names([source], 2, DATA)


def test_names_that_a_source_lists_are_taken_and_no_record_is_read():
    def read(index: int) -> Conversation:
        raise AssertionError(index)

    listed = ConversationSource("listed", Side(9, read, read), Side(9, read, read), "", ("b", "a"))
    assert class_names([listed], 2, DATA) == ("a", "b")
    with pytest.raises(UserError, match=r"^model.labels=1: there are more classes: a, b"):
        class_names([listed], 1, DATA)


def test_no_more_records_are_read_than_show_that_there_are_too_many_classes():
    asked = []

    def read(index: int) -> Conversation:
        asked.append(index)
        return Conversation("", (Turn("assistant", f"{index // 2}"),))

    side = Side(2**20, read, read)
    with pytest.raises(UserError, match=r"^model.labels=4: there are more classes: 0, 1, 2, 3, 4$"):
        class_names([ConversationSource("many", side, dataclasses.replace(side, length=0), "")], 4, DATA)
    assert asked == list(range(9))


# What was left out


def asked(folder: Path, answers: Sequence[str], missing: Collection[int] = ()) -> str:
    source = written(folder, answers)
    for number in range(len(answers)):
        if number not in missing:
            Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    return source


def corpus_of(source: str, objective: str) -> pipeline.Corpus:
    fusion, pool = {"conversation": ("merge", "none"), "contrastive": ("contrastive", "mean")}[objective]
    connector = "none" if pool == "mean" else "mlp"
    vision = VisionConfig("vit", image_size=8, patch_size=8, layers=1, embed_dim=8, heads=1)
    vision = dataclasses.replace(vision, pool=pool, connector=connector)
    model = ModelConfig(vocab_size=257, embed_dim=8, heads=1, fusion=fusion, vision=vision).resolved()
    data = dataclasses.replace(DATA, sources=(source,), tokenizer="bytes", context=8)
    return OBJECTIVES[objective].corpus(Experiment(model=model, data=data), None)


@pytest.mark.parametrize(
    ("objective", "whole", "name"),
    [("conversation", "12345", "cut_conversations"), ("contrastive", "123456", "cut_texts")],
)
def test_what_is_cut_and_what_is_read_over_is_counted_and_logged(objective, whole, name, tmp_path, caplog):
    caplog.set_level("INFO")
    source = asked(tmp_path, [whole, f"{whole}7", "1", f"{whole}78"], missing=[2])
    corpus = corpus_of(source, objective)
    assert "rows are made when they are asked for" in caplog.messages[0]
    (rows,) = corpus.train
    assert rows[0]["loss_weights"].any()
    assert not rows.left_out()
    log_left_out(corpus.train)
    assert len(caplog.messages) == 1
    assert rows[3]["loss_weights"].any()
    assert rows.left_out() == {name: 1}
    log_left_out(corpus.train)
    assert caplog.messages[-1] == f"data {source}, train: 2 rows made so far; 1 {name}"
    for index in (2, 2):
        rows[index]  # another stands in
    log_left_out(corpus.train)
    assert caplog.messages[-1].startswith(f"data {source}, train: 4 rows made so far; ")
    assert caplog.messages[-1].endswith("1 image … cannot be read")


def test_packed_text_has_nothing_to_tell(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("some text " * 9)
    corpus = load_corpus(dataclasses.replace(DATA, sources=(f"{tmp_path}/a.txt",), tokenizer="bytes", context=8))
    caplog.set_level("INFO")
    log_left_out(corpus.train)
    assert not caplog.messages
