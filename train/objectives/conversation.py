"""What one side says in a conversation, with images or without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tpu.errors import UserError
from train.data.batch import Batch, Layout, image_layout, sight_layout, text_layout
from train.data.chat import packing
from train.data.chat.record import Conversation, Side
from train.data.chat.rows import ConversationSource, load, open_sources
from train.data.corpus import Corpus, conversation_tokenizer, record_corpus
from train.objectives.next_token import decoder_sums, memory
from train.objectives.objective import Objective, Report, Role, Sums, check_model, perplexity, token_weights

if TYPE_CHECKING:
    import jax

    from train.config import Experiment
    from train.data.text.tokenizer import Tokenizer
    from train.objectives.bound import Bound


def roles(experiment: Experiment) -> dict[str, Role]:
    """One decoder, which may see."""
    return {"model": Role()}


def check(experiment: Experiment) -> None:
    """Raises UserError for a model that is no decoder, or has two towers."""
    check_model(experiment, "decoder", "language")
    model = experiment.model
    if model.pairs:
        raise UserError(
            f"objective.name={experiment.objective.name!r}: model.fusion={model.fusion!r}; {model.fusion!r} goes with "
            f"{model.fusion!r}"
        )


def corpus(experiment: Experiment, tokenizer: Tokenizer | None = None) -> Corpus:
    """Conversations, as many in a row as fit, made when they are asked for."""
    data, model = experiment.data, experiment.model
    tokenizer = tokenizer or conversation_tokenizer(data, model)

    def make(conversation: Conversation, counts: Counter[str]) -> packing.Part:
        return packing.part(conversation, tokenizer, data, model, counts)

    def join(parts: list[packing.Part]) -> Batch:
        return packing.joined(parts, data, model)

    def groups(source: ConversationSource, name: str, side: Side) -> list[list[int]] | None:
        return None if source.alone else packing.groups(side, (source.digest, name), tokenizer, data, model)

    found = load(open_sources(data, model), data, make, join=join, groups=groups)
    return record_corpus(found, data, tokenizer)


def layout(experiment: Experiment) -> Layout:
    """Rows of tokens and, of a model that sees, their images and where these stand."""
    data, model = experiment.data, experiment.model
    found = text_layout(data.batch_size, data.context, model.vocab_size)
    if images := image_layout(data.batch_size, data.images, model, data):
        found |= images | sight_layout(data.batch_size, data.context, bool(model.rope_sections))
    return found


def sums(
    models: Mapping[str, Bound], batch: Batch, experiment: Experiment, keys: jax.Array | None, carried: Any
) -> Sums:
    """Cross-entropy of the tokens that are to be said."""
    from model.vision.images import Images

    images = None
    if "images" in batch:
        by_token = (batch[name] for name in ("image_slots", "images_seen", "given"))
        images = Images(batch["images"], batch["image_segments"], *by_token, batch.get("image_positions"))
    return decoder_sums(models["model"], batch, experiment, keys, carried, images)


def report(
    experiment: Experiment, weights: Any, tokenizer: Tokenizer, corpus: Corpus, figures: dict[str, float], limit: int
) -> Report:
    """Of a model that sees: how often its answers to held-out questions are right."""
    if experiment.model.fusion == "none":
        return Report([], {})
    from train.evaluate import sight_report

    found, said = sight_report.figures(experiment, weights, tokenizer, limit)
    return Report(
        sight_report.lines(found), {"answers": found}, lambda: sight_report.page(experiment.name, found, said, 10)
    )


OBJECTIVE = Objective(
    roles, check, corpus, layout, token_weights, sums, perplexity, carried=memory, report=report, talks=True
)
