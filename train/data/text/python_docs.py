"""The corpus that is on every machine with Python: the reference manual and the standard library.

Two kinds of text: the topics of `help()` (`pydoc_data.topics`), and every module of the standard library, once as its
docstrings and once as its code with those docstrings taken out, so that nothing occurs twice. CPython's licence (PSF).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import os
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Tests, applications, other people's packages, and pydoc_data because its topics are read apart.
EXCLUDED_FOLDERS = {
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),
    *("site-packages", "dist-packages", "__pycache__", "lib-dynload"),
    "encodings",  # character tables written by a program: neither English nor code that anyone wrote
}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")  # generated when Python was built, different on every machine


def texts(counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yields (split key, text) in a fixed order; a module's docstrings and its code share one key.

    Files that do not parse are skipped and counted in `counts["unparsed_files"]`.
    """
    for name, text in _topics():
        yield f"topics/{name}", text
    for key, path in _modules():
        module = key.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        try:
            docstrings, code = split_docstrings(path.read_text(encoding="utf-8"), module)
        except (SyntaxError, ValueError):  # ValueError covers UnicodeDecodeError and null bytes
            counts["unparsed_files"] += 1
            continue
        yield from ((key, text) for text in (docstrings, code) if text.strip())


def digest() -> str:
    """A hash of the Python version and of everything that `texts` reads, without parsing it."""
    content = hashlib.blake2b(sys.version.encode(), digest_size=16)
    for name, text in _topics():
        content.update(f"{name}\0{text}\0".encode())
    for key, path in _modules():
        content.update(key.encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return []
    return sorted(topics.items())


def _modules() -> list[tuple[str, Path]]:
    """The standard library's files as (path relative to the library, path), ordered by the former."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in EXCLUDED_FOLDERS and not f.startswith(EXCLUDED_PREFIXES)]
        for file in files:
            if file.endswith(".py") and not file.startswith(EXCLUDED_PREFIXES):
                path = Path(folder, file)
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


def split_docstrings(source: str, module: str) -> tuple[str, str]:
    """Splits a module into its docstrings, each under the qualified name of what it describes, and its other code.

    The code stays valid: a body that was only a docstring becomes `pass`. A docstring that shares a line with code
    stays in the code. Raises SyntaxError or ValueError where `source` does not parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(source)
    lines = list(io.StringIO(source))  # str.splitlines would also cut at form feeds, which ast does not count
    sections = []
    for name, node in _definitions(tree, module):
        docstring = ast.get_docstring(node, clean=False)
        if docstring is None:
            continue
        expression = node.body[0]
        first, last = expression.lineno - 1, expression.end_lineno
        # ast counts columns in bytes
        before = lines[first].encode()[: expression.col_offset].decode()
        after = lines[last - 1].encode()[expression.end_col_offset :].decode()
        if before.strip() or after.strip():
            continue
        sections.append(f"{name}\n\n{inspect.cleandoc(docstring)}\n")
        body_is_docstring = len(node.body) == 1 and not isinstance(node, ast.Module)
        lines[first:last] = [f"{before}pass\n" if body_is_docstring else ""] + [""] * (last - first - 1)
    return "\n\n".join(sections), "".join(lines)


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """Yields the module, its classes and its functions with their qualified names, in the order of the source."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _definitions(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from _definitions(child, name)
