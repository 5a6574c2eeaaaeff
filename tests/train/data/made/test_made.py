"""Records by name: the same in every process, other ones for every argument, and what counts in a reply."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tpu.errors import UserError
from train.data.chat.record import IMAGE, Conversation
from train.data.made.made import NAMES, answer, make

ROOT = Path(__file__).resolve().parents[4]


def digest(record: Conversation) -> str:
    found = hashlib.blake2b(repr((record.key, record.turns, record.times, record.kind)).encode(), digest_size=8)
    for image in record.images:
        found.update(image.tobytes())
    return found.hexdigest()


def digests() -> list[str]:
    return [digest(make(name, 7, split, n)) for name in NAMES for split in ("train", "test") for n in (11, 3)]


def test_another_process_makes_the_same_in_another_order():
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "import test_made; from train.data.made.made import make\n"
        "make('scenes:caption', 7, 'train', 3, 100)\n"
        "print(*test_made.digests())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == digests() == digests()


@pytest.mark.parametrize("name", NAMES)
def test_records_are_whole_and_differ(name):
    found = set()
    for split in ("train", "test"):
        for seed in (0, 1):
            for index in range(8):
                record = make(name, seed, split, index, 64)
                user, assistant, *more = record.turns
                rounds = len(record.turns) // 2
                assert [turn.role for turn in record.turns] == ["user", "assistant"] * rounds
                assert not more or name == "scenes:dialogue"
                assert user.text.startswith(IMAGE * len(record.images))
                assert user.text.count(IMAGE) == len(record.images) > 0
                assert assistant.text
                assert record.kind
                assert all(image.dtype == np.uint8 and image.shape == (64, 64, 3) for image in record.images)
                assert record.times == () or len(record.times) == len(record.images)
                found.add(record.key)
                found.add(b"".join(image.tobytes() for image in record.images))
    assert len(found) == 2 * 32


def test_unknown_names_are_told_the_valid_ones():
    for name in ("scenes", "scenes:caption:extra", "words:caption", ""):
        with pytest.raises(UserError, match=r"source=.*valid: scenes:caption, .*words:read") as caught:
            make(name, 0, "train", 0)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B is 7, C is 3, 7 - 3 = 4. Answer: 4", "4"),
        ("Answer: 3. No, wrong. Answer: 30%.", "30%"),
        (" Yes. ", "yes"),
        ("the Blue star", "the blue star"),
        ("3.5", "3.5"),
        ("Answer:", ""),
        ("", ""),
    ],
)
def test_what_counts_in_a_reply(text, expected):
    assert answer(text) == expected
