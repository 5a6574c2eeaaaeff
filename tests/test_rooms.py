"""The rooms stay small, and things are found by their names: nothing here opens a file to find another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("configs", "model", "serve", "tpu", "train")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py")

# What somebody looks for: the words that they would look for in the tree's names, and the one file that has them.
WHERE_IS = {
    "the attention whose keys travel around a ring of devices": ("ring attention", "model/attention/ring_attention.py"),
    "the rotation of queries and keys by their positions": ("positions rope", "model/positions/rope.py"),
    "LoRA": ("lora", "model/adapters/lora.py"),
    "the encoder that cuts images into patches": ("vision vit", "model/vision/vit.py"),
    "the prediction of the next token, as an objective": ("objectives next token", "train/objectives/next_token.py"),
    "the cross-entropy that never holds all logits": ("cross entropy", "train/losses/cross_entropy.py"),
    "the digests by which a damaged checkpoint is found": ("checkpoint manifest", "train/checkpoint/manifest.py"),
    "the learning rate's course": ("schedule", "train/optimize/schedule.py"),
    "the packing of documents into rows": ("text packing", "train/data/text/packing.py"),
    "the form in which a conversation becomes tokens": ("chat template", "train/data/chat/template.py"),
    "how many FLOPs a token costs": ("flops", "train/budget/flops.py"),
    "which mesh axes cut which dimension of a weight": ("rules", "tpu/rules.py"),
}


def found(words: str) -> list[str]:
    """The files whose path holds all of the words, read as people read it: folders and underscores as spaces."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in FILES]
    readable = {f"{path}.py": " ".join(path.parts).replace("_", " ").split() for path in paths}
    return [path for path, names in readable.items() if set(words.split()) <= set(names)]


@pytest.mark.parametrize("question", WHERE_IS)
def test_the_tree_says_where_it_is(question):
    words, path = WHERE_IS[question]
    assert found(words) == [path]


def test_twelve_questions_are_about_twelve_files():
    assert len({path for _, path in WHERE_IS.values()}) == len(WHERE_IS) == 12


def test_no_function_is_over_80_lines():
    lengths = [
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}")
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert len(lengths) > 1000
    assert [(lines, name) for lines, name in lengths if lines > 80] == []


def test_no_file_is_over_500_lines():
    assert [path for path in FILES if len(path.read_text().splitlines()) > 500] == []


def test_no_room_has_over_22_files():
    sizes = {path.parent: sum(other.parent == path.parent for other in FILES) for path in FILES}
    assert {room: size for room, size in sizes.items() if size > 22 and room.name != "families"} == {}
