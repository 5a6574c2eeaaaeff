"""What stretches rotary positions, against the formulae of the papers, one pair at a time.

Legend: K head_dim, L trained context.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from model.config import ModelConfig
from model.place import Place
from model.positions.rope import Rope, frequencies, rotations
from tpu.errors import UserError

SCALED = [
    {"rope_scaling": "linear", "rope_factor": 4.0},
    {"rope_scaling": "ntk", "rope_factor": 4.0},
    {"rope_scaling": "dynamic", "rope_factor": 2.0, "rope_original_context": 1024},
    {"rope_scaling": "yarn", "rope_factor": 8.0, "rope_original_context": 256},
    {"rope_scaling": "yarn", "rope_factor": 8.0, "rope_original_context": 256, "rope_attention_factor": 1.5},
    {"rope_scaling": "yarn", "rope_factor": 2.0, "rope_original_context": 8192, "rope_slow": 2.0, "rope_fast": 5.0},
    {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_context": 8192, "rope_theta": 5e5},
    {"rope_interleaved": True},
]


def rope(head_dim: int = 64, **fields: object) -> Rope:
    return Rope.of(ModelConfig(head_dim=head_dim, **fields).resolved())


def turns(theta: float, i: int, head_dim: int, context: int) -> float:
    return context * theta ** (-2 * i / head_dim) / (2 * math.pi)


def test_linear_and_ntk():
    plain, m = frequencies(rope())
    np.testing.assert_allclose(plain, [10_000.0 ** (-2 * i / 64) for i in range(32)])
    assert m == 1.0
    np.testing.assert_allclose(frequencies(rope(**SCALED[0]))[0], plain / 4)
    ntk = frequencies(rope(**SCALED[1]))[0]
    assert ntk[0] == 1.0
    np.testing.assert_allclose(ntk[-1], plain[-1] / 4)  # The slowest pair is stretched by just the factor.


def test_dynamic_follows_the_present_length():
    dynamic = rope(**SCALED[2])
    found, _ = frequencies(dynamic, np.array([[10], [1024], [4096]]))
    assert found.shape == (3, 1, 32)
    plain = frequencies(rope())[0]
    np.testing.assert_allclose(found[:2, 0], np.stack([plain, plain]), rtol=1e-5)
    stretch = 2 * 4096 / 1024 - 1
    np.testing.assert_allclose(found[2, 0], frequencies(rope(rope_scaling="ntk", rope_factor=stretch))[0], rtol=1e-5)


def test_dynamic_does_not_count_padding_and_turns_cached_keys_anew():
    positions = np.tile(np.arange(3000, dtype=np.int32), (2, 1))
    segments = np.ones_like(positions)
    segments[1, 1500:] = 0
    place = Place(segments, positions)
    dynamic = rope(**SCALED[2])
    cos, _ = rotations(dynamic, place)["global"]
    for row, length in enumerate((3000, 1500)):
        wanted = frequencies(dynamic, np.array([[length]]))[0][0, 0]
        np.testing.assert_allclose(cos[row, 7, 0], np.cos(7 * wanted), atol=1e-5)
    assert rotations(dynamic, place, place).keys() == {"global", "keys"}
    assert rotations(rope(), place, place).keys() == {"global"}


@pytest.mark.parametrize("fields", [f for f in SCALED if f.get("rope_scaling") == "yarn"])
def test_yarn(fields):
    found, m = frequencies(rope(**fields))
    context, factor = fields["rope_original_context"], fields["rope_factor"]
    slow, fast = fields.get("rope_slow", 1.0), fields.get("rope_fast", 32.0)
    plain = frequencies(rope())[0]
    for i in range(32):
        r = turns(1e4, i, 64, context)
        # The ramp ends at whole pairs: those just outside of it are as if beyond it.
        if turns(1e4, i - 1, 64, context) < slow:
            assert found[i] == pytest.approx(plain[i] / factor)
        elif turns(1e4, i + 1, 64, context) > fast:
            assert found[i] == pytest.approx(plain[i])
        else:
            assert plain[i] / factor <= found[i] <= plain[i], (i, r)
    assert m == pytest.approx(fields.get("rope_attention_factor", 0.1 * math.log(factor) + 1))
    place = Place(np.ones((1, 1), np.int32), np.zeros((1, 1), np.int32))
    cos, sin = rotations(rope(**fields), place)["global"]  # Once for the queries, once for the keys.
    np.testing.assert_allclose(cos, m)
    np.testing.assert_allclose(sin, 0)


def test_llama3():
    found, m = frequencies(rope(**SCALED[6]))
    assert m == 1.0
    for i in range(32):
        r, plain = turns(5e5, i, 64, 8192), 5e5 ** (-2 * i / 64)
        share = 1 if r > 4 else 0 if r < 1 else (r - 1) / 3
        assert found[i] == pytest.approx(share * plain + (1 - share) * plain / 8)


def test_local_layers_turn_by_a_theta_of_their_own():
    place = Place(np.ones((1, 9), np.int32), np.arange(9, dtype=np.int32)[None])
    found = rotations(rope(rope_local_theta=100.0, **SCALED[0]), place)
    np.testing.assert_array_equal(found["local"][0], rotations(rope(rope_theta=100.0), place)["global"][0])
    np.testing.assert_array_equal(found["global"][0], rotations(rope(**SCALED[0]), place)["global"][0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": "yarn", "rope_factor": 2.0}, "rope_original_context=0"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "rope_factor=0.5"),
        ({"rope_scaling": "llama3", "rope_original_context": 9, "rope_slow": 4.0}, "rope_slow=4.0: must be below"),
        ({"rope_scaling": "dynamic", "rope_original_context": 9, "rope_local_theta": 9.0}, "rope_local_theta=9.0: not"),
        ({"rope_scaling": "ntk", "head_dim": 2}, "head_dim=2"),
        ({"rope_scaling": "longrope"}, "valid: none, linear"),
    ],
)
def test_impossible_scaling(fields, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**fields).resolved()
