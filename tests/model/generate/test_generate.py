"""The offline loop against the model's own argmax, and its random rows against the compiled functions used by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from model import kinds
from model.config import ModelConfig
from model.generate.decode import NO_TOKEN, decoding_weights, make_decoder, pad_prompts, row_keys
from model.generate.generate import generate
from model.generate.sampling import sampling_of
from model.place import Place
from model.weights import bind

VOCAB, END, WIDTH = 31, 30, 40
PROMPTS = [[END, 5, 3, 8], [END], [END, *range(14)]]


def made(**fields):
    config = ModelConfig(vocab_size=VOCAB, layers=1, embed_dim=16, heads=4, init_std=0.3, **fields)
    config = config.resolved().placed("cpu", "float32")
    graphdef, weights = kinds.build(config)[0], kinds.init(config, jax.random.key(0))
    decoder = make_decoder(config, graphdef, VOCAB, END)
    return decoder, decoding_weights(config, weights), bind(graphdef, weights)


def test_greedy_rows_of_several_lengths_and_limits():
    decoder, weights, model = made(pattern=("local",), window=4)
    limits = np.array([9, 4, 1], np.int32)
    found = generate(decoder, weights, *pad_prompts(PROMPTS, None), limits)
    assert found.tokens.shape == found.logprobs.shape == (3, 9)
    order = jnp.arange(WIDTH, dtype=jnp.int32)[None]

    @jax.jit
    def forward(tokens, length):
        hidden, _ = model(tokens, Place((order < length).astype(jnp.int32), order))
        return jax.nn.log_softmax(model.head(hidden[0, length - 1]))

    for prompt, limit, tokens, logprobs in zip(PROMPTS, limits, *map(np.asarray, found), strict=True):
        text = list(prompt)
        for i, token in enumerate(tokens):
            if i >= limit or text[len(prompt) :][-1:] == [END]:
                assert token == NO_TOKEN
                continue
            wanted = forward(np.pad(text, (0, WIDTH - len(text)))[None].astype(np.int32), len(text))
            assert token == wanted.argmax()
            np.testing.assert_allclose(logprobs[i], wanted[token], atol=1e-5)
            text.append(int(token))


def test_drawn_rows_follow_their_keys():
    decoder, weights, _ = made()
    tokens, lengths = pad_prompts([PROMPTS[0]] * 4, None)
    keys, hot = row_keys([1, 1, 2, 1], [0, 1, 0, 0]), sampling_of(4, temperature=2.0)
    found = np.asarray(generate(decoder, weights, tokens, lengths, 8, hot, keys).tokens)
    np.testing.assert_array_equal(found[0], found[3])
    assert len({tuple(row) for row in found}) == 3
    rows, first, _ = decoder.start(weights, tokens, lengths, hot, keys, np.full(4, 8, np.int32), 64)
    _, rest, _ = decoder.decode(weights, rows, hot, 16)
    np.testing.assert_array_equal(found, np.concatenate([first, rest], 1)[:, :8])


def test_an_encoder_decoder_writes_from_its_start_token():
    decoder, weights, model = made(kind="encoder_decoder", positions="relative", decoder_layers=1, start_token=0)
    tokens, lengths = pad_prompts(PROMPTS, None)
    found = np.asarray(generate(decoder, weights, tokens, lengths, 6).tokens)
    real = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
    for row in range(3):
        text = [0]
        for token in found[row]:
            if token == NO_TOKEN:
                break
            place = Place(np.ones((1, len(text)), np.int32), np.arange(len(text), dtype=np.int32)[None])
            given = {"inputs": tokens[row : row + 1], "input_segments": real[row : row + 1]}
            hidden, _ = model(np.array([text], np.int32), place, **given)
            assert token == model.head(hidden[0, -1]).argmax()
            text.append(int(token))
        assert len(text) == 7 or text[-1] == END
