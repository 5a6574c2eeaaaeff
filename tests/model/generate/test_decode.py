"""Generation with a cache against full forward passes without one, and rows against their neighbours.

Legend: B rows, T tokens, V vocab_size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from model import kinds
from model.config import ModelConfig
from model.generate.decode import (
    NO_TOKEN,
    Decoder,
    decoding_weights,
    make_decoder,
    pad_prompts,
    row_keys,
    slots_for,
)
from model.generate.prefill import advance, prefill
from model.generate.sampling import Sampling
from model.kinds import build
from model.place import Place
from model.weights import bind

BASE = ModelConfig(
    vocab_size=31,
    layers=2,
    embed_dim=16,
    heads=4,
    positions="rope",
    max_positions=48,
    init_std=0.3,
    attention="chunked",
)
CONFIGS = {
    "rope": {},
    "learned": {"positions": "learned"},
    "sinusoidal": {"positions": "sinusoidal"},
    "no positions": {"positions": "none"},
    "grouped": {"kv_heads": 2},
    "multi-query": {"kv_heads": 1, "head_dim": 6},
    "pattern": {"pattern": ("local", "global"), "window": 3, "layers": 4},
    "pattern scanned": {"pattern": ("local", "global"), "window": 3, "layers": 4, "layer_loop": "scan", "kv_heads": 2},
    "scanned": {"layer_loop": "scan"},
    "pipeline's weights": {"pipeline_repeats": 2, "layers": 4},
    "pipeline's weights scanned": {"pipeline_repeats": 2, "layers": 4, "layer_loop": "scan"},
    "post-norm": {"norm_order": "post", "positions": "learned"},
    "qk_norm": {"qk_norm": True, "norm": "rmsnorm", "activation": "swiglu", "tied_head": False},
    "qk_norm over all heads": {"qk_norm": True, "qk_norm_over": "projection", "norm_order": "reordered", "kv_heads": 2},
    "sandwich": {"norm_order": "sandwich", "norm_unit_offset": True, "scale_embedding": True, "query_scalar": 9.0},
    "local rope": {
        "pattern": ("local", "global"),
        "window": 3,
        "rope_local_theta": 100.0,
        "rope_scaling": "linear",
        "rope_factor": 4.0,
    },
    "ntk": {"rope_scaling": "ntk", "rope_factor": 4.0},
    # Of one layer: what earlier tokens left in deeper ones was computed with the frequencies of a shorter text.
    "dynamic": {"rope_scaling": "dynamic", "rope_factor": 4.0, "rope_original_context": 8, "layers": 1, "kv_heads": 2},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 16, "rope_interleaved": True},
    "llama3": {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context": 16},
    "softcaps": {"attention_softcap": 2.0, "logits_softcap": 3.0},
    "alibi": {"positions": "alibi", "kv_heads": 2},
    "sinks": {"attention_sinks": True, "kv_heads": 2},
    "sparse": {"pattern": ("sparse",), "sparse_block": 2, "sparse_newest": 2},
    "linear": {"pattern": ("linear",), "kv_heads": 2, "positions": "learned"},
    "gated linear": {"pattern": ("gated_linear",), "kv_heads": 2, "qk_norm": True},
    "knn": {"pattern": ("knn", "global"), "knn_memory": 8},
    "mixture scanned": {"pattern": ("linear", "sparse", "gated_linear", "local"), "layers": 8, "window": 3}
    | {"sparse_block": 2, "layer_loop": "scan", "kv_heads": 2},
}
END = 30
# Of lengths on both sides of the window, so that rows are padded.
PROMPTS = [[END, 5, 3, 8, 1, 7, 2], [END], [END, 4, 4], [END, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]]


def placed(**fields: Any) -> ModelConfig:
    return dataclasses.replace(BASE, **fields).resolved().placed("cpu", "float32")


@functools.cache
def model_of(**fields: Any) -> tuple[ModelConfig, Any, Any]:
    """Config, graph and weights (stacked, as they are trained)."""
    config = placed(**fields)
    return config, build(config)[0], jax.jit(lambda key: kinds.init(config, key))(jax.random.key(0))


def full_logits(model: tuple[ModelConfig, Any, Any], tokens: Sequence[int]) -> np.ndarray:
    """[T, V] of one row, computed at once and without a cache; padded to one length, so that little is compiled."""
    config, graphdef, weights = model
    padded = np.zeros((1, config.max_positions), np.int32)
    padded[0, : len(tokens)] = tokens
    positions = np.arange(config.max_positions, dtype=np.int32)[None]
    place = Place((positions < len(tokens)).astype(np.int32), positions)
    return np.array(_forward(graphdef, weights, padded, place))[0, : len(tokens)]


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: Any, weights: Any, tokens: Any, place: Place) -> jax.Array:
    model = bind(graphdef, weights)
    hidden, _ = model(tokens, place)
    return model.head(hidden)


def sampling(rows: int, **values: Any) -> Sampling:
    plain = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | values
    return Sampling(
        **{f: np.broadcast_to(np.asarray(v, np.int32 if f == "top_k" else np.float32), rows) for f, v in plain.items()}
    )


@functools.cache
def prefill_of(**fields: Any) -> Callable[..., Any]:
    config, graphdef, _ = model_of(**fields)
    return jax.jit(lambda weights, tokens, lengths: prefill(bind(graphdef, weights), config, tokens, lengths, 64)[:2])


@functools.cache
def decoder_of(vocab_size: int = 31, end: int = END, **fields: Any) -> Decoder:
    """For the model of one layer, which the tests of rows and tokens share."""
    config, graphdef, _ = model_of(layers=1, **fields)
    return make_decoder(config, graphdef, vocab_size, end)


def generate(
    decoder: Decoder,
    model: tuple[ModelConfig, Any, Any],
    prompts: Sequence[Sequence[int]],
    chosen: Sampling,
    numbers: Sequence[int],
    max_tokens: int | Sequence[int] = 20,
    chunk: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities [B, most tokens], NO_TOKEN after a row's end."""
    config, _, weights = model
    weights = decoding_weights(config, weights)
    tokens, lengths = pad_prompts(prompts, config.max_positions)
    limits = np.broadcast_to(np.int32(max_tokens), len(prompts))
    slots = slots_for(tokens.shape[1], 40)
    keys = row_keys([7] * len(prompts), numbers)
    rows, *first = decoder.start(weights, tokens, lengths, chosen, keys, limits, slots)
    parts = [[np.asarray(a) for a in first]]
    while not rows.finished.all():
        rows, *more = decoder.decode(weights, rows, chosen, chunk)
        parts.append([np.asarray(a) for a in more])
    most = int(limits.max())
    tokens, logprobs = (np.concatenate(part, axis=1)[:, :most] for part in zip(*parts, strict=True))
    missing = [(0, 0), (0, most - tokens.shape[1])]
    return np.pad(tokens, missing, constant_values=NO_TOKEN), np.pad(logprobs, missing)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_equal_the_uncached_forward_at_every_position(name):
    config, graphdef, weights = model = model_of(**CONFIGS[name])
    tokens, lengths = pad_prompts(PROMPTS, config.max_positions)
    later = np.random.default_rng(0).integers(0, 30, (len(PROMPTS), 10)).astype(np.int32)
    prepared = decoding_weights(config, weights)
    cache, logits = prefill_of(**CONFIGS[name])(prepared, tokens, lengths)
    step = jax.jit(lambda w, *a: advance(bind(graphdef, w), *a))
    found = [logits]
    for i in range(later.shape[1]):
        cache, logits = step(prepared, cache, later[:, i], lengths + i)
        found.append(logits)
    found = np.stack(found, axis=1)  # [B, 11, V]
    for row, prompt in enumerate(PROMPTS):
        texts = ([*prompt, *later[row][:i]] for i in range(found.shape[1]))
        wanted = np.stack([full_logits(model, text)[-1] for text in texts])
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found[row], wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=15)
@given(st.lists(st.lists(st.integers(0, 29), max_size=15), min_size=3, max_size=3))
def test_prefill_of_any_ragged_prompts(prompts):
    config, _, weights = model = model_of(positions="learned")
    prompts = [[END, *prompt] for prompt in prompts]
    tokens, lengths = pad_prompts(prompts, config.max_positions)
    _, logits = prefill_of(positions="learned")(weights, tokens, lengths)
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(logits[row], full_logits(model, prompt)[-1], atol=1e-5, rtol=1e-5)


def test_greedy_tokens_are_the_argmax_of_repeated_full_forwards():
    model = model_of(layers=1)
    tokens, logprobs = generate(decoder_of(), model, PROMPTS, sampling(4, temperature=0), range(4))
    for prompt, row, row_logprobs in zip(PROMPTS, tokens, logprobs, strict=True):
        text = list(prompt)
        for token, logprob in zip(row, row_logprobs, strict=True):
            logits = full_logits(model, text)[-1]
            assert token == logits.argmax()
            assert abs(logprob - scipy.special.log_softmax(logits)[token]) < 1e-5
            text.append(token)
            if token == END:
                break


def test_log_probabilities_are_of_the_plain_distribution_whatever_is_drawn_from():
    model = model_of(layers=1)
    chosen = sampling(4, temperature=[0.5, 1, 2, 3], top_k=[0, 9, 0, 0], top_p=[0.8, 1, 1, 0.9], repetition_penalty=1.5)
    tokens, logprobs = generate(decoder_of(end=0), model, PROMPTS, chosen, range(4))
    for row, prompt in enumerate(PROMPTS):
        drawn = [int(t) for t in tokens[row] if t != NO_TOKEN]
        wanted = scipy.special.log_softmax(full_logits(model, [*prompt, *drawn]), axis=-1)
        for i, token in enumerate(drawn):
            assert abs(logprobs[row, i] - wanted[len(prompt) - 1 + i, token]) < 1e-5


MIXED = {"temperature": [0.0, 1.0, 0.8, 1.5], "top_k": [0, 0, 12, 0], "top_p": [1, 1, 1, 0.9]}


def take(chosen: Sampling, rows: Sequence[int]) -> Sampling:
    return Sampling(*(values[list(rows)] for values in chosen))


def test_a_rows_tokens_do_not_depend_on_its_neighbours():
    model = model_of(layers=1)
    run = functools.partial(generate, decoder_of(), model)
    tokens, logprobs = run(PROMPTS, sampling(4, **MIXED), [3, 1, 4, 1])
    order = [2, 0, 3, 1]
    moved, moved_logprobs = run([PROMPTS[i] for i in order], take(sampling(4, **MIXED), order), [4, 3, 1, 1])
    np.testing.assert_array_equal(moved, tokens[order])
    np.testing.assert_allclose(moved_logprobs, logprobs[order], atol=1e-6)
    # Row 2 with three other prompts, other parameters and other limits beside it.
    other = [[END, 1], [END, 2, 2, 2, 2], PROMPTS[2], [END] * 9]
    beside = sampling(4, temperature=[1, 0.3, 0.8, 0], top_k=[3, 0, 12, 0], repetition_penalty=[1, 3, 1, 1])
    found, _ = run(other, beside, [0, 9, 4, 2], max_tokens=[2, 20, 20, 5])
    np.testing.assert_array_equal(found[2], tokens[2])


def test_numbers_and_seeds_give_different_draws_and_the_same_ones_again():
    model = model_of(layers=1)
    run = functools.partial(generate, decoder_of(end=0), model, [PROMPTS[0]] * 4, sampling(4))
    tokens, _ = run([0, 1, 2, 0])
    np.testing.assert_array_equal(tokens[0], tokens[3])
    assert len({tuple(row) for row in tokens}) == 3
    keys = jax.random.key_data(row_keys([0, 0, 1, 2**32 - 1], [0, 1, 0, 5]))
    assert len({tuple(key) for key in np.asarray(keys)}) == 4


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_size_of_chunks_changes_nothing(chunk):
    model = model_of(layers=1)
    run = functools.partial(generate, decoder_of(), model, PROMPTS, sampling(4, **MIXED), range(4))
    tokens, logprobs = run(chunk=chunk)
    wanted, wanted_logprobs = run()
    np.testing.assert_array_equal(tokens, wanted)
    np.testing.assert_allclose(logprobs[tokens != NO_TOKEN], wanted_logprobs[tokens != NO_TOKEN], atol=1e-6)


def test_end_of_document_ends_a_row_while_others_go_on():
    model = model_of(layers=1)
    greedy = sampling(4, temperature=0)
    free, _ = generate(decoder_of(end=29), model, PROMPTS, greedy, range(4))
    # The token that some row takes first after a few others, and another row later or never.
    first = {
        int(token): [int(np.flatnonzero(row == token)[0]) if token in row else 99 for row in free]
        for token in np.unique(free)
        if token not in (29, NO_TOKEN)
    }
    end = next(token for token, places in first.items() if 1 < min(places) < 20 and len(set(places)) > 1)
    tokens, _ = generate(decoder_of(end=end), model, PROMPTS, greedy, range(4))
    for row, place in enumerate(first[end]):
        known = min(place + 1, (free[row] != NO_TOKEN).sum())
        np.testing.assert_array_equal(tokens[row, :known], free[row, :known])
        assert place == 99 or (tokens[row, place + 1 :] == NO_TOKEN).all()


def test_every_row_has_its_own_length_limit():
    model = model_of(layers=1)
    decoder = decoder_of(end=0)
    limits = [1, 4, 20, 9]
    tokens, _ = generate(decoder, model, PROMPTS, sampling(4, temperature=0), range(4), limits)
    long, _ = generate(decoder, model, PROMPTS, sampling(4, temperature=0), range(4))
    for row, limit in enumerate(limits):
        np.testing.assert_array_equal(tokens[row, :limit], long[row, :limit])
        assert (tokens[row, limit:] == NO_TOKEN).all()


def test_generation_up_to_the_last_learned_position():
    model = model_of(positions="learned", max_positions=20, layers=1)
    prompts = [[END, *range(16)], [END]]  # 17 tokens: the padded prompt would need 32 positions
    decoder = decoder_of(end=29, positions="learned", max_positions=20)
    tokens, logprobs = generate(decoder, model, prompts, sampling(2, temperature=0), range(2), [3, 19])
    assert np.isfinite(logprobs).all()
    for row, (prompt, limit) in enumerate(zip(prompts, [3, 19], strict=True)):
        text = [*prompt, *tokens[row, :limit]]
        if 29 not in text:
            wanted = full_logits(model, text)[len(prompt) - 1 : -1].argmax(-1)
            np.testing.assert_array_equal(tokens[row, :limit], wanted)


def test_repetition_penalty_counts_prompt_and_output_but_not_the_opening_token():
    model = model_of(layers=1)
    strong = sampling(4, temperature=0, repetition_penalty=1e6)
    tokens, _ = generate(decoder_of(end=END), model, PROMPTS, strong, range(4), 12)
    for row, prompt in enumerate(PROMPTS):
        text, wanted = list(prompt), []
        for _ in range(12):
            logits = full_logits(model, text)[-1]
            seen = list(set(text) - {END})
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1e6, logits[seen] * 1e6)
            wanted.append(int(logits.argmax()))
            text.append(wanted[-1])
            if wanted[-1] == END:
                break
        np.testing.assert_array_equal(tokens[row, : len(wanted)], wanted)


def test_tokens_that_the_tokenizer_does_not_have_are_never_drawn():
    model = model_of(layers=1)
    hot = sampling(4, temperature=50.0)
    drawn, _ = generate(decoder_of(vocab_size=8, end=7), model, [[7, 1]] * 4, hot, range(4))
    assert set(np.unique(drawn)) <= {NO_TOKEN, *range(8)}
    everything, _ = generate(decoder_of(end=7), model, [[7, 1]] * 4, hot, range(4))
    assert everything.max() > 8
    assert min(len(set(row)) for row in everything) > 5, "every position of a row has a key of its own"


def test_new_prompts_and_parameters_of_the_same_shape_compile_nothing():
    config, graphdef, _ = model = model_of(layers=1)
    decoder = make_decoder(config, graphdef, 31, END)
    for prompts, values in ((PROMPTS, {}), ([[END, 1]] * 4, {"temperature": 0.3, "top_p": 0.5, "top_k": 3})):
        generate(decoder, model, prompts, sampling(4, **values), range(4), [5, 6, 7, 20])
    assert decoder.start._cache_size() == 1
    assert decoder.decode._cache_size() == 1


def test_weights_are_prepared_once():
    config, _, weights = model_of()
    prepared = decoding_weights(dataclasses.replace(config, compute_dtype="bfloat16"), weights)
    layer = prepared["stack"]["groups"]["layer_0"]
    assert len(layer["mlp"]["up"]["kernel"]) == config.layers
    assert layer["mlp"]["up"]["kernel"][0].dtype == prepared["embedding"]["embedding"].dtype == jnp.bfloat16
    assert layer["mlp"]["up"]["bias"][0].dtype == jnp.float32, "a bias is added in float32"
    np.testing.assert_array_equal(
        layer["attention"]["query"]["bias"][1], weights["stack"]["groups"]["layer_0"]["attention"]["query"]["bias"][1]
    )


def test_few_shapes():
    widths = {pad_prompts([[0] * n, [1]], None)[0].shape[1] for n in range(1, 300)}
    assert widths == {16, 32, 64, 128, 256, 512}
    tokens, lengths = pad_prompts([[5, 6], [7] * 20], 24)
    assert tokens.shape == (2, 24)
    assert tokens[0].tolist() == [5, 6] + [0] * 22
    assert lengths.tolist() == [2, 20]
    assert [slots_for(16, 17), slots_for(512, 100), slots_for(16, 65)] == [64, 512, 128]
