"""The experiments that are shipped: they resolve, survive JSON, and have the sizes that were published."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from model.kinds import build
from tpu.errors import UserError
from train.budget.summary import parameter_counts, summarize
from train.config import Experiment
from train.resolve import resolve
from train.step import frozen_mask
from train.tree import differences, from_dict, to_dict

ROOT = Path(__file__).resolve().parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"config_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*.py"))
ALL = [(name, size) for name in NAMES for size in (None, *getattr(load(name), "SIZES", ()))]


def experiment(name: str, size: str | None) -> Experiment:
    return resolve(load(name).get_config(*[size] if size else []))


@pytest.mark.parametrize(("name", "size"), ALL)
def test_it_resolves_and_is_equal_after_json(name, size):
    found = experiment(name, size)
    again = from_dict(Experiment, json.loads(json.dumps(to_dict(found))))
    assert differences(found, again) == []
    assert again == found == resolve(found)
    assert found.name == (
        f"{name}_{size or next(iter(inspect.signature(load(name).get_config).parameters.values())).default}"
        if getattr(load(name), "SIZES", None)
        else name
    )


def test_there_is_one_for_each_promise():
    sizes = {name: set(getattr(load(name), "SIZES", ())) for name in NAMES}
    assert sizes["gpt2"] == {"124m", "355m", "774m", "1558m"}
    assert sizes["gpt3"] == {"125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b"}
    assert sizes["llama"] == {"2-7b", "2-70b", "3-8b", "3-70b"}
    assert {"quickstart", "gpt_mini"} <= sizes.keys()


def test_gpt3_alternates_dense_and_banded_layers_where_a_width_is_given():
    model = experiment("gpt3", "125m,band=256").model
    assert (model.pattern, model.window) == (("global", "local"), 256)
    assert experiment("gpt3", "125m").model.pattern == ("global",)
    for wrong in ("125m,band=", "125m,band=x", "125m,256"):
        with pytest.raises(UserError, match=rf"configs/gpt3\.py:{wrong}: valid: .*band=256"):
            experiment("gpt3", wrong)


@pytest.mark.parametrize("name", [name for name in NAMES if getattr(load(name), "SIZES", None)])
def test_an_unknown_size_is_named_with_the_valid_ones(name):
    with pytest.raises(UserError, match=rf"configs/{name}\.py:huge: valid: .*{next(iter(load(name).SIZES))}"):
        load(name).get_config("huge")


PUBLISHED = {
    ("gpt2", "124m"): 124_439_808,
    ("gpt2", "355m"): 354_823_168,
    ("gpt2", "774m"): 774_030_080,
    ("gpt2", "1558m"): 1_557_611_200,
    ("clip", "b32"): 151_277_313,
    ("clip", "b16"): 149_620_737,
    ("clip", "l14"): 427_616_513,
    ("clip", "l14-336"): 427_944_193,
    ("llama", "2-7b"): 6_738_415_616,
    ("llama", "2-70b"): 68_976_648_192,
    ("llama", "3-8b"): 8_030_261_248,
    ("llama", "3-70b"): 70_553_706_496,
}
# arXiv:2005.14165, table 2.1, column n_params.
PRINTED = {
    "125m": 125e6,
    "350m": 350e6,
    "760m": 760e6,
    "1.3b": 1.3e9,
    "2.7b": 2.7e9,
    "6.7b": 6.7e9,
    "13b": 13e9,
    "175b": 175e9,
}


def total(name: str, size: str | None) -> int:
    """The number of its parameters."""
    return parameter_counts(build(experiment(name, size).model.placed("cpu", "float32"))[1])["total"]


@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_published_counts_are_met_exactly(name, size):
    assert total(name, size) == PUBLISHED[name, size]


@pytest.mark.parametrize("size", PRINTED)
def test_gpt3_has_the_sizes_printed_in_its_table(size):
    """To the table's rounding, which its own shapes meet within 2 percent ("350M" is 356 million)."""
    assert abs(total("gpt3", size) / PRINTED[size] - 1) < 0.02
    if size == "13b":
        assert 12.8e9 < total("gpt3", size) < 13e9
    given = experiment("gpt3", size)
    assert abs(given.run.steps * given.data.batch_size * given.data.context / 300e9 - 1) < 0.001


def test_the_largest_gpt3_takes_the_operations_printed_in_its_table():
    """Table D.1: 3.14e23 floating-point operations, attention not counted."""
    found = summarize(experiment("gpt3", "175b"))
    assert 3.1e23 < found["flops_per_token"] * found["tokens"] < 3.3e23


def test_gpt_mini_is_a_few_million():
    assert 2e6 < total("gpt_mini", None) < 1e7


def test_a_dry_run_touches_no_device(tmp_path):
    """On a platform that does not exist."""
    command = [sys.executable, "-m", "train.pretrain", "--config=configs/gpt2.py:124m", "--config.data.context=512"]
    command += ["--dry_run", f"--json={tmp_path / 'figures.json'}"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "nowhere"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["parameters"] == {"total": 124_439_808, "embedding": 39_383_808, "non_embedding": 85_056_000}
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert figures["flops_per_token"] == 6 * matrices + 12 * 12 * 768 * 512
    assert figures["tokens"] == 100_000 * 512 * 512
    assert figures["bytes"]["weights"] == 4 * 124_439_808
    resolved = from_dict(Experiment, figures["experiment"])
    assert resolved.data.context == 512
    assert resolved.model == experiment("gpt2", "124m").model
    for line in ("model.embed_dim = 768", "data.context = 512"):
        assert line in done.stdout.splitlines()
    for figure in (
        "124,439,808",
        "85,056,000",
        f"{figures['flops_per_token']:,}",
        "per parameter",
        "GiB: weights 475 MiB",
    ):
        assert figure in done.stdout


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *(("sight", f"{fusion},{stage}") for fusion in load("sight").FUSIONS for stage in load("sight").STAGES),
        *(("sight_quickstart", stage) for stage in load("sight_quickstart").STAGES),
        *(("gpt4", f"{size},sight") for size in ("8k", "32k", "tiny")),
    ],
)
def test_those_that_see(name, argument):
    found = experiment(name, argument)
    assert from_dict(Experiment, json.loads(json.dumps(to_dict(found)))) == found
    assert total(name, argument) > 0


def weights_of(name: str, argument: str) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Of every weight of an experiment, by its path: its shape and whether it is frozen."""
    found = experiment(name, argument)
    weights = build(found.model.placed("cpu", "float32"))[1]
    frozen = jax.tree.leaves(frozen_mask(weights, found.optimizer.frozen))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (leaf.shape, is_frozen)
        for (path, leaf), is_frozen in zip(jax.tree_util.tree_leaves_with_path(weights), frozen, strict=True)
    }


@pytest.mark.parametrize("fusion", ["co", "tangled"])
def test_streams_look_through_the_image_encoder_that_cross_attention_trained_and_keep_it(fusion):
    assert load("sight").start(fusion, "captions") == ("cross", "captions")
    trained = weights_of("sight", "cross,captions")
    for stage in ("captions", "questions"):
        frozen = {
            path: shape for path, (shape, is_frozen) in weights_of("sight", f"{fusion},{stage}").items() if is_frozen
        }
        assert frozen == {path: shape for path, (shape, _) in trained.items() if path.startswith("vision.")}
    assert not any(is_frozen for _, is_frozen in trained.values())


def test_the_quickstart_of_sight_freezes_the_text_while_it_aligns():
    of_text, aligned = (weights_of("sight_quickstart", stage) for stage in ("text", "align"))
    assert {path for path, (_, is_frozen) in aligned.items() if is_frozen} == of_text.keys()
    for stage in ("text", "captions", "questions"):
        assert not any(is_frozen for _, is_frozen in weights_of("sight_quickstart", stage).values())
    trained = re.findall(r"\(TRAIN_SIGHT\):(\w+)", (ROOT / "Makefile").read_text())
    assert trained == list(load("sight_quickstart").STAGES)
