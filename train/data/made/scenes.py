"""Scenes of one to four coloured shapes, with captions, questions, and comparisons of two of them.

Shapes lie in cells of a 3 x 3 grid, off its centres by some jitter, in two sizes, and never overlap. A scene's
composition is which coloured shapes lie in which cells. Answers are balanced: whoever sees only the question's text can
hardly do better than by tossing a coin, or a die. Where several things have to be looked at, what is seen of them comes
first and the answer after it ("the star is red, the cross is blue. Answer: no"): without these steps a small model
learns to compare colours late or not at all. What is counted is told off, one after the other.

Legend: S side of a picture in pixels; O things in a scene.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tpu.errors import UserError
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.made import drawing
from train.data.made.drawing import BACKGROUNDS, COLOURS, RGB, SHAPES, pick

TASKS = ("caption", "question", "dialogue", "compare")
REQUESTS = ("describe", "Describe the picture.", "What is in the picture?")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("at the left", "in the middle", "at the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
MOST = 4  # things in a scene
ROUNDS = 2  # questions of a dialogue after the first, at most
RADII = (0.1, 0.13)  # in parts of the side
GAP = 1 / 64  # between a shape and the border of its cell, in parts of the side

Kind = tuple[str, str]  # colour, shape
KINDS: tuple[Kind, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)


class Thing(NamedTuple):
    """A coloured shape in cell (row, column) of the 3 x 3 grid; centre (x, y) and radius in parts of the side."""

    colour: str
    shape: str
    row: int
    column: int
    centre: tuple[float, float]
    radius: float


class Scene(NamedTuple):
    """Things in reading order on a plain background."""

    things: tuple[Thing, ...]
    background: RGB


class Asked(NamedTuple):
    """A question about scenes, and its answer."""

    kind: str
    scenes: tuple[Scene, ...]
    question: str
    answer: str


def make(task: str, seed: int, split: str, index: int, size: int = 64) -> Conversation:
    """Record `index` of "caption", "question", "dialogue" (several questions) or "compare", images uint8 [S, S, 3].

    Raises UserError for another task or split, and for a size in which shapes could not be told apart.
    """
    more: list[Asked] = []
    if task == "caption":
        found = scene(seed, split, index)
        asked = Asked("caption", (found,), REQUESTS[index % len(REQUESTS)], caption(found))
    elif task == "question":
        asked = question(seed, split, index)
    elif task == "dialogue":
        asked, *more = dialogue(seed, split, index)
    elif task == "compare":
        asked = comparison(seed, split, index)
    else:
        raise UserError(f"task={task!r}: scenes have no such task; valid: {', '.join(TASKS)}")
    turns = [Turn("user", IMAGE * len(asked.scenes) + asked.question), Turn("assistant", asked.answer)]
    for other in more:
        turns += [Turn("user", other.question), Turn("assistant", other.answer)]
    images = tuple(draw(found, size) for found in asked.scenes)
    return Conversation(f"scenes:{task}:{split}:{seed}:{index}", tuple(turns), images, kind=[asked, *more][-1].kind)


def swapped(conversation: Conversation) -> Conversation:
    """The same comparison with its two images in the other order; "first" and "second" are flipped, yes and no stay."""
    flipped = {"first": "second", "second": "first"}
    *others, last = conversation.turns
    steps, _, answer = last.text.partition(". Answer: ")
    one, _, two = steps.removeprefix("first: ").partition("; second: ")
    turns = (*others, last._replace(text=f"first: {two}; second: {one}. Answer: {flipped.get(answer, answer)}"))
    key = f"{conversation.key}:swapped"
    return conversation._replace(key=key, turns=turns, images=conversation.images[::-1])


def scene(seed: int, split: str, index: int) -> Scene:
    """The scene of caption `index`; as many of one thing as of two, three and four."""
    rng = drawing.generator(seed, "scenes:caption", split, index)
    return _scene(rng, split, lambda: _kinds(rng, _number(rng)))


def question(seed: int, split: str, index: int) -> Asked:
    """The scene, question and answer of question `index`."""
    rng = drawing.generator(seed, "scenes:question", split, index)
    ask = pick(rng, _QUESTIONS)
    return drawing.fitting(split, lambda: ask(rng), lambda asked: composition(asked.scenes[0]))


def dialogue(seed: int, split: str, index: int) -> list[Asked]:
    """One to three questions about one scene, none of them twice; it is drawn for the first, which is balanced.

    Half of the first ones count or compare colours, which take longest to learn.
    """
    rng = drawing.generator(seed, "scenes:dialogue", split, index)
    ask = pick(rng, (*_QUESTIONS, _count, _same))
    found = [drawing.fitting(split, lambda: ask(rng), lambda asked: composition(asked.scenes[0]))]
    scene = found[0].scenes[0]
    for about in rng.permutation(len(_ABOUT))[:ROUNDS].tolist():
        asked = _ABOUT[about](rng, scene)
        if asked is not None and asked.question not in [other.question for other in found]:
            found.append(asked)
    return found


def comparison(seed: int, split: str, index: int) -> Asked:
    """The two scenes, question and answer of comparison `index`."""
    rng = drawing.generator(seed, "scenes:compare", split, index)
    return pick(rng, (_more, _more, _only, _both))(rng, split)


def caption(scene: Scene) -> str:
    """Every thing and where it is, in reading order."""
    return ", ".join(map(_described, scene.things))


def _described(thing: Thing) -> str:
    return f"{drawing.named(thing.colour, thing.shape)} {_where(thing)}"


def _where(thing: Thing) -> str:
    return PLACES[thing.row][thing.column]


def composition(scene: Scene) -> str:
    """What is in the scene irrespective of jitter, which decides its split."""
    return ", ".join(f"{t.colour} {t.shape} {t.row}{t.column}" for t in scene.things)


def draw(scene: Scene, size: int) -> np.ndarray:
    """The picture, uint8 [S, S, 3]. Raises UserError for a size in which shapes could not be told apart."""
    image = drawing.canvas(size, scene.background)
    for thing in scene.things:
        drawing.stamp(image, thing.shape, thing.colour, scene.background, thing.centre, thing.radius)
    return image


def masks(scene: Scene, size: int) -> np.ndarray:
    """bool [O, S, S]: the pixels of `draw` of which each thing covers half or more."""
    found = np.zeros((len(scene.things), size, size), bool)
    for mask, thing in zip(found, scene.things, strict=True):
        there = drawing.shape_coverage(thing.shape, thing.radius * size) >= 0.5
        top, left = drawing.corner(thing.centre, thing.radius, size)
        mask[top : top + len(there), left : left + len(there)] = there
    return found


# Scenes


def _kinds(rng: np.random.Generator, number: int, without: Callable[[Kind], bool] = lambda kind: False) -> list[Kind]:
    """`number` kinds of thing, each as likely as another, but those that `without` is true of."""
    found: list[Kind] = []
    while len(found) < number:
        kind = pick(rng, KINDS)
        if not without(kind):
            found.append(kind)
    return found


def _number(rng: np.random.Generator, least: int = 1) -> int:
    return int(rng.integers(least, MOST + 1))


def _placed(rng: np.random.Generator, kinds: list[Kind]) -> Scene:
    """These kinds of things in cells drawn by lot."""
    cells = rng.permutation(9)[: len(kinds)].tolist()
    numbers = rng.random((len(kinds), 3)).tolist()
    things = []
    for cell, (colour, shape), (which, x, y) in sorted(zip(cells, kinds, numbers, strict=True)):
        row, column = divmod(cell, 3)
        radius = RADII[int(which * len(RADII))]
        room = 1 / 6 - radius - GAP
        centre = ((column + 0.5) / 3 + (2 * x - 1) * room, (row + 0.5) / 3 + (2 * y - 1) * room)
        things.append(Thing(colour, shape, row, column, centre, radius))
    return Scene(tuple(things), pick(rng, BACKGROUNDS))


def _scene(rng: np.random.Generator, split: str, kinds: Callable[[], list[Kind]]) -> Scene:
    """A scene of the split, of what `kinds` draws."""
    return drawing.fitting(split, lambda: _placed(rng, kinds()), composition)


# Questions about one scene. Each gives None where what was drawn does not allow it.


def _colour(rng: np.random.Generator) -> Asked | None:
    return _colour_of(rng, _placed(rng, _kinds(rng, _number(rng))))


def _colour_of(rng: np.random.Generator, scene: Scene) -> Asked | None:
    alone = _alone(scene, lambda thing: thing.shape)
    if not alone:
        return None
    thing = pick(rng, alone)
    return Asked("colour", (scene,), f"What colour is the {thing.shape}?", thing.colour)


def _shape(rng: np.random.Generator) -> Asked | None:
    return _shape_of(rng, _placed(rng, _kinds(rng, _number(rng))))


def _shape_of(rng: np.random.Generator, scene: Scene) -> Asked | None:
    alone = _alone(scene, lambda thing: thing.colour)
    if not alone:
        return None
    thing = pick(rng, alone)
    return Asked("shape", (scene,), f"What shape is the {thing.colour} thing?", thing.shape)


def _alone(scene: Scene, of: Callable[[Thing], Any]) -> list[Thing]:
    """The things that are the only ones of their sort."""
    counts = Counter(of(thing) for thing in scene.things)
    return [thing for thing in scene.things if counts[of(thing)] == 1]


def _count(rng: np.random.Generator) -> Asked:
    counted = _counted(rng)
    count = int(rng.integers(counted.least, MOST + 1))
    return _how_many(_placed(rng, counted.kinds(rng, count)), counted)


def _count_of(rng: np.random.Generator, scene: Scene) -> Asked:
    """Of what can be asked, each number is the answer as often as another."""
    numbers = {counted: _counting(scene, counted)[0] for counted in _EVERY_COUNTED}
    chosen = pick(rng, sorted(set(numbers.values())))
    return _how_many(scene, pick(rng, [counted for counted, number in numbers.items() if number == chosen]))


def _how_many(scene: Scene, counted: _Counted) -> Asked:
    count, steps = _counting(scene, counted)
    return Asked("count", (scene,), f"How many {counted.name} are there?", f"{steps}. Answer: {count}")


def _counting(scene: Scene, counted: _Counted) -> tuple[int, str]:
    """How many things match, and which, one after the other."""
    found = [thing for thing in scene.things if counted.matches((thing.colour, thing.shape))]
    steps = [f"{_described(thing)}: {number}" for number, thing in enumerate(found, 1)]
    return len(found), ", ".join(steps) or "none"


def _relation(
    rng: np.random.Generator, scene: Scene, kind: str, words: str, place: Callable[[Thing], int]
) -> Asked | None:
    """Whether one thing lies before another; which of the two is named first is drawn by lot, and so is the answer."""
    alone = _alone(scene, lambda thing: (thing.colour, thing.shape))
    pairs = [(a, b) for a in alone for b in alone if place(a) < place(b)]
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    answer = pick(rng, ("yes", "no"))
    if answer == "no":
        a, b = b, a
    one, two = (f"the {thing.colour} {thing.shape}" for thing in (a, b))
    steps = f"{one} is {_where(a)}, {two} is {_where(b)}"
    return Asked(kind, (scene,), f"Is {one} {words} {two}?", f"{steps}. Answer: {answer}")


def _related(rng: np.random.Generator, relation: Callable[[np.random.Generator, Scene], Asked | None]) -> Asked | None:
    return relation(rng, _placed(rng, _kinds(rng, _number(rng, 2))))


_RELATIONS = (
    functools.partial(_relation, kind="left", words="left of", place=lambda thing: thing.column),
    functools.partial(_relation, kind="right", words="right of", place=lambda thing: -thing.column),
    functools.partial(_relation, kind="above", words="above", place=lambda thing: thing.row),
)


def _same(rng: np.random.Generator) -> Asked:
    a, b = (SHAPES[k] for k in rng.permutation(len(SHAPES))[:2].tolist())
    first, second = (list(COLOURS)[k] for k in rng.permutation(len(COLOURS))[:2].tolist())
    answer = pick(rng, ("yes", "no"))
    others = _kinds(rng, _number(rng, 2) - 2, without=lambda kind: kind[1] in (a, b))
    scene = _placed(rng, [(first, a), (first if answer == "yes" else second, b), *others])
    return _compared(scene, *(next(thing for thing in scene.things if thing.shape == shape) for shape in (a, b)))


def _compared(scene: Scene, a: Thing, b: Thing) -> Asked:
    steps = f"the {a.shape} is {a.colour}, the {b.shape} is {b.colour}"
    answer = "yes" if a.colour == b.colour else "no"
    question = f"Are the {a.shape} and the {b.shape} the same colour?"
    return Asked("same", (scene,), question, f"{steps}. Answer: {answer}")


def _same_of(rng: np.random.Generator, scene: Scene) -> Asked | None:
    alone = _alone(scene, lambda thing: thing.shape)
    answer = pick(rng, ("yes", "no"))
    pairs = [(a, b) for a in alone for b in alone if a != b and (a.colour == b.colour) == (answer == "yes")]
    if not pairs:
        return None
    return _compared(scene, *pick(rng, pairs))


_QUESTIONS = (_colour, _shape, _count, *(functools.partial(_related, relation=r) for r in _RELATIONS), _same)
# The same about a scene that is there already
_ABOUT = (_colour_of, _shape_of, _count_of, *_RELATIONS, _same_of)


# What can be counted, and questions about two scenes


class _Counted(NamedTuple):
    name: str  # plural, or, of a kind, singular
    least: int  # smallest number that a scene can have
    matches: Callable[[Kind], bool]

    def kinds(self, rng: np.random.Generator, count: int) -> list[Kind]:
        """Kinds of things of which exactly `count` match."""
        found = _kinds(rng, count, without=lambda kind: not self.matches(kind))
        if self.least == 0:  # otherwise everything matches
            found += _kinds(rng, _number(rng, max(1, count)) - count, without=self.matches)
        return found


_THINGS = _Counted("things", 1, lambda kind: True)


def _of_colour(colour: str) -> _Counted:
    return _Counted(f"{colour} things", 0, lambda kind: kind[0] == colour)


def _of_shape(shape: str) -> _Counted:
    return _Counted(f"{shape} shapes", 0, lambda kind: kind[1] == shape)


def _of_kind(kind: Kind) -> _Counted:
    return _Counted(drawing.named(*kind), 0, lambda found: found == kind)


_EVERY_COUNTED = (_THINGS, *map(_of_colour, COLOURS), *map(_of_shape, SHAPES))


def _counted(rng: np.random.Generator) -> _Counted:
    """Things, things of a colour, or things of a shape."""
    colour, shape = pick(rng, tuple(COLOURS)), pick(rng, SHAPES)
    return pick(rng, (_THINGS, _of_colour(colour), _of_shape(shape)))


def _more(rng: np.random.Generator, split: str) -> Asked:
    counted = _counted(rng)
    counts = counted.least + rng.permutation(MOST + 1 - counted.least)[:2]  # two that differ, in an order by lot
    scenes = tuple(_scene(rng, split, lambda: counted.kinds(rng, count)) for count in counts.tolist())
    text = f"Which picture has more {counted.name}, the first or the second?"
    return _told("compare", scenes, counted, text, "first" if counts[0] > counts[1] else "second")


def _only(rng: np.random.Generator, split: str) -> Asked:
    (kind,) = _kinds(rng, 1)
    answer = pick(rng, ("first", "second"))
    scenes = tuple(_having(rng, split, kind, answer == which) for which in ("first", "second"))
    counted = _of_kind(kind)
    return _told("compare", scenes, counted, f"Which picture has {counted.name}, the first or the second?", answer)


def _both(rng: np.random.Generator, split: str) -> Asked:
    (kind,) = _kinds(rng, 1)
    answer, lacking = pick(rng, ("yes", "no")), pick(rng, (0, 1))
    scenes = tuple(_having(rng, split, kind, answer == "yes" or which != lacking) for which in (0, 1))
    counted = _of_kind(kind)
    return _told("both", scenes, counted, f"Is there {counted.name} in both pictures?", answer)


def _told(kind: str, scenes: tuple[Scene, ...], counted: _Counted, text: str, answer: str) -> Asked:
    """A question about two scenes, with what matches in each before the answer."""
    one, two = (_counting(scene, counted)[1] for scene in scenes)
    return Asked(kind, scenes, text, f"first: {one}; second: {two}. Answer: {answer}")


def _having(rng: np.random.Generator, split: str, kind: Kind, there: bool) -> Scene:
    """A scene with one thing of this kind, or with none."""
    return _scene(rng, split, lambda: [kind] * there + _kinds(rng, _number(rng) - there, without=lambda k: k == kind))
