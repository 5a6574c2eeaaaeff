"""Charts: captions and answers against what is read from the pixels, splits, balance."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from tpu.errors import UserError
from train.data.made import charts
from train.data.made.drawing import COLOURS

PAINTS = {"A": "red", "B": "green", "C": "blue", "D": "yellow", "E": "purple"}


def read(image: np.ndarray, kind: str) -> dict[str, int]:
    """Values by name, in units of the axis or tenths, from the pixels of a picture of 64 or 128."""
    scale = len(image) / 64
    areas = {name: (image == COLOURS[colour]).all(-1) for name, colour in PAINTS.items()}
    areas = {name: area for name, area in areas.items() if area.any()}
    if kind == "pie":
        whole = sum(area.sum() for area in areas.values())
        return {name: round(10 * area.sum() / whole) for name, area in areas.items()}
    rows = {name: np.nonzero(area.any(1))[0] for name, area in areas.items()}
    if kind == "bar":
        return {name: round(len(found) / (5 * scale)) for name, found in rows.items()}
    return {name: round((54.5 - (found.mean() + 0.5) / scale) / 5) for name, found in rows.items()}


def written(value: int, kind: str) -> str:
    return f"{10 * value}%" if kind == "pie" else str(value)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [64, 128])
def test_captions_say_what_is_to_be_seen(split, size):
    kinds = Counter()
    for index in range(150):
        chart = charts.chart(2, split, index)
        record = charts.make("caption", 2, split, index, size)
        (image,) = record.images
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        values = read(image, chart.kind)
        assert record.turns[1].text == ", ".join(f"{name} {written(v, chart.kind)}" for name, v in values.items())
        assert "".join(values) == "ABCDE"[: len(values)]
        kinds[chart.kind, len(values)] += 1
        if chart.kind == "pie":
            assert sum(values.values()) == 10
    assert len(kinds) == 9


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_those_of_the_pixels_and_steps_are_sound(split):
    kinds = Counter()
    for index in range(300):
        asked = charts.question(4, split, index)
        record = charts.make("question", 4, split, index)
        assert record.kind == asked.kind
        assert record.turns[0].text == f"<image>{asked.question}"
        of = asked.chart.kind
        values = read(record.images[0], of)
        steps, _, answer = record.turns[1].text.partition(" Answer: ")
        names = re.findall(r"\b([A-E])\b", asked.question)
        numbers = [values[name] for name in names]
        if asked.kind in ("highest", "lowest"):
            extreme = max(values.values()) if asked.kind == "highest" else min(values.values())
            assert [name for name in values if values[name] == extreme] == [answer]
            read_off = dict(re.findall(r"([A-E]) (\d+%?)", steps))
            assert read_off == {name: written(value, of) for name, value in values.items()}
            assert steps.endswith(f"{answer} is the {asked.kind}.")
        else:
            result = {"value": sum(numbers), "sum": sum(numbers), "difference": numbers[0] - numbers[-1]}[asked.kind]
            assert answer == written(result, of)
            assert result > 0
            assert re.findall(r"([A-E]) is (\d+%?)", steps) == [(n, written(values[n], of)) for n in names]
        if asked.kind in ("difference", "sum"):
            a, sign, b, total = re.search(r"(\d+)%? ([-+]) (\d+)%? = (\d+)%?\.$", steps).groups()
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(total)
            assert (sign == "+") == ("together" in asked.question)
        assert len(names) == {"value": 1, "highest": 0, "lowest": 0}.get(asked.kind, 2)
        kinds[asked.kind] += 1
    assert set(kinds) == {"value", "highest", "lowest", "difference", "sum"}
    assert min(kinds.values()) > 35


def test_the_reader_sees_a_chart_that_is_one_off():
    for kind, values, other in (
        ("bar", (3, 7, 5), (3, 7, 6)),
        ("line", (3, 7, 5), (3, 6, 5)),
        ("pie", (3, 6, 1), (3, 5, 2)),
    ):
        chart = charts.Chart(kind, values, (250, 250, 250), 0.3)
        assert tuple(read(charts.draw(chart, 64), kind).values()) == values
        assert tuple(read(charts.draw(chart._replace(values=other), 64), kind).values()) == other


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_question_alone_says_little_of_the_answer(split):
    asked = [charts.question(0, split, n) for n in range(3_000)]
    answers = [a.answer.rpartition(" ")[2] for a in asked]
    seen: dict[str, Counter] = defaultdict(Counter)
    for a, answer in zip(asked[::2], answers[::2], strict=True):
        seen[a.question][answer] += 1
    right, all_of = Counter(), Counter()
    for a, answer in zip(asked[1::2], answers[1::2], strict=True):
        all_of[a.kind] += 1
        right[a.kind] += bool(seen[a.question]) and seen[a.question].most_common(1)[0][0] == answer
    shares = {kind: right[kind] / all_of[kind] for kind in all_of}
    assert all(share < 0.2 for kind, share in shares.items() if kind in ("value", "difference", "sum")), shares
    assert all(shares[kind] < 0.42 for kind in ("highest", "lowest")), shares


def test_no_composition_is_in_both_splits():
    def kept(split, seed):
        found = [charts.chart(seed, split, n) for n in range(10_000)]
        found += [charts.question(seed, split, n).chart for n in range(1_000)]
        return {(chart.kind, chart.values) for chart in found}

    train, test = kept("train", 0), kept("test", 1)
    assert not train & test
    pies = [values for kind, values in train | test if kind == "pie"]
    assert len(pies) == 36 + 84 + 126  # all the ways to cut ten tenths into three, four and five
    assert 0.12 < sum(kind == "pie" for kind, _ in test) / len(pies) < 0.28


def test_bad_arguments_are_named():
    for arguments, message in (
        (("read", 0, "train", 0), "task='read'.*caption, question"),
        (("caption", 0, "valid", 0), "split='valid'"),
        (("caption", 0, "train", 0, 63), "size=63: .* valid: 64"),
    ):
        with pytest.raises(UserError, match=message):
            charts.make(*arguments)
