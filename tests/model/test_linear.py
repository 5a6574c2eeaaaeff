"""The one product of activation and weight: its form for CPU against the plain one, in value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.linear import matmul

SHAPES = [  # x, weight, contracted dimensions, transposed
    ((2, 6, 8), (8, 10), 1, False),
    ((3, 5, 8), (8, 4, 3), 1, False),
    ((2, 7, 4, 3), (4, 3, 9), 2, False),
    ((1, 3, 8), (8, 5), 1, False),
    ((2, 6, 8), (11, 8), 1, True),
    ((3, 5, 8), (11, 8), 1, True),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("x_shape", "w_shape", "contract", "transposed"), SHAPES)
def test_the_forms_agree(x_shape, w_shape, contract, transposed, dtype):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x_shape, w_shape))
    results = {}
    for platform in ("cpu", "gpu"):
        y, pull = jax.vjp(lambda x, w, p=platform: matmul(x, w, contract, dtype, p, transposed), x, w)
        assert y.dtype == jnp.float32
        cotangent = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.float32)
        results[platform] = y, *pull(cotangent)
    inputs, outputs = (w_shape[1:], w_shape[:1]) if transposed else (w_shape[:contract], w_shape[contract:])
    flat = np.asarray(w, np.float64).reshape(-1, np.prod(outputs if not transposed else inputs))
    matrix = flat.T if transposed else flat  # [I, O]
    rows = np.asarray(x, np.float64).reshape(-1, len(matrix))
    g = np.asarray(cotangent, np.float64).reshape(len(rows), -1)
    gradient = rows.T @ g
    wanted = rows @ matrix, g @ matrix.T, gradient.T if transposed else gradient
    for platform, found in results.items():
        for array, exact, shape in zip(found, wanted, (y.shape, x_shape, w_shape), strict=True):
            assert array.shape == shape, platform
            tolerance = (1e-6 if dtype == "float32" else 0.02) * np.abs(exact).max()
            np.testing.assert_allclose(np.asarray(array).reshape(exact.shape), exact, rtol=0, atol=tolerance)
