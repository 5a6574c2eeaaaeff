"""One text from another: records that say what to write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data.batch import Batch, Layout, encoder_layout, text_layout
from train.data.corpus import Corpus, record_corpus, text_tokenizer
from train.data.text.labelled import Task, Text, load, padded
from train.objectives.next_token import language_sums
from train.objectives.objective import Objective, Role, Sums, check_blind, check_model, perplexity, token_weights

if TYPE_CHECKING:
    import jax

    from train.config import Experiment
    from train.data.text.tokenizer import Tokenizer
    from train.objectives.bound import Bound


def roles(experiment: Experiment) -> dict[str, Role]:
    """One encoder-decoder."""
    return {"model": Role()}


def check(experiment: Experiment) -> None:
    """Raises UserError for a model that is no encoder-decoder."""
    check_model(experiment, "encoder_decoder", "language")
    check_blind(experiment)


def corpus(experiment: Experiment, tokenizer: Tokenizer | None = None) -> Corpus:
    """Records with a text to write."""
    data, tokenizer = experiment.data, tokenizer or text_tokenizer(experiment.data)
    written, end = _written(experiment), tokenizer.end_of_document

    def row(text: Text, label: str, names: Sequence[str], counts: Counter[str]) -> Batch:
        """A decoder row that begins with end of document and writes the text and end of document."""
        ids = [*tokenizer.encode(label), end]
        if len(ids) > written:
            counts["cut_targets"] += 1
        there = (np.arange(written) < len(ids)).astype(np.int32)
        return {
            "tokens": padded([end, *ids[:-1]], written),
            "targets": padded(ids, written),
            "loss_weights": there.astype(np.float32),
            "segments": there,
            "positions": np.arange(written, dtype=np.int32) * there,
            "inputs": text.tokens,
            "input_segments": text.valid,
        }

    task = Task("sequence_to_sequence", "a text", lambda label, size: isinstance(label, str), row)
    return record_corpus(load(data, task, experiment.model.labels, tokenizer), data, tokenizer)


def _written(experiment: Experiment) -> int:
    return experiment.data.target_context or experiment.data.context


def layout(experiment: Experiment) -> Layout:
    """The text that is read, for the encoder, and the one to write, for the decoder."""
    data, vocab_size = experiment.data, experiment.model.vocab_size
    found = text_layout(data.batch_size, _written(experiment), vocab_size)
    return found | encoder_layout(data.batch_size, data.context, vocab_size)


def sums(
    models: Mapping[str, Bound], batch: Batch, experiment: Experiment, keys: jax.Array | None, carried: Any
) -> Sums:
    """Cross-entropy of the decoder's tokens."""
    from model.place import Place

    place, read = Place(batch["segments"], batch["positions"]), {f: batch[f] for f in ("inputs", "input_segments")}
    hidden, _ = models["model"](batch["tokens"], place, key=keys, **read)
    loss, nll = language_sums(models["model"], hidden, batch, experiment)
    return Sums({"loss": loss}, {"nll": nll})


OBJECTIVE = Objective(roles, check, corpus, layout, token_weights, sums, perplexity)
