"""Sources of conversations as rows: what they hold is known without their images, and what was left out is told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tpu.errors import UserError
from train.config import DataConfig
from train.data.conversation import IMAGE, Conversation, Turn
from train.data.conversations import ConversationSource, Side, class_names, open_source

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
