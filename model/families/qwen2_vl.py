"""Qwen2-VL (arXiv:2409.12191): Qwen2 that reads images and videos of any size among its tokens, and turns all of them
by their time, row and column.

Images lie in the order of their placeholders, row after row, and so do videos. Patches come by the blocks that are
merged to one vector: of a grid of t frame pairs, h rows and w columns, in the order (t, h / m, w / m, m, m).

Legend: B rows, T tokens, I images, V videos, P patches of all of them, M of all of a row, m merged along a side.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig, VisionConfig
from model.families import causal, llama, qwen2
from model.families.mapping import Family, Peer
from model.families.options import choice, filled, get, only, word
from model.families.rope_options import read_parameters, write_parameters
from model.families.towers import TOWER_ACTIVATIONS
from model.families.vit import named
from model.generate.prefill import Sight
from model.kinds import build
from model.positions.sections import shift, turns
from model.vision.images import Images
from model.weights import Weights, bind
from tpu.errors import UserError

VIT, BLOCK = "vision.encoder.vit", "visual.blocks.{layer}"
LAYER = f"{VIT}.stack.groups.layer"
TABLE = llama.TABLE | {
    f"{VIT}.patch": Peer("visual.patch_embed.proj", convolution=True),
    f"{LAYER}.attention_norm": f"{BLOCK}.norm1",
    f"{LAYER}.attention.query": Peer(f"{BLOCK}.attn.qkv", part=0, parts=3),
    f"{LAYER}.attention.key": Peer(f"{BLOCK}.attn.qkv", part=1, parts=3),
    f"{LAYER}.attention.value": Peer(f"{BLOCK}.attn.qkv", part=2, parts=3),
    f"{LAYER}.attention.out": Peer(f"{BLOCK}.attn.proj", inputs=2),
    f"{LAYER}.mlp_norm": f"{BLOCK}.norm2",
    f"{LAYER}.mlp.up": f"{BLOCK}.mlp.fc1",
    f"{LAYER}.mlp.down": f"{BLOCK}.mlp.fc2",
    "vision.connector.norm": "visual.merger.ln_q",
    "vision.connector.up": "visual.merger.mlp.0",
    "vision.connector.out": "visual.merger.mlp.2",
}
TEXTS = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")
# What images and videos are called: name, option of the placeholder, grids, pixels.
KINDS = (
    ("image", "image_token_id", "image_grid_thw", "pixel_values"),
    ("video", "video_token_id", "video_grid_thw", "pixel_values_videos"),
)
IMAGE_TOKEN, VIDEO_TOKEN = 151_655, 151_656  # placeholders, where config.json names none
INPUTS = (*TEXTS, *(name for kind in KINDS for name in kind[2:]))


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig; the text's options are flat on the hub, and nested as transformers 5 writes them."""
    nested, tower = get(config, "text_config", dict, {}), get(config, "vision_config", dict, {})
    text = {**config, **nested}
    only(text, use_sliding_window=False)
    parameters = {
        "rope_theta": get(text, "rope_theta", float, 1e6),
        **get(text, "rope_parameters", dict, {}),
        **get(text, "rope_scaling", dict, {}),
    }
    kind = parameters.get("rope_type", parameters.get("type"))
    parameters["rope_type"] = "default" if kind in (None, "mrope") else kind
    tied = any(get(part, "tie_word_embeddings", bool, False) for part in (config, nested))
    plain = {"rope_parameters": None, "rope_scaling": None, "tie_word_embeddings": tied}
    model = qwen2.read(text | plain)
    return dataclasses.replace(
        model,
        **read_parameters(text, parameters),
        rope_sections=tuple(get(parameters, "mrope_section", list)),
        fusion="merge",
        vision=_read_vision(tower, model.embed_dim, get(config, "image_token_id", int, IMAGE_TOKEN)),
    ).resolved()


def _read_vision(tower: dict[str, Any], text_dim: int, image_token: int) -> VisionConfig:
    if get(tower, "hidden_size", int, 3584) != text_dim:
        raise UserError(f"config.json: vision_config.hidden_size: must be the text's hidden_size={text_dim}")
    width, patch = get(tower, "embed_dim", int, 1280), get(tower, "patch_size", int, 14)
    merged = get(tower, "spatial_merge_size", int, 2)
    only(tower, rope_theta=1e4)
    return VisionConfig(
        encoder="vit",
        image_size=8 * merged * patch,  # Any would do: images have the size that they have.
        channels=get(tower, "in_channels", int, get(tower, "in_chans", int, 3)),
        normalization="clip",
        patch_size=patch,
        temporal_patch=get(tower, "temporal_patch_size", int, 2),
        layers=get(tower, "depth", int, 32),
        embed_dim=width,
        heads=get(tower, "num_heads", int, 16),
        mlp_dim=int(width * get(tower, "mlp_ratio", (int, float), 4)),
        activation=choice(tower, "hidden_act", TOWER_ACTIVATIONS, "quick_gelu"),
        norm_eps=1e-6,
        init="normal",
        positions="rope",
        rope_theta=get(get(tower, "rope_parameters", dict, {}), "rope_theta", float, 1e4),
        patch_bias=False,
        final_norm=False,
        connector="merger",
        connector_factor=merged,
        connector_dim=width * merged**2,
        connector_eps=1e-6,
        image_token=image_token,
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json, the text's options nested."""
    vision = model.vision
    rope = write_parameters(model) | {"mrope_section": list(model.rope_sections)}
    ratio = vision.mlp_dim / vision.embed_dim
    placeholder = {"image_token_id": vision.image_token} if vision.image_token >= 0 else {}
    return placeholder | {
        "tie_word_embeddings": model.tied_head,
        "text_config": qwen2.write(model)
        | {
            "model_type": "qwen2_vl_text",
            "rope_parameters": rope,
            "rope_theta": model.rope_theta,
            "rope_scaling": rope,
        },
        "vision_config": {
            "model_type": "qwen2_vl_vision",
            "depth": vision.layers,
            "embed_dim": vision.embed_dim,
            "hidden_act": word(TOWER_ACTIVATIONS, vision.activation),
            "hidden_size": model.embed_dim,
            "in_channels": vision.channels,
            "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
            "num_heads": vision.heads,
            "patch_size": vision.patch_size,
            "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
            "spatial_merge_size": vision.connector_factor,
            "temporal_patch_size": vision.temporal_patch,
        },
    }


def run(
    config: ModelConfig, weights: Weights, inputs: dict[str, np.ndarray], new_tokens: int, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """As `model.families.causal.run`, without position_ids, and where there are images or videos

    position_ids [3, B, T] and rope_deltas [B, 1], image_features [merged patches, D] and video_features.

    Args:
      inputs: beside the text's, pixel_values [P, channels * frames * rows * columns of a patch] floats, normalised,
        and image_grid_thw [I, 3] integers: frame pairs, rows and columns of patches of each image; pixel_values_videos
        and video_grid_thw; mm_token_type_ids [B, T], 1 at placeholders of images, 2 of videos, which may be left out.
      options: config.json, for the placeholder `video_token_id` too.

    Raises UserError for another name, shape or type, and where grids, patches and placeholders do not fit.
    """
    arrays = checked(config, inputs, options)
    compute = jax.jit(functools.partial(outputs, config))
    found = {name: np.asarray(value) for name, value in compute(weights, arrays).items()}
    if new_tokens:
        ends = filled(options, options.get("text_config") or {})  # Of what the model does not say its text may.
        found["sequences"] = greedy(config, weights, arrays, new_tokens, ends)
    return found


def checked(config: ModelConfig, inputs: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, Any]:
    """The text's arrays, and with images `images`, `positions` [B, T, 3], `deltas` [B] and `of_image`, `of_video`.

    The last two are [n, 2] int32, row and number of the vectors of each placeholder. Raises UserError as `run`.
    """
    named(inputs, INPUTS)
    arrays = causal.integers(config, {name: inputs[name] for name in TEXTS if name in inputs})
    tokens, types = arrays["input_ids"], arrays.pop("mm_token_type_ids", None)
    kinds = np.zeros_like(tokens)  # [B, T]: 0 text, 1 image, 2 video
    grids, patches = [], []
    for number, (kind, option, grid_name, pixels_name) in enumerate(KINDS, start=1):
        grids.append(_grids(config, inputs, grid_name))
        patches.append(_patches(config, inputs, pixels_name, grid_name, grids[-1]))
        token = config.vision.image_token if kind == "image" else get(options, option, int, VIDEO_TOKEN)
        here = tokens == token
        vectors = int(grids[-1].prod(1).sum()) // config.vision.connector_factor**2
        if here.sum() != vectors:
            raise UserError(
                f"inputs: input_ids has {here.sum()} placeholders of {kind}s ({option}={token}), and {grid_name} gives "
                f"{vectors} vectors for them"
            )
        kinds[here] = number
    if types is not None and not np.array_equal(types, kinds):
        raise UserError("inputs: mm_token_type_ids: must be 1 at placeholders of images, 2 of videos, 0 elsewhere")
    if not kinds.any():
        return arrays
    mask = arrays.get("attention_mask", np.ones_like(tokens)) != 0
    if kinds[~mask].any():
        raise UserError("inputs: attention_mask: must not be 0 at a placeholder")
    turned, deltas = positions(kinds, mask, *grids, config.vision.connector_factor)
    images = packed(kinds, grids, patches, config.vision.connector_factor)
    found = {"images": images, "positions": turned, "deltas": deltas}
    for number, (kind, *_) in enumerate(KINDS, start=1):
        if len(grids[number - 1]):
            rows, columns = np.nonzero(kinds == number)
            found[f"of_{kind}"] = np.stack([rows, images.slots[rows, columns]], -1).astype(np.int32)
    return arrays | found


def _grids(config: ModelConfig, inputs: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The grids [n, 3] int32 of that name, none where there are none. Raises UserError for what is no grid."""
    array, merged = inputs.get(name, np.zeros((0, 3), np.int32)), config.vision.connector_factor
    if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "iu":
        raise UserError(f"inputs: {name} is {array.dtype}{list(array.shape)}; must be integers [images, 3]")
    if len(array) and (array.min() < 1 or (array[:, 1:] % merged).any()):
        raise UserError(
            f"inputs: {name}={array.tolist()}: frame pairs, rows and columns of patches must be at least 1, and the "
            f"latter multiples of {merged}"
        )
    return array.astype(np.int32)


def _patches(
    config: ModelConfig, inputs: dict[str, np.ndarray], name: str, grid_name: str, grids: np.ndarray
) -> np.ndarray:
    """The patches of that name, [P, frames, rows, columns, channels] float32. Raises UserError where grids differ."""
    vision = config.vision
    shape = (vision.channels, vision.temporal_patch, vision.patch_size, vision.patch_size)
    wanted = (int(grids.prod(1).sum()), int(np.prod(shape)))
    array = inputs.get(name, np.zeros((0, wanted[1]), np.float32))
    if array.shape != wanted or array.dtype.kind != "f":
        raise UserError(
            f"inputs: {name} is {array.dtype}{list(array.shape)}; for {grid_name}={grids.tolist()} it must be floats "
            f"{list(wanted)}: patches of {' x '.join(map(str, shape))} numbers"
        )
    return array.reshape(-1, *shape).transpose(0, 2, 3, 4, 1).astype(np.float32)


def _runs(kinds: np.ndarray) -> Iterator[tuple[int, slice]]:
    """The runs of equal kinds [T]: kind and place of each."""
    start = 0
    for kind, run in itertools.groupby(kinds.tolist()):
        end = start + len(list(run))
        yield kind, slice(start, end)
        start = end


def positions(
    kinds: np.ndarray, mask: np.ndarray, image_grids: np.ndarray, video_grids: np.ndarray, merged: int
) -> tuple[np.ndarray, np.ndarray]:
    """Time, row and column that every token is turned by (`model.positions.sections.turns`), [B, T, 3] int32, and the
    deltas [B] int32: generated tokens are turned by their number in the row plus the delta.

    Args:
      kinds: [B, T], 0 text, 1 image, 2 video. mask: [B, T] bool, False at padding, which gets 0.
      image_grids, video_grids: [n, 3], in the order of their runs of placeholders, of which each has one of its own.
      merged: patches along a side that are one token.

    Raises UserError where a run is longer or shorter than its grid.
    """
    grids = {1: iter(image_grids.tolist()), 2: iter(video_grids.tolist())}
    found, deltas = np.zeros((*kinds.shape, 3), np.int32), np.zeros(len(kinds), np.int32)
    for row, there in enumerate(mask):
        runs: list[int | tuple[int, int, int]] = []
        for kind, place in _runs(kinds[row][there]):
            length = place.stop - place.start
            if not kind:
                runs.append(length)
                continue
            t, h, w = next(grids[kind], (0, 0, 0))
            if t * h * w != length * merged**2:
                name, _, grid_name, _ = KINDS[kind - 1]
                raise UserError(
                    f"inputs: input_ids: row {row} has a run of {length} placeholders of {name}s, and the next of "
                    f"{grid_name}, {[t, h, w]}, gives {t * h * w // merged**2} vectors; two need a token between"
                )
            runs.append((t, h // merged, w // merged))
        found[row, there] = turned = turns(runs)
        deltas[row] = shift(turned)
    return found, deltas


def packed(kinds: np.ndarray, grids: list[np.ndarray], patches: list[np.ndarray], merged: int) -> Images:
    """The images and videos of each row side by side, every frame pair a segment of its own; arguments as `positions`.

    patches: [P, frames, rows, columns, channels] of images and of videos.
    """
    left = [
        (iter(of.tolist()), iter(np.split(array, of.prod(1).cumsum())))
        for of, array in zip(grids, patches, strict=True)
    ]
    rows = []
    for row in kinds:
        parts = [(patches[0][:0], np.zeros(0, np.int32), np.zeros((0, 2), np.int32))]
        count = 0
        for kind, _ in _runs(row):
            if not kind:
                continue
            (t, h, w), array = (next(part) for part in left[kind - 1])
            blocks = np.indices((h, w)).reshape(2, h // merged, merged, w // merged, merged)
            places = blocks.transpose(1, 3, 2, 4, 0).reshape(-1, 2)  # [h w, 2]
            parts.append((array, count + 1 + np.repeat(np.arange(t), h * w), np.tile(places, (t, 1))))
            count += t
        rows.append([np.concatenate(arrays) for arrays in zip(*parts, strict=True)])
    most = max(len(segments) for _, segments, _ in rows)
    pixels, segments, places = (
        np.stack([np.concatenate([a, np.zeros((most - len(a), *a.shape[1:]), a.dtype)]) for a in arrays])
        for arrays in zip(*rows, strict=True)
    )
    seen = np.zeros_like(kinds)
    slots = np.where(kinds > 0, np.cumsum(kinds > 0, axis=1) - 1, -1).astype(np.int32)
    return Images(pixels, segments.astype(np.int32), slots, seen, seen, places.astype(np.int32))


def outputs(config: ModelConfig, weights: Weights, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """As `run`, of checked inputs, to be compiled."""
    model = bind(build(config)[0], weights)
    images, found = inputs.get("images"), {}
    if images is not None:
        vectors = model.vision(images).hidden.astype(jnp.float32)
        at = {f"{kind}_features": inputs[f"of_{kind}"] for kind, *_ in KINDS if f"of_{kind}" in inputs}
        found = {name: vectors[of[:, 0], of[:, 1]] for name, of in at.items()}
        found |= {
            "position_ids": jnp.moveaxis(jnp.asarray(inputs["positions"]), -1, 0),
            "rope_deltas": jnp.asarray(inputs["deltas"])[:, None],
        }
    place, keys = causal.places(inputs)
    hidden, _ = model(inputs["input_ids"], place, keys=keys, positions=inputs.get("positions"), images=images)
    return found | causal.described(model, hidden, inputs)


def greedy(
    config: ModelConfig, weights: Weights, inputs: dict[str, Any], new_tokens: int, options: dict[str, Any]
) -> np.ndarray:
    """As `model.families.causal.greedy`, of checked inputs."""
    sight = Sight()
    if "images" in inputs:
        lengths, images = causal.prompt_lengths(inputs, options), inputs["images"]
        images = images._replace(slots=causal.moved(images.slots, lengths, -1))
        sight = Sight(images, causal.moved(inputs["positions"], lengths, 0), inputs["deltas"])
    return causal.greedy(config, weights, inputs, new_tokens, options, sight)


FAMILY = Family(
    architectures=("Qwen2VLForConditionalGeneration",),
    model_type="qwen2_vl",
    paper="arXiv:2409.12191",
    table=TABLE,
    read=read,
    write=write,
    run=run,
    prefix="",
    ignored=rf"{llama.FAMILY.ignored}|visual\.rotary_pos_emb\.inv_freq",
    objective="conversation",
    image_processor="Qwen2VL",
)
