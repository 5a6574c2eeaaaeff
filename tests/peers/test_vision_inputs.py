"""What models that see refuse: configurations, and inputs that do not fit; and how they read those that do.

Legend: B rows, T tokens, N images of a row.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from model.families import idefics, qwen2_vl
from model.families.known import describe, family_of
from model.families.load import load
from model.hub.import_model import Opened
from model.safetensors import Spec, open_directory, write_directory
from tests.peers.test_cases import error
from tests.peers.vision_case import CASES, Case, module_of, opened
from tpu.errors import UserError


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
    directory = Opened(CASES / name)
    vision = dataclasses.replace(directory.model.vision, **fields)
    model = dataclasses.replace(directory.model, vision=vision)
    if not lost:
        assert directory.family.read(describe(directory.family, model)) == directory.model
        return
    with pytest.raises(UserError) as raised:
        describe(directory.family, model)
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
    directory = Opened(CASES / name)
    module = module_of(directory)
    module.checked(directory.model, inputs, directory.generation)
    inputs = {n: a for n, a in (inputs | changes).items() if a is not None}
    if "input_ids" in changes:
        inputs.pop("token_type_ids", None)
    with pytest.raises(UserError, match=message):
        module.checked(directory.model, inputs, directory.generation)


@pytest.mark.parametrize("name", ["paligemma_1", "gemma3_1"])
def test_without_types_of_tokens_all_is_causal(name, one_device):
    with jax.set_mesh(one_device):
        case = opened(CASES / name, one_device)
        model, typed = case.model, case.arrays["prompt"]
        causal = dataclasses.replace(model, vision=dataclasses.replace(model.vision, mask="causal"))
        plain = {n: a for n, a in typed.items() if n != "token_type_ids"}
        found = [
            case.module.run(config, case.weights, inputs, 3, {})
            for config, inputs in ((model, typed), (model, plain), (causal, plain))
        ]
    seen = typed["attention_mask"] != 0
    logits = [f["logits"][seen] for f in found]
    assert error(logits[0], logits[1]) > 0.01
    assert error(logits[1], logits[2]) < 1e-6
    assert np.array_equal(found[1]["sequences"], found[2]["sequences"])


def test_images_cut_by_a_row_and_types_that_are_not_of_images_are_refused():
    directory = Opened(CASES / "llava_0")
    ids = np.array([[5, 56, 56, 56], [56, 6, 7, 8]])
    with pytest.raises(UserError, match="row 0 has 3 image tokens, which are no whole images of 4"):
        module_of(directory).checked(directory.model, {"input_ids": ids, "pixel_values": IMAGE}, {})
    with pytest.raises(UserError, match=r"'token_type_ids' is not supported"):
        module_of(directory).checked(directory.model, {"input_ids": ids, "token_type_ids": ids}, {})
    directory = Opened(CASES / "gemma3_0")
    ids, types = np.array([[5, 60, 60, 60, 60, 6]]), np.array([[1, 1, 1, 1, 1, 0]])
    inputs = {"input_ids": ids, "token_type_ids": types, "pixel_values": IMAGE}
    with pytest.raises(UserError, match=r"token_type_ids: must be 1 where input_ids are 60"):
        module_of(directory).checked(directory.model, inputs, {})


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
    directory = Opened(CASES / "clip_0")
    inputs = {"input_ids": np.array([[5, 6, 7], [8, 9, 9]]), "pixel_values": IMAGE}
    inputs = {n: np.asarray(a) for n, a in (inputs | changes).items() if a is not None}
    with pytest.raises(UserError, match=message):
        module_of(directory).checked(directory.model, inputs, directory.generation)


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
    options = json.loads((CASES / name / "config.json").read_text()) | changes
    with pytest.raises(UserError, match=message):
        family_of(options).read(options)


def test_llava_counts_layers_from_both_ends():
    options = json.loads((CASES / "llava_0" / "config.json").read_text())
    family = family_of(options)
    read = lambda layer: family.read(options | {"vision_feature_layer": layer}).vision  # noqa: E731
    assert (read(-1), read(-2)) == (read(2), read(1))
    assert (read(-1).unused_layers, read(-2).unused_layers) == (0, 1)


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
    case = opened(CASES / f"{family}_0", one_device)
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
    case = opened(CASES / "vit_0", one_device)
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
    return opened(CASES / "idefics_0", one_device)


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
    blind = idefics_0.checked(image_attention_mask=0 * mask)
    alone = {name: a for name, a in blind.items() if name not in ("pixel_values", "image_attention_mask")}
    compute = jax.jit(lambda weights, arrays: idefics.outputs(idefics_0.model, weights, arrays)["logits"])
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
    case = Opened(tmp_path)
    assert case.model == idefics_0.opened.model
    loaded = load(case.weights, idefics_0.model, one_device)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, idefics_0.weights))


@pytest.fixture
def qwen2_vl_1(one_device) -> Case:
    """A case with images and videos in two of 3 rows, which are padded on the left."""
    return opened(CASES / "qwen2_vl_1", one_device)


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
    compute = jax.jit(lambda weights, arrays: qwen2_vl.outputs(case.model, weights, arrays)["logits"])
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
