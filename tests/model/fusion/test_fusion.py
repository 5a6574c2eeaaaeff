"""Images in the text, for every fusion: what may influence what, generation, packing, masks, gates, errors.

A document is written as a string: t a given token, a one to be answered, I an image. Where images are merged, an image
takes as many tokens as it has vectors, elsewhere one.

Legend: B rows, T tokens, N images of a row, S image vectors.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from model import kinds
from model.attention.cache import empty_cache
from model.attention.cross_attention import CrossAttention, Source
from model.attention.ring_attention import zigzag
from model.config import ModelConfig, VisionConfig
from model.generate.prefill import Sight, advance, prefill
from model.place import Place, visible
from model.positions import alibi
from model.transformer import Transformer
from model.vision.images import Images
from model.weights import bind
from tests.model import float64
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.config import MeshConfig

TOKENS, IMAGES, VOCAB = 24, 3, 11
SHAPE = {"vocab_size": VOCAB, "layers": 2, "embed_dim": 8, "heads": 2, "mlp_dim": 12, "layer_loop": "unroll"}
EYE = {"encoder": "vit", "image_size": 4, "patch_size": 2, "layers": 1, "embed_dim": 8, "heads": 2, "mlp_dim": 8}

CASES = {
    "merge": {"image_positions": 3, "norm": "rmsnorm", "experts": 2, "experts_per_token": 1, "mlp_bias": False},
    "merge-prefix": {"mask": "prefix", "connector": "pixel_shuffle", "layer_loop": "scan", "positions": "alibi"},
    "merge-images": {"mask": "images", "pattern": ("local", "global"), "window": 3, "qk_norm": True},
    "cross": {"every": 2, "connector": "perceiver", "latents": 2, "connector_head_dim": 4, "gate_per_channel": True},
    "cross-last": {"sees": "last", "layer_loop": "scan", "qk_norm_images": True, "norm_order": "post"},
    "co": {"layers": 3, "positions": "learned", "layer_loop": "scan", "image_positions": 3},
    "tangled": {"layer_loop": "scan"},
    "tangled-paper": {"tangled": "paper", "actions": 2, "norm_order": "post", "connector": "mlp"},
}


def configured(fusion: str, **fields: Any) -> ModelConfig:
    """A tiny model; each field goes where it belongs."""
    own = {field.name for field in dataclasses.fields(VisionConfig)} - {
        field.name for field in dataclasses.fields(ModelConfig)
    }
    vision = EYE | {"connector_heads": 2, "connector_layers": 1}
    vision |= {"connection_heads": 2} if fusion in ("co", "tangled") else {}
    vision |= {name: fields.pop(name) for name in tuple(fields) if name in own}
    vision["qk_norm"] = fields.pop("qk_norm_images", False)
    config = ModelConfig(**SHAPE | fields, fusion=fusion, vision=VisionConfig(**vision))
    return config.resolved().placed("cpu", "float32")


class Model(NamedTuple):
    """A config, weights, and what is compiled once."""

    config: ModelConfig
    weights: Any
    hidden: Any  # (weights, tokens, place, images) -> final hidden states [B, T, D]
    prefill: Any  # (tokens, place, images) -> hidden states, cache
    step: Any  # (tokens, place, cache, source) -> hidden states, cache


def made(config: ModelConfig) -> Model:
    graphdef, weights = float64.drawn(config, Transformer)
    model = bind(graphdef, weights)

    @jax.jit
    def hidden(weights: Any, tokens: Any, place: Place, images: Images | None) -> jax.Array:
        return bind(graphdef, weights)(tokens, place, images=images)[0]

    @jax.jit
    def prefill(tokens: Any, place: Place, images: Images) -> Any:
        return model(tokens, place, empty_cache(config, len(tokens), TOKENS), images=images)

    @jax.jit
    def step(tokens: Any, place: Place, cache: Any, source: Source) -> Any:
        return model(tokens, place, cache, source=source)

    return Model(config, weights, hidden, prefill, step)


@functools.cache
def case(name: str) -> Model:
    return made(configured(name.partition("-")[0], **CASES[name]))


every_case = pytest.mark.parametrize("name", CASES)


def laid_out(config: ModelConfig, rows: list[list[str]], seed: int = 0) -> tuple[np.ndarray, Place, Images]:
    """Rows of documents, padded to TOKENS: random tokens, their place, IMAGES images each, of which some are absent."""
    rng, merge = np.random.default_rng(seed), config.fusion == "merge"
    each = config.vision.vectors
    tokens = rng.integers(0, VOCAB, (len(rows), TOKENS)).astype(np.int32)
    segments, positions, seen, given = (np.zeros(tokens.shape, np.int32) for _ in range(4))
    slots, of_images = np.full(tokens.shape, -1, np.int32), np.zeros((len(rows), IMAGES), np.int32)
    for b, documents in enumerate(rows):
        at, image = 0, 0
        for segment, document in enumerate(documents, 1):
            start = at
            for letter in document:
                size = each if merge and letter == "I" else 1
                here = slice(at, at + size)
                if letter == "I":
                    of_images[b, image] = segment
                    slots[b, here] = image * each + np.arange(size) if merge else -1
                    image += 1
                given[b, here], at = letter != "a", at + size
                seen[b, at - size :] = image
            assert at <= TOKENS, "too long"
            segments[b, start:at], positions[b, start:at] = segment, np.arange(at - start)
        positions[b, at:] = np.arange(TOKENS - at)
    pixels = rng.integers(0, 256, (len(rows), IMAGES, 4, 4, 3)).astype(np.uint8)
    return tokens, Place(segments, positions), Images(pixels, of_images, slots, seen, given)


def differ(a: Any, b: Any) -> np.ndarray:
    """[B, T] bool: where hidden states are not the same."""
    return np.abs(np.asarray(a) - np.asarray(b)).max(-1) > 1e-6


def close(a: Any, b: Any) -> None:
    """Two computations of the same numbers, in another order."""
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def places_of(letter: str, config: ModelConfig, document: str) -> list[int]:
    """Where in a row that begins with `document` its letters are; of an image's tokens the first."""
    size = config.vision.vectors if config.fusion == "merge" else 1
    widths = [size if other == "I" else 1 for other in document]
    return [sum(widths[:i]) for i, other in enumerate(document) if other == letter]


# What may influence what

TURNS = "tIttaattaaIta"  # two answers, a question between them, and an image after the second


@every_case
def test_what_is_to_be_answered_influences_nothing_before_it(name):
    """Neither by itself nor through the images, nor through a question that comes after it."""
    model = case(name)
    tokens, place, images = laid_out(model.config, [[TURNS], ["Ita", "ttaIta"]])
    before = model.hidden(model.weights, tokens, place, images)
    for at in places_of("a", model.config, TURNS):
        changed = tokens.copy()
        changed[0, at] = (changed[0, at] + 1) % VOCAB
        found = differ(model.hidden(model.weights, changed, place, images), before)
        assert not found[0, :at].any(), at
        assert found[0, at]
        assert not found[1].any()


@every_case
def test_a_later_image_influences_nothing_before_it(name):
    """Where images look at what is given, that holds of what comes from the first answer on."""
    model, both_ways = case(name), "prefix" in name or name.startswith(("co", "tangled"))
    documents = ["tIttaaItaIa"] if both_ways else ["tIttIttaIa"]
    tokens, place, images = laid_out(model.config, [documents, []])
    before = model.hidden(model.weights, tokens, place, images)
    for number, at in enumerate(places_of("I", model.config, documents[0])):
        changed = images.pixels.copy()
        changed[0, number] = 255 - changed[0, number]
        found = differ(model.hidden(model.weights, tokens, place, images._replace(pixels=changed)), before)
        assert found[0, at + 1]
        assert not (found[0, :at].any() and number), number


@every_case
def test_an_absent_image_influences_nothing(name):
    model = case(name)
    tokens, place, images = laid_out(model.config, [["tIta", "Itta"], ["taa"]])
    changed = images.pixels.copy()
    changed[0, 2], changed[1] = 255 - changed[0, 2], 255 - changed[1]
    found, before = (
        model.hidden(model.weights, tokens, place, images._replace(pixels=x)) for x in (changed, images.pixels)
    )
    real = place.segments > 0
    np.testing.assert_array_equal(found[real], before[real])


@every_case
def test_a_row_without_images_is_that_of_the_model_without_images(name):
    model = case(name)
    tokens, place, images = laid_out(model.config, [["tItta"], ["tttttaaaa", "tta"]])
    found = model.hidden(model.weights, tokens, place, images)
    if "prefix" in name:  # Without images nothing is given, and the mask is causal.
        images = images._replace(given=np.zeros_like(images.given))
        found = model.hidden(model.weights, tokens, place, images)
    alone = model.hidden(model.weights, tokens, place, None)
    real = place.segments[1] > 0
    close(found[1, real], alone[1, real])


@every_case
def test_documents_packed_in_a_row_are_what_each_is_alone(name):
    model = case(name)
    documents = ["tIta", "tttaa", "IItta"]
    row = laid_out(model.config, [documents, []])
    together = model.hidden(model.weights, *row)
    at, image = 0, 0
    for document in documents:
        tokens, place, images = laid_out(model.config, [[document], []])
        length, count = int((place.segments > 0).sum()), document.count("I")
        tokens[0, :length] = row[0][0, at : at + length]
        pixels = np.zeros_like(images.pixels)
        pixels[0, :count] = row[2].pixels[0, image : image + count]
        alone = model.hidden(model.weights, tokens, place, images._replace(pixels=pixels))
        close(together[0, at : at + length], alone[0, :length])
        at, image = at + length, image + count


# Generation


def generated(model: Model, prompts: list[str], answers: int) -> None:
    """Hidden states of every token, read one by one after prompts of several lengths, are those of one pass."""
    config = model.config
    tokens, place, images = laid_out(config, [[prompt + "a" * answers] for prompt in prompts])
    whole = model.hidden(model.weights, tokens, place, images)
    ends = np.array([places_of("a", config, prompt + "a" * answers)[-answers] for prompt in prompts])
    width = int(ends.max())
    order = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), tokens.shape)
    prompt = (order < ends[:, None]).astype(np.int32)
    slots, seen, asked = np.where(prompt, images.slots, -1), images.seen * prompt, images.given * prompt
    row = jax.tree.map(lambda a: a[:, :width], (tokens, Place(prompt, order), (slots, seen, asked)))
    hidden, cache = model.prefill(*row[:2], Images(images.pixels, images.segments, *row[2]))
    for b, end in enumerate(ends):
        close(hidden[b, :end], whole[b, :end])
    count = np.array([[prompt.count("I")] for prompt in prompts], np.int32)
    numbers = np.arange(IMAGES, dtype=np.int32) + 0 * images.segments
    vectors = Place(*(np.repeat(a, config.vision.vectors, 1) for a in (images.segments, numbers)))
    ones = np.ones_like(count)
    source = Source(None, vectors, Place(ones, count - 1))
    rows = np.arange(len(prompts))
    for i in range(answers):
        at = (ends + i)[:, None].astype(np.int32)
        hidden, cache = model.step(np.take_along_axis(tokens, at, 1), Place(ones, at), cache, source)
        close(hidden[:, 0], whole[rows, at[:, 0]])


@every_case
def test_generation_with_a_cache_is_a_pass_over_all(name):
    generated(case(name), ["tItt", "IIttatt"], 4)


@pytest.mark.parametrize("name", ["merge", "merge-prefix", "cross", "cross-last", "co", "tangled"])
def test_prompts_with_images_read_in_parts_are_those_read_at_once(name):
    config, weights = case(name)[:2]
    model = bind(kinds.build(config)[0], weights)
    tokens, place, images = laid_out(config, [["tItIt"], ["IItttt"]])
    lengths = place.segments.sum(1)

    def read(chunk: int) -> Any:
        cache, logits, source = prefill(model, config, tokens, lengths, TOKENS, Sight(images), chunk)
        return logits, advance(model, cache, np.array([3, 4], np.int32), lengths, source)[1]

    found, wanted = jax.jit(lambda: (read(5), read(TOKENS)))()
    for x, y in zip(found, wanted, strict=True):
        close(x, y)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Tiny models of every fusion over what changes how they are computed."""
    fusion = draw(st.sampled_from(["merge", "cross", "co", "tangled"]))
    pattern = draw(st.sampled_from([("global",), ("local", "global"), ("linear", "global")]))
    connections = draw(st.sampled_from([1, 2]))
    connector = draw(st.sampled_from(["linear", "mlp", "perceiver", "average_pool", "merger"]))
    fields: dict[str, Any] = {
        "pattern": pattern,
        "window": 3,
        "layers": len(pattern) * connections,
        "kv_heads": draw(st.sampled_from([1, 2])),
        "positions": draw(st.sampled_from(["rope", "learned", "sinusoidal", "alibi", "none"])),
        "norm_order": draw(st.sampled_from(["pre", "post", "sandwich", "reordered"])),
        "norm": draw(st.sampled_from(["layernorm", "rmsnorm"])),
        "activation": draw(st.sampled_from(["gelu", "swiglu"])),
        "attention": draw(st.sampled_from(["plain", "chunked"])),
        "layer_loop": draw(st.sampled_from(["scan", "unroll"])),
        "connector": connector,
        "latents": 2,
        "image_positions": draw(st.sampled_from([0, 3])),
    }
    if fusion in ("co", "tangled"):
        fields["connections"] = connections
    if fusion == "tangled":
        fields["tangled"] = draw(st.sampled_from(["code", "paper"]))
        fields["actions"] = 1 if connector in ("average_pool", "merger") else draw(st.sampled_from([1, 2]))
    if fusion == "merge":
        fields["mask"] = draw(st.sampled_from(["causal", "prefix", "images"]))
    if fusion == "cross":
        fields |= {"every": draw(st.sampled_from([1, len(pattern)])), "sees": draw(st.sampled_from(["last", "all"]))}
    if draw(st.booleans()):
        fields |= {
            "experts": 2,
            "experts_per_token": 1,
            "mlp_bias": False,
            "moe_every": draw(st.sampled_from([1, len(pattern)])),
        }
    return configured(fusion, **fields)


@settings(max_examples=3, phases=[Phase.generate])
@given(configs(), st.integers(0, 9))
def test_any_model_generates_what_it_computes(config, seed):
    prompts = ["".join(np.random.default_rng([seed, b]).choice(["t", "t", "a", "I"], 6)) + "t" for b in range(2)]
    prompts = [prompt.replace("I", "t", max(0, prompt.count("I") - 2)) for prompt in prompts]
    generated(made(config), prompts, 3)


# Gates, and which images a token sees


def test_with_closed_gates_the_language_model_is_as_it_was():
    model = case("cross")
    language = dataclasses.replace(model.config, fusion="none", vision=VisionConfig())
    graphdef, _, _ = kinds.build(language)
    group = dict(model.weights["stack"]["groups"])
    gate = group.pop("gate_1")
    own = {name: part for name, part in model.weights.items() if name != "vision"} | {"stack": {"groups": group}}
    closed = gate | {name: jnp.zeros_like(gate[name]) for name in ("attention_gate", "mlp_gate")}
    weights = model.weights | {"stack": {"groups": group | {"gate_1": closed}}}
    tokens, place, images = laid_out(model.config, [["tIttaIta"], ["IttaIta", "tta"]])
    wanted = jax.jit(lambda w: bind(graphdef, w)(tokens, place)[0])(own)
    # To the rounding of two programs whose operations the compiler joins otherwise.
    np.testing.assert_allclose(model.hidden(weights, tokens, place, images), wanted, rtol=0, atol=2e-6)
    assert differ(model.hidden(model.weights, tokens, place, images), wanted)[place.segments > 0].any()
    head = [bind(g, w).head(wanted) for g, w in ((graphdef, own), (kinds.build(model.config)[0], weights))]
    np.testing.assert_array_equal(*head)


@pytest.mark.parametrize("sees", ["last", "all"])
def test_a_token_sees_the_last_image_or_all_and_before_any_nothing(sees):
    config = configured("cross", sees=sees, qk_norm=False)
    window = 1 if sees == "last" else 0
    graphdef, weights = float64.drawn(config, lambda c, rngs: CrossAttention(c, rngs, source_dim=6, window=window))
    _, place, images = laid_out(config, [["ttItItt", "ttIt"], ["ttt"]])
    each = 2
    at = Place(*(np.repeat(a, each, 1) for a in (images.segments, np.arange(IMAGES) + 0 * images.segments)))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, TOKENS, 8)), rng.normal(size=(2, IMAGES * each, 6))
    mask = np.zeros((2, TOKENS, IMAGES * each), bool)
    for b, t, s in np.ndindex(mask.shape):
        image = s // each
        before = image < images.seen[b, t] and (sees == "all" or image == images.seen[b, t] - 1)
        mask[b, t, s] = before and images.segments[b, image] == place.segments[b, t]
    source = Source(jnp.asarray(y, jnp.float32), at, images.queries(place))
    found, _ = bind(graphdef, weights)(jnp.asarray(x, jnp.float32), place, source, None, None)
    real = place.segments > 0
    close(found[real], float64.cross(x, y, float64.exactly(weights), mask)[real])
    assert not np.any(found[real & ~mask.any(-1)])
    assert (real & ~mask.any(-1)).sum() == 4 + 3


# Masks


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 3]), st.sampled_from(["causal", "prefix", "images"]))
def test_masks_are_those_of_their_words(seed, window, mask):
    config = configured("merge", mask=mask)
    rng = np.random.default_rng(seed)
    documents = ["".join(rng.choice(list("tttaaI"), 5)).replace("I", "t", 2) for _ in range(3)]
    documents = [document.replace("I", "t") if i else document[:4] + "I" for i, document in enumerate(documents)]
    _, place, images = laid_out(config, [documents])
    place = place._replace(blocks=images.blocks(mask, place))
    found = np.asarray(visible(place, place, window))[0]
    segments, positions = place.segments[0], place.positions[0]
    image = np.where(images.slots[0] >= 0, images.slots[0] // config.vision.vectors, -1)
    for q, k in np.ndindex(TOKENS, TOKENS):
        if not (segments[q] and segments[k]):
            continue
        ahead = False
        if mask == "prefix":  # Both are of the part that the document begins with and that is given.
            start = np.argmax(segments == segments[q])
            ahead = images.given[0, start : max(q, k) + 1].all()
        elif mask == "images":
            ahead = image[q] == image[k] >= 0
        distance = positions[q] - positions[k]
        wanted = segments[q] == segments[k] and (distance >= 0 or ahead) and (not window or distance < window)
        assert found[q, k] == wanted, (q, k)


def test_what_is_ahead_loses_as_much_by_alibi_as_what_is_behind():
    place = np.arange(5)[None]
    found = alibi.bias(2, place, place)
    np.testing.assert_array_equal(found, found.swapaxes(2, 3))
    assert (found <= 0).all()


# Meshes


@pytest.mark.parametrize("name", ["merge", "cross"])
def test_a_mesh_gives_the_hidden_states_of_one_device(name):
    model = case(name)
    tokens, place, images = laid_out(model.config, [["tIttaIta"], ["IttaIta", "tta"], ["tta"], ["IIta", "It"]])
    wanted = model.hidden(model.weights, tokens, place, images)
    graphdef, order = kinds.build(model.config)[0], zigzag(TOKENS, 2)
    place = Place(*(a[:, order] for a in place[:2]))
    images = images._replace(**{field: getattr(images, field)[:, order] for field in ("slots", "seen", "given")})
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2, sequence=2), jax.devices())):
        run = jax.jit(lambda w, *row, images: bind(graphdef, w)(*row, images=images)[0])
        found = np.asarray(run(model.weights, tokens[:, order], place, images=images))
    real = place.segments > 0
    close(found[real], np.asarray(wanted)[:, order][real])


# Errors

WRONG: dict[str, tuple[str, dict[str, Any]]] = {  # the field named: the fusion, the fields
    "model.vision.encoder='none': with model.fusion='co'": ("co", {"encoder": "none"}),
    "model.vision.encoder='vit': with model.fusion='none'": ("none", {}),
    "model.fusion='merge': not with model.kind='encoder'": ("merge", {"kind": "encoder"}),
    "model.fusion='contrastive': not with model.kind='encoder_decoder'": (
        "contrastive",
        {"kind": "encoder_decoder", "pool": "mean", "positions": "none"},
    ),
    "model.fusion='late': not with model.kind='decoder'; valid: encoder": ("late", {"pool": "mean"}),
    "model.head='token': model.fusion='late' needs 'pooled'": (
        "late",
        {"kind": "encoder", "head": "token", "labels": 2, "pool": "mean"},
    ),
    "model.vision.pool='none': one of class, mean": ("late", {"kind": "encoder", "head": "pooled", "labels": 2}),
    "model.vision.combine='sum': valid: concatenation, average": ("late", {"combine": "sum"}),
    "model.vision.pool='mean': only with": ("merge", {"pool": "mean"}),
    "model.vision.pool='none': one of class, mean, map": ("contrastive", {}),
    "model.vision.mask='prefix': not with memory": ("merge", {"mask": "prefix", "memory": 4}),
    "model.vision.mask='images': not with memory or 'sparse'": ("merge", {"mask": "images", "pattern": ("sparse",)}),
    "model.fusion='cross': not with a model that remembers": ("cross", {"memory": 4}),
    "model.fusion='co': not with a model that remembers": ("co", {"knn_memory": 4, "pattern": ("knn",)}),
    "model.vision.connections=3: needs as many": ("co", {"connections": 3}),
    "model.vision.connections=2: needs as many": ("tangled", {"share_layers": "all"}),
    "model.vision.connection_heads=3: does not divide": ("tangled", {"connection_heads": 3}),
    "model.vision.actions=3: does not divide the 4 vectors": ("tangled", {"actions": 3}),
    "model.pipeline_repeats=2: not with model.fusion='co'": ("co", {"pipeline_repeats": 2}),
    r"model.rope_sections=\(1, 2\): needs three": ("merge", {"rope_sections": (1, 2)}),
    r"model.rope_sections=\(1, 1, 1\): needs three": ("merge", {"rope_sections": (1, 1, 1)}),
    "model.fusion='clip': valid": ("clip", {}),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_go_together_is_named(message):
    fusion, fields = WRONG[message]
    with pytest.raises(UserError, match=f"^{message}"):
        configured(fusion, **fields)


EFFECTS = {  # of model.vision: a value that is no default, and the fusions in which it has an effect
    "mask": ("prefix", ("merge",)),
    "every": (2, ("cross",)),
    "sees": ("last", ("cross",)),
    "gate_per_channel": (True, ("cross",)),
    "qk_norm_images": (True, ("cross", "co", "tangled")),
    "connections": (1, ("co", "tangled")),
    "connection_heads": (4, ("co", "tangled")),
    "connection_dim": (16, ("co", "tangled")),
    "image_token": (3, ("merge", "cross")),
    "actions": (2, ("tangled",)),
    "tangled": ("paper", ("tangled",)),
    "similarity": ("sigmoid", ("contrastive",)),
    "projection_dim": (4, ("contrastive",)),
    "text_pool": ("last", ("contrastive",)),
    "combine": ("average", ("late",)),
}
POOLED = {"pool": "mean", "connector": "none"}
SEEING: dict[str, dict[str, Any]] = {fusion: {} for fusion in ("merge", "cross", "co", "tangled")}
SEEING |= {"late": POOLED | {"kind": "encoder", "head": "pooled", "labels": 3}}
SEEING |= {"contrastive": POOLED, "none": POOLED | {"kind": "vision", "labels": 3}}


@pytest.mark.parametrize("fusion", SEEING)
@pytest.mark.parametrize("field", EFFECTS)
def test_a_field_without_effect_is_refused_where_it_is_no_default(fusion, field):
    value, fusions = EFFECTS[field]
    name = field.removesuffix("_images")
    if fusion in fusions:
        configured(fusion, **SEEING[fusion], **{field: value})
        return
    with pytest.raises(UserError) as error:
        configured(fusion, **SEEING[fusion], **{field: value})
    assert str(error.value) == (
        f"model.vision.{name}={value!r}: has no effect with model.fusion={fusion!r}, only with {', '.join(fusions)}"
    )
    default = getattr(VisionConfig(), name)
    config = configured(fusion, **SEEING[fusion], **{field: default})
    assert config.resolved() == config


@pytest.mark.parametrize("field", ["embedding_dropout", "attention_dropout", "residual_dropout"])
def test_dropout_is_refused_where_nothing_drops(field):
    for fusion, named in (("contrastive", "model.fusion='contrastive'"), ("none", "model.kind='vision'")):
        with pytest.raises(UserError, match=f"^model.{field}=0.1: has no effect with {named}; valid: 0"):
            configured(fusion, **SEEING[fusion], **{field: 0.1})
    for fusion in ("merge", "late"):
        configured(fusion, **SEEING[fusion], **{field: 0.1})


def test_a_width_that_no_connection_has_to_divide_is_none_of_its_business():
    configured("merge", embed_dim=12, connection_heads=8)
