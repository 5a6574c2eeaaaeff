"""Models that see compute what transformers does: all outputs, loss, gradient norms, greedy sequences; exports are
imports; published configurations have the published numbers of parameters.

Recorded cases always, fresh ones where transformers is at hand; both are made by record_vision.py.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import hub, kinds
from model.attention import Place
from model.families.known import describe, family_of
from model.load import load, shapes
from model.safetensors import open_directory, write_directory
from model.transformer import Weights, bind
from tests.peers.test_cases import error, gradient_norms
from tpu.errors import UserError

HERE = Path(__file__).parent
FAMILIES = ("clip", "siglip", "llava", "paligemma", "gemma3")
CASES = sorted(p.parent for f in FAMILIES for p in (HERE / "vision_cases").glob(f"{f}_[0-9]/case.json"))
PARAMETERS = {
    "clip-b32": 151_277_313,
    "clip-b16": 149_620_737,
    "clip-l14": 427_616_513,
    "clip-l14-336": 427_944_193,
    "siglip-b16-224": 203_155_970,
    "siglip-so400m-14-384": 877_960_498,
    "llava-1.5-7b": 7_063_427_072,
    "paligemma-3b-224": 2_923_466_480,
    "gemma-3-4b": 4_300_079_472,
}


@functools.cache
def opened(path: Path, mesh: jax.sharding.Mesh) -> tuple[hub.Opened, Any, Weights]:
    """The directory, its placed model and its weights."""
    directory = hub.Opened(path)
    loop = "unroll" if path.name.endswith("0") else "scan"
    model = dataclasses.replace(directory.model, compute_dtype="float32", layer_loop=loop).placed("cpu", "float32")
    return directory, model, load(directory.weights, model, mesh)


def of_family(directory: hub.Opened) -> ModuleType:
    """The module of the family's `run`, which has `checked(config, inputs, options)` too and, differentiable,
    `outputs(config, weights, checked)`."""
    run = directory.family.run
    return importlib.import_module(getattr(run, "func", run).__module__)


def arrays(path: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(path / f"{name}.npz") as file:
        return dict(file)


def compare(path: Path, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Errors of all recorded outputs, of loss and gradient norms, and whether generated tokens are wrong."""
    directory, model, weights = opened(path, mesh)
    case, wanted, inputs = json.loads((path / "case.json").read_text()), arrays(path, "outputs"), arrays(path, "inputs")
    module = of_family(directory)
    checked = module.checked(model, inputs, directory.generation)

    def compute(weights: Weights) -> tuple[jax.Array, dict[str, jax.Array]]:
        found = module.outputs(model, weights, checked)
        return found["loss"], found

    (loss, found), gradients = jax.jit(jax.value_and_grad(compute, has_aux=True))(weights)
    errors = {"loss": abs(float(loss) - case["loss"]) / (1 + abs(case["loss"])), "wrong_tokens": 0.0}
    said = wanted.pop("sequences", None)
    first = wanted.pop("first_logits", None)
    assert wanted.keys() <= found.keys()
    seen = inputs.get("attention_mask", np.ones(np.shape(inputs.get("input_ids", 0)))) != 0
    for name, array in wanted.items():
        mine = np.asarray(found[name]).reshape(array.shape)
        text = seen.ndim == 2 and array.shape[:2] == seen.shape
        errors[name] = error(mine[seen], array[seen]) if text else error(mine, array)
    norms, recorded = gradient_norms(directory, model, gradients), case["gradient_norms"]
    assert norms.keys() == recorded.keys()
    largest = max(recorded.values())
    # Relative, but for gradients that are nothing but rounding, such as those of keys' biases.
    errors["gradient_norms"] = max(abs(norms[n] - g) / max(g, 1e-3 * largest) for n, g in recorded.items())
    new_tokens, prompt = case.get("new_tokens", 0), arrays(path, "prompt") if said is not None else inputs
    ran = directory.family.run(model, weights, prompt, new_tokens, directory.generation)
    shapes_of = {name: array.shape for name, array in wanted.items()}
    if said is not None:
        assert ran["image_hidden_states"].shape == shapes_of["image_hidden_states"]
        certain = prompt["input_ids"].shape[1] + case["certain_tokens"]
        errors["first_logits"] = error(ran["logits"][:, -1], first)
        errors["wrong_tokens"] = float(not np.array_equal(ran["sequences"][:, :certain], said[:, :certain]))
    else:
        assert {name: array.shape for name, array in ran.items() if name in wanted} == shapes_of
    return errors | {"tolerance": case["tolerance"]}


def assert_alike(found: dict[str, float]) -> None:
    print(json.dumps(found))
    assert found["gradient_norms"] <= 1e-3, found
    assert not found["wrong_tokens"], found
    limits = found.keys() - {"gradient_norms", "wrong_tokens", "tolerance"}
    assert max(found[name] for name in limits) <= found["tolerance"], found


def test_there_are_three_cases_of_each_family():
    assert sorted(path.name for path in CASES) == sorted(f"{family}_{i}" for family in FAMILIES for i in range(3))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_recorded(path, one_device):
    with jax.set_mesh(one_device):
        assert_alike(compare(path, one_device))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_export_gives_back_what_was_imported(path, tmp_path):
    hub.import_model(path, tmp_path / "workdir", "auto")
    hub.export_model(tmp_path / "workdir", tmp_path / "exported", None, "auto", 10**6, "weights")
    before, after = open_directory(path), open_directory(tmp_path / "exported")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.spec == after[name].spec
        assert np.array_equal(tensor.view(), after[name].view()), name
    one, two = hub.Opened(path), hub.Opened(tmp_path / "exported")
    assert one.model == two.model
    # What a model does not have and its text has: the ids of its ends.
    kept = lambda options: {n: options[n] for n in hub.KEPT if n in options}  # noqa: E731
    assert kept(one.options) == kept(two.options)
    assert kept(one.options.get("text_config", {})) == kept(two.options.get("text_config", {}))


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_configurations_have_the_published_number_of_parameters(name):
    options = json.loads((HERE / "vision_configs" / f"{name}.json").read_text())
    family = family_of(options)
    model = family.read(options)
    assert sum(map(math.prod, shapes(model.placed("cpu", "float32")).values())) == PARAMETERS[name]
    assert family.read(family.write(model)) == model


# What files may be called, what cannot be said, what cannot be run


def case(name: str) -> Path:
    return HERE / "vision_cases" / name


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
    one, two = hub.Opened(case(name)), hub.Opened(written_as(case(name), tmp_path / "renamed", *renamed))
    assert one.model == two.model
    for path in shapes(one.model.placed("cpu", "float32")):
        pieces = [list(o.weights.pieces(path, np.dtype(np.float32))) for o in (one, two)]
        assert len(pieces[0]) == len(pieces[1]) > 0
        assert all(np.array_equal(a, b) for a, b in zip(*pieces, strict=True)), path


def test_a_tensor_by_two_names_is_refused(tmp_path):
    path = written_as(case("llava_0"), tmp_path / "twice")
    tensors = open_directory(case("llava_0"))
    extra = "vision_tower.vision_model.post_layernorm.bias"
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    specs[extra] = specs["vision_tower.post_layernorm.bias"]
    view = lambda name: [tensors[name.replace("vision_model.", "")].view()]  # noqa: E731
    write_directory(path, specs, view, 10**9)
    with pytest.raises(UserError, match=r"tensor vision_tower\.post_layernorm\.bias: is there twice"):
        hub.Opened(path)


@pytest.mark.parametrize(
    ("name", "fields", "lost"),
    [
        ("llava_1", {"unused_norm": False}, "unused_norm=False would become True"),
        ("llava_1", {"connector_dim": 6}, "connector_dim=6 would become 24"),
        ("llava_1", {"image_token": -1}, "image_token=-1 would become 32000"),
        ("llava_1", {"mask": "images"}, "mask='images' would become 'causal'"),
        ("llava_1", {"latents": 3, "init": "normal", "similarity": "sigmoid", "rope_theta": 5.0, "every": 2}, ""),
        ("gemma3_0", {"connector_eps": 0.5}, "connector_eps=0.5 would become 1e-05"),
        ("gemma3_0", {"normalization": "clip"}, "normalization='clip' would become 'half'"),
        ("gemma3_0", {"connector_dim": 5, "connector_heads": 3, "widths": (7,), "depths": (1,)}, ""),
        ("paligemma_0", {"positions": "sincos"}, "positions='sincos' would become 'learned'"),
        ("clip_0", {"text_pool": "last"}, "text_pool='last' would become 'end'"),
        ("clip_0", {"final_norm_eps": 0.5}, "final_norm_eps=0.5 would become 1e-05"),
        ("clip_0", {"connector": "mlp", "connector_factor": 3, "image_token": 5}, ""),
        ("clip_0", {"encoder": "resnet", "class_token": False, "pool": "mean"}, "encoder='resnet' would become 'vit'"),
        ("siglip_0", {"patch_bias": False}, "patch_bias=False would become True"),
    ],
)
def test_what_a_family_cannot_say_of_images_is_refused_by_name(name, fields, lost):
    opened = hub.Opened(case(name))
    vision = dataclasses.replace(opened.model.vision, **fields)
    model = dataclasses.replace(opened.model, vision=vision)
    if not lost:
        assert opened.family.read(describe(opened.family, model)) == opened.model
        return
    with pytest.raises(UserError) as raised:
        describe(opened.family, model)
    assert f"cannot express this model: model.vision.{lost}" in str(raised.value)
    assert str(raised.value).count("would become") == (2 if "resnet" in lost else 1)


IMAGE = np.zeros((1, 3, 16, 16), np.float32)
CALLER = {
    "llava_0": ([[5, 56, 56, 56, 56, 6]], {}),
    "paligemma_0": ([[44, 44, 44, 44, 5, 6]], {"token_type_ids": np.array([[0, 0, 0, 0, 0, 1]])}),
    "gemma3_0": ([[5, 60, 60, 60, 60, 6]], {"token_type_ids": np.array([[0, 1, 1, 1, 1, 0]])}),
}


@pytest.mark.parametrize("name", CALLER)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": None}, r"input_ids has 4 image tokens \(\d+\), and pixel_values gives 0"),
        (
            {"pixel_values": np.zeros((2, 3, 16, 16), np.float32)},
            r"has 4 image tokens \(\d+\), .* gives 8 \(2 images of 4",
        ),
        (
            {"pixel_values": np.zeros((1, 3, 16, 24), np.float32)},
            r"\[1, 3, 16, 24\]; must be floats \[images, 3, 16, 16\]",
        ),
        (
            {"pixel_values": np.zeros((1, 16, 16, 3), np.float32)},
            r"pixel_values is float32\[1, 16, 16, 3\]; must be floats",
        ),
        (
            {"pixel_values": np.zeros((1, 3, 16, 16), np.uint8)},
            r"pixel_values is uint8\[1, 3, 16, 16\]; must be floats",
        ),
        ({"input_ids": None}, "inputs: input_ids is missing"),
        ({"input_ids": np.array([[5, 999]])}, r"input_ids from 5 to 999: valid: 0 to"),
        ({"input_ids": np.zeros((1, 6), np.float32)}, r"input_ids is float32\[1, 6\]; must be integers"),
        ({"labels": np.zeros((1, 5), int)}, r"labels is int64\[1, 5\]; must be integers"),
        ({"pixels": IMAGE}, r"inputs: 'pixels' is not supported; valid: input_ids, .*pixel_values"),
    ],
)
def test_bad_inputs_of_decoders_that_see(name, changes, message):
    ids, more = CALLER[name]
    inputs = {"input_ids": np.array(ids), "pixel_values": IMAGE, **more}
    opened = hub.Opened(case(name))
    module = of_family(opened)
    module.checked(opened.model, inputs, opened.generation)
    inputs = {n: a for n, a in (inputs | changes).items() if a is not None}
    if "input_ids" in changes:
        inputs.pop("token_type_ids", None)
    with pytest.raises(UserError, match=message):
        module.checked(opened.model, inputs, opened.generation)


@pytest.mark.parametrize("name", ["paligemma_1", "gemma3_1"])
def test_without_types_of_tokens_all_is_causal(name, one_device):
    with jax.set_mesh(one_device):
        directory, model, weights = opened(case(name), one_device)
        module = of_family(directory)
        causal = dataclasses.replace(model, vision=dataclasses.replace(model.vision, mask="causal"))
        typed = arrays(case(name), "prompt")
        plain = {n: a for n, a in typed.items() if n != "token_type_ids"}
        found = [
            module.run(config, weights, inputs, 3, {})
            for config, inputs in ((model, typed), (model, plain), (causal, plain))
        ]
    seen = typed["attention_mask"] != 0
    logits = [f["logits"][seen] for f in found]
    assert error(logits[0], logits[1]) > 0.01
    assert error(logits[1], logits[2]) < 1e-6
    assert np.array_equal(found[1]["sequences"], found[2]["sequences"])


def test_images_cut_by_a_row_and_types_that_are_not_of_images_are_refused():
    opened = hub.Opened(case("llava_0"))
    ids = np.array([[5, 56, 56, 56], [56, 6, 7, 8]])
    with pytest.raises(UserError, match="row 0 has 3 image tokens, which are no whole images of 4"):
        of_family(opened).checked(opened.model, {"input_ids": ids, "pixel_values": IMAGE}, {})
    with pytest.raises(UserError, match=r"'token_type_ids' is not supported"):
        of_family(opened).checked(opened.model, {"input_ids": ids, "token_type_ids": ids}, {})
    opened = hub.Opened(case("gemma3_0"))
    ids, types = np.array([[5, 60, 60, 60, 60, 6]]), np.array([[1, 1, 1, 1, 1, 0]])
    inputs = {"input_ids": ids, "token_type_ids": types, "pixel_values": IMAGE}
    with pytest.raises(UserError, match=r"token_type_ids: must be 1 where input_ids are 60"):
        of_family(opened).checked(opened.model, inputs, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": None}, "inputs: pixel_values is missing"),
        ({"pixel_values": np.zeros((1, 3, 24, 16), np.float32)}, r"must be floats \[images, 3, 16, 16\]"),
        (
            {"pixel_values": np.zeros((1, 3, 24, 4), np.float32), "interpolate_pos_encoding": np.True_},
            r"must be floats \[images, 3, rows, columns\]",
        ),
        ({"return_loss": np.ones(2, bool)}, r"return_loss is bool\[2\]; must be one boolean"),
        ({"return_loss": np.True_}, "needs as many images as texts, not 1 and 2"),
        ({"token_type_ids": np.zeros((2, 3), int)}, "'token_type_ids' is not supported"),
        ({"input_ids": np.zeros((2, 12), int)}, r"inputs: positions=12: longer than the learned positions"),
    ],
)
def test_bad_inputs_of_pairs(changes, message):
    opened = hub.Opened(case("clip_0"))
    inputs = {"input_ids": np.array([[5, 6, 7], [8, 9, 9]]), "pixel_values": IMAGE}
    inputs = {n: np.asarray(a) for n, a in (inputs | changes).items() if a is not None}
    with pytest.raises(UserError, match=message):
        of_family(opened).checked(opened.model, inputs, opened.generation)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava_0", {"vision_feature_layer": [-2, -1]}, r"vision_feature_layer=\[-2, -1\]: must be of type int"),
        ("llava_0", {"vision_feature_layer": -3}, r"vision_feature_layer=-3: valid: -2 to -1, or 1 to 2"),
        ("llava_0", {"image_token_index": -7}, r"image_token_index=-7: must be the id of a token"),
        ("gemma3_0", {"mm_tokens_per_image": 9}, r"mm_tokens_per_image=9: must be a square whose side divides the 4"),
        ("paligemma_0", {"projection_dim": 7}, r"projection_dim=7 is not supported; valid: 16"),
    ],
)
def test_configurations_that_are_not_supported(name, changes, message):
    options = json.loads((case(name) / "config.json").read_text()) | changes
    with pytest.raises(UserError, match=message):
        family_of(options).read(options)


def test_llava_counts_layers_from_both_ends():
    options = json.loads((case("llava_0") / "config.json").read_text())
    family = family_of(options)
    read = lambda layer: family.read(options | {"vision_feature_layer": layer}).vision  # noqa: E731
    assert (read(-1), read(-2)) == (read(2), read(1))
    assert (read(-1).unused_layers, read(-2).unused_layers) == (0, 1)


@pytest.mark.parametrize("name", ["clip_0", "siglip_0"])
def test_what_training_compares_is_what_transformers_does(name, one_device):
    """The two towers as objectives call them: padding in segment 0, and similarity below the largest scale."""
    with jax.set_mesh(one_device):
        _, config, weights = opened(case(name), one_device)
        inputs, wanted = arrays(case(name), "inputs"), arrays(case(name), "outputs")
        tokens = inputs["input_ids"]
        end = tokens.argmax(1)[:, None] if name == "clip_0" else np.full((3, 1), tokens.shape[1])
        order = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        place = Place(jnp.asarray(order <= end, jnp.int32), order)

        def compute(weights: Weights) -> tuple[jax.Array, ...]:
            model = bind(kinds.build(config)[0], weights)
            images = model.images(jnp.asarray(inputs["pixel_values"].transpose(0, 2, 3, 1)))
            texts = model.texts(tokens, place)
            return images, texts, model.logits(images, texts)

        found = jax.jit(compute)(weights)
    for array, output in zip(found, ("image_embeds", "text_embeds", "logits_per_image"), strict=True):
        assert error(np.asarray(array), wanted[output]) < 5e-6, output


def test_commands(tmp_path):
    """import, export and run, as users start them."""
    for arguments in (
        ["import", f"--from={case('llava_1')}", f"--to={tmp_path}/workdir"],
        ["export", f"--checkpoint={tmp_path}/workdir", f"--to={tmp_path}/exported"],
        ["run", f"--from={tmp_path}/exported", f"--inputs={case('llava_1')}/prompt.npz", f"--out={tmp_path}/out.npz"]
        + ["--new_tokens=8"],
    ):
        command = [sys.executable, "-m", "model.hub", *arguments]
        done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(found["sequences"], arrays(case("llava_1"), "outputs")["sequences"])


# Fresh ones


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, peers: Callable[..., str]) -> list[Path]:
    """Three new models of each family."""
    out, seed = tmp_path_factory.mktemp("fresh"), time.time_ns() % 10**9
    print(f"seed {seed}")
    peers("record_vision.py", f"--out={out}", f"--families={','.join(FAMILIES)}", f"--seed={seed}")
    return sorted(path.parent for path in out.glob("*/case.json"))


def test_fresh(fresh, one_device):
    assert len(fresh) == 3 * len(FAMILIES)
    with jax.set_mesh(one_device):
        for path in fresh:
            print(path.name)
            assert_alike(compare(path, one_device))


def test_exported_directories_load_in_transformers(fresh, peers, tmp_path):
    for path in fresh:
        hub.import_model(path, tmp_path / path.name, "auto")
        hub.export_model(tmp_path / path.name, path / "exported", None, "auto", 20_000, "weights")
    errors = json.loads(peers("record_vision.py", f"--check={fresh[0].parent}"))
    assert errors.keys() == {path.name for path in fresh}
    assert max(errors.values()) <= 1e-6, errors
