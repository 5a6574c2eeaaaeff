"""ViLBERT's connection (arXiv:1908.02265, section 3.1) in plain numpy and float64.

    y_t = LN(x_t + W MHA(Q_t, K_v, V_v)),  z_t = LN(y_t + FFN y_t)  of the text; of the images with t and v exchanged

Legend: B rows, T tokens, S image vectors.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from model.attention.cross_attention import Source
from model.config import ModelConfig, VisionConfig
from model.fusion.co_attention import CoConnection
from model.fusion.streams import Streams
from model.place import Place
from model.weights import bind
from tests.model import float64

TEXT, WIDTH, HEADS, INNER = 8, 6, 2, 10


def connected(post: bool, norm: str, qk_norm: bool) -> ModelConfig:
    vision = {"image_size": 8, "patch_size": 4, "embed_dim": WIDTH, "heads": 2, "mlp_dim": 7, "connector": "none"}
    vision |= {"connection_heads": HEADS, "connection_dim": INNER, "qk_norm": qk_norm}
    text = {"embed_dim": TEXT, "heads": 2, "mlp_dim": 9, "norm": norm, "norm_eps": 1e-2, "activation": "gelu"}
    order = {"norm_order": "post" if post else "pre"}
    config = ModelConfig(fusion="co", layers=2, **text, **order, vision=VisionConfig(encoder="vit", **vision))
    return config.resolved().placed("cpu", "float32")


def side(x: np.ndarray, y: np.ndarray, w: dict, attention: dict, mask: np.ndarray, post: bool, norm: str) -> np.ndarray:
    """One stream x, which looks at y."""
    a, b = (lambda h, name=name: float64.norm(h, w[name], 1e-2, norm) for name in ("attention_norm", "mlp_norm"))
    if post:
        h = a(x + float64.cross(x, y, attention, mask, eps=1e-2))
        return b(h + float64.mlp(h, w["mlp"], "gelu"))
    h = x + float64.cross(a(x), y, attention, mask, eps=1e-2)
    return h + float64.mlp(b(h), w["mlp"], "gelu")


@pytest.mark.parametrize(
    ("post", "norm", "qk_norm"), [(True, "layernorm", False), (False, "rmsnorm", False), (False, "rmsnorm", True)]
)
def test_a_connection_is_that_of_the_paper(post, norm, qk_norm):
    config = connected(post, norm, qk_norm)
    graphdef, weights = float64.drawn(config, CoConnection)
    rng = np.random.default_rng(0)
    h, v = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 6, TEXT), (2, 5, WIDTH)))
    segments = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]], np.int32)
    given = np.array([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32)
    seen = np.array([[0, 1, 1, 1, 2, 2], [1, 1, 2, 2, 2, 2]], np.int32)
    of_image = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 0]], np.int32)
    number = np.array([[0, 0, 1, 1, 2], [0, 0, 1, 1, 2]], np.int32)
    place = Place(segments, np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]], np.int32))
    source = Source(v, Place(of_image, number), Place(segments, seen - 1))
    run = jax.jit(lambda w: bind(graphdef, w)(h, place, given, source, None)[:2])
    text, images = run(weights)

    same = segments[:, :, None] == of_image[:, None]
    sees_image = same & (number[:, None] < seen[:, :, None])
    sees_text = same.swapaxes(1, 2) & (given[:, None] > 0)
    w = float64.exactly(weights)
    x, y = h.astype(np.float64), v.astype(np.float64)
    read = (
        (x, y)
        if post
        else tuple(float64.norm(a, w[name]["attention_norm"], 1e-2, norm) for a, name in ((x, "text"), (y, "images")))
    )
    wanted = side(x, read[1], w["text"], w["text_attention"], sees_image, post, norm)
    wanted_images = side(y, read[0], w["images"], w["image_attention"], sees_text, post, norm)
    np.testing.assert_allclose(text[segments > 0], wanted[segments > 0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(images[of_image > 0], wanted_images[of_image > 0], rtol=0, atol=2e-5)
    assert w["text_attention"]["query"]["kernel"].shape == (TEXT, HEADS, INNER // HEADS)


@pytest.mark.parametrize("fusion", ["co", "tangled"])
def test_images_are_told_apart_by_number_on_accelerators_too(fusion):
    """Vectors of an image share a position: kernels that take positions to rise by one would hide some of them."""
    config = dataclasses.replace(connected(False, "layernorm", True), fusion=fusion, platform="tpu", attention="splash")
    streams = nnx.eval_shape(lambda: Streams(config, nnx.Rngs(0)))
    assert streams.images_0.attention.rules.kind == "plain"
