"""Short clips of shapes that move, appear and disappear, to be described in the order of events.

No single frame says anything about direction or order, not even who knows which frame it is. For directions that needs
a world without borders: what leaves at one side comes in at the other, so where a shape is says nothing of where it
goes. For order, each shape is there or not, and is where it is, as likely before its event as after it. Splits are
therefore by the kinds of shape in a clip, never by what happens to them.

A reply says frame by frame where each shape is, along its way, and then what happened: "a red circle: 1 left, 2 left,
3 middle, 4 right. Answer: a red circle moves right". Without these steps a small model sees the way and not the
direction, and without the numbers it mistakes one frame for another. Of two shapes the upper one comes first there:
whose event is first can be told from what has been said of both.

Legend: F frames; S side of a picture in pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tpu.errors import UserError
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.made import drawing
from train.data.made.drawing import BACKGROUNDS, COLOURS, RGB, SHAPES, pick

TASKS = ("describe",)
REQUESTS = ("describe", "What happens?", "Describe the video.")
FRAMES = 4
SECONDS = 0.5  # between frames
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y
RADII = (0.11, 0.125, 0.14)  # in parts of the side; few, so that stamps are used again
STEPS = (0.17, 0.23)  # between frames, in parts of the side; the whole way stays below 1, so directions are clear
ALONG = {"left": ("left", "middle", "right"), "up": ("top", "middle", "bottom")}  # thirds of the side
ALONG |= {"right": ALONG["left"], "down": ALONG["up"]}


class Actor(NamedTuple):
    """A shape and its event: "left", ..., "appears" or "disappears", first to be seen in frame `start`.

    A shape that moves makes `moves` steps. `centre` (x, y) in frame 0, radius and step are in parts of the side.
    """

    colour: str
    shape: str
    event: str
    start: int
    moves: int
    centre: tuple[float, float]
    radius: float
    step: float


class Clip(NamedTuple):
    """Actors in the order of their events: for kind "direction" one that always moves, for "order" two."""

    kind: str
    actors: tuple[Actor, ...]
    background: RGB


def make(task: str, seed: int, split: str, index: int, size: int = 64) -> Conversation:
    """Record `index` of "describe", F images uint8 [S, S, 3], `times` in seconds.

    Raises UserError for another task or split, and for a size in which shapes could not be told apart.
    """
    if task not in TASKS:
        raise UserError(f"task={task!r}: clips have no such task; valid: {', '.join(TASKS)}")
    found = clip(seed, split, index)
    request = IMAGE * FRAMES + REQUESTS[index % len(REQUESTS)]
    turns = (Turn("user", request), Turn("assistant", reply(found)))
    times = tuple(SECONDS * frame for frame in range(FRAMES))
    return Conversation(f"clips:{task}:{split}:{seed}:{index}", turns, tuple(draw(found, size)), times, found.kind)


def clip(seed: int, split: str, index: int) -> Clip:
    """Clip `index` of the split, as many of kind "direction" as of "order"."""
    rng = drawing.generator(seed, "clips:describe", split, index)
    kind = pick(rng, (_direction, _order))
    return drawing.fitting(split, lambda: kind(rng), composition)


def composition(clip: Clip) -> str:
    """Which kinds of shape are in the clip, whatever they do: this decides its split."""
    return f"clip {', '.join(sorted(f'{actor.colour} {actor.shape}' for actor in clip.actors))}"


def description(clip: Clip) -> str:
    """What happens, in order: "a red circle moves left, then a blue star appears"."""
    return ", then ".join(
        f"{drawing.named(a.colour, a.shape)} {f'moves {a.event}' if a.event in DIRECTIONS else a.event}"
        for a in clip.actors
    )


def reply(clip: Clip) -> str:
    """Where every actor is, frame by frame, the upper one first, and the description."""
    tracks = map(_track, sorted(clip.actors, key=lambda actor: actor.centre[1]))
    return f"{'; '.join(tracks)}. Answer: {description(clip)}"


def _track(actor: Actor) -> str:
    """Where an actor that moves is along its way, in thirds of the side; of another, whether it is there."""
    places = [place(actor, frame) for frame in range(FRAMES)]
    if actor.event in DIRECTIONS:
        axis = 0 if DIRECTIONS[actor.event][0] else 1
        words = [ALONG[actor.event][int(centre[axis] * 3)] for centre in places if centre is not None]
    else:
        words = ["gone" if centre is None else "there" for centre in places]
    steps = (f"{number} {word}" for number, word in enumerate(words, 1))
    return f"{drawing.named(actor.colour, actor.shape)}: {', '.join(steps)}"


def place(actor: Actor, frame: int) -> tuple[float, float] | None:
    """Centre (x, y) of an actor in a frame, in parts of the side, in [0, 1); None where it is not to be seen."""
    after = frame >= actor.start
    if (actor.event == "appears" and not after) or (actor.event == "disappears" and after):
        return None
    way = actor.step * min(max(0, frame - actor.start + 1), actor.moves)
    x, y = DIRECTIONS.get(actor.event, (0, 0))
    return (actor.centre[0] + x * way) % 1, (actor.centre[1] + y * way) % 1


def draw(clip: Clip, size: int) -> np.ndarray:
    """The frames, uint8 [F, S, S, 3]. Raises UserError for a size in which shapes could not be told apart."""
    frames = np.stack([drawing.canvas(size, clip.background)] * FRAMES)
    for actor in clip.actors:
        for frame, image in enumerate(frames):
            if (centre := place(actor, frame)) is not None:
                drawing.stamp(image, actor.shape, actor.colour, clip.background, centre, actor.radius)
    return frames


def _direction(rng: np.random.Generator) -> Clip:
    (kind,) = _kinds(rng, 1)
    x, y = rng.random(2).tolist()
    return Clip("direction", (_actor(rng, kind, pick(rng, tuple(DIRECTIONS)), 1, FRAMES - 1, x, y),), _background(rng))


def _order(rng: np.random.Generator) -> Clip:
    """Two shapes, one in the upper half and one in the lower; each moves sideways, appears or disappears."""
    events = [pick(rng, ("left", "right", "appears", "disappears")) for _ in range(2)]
    moves = [2 if event in DIRECTIONS else 0 for event in events]  # two: one alone could be a jump over the border
    pairs = [(i, j) for i in range(1, FRAMES) for j in range(i + 1, FRAMES)]
    starts = pick(
        rng, [pair for pair in pairs if all(s + max(1, m) <= FRAMES for s, m in zip(pair, moves, strict=True))]
    )
    heights = (0.25, 0.75) if rng.random() < 0.5 else (0.75, 0.25)
    actors = [
        _actor(rng, kind, event, start, steps, rng.random(), height + rng.uniform(-0.08, 0.08))
        for kind, event, start, steps, height in zip(_kinds(rng, 2), events, starts, moves, heights, strict=True)
    ]
    return Clip("order", tuple(actors), _background(rng))


def _kinds(rng: np.random.Generator, number: int) -> list[tuple[str, str]]:
    """Different (colour, shape)."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [kinds[k] for k in rng.permutation(len(kinds))[:number].tolist()]


def _actor(
    rng: np.random.Generator, kind: tuple[str, str], event: str, start: int, moves: int, x: float, y: float
) -> Actor:
    radius = pick(rng, RADII)
    return Actor(*kind, event, start, moves, (x, y), radius, rng.uniform(*STEPS))


def _background(rng: np.random.Generator) -> RGB:
    return pick(rng, BACKGROUNDS)
