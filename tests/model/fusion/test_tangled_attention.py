"""ActBERT's tangled block (arXiv:2011.07231, section 3.2) in plain float64, as its text and as its code have it.

Legend: B rows, T tokens, S regions, N actions, H heads, K head_dim.
"""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from model.config import ModelConfig, VisionConfig
from model.fusion.tangled_attention import Streams, TangledConnection
from model.place import Place
from model.weights import bind
from tests.model import float64

TEXT, WIDTH, HEADS, INNER = 8, 6, 2, 10
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]], np.int32)
GIVEN = np.array([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32)
SEEN = np.array([[0, 1, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2]], np.int32)  # images of the row up to a token
IMAGES = np.array([[1, 2, 0], [1, 1, 0]], np.int32)  # segments of three images, the last absent
NUMBERS = np.array([[0, 1, 2], [0, 1, 2]], np.int32)


def connected(variant: str, post: bool, qk_norm: bool) -> ModelConfig:
    vision = {"image_size": 8, "patch_size": 4, "embed_dim": WIDTH, "heads": 2, "mlp_dim": 7, "connector": "none"}
    vision |= {"connection_heads": HEADS, "connection_dim": INNER, "tangled": variant, "qk_norm": qk_norm}
    text = {"embed_dim": TEXT, "heads": 2, "mlp_dim": 9, "norm_eps": 1e-2, "activation": "gelu"}
    order = {"norm_order": "post" if post else "pre"}
    config = ModelConfig(fusion="tangled", layers=2, **text, **order, vision=VisionConfig(encoder="vit", **vision))
    return config.resolved().placed("cpu", "float32")


def block(w: dict, text: np.ndarray, regions: np.ndarray, actions: np.ndarray, variant: str, post: bool) -> list:
    """The three streams after the block; every mask and every `up` by a loop."""
    streams = {"text": text, "regions": regions, "actions": actions}
    q, k, v = {}, {}, {}
    for name, x in streams.items():
        x = x if post else float64.norm(x, w[name]["attention_norm"], 1e-2)
        own = w[f"of_{name}"]
        q[name], k[name], v[name] = (float64.linear(x, own[part]) for part in ("query", "key", "value"))
        if "query_norm" in own:
            q[name] = float64.norm(q[name], own["query_norm"], 1e-2, "rmsnorm")
            k[name] = float64.norm(k[name], own["key_norm"], 1e-2, "rmsnorm")
    of_region, number = (np.repeat(a, regions.shape[1] // 3, 1) for a in (IMAGES, NUMBERS))
    of_action, at = (np.repeat(a, actions.shape[1] // 3, 1) for a in (IMAGES, NUMBERS))

    def before(segments: np.ndarray, last: np.ndarray, of: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """[B, Q, K]: of the same text, and no later than the last image seen."""
        return (segments[:, :, None] == of[:, None]) & (last[:, :, None] >= numbers[:, None])

    c_r = float64.attention(q["actions"], k["regions"], v["regions"], before(of_action, at, of_region, number))
    sees_text = (of_action[:, :, None] == SEGMENTS[:, None]) & (GIVEN[:, None] > 0)
    c_w = float64.attention(q["actions"], k["text"], v["text"], sees_text)
    w1, w2 = (float64.linear(c_r, w[name], 2) for name in ("text_keys", "text_values"))
    w3, w4 = (float64.linear(c_w, w[name], 2) for name in ("region_keys", "region_values"))
    masks = {
        "text": (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (POSITIONS[:, :, None] >= POSITIONS[:, None]),
        "regions": before(of_region, number, of_region, number),
        "actions": before(of_action, at, of_action, at),
    }
    for name, keys, values, segments, last in (
        ("text", w1, w2, SEGMENTS, SEEN - 1),
        ("regions", w3, w4, of_region, number),
    ):
        if variant == "paper":
            k[name], v[name] = np.concatenate([k[name], keys], 1), np.concatenate([v[name], values], 1)
            masks[name] = np.concatenate([masks[name], before(segments, last, of_action, at)], 2)
        elif name == "regions":
            for b, s in np.ndindex(segments.shape):
                nearest = math.floor(s * (actions.shape[1] / regions.shape[1]))
                k[name][b, s] += keys[b, nearest]
                v[name][b, s] += values[b, nearest]
        else:
            for b, t in np.ndindex(segments.shape):
                if last[b, t] >= 0 and segments[b, t] == IMAGES[b, last[b, t]]:
                    k[name][b, t] += keys[b, at[b] == last[b, t]].mean(0)
                    v[name][b, t] += values[b, at[b] == last[b, t]].mean(0)
    out = []
    for name, x in streams.items():
        h = x + float64.linear(float64.attention(q[name], k[name], v[name], masks[name]), w[f"of_{name}"]["out"], 2)
        first, second = (w[name][norm] for norm in ("attention_norm", "mlp_norm"))
        h = float64.norm(h, first, 1e-2) if post else h
        h = h + float64.mlp(h if post else float64.norm(h, second, 1e-2), w[name]["mlp"], "gelu")
        out.append(float64.norm(h, second, 1e-2) if post else h)
    return out


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize(
    ("post", "qk_norm", "actions"), [(True, False, 1), (False, False, 2), (False, True, 1), (True, True, 4)]
)
def test_a_tangled_block_is_that_of_its_text_or_its_code(variant, post, qk_norm, actions):
    graphdef, weights = float64.drawn(connected(variant, post, qk_norm), TangledConnection)
    rng = np.random.default_rng(0)
    text, *others = (
        rng.normal(size=(2, n, c)).astype(np.float32) for n, c in ((6, TEXT), (12, WIDTH), (3 * actions, TEXT))
    )
    of_regions, of_actions = (Place(*(np.repeat(a, n, 1) for a in (IMAGES, NUMBERS))) for n in (4, actions))
    streams = Streams(others[0], of_regions, others[1], of_actions)
    place, seen = Place(SEGMENTS, POSITIONS), Place(SEGMENTS, SEEN - 1)
    run = jax.jit(lambda w: bind(graphdef, w)(text, place, None, seen, GIVEN, streams, None)[:2])
    found, after = run(weights)
    exact = (a.astype(np.float64) for a in (text, *others))
    wanted = block(float64.exactly(weights), *exact, variant, post)
    there = (SEGMENTS > 0, of_regions.segments > 0, of_actions.segments > 0)
    for mine, reference, real in zip((found, after.regions, after.actions), wanted, there, strict=True):
        np.testing.assert_allclose(np.asarray(mine)[real], reference[real], rtol=0, atol=3e-5)
