"""What must hold between the data of an experiment and the rest of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpu.errors import UserError

if TYPE_CHECKING:
    from train.config import Experiment


def check(experiment: Experiment) -> None:
    """Raises UserError where sources, tokenizer or context of a resolved experiment cannot be, or not together."""
    model, data = experiment.model, experiment.data
    if not data.sources:
        raise UserError("data.sources=(): name at least one source")
    if data.weights and len(data.weights) != len(data.sources):
        raise UserError(
            f"data.weights={data.weights}: needs one weight for each of the {len(data.sources)} data.sources"
        )
    if any(w <= 0 for w in data.weights):
        raise UserError(f"data.weights={data.weights}: every weight must be positive")
    if data.bpe_vocab_size > model.vocab_size:
        raise UserError(f"data.bpe_vocab_size={data.bpe_vocab_size}: larger than model.vocab_size={model.vocab_size}")
    if data.tokenizer == "bpe" and data.bpe_vocab_size < 257:
        raise UserError(
            f"data.bpe_vocab_size={data.bpe_vocab_size}: must be at least 257 (256 bytes and end of document)"
        )
    model.check_context(data.context, "data.context")
    _check_memory(experiment)


def _check_memory(experiment: Experiment) -> None:
    model, data = experiment.model, experiment.data
    if model.remembers and not data.contiguous:
        raise UserError(
            f"model.memory={model.memory}, model.knn_memory={model.knn_memory}: rows must go on from batch to batch to "
            "be remembered; give data.contiguous=True"
        )
    if data.contiguous and model.positions == "learned":
        raise UserError("data.contiguous=True: positions go on from row to row, beyond the table of learned ones")
    if data.contiguous and data.weights:
        raise UserError(f"data.weights={data.weights}: not with data.contiguous=True, which takes sources as they are")
    if model.remembers and experiment.optimizer.local_steps:
        raise UserError(f"optimizer.local_steps={experiment.optimizer.local_steps}: not with a model that remembers")
