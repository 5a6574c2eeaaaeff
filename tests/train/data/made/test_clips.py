"""Clips: descriptions against positions read from the frames, and single frames that give nothing away."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest

from tpu.errors import UserError
from train.data.made import clips
from train.data.made.drawing import COLOURS

SIZE = 32


def seen(image: np.ndarray, colour: str) -> tuple[float, float] | None:
    """Where in [0, 1) the middle (x, y) of a colour lies, on a picture without borders; None where it is nowhere."""
    there = (image == COLOURS[colour]).all(-1)
    if not there.any():
        return None
    turns = np.exp(2j * np.pi * (np.arange(len(image)) + 0.5) / len(image))
    x, y = (np.angle((there.sum(axis) * turns).sum()) / (2 * np.pi) % 1 for axis in (0, 1))
    return x, y


def happens(images: list[np.ndarray], colour: str) -> tuple[str, int]:
    """(event, frame in which it is first to be seen) of the only thing of this colour."""
    places = [seen(image, colour) for image in images]
    there = [place is not None for place in places]
    if there != [True] * len(there):
        return ("disappears", there.index(False)) if there[0] else ("appears", there.index(True))
    steps = [(np.subtract(b, a) + 0.5) % 1 - 0.5 for a, b in itertools.pairwise(places)]
    first = next(n for n, step in enumerate(steps) if np.abs(step).max() > 0.05)
    x, y = steps[first]
    if abs(x) > abs(y):
        return "moves right" if x > 0 else "moves left", first + 1
    return "moves down" if y > 0 else "moves up", first + 1


def is_at(word: str, image: np.ndarray, colour: str) -> bool:
    """Whether the only thing of this colour is where the word says, give or take a twentieth of the side."""
    place = seen(image, colour)
    if word in ("there", "gone"):
        return (place is None) == (word == "gone")
    thirds = {"left": (0, 0), "right": (0, 2), "top": (1, 0), "bottom": (1, 2)}
    axes = [thirds[word]] if word in thirds else [(0, 1), (1, 1)]
    return any(abs((place[axis] * 3 - third + 1) % 3 - 1.5) < 0.5 + 3 / 20 for axis, third in axes)


@pytest.mark.parametrize("split", ["train", "test"])
def test_descriptions_say_what_happens(split):
    kinds = set()
    for index in range(300):
        record = clips.make("describe", 2, split, index)
        assert record.turns[0].text.count("<image>") == len(record.images) == len(record.times) == 4
        assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in record.images)
        assert list(record.times) == sorted(set(record.times))
        tracks, _, described = record.turns[1].text.partition(". Answer: ")
        parts = [re.fullmatch(r"an? (\w+) (\w+) (.+)", part).groups() for part in described.split(", then ")]
        steps = r"an? (\w+) (\w+): 1 (\w+), 2 (\w+), 3 (\w+), 4 (\w+)"
        tracks = [re.fullmatch(steps, track).groups() for track in tracks.split("; ")]
        assert sorted(track[:2] for track in tracks) == sorted(part[:2] for part in parts)
        assert len(parts) == {"direction": 1, "order": 2}[record.kind]
        kinds.add(record.kind)
        upper = clips.clip(2, split, index).actors[0].centre[1] < 0.5
        starts = []
        for number, (colour, _, event) in enumerate(parts):
            images = list(record.images)
            if len(parts) == 2:  # in halves of the picture, for both may have one colour
                images = [image.copy() for image in images]
                for image in images:
                    image[slice(32, 64) if upper == (number == 0) else slice(0, 32)] = 255
            found, start = happens(images, colour)
            assert found == event
            starts.append(start)
            words = tracks[upper != (number == 0) if len(parts) == 2 else 0][2:]  # the upper one's are first
            assert all(itertools.starmap(is_at, zip(words, images, [colour] * 4, strict=True)))
            assert len(set(words)) > 1  # so that the steps say which way
        assert starts == sorted(set(starts))
    assert kinds == {"direction", "order"}


def frames_of(wanted: list[clips.Clip], frame: int) -> np.ndarray:
    """One frame of each clip, as darkness on a grid of 8 x 8: [N, 64]."""
    images = np.stack([clips.draw(clip, SIZE)[frame] for clip in wanted]).astype(np.float32)
    grounds = np.array([clip.background for clip in wanted], np.float32)[:, None, None]
    dark = np.abs(images - grounds).sum(-1)
    return dark.reshape(-1, 8, SIZE // 8, 8, SIZE // 8).mean((2, 4)).reshape(-1, 64) / 100


def linear(x: np.ndarray, labels: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """Labels that least squares to one-hot labels gives."""
    x, x_test = (np.concatenate([part, part**2, np.ones((len(part), 1))], 1) for part in (x, x_test))
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ np.eye(labels.max() + 1)[labels])
    return (x_test @ weights).argmax(1)


def nearest(x: np.ndarray, labels: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """The label of the nearest neighbour."""
    return labels[((x**2).sum(1) - 2 * x_test @ x.T).argmin(1)]


def direction(clip: clips.Clip) -> int:
    return list(clips.DIRECTIONS).index(clip.actors[0].event)


def upper_first(clip: clips.Clip) -> int:
    return int(clip.actors[0].centre[1] < clip.actors[1].centre[1])


def probed(wanted: list[clips.Clip], label: Callable[[clips.Clip], int], frame: int) -> tuple[float, float]:
    """How many deviations above chance the labels of the last third are read from one frame, by both probes."""
    x, labels = frames_of(wanted, frame), np.array([label(clip) for clip in wanted])
    cut = 2 * len(wanted) // 3
    chance = 1 / (labels.max() + 1)
    deviation = (chance * (1 - chance) / (len(wanted) - cut)) ** 0.5
    return tuple(
        ((probe(x[:cut], labels[:cut], x[cut:]) == labels[cut:]).mean() - chance) / deviation
        for probe in (linear, nearest)
    )


@pytest.fixture(scope="module")
def many() -> list[clips.Clip]:
    return [clips.clip(0, "train", n) for n in range(8_000)]


def crosses(clip: clips.Clip) -> bool:
    places = [clips.place(clip.actors[0], frame) for frame in range(clips.FRAMES)]
    return any(np.abs(np.subtract(a, b)).max() > 0.5 for a, b in itertools.pairwise(places))


@pytest.mark.parametrize("frame", range(4))
def test_a_single_frame_says_nothing_of_direction(many, frame):
    moving = [clip for clip in many if clip.kind == "direction"]
    assert max(probed(moving, direction, frame)) < 4


@pytest.mark.parametrize("frame", range(4))
def test_a_single_frame_says_nothing_of_order(many, frame):
    ordered = [clip for clip in many if clip.kind == "order"]
    assert max(probed(ordered, upper_first, frame)) < 4


def test_the_probes_find_what_there_is(many):
    moving = [clip for clip in many if clip.kind == "direction" and not crosses(clip)]  # as in a world with borders
    assert min(min(probed(moving, direction, frame)) for frame in (0, 3)) > 8
    ordered = [
        clip for clip in many if {actor.event for actor in clip.actors} == {"appears"}
    ]  # what is there, was first
    assert min(probed(ordered, upper_first, 1)) > 5


@pytest.mark.parametrize("split", ["train", "test"])
def test_events_are_balanced(split):
    found = [clips.clip(1, split, n) for n in range(3_000)]
    moving = [direction(clip) for clip in found if clip.kind == "direction"]
    assert len(moving) / len(found) == pytest.approx(0.5, abs=0.04)
    assert np.bincount(moving) / len(moving) == pytest.approx(0.25, abs=0.05)
    ordered = [clip for clip in found if clip.kind == "order"]
    assert np.mean([upper_first(clip) for clip in ordered]) == pytest.approx(0.5, abs=0.06)
    for number in (0, 1):
        events = [clip.actors[number].event for clip in ordered]
        for event in ("left", "right", "appears", "disappears"):
            assert events.count(event) / len(events) == pytest.approx(0.25, abs=0.05)


def test_no_composition_is_in_both_splits():
    def kept(split, seed):
        found = [clips.clip(seed, split, n) for n in range(10_000)]
        return {frozenset((actor.colour, actor.shape) for actor in clip.actors) for clip in found}

    train, test = kept("train", 0), kept("test", 1)
    assert not train & test
    assert len(train | test) == 36 + 36 * 35 // 2


def test_bad_arguments_are_named():
    for arguments, message in (
        (("caption", 0, "train", 0), "task='caption'.*describe"),
        (("describe", 0, "valid", 0), "split='valid'"),
        (("describe", 0, "train", 0, 16), "size=16"),
    ):
        with pytest.raises(UserError, match=message):
            clips.make(*arguments)
