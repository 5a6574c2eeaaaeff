"""The losses of label heads against plain numpy, one element at a time."""

from __future__ import annotations

import numpy as np

from train.losses.labels import label_sums

RNG = np.random.default_rng(0)
ROWS, TOKENS, LABELS = 3, 5, 4


def softmax_loss(logits: np.ndarray, target: int) -> float:
    return float(np.log(np.exp(logits.astype(np.float64)).sum()) - logits[target])


def test_classes():
    logits = RNG.normal(size=(ROWS, TOKENS, LABELS)).astype(np.float32)
    targets, weights = RNG.integers(0, LABELS, (ROWS, TOKENS)), RNG.random((ROWS, TOKENS)).astype(np.float32)
    places = list(np.ndindex(ROWS, TOKENS))
    loss = sum(weights[p] * softmax_loss(logits[p], targets[p]) for p in places)
    right = sum(weights[p] * (logits[p].argmax() == targets[p]) for p in places)
    for name in ("classification", "token_classification"):
        np.testing.assert_allclose(label_sums(name, logits, targets, weights), (loss, right), rtol=1e-5)


def test_numbers():
    logits, targets = RNG.normal(size=(2, ROWS, TOKENS, LABELS)).astype(np.float32)
    weights = RNG.random((ROWS, TOKENS)).astype(np.float32)
    loss = sum(weights[p] * np.mean((logits[p] - targets[p]) ** 2) for p in np.ndindex(ROWS, TOKENS))
    np.testing.assert_allclose(label_sums("regression", logits, targets, weights), (loss, 0.0), rtol=1e-5)


def test_several_labels_at_once():
    logits = 8 * RNG.normal(size=(ROWS, TOKENS, LABELS)).astype(np.float32)
    targets = RNG.integers(0, 2, logits.shape).astype(np.float32)
    weights = RNG.random((ROWS, TOKENS)).astype(np.float32)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    each = -np.log(np.where(targets > 0, probability, 1 - probability)).mean(-1)
    right = ((logits > 0) == (targets > 0)).mean(-1)
    found = label_sums("multi_label", logits, targets, weights)
    np.testing.assert_allclose(found, ((each * weights).sum(), (right * weights).sum()), rtol=1e-4)
    far = np.full((1, 1, 1), 1e4, np.float32)  # Large logits do not overflow.
    assert label_sums("multi_label", far, np.zeros_like(far), np.ones((1, 1), np.float32))[0] == 1e4


def test_an_answers_two_ends():
    logits = RNG.normal(size=(ROWS, TOKENS, 2)).astype(np.float32)
    targets, weights, loss, right = np.zeros(logits.shape, np.float32), np.zeros((ROWS, TOKENS), np.float32), 0.0, 0
    logits[2, 0, 0] = logits[2, 4, 1] = 9.0  # One row is surely right.
    for row, (start, end) in enumerate([(1, 3), (2, 2), (0, 4)]):
        targets[row, start, 0] = targets[row, end, 1] = 1.0
        weights[row, start] += 0.5
        weights[row, end] += 0.5
        loss += (softmax_loss(logits[row, :, 0], start) + softmax_loss(logits[row, :, 1], end)) / 2
        right += logits[row].argmax(0).tolist() == [start, end]
    assert right >= 1
    found = label_sums("span", logits, targets, weights)
    np.testing.assert_allclose(found, (loss, right), rtol=1e-5)
    nothing = label_sums("span", logits, targets, np.zeros_like(weights))
    assert [float(x) for x in nothing] == [0.0, 0.0]
