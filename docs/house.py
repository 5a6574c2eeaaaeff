"""Surveys the house and draws its rooms: files, floors, arrows, circles, longest function; writes docs/rooms.svg.

    python docs/house.py [--root=CHECKOUT] [--lines] [--svg=docs/rooms.svg]

A room is a folder, or a file that lies at the top of a floor. An arrow says that a file of one room imports one of
another, imports for type checkers included. A room stands on the floor above the highest room that it imports. --lines
also counts the lines of ours that run, each once, from the experiment of configs/quickstart.py to its traced step:
resolving it, placing it, making its program, drawing a batch, tracing `init` and `step`. --root surveys another
checkout with this file, so that before and after are measured alike.
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import html
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

FLOORS = ("configs", "serve", "train", "model", "tpu")  # from the top down
BOX, GAP, WIDTH = (132, 34), 10, 1180  # of the picture, in pixels
TINTS = {"configs": "#f3e9d8", "serve": "#e5eef8", "train": "#e6f3e4", "model": "#fbf3d0", "tpu": "#f6e3e3"}


def read(root: pathlib.Path) -> dict[str, ast.Module]:
    """Every file of the five packages by its dotted name, without the `__init__.py`."""
    files = [path for floor in FLOORS for path in sorted((root / floor).rglob("*.py")) if path.name != "__init__.py"]
    return {".".join(path.relative_to(root).with_suffix("").parts): ast.parse(path.read_text()) for path in files}


def imports(module: str, modules: dict[str, ast.Module]) -> set[str]:
    """The files of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(modules[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & modules.keys() - {module}


def room_of(module: str) -> str:
    """The room of a file: its folder, or itself where it lies at the top of a floor."""
    parts = module.split(".")
    return module if len(parts) == 2 else ".".join(parts[:2])


def rooms(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """For every room the rooms that it imports."""
    found: dict[str, set[str]] = {room_of(module): set() for module in modules}
    for module in modules:
        found[room_of(module)] |= {room_of(target) for target in imports(module, modules)} - {room_of(module)}
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The groups of more than one that reach each other."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {frozenset({name, *(other for other in reach[name] if name in reach[other])}) for name in graph}
    return sorted(({*group} for group in groups if len(group) > 1), key=sorted)


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """For every room how many others stand below it on the longest way down; those of a circle stand together."""
    merged = {name: name for name in graph}
    for group in circles(graph):
        merged |= dict.fromkeys(group, min(group))
    joined: dict[str, set[str]] = {}
    for name, targets in graph.items():
        joined.setdefault(merged[name], set()).update({merged[target] for target in targets} - {merged[name]})
    level: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(joined).static_order():
        level[name] = max((level[target] + 1 for target in joined[name]), default=0)
    return {name: level[merged[name]] for name in graph}


def within(floor: str, graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The rooms of a floor with their arrows to each other."""
    names = {name for name in graph if name.split(".")[0] == floor}
    return {name: graph[name] & names for name in names}


def functions(modules: dict[str, ast.Module]) -> Iterator[tuple[int, str]]:
    """Every function's length in lines, with its name."""
    for module, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.end_lineno - node.lineno + 1, f"{module}.{node.name}"


def survey(root: pathlib.Path) -> dict[str, Any]:
    """The figures of a checkout, without those of running it."""
    modules = read(root)
    graph = rooms(modules)
    lengths = {module: len((root / (module.replace(".", "/") + ".py")).read_text().splitlines()) for module in modules}
    folders: dict[str, int] = {}
    for module in modules:
        folders[module.rpartition(".")[0]] = folders.get(module.rpartition(".")[0], 0) + 1
    figures: dict[str, Any] = {"files": len(modules), "lines": sum(lengths.values())}
    for floor in ("model", "train", "tpu"):
        inside = within(floor, graph)
        figures[f"{floor}/: rooms"] = len(inside)
        figures[f"{floor}/: floors"] = max(levels(inside).values()) + 1
        figures[f"{floor}/: arrows"] = sum(map(len, inside.values()))
    figures["circles of files"] = len(circles({module: imports(module, modules) for module in modules}))
    figures["longest file"] = max((lines, module) for module, lines in lengths.items())
    figures["longest function"] = max(functions(modules))
    figures["functions over 80 lines"] = sum(lines > 80 for lines, _ in functions(modules))
    figures["largest room"] = max((n, folder) for folder, n in folders.items() if folder != "model.families")
    return figures


def lines_of_a_step(root: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Lines of ours that run once or more on the way of one dense step, and the files that they are in."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(root))
    import jax

    from configs.quickstart import get_config
    from tpu.mesh import make_mesh
    from train import benchmark

    try:
        from train.program import make_program
    except ImportError:  # a checkout from before this file, whose steps have frozen weights only where there are some
        from train.step import make_program

        frozen = ()
    else:
        frozen = ({},)
    try:
        from train.resolve import resolve
    except ImportError:  # a checkout from before this file
        resolve = lambda experiment: experiment.resolved()  # noqa: E731
    figures: dict[str, tuple[int, int]] = {}
    seen: set[tuple[str, int]] = set()
    ours = tuple(f"{root / floor}{os.sep}" for floor in FLOORS)

    def counted(name: str, call: Callable[[], Any]) -> Any:
        own: set[tuple[str, int]] = set()

        def line(frame: Any, event: str, _: Any) -> Any:
            if event == "line":
                own.add((frame.f_code.co_filename, frame.f_lineno))
            return line

        sys.settrace(lambda frame, *_: line if frame.f_code.co_filename.startswith(ours) else None)
        try:
            return call()
        finally:
            sys.settrace(None)
            seen.update(own)
            figures[name] = len(own), len({file for file, _ in own})

    experiment = counted("resolve", lambda: resolve(get_config()))
    experiment.model = counted("place", lambda: experiment.model.placed("cpu", "float32"))
    with jax.set_mesh(mesh := make_mesh(experiment.mesh, jax.devices()[:1])):
        program = counted("make the program", lambda: make_program(experiment, mesh))
        batch = counted("draw a batch", lambda: benchmark.drawn_batch(experiment))
        counted("trace init", lambda: program.init.lower(jax.random.key(0), *frozen))
        counted("trace the step", lambda: program.step.lower(program.abstract_state, batch, *frozen))
    return figures | {"all": (len(seen), len({file for file, _ in seen}))}


def drawn(root: pathlib.Path) -> str:
    """The rooms as an SVG: a band for each package, a row in it for each floor, a box for each room."""
    modules = read(root)
    graph = rooms(modules)
    files = {name: sum(room_of(module) == name for module in modules) for name in graph}
    place: dict[str, tuple[float, float]] = {}
    bands, y = [], 30.0
    for floor in FLOORS:
        inside = within(floor, graph)
        level, top = levels(inside), y
        y += 12
        for height in sorted(set(level.values()), reverse=True):
            row = sorted(name for name in inside if level[name] == height)
            across = (WIDTH - 110) // (BOX[0] + GAP)
            for start in range(0, len(row), across):
                part = row[start : start + across]
                left = 96 + (across - len(part)) * (BOX[0] + GAP) / 2  # centred, so that lines stay apart
                for i, name in enumerate(part):
                    place[name] = left + i * (BOX[0] + GAP), y
                y += BOX[1] + GAP
        bands.append((floor, top, y - top))
        y += 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{y:.0f}" fill="#ffffff"/>',
        '<text x="16" y="20" font-size="13">A package stands on those below it; a room on those that it imports.'
        " A line is an import inside a package; bold: a folder, with its number of files.</text>",
    ]
    for floor, top, height in bands:
        parts.append(f'<rect x="8" y="{top}" width="{WIDTH - 16}" height="{height}" rx="8" fill="{TINTS[floor]}"/>')
        parts.append(f'<text x="18" y="{top + 24}" font-size="16" font-weight="bold">{floor}/</text>')
    for name, targets in sorted(graph.items()):
        x, top = place[name]
        for target in sorted(t for t in targets if t.split(".")[0] == name.split(".")[0]):
            to_x, to_y = place[target]
            ends = f"{x + BOX[0] / 2} {top + BOX[1]} L {to_x + BOX[0] / 2} {to_y}"
            parts.append(f'<path d="M {ends}" stroke="#777" stroke-opacity="0.35" fill="none"/>')
    for name, (x, top) in sorted(place.items()):
        folder = any(module.startswith(f"{name}.") for module in modules)
        label = html.escape(name.split(".", 1)[1]) + (f"/ ({files[name]})" if folder else ".py")
        weight = ' font-weight="bold"' if folder else ""
        parts.append(f'<rect x="{x}" y="{top}" width="{BOX[0]}" height="{BOX[1]}" rx="4" fill="#fff" stroke="#888"/>')
        parts.append(f'<text x="{x + 6}" y="{top + 21}" font-size="11"{weight}>{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Prints the survey; writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = pathlib.Path(__file__).resolve().parents[1]
    parser.add_argument("--root", type=pathlib.Path, default=here, help="the checkout to survey; default: this one")
    parser.add_argument("--lines", action="store_true", help="also count the lines that one dense step runs")
    parser.add_argument("--svg", type=pathlib.Path, help="write the picture of the rooms to this file")
    options = parser.parse_args()
    root = options.root.resolve()
    for name, value in survey(root).items():
        print(f"{name:28}{value if isinstance(value, int) else f'{value[0]}  {value[1]}'}")
    if options.svg:
        options.svg.write_text(drawn(root))
    if options.lines:
        for name, (lines, files) in lines_of_a_step(root).items():
            print(f"lines run, {name:17}{lines} in {files} files")


if __name__ == "__main__":
    main()
