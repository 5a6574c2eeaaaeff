"""Bar, line and pie charts of three to five categories, to be read off and calculated with.

Categories are A, B, C, ..., each with its letter and its colour. Bars and lines show 1 to 9, with a line across the
chart for each number; pies show tenths, with a tick for each at the rim, and are read as percent. Questions are
answered step by step, and the reply ends with "Answer: ...". A composition is the kind of chart and its values.

Legend: S side of a picture in pixels; C categories.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np

from tpu.errors import UserError
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.made import drawing
from train.data.made.drawing import BACKGROUNDS, COLOURS, INK, LEGIBLE, RGB, paint, pick, span_coverage, text_coverage

TASKS = ("caption", "question")
REQUESTS = ("describe", "Read the chart.", "What does the chart show?")
KINDS = ("bar", "line", "pie")
NAMES = "ABCDE"
COLOUR_OF = dict(zip(NAMES, ("red", "green", "blue", "yellow", "purple"), strict=True))
FEWEST, MOST = 3, 5  # categories
LARGEST = 9  # value of bars and lines
TENTHS = 10  # of a pie
QUESTIONS = ("value", "highest", "lowest", "difference", "sum")
# The answers that are asked for equally often, so that none can be guessed: of bars and lines, and of pies.
ANSWERS = {
    "value": (range(1, LARGEST + 1), range(1, 5)),
    "difference": (range(1, 7), range(1, 5)),
    "sum": (range(4, 17), range(2, 8)),
}

# Where things are, in pixels of a picture of 64.
UNIT = 64.0
AXIS, BASE, STEP = 9.0, 54.0, 5.0  # the axes' x and y, and what one more is upwards
CENTRE, RADIUS, LETTERS, TICK = 32.0, 27.0, 18.0, 30.5  # of a pie: middle, rim, where letters are, ends of ticks
GRIDS: tuple[RGB, RGB] = ((178, 182, 190), (218, 221, 226))  # lines of even values, which have their number, and of odd


class Chart(NamedTuple):
    """Values of A, B, C, ...; of a pie in tenths that add up to ten.

    `look` in [0, 1) is jitter: how wide the bars are, or by how many tenths a pie is turned.
    """

    kind: str
    values: tuple[int, ...]
    background: RGB
    look: float


class Asked(NamedTuple):
    """A question about a chart, and what is to be said: the steps, then "Answer: ..."."""

    kind: str
    chart: Chart
    question: str
    answer: str


def make(task: str, seed: int, split: str, index: int, size: int = 64) -> Conversation:
    """Record `index` of "caption" or "question", its image uint8 [S, S, 3].

    Raises UserError for another task or split, and for a size in which a chart could not be read.
    """
    if task == "caption":
        found = chart(seed, split, index)
        asked = Asked("caption", found, REQUESTS[index % len(REQUESTS)], caption(found))
    elif task == "question":
        asked = question(seed, split, index)
    else:
        raise UserError(f"task={task!r}: charts have no such task; valid: {', '.join(TASKS)}")
    turns = (Turn("user", IMAGE + asked.question), Turn("assistant", asked.answer))
    return Conversation(f"charts:{task}:{split}:{seed}:{index}", turns, (draw(asked.chart, size),), kind=asked.kind)


def chart(seed: int, split: str, index: int) -> Chart:
    """The chart of caption `index`; kinds and numbers of categories are equally likely."""
    rng = drawing.generator(seed, "charts:caption", split, index)
    return drawing.fitting(split, lambda: _drawn(rng), composition)


def question(seed: int, split: str, index: int) -> Asked:
    """The chart, question and answer of question `index`."""
    rng = drawing.generator(seed, "charts:question", split, index)
    kind, of = pick(rng, QUESTIONS), pick(rng, KINDS)
    wanted = pick(rng, ANSWERS[kind][of == "pie"]) if kind in ANSWERS else None
    return drawing.fitting(split, lambda: _asked(rng, kind, of, wanted), lambda asked: composition(asked.chart))


def composition(chart: Chart) -> str:
    """What the chart shows, which decides its split."""
    return f"{chart.kind} {chart.values}"


def said(chart: Chart, value: int) -> str:
    """A value as it is read off: "3", of a pie "30%"."""
    return f"{value * 100 // TENTHS}%" if chart.kind == "pie" else str(value)


def caption(chart: Chart) -> str:
    """All values: "A 3, B 7, C 5"."""
    return ", ".join(f"{name} {said(chart, value)}" for name, value in zip(NAMES, chart.values, strict=False))


def _drawn(rng: np.random.Generator, kind: str = "") -> Chart:
    kind, number = kind or pick(rng, KINDS), int(rng.integers(FEWEST, MOST + 1))
    if kind == "pie":
        cuts = np.sort(rng.permutation(TENTHS - 1)[: number - 1]) + 1
        values = np.diff(cuts, prepend=0, append=TENTHS)
    else:
        values = rng.integers(1, LARGEST + 1, number)
    return Chart(kind, tuple(values.tolist()), pick(rng, BACKGROUNDS), rng.random())


def _asked(rng: np.random.Generator, kind: str, of: str, wanted: int | None) -> Asked | None:
    """A question of this kind with the wanted answer, or None where the chart drawn has none."""
    chart = _drawn(rng, of)
    if kind in ("highest", "lowest"):
        extreme = (max if kind == "highest" else min)(chart.values)
        if chart.values.count(extreme) > 1:
            return None
        name = NAMES[chart.values.index(extreme)]
        return Asked(kind, chart, f"Which is the {kind}?", f"{caption(chart)}, {name} is the {kind}. Answer: {name}")
    b, c = rng.permutation(len(chart.values))[:2].tolist()
    result = {"value": chart.values[b], "difference": chart.values[b] - chart.values[c]}
    result["sum"] = chart.values[b] + chart.values[c]
    if result[kind] != wanted:
        return None
    first, second, total = (said(chart, value) for value in (chart.values[b], chart.values[c], wanted))
    if kind == "value":
        return Asked(kind, chart, f"What is {NAMES[b]}?", f"{NAMES[b]} is {first}. Answer: {total}")
    sign, words = (
        ("-", "How much more is {} than {}?") if kind == "difference" else ("+", "What are {} and {} together?")
    )
    steps = f"{NAMES[b]} is {first}, {NAMES[c]} is {second}, {first} {sign} {second} = {total}. Answer: {total}"
    return Asked(kind, chart, words.format(NAMES[b], NAMES[c]), steps)


# Drawing


def draw(chart: Chart, size: int) -> np.ndarray:
    """The picture, uint8 [S, S, 3]. Raises UserError for a size in which it could not be read."""
    if chart.kind == "pie":
        image = drawing.canvas(size, chart.background, LEGIBLE).astype(np.float32)
        _pie(image, chart)
    else:
        image = _axes(size, chart.background, len(chart.values)).copy()
        (_bars if chart.kind == "bar" else _line)(image, chart)
    return np.rint(image).astype(np.uint8)


@functools.lru_cache(64)
def _axes(size: int, background: RGB, number: int) -> np.ndarray:
    """An empty chart for bars or a line, float32 [S, S, 3]: grid, axes, numbers and letters."""
    image = drawing.canvas(size, background, LEGIBLE).astype(np.float32)
    for value in range(1, LARGEST + 1):
        _rectangle(image, AXIS, BASE - value * STEP, UNIT, BASE - value * STEP + 1, GRIDS[value % 2])
        if value % 2 == 0:
            _text(image, str(value), 4.5, BASE - value * STEP + 0.5, INK)
    _rectangle(image, AXIS - 1, 4, AXIS, BASE + 1, INK)
    _rectangle(image, AXIS - 1, BASE, UNIT, BASE + 1, INK)
    for name, x in zip(NAMES, _places(number), strict=False):
        _text(image, name, x, 59.5, INK)
    return image


def _places(number: int) -> list[float]:
    """Where the middles of `number` categories lie from left to right, on halves of a pixel of 64."""
    room = (UNIT - AXIS) / number
    return [int(AXIS + room * (k + 0.5)) + 0.5 for k in range(number)]


def _bars(image: np.ndarray, chart: Chart) -> None:
    half = (0.28 + 0.14 * chart.look) * (UNIT - AXIS) / len(chart.values)
    for name, value, x in zip(NAMES, chart.values, _places(len(chart.values)), strict=False):
        _rectangle(image, x - half, BASE - value * STEP, x + half, BASE, COLOURS[COLOUR_OF[name]])


def _line(image: np.ndarray, chart: Chart) -> None:
    size = len(image)
    points = [(x, BASE + 0.5 - value * STEP) for x, value in zip(_places(len(chart.values)), chart.values, strict=True)]
    for start, stop in itertools.pairwise(points):
        paint(image, _segment(size, start, stop, 0.9), INK)
    for name, point in zip(NAMES, points, strict=False):
        paint(image, _segment(size, point, point, 3.2), COLOURS[COLOUR_OF[name]])


def _pie(image: np.ndarray, chart: Chart) -> None:
    size, turn = len(image), int(chart.look * TENTHS)
    tenths = np.repeat(np.arange(len(chart.values)), chart.values)
    colours = np.array([COLOURS[COLOUR_OF[NAMES[k]]] for k in tenths], np.float32)  # [10, 3], as they are at the rim
    slices, ticks = _tenths(size)
    paint(image, ticks, INK)
    image += slices @ np.roll(colours, turn, 0) - slices.sum(-1, keepdims=True) * image
    ends = np.cumsum((0, *chart.values))
    for name, start, stop in zip(NAMES, ends, ends[1:], strict=False):
        angle = 2 * np.pi * (turn + (start + stop) / 2) / TENTHS
        x, y = (int(CENTRE + LETTERS * part) + 0.5 for part in (np.sin(angle), -np.cos(angle)))
        _text(image, name, x, y, (255, 255, 255) if name != "D" else INK)


@functools.lru_cache(8)
def _tenths(size: int) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel each tenth of a pie covers, float32 [S, S, 10], clockwise from the top; ticks [S, S]."""
    fine = 6
    samples = (np.arange(size * fine) + 0.5) / fine * UNIT / size - CENTRE
    x, y = samples[None, :], samples[:, None]
    tenth = (np.arctan2(x, -y) / (2 * np.pi) * TENTHS % TENTHS).astype(int)
    each = (tenth[..., None] == np.arange(TENTHS)) & (x**2 + y**2 < RADIUS**2)[..., None]
    slices = each.reshape(size, fine, size, fine, TENTHS).mean((1, 3), dtype=np.float32)
    ticks = np.zeros((size, size), np.float32)
    for angle in 2 * np.pi * np.arange(TENTHS) / TENTHS:
        ends = [(CENTRE + r * np.sin(angle), CENTRE - r * np.cos(angle)) for r in (RADIUS, TICK)]
        ticks = np.maximum(ticks, _segment(size, *ends, 0.6))
    return slices, ticks


def _rectangle(image: np.ndarray, left: float, top: float, right: float, bottom: float, colour: RGB) -> None:
    size = len(image)
    scale = size / UNIT
    across = span_coverage(size, left * scale, right * scale)
    paint(image, span_coverage(size, top * scale, bottom * scale)[:, None] * across, colour)


def _segment(size: int, start: tuple[float, float], stop: tuple[float, float], half_width: float) -> np.ndarray:
    """Coverage [S, S] of a line with round ends from (x, y) to (x, y)."""
    middles = (np.arange(size, dtype=np.float32) + 0.5) * (UNIT / size)
    x, y = middles[None, :] - start[0], middles[:, None] - start[1]
    dx, dy = stop[0] - start[0], stop[1] - start[1]
    along = np.clip((x * dx + y * dy) / max(dx**2 + dy**2, 1e-6), 0, 1)
    distance = np.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2)
    return np.clip((half_width - distance) * (size / UNIT) + 0.5, 0, 1)


def _text(image: np.ndarray, text: str, x: float, y: float, colour: RGB) -> None:
    """A text around (x, y)."""
    scale = len(image) / UNIT
    left, top = (x - drawing.text_width(text) / 2) * scale, (y - 3.5) * scale
    paint(image, text_coverage(text, len(image), left, top, scale), colour)
