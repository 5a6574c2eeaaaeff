"""The rules of the house: who imports whom, what every file begins with, how fast the entry points answer."""

from __future__ import annotations

import ast
import functools
import graphlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("configs", "model", "serve", "tpu", "train")
MAY_IMPORT = {
    "tpu": {"tpu"},
    "model": {"model", "tpu"},
    "train": {"train", "model", "tpu"},
    "serve": {"serve", "train", "model", "tpu"},
}
CONFIGS_MAY_IMPORT = {
    "model.config",
    "train.config",
    "tpu.errors",
    "__future__",
    "dataclasses",
    "itertools",
    "math",
}
# The rooms of commands that work on whole experiments: they may import train, and nothing imports them.
ROOF = ("tpu.compile", "tpu.plan", "tpu.launch", "model.hub")


class Import(NamedTuple):
    """One import statement: of a file of ours ("train.losses.cross_entropy"), or of somebody else's package ("jax")."""

    target: str
    when: str  # "start": with the file; "later": inside a function; "types": for type checkers only


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every file of the house by its dotted name; a room that is a command (`__main__`) has its docstring there."""
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) if path.name != "__init__.py"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return {name: ast.parse(path.read_text()) for name, path in zip(names, files, strict=True)}


@functools.cache
def imports(module: str) -> tuple[Import, ...]:
    return tuple(_imports(modules()[module], "start"))


def _imports(node: ast.AST, when: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(_target(alias.name), when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (Import(_target(f"{child.module}.{alias.name}"), when) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from _imports(ast.Module(child.body, []), "types")
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, "later" if inside and when == "start" else when)


def _target(name: str) -> str:
    """The file that `name` (a module, or something in one) comes from; of other people's only the package."""
    if name.split(".")[0] not in ROOMS:
        return name.split(".")[0]
    return name if name in modules() else name.rpartition(".")[0]


def room(module: str) -> str:
    return module.split(".")[0]


def ours(module: str, *when: str) -> set[str]:
    return {i.target for i in imports(module) if room(i.target) in ROOMS and i.when in when}


def under_the_roof(module: str) -> bool:
    return module.startswith(tuple(f"{name}." for name in ROOF))


def entry_points() -> list[str]:
    """The files that are commands."""
    return [name for name, tree in modules().items() if "entry.run(main)" in ast.unparse(tree)]


# Who imports whom


@pytest.mark.parametrize("module", [m for m in modules() if room(m) != "configs"])
def test_a_floor_imports_only_floors_below(module):
    allowed = {"tpu", "model", "train"} if under_the_roof(module) else MAY_IMPORT[room(module)]
    imported = ours(module, "start", "later", "types")
    assert {target for target in imported if room(target) not in allowed} == set()
    assert under_the_roof(module) or not any(map(under_the_roof, imported))


@pytest.mark.parametrize("module", [m for m in modules() if room(m) == "configs"])
def test_configs_are_pure_data(module):
    assert {i.target for i in imports(module)} <= CONFIGS_MAY_IMPORT


def test_no_circles():
    graph = {module: ours(module, "start", "later", "types") for module in modules()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(modules())


def test_the_readings_above_find_what_they_look_for():
    assert Import("train.config", "start") in imports("configs.gpt2")
    assert Import("train.budget.summary", "later") in imports("train.pretrain")
    assert Import("train.adapter.frozen", "types") in imports("train.pretrain")
    assert Import("model.attention.cache", "start") in imports("model.attention.self_attention")
    assert Import("jax", "start") in imports("model.positions.rope")
    assert {"train.pretrain", "train.evaluate.__main__"} <= set(entry_points())


def at_start(module: str) -> set[str]:
    """Everything that importing `module` imports, as far as our own files go."""
    found, waiting = set(), [module]
    while waiting:
        new = {i.target for i in imports(waiting.pop()) if i.when == "start"} - found
        found |= new
        waiting += [target for target in new if target in modules()]
    return found


@pytest.mark.parametrize(
    "module", [m for m in modules() if m.startswith(("train.data", "configs"))] + entry_points() + ["train.config"]
)
def test_starts_without_jax(module):
    assert not at_start(module) & {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "torch"}


def test_the_model_starts_without_the_rest():
    unwanted = ("train", "serve", "grain", "tensorflow_datasets")
    code = f"import sys, model.transformer; print([m for m in {unwanted} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_nothing_imports_torch_tensorflow_or_pandas():
    assert {i.target for m in modules() for i in imports(m)} & {"torch", "tensorflow", "pandas"} == set()


# What is in a file


def documented(tree: ast.Module) -> list[tuple[str, str | None]]:
    """Public functions and classes of a file, and public methods of these classes, with their docstrings."""
    found = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            found.append((node.name, ast.get_docstring(node)))
            if isinstance(node, ast.ClassDef):
                methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
                found += [(f"{node.name}.{method.name}", ast.get_docstring(method)) for method in methods]
    return found


@pytest.mark.parametrize("module", modules())
def test_everything_public_says_what_it_is(module):
    assert ast.get_docstring(modules()[module])
    assert [name for name, text in documented(modules()[module]) if not text] == []


def test_packages_hold_no_code():
    packages = [path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("__init__.py")]
    assert len(packages) >= len(ROOMS)
    for path in packages:
        body = ast.parse(path.read_text()).body
        assert [type(node) for node in body] == [ast.Expr], path
        assert isinstance(body[0].value.value, str), path


NAMES_AXES = {"P", "PartitionSpec", "NamedSharding", "Mesh", "make_mesh", "shard_map", "axis_index", "axis_size"}
NAMES_AXES |= {"psum", "pmean", "pmax", "pmin", "ppermute", "pcast", "all_gather", "all_to_all", "psum_scatter"}


@pytest.mark.parametrize("module", [m for m in modules() if m not in ("tpu.rules", "tpu.mesh")])
def test_mesh_axes_are_named_in_one_table(module):
    named = [
        ast.unparse(call)
        for call in ast.walk(modules()[module])
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in NAMES_AXES
        for argument in (*call.args, *(k.value for k in call.keywords))
        if any(isinstance(node, ast.Constant) and isinstance(node.value, str) for node in ast.walk(argument))
    ]
    assert named == []


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")])
def test_ruff(arguments):
    ruff = shutil.which("ruff", path=Path(sys.executable).parent) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run([ruff, *arguments, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# How entry points answer


@pytest.mark.parametrize("module", entry_points())
def test_help_imports_nothing_heavy(module):
    command = [sys.executable, "-X", "importtime", "-m", module.removesuffix(".__main__"), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert ast.get_docstring(modules()[module]).splitlines()[0] in done.stdout
    assert "--" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "absl" in imported
    assert not imported & {"jax", "flax", "grain", "optax"}


@pytest.mark.slow
@pytest.mark.parametrize("module", entry_points())
def test_help_takes_less_than_a_second_of_a_processor(module):
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", module.removesuffix(".__main__"), "--help"]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1


def test_text_files_are_read_and_written_as_utf8():
    """Whatever the locale: a call that leaves the encoding open would follow it."""
    found = []
    for package in ("model", "serve", "tpu", "train"):
        for path in (ROOT / package).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                texts = isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("read_text", "write_text")
                if texts and all(keyword.arg != "encoding" for keyword in call.keywords):
                    found.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert found == []
