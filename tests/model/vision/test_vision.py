"""Encoders of images against plain float64 references; packed images against each alone; pooling; errors.

Legend: R images, H, W pixels along their sides, C channels or width, M patches of a row, P patches along a side.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kinds
from model.config import ModelConfig, VisionConfig
from model.vision.convolution import CNN, GroupNorm, pooled
from model.vision.encoder import Encoder
from model.vision.images import Images, normalized
from model.vision.interpolation import interpolated
from model.vision.resnet import ResNet
from model.vision.vision import Vision
from model.vision.vit import ViT, grid_positions, patches, tower_config
from model.weights import bind
from tests.model import float64
from tpu.errors import UserError

SIDE, PATCH, WIDTH = 8, 4, 8


def made(loop: str = "unroll", **vision: Any) -> ModelConfig:
    """The config of a model that merges the vectors of a tiny ViT, where the fields do not say otherwise."""
    fields = {"image_size": SIDE, "patch_size": PATCH, "layers": 2, "embed_dim": WIDTH, "heads": 2, "mlp_dim": 12}
    fields = {"encoder": "vit", "connector": "linear", "norm_eps": 1e-2} | fields | vision
    fusion = {"fusion": "merge"} if fields.get("pool", "none") == "none" else {"kind": "vision", "labels": 3}
    shape = {"vocab_size": 9, "layers": 1, "embed_dim": WIDTH, "heads": 2, "layer_loop": loop}
    return ModelConfig(**shape, **fusion, vision=VisionConfig(**fields)).resolved().placed("cpu", "float32")


def images(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Normalised pixels [R, H, W, C]."""
    return np.random.default_rng(seed).normal(size=(count, height, width, channels)).astype(np.float32)


def cut(x: np.ndarray, size: int) -> np.ndarray:
    """Patches [R, P P, size, size, C], one by one."""
    across = range(0, x.shape[2], size)
    return np.stack([x[:, i : i + size, j : j + size] for i in range(0, x.shape[1], size) for j in across], 1)


# The vision transformer


def placed_in(kind: str, row: int, column: int, width: int) -> np.ndarray:
    """Sines and cosines of MoCo v3, one number after the other."""
    quarter, out = width // 4, []
    for of in (column, row):
        for f in (np.sin, np.cos):
            out += [f(of / 10_000.0 ** (i / quarter)) for i in range(quarter)]
    return np.array(out) if kind == "sincos" else np.zeros(width)


def turned(a: np.ndarray, places: list[tuple[int, int]], theta: float) -> np.ndarray:
    """a [R, M, H, K]: pair i of K / 2 turns with the row for i < K / 4, then with the column."""
    out, half = a.copy(), a.shape[-1] // 2
    for m, place in enumerate(places):
        for i in range(half):
            angle = place[i >= half // 2] * theta ** (-2 * (i % (half // 2)) / half)
            x, y = a[:, m, :, i], a[:, m, :, i + half]
            out[:, m, :, i] = x * np.cos(angle) - y * np.sin(angle)
            out[:, m, :, i + half] = x * np.sin(angle) + y * np.cos(angle)
    return out


def vit_reference(config: ModelConfig, weights: Any, x: np.ndarray, size: int) -> np.ndarray:
    """Images x [R, H, W, C] of the config's size -> [R, M, D]."""
    vision, w = config.vision, float64.exactly(weights)
    places = [(i, j) for i in range(x.shape[1] // size) for j in range(x.shape[2] // size)]
    h = float64.linear(cut(x.astype(np.float64), size), w["patch"], 3)
    h = h + np.stack([placed_in(vision.positions, i, j, vision.embed_dim) for i, j in places])
    if vision.class_token:
        first = np.broadcast_to(w["class_token"], (len(h), 1, vision.embed_dim))
        h = np.concatenate([first, h], 1)
    if vision.positions == "learned":
        h = h + w["position_embedding"]
    if vision.embedding_norm:
        h = float64.norm(h, w["embedding_norm"], vision.norm_eps, vision.norm)
    turn = functools.partial(turned, places=places, theta=vision.rope_theta) if vision.positions == "rope" else np.array
    everything = np.ones((len(h), h.shape[1], h.shape[1]), bool)
    for layer in float64.layers(w["stack"], vision.layers - vision.unused_layers):
        h = float64.block(h, layer, everything, tower_config(config), turn=turn)
    ends = vision.final_norm and not vision.unused_layers
    return float64.norm(h, w["final_norm"], vision.final_norm_eps, vision.norm) if ends else h


VITS = {
    "vit": {"class_token": True, "norm_eps": 1e-2, "final_norm_eps": 1e-1},
    "clip": {"class_token": True, "embedding_norm": True, "activation": "quick_gelu", "patch_bias": False},
    "siglip-moco": {"positions": "sincos", "class_token": True, "activation": "gelu"},
    "qwen2-vl": {"positions": "rope", "rope_theta": 50.0, "final_norm": False, "norm": "rmsnorm"},
    "llava": {"unused_layers": 1, "class_token": True, "layers": 3, "activation": "swiglu"},
    "bare": {"positions": "none", "attention_bias": False, "channels": 1, "heads": 1, "patch_size": 2},
}


@pytest.mark.parametrize("case", VITS)
def test_a_vit_is_that_of_the_paper(case):
    config = made("scan" if case == "qwen2-vl" else "unroll", **VITS[case])
    graphdef, weights = float64.drawn(config, Encoder)
    x = images(2, SIDE, SIDE, config.vision.channels)
    found, grid = jax.jit(lambda w, x: bind(graphdef, w)(x))(weights, x)
    assert tuple(int(side) for side in grid) == (SIDE // config.vision.patch_size,) * 2
    wanted = vit_reference(config, weights["vit"], x, config.vision.patch_size)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_patches_and_their_places_lie_row_by_row():
    x = images(2, 4, 6)
    np.testing.assert_array_equal(patches(jnp.asarray(x), 2), cut(x, 2))
    assert grid_positions(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


# torch.nn.functional.interpolate(mode="bicubic", align_corners=False) of TABLE to 3 x 6 and to 5 x 2
TABLE = [[0, 7, 3, 10], [6, 2, 9, 5], [1, 8, 4, 0], [7, 3, 10, 6]]
TO_3_6 = [
    [0.4938955, 3.7721716, 6.2180494, 3.8882151, 6.4494719, 9.8398116],
    [3.3697917, 4.109375, 5.4328342, 6.7475043, 4.125, 1.0320095],
    [6.2456879, 4.4465784, 4.4482475, 8.6099363, 7.5424262, 4.7048611],
]
TO_5_2 = [
    [3.9072734, 6.0319766],
    [3.3231484, 7.8939766],
    [4.109375, 4.125],
    [4.8956016, 2.9217734],
    [4.3114766, 9.0833984],
]


@pytest.mark.parametrize("wanted", [TO_3_6, TO_5_2])
def test_a_table_is_resampled_as_torch_does_it(wanted):
    rows, columns = (interpolated(4, size, "bicubic") for size in np.shape(wanted))
    np.testing.assert_allclose(rows @ np.array(TABLE) @ columns.T, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("class_token", [False, True])
def test_learned_positions_are_resampled_for_an_image_of_another_size(class_token):
    """Rows and columns are not mixed up, and the class token's position stays."""
    config = made(image_size=16, class_token=class_token)
    graphdef, weights = float64.drawn(config, Encoder)
    run = jax.jit(lambda w, x: bind(graphdef, w)(x)[0])
    x = images(1, 3 * PATCH, 6 * PATCH)
    table = np.array(weights["vit"]["position_embedding"], np.float64)
    table[-16:] = np.arange(WIDTH) * np.array(TABLE, np.float64).reshape(16, 1) / 20
    resized = np.concatenate([table[:-16], np.arange(WIDTH) * np.reshape(TO_3_6, (18, 1)) / 20])
    found = run(weights | {"vit": weights["vit"] | {"position_embedding": jnp.asarray(table, jnp.float32)}}, x)
    wanted = vit_reference(config, weights["vit"] | {"position_embedding": resized}, x, PATCH)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_unused_layers_have_weights_and_no_influence(loop):
    longer, shorter = made(loop, layers=3, unused_layers=1), made(loop, final_norm=False)
    (of_longer, weights), (of_shorter, _) = (float64.drawn(config, Encoder) for config in (longer, shorter))
    x = images(2, SIDE, SIDE)

    def mixed(w: Any) -> jax.Array:
        out = bind(of_longer, w)(x)[0]
        return (out * jnp.arange(out.size).reshape(out.shape)).sum(), out

    gradient, found = jax.jit(jax.grad(mixed, has_aux=True))(weights)
    used = {name: leaf for name, leaf in weights["vit"].items() if name != "final_norm"}
    used["stack"] = jax.tree.map(lambda w: w[:2], used["stack"])
    wanted = jax.jit(lambda w: bind(of_shorter, w)(x)[0])({"vit": used})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient["vit"]):
        name = jax.tree_util.keystr(path)
        if "final_norm" in name:
            assert not np.any(leaf)
        elif "groups" in name:
            assert not np.any(leaf[2]), name
            assert np.any(leaf[:2]) or "key']['bias" in name, name


# Packed images


def packed_row(sizes: list[tuple[int, int]], room: int, factor: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patches [1, room, 4, 4, 3], segments and positions of images of so many patches along their sides, then padding.

    The factor * factor patches that become one follow each other.
    """
    pixels, segments = np.zeros((1, room, PATCH, PATCH, 3), np.float32), np.zeros((1, room), np.int32)
    positions, at = np.zeros((1, room, 2), np.int32), 0
    for number, (height, width) in enumerate(sizes):
        places = in_blocks(height, width, factor)
        m = len(places)
        x = cut(images(1, height * PATCH, width * PATCH, seed=number), PATCH)[0]
        pixels[0, at : at + m] = x[places @ [width, 1]]
        segments[0, at : at + m], positions[0, at : at + m] = number + 1, places
        at += m
    return pixels, segments, positions


def in_blocks(height: int, width: int, factor: int) -> np.ndarray:
    """Rows and columns of all patches, [height width, 2]: block by block, and within a block row by row."""
    steps = (range(0, height, factor), range(0, width, factor), range(factor), range(factor))
    return np.array([(i + k, j + m) for i in steps[0] for j in steps[1] for k in steps[2] for m in steps[3]])


@pytest.mark.parametrize("positions", ["learned", "sincos", "rope", "none"])
def test_images_packed_in_one_row_do_not_see_each_other_nor_the_padding(positions):
    config = made(image_size=16, positions=positions)
    graphdef, weights = float64.drawn(config, lambda c, rngs: ViT(c, (PATCH, PATCH, 3), rngs))
    run = jax.jit(lambda *row: bind(graphdef, weights)(*row))
    sizes = [(2, 3), (1, 4), (4, 1)]
    pixels, segments, places = packed_row(sizes, 17)
    found = np.asarray(run(pixels, segments, places))
    changed = np.where(segments[..., None, None, None] > 0, pixels, 9.0)
    np.testing.assert_array_equal(run(changed, segments, places)[:, :14], found[:, :14])
    first = 0
    for number, (height, width) in enumerate(sizes):
        mine = segments[0] == number + 1
        alone = np.where(mine[..., None, None, None], pixels, 0.0)
        alone = run(np.roll(alone, -first, 1), np.roll(segments == number + 1, -first, 1), np.roll(places, -first, 1))
        np.testing.assert_allclose(found[0, mine], alone[0, : height * width], rtol=0, atol=1e-6)
        first += height * width


@pytest.mark.parametrize("connector", ["linear", "mlp", "pixel_shuffle", "average_pool", "merger"])
def test_packed_images_give_what_each_gives_by_itself(connector):
    config = made(image_size=16, positions="rope", connector=connector)
    graphdef, weights = float64.drawn(config, Vision)
    model = bind(graphdef, weights)
    factor, sizes = config.vision.shrink, [(2, 4), (2, 2), (4, 2)]
    pixels, segments, places = packed_row(sizes, 24, factor)
    found = jax.jit(lambda x: model(Images(x, segments, *[None] * 3, places)).hidden)(pixels)
    alone, one = [], np.ones((1, 1), np.int32)
    for number, (height, width) in enumerate(sizes):
        x = images(1, height * PATCH, width * PATCH, seed=number)[None]
        hidden = np.asarray(jax.jit(lambda x: model(Images(x, one, *[None] * 3)).hidden)(x))[0]
        order = in_blocks(height, width, factor) @ [width, 1] if factor == 1 else np.arange(len(hidden))
        alone.append(hidden[order])
    alone = np.concatenate(alone)
    np.testing.assert_allclose(found[0, : len(alone)], alone, rtol=0, atol=1e-5)


def test_a_still_image_fills_all_times_of_a_patch():
    """Qwen2-VL's patches are of two images; one alone is shown twice."""
    config = made(temporal_patch=2, positions="rope")
    graphdef, weights = float64.drawn(config, Encoder)
    x = images(2, SIDE, SIDE)
    found, _ = jax.jit(lambda w: bind(graphdef, w)(x))(weights)
    kernel = weights["vit"]["patch"]["kernel"].sum(0)
    once = weights["vit"] | {"patch": weights["vit"]["patch"] | {"kernel": kernel}}
    np.testing.assert_allclose(found, vit_reference(config, once, x, PATCH), rtol=0, atol=2e-5)


UNPACKABLE = {
    "class_token": {"class_token": True},
    "connector": {"connector": "perceiver"},
    "image_positions": {"image_positions": 3},
    "encoder": {"encoder": "cnn", "widths": (4, WIDTH)},
    "stem": {"stem": "resnet", "widths": (WIDTH,), "depths": (1,), "stem_width": 4},
}


@pytest.mark.parametrize("field", UNPACKABLE)
def test_images_of_several_sizes_are_refused_where_something_mixes_them(field):
    graphdef, weights = float64.drawn(made(**UNPACKABLE[field]), Vision)
    pixels, segments, places = packed_row([(2, 2)], 4)
    with pytest.raises(UserError, match=f"model.vision.{field}="):
        bind(graphdef, weights)(Images(pixels, segments, *[None] * 3, places))


# Pixels, pooling, the classifier


def test_bytes_are_normalised_and_floats_are_not():
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3)).astype(np.uint8)
    for name, (mean, deviation) in {
        "none": (0, 1),
        "half": (0.5, 0.5),
        "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    }.items():
        np.testing.assert_allclose(normalized(jnp.asarray(x), name), (x / 255 - mean) / deviation, atol=1e-5)
        floats = jnp.asarray(x, jnp.float32)
        assert normalized(floats, name) is floats
    assert normalized(jnp.asarray(x[..., :1]), "clip").shape == (2, 3, 4, 1)


@pytest.mark.parametrize("pool", ["class", "mean", "map"])
def test_a_pool_makes_one_vector_of_an_image(pool):
    config = made(pool=pool, class_token=pool != "map")
    graphdef, weights = float64.drawn(config, kinds.maker(config))
    x = images(2, SIDE, SIDE)
    found = jax.jit(lambda w: bind(graphdef, w)(x))(weights)
    h = vit_reference(config, weights["vision"]["encoder"]["vit"], x, PATCH)
    if pool == "map":
        w = float64.exactly(weights["vision"]["map_pool"])
        probe = np.broadcast_to(w["probe"], (2, 1, WIDTH))
        y = float64.cross(probe, h, w["attention"], np.ones((2, 1, h.shape[1]), bool))
        z = float64.norm(y, w["norm"], config.vision.norm_eps)
        h = (y + float64.mlp(z, w["mlp"], config.vision.activation))[:, 0]
    else:
        h = h[:, 0] if pool == "class" else h[:, 1:].mean(1)
    np.testing.assert_allclose(found, float64.linear(h, float64.exactly(weights["head"])), rtol=0, atol=2e-5)


# Convolutions


def convolved(x: np.ndarray, w: Any, stride: int, standardized: bool) -> np.ndarray:
    """x [R, H, W, C], one output pixel after the other; K // 2 zeros around it."""
    kernel = w["kernel"]
    if standardized:
        kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-5)
    size = len(kernel)
    x = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[-1]))
    for i, j in np.ndindex(height, width):
        window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
        out[:, i, j] = np.tensordot(window, kernel, 3)
    return out + w.get("bias", 0.0)


def group_normed(x: np.ndarray, w: Any, eps: float) -> np.ndarray:
    """One image and one run of channels after the other."""
    channels, out = x.shape[-1], np.zeros(x.shape)
    run = channels // np.gcd(channels, 32)
    for image in range(len(x)):
        for first in range(0, channels, run):
            part = x[image, ..., first : first + run]
            out[image, ..., first : first + run] = (part - part.mean()) / np.sqrt(part.var() + eps)
    return out * w["scale"] + w["bias"]


def largest(x: np.ndarray, size: int, stride: int, padding: int) -> np.ndarray:
    sides = ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0))
    x = np.pad(x, sides, constant_values=-np.inf)
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    steps = [[(i * stride, j * stride) for j in range(width)] for i in range(height)]
    return np.stack([np.stack([x[:, i : i + size, j : j + size].max((1, 2)) for i, j in r], 1) for r in steps], 1)


def resnet_reference(config: ModelConfig, w: Any, x: np.ndarray) -> np.ndarray:
    vision, group = config.vision, config.vision.conv_norm == "group"

    def unit(x: np.ndarray, w: Any, stride: int = 1) -> np.ndarray:
        y, n = convolved(x, w["convolution"], stride, group), w["norm"]
        if group:
            return group_normed(y, n, vision.norm_eps)
        return (y - n["mean"]) / np.sqrt(n["variance"] + 1e-5) * n["scale"] + n["bias"]

    x = largest(np.maximum(unit(x, w["stem"], 2), 0), 3, 2, 1)
    for stage, depth in enumerate(vision.depths):
        for i in range(depth):
            b, stride = w[f"stage_{stage}_{i}"], 2 if stage and not i else 1
            y = x
            strides = [stride, 1] if vision.block == "basic" else [1, stride, 1]
            for n, step in enumerate(strides):
                y = unit(y if n == 0 else np.maximum(y, 0), b[f"unit_{n}"], step)
            x = np.maximum(y + (unit(x, b["shortcut"], stride) if "shortcut" in b else x), 0)
    return x


def test_a_cnn_is_its_loops():
    config = made(encoder="cnn", widths=(4, 6, 48), image_size=16)
    graphdef, weights = float64.drawn(config, CNN)
    x = images(2, 16, 24)
    wanted, w = x.astype(np.float64), float64.exactly(weights)
    for i in range(3):
        wanted = group_normed(convolved(wanted, w[f"convolution_{i}"], 1, False), w[f"norm_{i}"], 1e-2)
        wanted = largest(np.maximum(wanted, 0), 2, 2, 0)
    found = jax.jit(lambda w: bind(graphdef, w)(x))(weights)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    assert found.shape == (2, 2, 3, 48)


@pytest.mark.parametrize("fields", [{"encoder": "cnn", "widths": (4, 6)}, {"encoder": "resnet", "widths": (4,)}])
def test_vectors_of_convolutions_say_where_they_are(fields):
    fields |= {"depths": (1,), "stem_width": 4, "image_size": 16}
    graphdef, weights = float64.drawn(made(**fields), Encoder)
    flat = np.zeros((1, 16, 16, 3), np.float32)
    found = np.asarray(bind(graphdef, weights)(flat)[0])
    without, bare = float64.drawn(made(**fields, positions="none"), Encoder)
    assert "position_embedding" not in bare
    alone = {name: w for name, w in weights.items() if name != "position_embedding"}
    plain = np.asarray(bind(without, alone)(flat)[0])
    np.testing.assert_allclose(found - plain, weights["position_embedding"][None], rtol=0, atol=1e-6)
    assert "position_embedding" not in float64.drawn(made(**fields, pool="mean"), Encoder)[1]
    large = bind(graphdef, weights)(np.zeros((1, 32, 16, 3), np.float32))
    assert large[0].shape[1] == 2 * found.shape[1]


@pytest.mark.parametrize("channels", [8, 32, 48, 64])
def test_group_norm_goes_by_runs_of_channels(channels):
    config = made(encoder="cnn", widths=(4,))
    graphdef, weights = float64.drawn(config, lambda c, rngs: GroupNorm(c, channels, rngs))
    x = images(2, 3, 5, channels) + 4
    wanted = group_normed(x.astype(np.float64), float64.exactly(weights), config.vision.norm_eps)
    np.testing.assert_allclose(bind(graphdef, weights)(x), wanted, rtol=0, atol=2e-5)


def test_a_maximum_is_not_that_of_the_padding():
    x = jnp.asarray(-1 - np.abs(images(1, 4, 4)))
    np.testing.assert_array_equal(pooled(x, 3, 2, 1), largest(np.asarray(x), 3, 2, 1))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_resnet_is_its_loops(block, norm):
    fields = {"widths": (8, 12), "depths": (1, 2), "stem_width": 6, "block": block, "conv_norm": norm}
    config = made(encoder="resnet", image_size=16, **fields)
    graphdef, weights = float64.drawn(config, ResNet)
    x = images(2, 16, 24)
    wanted = resnet_reference(config, float64.exactly(weights), x.astype(np.float64))
    found = jax.jit(lambda w: bind(graphdef, w)(x))(weights)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert found.shape == (2, 2, 3, 12)


def test_fixed_statistics_take_no_gradient():
    config = made(encoder="resnet", conv_norm="batch", widths=(4,), depths=(1,), stem_width=4)
    graphdef, weights = float64.drawn(config, ResNet)
    gradient = jax.jit(jax.grad(lambda w: bind(graphdef, w)(images(1, 8, 8)).sum()))(weights)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.any(leaf) != (path[-1].key in ("mean", "variance")), jax.tree_util.keystr(path)


def test_a_hybrid_is_a_vit_on_the_vectors_of_a_resnet():
    fields = {"widths": (4, 8), "depths": (1, 1), "stem_width": 4, "stem": "resnet", "image_size": 16}
    config = made(**fields, class_token=True)
    graphdef, weights = float64.drawn(config, Encoder)
    x = images(2, 16, 16)
    found, grid = jax.jit(lambda w: bind(graphdef, w)(x))(weights)
    assert tuple(int(side) for side in grid) == (2, 2)
    vectors = resnet_reference(config, float64.exactly(weights["resnet"]), x.astype(np.float64))
    wanted = vit_reference(config, weights["vit"], vectors, 1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_the_encoder_takes_the_kernel_of_the_text_where_that_computes_it():
    """Auto chooses for the text: a kernel that cannot compute the encoder's heads is none of the encoder's."""
    text = ModelConfig(embed_dim=128, heads=2, fusion="merge")
    for width, platform, kernel in (
        (128, "gpu", "cudnn"),
        (40, "gpu", "plain"),  # heads of 10, which is no multiple of 8
        (40, "tpu", "splash"),
        (128, "cpu", "plain"),
    ):
        vision = VisionConfig(encoder="vit", embed_dim=width, heads=4)
        config = dataclasses.replace(text, vision=vision).resolved().placed(platform, "bfloat16")
        assert (config.attention == "chunked") == (platform == "cpu")
        assert tower_config(config).attention == kernel


# Errors

WRONG = {  # what is wrong: the field named
    "image_size": {"image_size": 3},
    "encoder": {"encoder": "clip"},
    "heads": {"heads": 3},
    "patch_size": {"patch_size": 0},
    "latents": {"latents": 0},
    "unused_layers": {"unused_layers": 2},
    "image_positions": {"image_positions": -1},
    "widths": {"encoder": "cnn", "widths": ()},
    "depths": {"encoder": "resnet", "widths": (4, 8), "depths": (1,)},
    "offset": {"every": 2, "offset": 2},
    "connector_factor": {"connector": "merger", "connector_factor": 3},
    "class_token": {"encoder": "cnn", "widths": (4,), "class_token": True},
    "embed_dim": {"positions": "sincos", "embed_dim": 6},
    "keep_class": {"connector": "pixel_shuffle", "keep_class": True, "class_token": True},
    "positions": {"positions": "rope", "class_token": True},
    "norm_eps": {"norm_eps": 0.0},
    "rope_theta": {"rope_theta": 0.0},
    "connector_eps": {"connector_eps": -1e-5},
    "final_norm_eps": {"final_norm_eps": -1e-6},
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_named(field):
    with pytest.raises(UserError, match=f"^model.vision.{field}="):
        made(**WRONG[field])


@pytest.mark.parametrize("channels", [0, 2, 4, 5])
def test_pixels_are_grey_or_of_three_colours(channels):
    with pytest.raises(UserError, match=f"^model.vision.channels={channels}: valid: 1, 3"):
        made(channels=channels)
    made(channels=1)


def test_bottlenecks_need_widths_that_four_divides():
    with pytest.raises(UserError, match=r"^model.vision.widths=\(4, 6\): .* multiples of 4"):
        made(encoder="resnet", widths=(4, 6), depths=(1, 1), block="bottleneck")
    made(encoder="resnet", widths=(4, 6), depths=(1, 1), block="basic")


def test_convolutions_have_learned_positions_or_none():
    with pytest.raises(UserError, match=r"^model.vision.positions='rope': only with model.vision.encoder='vit'"):
        made(encoder="cnn", widths=(4,), positions="rope")


@pytest.mark.parametrize("fields", [{"keep_class": True}, {"pool": "class"}])
def test_a_class_token_that_is_used_must_be_there(fields):
    with pytest.raises(UserError, match=r"^model.vision.class_token=False: .* need it"):
        made(**fields)


def test_rotary_positions_need_heads_of_a_multiple_of_four():
    with pytest.raises(UserError, match=r"^model.vision.heads=4: positions='rope'"):
        made(positions="rope", heads=4)
    made(positions="rope", heads=2)


@pytest.mark.parametrize("field", sorted(f.name for f in dataclasses.fields(VisionConfig)))
def test_every_number_and_every_choice_has_its_limits(field):
    value = getattr(VisionConfig(), field)
    if isinstance(value, str):
        with pytest.raises(UserError, match=f"^model.(vision.)?{field}='nonsense'"):
            made(**{field: "nonsense"})
    elif type(value) is int and field not in ("offset", "image_token"):
        with pytest.raises(UserError, match=f"^model.vision.{field}=-1"):
            made(**{field: -1})
