"""What a contrastive model is good for: finding texts for images and images for texts, and classes by their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from model.config import ModelConfig
from model.kinds import build
from model.place import Place
from model.weights import Weights, bind
from train.config import Experiment
from train.data.chat.record import Conversation
from train.data.chat.rows import good, last_answer, open_source, text_row
from train.data.images.look import look
from train.data.text.tokenizer import Tokenizer

LIMIT = 1000  # pairs, among which each image and text is looked for
ROWS = 100  # images at a time


def embedders(
    config: ModelConfig, weights: Weights, tokenizer: Tokenizer, context: int
) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[Sequence[str]], np.ndarray]]:
    """Two functions: images [n, S, S, channels] uint8 -> vectors [n, E], and texts -> vectors [n, E], of length 1."""
    graph = build(config)[0]
    see = jax.jit(lambda weights, images: bind(graph, weights).images(images))
    read = jax.jit(lambda weights, tokens, place: bind(graph, weights).texts(tokens, place))

    def of_images(images: np.ndarray) -> np.ndarray:
        return np.asarray(see(weights, images))

    def of_texts(texts: Sequence[str]) -> np.ndarray:
        rows = [text_row(text, tokenizer, context) for text in texts]
        tokens, segments, positions = (np.stack([row[f] for row in rows]) for f in ("tokens", "segments", "positions"))
        return np.asarray(read(weights, tokens, Place(segments, positions)))

    return of_images, of_texts


def figures(experiment: Experiment, weights: Weights, tokenizer: Tokenizer, limit: int) -> dict[str, dict[str, float]]:
    """Of every source with a held-out side: recall at 1 and 5 from images to texts and back, and among how many.

    limit: the first so many pairs whose texts differ; 0: LIMIT. Bad records are read over.
    """
    data, model = experiment.data, experiment.model
    see, read = embedders(model, weights, tokenizer, data.context)
    found = {}

    def pair(conversation: Conversation) -> tuple[str, np.ndarray]:
        return last_answer(conversation), look(conversation, data, model).fields["images"][0]

    for name in data.sources:
        side, pairs = open_source(name, data, model.vision.image_size).held_out, {}
        records = good(side, data, pair)
        for index in range(side.length):
            text, image = records[index]
            pairs.setdefault(text, image)
            if len(pairs) == (limit or LIMIT):
                break
        if len(pairs) < 2:
            continue
        texts, pictures = read(list(pairs)), np.stack(list(pairs.values()))
        images = np.concatenate([see(pictures[start : start + ROWS]) for start in range(0, len(pictures), ROWS)])
        both = {"image to text": (images, texts), "text to image": (texts, images)}
        recalls = {f"{way}, recall@{k}": recall_at(k, *of) for way, of in both.items() for k in (1, 5)}
        found[name] = {"count": len(pairs), **recalls}
    return found


def recall_at(k: int, queries: np.ndarray, found: np.ndarray) -> float:
    """The share of queries [n, E] whose own, the row of `found` [n, E] with their number, is among the k most alike.

    What is exactly as much alike counts as more so: vectors that are all the same find nothing.
    """
    similarity = queries @ found.T
    better = (~(similarity < np.diagonal(similarity)[:, None])).sum(1) - 1
    return float((better < k).mean())


def class_vectors(
    of_texts: Callable[[Sequence[str]], np.ndarray], names: Sequence[str], prompts: Sequence[str]
) -> np.ndarray:
    """One vector of length 1 for each name, [names, E]: the mean over prompts, in which {} stands for the name, of
    vectors of length 1 (prompt ensembles, arXiv:2103.00020, section 3.1.4)."""
    each = np.stack([of_texts([prompt.replace("{}", name) for name in names]) for prompt in prompts]).mean(0)
    return each / np.linalg.norm(each, axis=-1, keepdims=True)


def zero_shot(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The number of the class [names, E] that each image [n, E] is most like: [n]."""
    return np.argmax(images @ classes.T, axis=1)
