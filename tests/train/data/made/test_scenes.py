"""Scenes: what is said of them against what a reader of their pixels finds, splits, balance, masks."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from tpu.errors import UserError
from train.data.made import made, scenes
from train.data.made.drawing import COLOURS, SHAPES

RELATIONS = ("left", "right", "above")
COUNT = 160


def pieces(there: np.ndarray) -> list[np.ndarray]:
    """Connected parts of a mask [H, W], corners included, each as coordinates [N, 2]."""
    left = set(zip(*np.nonzero(there), strict=True))
    found = []
    while left:
        waiting, piece = [left.pop()], []
        while waiting:
            y, x = waiting.pop()
            piece.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            waiting += near
        found.append(np.array(piece))
    return found


def shape_of(piece: np.ndarray) -> str:
    """By how a piece fills the box around it."""
    piece = piece - piece.min(0)
    height, width = piece.max(0) + 1
    fill = len(piece) / (height * width)
    if fill > 0.68:
        return "square" if fill > 0.92 else "circle"
    lower = (piece[:, 0] >= height / 2).mean()
    if lower > 0.65:
        return "triangle"
    if width / height < 0.9:
        return "diamond"
    turned = {(x, y) for y, x in piece.tolist()}
    return "cross" if turned == {(y, x) for y, x in piece.tolist()} else "star"


def read(image: np.ndarray) -> list[tuple[str, str, int, int]]:
    """(colour, shape, row, column) of everything in a picture [S, S, 3], in reading order, from its pixels alone."""
    size, ground = len(image), image[0, 0].astype(int)
    found = []
    for piece in pieces(np.abs(image - ground).sum(-1) > 30):
        inks = image[piece[:, 0], piece[:, 1]].astype(int)
        colour = max(COLOURS, key=lambda name: (inks == COLOURS[name]).all(-1).sum())
        full = np.abs(np.array(COLOURS[colour]) - ground).sum()
        solid = piece[np.abs(inks - ground).sum(-1) >= full / 2]
        row, column = (3 * (piece.min(0) + piece.max(0) + 1) // (2 * size)).tolist()
        found.append((colour, shape_of(solid), row, column))
    return sorted(found, key=lambda thing: thing[2:])


def where(thing: tuple[str, str, int, int]) -> str:
    rows, columns = ("top", "", "bottom"), ("left", "", "right")
    place = " ".join(word for word in (rows[thing[2]], columns[thing[3]]) if word)
    return f"at the {place}" if place else "in the middle"


def described(thing: tuple[str, str, int, int]) -> str:
    return f"{'an' if thing[0] == 'orange' else 'a'} {thing[0]} {thing[1]} {where(thing)}"


def said(things: list[tuple[str, str, int, int]]) -> str:
    return ", ".join(map(described, things))


def told_off(things: list[tuple[str, str, int, int]]) -> str:
    return ", ".join(f"{described(thing)}: {number}" for number, thing in enumerate(things, 1)) or "none"


def matching(things, name):
    """The things that a name like "red things", "cross shapes" or "blue star" is said of."""
    words = name.split()
    return [thing for thing in things if all(word in ("thing", "things", "shapes", *thing[:2]) for word in words)]


def only(things, name):
    (thing,) = matching(things, name)
    return thing


def replied(pictures, question: str) -> tuple[str, str]:
    """(kind, reply) of a question, for what was read from the pictures."""
    things = pictures[0]
    if m := re.fullmatch(r"What colour is the (\w+)\?", question):
        return "colour", only(things, m[1])[0]
    if m := re.fullmatch(r"What shape is the (\w+) thing\?", question):
        return "shape", only(things, m[1])[1]
    if m := re.fullmatch(r"How many (.+) are there\?", question):
        found = matching(things, m[1])
        return "count", f"{told_off(found)}. Answer: {len(found)}"
    if m := re.fullmatch(r"Is the (.+) (left of|right of|above) the (.+)\?", question):
        axis = 2 if m[2] == "above" else 3
        a, b = only(things, m[1]), only(things, m[3])
        assert a[axis] != b[axis]
        answer = "yes" if (a[axis] < b[axis]) != (m[2] == "right of") else "no"
        return m[2].split()[0], f"the {m[1]} is {where(a)}, the {m[3]} is {where(b)}. Answer: {answer}"
    if m := re.fullmatch(r"Are the (\w+) and the (\w+) the same colour\?", question):
        one, two = only(things, m[1])[0], only(things, m[2])[0]
        return "same", f"the {m[1]} is {one}, the {m[2]} is {two}. Answer: {'yes' if one == two else 'no'}"
    if m := re.fullmatch(r"Which picture has (more|an?) (.+), the first or the second\?", question):
        first, second = (matching(picture, m[2]) for picture in pictures)
        assert len(first) != len(second)
        assert m[1] == "more" or {len(first), len(second)} == {0, 1}
        answer = "first" if len(first) > len(second) else "second"
        return "compare", f"first: {told_off(first)}; second: {told_off(second)}. Answer: {answer}"
    m = re.fullmatch(r"Is there an? (.+) in both pictures\?", question)
    first, second = (matching(picture, m[1]) for picture in pictures)
    return (
        "both",
        f"first: {told_off(first)}; second: {told_off(second)}. Answer: {'yes' if first and second else 'no'}",
    )


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [64, 100])
def test_captions_say_what_is_to_be_seen(split, size):
    for index in range(COUNT):
        record = scenes.make("caption", 3, split, index, size)
        (image,) = record.images
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        things = read(image)
        assert record.turns[1].text == said(things)
        scene = scenes.scene(3, split, index)
        assert [tuple(thing[:4]) for thing in scene.things] == things
        np.testing.assert_array_equal(scenes.draw(scene, size), image)


def test_the_reader_sees_a_wrong_caption():
    right = scenes.make("caption", 0, "train", 2)
    other = scenes.make("caption", 0, "train", 3)
    assert said(read(other.images[0])) != right.turns[1].text


@pytest.mark.parametrize("task", ["question", "dialogue", "compare"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_those_of_the_pixels(task, split):
    kinds = Counter()
    for index in range(2 * COUNT):
        record = scenes.make(task, 5, split, index)
        assert record.turns[0].text.startswith("<image>" * len(record.images))
        pictures, asked = [read(image) for image in record.images], []
        for user, assistant in zip(record.turns[::2], record.turns[1::2], strict=True):
            asked.append(user.text.replace("<image>", ""))
            kind, reply = replied(pictures, asked[-1])
            assert reply == assistant.text
            assert len(made.answer(reply).split()) == 1
            kinds[kind] += 1
        assert kind == record.kind  # the last one's
        assert len(set(asked)) == len(asked) <= (3 if task == "dialogue" else 1)
    expected = {"compare", "both"} if task == "compare" else {"colour", "shape", "count", "same", *RELATIONS}
    assert set(kinds) == expected
    assert min(kinds.values()) > COUNT / 6


def test_swapped_images_flip_first_and_second():
    for index in range(COUNT):
        record = scenes.make("compare", 1, "train", index)
        other = scenes.swapped(record)
        pictures = [read(image) for image in other.images]
        question = other.turns[0].text.replace("<image>", "")
        assert replied(pictures, question) == (other.kind, other.turns[1].text)
        flips = made.answer(other.turns[1].text) != made.answer(record.turns[1].text)
        assert flips == (record.kind == "compare")
        back = scenes.swapped(other)
        assert back.turns == record.turns
        assert all(a is b for a, b in zip(back.images, record.images, strict=True))


def blind(asked: list[tuple[str, str, str]]) -> dict[str, float]:
    """Per kind, how often the answer most frequent for a question's text in one half is right in the other half.

    For texts that are not in the first half, it is the answer most frequent for the kind.
    """
    seen: dict[str, Counter] = defaultdict(Counter)
    for kind, question, answer in asked[::2]:
        seen[question][answer] += 1
        seen[kind][answer] += 1
    right, all_of = Counter(), Counter()
    for kind, question, answer in asked[1::2]:
        all_of[kind] += 1
        right[kind] += seen[question if question in seen else kind].most_common(1)[0][0] == answer
    return {kind: right[kind] / all_of[kind] for kind in all_of}


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_question_alone_says_little_of_the_answer(split):
    found = [scenes.question(0, split, n) for n in range(8_000)]
    found += [scenes.comparison(0, split, n) for n in range(3_000)]
    asked = [(a.kind, a.question, made.answer(a.answer)) for a in found]
    limits = {"colour": 1 / 6, "shape": 1 / 6, "count": 0.22, "same": 0.5} | dict.fromkeys(RELATIONS, 0.5)
    limits |= {"compare": 0.5, "both": 0.5}
    found = blind(asked)
    assert set(found) == set(limits)
    for kind, limit in limits.items():
        assert found[kind] < limit + 0.06, kind
    leaky = [(kind, f"{question.split()[0]} {answer[0]}", answer) for kind, question, answer in asked]
    assert all(value > limits[kind] + 0.2 for kind, value in blind(leaky).items())  # a text that says more is noticed
    answers = Counter(answer for kind, _, answer in asked if kind in (*RELATIONS, "same", "both"))
    assert answers["yes"] / answers.total() == pytest.approx(0.5, abs=0.03)
    answers = Counter(answer for kind, _, answer in asked if kind == "compare")
    assert answers["first"] / answers.total() == pytest.approx(0.5, abs=0.04)


def test_no_composition_is_in_both_splits():
    def kept(split, seed):
        found = [scenes.scene(seed, split, n) for n in range(2_500)]
        found += [scenes.question(seed, split, n).scenes[0] for n in range(500)]
        found += [scene for n in range(250) for scene in scenes.comparison(seed, split, n).scenes]
        return {frozenset((t.colour, t.shape, t.row, t.column) for t in scene.things) for scene in found}

    train, test = kept("train", 0), kept("test", 1)
    assert not train & test
    assert min(len(train), len(test)) > 1_250
    for single in (train, test):  # both have scenes of every colour and shape
        assert {(c, s) for things in single for c, s, _, _ in things} == {(c, s) for c in COLOURS for s in SHAPES}


@pytest.mark.parametrize("size", [32, 64, 97])
def test_masks_are_where_the_things_are_drawn(size):
    for index in range(60):
        scene = scenes.scene(0, "train", index)
        image, masks = scenes.draw(scene, size).astype(int), scenes.masks(scene, size)
        assert masks.shape == (len(scene.things), size, size)
        assert masks.dtype == bool
        assert masks.sum(0).max() == 1  # nothing overlaps
        drawn = np.abs(image - scene.background).sum(-1)
        for thing, mask in zip(scene.things, masks, strict=True):
            full = np.abs(np.array(COLOURS[thing.colour]) - scene.background).sum()
            assert (drawn[mask] >= 0.48 * full).all()
            alone = scenes.masks(scene._replace(things=(thing,)), size)[0]
            np.testing.assert_array_equal(alone, mask)
            y, x = np.argwhere(mask).mean(0) / size
            assert (int(y * 3), int(x * 3)) == (thing.row, thing.column)
        outside = drawn * ~masks.any(0)
        assert outside.max() <= 0.52 * np.abs(np.array([20, 20, 20]) - 250).sum()
        moved = np.roll(masks, 2, -1)
        assert any((drawn[mask] == 0).any() for mask in moved)  # masks that are off are noticed


def test_bad_arguments_are_named():
    for arguments, message in (
        (("captions", 0, "train", 0), "task='captions'.*caption, question, dialogue, compare"),
        (("caption", 0, "valid", 0), "split='valid'"),
        (("caption", 0, "train", 0, 16), "size=16"),
    ):
        with pytest.raises(UserError, match=message):
            scenes.make(*arguments)
