"""ViT, ResNet, Idefics and Qwen2-VL compute what transformers does: outputs, loss, gradient norms, greedy sequences;
exports are imports, and published configurations have the published number of parameters.

Recorded cases always, fresh ones where transformers is at hand; both are made by record_vision.py.

Legend: B rows, T tokens, N images of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model import hub
from model.families import idefics, qwen2_vl, resnet, vit
from model.families.known import family_of
from model.kinds import build
from model.load import load, shapes
from model.safetensors import Spec, open_directory, write_directory
from model.transformer import Weights, bind
from tests.peers.test_cases import error, gradient_norms
from tpu.errors import UserError

HERE = Path(__file__).parent
MODULES = {"vit": vit, "resnet": resnet, "idefics": idefics, "qwen2_vl": qwen2_vl}
CASES = sorted(p.parent for p in (HERE / "vision_cases").glob("*/case.json") if p.parent.name[:-2] in MODULES)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Case:
    """A case, opened by the hub: model, weights, arrays, what is to come of them."""

    def __init__(self, path: Path, mesh: jax.sharding.Mesh):
        self.record: dict[str, Any] = json.loads((path / "case.json").read_text())
        self.module = MODULES[self.record["family"]]
        self.opened = hub.Opened(path)
        self.model = dataclasses.replace(self.opened.model, compute_dtype="float32").placed("cpu", "float32")
        self.weights: Weights = load(self.opened.weights, self.model, mesh)
        self.wanted = dict(np.load(path / "outputs.npz"))
        names = ("inputs", "prompt")
        files = {name: path / f"{name}.npz" for name in names}
        self.arrays = {name: dict(np.load(file)) if file.exists() else {} for name, file in files.items()}

    def checked(self, name: str = "inputs", **changed: np.ndarray) -> dict[str, Any]:
        """The arrays of that name, some of them changed, as the model takes them."""
        return self.module.checked(self.model, self.arrays[name] | changed, self.opened.generation)


@functools.cache
def opened(path: Path, mesh: jax.sharding.Mesh) -> Case:
    """The case in that directory."""
    return Case(path, mesh)


def compare(path: Path, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Errors of every output, the loss and gradient norms, and whether generated tokens are wrong."""
    case = opened(path, mesh)
    graph, inputs = build(case.model)[0], case.checked()

    def compute(weights: Weights) -> tuple[jax.Array, dict[str, jax.Array]]:
        found = case.module.outputs(bind(graph, weights), inputs)
        return found["loss"], found

    (loss, found), gradients = jax.jit(jax.value_and_grad(compute, has_aux=True))(case.weights)
    mask = case.arrays["inputs"].get("attention_mask")
    outputs = {}
    for name, wanted in case.wanted.items():
        if name not in ("sequences", "first_logits"):
            pair = np.asarray(found[name]), wanted
            assert pair[0].shape == pair[1].shape, name
            if mask is not None and wanted.shape[:2] == mask.shape:
                pair = tuple(array[mask != 0] for array in pair)
            outputs[name] = error(*pair)
    norms, recorded = gradient_norms(case.opened, case.model, gradients), case.record["gradient_norms"]
    assert {name for name in norms if not name.endswith(STATISTICS)} == recorded.keys()
    assert not any(norm for name, norm in norms.items() if name.endswith(STATISTICS))
    largest = max(recorded.values())
    wrong = False
    if "sequences" in case.wanted:
        new, certain = case.record["new_tokens"], case.record["certain_tokens"]
        said = case.module.greedy(case.model, case.weights, case.checked("prompt"), new, case.opened.generation)
        end = said.shape[1] - new + certain
        wrong = not np.array_equal(said[:, :end], case.wanted["sequences"][:, :end])
    return {
        **outputs,
        "loss": abs(float(loss) - case.record["loss"]) / (1 + abs(case.record["loss"])),
        # Relative, but for gradients that are nothing but rounding, such as those of keys' biases.
        "gradient_norms": max(abs(norms[n] - g) / max(g, 1e-3 * largest) for n, g in recorded.items()),
        "wrong_tokens": float(wrong),
        "tolerance": case.record["tolerance"],
    }


def assert_alike(found: dict[str, float]) -> None:
    outside = ("gradient_norms", "wrong_tokens", "tolerance")
    assert max(value for name, value in found.items() if name not in outside) <= found["tolerance"], found
    assert found["gradient_norms"] <= 1e-3, found
    assert not found["wrong_tokens"], found


def test_there_are_three_cases_of_each_family():
    families = [json.loads((path / "case.json").read_text())["family"] for path in CASES]
    assert {family: families.count(family) for family in MODULES} == dict.fromkeys(MODULES, 3)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_recorded(path, one_device):
    with jax.set_mesh(one_device):
        found = compare(path, one_device)
        print(found)
        assert_alike(found)


@pytest.mark.parametrize("path", [path for path in CASES if path.name.endswith("1")], ids=lambda path: path.name)
def test_the_command_gives_what_is_recorded(path, tmp_path):
    speaks = (path / "prompt.npz").exists()
    hub.run_model(path, path / f"{'prompt' if speaks else 'inputs'}.npz", tmp_path / "out.npz", 3 if speaks else 0)
    found, wanted = np.load(tmp_path / "out.npz"), np.load(path / "outputs.npz")
    if speaks:
        assert np.array_equal(found["sequences"], wanted["sequences"][:, :-5])
        assert error(found["logits"][:, -1], wanted["first_logits"]) < 1e-5
    else:
        assert error(found["logits"], wanted["logits"]) < 1e-5


def export(path: Path, workdir: Path, target: Path) -> None:
    hub.import_model(path, workdir, "auto")
    hub.export_model(workdir, target, None, "auto", 10**9, "weights")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_export_gives_back_what_was_imported(path, tmp_path):
    export(path, tmp_path / "workdir", tmp_path / "exported")
    before, after = open_directory(path), open_directory(tmp_path / "exported")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.spec == after[name].spec
        assert np.array_equal(tensor.view(), after[name].view()), name
    assert hub.Opened(tmp_path / "exported").model == hub.Opened(path).model


PUBLISHED = {
    "vit-b16": 86_567_656,
    "vit-l16": 304_326_632,
    "vit-h14": 632_045_800,
    "resnet-50": 25_557_032,
    "idefics-9b": 8_929_679_632,
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_published_number_of_parameters(name):
    options = json.loads((HERE / "vision_configs" / f"{name}.json").read_text())
    model = family_of(options).read(options).placed("cpu", "float32")
    sizes = shapes(model).items()
    assert (
        sum(math.prod(shape) for path, shape in sizes if not path.endswith((".mean", ".variance"))) == PUBLISHED[name]
    )


# What cannot be computed


def refused(case: Case, message: str, name: str = "inputs", **changed: Any) -> None:
    """The arrays, changed so (None: taken away), are refused in one line with these words."""
    arrays = {n: a for n, a in (case.arrays[name] | changed).items() if a is not None}
    with pytest.raises(UserError) as caught:
        case.module.checked(case.model, arrays, case.opened.generation)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_images_and_labels_that_do_not_fit_are_refused(family, one_device):
    case = opened(HERE / "vision_cases" / f"{family}_0", one_device)
    images = case.arrays["inputs"]["pixel_values"]
    refused(case, "pixel_values is missing", pixel_values=None)
    rows, wanted = len(images), "16, 16" if family == "vit" else "rows, columns"
    refused(case, "pixel_values is float32[2, 16, 16, 3]", pixel_values=np.zeros((2, 16, 16, 3), np.float32))
    refused(case, f"must be floats [images, 3, {wanted}]", pixel_values=images.astype(np.int32))
    refused(case, f"must be floats [images, 3, {wanted}]", pixel_values=images[0])
    refused(case, f"labels is int32[5]; must be integers [{rows}]", labels=np.zeros(5, np.int32))
    refused(case, "labels from 0 to 9: valid: 0 to", labels=9 * np.eye(rows, dtype=np.int32)[0])
    refused(case, "'pixels' is not supported; valid: pixel_values, labels", pixels=images)
    for new, options in ((3, {}), (0, {"problem_type": "regression"})):
        with pytest.raises(UserError, match=r"new_tokens=3|problem_type='regression'"):
            case.module.run(case.model, case.weights, case.arrays["inputs"], new, options)


def test_a_vit_takes_another_size_only_where_it_is_told_to(one_device):
    case = opened(HERE / "vision_cases" / "vit_0", one_device)
    large = np.zeros((3, 3, 24, 16), np.float32)
    refused(case, "must be floats [images, 3, 16, 16]", pixel_values=large)
    assert case.checked(pixel_values=large, interpolate_pos_encoding=np.True_)["pixel_values"].shape == (3, 24, 16, 3)
    small = {"pixel_values": large[..., :3], "interpolate_pos_encoding": np.True_}
    refused(case, "must be floats [images, 3, rows, columns]", **small)
    refused(
        case,
        "interpolate_pos_encoding is int64[2]; must be one true or false",
        interpolate_pos_encoding=np.ones(2, int),
    )


@pytest.fixture
def idefics_0(one_device) -> Case:
    """A case with 3 rows of 11 or more tokens and 2 images."""
    return opened(HERE / "vision_cases" / "idefics_0", one_device)


def test_images_and_masks_that_do_not_fit_a_text_are_refused(idefics_0):
    images, mask = (idefics_0.arrays["inputs"][name] for name in ("pixel_values", "image_attention_mask"))
    refused(idefics_0, "pixel_values and image_attention_mask: one is missing", pixel_values=None)
    refused(idefics_0, "pixel_values and image_attention_mask: one is missing", image_attention_mask=None)
    refused(idefics_0, "[rows, tokens of input_ids, images of pixel_values]", image_attention_mask=mask[:, :-1])
    refused(idefics_0, "[rows, tokens of input_ids, images of pixel_values]", image_attention_mask=mask / 2)
    refused(idefics_0, "pixel_values has 2 rows, input_ids 3", pixel_values=images[:2])
    refused(idefics_0, "must be floats [rows, images, 3, 16, 16]", pixel_values=images[0])
    refused(idefics_0, "valid: 0 to 63", input_ids=np.full(mask.shape[:2], 64))
    refused(idefics_0, "'image_encoder_embeddings' is not supported", image_encoder_embeddings=images)


def test_a_text_without_images_is_one_that_looks_at_none(idefics_0, one_device):
    mask = idefics_0.arrays["inputs"]["image_attention_mask"]
    graph = build(idefics_0.model)[0]
    blind = idefics_0.checked(image_attention_mask=0 * mask)
    alone = {name: a for name, a in blind.items() if name not in ("pixel_values", "image_attention_mask")}
    compute = jax.jit(lambda weights, arrays: idefics.outputs(bind(graph, weights), arrays)["logits"])
    with jax.set_mesh(one_device):
        found = [np.asarray(compute(idefics_0.weights, arrays)) for arrays in (blind, alone, idefics_0.checked())]
    assert error(found[0], found[1]) < 1e-6
    assert error(found[0], found[2]) > 1e-3


def test_additional_tokens_in_tables_of_their_own_are_the_last_of_the_vocabulary(idefics_0, one_device, tmp_path):
    path = idefics_0.opened.directory
    tensors = {name: tensor.view() for name, tensor in open_directory(path).items()}
    for first, rest in idefics.FAMILIES[0].joined.items():
        tensors |= {first: tensors[first][:60], rest: tensors[first][60:]}
    specs = {name: Spec(array.dtype, array.shape) for name, array in tensors.items()}
    write_directory(tmp_path, specs, lambda name: [tensors[name]], 10**9)
    changed = {"vocab_size": 60, "additional_vocab_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(idefics_0.opened.options | changed))
    case = hub.Opened(tmp_path)
    assert case.model == idefics_0.opened.model
    loaded = load(case.weights, idefics_0.model, one_device)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, idefics_0.weights))


@pytest.fixture
def qwen2_vl_1(one_device) -> Case:
    """A case with images and videos in two of 3 rows, which are padded on the left."""
    return opened(HERE / "vision_cases" / "qwen2_vl_1", one_device)


def test_grids_patches_and_placeholders_that_do_not_fit_are_refused(qwen2_vl_1):
    arrays = qwen2_vl_1.arrays["inputs"]
    tokens, grids, patches = (arrays[name] for name in ("input_ids", "image_grid_thw", "pixel_values"))
    taken, image = tokens.copy(), qwen2_vl_1.opened.options["image_token_id"]
    taken[tuple(np.argwhere(tokens == image)[0])] = 5
    refused(qwen2_vl_1, "has 6 placeholders of images (image_token_id=75), and image_grid_thw gives 7", input_ids=taken)
    none = {"image_grid_thw": None, "pixel_values": None}
    refused(qwen2_vl_1, "has 7 placeholders of images (image_token_id=75), and image_grid_thw gives 0 vectors", **none)
    swapped = {"image_grid_thw": grids[::-1].copy()}
    refused(
        qwen2_vl_1, "row 0 has a run of 2 placeholders of images, and the next of image_grid_thw, [1, 2, 2]", **swapped
    )
    refused(qwen2_vl_1, "pixel_values is float32[27, 96]; for image_grid_thw=", pixel_values=patches[1:])
    refused(qwen2_vl_1, "must be floats [28, 96]: patches of 3 x 2 x 4 x 4 numbers", pixel_values=patches[:, 1:])
    refused(qwen2_vl_1, "must be floats [28, 96]", pixel_values=patches.astype(int))
    refused(qwen2_vl_1, "pixel_values is float32[0, 96]; for image_grid_thw=", pixel_values=None)
    refused(qwen2_vl_1, "must be integers [images, 3]", image_grid_thw=grids[:, 1:])
    refused(qwen2_vl_1, "the latter multiples of 2", image_grid_thw=grids + np.array([0, 1, 0]))
    refused(qwen2_vl_1, "must be at least 1", image_grid_thw=0 * grids)
    refused(qwen2_vl_1, "mm_token_type_ids: must be 1", mm_token_type_ids=0 * tokens)
    refused(qwen2_vl_1, "attention_mask: must not be 0 at a placeholder", attention_mask=0 * tokens)
    refused(qwen2_vl_1, "'position_ids' is not supported", position_ids=tokens)


def test_types_of_tokens_are_those_of_the_placeholders(qwen2_vl_1):
    arrays = {name: a for name, a in qwen2_vl_1.arrays["inputs"].items() if name != "mm_token_type_ids"}
    found = qwen2_vl.checked(qwen2_vl_1.model, arrays, qwen2_vl_1.opened.generation)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, qwen2_vl_1.checked()))


def test_a_text_goes_on_after_the_larger_side_of_an_image_and_not_after_a_videos_end():
    kinds, grid = np.array([[0, 0, 2, 2, 2, 0, 0, 0]]), np.array([[3, 2, 2]])
    mask = np.array([[False, True, True, True, True, True, True, True]])
    found, deltas = qwen2_vl.positions(kinds, mask, grid[:0], grid, 2)
    assert found[0, :, 0].tolist() == [0, 0, 1, 2, 3, 2, 3, 4]  # A video of three frame pairs, each one vector.
    assert found[0, :, 1].tolist() == [0, 0, 1, 1, 1, 2, 3, 4]
    assert deltas.tolist() == [4 + 1 - 7]
    kinds, grid = np.array([[1, 1, 1, 1, 1, 1, 0]]), np.array([[1, 4, 6]])
    found, deltas = qwen2_vl.positions(kinds, kinds >= 0, grid, grid[:0], 2)
    assert found[0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2], [3, 3, 3]]
    assert deltas.tolist() == [3 + 1 - 7]


def test_rows_do_not_depend_on_each_other(qwen2_vl_1, one_device):
    """A row alone, without its padding, gives what it gave among the others; so does the row without images."""
    case, whole = qwen2_vl_1, qwen2_vl_1.arrays["inputs"]
    graph = build(case.model)[0]
    compute = jax.jit(lambda weights, arrays: qwen2_vl.outputs(bind(graph, weights), arrays)["logits"])
    media = {0: {"image": (0, 1), "video": (0, 1)}, 1: {"image": (1, 3), "video": (1, 2)}, 2: {}}
    for row, of in media.items():
        there = whole["attention_mask"][row] != 0
        alone = {name: whole[name][row : row + 1, there] for name in ("input_ids", "mm_token_type_ids")}
        for kind, _, grid_name, pixels_name in qwen2_vl.KINDS:
            if kind in of:
                ends = np.cumsum([0, *whole[grid_name].prod(1)])[list(of[kind])]
                alone |= {grid_name: whole[grid_name][slice(*of[kind])], pixels_name: whole[pixels_name][slice(*ends)]}
        arrays = qwen2_vl.checked(case.model, alone, case.opened.generation)
        with jax.set_mesh(one_device):
            assert error(np.asarray(compute(case.weights, arrays))[0], case.wanted["logits"][row, there]) < 1e-5


# Fresh ones


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, peers: Callable[..., str]) -> list[Path]:
    """Three new models of each family."""
    out, seed = tmp_path_factory.mktemp("fresh"), time.time_ns() % 10**9
    print(f"seed {seed}")
    peers("record_vision.py", f"--out={out}", f"--seed={seed}", f"--families={','.join(MODULES)}")
    return sorted(path.parent for path in out.glob("*/case.json"))


def test_fresh(fresh, one_device):
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
