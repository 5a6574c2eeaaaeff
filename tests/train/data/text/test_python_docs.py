"""The embedded corpus: nothing twice, nothing lost, always the same."""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from train.data.text import python_docs


@pytest.fixture(scope="module")
def corpus() -> list[tuple[str, str]]:
    return list(python_docs.texts(Counter()))


def test_has_topics_docstrings_and_code(corpus):
    keys = Counter(key for key, _ in corpus)
    assert keys["topics/if"] == 1
    assert keys["json/decoder.py"] == 2  # docstrings and code, one split key
    assert not any(key.startswith(("test/", "idlelib/", "site-packages/", "pydoc_data/")) for key in keys)
    assert not any("/test/" in key or "/tests/" in key for key in keys)


def test_order_is_sorted_by_key(corpus):
    modules = [key for key, _ in corpus if not key.startswith("topics/")]
    assert modules == sorted(modules)
    assert all(text.strip() for _, text in corpus)


def test_a_docstring_is_in_one_document_only(corpus):
    docstrings, code = (text for key, text in corpus if key == "textwrap.py")
    assert docstrings.startswith("textwrap\n\nText wrapping and filling.")
    sentence = "Reformat the single paragraph in 'text' to fit in lines of no"
    assert sentence in docstrings
    assert sentence not in code
    assert "textwrap.TextWrapper.fill\n" in docstrings


def test_library_code_stays_valid_and_differs_only_by_docstrings(corpus):
    for key in ("dataclasses.py", "typing.py", "asyncio/base_events.py", "turtle.py", "collections/__init__.py"):
        code = [text for k, text in corpus if k == key][-1]
        source = (Path(sysconfig.get_path("stdlib")) / key).read_text(encoding="utf-8")
        assert ast.dump(_without_docstrings(source)) == ast.dump(_without_docstrings(code)), key
        assert not _docstrings(code), key


def _without_docstrings(source: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node) is not None:
                del node.body[0]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]
    return tree


def _docstrings(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def test_split_docstrings_by_hand():
    source = textwrap.dedent('''\
        """About the module."""
        import os  # kept

        class Empty(Exception):
            """Only
               words: naïve."""

        def one_line(): "stays"; return 1

        if True:
            async def inner(x):
                "Short."
                text = "\f form feed"
                return x
        ''')
    docstrings, code = python_docs.split_docstrings(source, "package.module")
    assert docstrings == (
        "package.module\n\nAbout the module.\n"
        "\n\npackage.module.Empty\n\nOnly\nwords: naïve.\n"
        "\n\npackage.module.inner\n\nShort.\n"
    )
    assert code == textwrap.dedent("""\
        import os  # kept

        class Empty(Exception):
            pass

        def one_line(): "stays"; return 1

        if True:
            async def inner(x):
                text = "\f form feed"
                return x
        """)


def test_files_that_do_not_parse_are_counted(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "old.py").write_text("print 'python 2'\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text("x = 2\n")
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(python_docs, "_topics", list)
    before = python_docs.digest()
    counts = Counter()
    assert list(python_docs.texts(counts)) == [("good.py", "x = 1\n")]
    assert counts == {"unparsed_files": 2}
    (tmp_path / "good.py").write_text("x = 3\n")
    assert python_docs.digest() != before
