"""Models that see compute what transformers does: all outputs, loss, gradient norms, greedy sequences; exports are
imports; published configurations have the published numbers of parameters.

Recorded cases always, fresh ones where transformers is at hand; both are made by record_vision.py.
"""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kinds
from model.families.known import family_of
from model.families.load import shapes
from model.hub.export_model import KEPT, export_model
from model.hub.import_model import Opened, import_model
from model.place import Place
from model.safetensors import open_directory, write_directory
from model.weights import Weights, bind
from tests.peers.archives import unpacked
from tests.peers.published import PARAMETERS
from tests.peers.test_cases import error, one_of_each
from tests.peers.vision_case import CASES, arrays, assert_alike, compare, opened
from tpu.errors import UserError

HERE = Path(__file__).parent
FAMILIES = ("clip", "gemma3", "idefics", "llava", "paligemma", "qwen2_vl", "resnet", "siglip", "vit")
RECORDED = sorted(path.parent for path in CASES.glob("*/case.json"))


def test_there_are_three_cases_of_each_family():
    assert [path.name for path in RECORDED] == sorted(f"{family}_{i}" for family in FAMILIES for i in range(3))


@pytest.mark.parametrize("path", one_of_each(RECORDED))
def test_recorded(path, one_device):
    with jax.set_mesh(one_device):
        assert_alike(compare(path, one_device))


def export(path: Path, workdir: Path, target: Path) -> None:
    import_model(path, workdir, "auto")
    export_model(workdir, target, None, "auto", 20_000, "weights")


@pytest.mark.parametrize("path", one_of_each(RECORDED))
def test_export_gives_back_what_was_imported(path, tmp_path):
    export(path, tmp_path / "workdir", tmp_path / "exported")
    before, after = open_directory(path), open_directory(tmp_path / "exported")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.spec == after[name].spec
        assert np.array_equal(tensor.view(), after[name].view()), name
    one, two = Opened(path), Opened(tmp_path / "exported")
    assert one.model == two.model
    # What a model does not have and its text has: the ids of its ends.
    kept = lambda options: {n: options[n] for n in KEPT if n in options}  # noqa: E731
    assert kept(one.options) == kept(two.options)
    assert kept(one.options.get("text_config", {})) == kept(two.options.get("text_config", {}))


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_configurations_have_the_published_number_of_parameters(name):
    options = json.loads((HERE / "vision_configs" / f"{name}.json").read_text())
    family = family_of(options)
    model = family.read(options)
    sizes = shapes(model.placed("cpu", "float32")).items()
    counted = sum(math.prod(shape) for path, shape in sizes if not path.endswith((".mean", ".variance")))
    assert counted == PARAMETERS[name]
    assert family.read(family.write(model)) == model


def test_an_import_counts_what_is_trained_and_not_the_statistics_of_batches(tmp_path, capsys):
    import_model(CASES / "resnet_0", tmp_path / "workdir", "auto")
    tensors = open_directory(CASES / "resnet_0")
    trained = json.loads((CASES / "resnet_0" / "case.json").read_text())["gradient_norms"]
    count = sum(math.prod(tensors[name].spec.shape) for name in trained)
    assert f"ResNetForImageClassification: {count:,} parameters" in capsys.readouterr().out


# What files may be called, what is compared in training, commands


def written_as(path: Path, target: Path, *renamed: tuple[str, str]) -> Path:
    """The case with other names of tensors."""
    tensors = open_directory(path)
    names = {}
    for name in tensors:
        new = name
        for pattern, replacement in renamed:
            new = re.sub(pattern, replacement, new)
        names[new] = name
    target.mkdir()
    (target / "config.json").write_text((path / "config.json").read_text())
    specs = {new: tensors[old].spec for new, old in names.items()}
    write_directory(target, specs, lambda new: [np.asarray(tensors[names[new]].view())], 10**9)
    return target


PUBLISHED = ((r"^vision_tower\.", "vision_tower.vision_model."),)
MODULES = (
    (r"^language_model\.lm_head", "lm_head"),
    (r"^language_model\.model", "model.language_model"),
    (r"^(vision_tower|multi_modal)", r"model.\1"),
)


@pytest.mark.parametrize("renamed", [PUBLISHED, MODULES], ids=["published", "modules"])
@pytest.mark.parametrize("name", ["llava_0", "paligemma_1", "gemma3_2"])
def test_files_of_other_versions_hold_the_same_weights(name, renamed, tmp_path):
    one, two = Opened(CASES / name), Opened(written_as(CASES / name, tmp_path / "renamed", *renamed))
    assert one.model == two.model
    for path in shapes(one.model.placed("cpu", "float32")):
        pieces = [list(o.weights.pieces(path, np.dtype(np.float32))) for o in (one, two)]
        assert len(pieces[0]) == len(pieces[1]) > 0
        assert all(np.array_equal(a, b) for a, b in zip(*pieces, strict=True)), path


def test_a_tensor_by_two_names_is_refused(tmp_path):
    path = written_as(CASES / "llava_0", tmp_path / "twice")
    tensors = open_directory(CASES / "llava_0")
    extra = "vision_tower.vision_model.post_layernorm.bias"
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    specs[extra] = specs["vision_tower.post_layernorm.bias"]
    view = lambda name: [tensors[name.replace("vision_model.", "")].view()]  # noqa: E731
    write_directory(path, specs, view, 10**9)
    with pytest.raises(UserError, match=r"tensor vision_tower\.post_layernorm\.bias: is there twice"):
        Opened(path)


@pytest.mark.parametrize("name", ["clip_0", "siglip_0"])
def test_what_training_compares_is_what_transformers_does(name, one_device):
    """The two towers as objectives call them: padding in segment 0, and similarity below the largest scale."""
    with jax.set_mesh(one_device):
        case = opened(CASES / name, one_device)
        inputs = case.arrays["inputs"]
        tokens = inputs["input_ids"]
        end = tokens.argmax(1)[:, None] if name == "clip_0" else np.full((3, 1), tokens.shape[1])
        order = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        place = Place(jnp.asarray(order <= end, jnp.int32), order)

        def compute(weights: Weights) -> tuple[jax.Array, ...]:
            model = bind(kinds.build(case.model)[0], weights)
            images = model.images(jnp.asarray(inputs["pixel_values"].transpose(0, 2, 3, 1)))
            texts = model.texts(tokens, place)
            return images, texts, model.logits(images, texts)

        found = jax.jit(compute)(case.weights)
    for array, output in zip(found, ("image_embeds", "text_embeds", "logits_per_image"), strict=True):
        assert error(np.asarray(array), case.wanted[output]) < 5e-6, output


def test_commands(tmp_path):
    """import, export and run, as users start them."""
    for arguments in (
        ["import", f"--from={CASES}/llava_1", f"--to={tmp_path}/workdir"],
        ["export", f"--checkpoint={tmp_path}/workdir", f"--to={tmp_path}/exported"],
        ["run", f"--from={tmp_path}/exported", f"--inputs={CASES}/llava_1/prompt.npz", f"--out={tmp_path}/out.npz"]
        + ["--new_tokens=8"],
    ):
        command = [sys.executable, "-m", "model.hub", *arguments]
        done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(found["sequences"], arrays(CASES / "llava_1", "outputs")["sequences"])


# Fresh ones


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, peers: Callable[..., str], draws: int) -> list[Path]:
    """New models: of one family, which is drawn too, or several of all."""
    out, seed = tmp_path_factory.mktemp("fresh"), time.time_ns() % 10**9
    families = random.Random(seed).sample(sorted(FAMILIES), 1) if draws == 1 else FAMILIES
    print(f"seed {seed}: {', '.join(families)}")
    peers("record_vision.py", f"--out={out}", f"--draws={draws}", f"--families={','.join(families)}", f"--seed={seed}")
    return sorted(path.parent for path in unpacked(out).glob("*/case.json"))


def test_fresh(fresh, draws, one_device):
    assert len(fresh) == (1 if draws == 1 else draws * len(FAMILIES))
    with jax.set_mesh(one_device):
        for path in fresh:
            print(path.name)
            assert_alike(compare(path, one_device))


def test_exported_directories_load_in_transformers(fresh, peers, tmp_path):
    for path in fresh:
        export(path, tmp_path / path.name, path / "exported")
    errors = json.loads(peers("record_vision.py", f"--check={fresh[0].parent}"))
    assert errors.keys() == {path.name for path in fresh}
    assert max(errors.values()) <= 1e-6, errors
