"""Rotary position embedding (RoFormer, arXiv:2104.09864, section 3.2) and what stretches it to longer contexts.

A pair of dimensions i turns by position * f_i with f_i = b^(-2i/K), b `rope_theta`. With the factor s, the trained
context L and r_i = L f_i / 2 pi, the turns of a pair in that context, `rope_scaling` makes of it

- linear: f_i / s (position interpolation, arXiv:2306.15595);
- ntk: base b s^(K/(K-2)) (NTK-aware);
- dynamic: the same with s n / L - (s - 1) for s, n the present length where it exceeds L, else as it was;
- yarn: g f_i / s + (1 - g) f_i, where g rises linearly in i from 0 at r = `rope_fast` to 1 at r = `rope_slow`; cosine
  and sine, so queries and keys alike, are multiplied by m = 0.1 ln s + 1 (arXiv:2309.00071, sections 3.2 and 3.4);
- llama3: the same with g = (fast - r_i) / (fast - slow), and without m (Llama 3.1's reference code).

Legend: B batch, T tokens, H heads, K head_dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.place import Place

Turn = tuple[jax.Array, jax.Array]  # cosine and sine, [B, T, 1, K / 2] float32 each


class Rope(NamedTuple):
    """What a ModelConfig says of rotary positions, in fields of the same names without "rope_"; hashable."""

    head_dim: int
    theta: float
    scaling: str
    factor: float
    original_context: int
    slow: float
    fast: float
    attention_factor: float
    local_theta: float
    sections: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig) -> Rope:
        """The fields of a resolved config."""
        return cls(config.head_dim, *(getattr(config, f"rope_{name}") for name in cls._fields[1:]))


def rotations(rope: Rope, place: Place, slots: Place | None = None) -> dict[str, Turn]:
    """How far to turn the queries and keys at `place`: of "global" layers, and of "local" ones where they differ.

    Under dynamic scaling all keys turn with every change of length: those of a cache, at `slots`, are kept unturned
    there, and get a "keys" of their own. Positions [B, T, 3] turn the pairs of `rope.sections` with one of the three
    each (M-RoPE, arXiv:2409.12191, section 2.1).
    """
    length = None
    if rope.scaling == "dynamic":
        seen = place if slots is None else slots
        length = jnp.max(jnp.where(seen.segments > 0, seen.positions, 0), axis=1, keepdims=True) + 1  # [B, 1]
    scaled, magnitude = frequencies(rope, length)
    positions = place.positions
    if positions.ndim == 3:
        positions = positions[..., np.repeat(np.arange(3), rope.sections)]  # [B, T, K / 2]
    turns = {"global": rotation(positions, scaled, magnitude)}
    if rope.scaling == "dynamic" and slots is not None:
        turns["keys"] = rotation(slots.positions, scaled, magnitude)
    if rope.local_theta:
        turns["local"] = rotation(place.positions, plain_frequencies(rope.local_theta, rope.head_dim))
    return turns


def plain_frequencies(theta: float | jax.Array, head_dim: int) -> np.ndarray | jax.Array:
    """theta^(-2i/K) of all pairs: [K / 2] float64 for a number theta, float32 [..., K / 2] for an array [..., 1]."""
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


def frequencies(rope: Rope, length: jax.Array | None = None) -> tuple[np.ndarray | jax.Array, float]:
    """Radians per position of each pair, [K / 2], and the m that cosine and sine are multiplied by.

    With the present `length` [B, 1] of each row, which dynamic scaling needs, [B, 1, K / 2].
    """
    theta, width, factor, context = rope.theta, rope.head_dim, rope.factor, rope.original_context
    plain = plain_frequencies(theta, width)
    match rope.scaling:
        case "linear":
            return plain / factor, 1.0
        case "ntk":
            return plain_frequencies(theta * factor ** (width / (width - 2)), width), 1.0
        case "dynamic":
            stretch = factor * jnp.maximum(length, context) / context - (factor - 1.0)
            return plain_frequencies((theta * stretch ** (width / (width - 2)))[..., None], width), 1.0
        case "yarn":
            slow, fast = (_pair_that_turns(rope, turns) for turns in (rope.slow, rope.fast))
            low, high = max(math.floor(fast), 0), min(math.ceil(slow), width - 1)
            # A range of no pairs is a step, which a slope of 1000 is near enough to.
            share = np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0.0, 1.0)
            return share * plain / factor + (1 - share) * plain, rope.attention_factor or _magnitude(factor)
        case "llama3":
            turns = context * plain / (2 * math.pi)
            share = np.clip((rope.fast - turns) / (rope.fast - rope.slow), 0.0, 1.0)
            return share * plain / factor + (1 - share) * plain, 1.0
    return plain, 1.0


def _pair_that_turns(rope: Rope, turns: float) -> float:
    """The pair, a fraction of one too, that turns so often in the trained context."""
    ratio = rope.original_context / (turns * 2 * math.pi)
    return rope.head_dim * math.log(ratio) / (2 * math.log(rope.theta))


def _magnitude(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotation(positions: jax.Array, frequencies: np.ndarray | jax.Array, magnitude: float = 1.0) -> Turn:
    """`magnitude` times cosine and sine of position * frequency, for positions [B, T], or [B, T, K / 2], one for each
    pair: two [B, T, 1, K / 2] arrays."""
    positions = positions[..., None] if positions.ndim == 2 else positions
    frequencies = jax.lax.broadcast_to_rank(jnp.asarray(frequencies, jnp.float32), 3)
    angles = positions.astype(jnp.float32) * frequencies  # [B, T, K / 2]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return (cos, sin) if magnitude == 1.0 else (cos * magnitude, sin * magnitude)


def rotate(x: jax.Array, turn: Turn, interleaved: bool = False) -> jax.Array:
    """Turns each pair of x [B, T, H, K] by its position's angle (equation 34); keeps the dtype.

    Pairs are (x[i], x[i + K/2]), as in GPT-NeoX and Llama, or, interleaved, (x[2i], x[2i + 1]), as in GPT-J.
    """
    cos, sin = turn
    if interleaved:
        even, odd = x[..., ::2].astype(cos.dtype), x[..., 1::2].astype(cos.dtype)
        return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape).astype(x.dtype)
    cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    other = jnp.roll(x, x.shape[-1] // 2, -1)
    return (x.astype(cos.dtype) * cos + other.astype(sin.dtype) * sin).astype(x.dtype)
